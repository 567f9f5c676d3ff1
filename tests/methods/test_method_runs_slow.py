"""Runs with every method, from images to a model: killed and resumed, reported, used."""

import jax
import numpy as np
import pytest
from etils import epath
from safetensors.numpy import load_file

from semiseg_jax import mesh, self_training
from semiseg_jax.methods import registry
from semiseg_jax.methods.method import OnlineMethod
from semiseg_jax.planning import measurement
from semiseg_jax.reporting import page
from semiseg_jax.runtime import metric_writer
from semiseg_jax.serving.trained_model import TrainedModel
from tests import conftest, workdirs
from tests.methods.toy_network import narrow_discriminators
from tests.test_self_training import Killed, kill_at

pytestmark = pytest.mark.slow

ONLINE = [name for name, cls in registry.METHODS.items() if issubclass(cls, OnlineMethod)]


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """Programs compile fastest for one; several devices are the subject of test_method_steps."""
    make = mesh.make_mesh
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mesh, "make_mesh", lambda devices=None: make(jax.devices()[:1]))
        yield


@pytest.fixture(scope="module", autouse=True)
def small_discriminators():
    with narrow_discriminators():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The data, and a run of the teacher that all methods start from."""
    folder = tmp_path_factory.mktemp("methods")
    conftest.write_folder_data(folder / "data")
    config = config_of("self_training", folder)
    config.rounds.count, config.rounds.teacher_from = 0, ""
    self_training.run(config, folder / "teacher")
    return folder


@pytest.fixture(autouse=True)
def runs_without_report(without_report):
    """Runs draw none; a test that looks at the report draws it."""


def config_of(name, folder):
    config = conftest.tiny_folder_config(folder / "data", folder / "cache")
    config.rounds.teacher_from = str(folder / "teacher")
    config.train.batch_labeled, config.train.batch_unlabeled = 2, 4
    config.train.teacher_steps, config.train.steps = 2, 6
    config.train.checkpoint_every = config.train.log_every = 2
    config.eval.every = 4
    config.rounds.count = 1
    config.method.name = name
    if name == "cct":
        kinds = ("vat", "dropout", "cutout", "context_mask", "object_mask", "feature_drop", "noise")
        for kind in kinds:
            config.method.cct[kind] = 1
    if name == "pseudoseg":
        config.method.pseudoseg.cutout = 8
    if name == "s4gan":
        # So that an untrained discriminator passes images.
        config.method.s4gan.threshold = 0.3
    return config


@pytest.mark.parametrize("name", ONLINE)
def test_a_kill_changes_no_bit_and_the_model_predicts(name, folder, tmp_path, monkeypatch):
    config = config_of(name, folder)
    whole = tmp_path / "whole"
    self_training.run(config, whole)
    rows = workdirs.rows(whole)
    assert [row["stage"] for row in rows] == ["teacher", "student"]
    assert rows[1]["labels"]["kept"] <= 1
    has_average = hasattr(registry.build(config), "decay")
    assert ("student_miou" in rows[1]) == has_average

    with monkeypatch.context() as patch:
        kill_at(patch, "student 1", 3)
        with pytest.raises(Killed):
            self_training.run(config, tmp_path / "killed")
    self_training.run(config, tmp_path / "killed")
    workdirs.same(whole, tmp_path / "killed")

    lines = metric_writer.read_metrics(epath.Path(whole) / "round_1" / "student")
    assert [line["step"] for line in lines] == [2, 4, 6]
    monkeypatch.undo()
    assert page.write(whole) is not None
    report = (whole / "report.html").read_text()
    assert "Labels made inside the steps of student 1" in report
    assert report.count("This run stores no pseudo-labels.") == 2
    labels = TrainedModel.load(whole).predict([np.zeros((20, 30, 3), np.uint8)])
    assert np.asarray(labels[0]).shape == (20, 30)


def test_a_kill_changes_no_bit_on_a_vision_transformer(folder, tmp_path, monkeypatch):
    """A network without batch norm, whose backbone is frozen."""
    config = config_of("unimatch_v2", folder)
    config.model.backbone, config.model.head = "tiny_dinov2", "dpt"
    config.model.freeze_backbone = True
    config.data.crop = (28, 42)
    config.rounds.teacher_from, config.optim.kind = "", "adamw"
    self_training.run(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        kill_at(patch, "student 1", 3)
        with pytest.raises(Killed):
            self_training.run(config, tmp_path / "killed")
    self_training.run(config, tmp_path / "killed")
    workdirs.same(tmp_path / "whole", tmp_path / "killed")
    # Sides that are no multiples of the patch.
    (labels,) = TrainedModel.load(tmp_path / "whole").predict([np.zeros((30, 47, 3), np.uint8)])
    assert np.asarray(labels).shape == (30, 47)


def test_a_method_without_a_teacher_starts_from_a_new_network(folder, tmp_path):
    config = config_of("unimatch_v2", folder)
    config.train.teacher_steps, config.rounds.teacher_from = 0, ""
    config.rounds.student_init = "scratch"
    config.rounds.control = True
    self_training.run(config, tmp_path)
    assert [row["stage"] for row in workdirs.rows(tmp_path)] == ["student", "control"]
    self_training.run(config, tmp_path)


def test_an_evaluation_in_the_middle_changes_no_bit(folder, tmp_path):
    """The average that is evaluated is not put in the place of the student."""
    config = config_of("unimatch_v2", folder)
    self_training.run(config, tmp_path / "evaluated")
    config.eval.every = 0
    self_training.run(config, tmp_path / "not")
    weights = [
        load_file(tmp_path / name / "model" / "weights.safetensors")
        for name in ("evaluated", "not")
    ]
    jax.tree.map(np.testing.assert_array_equal, *weights)


@pytest.mark.parametrize("name", ONLINE)
def test_steps_in_bfloat16_with_remat_are_measured_for_the_forecast(name, folder):
    config = config_of(name, folder)
    config.model.compute_dtype = "bfloat16"
    config.model.remat = True
    speed = measurement.measure(config).speed
    (step,) = (program for program in speed.costs if program.kind == "student step")
    assert speed.costs[step].images == 2 + 4 * registry.build(config).views.count
    assert speed.seconds[step] > 0
