"""The command itself, as a process of its own: run, killed, started again; and on real images."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from semiseg_jax.experiments.paper_tables import TABLES
from tests import FAST_COMPILATION, workdirs
from tests.conftest import FEW_OPERATIONS
from tests.prepared_process import PreparedProcess

ROOT = Path(__file__).parents[1]
CAMVID = ROOT.parent / "shared" / "data" / "camvid"

pytestmark = pytest.mark.slow

SMALL = (
    "--config.model.backbone=tiny",
    "--config.model.pretrained=",
    "--config.model.head_features=8",
    "--config.model.low_level_features=4",
    "--config.data.crop=48,64",
    "--config.pseudo.scales=(0.5,1.0)",
    "--config.train.steps=8",
    "--config.train.teacher_steps=8",
    "--config.train.checkpoint_every=3",
    "--config.train.log_every=1",
    "--config.rounds.count=1",
)
FEW = f"--config.sda.ops={FEW_OPERATIONS}"


def start(workdir, *arguments, prepared=False):
    """Starts the command; `prepared` without the time of its imports."""
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    command = ["-m", "semiseg_jax.main", f"--workdir={workdir}", *arguments]
    if prepared:
        return PreparedProcess(command, environment)
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process):
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output
    return output


def end_after(process, line, number):
    """Sends the process a signal a moment after it printed a line with this text; its status."""
    for printed in process.stdout:
        if line in printed:
            time.sleep(0.05)
            process.send_signal(number)
            return process.wait(timeout=300), process.stdout.read()
    raise AssertionError(f"the run ended without printing {line!r}")


def test_killed_runs_end_with_the_bits_of_an_uninterrupted_one(tmp_path):
    arguments = (
        "--config=configs/streets.py",
        *SMALL,
        "--config.data.streets_train=60",
        "--config.data.streets_val=10",
        f"--config.data.cache_dir={tmp_path / 'cache'}",
    )
    output = finish(start(tmp_path / "whole", *arguments))
    assert "gain over the teacher" in output

    def start_again(name):
        return start(tmp_path / name, *arguments, prepared=True)

    # Inside the teacher, as it goes on, as its labels are being written, and inside the student.
    for line in ("teacher: step 5/8", "teacher: step 7/8", "16/44 images", "student 1: step 7/8"):
        end_after(start_again("killed"), line, signal.SIGKILL)
    output = finish(start_again("killed"))
    assert "teacher: done before" in output
    # As pre-emptible machines end, and as a person does.
    for line, number in (
        ("teacher: step 4/8", signal.SIGTERM),
        ("16/44 images", signal.SIGINT),
        ("student 1: step 2/8", signal.SIGTERM),
    ):
        status, output = end_after(start_again("stopped"), line, number)
        assert status == 75, output
        assert "Interrupted: start the same command again to go on." in output
    assert "going on at step" in finish(start_again("stopped"))
    for name in ("killed", "stopped"):
        workdirs.same(tmp_path / "whole", tmp_path / name)


def test_every_row_of_table_1_on_the_built_in_data(tmp_path):
    command = [sys.executable, "-m", "semiseg_jax.ablations", "--config=configs/streets.py"]
    command += [*SMALL, FEW, "--table=1", "--seeds=0,1", f"--workdir={tmp_path}"]
    command += ["--config.data.streets_train=24", "--config.data.streets_val=6"]
    command += ["--config.data.labels=4", "--config.eval.batch=2", "--config.rounds.count=2"]
    environment = os.environ | {"XLA_FLAGS": FAST_COMPILATION}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    text = (tmp_path / "table_1.md").read_text()
    assert text in done.stdout
    rows = [line.split("|") for line in text.splitlines() if "±" in line and "|" in line]
    # But for those of images beyond the training set, of which there are none.
    expected = [row for row in TABLES["1"].rows if row.run != "all_labels_extra"]
    assert [row[1].strip() for row in rows] == [row.title(2) for row in expected]
    assert all(" 0, 1 " in row for row in rows)
    assert "all_labels_extra is left out" in done.stdout
    assert (tmp_path / "table_1.png").stat().st_size > 10_000
    # Four runs of a seed have the same labels; their teacher was trained once.
    assert done.stdout.count("taken from") == 2 * 3


@pytest.mark.skipif(not CAMVID.exists(), reason="CamVid is not in ../shared/data/camvid")
@pytest.mark.parametrize("argument", ["", ":half"])
def test_camvid_from_teacher_to_results_on_the_test_list(tmp_path, argument):
    finish(
        start(
            tmp_path / "run",
            f"--config=configs/camvid.py{argument}",
            *SMALL,
            FEW,
            f"--config.data.root={CAMVID}",
            f"--config.data.cache_dir={tmp_path / 'cache'}",
            "--config.pseudo.scales=(0.5,)",
            "--config.pseudo.flip=False",
        )
    )
    rows = workdirs.rows(tmp_path / "run")
    assert [(r["stage"], r["round"], r["split"]) for r in rows] == [
        ("teacher", 0, "test"),
        ("student", 1, "test"),
        ("control", 1, "test"),
    ]
    factor = 4 if argument else 1
    assert all(len(r["iou"]) == 11 and r["pixels"] * factor > 35e6 for r in rows)
    labels = list((tmp_path / "run" / "round_0/teacher/pseudo_labels").glob("*.png"))
    assert len(labels) == 367 - 12
