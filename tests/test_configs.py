"""Configs: keys, constraints, and the error messages for invalid values and commands."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from configs import default
from semiseg_jax import config_check, stages
from semiseg_jax.methods import registry
from semiseg_jax.methods.method import OnlineMethod
from semiseg_jax.models import vit
from semiseg_jax.runtime import config_files
from tests import mains
from tests.conftest import tiny_config
from tests.errors import raises_code

ROOT = Path(__file__).parents[1]
SHIPPED = sorted(
    p.stem
    for p in (ROOT / "configs").glob("*.py")
    if p.stem != "default" and not p.stem.startswith("_")
)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configs_satisfy_the_constraints(name):
    config_check.check(importlib.import_module(f"configs.{name}").get_config())


@pytest.mark.parametrize(
    "name",
    [
        *("folder:dinov2_s", "folder:dinov2_s_frozen", "pascal_voc:dinov2_b,voc"),
        *("pascal_voc:xception65,1_4", "cityscapes:dinov2_s,1_30", "cityscapes:1_2,dinov2_b"),
    ],
)
def test_arguments_of_shipped_configs_satisfy_the_constraints(name):
    config = config_files.load(name)
    config_check.check(config)
    words = name.partition(":")[2].split(",")
    sizes = {word.removesuffix("_frozen")[-1] for word in words if word.startswith("dinov2")}
    if sizes:
        patch = vit.SPECS[config.model.backbone].patch
        assert config.model.backbone == f"dinov2_vit{sizes.pop()}14"
        assert all(side % patch == 0 for side in (*config.data.crop, *config.eval.window))
    assert config.model.freeze_backbone == name.endswith("_frozen")


@pytest.mark.parametrize("file", ["folder", "pascal_voc", "cityscapes"])
def test_an_argument_that_there_is_not_is_named(file):
    with pytest.raises(
        ValueError, match=rf"configs/{file}\.py is 'vgg': make it one of .*dinov2_s"
    ):
        config_files.load(f"{file}:vgg")


def test_the_other_network_on_cityscapes_takes_a_share_alone():
    with pytest.raises(ValueError, match=r"'dinov2_s': make it one of 1_30, 1_8, 1_4, 1_2, full"):
        config_files.load("cityscapes_deeplabv2:dinov2_s")


METHODS = sorted(name for name, cls in registry.METHODS.items() if issubclass(cls, OnlineMethod))


def test_each_method_has_a_config():
    files = (ROOT / "configs" / "methods").glob("*.py")
    assert sorted(file.stem for file in files if file.stem != "__init__") == METHODS


def recipes():
    """The configs of methods with each argument that their docstrings name."""
    docs = [importlib.import_module(f"configs.methods.{name}").__doc__ for name in METHODS]
    return re.findall(r"--config=(configs/methods/\w+\.py:\w+)", "\n".join(docs))


@pytest.mark.parametrize("recipe", recipes())
def test_recipes_satisfy_the_constraints(recipe):
    config = config_files.load(recipe)
    config_check.check(config)
    assert config.method.name == Path(recipe.partition(":")[0]).stem
    stage = stages.batch_spec(config, "student")
    assert stage.batch_unlabeled > 0


@pytest.mark.parametrize("name", METHODS)
def test_each_method_has_a_recipe_for_few_labels(name):
    assert f"configs/methods/{name}.py:camvid" in set(recipes())


def test_a_recipe_that_there_is_not_is_named():
    with pytest.raises(ValueError, match=r"'kitti': make it one of pascal_voc, cityscapes"):
        config_files.load("methods/unimatch:kitti")


def test_defaults_follow_the_paper():
    config = default.get_config()
    config_check.check(config)
    assert (config.loss.unlabeled, config.model.norm, config.rounds.count) == ("scl", "dsbn", 3)
    assert config.pseudo.scales == (0.5, 0.75, 1.0, 1.5, 1.75) and config.pseudo.flip
    assert (config.data.weak_stream, config.data.strong_stream) == (("labeled",), ("pseudo",))
    assert config.train.teacher_steps == config.train.steps == 20_000


def test_a_config_file_cannot_set_an_undeclared_key():
    with pytest.raises(AttributeError, match="steps"):
        default.get_config().train.stepz = 3


def test_teacher_steps_default_to_steps():
    config = default.get_config()
    config.train.steps = 7
    assert config.train.teacher_steps == 7
    config.train.teacher_steps = 9
    assert config.train.steps == 7


@pytest.mark.parametrize(
    ("key", "value", "part"),
    [
        ("model__backbone", "resnet19", "did you mean resnet18"),
        ("data__crop", (3,), "(height, width)"),
        ("data__scale", (2.0, 0.5), "0 < low <= high"),
        ("data__weak_stream", ("labelled",), "distinct names out of labeled, pseudo"),
        ("model__head", "v3plu", "v3plus, v3plus_smp, v2, dpt, linear (did you mean v3plus?)"),
        ("model__output_stride", 4, "8, 16 or 32"),
        ("model__norm_epsilon__head", -1.0, "above 0, or leave it out"),
        ("model__aspp_rates", (6, 0), "integers above 0"),
        ("train__steps", 0, "at least 1"),
        ("optim__momentum", 1.0, "below 1"),
        ("sda__ops", ("blurr",), "out of contrast_gamma"),
        ("data__classes", ("a", "a"), "a tuple of distinct names"),
        ("data__classes", ("a", 1), "a tuple of distinct names"),
        ("data__ignore_ids", (255.0,), "integers from 0 to 255"),
        ("pseudo__scales", (), "at least one"),
    ],
)
def test_values_outside_their_constraints_are_rejected(key, value, part):
    with raises_code("config-value-invalid", key.replace("__", "."), part):
        config_check.check(tiny_config(**{key: value}))


@pytest.mark.parametrize(
    ("key", "value", "code"),
    [
        ("seed", None, "config-value-none"),
        ("data.classes", None, "config-value-none"),
        ("eval.flip", None, "config-value-none"),
        ("data.labels", float("inf"), "config-value-not-finite"),
        ("eval.scales", (1.0, float("inf")), "config-value-not-finite"),
        ("loss.scl.alpha", float("nan"), "config-value-not-finite"),
    ],
)
def test_none_and_non_finite_values_are_rejected(key, value, code):
    config = tiny_config()
    section, _, name = key.rpartition(".")
    parent = config
    for section_name in filter(None, section.split(".")):
        parent = parent[section_name]
    with config.ignore_type():
        parent[name] = value
    with raises_code(code, key):
        config_check.check(config)


def test_a_multi_grid_is_rejected_for_a_backbone_that_takes_none():
    with raises_code("multi-grid-unsupported", "tiny"):
        config_check.check(tiny_config(model__multi_grid=(1, 2, 4)))


def test_two_empty_streams_are_rejected():
    config = tiny_config(data__weak_stream=(), data__strong_stream=())
    with raises_code("augment-streams-empty"):
        config_check.check(config)


def test_more_distinct_operations_than_the_pool_has_are_rejected():
    config = tiny_config(sda__replace=False, sda__num_ops=3, sda__ops=("blur", "hsv"))
    with raises_code("sda-ops-too-few", "from 2"):
        config_check.check(config)


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
    assert config_check.run_name(path) == name


def test_a_mistyped_key_in_a_config_file_is_named(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from configs import default\n"
        "def get_config():\n"
        "    config = default.get_config()\n"
        "    config.train.stepz = 3\n"
        "    return config\n"
    )
    process = run_main(f"--config={path}")
    assert "There is no config key stepz: did you mean steps?" in process.stderr
    assert "Traceback" not in process.stderr


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
def test_config_files_that_fail(source, sentence, tmp_path, monkeypatch):
    path = tmp_path / "mine.py"
    path.write_text(source)
    # The module of an earlier test's config file, which has the same name.
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
def test_an_override_of_an_attribute_of_a_value_is_rejected(key, monkeypatch):
    message = mains.refused(
        monkeypatch, f"--config={ROOT / 'configs/streets.py'}", f"--config.{key}=1"
    )
    assert "asks for a part that its value does not have" in message


@pytest.mark.parametrize("returned", ["None", "3"])
def test_an_override_of_a_value_that_is_not_a_config_is_rejected(returned, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(f"def get_config(): return {returned}")
    monkeypatch.delitem(sys.modules, "config_config", raising=False)
    config = f"--config={tmp_path / 'mine.py'}"
    message = mains.refused(monkeypatch, config, "--config.data.root=x")
    assert "get_config of the config file returns" in message


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
        ([], "--config is missing: give the config to run, such as configs/streets.py"),
        (["--config=configs/streets.py", "--config.model.norm=none"], "model.norm is 'none'"),
        (
            ["--config=configs/camvid.py", "--config.data.root=/nowhere"],
            "The data folder /nowhere is missing: download the CamVid folder",
        ),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_wrong_commands_exit_with_one_sentence(arguments, sentence, tmp_path):
    process = run_main(*arguments, *([f"--workdir={tmp_path}"] if arguments else []))
    assert process.returncode != 0
    assert sentence in process.stderr
    assert "Traceback" not in process.stderr
