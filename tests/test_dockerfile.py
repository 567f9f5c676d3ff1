"""launch/Dockerfile: linted, and what it names is there; no test builds it."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCKERFILE = ROOT / "launch" / "Dockerfile"
HADOLINT = shutil.which("hadolint", path=str(Path(sys.executable).parent))


@pytest.mark.skipif(HADOLINT is None, reason="hadolint is not installed (requirements-dev.txt)")
def test_hadolint_finds_nothing():
    process = subprocess.run([HADOLINT, DOCKERFILE], capture_output=True, text=True)
    assert (process.returncode, process.stdout) == (0, "")


def test_all_files_that_are_copied_are_there():
    sources = [
        name
        for line in re.findall(r"^COPY (.*)$", DOCKERFILE.read_text(), re.M)
        for name in line.split()[:-1]
    ]
    assert "semiseg_jax" in sources and "configs" in sources
    assert [name for name in sources if not (ROOT / name).exists()] == []


def test_each_device_has_requirements():
    installed = dict(re.findall(r"^ +(\w+)\) .*--requirement (\S+)", DOCKERFILE.read_text(), re.M))
    assert installed == {"cpu": "requirements.txt", "gpu": "requirements-gpu.txt"}


def test_the_command_is_the_quickstart():
    assert '"semiseg_jax.main", "--config=streets"' in DOCKERFILE.read_text()
    assert (ROOT / "configs" / "streets.py").exists()
