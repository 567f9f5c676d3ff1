"""What is damaged in a workdir is made again with the same bits, or refused in one sentence."""

import json
import shutil
import subprocess

import numpy as np
import orbax.checkpoint as ocp
import pytest

from semiseg_jax import self_training
from semiseg_jax.runtime import hashes
from semiseg_jax.runtime.errors import UserError
from tests.conftest import FEW_OPERATIONS
from tests.errors import raises_code
from tests.workdirs import same

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("one_device", "without_report"),
]


@pytest.fixture
def config(config_of_pairs):
    config_of_pairs.sda.ops = FEW_OPERATIONS
    return config_of_pairs


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def cut_all(folder):
    for path in folder.rglob("*"):
        if path.is_file():
            cut(path)


def flip_bit(path):
    """In the middle of the file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def flip_bit_of_value(checkpoint):
    """Of one array, stored anew, so that the storage finds nothing wrong.

    A bit of a file will not do: some bytes of the files are no longer referred to, and others have
    a checksum of the storage.
    """
    path = checkpoint / "state"
    with ocp.StandardCheckpointer() as checkpointer:
        state = checkpointer.restore(path)
        name = max(state, key=lambda name: state[name].size)
        bits = np.array(state[name]).view(np.uint32)
        bits.flat[bits.size // 2] ^= 4
        state[name] = bits.view(state[name].dtype)
        shutil.rmtree(path)
        checkpointer.save(path, state)


def change_row(path):
    content = json.loads(path.read_text())
    content["rows"][1]["miou"] += 0.25
    path.write_text(json.dumps(content))


def exchange_label_maps(folder):
    """Two of them, with nothing but themselves to tell which is whose."""
    one, two = sorted(folder.glob("*.png"))[1:3]
    contents = one.read_bytes(), two.read_bytes()
    two.write_bytes(contents[0])
    one.write_bytes(contents[1])
    (folder / "manifest.json").unlink()


def undo(*stages):
    """The stages count as unfinished."""

    def apply(run):
        for stage in stages:
            (run / stage / "DONE").unlink()

    return apply


def both(*actions):
    def apply(run):
        for action in actions:
            action(run)

    return apply


STUDENT, TEACHER = "round_1/student", "round_0/teacher"
LABELS = f"{TEACHER}/pseudo_labels"


def test_damage_is_repaired_to_the_same_bits(config, tmp_path, capsys):
    whole = tmp_path / "whole"
    self_training.run(config, whole)
    cases = {
        "a checkpoint": (
            lambda run: cut_all(run / STUDENT / "checkpoints/4"),
            "the checkpoint of step 4 is damaged",
        ),
        "every checkpoint": (
            lambda run: [cut_all(run / STUDENT / f"checkpoints/{step}") for step in (2, 4)],
            "the checkpoint of step 2 is damaged",
        ),
        "a checkpoint gone": (
            lambda run: shutil.rmtree(run / STUDENT / "checkpoints"),
            "the checkpoint of step 4 is missing: its steps are trained again",
        ),
        "a marker": (undo(TEACHER, STUDENT), "going on at step 4"),
        "a label map": (
            both(undo(STUDENT), lambda run: cut(sorted((run / LABELS).glob("*.png"))[3])),
            "1 label maps are missing or damaged",
        ),
        "a label map gone": (
            both(undo(STUDENT), lambda run: sorted((run / LABELS).glob("*.png"))[3].unlink()),
            "1 label maps are missing or damaged",
        ),
        "a bit of a checkpoint": (
            lambda run: flip_bit_of_value(run / STUDENT / "checkpoints/4"),
            "the checkpoint of step 4 is damaged (its content does not have the hash",
        ),
        "a bit of a marker": (
            lambda run: flip_bit(run / TEACHER / "DONE"),
            "DONE is damaged: the stage goes on at its last checkpoint",
        ),
        "a row": (
            lambda run: change_row(run / "results.json"),
            "the row of student 1, step 4, was changed after it was written",
        ),
        "label maps exchanged": (
            both(undo(STUDENT), lambda run: exchange_label_maps(run / LABELS)),
            "",
        ),
        "a manifest": (both(undo(STUDENT), lambda run: cut(run / LABELS / "manifest.json")), ""),
    }
    for name, (damage, said) in cases.items():
        run = tmp_path / name.replace(" ", "_")
        shutil.copytree(whole, run)
        damage(run)
        capsys.readouterr()
        self_training.run(config, run)
        assert said in capsys.readouterr().out, name
        same(whole, run)

    # A file of the checkpoint at a time: none may be read as something else.
    files = [p for p in (whole / STUDENT / "checkpoints/4").rglob("*") if p.is_file()]
    for path in files:
        run = tmp_path / "one_file"
        shutil.copytree(whole, run)
        cut(run / path.relative_to(whole))
        self_training.run(config, run)
        same(whole, run)
        shutil.rmtree(run)


def test_damaged_results_are_one_sentence(config, tmp_path):
    (tmp_path / "results.json").write_text('{"rows": [')
    with raises_code("results-damaged", "results.json"):
        self_training.run(config, tmp_path)


def test_an_image_that_changed_its_size_is_refused(config, tmp_path):
    run = tmp_path / "run"
    self_training.run(config, run)
    undo(STUDENT)(run)
    manifest = json.loads((run / LABELS / "manifest.json").read_text())
    name = min(manifest["images"])
    manifest["images"][name]["size"] = [3, 4]
    del manifest[hashes.SEAL]
    (run / LABELS / "manifest.json").write_text(json.dumps(manifest))
    with raises_code("pseudo-label-size-differs"):
        self_training.run(config, run)


def test_a_full_disk_is_one_sentence_and_the_run_goes_on_when_there_is_room(
    config, tmp_path, small_disk
):
    whole = tmp_path / "whole"
    self_training.run(config, whole)
    ballast = small_disk / "ballast"
    for free in (0, 40_000, 200_000, 400_000):
        ballast.unlink(missing_ok=True)
        available = shutil.disk_usage(small_disk).free
        ballast.write_bytes(bytes(max(available - free - 16384, 0)))
        with pytest.raises(UserError, match=r"cannot be written .*No space left on device"):
            self_training.run(config, small_disk / "run")
    ballast.unlink()
    self_training.run(config, small_disk / "run")
    same(whole, small_disk / "run")


def remount(folder, mode):
    subprocess.run(["mount", "-o", f"remount,{mode}", str(folder)], check=True)


@pytest.mark.parametrize("undone", [(), (STUDENT,), (STUDENT, TEACHER)])
def test_a_read_only_workdir_is_one_sentence_and_loses_nothing(config, small_disk, undone):
    run = small_disk / "run"
    self_training.run(config, run)
    undo(*undone)(run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    remount(small_disk, "ro")
    try:
        with pytest.raises(UserError, match=r"cannot be written .*Read-only file system"):
            self_training.run(config, run)
        with pytest.raises(UserError, match=r"cannot be written .*Read-only file system"):
            self_training.run(config, small_disk / "new")
    finally:
        remount(small_disk, "rw")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
