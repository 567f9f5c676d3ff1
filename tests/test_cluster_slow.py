"""Runs of two processes by launch/local_cluster.sh: all of Algorithm 1, interrupted, killed."""

import shutil
import signal
import time
from pathlib import Path

import pytest

from tests import processes
from tests.mains import TINY
from tests.workdirs import rows

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not Path("/proc/self/environ").exists(), reason="processes are told by /proc"
    ),
]

STREETS = (
    "--config=configs/streets.py",
    *TINY,
    "--config.data.streets_train=24",
    "--config.data.streets_val=8",
    "--config.data.streets_size=(48,64)",
    "--config.data.labels=8.0",
    "--config.train.batch_labeled=4",
    "--config.train.batch_unlabeled=4",
    "--config.train.teacher_steps=40",
    "--config.train.steps=20",
    "--config.train.checkpoint_every=100",
    "--config.pseudo.batch=4",
    "--config.eval.batch=4",
)
TEACHER = ("--config.rounds.count=0",)
ALL = ("--config.rounds.count=2", "--config.rounds.control=True")
# Of the final mIoU between two and one process, which sum in another order.
TOLERANCE = 0.02


def arguments(workdir, *more):
    cache = f"--config.data.cache_dir={workdir.parent / 'cache'}"
    return (f"--workdir={workdir}", *STREETS, cache, *more)


def run_cluster(workdir, *more):
    with processes.cluster(2, 2, *arguments(workdir, *more)) as script:
        output = script.communicate(timeout=900)[0]
    assert script.returncode == 0, output
    return output


def test_algorithm_1_by_two_processes_is_that_by_one(tmp_path):
    """All of it by two; by one from the same teacher on."""
    one, two = tmp_path / "one", tmp_path / "two"
    output = run_cluster(two, *ALL)
    assert "8 labelled, 16 unlabelled, 8 val images" in output
    assert "4 cpu device(s) of 2 processes" in output and "gain over the teacher" in output
    for name in ("round_0/teacher/checkpoints", "round_0/teacher/DONE", "config.json", "data.json"):
        (one / name).parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if (two / name).is_dir() else shutil.copy
        copy(two / name, one / name)
    command = ["-m", "semiseg_jax.main", *arguments(one, *ALL)]
    started = processes.start(1, 4, lambda i: command)
    statuses, outputs = processes.finish(started)
    assert statuses == [0] and "teacher: done before" in outputs[0], outputs[0]

    stages = [("teacher", 0, 40), ("student", 1, 20), ("student", 2, 20), ("control", 2, 40)]
    assert [(r["stage"], r["round"], r["step"]) for r in rows(two)] == stages
    for row, other in zip(rows(one), rows(two), strict=True):
        assert row.keys() == other.keys()
        assert row["protocol"] == other["protocol"]
        assert [row[k] for k in ("split", "seed", "pixels")] == [
            other[k] for k in ("split", "seed", "pixels")
        ]
        assert [v is None for v in row["iou"]] == [v is None for v in other["iou"]]
        assert abs(row["miou"] - other["miou"]) < TOLERANCE
    # One and the same teacher: its row, and the labels of round 1, to the bit.
    assert rows(one)[0] == rows(two)[0]
    labels = [folder / "round_0/teacher/pseudo_labels" for folder in (one, two)]
    names = sorted(p.name for p in labels[0].iterdir())
    assert len(names) == 16 + 2 and names == sorted(p.name for p in labels[1].iterdir())
    for name in names:
        assert (labels[0] / name).read_bytes() == (labels[1] / name).read_bytes(), name
    # What a run leaves is there, once.
    assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in two.iterdir())
    assert {p.name for p in two.iterdir()} >= {"model", "report.html", "round_1", "round_2"}


LONG = (
    "--config.train.teacher_steps=100000",
    "--config.train.checkpoint_every=20",
    "--config.train.log_every=1",
)


def test_a_cluster_that_lost_a_process_or_was_told_to_end_goes_on(tmp_path):
    workdir = tmp_path / "run"
    kept = workdir / "round_0/teacher/checkpoints"
    command = arguments(workdir, *TEACHER, *LONG)

    with processes.cluster(2, 2, *command) as script:
        processes.until_there(kept / "20", script)
        processes.kill_member(script, 1)
        began = time.monotonic()
        output = script.communicate(timeout=120)[0]
    assert time.monotonic() - began < 60
    assert script.returncode == 128 + signal.SIGKILL
    assert "process 0 or another one is lost" in processes.sentence(output)

    # Told to end, both save one step; the next start goes on there.
    with processes.cluster(2, 2, *command) as script:
        first = int(processes.until(script, r"going on at step (\d+)")[1])
        assert first >= 20 and first % 20 == 0
        processes.until(script, f"teacher: step {first + 10}/")
        script.send_signal(signal.SIGTERM)
        output = script.communicate(timeout=300)[0]
    assert script.returncode == 75, output
    assert "[0] Interrupted: start the same command again to go on." in output
    last = max(int(p.name) for p in kept.iterdir())
    assert last > first
    with processes.cluster(2, 2, *command) as script:
        processes.until(script, f"going on at step {last}$")
        processes.until(script, f"teacher: step {last + 1}/")
