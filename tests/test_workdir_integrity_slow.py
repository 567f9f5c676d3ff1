"""A finished workdir: a bit flipped in every file in turn, and files of other runs in its place."""

import contextlib
import dataclasses
import fnmatch
import json
import pathlib
import random
import shutil

import jax
import numpy as np
import pytest
from etils import epath
from flax import traverse_util
from safetensors.numpy import load_file

from semiseg_jax import checkpoints, self_training, stages, train
from semiseg_jax.data import image_io, label_maps
from semiseg_jax.runtime import hashes
from semiseg_jax.runtime.errors import UserError
from tests import test_workdir_integrity as fast
from tests.errors import raises_code
from tests.test_workdir_integrity import (  # noqa: F401 - fixtures
    STUDENT,
    TEACHER,
    MadeAgainError,
    config,
    folder,
    no_work,
    run,
    two_devices,
    whole,
)

# ruff: noqa: F811 - a parameter has the name of its fixture

pytestmark = pytest.mark.slow


@pytest.fixture
def training(config, whole):
    return self_training.SelfTraining(config, epath.Path(whole))


def restore(training, workdir, path, step=None):
    """(step, state) of the newest checkpoint beside a file of one, or of the one of a step."""
    folder = path.partition("/checkpoints/")[0]
    kind = folder.rpartition("/")[2]
    stage = next(stage for stage in training.stages if stage.kind == kind)
    program = training._model(kind).program(kind, stage.steps)
    like = train.state_shapes(program, training._mesh)
    checkpoints_folder = epath.Path(workdir) / folder / "checkpoints"
    with checkpoints.Checkpoints(checkpoints_folder, stage.seed) as manager:
        return (step, manager.restore(step, like)) if step else manager.restore_newest(like)


def check_checkpoint(path, training, run, expected):
    """No other state is restored than was saved; `expected` is the state of each step."""
    fast.flip_bit(run / path, random.Random(path))
    try:
        restored = restore(training, run, path)
    except UserError:
        restored = None
    if restored:
        step, state = restored
        jax.tree.map(np.testing.assert_array_equal, state, expected[step])


def check_label_map(path, run, whole):
    """No other labels are read than were written."""
    fast.flip_bit(run / path, random.Random(path))
    name = pathlib.Path(path).stem
    labels = label_maps.read(whole / path, name, image_io.id_table(3))
    with contextlib.suppress(UserError):
        read = label_maps.read(run / path, name, image_io.id_table(3))
        np.testing.assert_array_equal(read, labels)


def test_a_bit_flipped_in_any_file_is_found(config, whole, run, no_work):
    """Other than label maps and checkpoints, which have tests of their own."""
    for path in fast.files_of(whole):
        is_of_many = "/checkpoints/" in path or fnmatch.fnmatch(path, "*/pseudo_labels/*.png")
        if not is_of_many and fast.classify(path) != "people":
            fast.check_flip(path, 1, config, run, whole)


def test_a_bit_flipped_in_any_label_map_is_found(whole, run):
    paths = [p for p in fast.files_of(whole) if fnmatch.fnmatch(p, "*/pseudo_labels/*.png")]
    assert len(paths) == 8
    for path in paths:
        check_label_map(path, run, whole)


def test_a_bit_flipped_in_any_file_of_a_checkpoint_is_found(whole, run, training):
    """All files of the newest checkpoint; test_checkpoints.py walks a small one, too."""
    folder = f"{STUDENT}/checkpoints/4/"
    paths = [path for path in fast.files_of(whole) if path.startswith(folder)]
    assert len(paths) > 5
    expected = {step: restore(training, whole, folder, step)[1] for step in (2, 4)}
    for path in paths:
        shutil.rmtree(run / STUDENT)
        shutil.copytree(whole / STUDENT, run / STUDENT)
        check_checkpoint(path, training, run, expected)


def put_checkpoint(stage_folder, config, seed=None):
    """Replaces the checkpoint of a stage's end by one of other weights."""
    kind = stage_folder.name
    training = self_training.SelfTraining(config, epath.Path(stage_folder).parent.parent)
    stage = next(stage for stage in training.stages if stage.kind == kind)
    program = training._model(kind).program(kind, stage.steps)
    like = train.state_shapes(program, training._mesh)
    with checkpoints.Checkpoints(stage.folder / "checkpoints", stage.seed) as manager:
        _, state = manager.restore_newest(like)
    shutil.rmtree(stage_folder / "checkpoints")
    state = dataclasses.replace(state, params=jax.tree.map(lambda v: v + 1, state.params))
    other_seed = stage.seed if seed is None else stages.stage_seed(seed, stage.round, kind)
    with checkpoints.Checkpoints(stage.folder / "checkpoints", other_seed) as manager:
        manager.save(stage.steps, state)


@pytest.mark.parametrize("stage", [TEACHER, STUDENT])
def test_the_checkpoint_of_another_seed_is_refused(config, run, no_work, stage):
    put_checkpoint(run / stage, config, seed=1)
    with raises_code("checkpoint-of-another-stage", stage):
        self_training.run(config, run)


@pytest.mark.parametrize("stage", [TEACHER, STUDENT])
def test_other_weights_of_a_finished_stage_are_refused(config, run, no_work, stage):
    put_checkpoint(run / stage, config)
    with raises_code("stage-weights-changed", f"{stage}/checkpoints/4"):
        self_training.run(config, run)


def test_other_best_weights_are_refused(config, run, no_work):
    path = run / TEACHER / checkpoints.BEST_WEIGHTS
    tensors = {name: value + 1 for name, value in load_file(path).items()}
    best = checkpoints.BestWeights(epath.Path(run / TEACHER), 2)
    variables = traverse_util.unflatten_dict(tensors, sep="/")
    best.write(checkpoints.Candidate(best.step, 0.5, variables))
    with raises_code("stage-weights-changed", f"{TEACHER}/best.safetensors"):
        self_training.run(config, run)


@pytest.mark.parametrize(
    ("entry", "value", "code"),
    [
        ("seed", [1, 2], "stage-of-another-run"),
        ("teacher", "0" * 16, "stage-of-another-teacher"),
    ],
)
def test_a_stage_of_another_run_or_teacher_is_refused(config, run, no_work, entry, value, code):
    path = run / STUDENT / "DONE"
    content = json.loads(path.read_text()) | {entry: value}
    del content[hashes.SEAL]
    path.write_text(json.dumps(hashes.sealed(content)))
    with raises_code(code, STUDENT):
        self_training.run(config, run)


def test_an_empty_marker_is_of_older_code(config, run, no_work):
    for stage in (TEACHER, STUDENT):
        (run / stage / "DONE").write_bytes(b"")
    self_training.run(config, run)


def test_a_changed_row_is_evaluated_again(config, whole, run):
    content = json.loads((run / "results.json").read_text())
    content["rows"][0]["miou"] += 0.25
    (run / "results.json").write_text(json.dumps(content))
    self_training.run(config, run)
    assert (run / "results.json").read_bytes() == (whole / "results.json").read_bytes()


def test_a_row_of_other_weights_is_evaluated_again(config, run, no_work):
    weights = json.loads((run / "row_hashes.json").read_text())
    (run / "row_hashes.json").write_text(json.dumps(dict.fromkeys(weights, "0" * 16)))
    with pytest.raises(MadeAgainError):
        self_training.run(config, run)
