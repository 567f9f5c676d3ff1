"""Configs, their keys and their constraints, and the sentences a user gets for a wrong one."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from configs import default
from semiseg_jax import settings
from semiseg_jax.errors import UserError
from tests import mains
from tests.conftest import tiny_config

ROOT = Path(__file__).parents[1]
SHIPPED = sorted(
    p.stem for p in (ROOT / "configs").glob("*.py") if p.stem not in ("__init__", "default")
)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configs_keep_the_constraints(name):
    settings.check(importlib.import_module(f"configs.{name}").get_config())


def test_defaults_are_the_papers():
    config = default.get_config()
    settings.check(config)
    assert (config.loss.unlabeled, config.model.norm, config.rounds.count) == ("scl", "dsbn", 3)
    assert config.pseudo.scales == (0.5, 0.75, 1.0, 1.5, 1.75) and config.pseudo.flip
    assert (config.data.weak_stream, config.data.strong_stream) == (("labeled",), ("pseudo",))
    assert config.train.teacher_steps == config.train.steps == 20_000


def test_a_config_file_cannot_set_a_key_that_is_not_declared():
    with pytest.raises(AttributeError, match="steps"):
        default.get_config().train.stepz = 3


def test_teacher_steps_follow_steps_and_not_the_other_way():
    config = default.get_config()
    config.train.steps = 7
    assert config.train.teacher_steps == 7
    config.train.teacher_steps = 9
    assert config.train.steps == 7


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("model__backbone", "resnet19", r"model.backbone is 'resnet19'.*did you mean resnet18"),
        ("data__crop", (3,), r"data.crop is \(3,\): make it \(height, width\)"),
        ("data__scale", (2.0, 0.5), "0 < low <= high"),
        ("data__weak_stream", ("labelled",), "distinct names out of labeled, pseudo"),
        ("model__head", "v3plu", r"one of v3plus, v3plus_smp, v2 \(did you mean v3plus\?\)"),
        ("model__output_stride", 4, "8, 16 or 32"),
        ("model__norm_epsilon__head", -1.0, "above 0, or leave it out"),
        ("model__aspp_rates", (6, 0), "integers above 0"),
        ("model__multi_grid", (1, 2, 4), "tiny takes none"),
        ("train__steps", 0, "train.steps is 0: make it at least 1"),
        ("optim__momentum", 1.0, "below 1"),
        ("sda__ops", ("blurr",), "out of contrast_gamma"),
        ("data__classes", ("a", "a"), "a tuple of distinct names"),
        ("data__classes", ("a", 1), "a tuple of distinct names"),
        ("data__ignore_ids", (255.0,), "integers from 0 to 255"),
        ("pseudo__scales", (), "at least one"),
    ],
)
def test_values_outside_their_constraints_are_one_sentence(key, value, sentence):
    with pytest.raises(UserError, match=sentence):
        settings.check(tiny_config(**{key: value}))


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("seed", None, "seed is None: give it a value"),
        ("data.classes", None, "data.classes is None"),
        ("eval.flip", None, "eval.flip is None"),
        ("data.labels", float("inf"), "data.labels is inf: make it finite"),
        ("eval.scales", (1.0, float("inf")), r"eval.scales is \(1.0, inf\): make it finite"),
        ("loss.scl.alpha", float("nan"), "loss.scl.alpha is nan: make it finite"),
    ],
)
def test_nothing_and_what_is_not_finite_are_no_values(key, value, sentence):
    config = tiny_config()
    section, _, name = key.rpartition(".")
    held = config
    for part in filter(None, section.split(".")):
        held = held[part]
    with config.ignore_type():
        held[name] = value
    with pytest.raises(UserError, match=sentence):
        settings.check(config)


def test_both_streams_empty_is_refused():
    config = tiny_config(data__weak_stream=(), data__strong_stream=())
    with pytest.raises(UserError, match="both empty"):
        settings.check(config)


def test_drawing_more_distinct_operations_than_there_are_is_refused():
    config = tiny_config(sda__replace=False, sda__num_ops=3, sda__ops=("blur", "hsv"))
    with pytest.raises(UserError, match="without replacement from 2"):
        settings.check(config)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("configs/streets.py", "streets"),
        ("configs/camvid.py:half", "camvid_half"),
        ("configs/camvid.py:half,1_8", "camvid_half_1_8"),
        ("/x/configs/cityscapes.py:1_4,full", "cityscapes_1_4_full"),
    ],
)
def test_run_names(path, name):
    assert settings.run_name(path) == name


def test_a_key_that_a_config_file_mistypes_is_named(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from configs import default\n"
        "def get_config():\n"
        "    config = default.get_config()\n"
        "    config.train.stepz = 3\n"
        "    return config\n"
    )
    done = run_main(f"--config={path}")
    assert "There is no config key stepz: did you mean steps?" in done.stderr
    assert "Traceback" not in done.stderr


def run_main(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "semiseg_jax.main", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("def get_config(): pass", "returns nothing: have it return the config"),
        ("def get_config(): return 3", "returns int: have it return the config"),
        ("def get_config(): return 1 // 0", r"mine\.py raises ZeroDivisionError: integer"),
        ("def get_config(): return {'a': 1}['b']", r"mine\.py raises KeyError: 'b'"),
        ("def get_config(): return 'x'.foo", "raises AttributeError: 'str' object has no attrib"),
        ("def get_config(): raise ValueError('one\\ntwo')", "raises ValueError: one; configs"),
        ("", "raises AttributeError: module .* has no attribute 'get_config'"),
        ("def get_config(): return open('/nowhere/x')", "raises FileNotFoundError: .*'/nowhere/x'"),
        ("from configs import default\ndefault.get_confg()", "no attribute 'get_confg'"),
    ],
)
def test_config_files_that_go_wrong(source, sentence, tmp_path, monkeypatch):
    path = tmp_path / "mine.py"
    path.write_text(source)
    # Where the file of the test before is still to be found, of the same name.
    monkeypatch.delitem(sys.modules, "config_config", raising=False)
    assert re.search(sentence, mains.refused(monkeypatch, f"--config={path}"))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--config="], "--config is empty"),
        (["--config", str(ROOT / "configs")], "configs is a folder"),
        (["--config=nothere.py:half", "--config.seed=1"], "The config nothere.py is missing"),
    ],
)
def test_commands_without_a_config_file(arguments, sentence, monkeypatch):
    assert sentence in mains.refused(monkeypatch, *arguments)


@pytest.mark.parametrize("key", ["data.root.x", "seed.x", "data.crop.x", "model.align_corners.x"])
def test_an_override_that_goes_on_behind_a_value(key, monkeypatch):
    said = mains.refused(
        monkeypatch, f"--config={ROOT / 'configs/streets.py'}", f"--config.{key}=1"
    )
    assert "asks for a part that its value does not have" in said


@pytest.mark.parametrize("returned", ["None", "3"])
def test_an_override_of_what_is_no_config(returned, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(f"def get_config(): return {returned}")
    monkeypatch.delitem(sys.modules, "config_config", raising=False)
    said = mains.refused(monkeypatch, f"--config={tmp_path / 'mine.py'}", "--config.data.root=x")
    assert "get_config of the config file returns" in said


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["--config=configs/streets.py", "--config.train.stepz=3"],
            "no config key stepz: did you mean steps?",
        ),
        (["--config=configs/streets.py", "--config.train.steps=many"], "many"),
        (["--config=configs/none.py", "--config.seed=1"], "The config configs/none.py is missing"),
        (
            ["--config=configs/camvid.py:third"],
            "is 'third': make it one of full, half, one of 1_30",
        ),
        (["--confg=configs/streets.py"], "confg"),
        ([], "--config=configs/streets.py"),
        (["--config=configs/streets.py", "--config.model.norm=none"], "model.norm is 'none'"),
        (
            ["--config=configs/camvid.py", "--config.data.root=/nowhere"],
            "The data folder /nowhere is missing: download the CamVid folder",
        ),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_wrong_commands_end_with_a_sentence(arguments, sentence, tmp_path):
    done = run_main(*arguments, *([f"--workdir={tmp_path}"] if arguments else []))
    assert done.returncode != 0
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
