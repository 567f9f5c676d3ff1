"""Predict and export, ended at a write and started again; what a run prints on a full disk."""

import json
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tests.mains import TINY
from tests.processes import ROOT, clean_environment
from tests.test_export import make_workdir

pytestmark = pytest.mark.slow

NUM_PHOTOS = 12


def run(folder, *arguments):
    environment = clean_environment() | {
        "JAX_PLATFORMS": "cpu",
        "SEMISEG_CACHE": str(folder / "cache"),
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.killed_command", *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    return done.returncode, done.stdout + done.stderr


def contents(folder):
    """The files of a folder by name, hidden ones too."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return make_workdir(tmp_path_factory.mktemp("run"))


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    # More than are in progress at a time, so that a signal at the second leaves some.
    for i in range(NUM_PHOTOS):
        pixels = rng.integers(0, 256, (33 + i % 4 * 3, 40, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def test_predictions_that_were_ended_are_made_again(workdir, photos, tmp_path):
    arguments = (f"--workdir={workdir}", f"--input={photos}", "--batch=1")
    ended = (*arguments, f"--output={tmp_path / 'ended'}")
    status, output = run(tmp_path, "SIGKILL", r"\.png$", 1, "predict", *ended)
    assert status == -signal.SIGKILL, output
    assert not json.loads((tmp_path / "ended" / "predictions.json").read_text())["ended"]
    status, output = run(tmp_path, "SIGHUP", r"\.png$", 2, "predict", *ended)
    assert status == 75 and "SIGHUP: stopping" in output and "Interrupted: " in output, output
    for command in (ended, (*arguments, f"--output={tmp_path / 'whole'}")):
        status, output = run(tmp_path, "SIGKILL", "never", 1, "predict", *command)
        assert status == 0, output
    ended, whole = contents(tmp_path / "ended"), contents(tmp_path / "whole")
    assert ended == whole and len(whole) == 2 * NUM_PHOTOS + 1


def test_an_export_that_was_killed_is_made_again(workdir, photos, tmp_path):
    output = tmp_path / "exported" / "model"
    arguments = (f"--workdir={workdir}", f"--output={output}", "--format=stablehlo")
    arguments += (f"--images={photos}",)
    for number in range(1, NUM_PHOTOS):
        (photos / f"{number}.png").unlink()
    status, text = run(tmp_path, "SIGKILL", "exported/model$", "before", "export", *arguments)
    assert status == -signal.SIGKILL, text
    assert not output.exists() and len(list(output.parent.iterdir())) == 1
    status, text = run(tmp_path, "SIGKILL", "never", 1, "export", *arguments)
    assert status == 0, text
    assert list(output.parent.iterdir()) == [output]
    assert sorted(contents(output)) == ["export.json", "model.stablehlo"]


def test_a_full_disk_is_one_sentence_without_lines_of_libraries(small_disk, tmp_path):
    free = shutil.disk_usage(small_disk).free
    (small_disk / "ballast").write_bytes(bytes(free - 100 * 1024))
    arguments = ("--config=configs/streets.py", f"--workdir={small_disk / 'run'}", *TINY)
    arguments += ("--config.data.streets_train=6", "--config.data.streets_val=2")
    arguments += (f"--config.data.cache_dir={tmp_path}", "--config.data.labels=3.0")
    arguments += ("--config.train.checkpoint_every=1",)
    status, output = run(tmp_path, "SIGKILL", "never", 1, "main", *arguments)
    assert status == 1
    last = output.splitlines()[-1]
    assert last.startswith("Error: ") and "No space left on device" in last
    assert not re.search("Traceback|RESOURCE_EXHAUSTED|coroutine|^[EW]\\d{4} ", output, re.M), (
        output
    )
