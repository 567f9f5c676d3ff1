"""make setup: the environment for a device, with a stand-in for Python that records its calls."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STAND_IN = """#!/bin/bash
if [[ "$1 $2" == "-m venv" ]]; then mkdir -p "$3/bin" && cp "$0" "$3/bin/python"; fi
if [[ "$1 $2" == "-m pip" ]]; then echo "$*" >>"$CALLS"; exit "${PIP_STATUS:-0}"; fi
"""


@pytest.fixture
def project(tmp_path):
    for path in (ROOT / "Makefile", *ROOT.glob("requirements*.txt")):
        shutil.copy(path, tmp_path)
    python = tmp_path / "python"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    return tmp_path


def make(project, *arguments, **variables):
    """Returns the process, and the requirements that it installed."""
    calls = project / "calls"
    calls.write_text("")
    # A make that runs the tests passes its own variables on.
    own = ("MAKEFLAGS", "MAKEOVERRIDES", "MFLAGS", "DEVICE", "PYTHON")
    env = {name: value for name, value in os.environ.items() if name not in own}
    process = subprocess.run(
        ["make", *arguments],
        cwd=project,
        env={**env, "PYTHON": str(project / "python"), "CALLS": str(calls), **variables},
        capture_output=True,
        text=True,
    )
    words = calls.read_text().split()
    return process, {words[i + 1] for i, word in enumerate(words) if word == "-r"}


CPU, GPU = {"requirements-dev.txt"}, {"requirements-dev.txt", "requirements-gpu.txt"}
TPU = {"requirements-dev.txt", "requirements-tpu.txt"}


def test_the_environment_is_made_once_for_each_device(project):
    for arguments, installed in (
        ([], CPU),
        ([], set()),
        (["DEVICE=cpu"], set()),
        (["DEVICE=gpu"], GPU),
        (["DEVICE=gpu"], set()),
        # Without DEVICE, the environment stays as it is.
        ([], set()),
        (["DEVICE=tpu"], TPU),
        (["DEVICE=cpu"], CPU),
        ([], set()),
    ):
        mark = project / ".venv" / "mark"
        if mark.parent.exists():
            mark.touch()
        process, calls = make(project, "setup", *arguments)
        assert process.returncode == 0, process.stderr
        assert calls == installed, arguments
        # An environment for another device has nothing of the one before.
        assert mark.exists() == (not installed)


def test_an_environment_of_older_code_is_kept(project):
    make(project, "setup")
    (project / ".venv/device").unlink()
    assert make(project, "setup")[1] == set()
    assert make(project, "setup", "DEVICE=gpu")[1] == GPU


def test_changed_requirements_are_installed(project):
    make(project, "setup", "DEVICE=gpu")
    for name in ("requirements.txt", "requirements-dev.txt", "requirements-gpu.txt"):
        later = (project / ".venv/ready").stat().st_mtime + 10
        os.utime(project / name, (later, later))
        assert make(project, "setup")[1] == GPU
        os.utime(project / ".venv/ready", (later, later))
    os.utime(project / "requirements-tpu.txt", (later + 10, later + 10))
    assert make(project, "setup")[1] == set()


def test_an_installation_that_failed_is_begun_again(project):
    process, _ = make(project, "setup", "DEVICE=gpu", PIP_STATUS="1")
    assert process.returncode != 0
    assert make(project, "setup")[1] == GPU


def test_the_device_may_be_a_variable_of_the_environment(project):
    assert make(project, "setup", DEVICE="tpu")[1] == TPU


@pytest.mark.parametrize("device", ["cuda", "GPU", "gpu tpu", ""])
def test_an_unknown_device_is_one_sentence(project, device):
    make(project, "setup")
    process, calls = make(project, "setup", f"DEVICE={device}")
    assert process.returncode != 0 and calls == set()
    ours = [line for line in process.stderr.splitlines() if not line.startswith("make")]
    assert ours == [f"DEVICE={device} is not known: make it cpu, gpu or tpu."]
    assert (project / ".venv/ready").exists(), "the environment was removed"
