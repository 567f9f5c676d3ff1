"""The weights in model/ are those of the stage that rounds.keep chooses, and the run says so."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from PIL import Image

from semiseg_jax import checkpoints, mesh, self_training, train, train_state
from semiseg_jax.reporting import page
from semiseg_jax.runtime.logger import capture_lines
from semiseg_jax.serving import model_bundle
from tests import conftest, mains, workdirs

# The class that each stage predicts everywhere. Most pixels are of class 1, the fewest of class 2.
CLASS_OF = {"teacher": 0, "student 1": 2, "student 2": 2, "student 3": 2, "control 2": 1}


def train_one_class(stage, program, init_variables, mesh, **_):
    """Writes what training writes, in place of `train.run`; the network predicts one class."""
    state = train_state.create_train_state(init_variables(), program.tx, mesh)
    flat = traverse_util.flatten_dict(state.params, sep="/")
    (bias,) = (name for name in flat if name.endswith("classifier/bias"))
    flat[bias] = flat[bias].at[:].set(0).at[CLASS_OF[stage.name]].set(1e4)
    params = traverse_util.unflatten_dict(flat, sep="/")
    step = jnp.full_like(state.step, stage.steps)
    with checkpoints.Checkpoints(stage.folder / "checkpoints", stage.seed) as manager:
        manager.save(stage.steps, dataclasses.replace(state, params=params, step=step))
    return dataclasses.replace(state, params=params)


@pytest.fixture(scope="module", autouse=True)
def untrained():
    make = mesh.make_mesh
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "run", train_one_class)
        patch.setattr(page, "write", lambda workdir: [])
        patch.setattr(mesh, "make_mesh", lambda devices=None: make(devices or jax.devices()[:1]))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kept")
    conftest.write_folder_data(folder / "data")
    return folder


def make_config(folder, **changes):
    """Two students and a control; a third of the labelled images is the evaluation set."""
    config = conftest.in_pairs(conftest.tiny_folder_config(folder / "data", folder / "cache"))
    # Its classifier has one bias, by which `train_one_class` chooses.
    config.model.head = "v3plus"
    # There is no such folder.
    config.eval.split = "test"
    config.data.holdout = 4.0
    config.rounds.count, config.rounds.control = 2, True
    config.rounds.keep = "best_on_holdout"
    # Without pseudo-labels, which nothing here depends on.
    config.data.strong_stream = ("labeled",)
    config.update_from_flattened_dict(changes)
    return config


def kept_of(run):
    return model_bundle.load(run).description["kept"]


def predicted_class(run, folder, monkeypatch):
    """The one class that the model predicts."""
    images, output = folder / "data/images/val", run / "predicted"
    flags = (f"--workdir={run}", f"--input={images}", f"--output={output}", "--nooverlays")
    mains.run(monkeypatch, *flags, command="predict")
    (class_id,) = {int(v) for p in output.glob("*.png") for v in np.unique(Image.open(p))}
    shutil.rmtree(output)
    return class_id


@pytest.fixture(scope="module")
def held_out(folder, untrained):
    """A run with a held-out evaluation set, and its lines; no test changes it."""
    with capture_lines() as lines:
        self_training.run(make_config(folder), folder / "held_out")
    return folder / "held_out", lines


def test_the_control_is_kept_where_it_is_best_on_the_hold_out(folder, held_out, monkeypatch):
    run, lines = held_out
    teacher, _, student, control = workdirs.rows(run)
    assert control["miou"] > teacher["miou"] > student["miou"]
    bundle = model_bundle.load(run)
    assert bundle.description["miou"] == control["miou"]
    assert bundle.description["iou"] == control["iou"]
    kept = kept_of(run)
    assert (kept["stage"], kept["round"], kept["chosen_by"]) == ("control", 2, 4)
    points = f"{100 * (control['miou'] - student['miou']):.1f}"
    assert kept["sentence"].startswith(f"The control is {points} points of mIoU better than")
    assert "(95 % interval over images: +" in kept["sentence"]
    assert kept["sentence"].endswith("): model/ has the control.")
    # Nothing is logged after it but the table, which is printed.
    assert lines[-1] == kept["sentence"]
    assert predicted_class(run, folder, monkeypatch) == CLASS_OF["control 2"]


def test_an_evaluation_set_of_the_user_does_not_choose(folder, tmp_path, monkeypatch):
    # Most pixels of these images are of class 0.
    monkeypatch.setitem(CLASS_OF, "teacher", 1)
    monkeypatch.setitem(CLASS_OF, "control 2", 0)
    config = make_config(folder, **{"eval.split": "val"})
    self_training.run(config, tmp_path)
    _, _, student, control = workdirs.rows(tmp_path)
    assert control["miou"] > student["miou"]
    kept = kept_of(tmp_path)
    assert (kept["stage"], kept["round"], kept["chosen_by"]) == ("student", 2, 0)
    assert kept["sentence"].startswith("The control is ")
    assert "on the 5 evaluation images (95 %" in kept["sentence"]
    assert "model/ has student 2, because no labelled images are held out" in kept["sentence"]
    assert "data.holdout" in kept["sentence"]
    assert predicted_class(tmp_path, folder, monkeypatch) == CLASS_OF["student 2"]
