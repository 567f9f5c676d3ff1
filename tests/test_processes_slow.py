"""Two processes of two devices each against one of four; killed, stopped and started again."""

import collections
import json
import os
import re
import shutil
import signal
import time

import numpy as np
import pytest

from tests import processes
from tests.mains import TINY
from tests.methods import test_method_steps
from tests.workdirs import rows, same

pytestmark = pytest.mark.slow

# Files in the folders of the report's pictures.
REPORTED = "/(gallery|predictions)/"


def arguments(workdir, data, *more):
    """The command for one process, on the smallest network and `folder_data`."""
    command = [
        f"--workdir={workdir}",
        "--config=configs/default.py",
        *TINY,
        "--config.data.name=folder",
        f"--config.data.root={data}",
        f"--config.data.cache_dir={data.parent / 'cache'}",
        "--config.data.classes=('ground','thing','corner')",
        "--config.data.labels=4.0",
        "--config.train.batch_labeled=4",
        "--config.train.batch_unlabeled=4",
        "--config.pseudo.batch=4",
        "--config.eval.batch=4",
        "--config.train.log_every=1",
        *more,
    ]
    return lambda i: ["-m", "tests.processes", "main", f"{workdir}.{i}.log", *command]


def run(count, workdir, data, *more):
    started = processes.start(count, 4 // count, arguments(workdir, data, *more))
    statuses, outputs = processes.finish(started)
    assert statuses == [0] * count, "\n".join(outputs)
    return outputs


def opened(workdir, count, data):
    """How often each process opened each file of the data, and each label map."""
    counts = []
    for i in range(count):
        paths = processes.events(f"{workdir}.{i}.log", "open")
        wanted = [p.replace(os.fspath(workdir), "") for p in paths if p.endswith(".png")]
        counts.append(collections.Counter(wanted))
    return counts


def test_one_checkpoint_gives_the_same_labels_and_miou_and_each_opens_its_share(
    tmp_path, folder_data
):
    one, two = tmp_path / "one", tmp_path / "two"
    run(1, one, folder_data, "--config.rounds.count=0")
    (one / "results.json").unlink()
    shutil.copytree(one, two)
    run(1, one, folder_data)
    outputs = run(2, two, folder_data)

    # The teacher's row and its labels, to the bit; the student's are its own.
    assert rows(one)[0] == rows(two)[0]
    assert [(r["stage"], r["round"], r["step"]) for r in rows(two)] == [
        ("teacher", 0, 2),
        ("student", 1, 2),
    ]
    labels = "round_0/teacher/pseudo_labels"
    names = sorted(p.name for p in (one / labels).iterdir())
    assert len(names) == 8 + 2 and names == sorted(p.name for p in (two / labels).iterdir())
    for name in names:
        assert (one / labels / name).read_bytes() == (two / labels / name).read_bytes(), name
    # Sums in another order, no more.
    assert abs(rows(one)[1]["miou"] - rows(two)[1]["miou"]) < 0.02

    # Every opening of a file by one process is one of a single process, about half of them; the
    # pictures of the report are drawn by process 0.
    (alone,), shares = opened(one, 1, folder_data), opened(two, 2, folder_data)
    assert sum(shares, collections.Counter()) == alone
    read = [sum(n for p, n in c.items() if not re.search(REPORTED, p)) for c in (alone, *shares)]
    assert all(0.3 < share / read[0] < 0.7 for share in read[1:])

    # Process 0 speaks, and writes.
    assert "4 cpu device(s) of 2 processes" in outputs[0] and "gain over" in outputs[0]
    assert not [word for word in ("devices", "teacher", "student", "mIoU") if word in outputs[1]]
    writers = {p.name.split(".")[5] for p in two.rglob("events.*")}
    assert len(writers) == 1 + 1  # with that of the run it was copied from
    assert (two / "model/weights.safetensors").exists()


@pytest.mark.parametrize(
    ("backbone", "dtype", "tolerance"),
    [("tiny", "float64", 1e-9), ("tiny", "float32", 1e-4), ("tiny_dinov2", "float64", 1e-9)],
)
def test_a_step_of_two_processes_is_that_of_one(tmp_path, backbone, dtype, tolerance):
    made = []
    for count in (1, 2):
        out = tmp_path / f"{count}.npz"
        command = ["-m", "tests.processes", "step", out, dtype, backbone]
        started = processes.start(
            count, 4 // count, lambda i, c=command: c, JAX_ENABLE_X64=str(int(dtype == "float64"))
        )
        statuses, outputs = processes.finish(started)
        assert statuses == [0] * count, "\n".join(outputs)
        made.append(np.load(out))
    one, two = made
    assert set(one) == set(two)
    largest = max(np.linalg.norm(one[k]) for k in one if "trace" in k)
    for key in one:
        assert one[key].dtype == two[key].dtype
        scale = max(np.linalg.norm(one[key]), 1e-3 * largest)
        assert np.linalg.norm(one[key] - two[key]) <= tolerance * scale, key


FITTED = """
import sys
from absl import flags
from semiseg_jax.runtime import cli, config_files, multihost
cli.define_process_flags()
flags.FLAGS(["fitted"])
with cli.exit_on_user_error():
    cli.initialize_multihost(on_cpu=True)
    from semiseg_jax import fitted_settings
    from semiseg_jax.planning import announcer, measurement, minutes
    from semiseg_jax.planning.run_time import ProgramCost, Speed
    from semiseg_jax.planning.work import ProgramId
    from semiseg_jax.planning.workload import Workload
    kinds = "teacher step", "student step", "labelling", "evaluation"
    costs = {ProgramId(kind, "tiny"): ProgramCost(1, 8, (10, 10)) for kind in kinds}
    seconds = dict.fromkeys(costs, 1.0 + multihost.process_index())
    load = Workload(2, 4, 8, 5, {(10, 10): 8}, {(10, 10): 5})
    measured = measurement.Measurement(load, Speed(costs, seconds, 1.0))
    measurement.measure = lambda config: measured
    config = config_files.default_config().copy_and_resolve_references()
    config.model.backbone = "tiny"
    print("alone", minutes.fit(config, load, measured.speed, 60).config.train.steps)
    for start in ("first", "second"):
        given = fitted_settings.restore(sys.argv[1], config)
        chosen = minutes.choose_settings(given, sys.argv[1], 60.0, announcer.Announcer())
        print(start, chosen.rounds.count, chosen.train.steps, chosen.train.teacher_steps)
"""


def test_two_processes_are_fitted_to_minutes_alike(tmp_path):
    """Process 1 measures half the speed, and has the settings of process 0."""
    started = processes.start(2, 1, lambda i: ["-c", FITTED, tmp_path / "run"])
    statuses, outputs = processes.finish(started, 300)
    assert statuses == [0, 0], "\n".join(outputs)
    said = [dict(re.findall(r"^(alone|first|second) (.*)$", out, re.M)) for out in outputs]
    assert said[0]["alone"] != said[1]["alone"]
    assert said[0]["first"] == said[1]["first"] == said[0]["second"] == said[1]["second"]
    content = json.loads((tmp_path / "run" / "fitted.json").read_text())
    assert str(content["settings"]["train.steps"]["value"]) in said[0]["first"].split()
    # Process 0 alone says what was chosen.
    assert ["60 minutes: teacher" in output for output in outputs] == [True, False]


LONG = ("--config.train.teacher_steps=100000", "--config.train.checkpoint_every=20")


def assert_lost(killed, output):
    """JAX names the lost process, unless it is process 0; then follows our sentence."""
    if killed:
        assert re.search(rf"stopped sending heartbeats\):\s+{killed}\n", output), output
    sentence = processes.sentence(output)
    assert "process 0 or another one is lost" in sentence
    assert "start the same command again on all of them" in sentence


@pytest.mark.parametrize("killed", [0, 1])
def test_killing_one_ends_the_other_with_a_sentence_and_a_new_start_goes_on(
    tmp_path, folder_data, killed
):
    workdir = tmp_path / "run"
    kept = workdir / "round_0/teacher/checkpoints"
    started = processes.start(2, 2, arguments(workdir, folder_data, *LONG))
    processes.until_there(kept / "20", started[0])
    started[killed].kill()
    began = time.monotonic()
    other = started[1 - killed]
    output = other.communicate(timeout=120)[0]
    assert time.monotonic() - began < 60
    assert other.returncode == 1
    assert_lost(killed, output)

    # SIGTERM to one: both save the same step, and end with "start again".
    started = processes.start(2, 2, arguments(workdir, folder_data, *LONG))
    first = int(processes.until(started[0], r"going on at step (\d+)")[1])
    assert first >= 20 and first % 20 == 0
    processes.until(started[0], f"teacher: step {first + 10}/")
    number = signal.SIGINT if killed else signal.SIGTERM
    started[killed].send_signal(number)
    statuses, outputs = processes.finish(started, 300)
    assert statuses == [75, 75], "\n".join(outputs)
    saved = [processes.events(f"{workdir}.{i}.log", "save") for i in range(2)]
    assert saved[0] == saved[1] and saved[0]
    assert max(int(p.name) for p in kept.iterdir()) == int(saved[0][-1])


def test_a_broken_image_that_one_process_reads_ends_all_with_its_sentence(tmp_path, folder_data):
    broken = sorted((folder_data / "images/train").iterdir())
    workdir = tmp_path / "run"
    started = processes.start(2, 2, arguments(workdir, folder_data, *LONG))
    processes.until(started[0], "teacher: step 3/")
    for path in broken:
        path.write_bytes(path.read_bytes()[:200])
    statuses, outputs = processes.finish(started, 300)
    assert statuses == [1, 1], "\n".join(outputs)
    for output in outputs:
        assert "cannot be decoded" in processes.sentence(output)


# Who is killed where: process 0 commits checkpoints, each writes its share of the label maps.
KILLS_ON_A_STORE = [
    (0, "round_0/teacher/checkpoints/4/commit_success", "before"),
    (1, "round_0/teacher/pseudo_labels/.*png", "half"),
]


def test_two_processes_on_a_store_without_rename_change_no_bit(tmp_path, folder_data):
    """Killed on the way, and beside those on a file system."""
    steps = ("--config.train.steps=4", "--config.train.teacher_steps=4")
    run(2, tmp_path / "whole", folder_data, *steps)
    command = arguments(tmp_path / "killed", folder_data, *steps)

    def start(killed, *kill):
        def on_store(i):
            module, name, _, *rest = command(i)
            return [module, name, "store", *(kill if i == killed else ("never", "", 1)), *rest]

        return processes.finish(processes.start(2, 2, on_store))

    for killed, *kill in KILLS_ON_A_STORE:
        statuses, outputs = start(killed, *kill, 1)
        assert statuses[killed] == -signal.SIGKILL, "\n".join(outputs)
        assert statuses[1 - killed] == 1
        assert_lost(killed, outputs[1 - killed])
    statuses, outputs = start(None)
    assert statuses == [0, 0], "\n".join(outputs)
    same(tmp_path / "whole", tmp_path / "killed")


LATE = """
import sys, time
from absl import flags
from semiseg_jax.runtime import cli, multihost
cli.define_process_flags()
flags.FLAGS(["late"])
with cli.exit_on_user_error():
    cli.initialize_multihost(on_cpu=True)
    import jax, numpy as np
    from semiseg_jax import checkpoints, mesh
    jax.devices()
    if multihost.process_index() == 1:
        time.sleep(35)
    if sys.argv[1] == "checkpoints":
        with checkpoints.Checkpoints(sys.argv[2]):
            pass
    else:
        devices = mesh.make_mesh()
        ones = mesh.shard_batch({"of": np.ones(2, np.int32)}, devices)["of"]
        assert jax.jit(jax.numpy.sum, out_shardings=mesh.replicated(devices))(ones) == 4
    print("together")
"""


@pytest.mark.parametrize("where", ["checkpoints", "steps"])
def test_processes_wait_for_one_that_is_late_at_their_first_meeting(tmp_path, where):
    """Gloo's devices connect in their first computation, where they wait for 30 s alone."""
    started = processes.start(2, 2, lambda i: ["-c", LATE, where, tmp_path / "checkpoints"])
    statuses, outputs = processes.finish(started, 300)
    assert statuses == [0, 0], "\n".join(outputs)
    assert all("together" in output for output in outputs)


def test_two_processes_step_as_one_does_with_every_method(tmp_path):
    found = []
    for count in (1, 2):
        out = tmp_path / f"{count}.npz"
        command = ["-m", "tests.processes", "methods", out]
        started = processes.start(count, 2 // count, lambda i, c=command: c, JAX_ENABLE_X64="1")
        statuses, outputs = processes.finish(started)
        assert statuses == [0] * count, "\n".join(outputs)
        found.append(dict(np.load(out)))
    one, two = found
    assert one.keys() == two.keys()
    assert {key.split("'")[1] for key in one} == set(test_method_steps.ONLINE)
    for key, value in one.items():
        np.testing.assert_allclose(two[key], value, rtol=0, atol=1e-9, err_msg=key)
