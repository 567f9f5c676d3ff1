"""The commands that tell and fit the time of a run, as processes of their own."""

import json
import re
import subprocess
import sys

import pytest

from tests import processes

pytestmark = pytest.mark.slow

CONFIG = (
    "--config=configs/streets.py",
    "--config.model.backbone=tiny",
    "--config.model.head_features=8",
    "--config.model.low_level_features=4",
    "--config.data.streets_train=60",
    "--config.data.streets_val=10",
    "--config.data.crop=(48,64)",
    "--config.pseudo.scales=(1.0,)",
    "--config.train.steps=8",
    "--config.train.teacher_steps=10",
    "--config.train.batch_labeled=2",
    "--config.train.batch_unlabeled=2",
    "--config.sda.ops=('solarize',)",
    "--config.rounds.count=1",
)


def call(command, *arguments):
    done = subprocess.run(
        [sys.executable, "-m", f"semiseg_jax.{command}", *CONFIG, *arguments],
        cwd=processes.ROOT,
        env=processes.clean_environment() | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    return done.returncode, done.stdout + done.stderr


def test_a_run_is_fitted_once_and_told_how_long_it_takes(tmp_path):
    cache = f"--config.data.cache_dir={tmp_path / 'cache'}"
    status, planned = call("plan", cache)
    parts = "teacher .*, pseudo-labels .*, student .*, control "
    told = rf"This run takes about .* on this machine: {parts}"
    assert status == 0 and re.search(told, planned), planned
    run = (cache, f"--workdir={tmp_path / 'run'}")
    status, output = call("main", *run, "--minutes=5")
    assert status == 0, output
    assert re.search(r"5 minutes: teacher [\d,]+ steps, one round of [\d,]+ steps, con", output)
    assert re.search(told, output)
    content = json.loads((tmp_path / "run" / "fitted.json").read_text())
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert content["minutes"] == 5
    assert config["train"]["steps"] == content["settings"]["train.steps"]["value"] > 8
    status, output = call("main", *run)
    assert status == 0 and "control 1: done before" in output
    status, output = call("main", *run, "--minutes=6")
    assert status == 1 and "was begun with --minutes=5" in output


def test_flags_that_are_refused():
    status, output = call("main", "--minutes=an hour")
    assert status == 1 and "--minutes" in output and "Traceback" not in output
    status, output = call("plan", "--step-only")
    assert status == 1 and "--step-only needs --topology" in output
