"""The choice of rounds.keep at further starts of a run, by other images, and without counts."""

import dataclasses
import json
import shutil

import pytest
from etils import epath

from semiseg_jax import self_training, workdir
from semiseg_jax.comparison import image_counts
from tests.test_kept_stage_of_run import (  # noqa: F401 - fixtures
    CLASS_OF,
    folder,
    held_out,
    kept_of,
    make_config,
    predicted_class,
    untrained,
)

# ruff: noqa: F811 - a parameter has the name of its fixture

pytestmark = pytest.mark.slow


@pytest.fixture
def copied(held_out, tmp_path):
    return shutil.copytree(held_out[0], tmp_path / "run")


def files_of_model(run):
    return {path.name: path.read_bytes() for path in (run / "model").iterdir()}


def test_the_choice_is_made_anew_at_each_start(folder, copied, monkeypatch):
    before = files_of_model(copied)
    self_training.run(make_config(folder), copied)
    assert files_of_model(copied) == before

    self_training.run(make_config(folder, **{"rounds.keep": "last"}), copied)
    assert (kept_of(copied)["stage"], kept_of(copied)["round"]) == ("student", 2)
    assert kept_of(copied)["sentence"].endswith(": model/ has student 2 (rounds.keep = last).")
    assert predicted_class(copied, folder, monkeypatch) == CLASS_OF["student 2"]

    self_training.run(make_config(folder, **{"rounds.control": False}), copied)
    assert kept_of(copied)["stage"] == "teacher"
    assert kept_of(copied)["sentence"].endswith(": model/ has the teacher.")
    assert predicted_class(copied, folder, monkeypatch) == CLASS_OF["teacher"]

    monkeypatch.setitem(CLASS_OF, "student 3", 1)
    without_control = {"rounds.control": False, "rounds.count": 3}
    self_training.run(make_config(folder, **without_control), copied)
    assert (kept_of(copied)["stage"], kept_of(copied)["round"]) == ("student", 3)
    # The control of two rounds is as good as student 3, which is kept.
    monkeypatch.setitem(CLASS_OF, "control 3", 0)
    self_training.run(make_config(folder, **{"rounds.count": 3}), copied)
    assert (kept_of(copied)["stage"], kept_of(copied)["round"]) == ("student", 3)
    assert kept_of(copied)["sentence"].startswith("Student 3 is as good as control 2 on the 4 held")


def test_a_list_of_the_user_does_not_choose_whatever_its_split_is_called(folder, tmp_path):
    names = [f"images/val/00{i}.png masks/val/00{i}.png" for i in range(5)]
    (tmp_path / "list.txt").write_text("\n".join(names))
    changes = {"eval.split": "holdout", "data.evaluation_list": str(tmp_path / "list.txt")}
    self_training.run(make_config(folder, **changes), tmp_path / "listed")
    assert kept_of(tmp_path / "listed")["stage"] == "student"


def test_images_that_select_weights_choose_a_stage_beside_an_evaluation_set(
    folder, tmp_path, monkeypatch
):
    # Most pixels of the two images that are held out here are of class 0.
    monkeypatch.setitem(CLASS_OF, "teacher", 1)
    monkeypatch.setitem(CLASS_OF, "control 2", 0)
    changes = {"eval.split": "val", "eval.select": "holdout", "data.holdout": 2.0}
    # Not before the end of any stage, that of the control included: nothing trains here.
    config = make_config(folder, **changes, **{"eval.every": 8})
    self_training.run(config, tmp_path)
    kept = kept_of(tmp_path)
    assert (kept["stage"], kept["chosen_by"]) == ("control", 2)
    assert "5 evaluation images (95 %" in kept["sentence"]
    assert (
        "model/ has the control, chosen by the 2 held-out images; the control is"
        in (kept["sentence"])
    )
    before = files_of_model(tmp_path)
    # Lost counts of the hold-out are counted again; they are what chooses.
    for path in tmp_path.glob(f"*/*/{image_counts.HELD_OUT}"):
        path.write_text("{}")
    self_training.run(config, tmp_path)
    assert files_of_model(tmp_path) == before


def test_stages_of_older_code_are_compared_without_an_interval(folder, copied):
    for path in copied.glob(f"*/*/{image_counts.EVALUATED}"):
        path.unlink()
    (copied / "config.json").write_text(
        json.dumps(without_key(json.loads((copied / "config.json").read_text())))
    )
    self_training.run(make_config(folder), copied)
    kept = kept_of(copied)
    assert kept["stage"] == "control"
    assert (
        "(no interval, because the pixel counts of each image are missing for" in (kept["sentence"])
    )


def without_key(config):
    assert workdir.ADDED_KEYS["rounds.keep"] == "last"
    del config["rounds"]["keep"]
    return config


def test_counts_of_another_evaluation_give_no_interval(folder, copied):
    """By another protocol, and then by the first again, whose rows are still there."""
    before = kept_of(copied)
    self_training.run(make_config(folder, **{"eval.flip": True}), copied)
    assert "95 % interval" in kept_of(copied)["sentence"]
    student, control = (
        image_counts.read(epath.Path(copied) / f"round_2/{kind}" / image_counts.EVALUATED)
        for kind in ("student", "control")
    )
    assert student.by_image.keys() == control.by_image.keys() and len(student.by_image) == 4
    path = epath.Path(copied) / "round_2/control" / image_counts.EVALUATED
    image_counts.write(path, dataclasses.replace(control, by_image=student.by_image))
    self_training.run(make_config(folder, **{"eval.flip": True}), copied)
    assert "missing for the control" in kept_of(copied)["sentence"]
    assert kept_of(copied)["stage"] == before["stage"]
