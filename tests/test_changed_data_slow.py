"""Runs whose images or masks are lost, damaged or changed between two starts, and inside one."""

import json
import os

import numpy as np
import pytest
from PIL import Image

from semiseg_jax import self_training
from semiseg_jax.data import load
from semiseg_jax.runtime.logger import capture_lines
from tests import workdirs
from tests.conftest import FEW_OPERATIONS, in_pairs, tiny_folder_config, write_folder_data
from tests.errors import raises_code

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_device")]


@pytest.fixture
def config(tmp_path):
    config = in_pairs(tiny_folder_config(write_folder_data(tmp_path / "data"), tmp_path / "cache"))
    config.sda.ops = FEW_OPERATIONS
    config.train.teacher_steps = config.train.steps = 2
    return config


class StoppedError(Exception):
    pass


@pytest.fixture
def stop_before(monkeypatch):
    """Returns a function that runs until a method of SelfTraining is called for the student."""

    def run(config, workdir, method):
        def stop(self, *args, **kwargs):
            if method == "label" or args[0].kind == "student":
                raise StoppedError
            return plain(self, *args, **kwargs)

        with monkeypatch.context() as patch:
            plain = getattr(self_training.SelfTraining, method)
            patch.setattr(self_training.SelfTraining, method, stop)
            with pytest.raises(StoppedError):
                self_training.run(config, workdir)

    return run


def manifest_of(workdir):
    return json.loads((workdir / "round_0/teacher/pseudo_labels/manifest.json").read_text())


def repaint(path):
    mask = np.array(Image.open(path))
    mask[8:30, 8:30] = 1
    Image.fromarray(mask).save(path)


def test_an_image_truncated_before_labelling_costs_no_teacher(config, tmp_path, stop_before):
    workdir = tmp_path / "run"
    unlabeled = load.load_dataset(config).unlabeled
    stop_before(config, workdir, "label")
    os.truncate(unlabeled[3].image, 200)
    with capture_lines() as lines:
        self_training.run(config, workdir)
    assert any("teacher: done before" in line for line in lines)
    assert sum(f"left out: {unlabeled[3].image}" in line for line in lines) == 1
    manifest = manifest_of(workdir)
    assert list(manifest["left_out"]) == [unlabeled[3].id]
    assert unlabeled[3].id not in manifest["images"] and len(manifest["images"]) == 7
    os.unlink(unlabeled[3].image)
    config.rounds.count = 2
    assert len(self_training.run(config, workdir).rows) == 3
    assert manifest_of(workdir) == manifest
    os.unlink(unlabeled[1].image)
    with raises_code("pseudo-labeled-image-lost", unlabeled[1].image):
        self_training.run(config, workdir)


def test_an_image_lost_while_the_teacher_trains_is_left_out(config, tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    lost = load.load_dataset(config).unlabeled[0]
    label = self_training.SelfTraining.label

    def lose_and_label(self, *args):
        os.unlink(lost.image)
        return label(self, *args)

    monkeypatch.setattr(self_training.SelfTraining, "label", lose_and_label)
    self_training.run(config, workdir)
    assert list(manifest_of(workdir)["left_out"]) == [lost.id]
    assert [row["stage"] for row in workdirs.rows(workdir)] == ["teacher", "student"]
    monkeypatch.undo()


def test_an_image_changed_between_labelling_and_student_is_refused(config, tmp_path, stop_before):
    workdir = tmp_path / "run"
    changed = load.load_dataset(config).unlabeled[0].image
    stop_before(config, workdir, "train_stage")
    repaint(changed)
    with raises_code("training-file-changed", changed):
        self_training.run(config, workdir)


def test_changed_evaluation_masks_are_scored_anew(config, tmp_path):
    workdir, other = tmp_path / "run", tmp_path / "other"
    before = self_training.run(config, workdir).rows
    content = (workdir / "results.json").read_bytes()
    repaint(load.load_dataset(config).evaluation[1].mask)
    with capture_lines() as lines:
        rows = self_training.run(config, workdir).rows
    assert sum("are evaluated again" in line and "001.png" in line for line in lines) == 1
    assert [row.stage for row in rows] == [row.stage for row in before]
    assert (workdir / "results.json").read_bytes() != content
    self_training.run(config, other)
    workdirs.same(workdir, other)
    image = load.load_dataset(config).evaluation[0].image
    Image.open(image).save(image, compress_level=1)
    content = (workdir / "results.json").read_bytes()
    with capture_lines() as lines:
        self_training.run(config, workdir)
    assert not any("again" in line for line in lines)
    assert (workdir / "results.json").read_bytes() == content
