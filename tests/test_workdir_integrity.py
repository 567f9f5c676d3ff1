"""No result follows from a damaged or exchanged file of a workdir: it is refused or made again."""

import dataclasses
import fnmatch
import json
import pathlib
import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from safetensors.numpy import load_file

from semiseg_jax import (
    checkpoints,
    mesh,
    pseudo_labels,
    self_training,
    stage_evaluator,
    train,
    train_state,
)
from semiseg_jax.reporting import page
from semiseg_jax.runtime import metric_writer
from semiseg_jax.runtime.errors import UserError
from semiseg_jax.runtime.logger import capture_lines
from semiseg_jax.serving import model_bundle
from tests import conftest, workdirs
from tests.errors import raises_code

TEACHER, STUDENT = "round_0/teacher", "round_1/student"
LABELS = f"{TEACHER}/pseudo_labels"

# Which files of a workdir the results follow from, by what reads them.
READERS = {
    "the run": (
        "config.json",
        "data.json",
        "results.json",
        "row_hashes.json",
        "round_*/*/DONE",
        "round_*/*/*_counts.json",
        "round_*/*/best.safetensors",
        "round_*/*/checkpoints/*",
    ),
    "labelling": ("*/pseudo_labels/manifest.json", "*/pseudo_labels/*.png"),
    "prediction": ("model/model.json", "model/weights.safetensors"),
}
# Files that only people read, and confidence maps, which no stage reads.
FOR_PEOPLE = (
    *("run.json", "report.html", "gallery/*", "*/evaluation.json", "*/norms.json"),
    *("*/predictions/*", "*/pseudo_gallery*", "*/metrics.jsonl", "*/events.out.tfevents.*"),
    *("*/pseudo_labels/health.json", "*/pseudo_confidence/*"),
)


def classify(path):
    """Who reads a file of a workdir; None if that is not known."""
    kinds = READERS | {"people": FOR_PEOPLE}
    matches = [k for k, globs in kinds.items() if any(fnmatch.fnmatch(path, g) for g in globs)]
    assert len(matches) <= 1, path
    return matches[0] if matches else None


def train_nothing(stage, program, init_variables, evaluate, mesh, **_):
    """Writes what training writes, in place of `train.run`, and changes the weights a little."""
    state = train_state.create_train_state(init_variables(), program.tx, mesh)
    state = dataclasses.replace(state, params=jax.tree.map(lambda v: 1.01 * v, state.params))
    metric_writer.MetricWriter(stage.folder).write_scalars(2, {"loss": 1.0})
    with checkpoints.Checkpoints(stage.folder / "checkpoints", stage.seed) as manager:
        for step in (2, stage.steps):
            manager.save(step, dataclasses.replace(state, step=jnp.full_like(state.step, step)))
    evaluate(2, state)
    return state


@pytest.fixture(scope="module", autouse=True)
def two_devices():
    """As in test_self_training.py, whose programs these runs share; no step is compiled."""
    make = mesh.make_mesh
    # Traced once for each program; the shared programs live as long as the module.
    shapes = {}

    def state_shapes(program, mesh, trace=train.state_shapes):
        if id(program) not in shapes:
            shapes[id(program)] = trace(program, mesh)
        return shapes[id(program)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "run", train_nothing)
        patch.setattr(train, "state_shapes", state_shapes)
        patch.setattr(page, "write", lambda workdir: [])
        patch.setattr(mesh, "make_mesh", lambda: make(jax.devices()[:2]))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("integrity")
    conftest.write_folder_data(folder / "data")
    return folder


def make_config(folder, **changes):
    """A teacher and a student, evaluated inside too, whose best weights count."""
    config = conftest.in_pairs(conftest.tiny_folder_config(folder / "data", folder / "cache"))
    config.pseudo.flip = config.pseudo.keep_confidence = True
    config.model.head = "v3plus"
    config.eval.select, config.eval.every = "reported", 2
    config.rounds.control = False
    config.update_from_flattened_dict(changes)
    return config


@pytest.fixture(scope="module")
def whole(folder, two_devices):
    """The workdir of a finished run; no test changes it."""
    self_training.run(make_config(folder), folder / "whole")
    return folder / "whole"


@pytest.fixture
def config(folder):
    return make_config(folder)


@pytest.fixture
def run(whole, tmp_path):
    """A copy of the workdir."""
    return pathlib.Path(shutil.copytree(whole, tmp_path / "run"))


class MadeAgainError(Exception):
    """The run would label or evaluate."""


class TrainsError(MadeAgainError):
    """The run would train a stage, with the label maps that are there."""


def raises(error):
    """A function that raises an error, whatever it is called with."""

    def refuse(*_, **__):
        raise error

    return refuse


@pytest.fixture
def no_work(monkeypatch):
    """Training, labelling and evaluation raise MadeAgainError."""
    monkeypatch.setattr(self_training.SelfTraining, "_train", raises(TrainsError))
    monkeypatch.setattr(pseudo_labels.Labeler, "_label", raises(MadeAgainError))
    monkeypatch.setattr(stage_evaluator.StageEvaluator, "_evaluate", raises(MadeAgainError))


def files_of(workdir):
    return sorted(
        os_path
        for path in workdir.rglob("*")
        if path.is_file() and (os_path := path.relative_to(workdir).as_posix()) != ".lock"
    )


def flip_bit(path, rng):
    content = bytearray(path.read_bytes())
    bit = rng.randrange(8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    return bit


def check_run(config, run, whole):
    """The run refuses the workdir, makes something again, or ends with the results of before."""
    try:
        self_training.run(config, run)
    except UserError as error:
        assert error.code and "\n" not in str(error)
        return
    except MadeAgainError:
        return
    contents = [json.loads((w / "results.json").read_text()) for w in (run, whole)]
    assert contents[0] == contents[1]
    weights = [load_file(w / "model/weights.safetensors") for w in (run, whole)]
    assert weights[0].keys() == weights[1].keys()
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])


def check_labelling(config, run, whole):
    """A student that is not trained yet is given the label maps of before, or none."""
    (run / STUDENT / "DONE").unlink()
    shutil.rmtree(run / STUDENT / "checkpoints")
    try:
        self_training.run(config, run)
    except TrainsError:
        manifests = [json.loads((w / LABELS / "manifest.json").read_text()) for w in (run, whole)]
        assert manifests[0] == manifests[1]
        for path in (run / LABELS).rglob("*.png"):
            before = Image.open(whole / path.relative_to(run))
            np.testing.assert_array_equal(Image.open(path), before)
    except (UserError, MadeAgainError):
        pass
    else:
        raise AssertionError("the student was not trained")


def check_prediction(config, run, whole):
    """The model is refused, or is the same up to the names and colours of its classes."""
    try:
        loaded = model_bundle.load(run)
    except UserError:
        return
    expected = model_bundle.load(whole)
    jax.tree.map(np.testing.assert_array_equal, loaded.variables, expected.variables)
    free = (*model_bundle.EDITABLE, model_bundle.WEIGHTS_HASH)
    descriptions = [
        {k: v for k, v in bundle.description.items() if k not in free}
        for bundle in (loaded, expected)
    ]
    assert {**descriptions[1], **descriptions[0]} == descriptions[0]
    assert loaded.protocol == expected.protocol and loaded.pad_to == expected.pad_to


CHECKS = {"the run": check_run, "labelling": check_labelling, "prediction": check_prediction}


def check_flip(path, seed, config, run, whole):
    """Flips a bit of a file in a new copy of the workdir, and checks what its reader does."""
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(whole, run)
    bit = flip_bit(run / path, random.Random(f"{path} {seed}"))
    try:
        CHECKS[classify(path)](config, run, whole)
    except Exception as error:
        raise AssertionError(f"{path}, bit {bit} flipped") from error


def test_every_file_of_a_workdir_is_classified(whole):
    assert [path for path in files_of(whole) if classify(path) is None] == []


def test_a_flipped_bit_is_found(config, whole, run, no_work):
    """One file of each pattern; test_workdir_integrity_slow.py walks all files."""
    files = files_of(whole)
    rng = random.Random(0)
    for pattern in (pattern for patterns in READERS.values() for pattern in patterns):
        matching = [path for path in files if fnmatch.fnmatch(path, pattern)]
        assert matching, pattern
        check_flip(rng.choice(matching), 0, config, run, whole)


def test_what_only_people_read_changes_no_result(config, whole, run, no_work):
    for path in files_of(run):
        if classify(path) == "people":
            flip_bit(run / path, random.Random(path))
    self_training.run(config, run)
    assert workdirs.rows(run) == workdirs.rows(whole)


def test_a_row_without_its_hash_is_evaluated_again(config, run, no_work):
    """Only stages of older code have rows of which the weights are not known."""
    (run / "row_hashes.json").unlink()
    with pytest.raises(MadeAgainError):
        self_training.run(config, run)
    for stage in (TEACHER, STUDENT):
        (run / stage / "DONE").write_bytes(b"")
    self_training.run(config, run)


def test_label_maps_of_other_images_are_not_imported(config, whole, tmp_path, monkeypatch):
    """The teacher of another workdir labelled the image that had this id there."""
    config.rounds.teacher_from, config.data.root = str(whole), str(tmp_path / "data")
    conftest.write_folder_data(tmp_path / "data")
    ids = sorted(json.loads((whole / LABELS / "manifest.json").read_text())["images"])
    path = tmp_path / "data/images/train" / f"{ids[2]}.png"
    Image.fromarray(255 - np.asarray(Image.open(path))).save(path)
    labelled = []
    monkeypatch.setattr(
        pseudo_labels.Labeler,
        "_label",
        lambda self, variables, examples, *_: (
            labelled.extend(example.id for example in examples) or raises(MadeAgainError)()
        ),
    )
    with pytest.raises(MadeAgainError):
        self_training.run(config, tmp_path / "importing")
    assert labelled == [ids[2]]


@pytest.mark.parametrize("name", ["config.json", "data.json"])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_missing_fingerprint_beside_stages_is_refused(folder, run, no_work, name, seed):
    (run / name).unlink()
    (run / "results.json").unlink()
    config_differs = seed and name == "data.json"
    code = "workdir-of-another-config" if config_differs else "fingerprint-missing"
    with raises_code(code):
        self_training.run(make_config(folder, seed=seed), run)


def exchange(labels):
    first, second = sorted(labels.rglob("*.png"))[:2]
    contents = first.read_bytes(), second.read_bytes()
    first.write_bytes(contents[1])
    second.write_bytes(contents[0])


def repaint(labels):
    path = min(labels.rglob("*.png"))
    image = Image.open(path)
    text = PngImagePlugin.PngInfo()
    for key in ("stamp", "id", "pixels", "mean_confidence", "histogram"):
        text.add_text(key, image.info[key])
    values = np.asarray(image) + 1
    repainted = Image.fromarray(values)
    repainted.putpalette(image.getpalette())
    repainted.save(path, pnginfo=text)


@pytest.mark.parametrize("change", [exchange, repaint])
def test_without_the_manifest_changed_label_maps_are_made_again(
    config, whole, run, monkeypatch, change
):
    change(run / LABELS)
    (run / LABELS / "manifest.json").unlink()
    (run / STUDENT / "DONE").unlink()
    monkeypatch.setattr(self_training.SelfTraining, "train_stage", raises(TrainsError))
    with pytest.raises(TrainsError):
        self_training.run(config, run)
    for path in (run / LABELS).rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (whole / path.relative_to(run)).read_bytes(), path


def test_a_changed_row_of_a_curve_is_left_out(config, whole, run, no_work):
    """Its stage has ended: what is reported follows from other rows."""
    before = json.loads((whole / "results.json").read_text())
    content = json.loads((run / "results.json").read_text())
    content["curve"][0]["miou"] += 0.25
    (run / "results.json").write_text(json.dumps(content))
    with capture_lines() as lines:
        results = self_training.run(config, run)
    assert any("step 2, was changed" in ln and "without this point" in ln for ln in lines)
    assert [row.to_json() for row in results.rows] == before["rows"]
    assert [row.to_json() for row in results.curve] == before["curve"][1:]
