"""The fingerprint of a workdir: damaged files, and configs that older code wrote."""

import hashlib
import json
import random
from pathlib import Path

import pytest
from etils import epath
from flax import traverse_util

from configs import default
from semiseg_jax import fitted_settings, workdir
from semiseg_jax.data import image_io, load
from semiseg_jax.reporting import artifacts, run
from semiseg_jax.runtime.errors import UserError
from tests import json_mutants
from tests.errors import raises_code

# Keys of configs/default.py in the version that wrote the first workdirs, one per line.
FIRST_KEYS = Path(__file__).parent / "data" / "config_keys_v0.txt"

HOW_TO_ADD_A_KEY = (
    "A new key of configs/default.py needs an entry in workdir.ADDED_KEYS, with its default value. "
    "The default must equal the behaviour of the older code: workdirs that were written without "
    "the key continue with it, and their config_hash stays. A removed or renamed key would make "
    "these workdirs unusable: keep the key. Leave tests/data/config_keys_v0.txt as it is."
)


@pytest.mark.parametrize("name", ["config.json", "data.json"])
@pytest.mark.parametrize("content", ["[]", "{}", "3", '{"data": 1}', "{"])
def test_a_damaged_fingerprint_is_an_error_once_there_are_stages(name, content, tmp_path):
    (tmp_path / name).write_text(content)
    assert workdir.read_fingerprint(epath.Path(tmp_path), name) is None
    (tmp_path / "round_0").mkdir()
    with raises_code("fingerprint-damaged", name):
        workdir.read_fingerprint(epath.Path(tmp_path), name)


def test_fingerprints_of_any_other_form_are_refused_or_compared(folder_config, tmp_path):
    """What passes has the types that the comparisons expect."""
    folder = epath.Path(tmp_path)
    data = load.load_dataset(folder_config)
    weights = {"tiny": {"name": "imagenet", "sha256": "0" * 64, "license": None}}
    workdir.write_config(folder, folder_config)
    workdir.write_data(folder, data)
    workdir.write_pretrained(folder, weights)
    fitted_settings.record(
        folder, folder_config, {"train.steps": folder_config.train.steps}, "For a reason."
    )
    (folder / "round_0/teacher").mkdir(parents=True)
    (folder / "round_0/teacher/DONE").touch()

    def check():
        workdir.check_config(folder, fitted_settings.restore(folder, folder_config))
        workdir.check_data(folder, data)
        workdir.check_pretrained(folder, weights)
        workdir.check_teacher(folder, folder_config, data)
        workdir.read_record(folder)

    check()
    rng = random.Random(0)
    for name in ("config.json", "data.json", "fitted.json", "pretrained.json"):
        path = folder / name
        original, refused = path.read_text(), 0
        mutants = list(json_mutants.mutants(json.loads(original), branches=2))
        texts = [*json_mutants.TEXTS, *rng.sample(mutants, 120 if len(mutants) > 600 else 30)]
        for text in texts:
            path.write_text(text)
            try:
                check()
            except UserError as error:
                assert str(error).count("\n") == 0
                refused += 1
        assert refused > len(texts) / 3, name
        path.write_text(original)


@pytest.mark.parametrize("content", ["[]", "{}", "3", "{"])
def test_a_report_treats_damaged_files_as_missing(content, tmp_path):
    for name in ("results.json", artifacts.RUN):
        (tmp_path / name).write_text(content)
    (tmp_path / "config.json").write_text(default.get_config().to_json_best_effort())
    contents = run.read(tmp_path)
    assert (contents.rows, contents.curve, contents.about) == ([], [], None)
    (tmp_path / "config.json").write_text(content)
    with raises_code("report-config-missing"):
        run.read(tmp_path)


def write_config_without(path, config, *keys):
    """Writes config.json as older code did that had no such keys."""
    (path / "config.json").write_text(json.dumps(without(config, *keys)))


def without(config, *keys):
    flat = traverse_util.flatten_dict(json.loads(config.to_json_best_effort()), sep=".")
    return traverse_util.unflatten_dict({k: v for k, v in flat.items() if k not in keys}, sep=".")


def another_value(value):
    """Returns a different value of the same type."""
    if isinstance(value, tuple):
        return tuple(map(another_value, value)) or (1,)
    if isinstance(value, str):
        return f"{value}x"
    return not value if isinstance(value, bool) else value + 1


def test_a_workdir_of_older_code_continues(tmp_path):
    config = default.get_config()
    write_config_without(tmp_path, config, "rounds.teacher_from")
    (tmp_path / "round_0").mkdir()
    workdir.check_config(tmp_path, config)
    config.rounds.teacher_from = "runs/other"  # Allowed in every workdir (RESUME_SAFE_KEYS).
    workdir.check_config(tmp_path, config)
    config.seed = 1
    with raises_code("workdir-of-another-config", "seed: 0 there, 1 here"):
        workdir.check_config(tmp_path, config)


@pytest.mark.parametrize("key", workdir.ADDED_KEYS)
def test_a_key_missing_in_config_json_has_its_default(key, tmp_path, monkeypatch):
    # Otherwise the key may differ anyway.
    monkeypatch.setattr(workdir, "RESUME_SAFE_KEYS", workdir.RESUME_SAFE_KEYS - {key})
    config = default.get_config()
    if key.startswith("eval."):
        config.eval.select = "reported"
    write_config_without(tmp_path, config, key)
    workdir.check_config(tmp_path, config)
    value = workdir.ADDED_KEYS[key]
    config.update_from_flattened_dict({key: another_value(value)})
    sentence = f"{key}: {value!r} there, {another_value(value)!r} here"
    with pytest.raises(UserError) as refused:
        workdir.check_config(tmp_path, config)
    assert sentence in str(refused.value)


def images(labeled="ab", unlabeled="cd"):
    """A data set of these ids, whose files are not read."""
    labeled, unlabeled = (
        tuple(load.Example(id_, f"{id_}.png", mask) for id_ in ids)
        for ids, mask in ((labeled, "mask.png"), (unlabeled, None))
    )
    table = image_io.id_table(2)
    return load.Dataset("set", ("a", "b"), ((0, 0, 0), (1, 1, 1)), table, labeled, unlabeled, ())


@pytest.fixture
def with_teacher(tmp_path):
    """A config, and a workdir of older code with a finished teacher of `images()`."""
    config = default.get_config()
    write_config_without(tmp_path, config, *workdir.ADDED_KEYS)
    workdir.write_data(tmp_path, images())
    (tmp_path / "round_0/teacher").mkdir(parents=True)
    (tmp_path / "round_0/teacher/DONE").touch()
    config.rounds.teacher_from = str(tmp_path)
    return epath.Path(tmp_path), config


@pytest.mark.parametrize("unlabeled", ["cd", "c", "cdefg"])
def test_a_teacher_of_older_code_can_be_imported(with_teacher, unlabeled):
    """Other unlabelled images make no other teacher."""
    assert workdir.check_teacher(*with_teacher, images(unlabeled=unlabeled)) == "dsbn"


@pytest.mark.parametrize(
    ("key", "value", "is_same"),
    [
        ("loss.labeled", "focal", False),
        ("loss.ohem.share", 0.5, False),
        ("loss.class_weights", "balanced", False),
        ("optim.kind", "adamw", False),
        ("optim.betas", (0.9, 0.99), False),
        ("loss.unlabeled", "ce", True),
        ("loss.scl.alpha", 2.0, True),
    ],
)
def test_teachers_depend_on_the_loss_of_labelled_images_and_on_the_optimiser(
    with_teacher, key, value, is_same
):
    source, config = with_teacher
    config.update_from_flattened_dict({key: value})
    if is_same:
        workdir.check_teacher(source, config, images())
        return
    with raises_code("teacher-of-another-config", f"{value!r} here"):
        workdir.check_teacher(source, config, images())


@pytest.mark.parametrize("labeled", ["a", "ax"])
def test_a_teacher_of_other_labelled_images_is_not_imported(with_teacher, labeled):
    with raises_code("teacher-of-other-images", str(with_teacher[0])):
        workdir.check_teacher(*with_teacher, images(labeled))


@pytest.mark.parametrize("key", workdir.ADDED_KEYS)
def test_the_config_hash_omits_an_added_key_at_its_default(key):
    config = default.get_config()
    text = json.dumps(without(config, *workdir.ADDED_KEYS), sort_keys=True)
    older_hash = hashlib.sha256(text.encode()).hexdigest()[:16]
    assert workdir.config_hash(config) == older_hash
    config.update_from_flattened_dict({key: another_value(workdir.ADDED_KEYS[key])})
    assert workdir.config_hash(config) != older_hash


def test_every_config_key_is_of_the_first_version_or_added_with_its_default():
    keys = traverse_util.flatten_dict(default.get_config().to_dict(), sep=".")
    first = set(FIRST_KEYS.read_text().split())
    added = {key: value for key, value in keys.items() if key not in first}
    assert added == workdir.ADDED_KEYS, HOW_TO_ADD_A_KEY
    assert first <= keys.keys(), f"Missing: {sorted(first - keys.keys())}. {HOW_TO_ADD_A_KEY}"
