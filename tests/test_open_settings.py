"""Commands with settings that are chosen from the images; few labels; configs/folder.py."""

import collections
import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs import default, folder
from semiseg_jax import config_check, fitted_settings, self_training, stages
from semiseg_jax.data import input_pipeline, load, preview, size_settings, splits
from semiseg_jax.experiments import sweep
from semiseg_jax.planning import planner, workload
from semiseg_jax.runtime.errors import UserError
from tests.conftest import tiny_config
from tests.errors import raises_code

ROOT = Path(__file__).parents[1]
CHOSEN = {"crop": (33, 33), "scale": (0.95, 1.5), "downscale": 1}
RATES = (1, 1, 2)


@pytest.fixture
def config(folder_config):
    """`folder_config` with every setting open; its images are of 36x48 and 48x36 pixels."""
    folder_config.data.update({"crop": (), "scale": (), "downscale": 0})
    folder_config.model.head, folder_config.model.aspp_rates = "v3plus", ()
    return folder_config


def chosen(config):
    assert config.model.aspp_rates == RATES
    return {key: config.data[key] for key in CHOSEN}


class StoppedError(Exception):
    """Raised in place of the training of the first stage."""


@pytest.fixture
def start(monkeypatch, tmp_path):
    """Starts a run until its first stage; returns the config that the run has."""

    def stop(training, *arguments):
        raise StoppedError(training)

    monkeypatch.setattr(self_training.SelfTraining, "train_stage", stop)

    def start(config, workdir=tmp_path / "run"):
        with pytest.raises(StoppedError) as stopped:
            self_training.run(config, workdir)
        return stopped.value.args[0]._config

    return start


def add_image(config, name="large", size=(480, 640)):
    path = Path(config.data.root) / "images" / "train" / f"{name}.png"
    Image.fromarray(np.zeros((*size, 3), np.uint8)).save(path)


# ---- a run


def test_a_run_chooses_once_and_says_so(config, start, tmp_path, capsys):
    assert chosen(start(config)) == CHOSEN
    (line,) = (s for s in capsys.readouterr().out.splitlines() if "crops of 33x33" in s)
    settings = json.loads((tmp_path / "run" / "fitted.json").read_text())["settings"]
    assert {setting["reason"] for setting in settings.values()} == {line}
    recorded = json.loads((tmp_path / "run" / "config.json").read_text())
    assert recorded["data"]["crop"] == [33, 33] and recorded["model"]["aspp_rates"] == list(RATES)
    # The settings of the first start, whatever a later version of the rules would choose.
    fitted = tmp_path / "run" / "fitted.json"
    fitted.write_text(fitted.read_text().replace("1.5", "1.4"))
    path = tmp_path / "run" / "config.json"
    path.write_text(path.read_text().replace("1.5", "1.4"))
    assert chosen(start(config)) == CHOSEN | {"scale": (0.95, 1.4)}
    assert "crops of" not in capsys.readouterr().out


def test_another_given_crop_is_refused_and_the_chosen_one_is_not(config, start, tmp_path):
    start(config)
    config.data.crop = (33, 33)
    assert chosen(start(config)) == CHOSEN
    config.data.crop = (17, 17)
    with raises_code("workdir-of-another-config", "data.crop"):
        self_training.run(config, tmp_path / "run")


def test_images_that_are_added_later_are_refused(config, start, tmp_path):
    start(config)
    add_image(config)
    with raises_code("data-changed"):
        self_training.run(config, tmp_path / "run")


def test_a_run_that_cannot_start_keeps_no_choice(config, tmp_path):
    config.train.batch_labeled = 3
    with pytest.raises(UserError):
        self_training.run(config, tmp_path / "run")
    assert not (tmp_path / "run" / "fitted.json").exists()


def test_a_refused_start_with_minutes_keeps_no_fit(config, start, tmp_path):
    """Another config may be given then, to which the old fit would not belong."""

    def fit(config):
        values = {"train.steps": 77, "rounds.count": 1}
        return fitted_settings.record(tmp_path / "run", config, values, "Fitted.", 60)

    steps, config.train.batch_labeled = config.train.steps, 3
    with raises_code("batch-not-divisible"):
        self_training.run(config, tmp_path / "run", choose_settings=fit)
    assert (tmp_path / "run" / "fitted.json").exists()
    config.train.batch_labeled = 8
    assert start(config).train.steps == steps
    assert fitted_settings.read_minutes(tmp_path / "run") is None


def test_a_fit_beside_stages_without_their_config_is_kept(config, tmp_path):
    fitted_settings.record(tmp_path, config, {"train.steps": 77}, "Fitted.", 60)
    (tmp_path / "round_0" / "teacher" / "checkpoints").mkdir(parents=True)
    with raises_code("fingerprint-missing", "config.json"):
        self_training.run(config, tmp_path)
    assert fitted_settings.read_minutes(tmp_path) == 60


def test_an_interrupted_first_start_chooses_again(config, start, tmp_path):
    start(config)
    (tmp_path / "run" / "fitted.json").unlink()
    assert chosen(start(config)) == CHOSEN


def test_large_images_are_downscaled(config, start, monkeypatch):
    monkeypatch.setattr(size_settings, "MAX_PIXELS", 20 * 20)
    resolved = start(config)
    assert resolved.data.downscale == 3 and resolved.data.crop == (17, 17)


# ---- other commands


def test_the_preview_shows_crops_of_the_chosen_size(config, monkeypatch):
    configs = []

    def first_views(config, *arguments):
        configs.append(config)
        raise StoppedError

    monkeypatch.setattr(preview, "first_views", first_views)
    with pytest.raises(StoppedError):
        preview.make_sheets(config, "title", 1)
    assert chosen(configs[0]) == CHOSEN


def test_the_check_of_the_data_says_what_would_be_chosen(config):
    report = splits.examine_config(config)
    assert not report.errors
    assert any("crops of 33x33; scales of 0.95 to 1.5" in note for note in report.notes)


def test_a_plan_has_the_settings_of_the_images(config, monkeypatch):
    configs = []

    def make_plan(config, *arguments):
        configs.append(config)
        raise StoppedError

    monkeypatch.setattr(planner, "make_plan", make_plan)
    with pytest.raises(StoppedError):
        planner.run(config, ["cpu"])
    assert chosen(configs[0]) == CHOSEN


def test_a_plan_without_the_data_takes_the_published_sizes(tmp_path):
    config = tiny_config(data__name="cityscapes", data__root=str(tmp_path / "nothing"))
    config.data.update({"crop": (), "scale": (), "downscale": 0})
    resolved = workload.resolve_sizes(config)
    assert resolved.data.downscale == 2 and resolved.data.crop == (177, 369)


def test_all_trials_of_a_table_have_the_settings_of_its_first_start(
    config, tmp_path, monkeypatch, capsys
):
    table = sweep.Sweep(config, "1", [0], tmp_path)
    assert not (tmp_path / "fitted.json").exists()
    monkeypatch.setattr(sweep.Sweep, "_run_trial", lambda *_: None)
    table.run()
    add_image(config)
    for again in (table, sweep.Sweep(config, "1", [0, 1], tmp_path)):
        assert all(chosen(trial.config) == CHOSEN for trial in again.trials)


@pytest.mark.parametrize("head", ["v3plus", "v2"])
def test_open_settings_satisfy_the_constraints(config, head):
    config.model.head = head
    config_check.check(config)
    config.train.batch_labeled = config.train.batch_unlabeled = 1
    if head == "v2":  # Its norms have a value for each pixel of the features.
        config_check.check(config)
    else:
        with raises_code("batch-norm-sees-one-value"):
            config_check.check(config)


@pytest.mark.parametrize(
    ("key", "value"), [("crop", (0, 0)), ("crop", (5,)), ("scale", (1.0,)), ("downscale", -1)]
)
def test_an_invalid_value_is_not_taken_for_an_open_one(config, key, value):
    config.data[key] = value
    with raises_code("config-value-invalid", f"data.{key}", "to choose it from the sizes"):
        config_check.check(config)


def test_data_of_an_open_factor_are_refused_before_they_are_read(config):
    config.data.update({"crop": (17, 17), "root": "/nowhere"})
    with raises_code("downscale-not-chosen", "data.downscale", "size_settings.resolve"):
        load.load_dataset(config)


# ---- few labelled images


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_labelled_images_repeat_within_a_batch(folder_config, count):
    folder_config.sda.num_ops = 0
    data = load.load_dataset(folder_config)
    data = dataclasses.replace(data, labeled=data.labeled[:count])
    spec = stages.batch_spec(folder_config, "teacher")
    batches = list(
        input_pipeline.train_batches(
            folder_config,
            data,
            (),
            spec,
            np.array((1, 2)),
            range(3),
            np.zeros(3, np.uint8),
        )
    )
    for batch in batches:
        drawn = collections.Counter(batch.ids)
        assert sum(drawn.values()) == 8 and len(drawn) == count
        assert max(drawn.values()) - min(drawn.values()) <= 2
        # Each with its own augmentation.
        assert len({tuple(seed) for seed in batch.seed}) == 8
        assert len({image.tobytes() for image in batch.image}) == 8
    # Over all steps, no image is drawn twice more often than another.
    total = collections.Counter(name for batch in batches for name in batch.ids)
    assert max(total.values()) - min(total.values()) <= 1


# ---- configs/folder.py


def test_the_folder_config_has_three_lines_to_fill():
    text = (ROOT / "configs" / "folder.py").read_text()
    keys = re.findall(r"^    # \d\. (?:.*\n    #)*.*\n    config\.(\S+) =", text, re.M)
    assert keys == ["data.root", "data.classes", "data.labels"]
    config = folder.get_config()
    assert size_settings.is_open(config)
    assert not config.model.aspp_rates and config.model.pretrained == "imagenet"
    assert config.train.batch_labeled >= 4
    config_check.check(config)


def test_the_defaults_leave_nothing_open():
    assert not size_settings.is_open(default.get_config())
