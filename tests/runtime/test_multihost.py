"""Starting, sharing and agreeing; whole runs of two processes are in test_processes_slow.py."""

import re

import jax
import numpy as np
import pytest
from etils import epath

from semiseg_jax import checkpoints
from semiseg_jax.data import input_pipeline, load
from semiseg_jax.runtime import coordination, multihost
from semiseg_jax.runtime.errors import UserError, first_line
from tests import mains, processes
from tests.errors import raises_code


@pytest.mark.parametrize(
    ("given", "code", "part"),
    [
        (("10.0.0.1:8476", None, None), "cluster-flags-incomplete", "--coordinator"),
        ((None, 2, 1), "cluster-flags-incomplete", "--coordinator"),
        (("10.0.0.1", 2, 1), "coordinator-malformed", "--coordinator=10.0.0.1 "),
        (("10.0.0.1:8476", 2, 2), "process-id-out-of-range", "--process_id=2 "),
        (("10.0.0.1:8476", 2, -1), "process-id-out-of-range", "--process_id=-1 "),
    ],
)
def test_what_does_not_fit_together_is_one_sentence(given, code, part):
    with raises_code(code, part):
        multihost.initialize(*given, on_cpu=True)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RuntimeError("\n one\ntwo"), "one"),
        (AssertionError(), "AssertionError"),
        (OSError(" \n"), "OSError"),
        (ValueError("x" * 900), "x" * 200),
    ],
)
def test_of_an_error_one_line_is_told(error, line):
    assert first_line(error) == line


def test_flags_and_environment_reach_it_through_main(monkeypatch, folder_config):
    config = ["--config=configs/folder.py", f"--config.data.root={folder_config.data.root}"]
    sentence = mains.refused(monkeypatch, *config, "--num_processes=2")
    assert sentence.startswith("Error: --coordinator, --num_processes and --process_id belong")
    monkeypatch.setenv("SEMISEG_COORDINATOR", "10.0.0.1:8476")
    monkeypatch.setenv("SEMISEG_NUM_PROCESSES", "2")
    monkeypatch.setenv("SEMISEG_PROCESS_ID", "5")
    assert "--process_id=5 is not one of" in mains.refused(monkeypatch, *config)
    # A flag goes before the environment.
    assert "--process_id=7 is" in mains.refused(monkeypatch, *config, "--process_id=7")
    monkeypatch.setenv("SEMISEG_PROCESS_ID", "one")
    assert "SEMISEG_PROCESS_ID=one is not a whole number" in mains.refused(monkeypatch, *config)


def test_a_single_process_starts_nothing(monkeypatch):
    for name in ("SLURM_STEP_NODELIST", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    multihost.initialize(None, None, None, on_cpu=True)
    assert (multihost.process_index(), multihost.process_count(), multihost.is_main()) == (
        0,
        1,
        True,
    )
    assert multihost.all_gather("name", (1, 2)) == [(1, 2)]
    assert multihost.broadcast_from_main("name", lambda: "value") == "value"


def as_process(monkeypatch, index, count):
    monkeypatch.setattr(multihost, "process_index", lambda: index)
    monkeypatch.setattr(multihost, "process_count", lambda: count)


def test_shares_are_a_sequence_again(monkeypatch):
    for length in (0, 1, 5, 6):
        parts = []
        for index in range(3):
            as_process(monkeypatch, index, 3)
            parts.append(multihost.local_shard(range(length)))
        monkeypatch.setattr(
            multihost, "all_gather", lambda name, value, p=parts: list(map(list, p))
        )
        assert multihost.all_gather_shards("name", []) == list(range(length))


@pytest.mark.parametrize("pad_to", [1, 32])
def test_each_process_has_its_part_of_every_batch(monkeypatch, folder_config, pad_to):
    """Five images of two sizes: batches that are full, and one that is empty in a process."""
    data = load.load_dataset(folder_config)
    colour = np.zeros(3, np.uint8)
    whole = list(input_pipeline.image_batches(data.evaluation, data, 4, pad_to, colour))
    sizes = input_pipeline.image_sizes(data.evaluation)
    monkeypatch.setattr(input_pipeline, "image_sizes", lambda examples: sizes)
    parts = []
    for index in range(2):
        as_process(monkeypatch, index, 2)
        parts.append(list(input_pipeline.image_batches(data.evaluation, data, 4, pad_to, colour)))
    assert [len(part) for part in parts] == [2, 2]
    assert sum(len(b.ids) == 0 for part in parts for b in part) == 1
    for batch, one, other in zip(whole, *parts, strict=True):
        assert one.total == other.total == len(batch.ids)
        assert one.ids + other.ids == batch.ids
        for name in ("image", "label", "sizes"):
            joined = np.concatenate([getattr(one, name), getattr(other, name)])
            np.testing.assert_array_equal(joined, getattr(batch, name))


TWO = """
import sys, time
import numpy as np
from absl import flags
from semiseg_jax.runtime import cli, multihost
from semiseg_jax.runtime.errors import UserError
cli.define_process_flags()
flags.FLAGS(["two"])
def refuse():
    raise UserError(f"refused by {multihost.process_index()}", code="refused")
with cli.exit_on_user_error():
    cli.initialize_multihost(on_cpu=True)
    index = multihost.process_index()
    values = multihost.all_gather("values", {"of": index})
    print(values, multihost.broadcast_from_main("it", lambda: index))
    print(multihost.all_gather_shards("shards", multihost.local_shard([5, 6, 7])))
    print(multihost.all_reduce_sum("sum", np.array([[1, index]])).tolist())
    try:
        multihost.broadcast_from_main("refusal", refuse)
    except UserError as error:
        print(f"{error.code}: {error}")
    with multihost.main_first("data"):
        print("alone", flush=True)
    if index == 1:
        time.sleep(60)
    multihost.barrier("end of teacher", seconds=1)
"""


def test_two_processes_agree_and_a_barrier_names_itself_and_who_did_not_come():
    started = processes.start(2, 1, lambda i: ["-c", TWO, i])
    statuses, outputs = processes.finish(started, 300)
    assert statuses == [1, 1], "\n".join(outputs)
    said = 'Process 1 did not come to the barrier "end of teacher" within 1 s'
    for output, whose in zip(outputs, ("", "process 1 ends because process 0 did: "), strict=True):
        lines = output.splitlines()
        assert "[{'of': 0}, {'of': 1}] 0" in lines
        assert "[5, 6, 7]" in lines and "[[2, 1]]" in lines and "refused: refused by 0" in lines
        assert processes.sentence(output).startswith(whose + said)


def test_all_processes_learn_that_the_best_weights_are_gone(monkeypatch, tmp_path):
    said = []

    def gather(name, value):
        said.append(value)
        return [said[0], value]

    monkeypatch.setattr(multihost, "all_gather", gather)
    best = checkpoints.BestWeights(epath.Path(tmp_path), 10)
    for index in range(2):
        monkeypatch.setattr(multihost, "is_main", lambda index=index: index == 0)
        with raises_code("best-weights-missing", "best.safetensors"):
            best.update(20, 0.5, {})
    assert len(said) == 2 and not any(tmp_path.iterdir())


LAST = """
import os, sys, time
import jax
from absl import flags
from semiseg_jax.runtime import cli, multihost, preemption
cli.define_process_flags()
flags.FLAGS(["last"])
def shutdown():
    if multihost.process_index() == 0:
        os._exit(0)
    time.sleep(60)
jax.distributed.shutdown = shutdown
with cli.exit_on_user_error():
    cli.initialize_multihost(on_cpu=True)
    if sys.argv[1] == "interrupted":
        raise preemption.Preempted
"""


@pytest.mark.parametrize(("outcome", "status"), [("done", 0), ("interrupted", 75)])
def test_losing_process_0_once_all_is_done_changes_no_outcome(outcome, status):
    started = processes.start(2, 1, lambda i: ["-c", LAST, outcome])
    statuses, outputs = processes.finish(started, 300)
    assert statuses == [0, status], "\n".join(outputs)


STOP = """
import os, signal, sys, time
from absl import flags
from semiseg_jax.runtime import cli, multihost, preemption
cli.define_process_flags()
flags.FLAGS(["stop"])
with cli.exit_on_user_error():
    cli.initialize_multihost(on_cpu=True)
    slow = multihost.process_index() == 0
    with preemption.install_signal_handlers():
        for call in range(2000):
            time.sleep(0.02 if slow else 0.001)
            if slow and call == 20:
                os.kill(os.getpid(), signal.SIGTERM)
            if preemption.should_stop():
                print("stopped at", call, multihost.all_gather("calls", call), flush=True)
                preemption.raise_if_stopping()
"""


def test_all_stop_at_the_same_call_after_a_signal_to_one():
    started = processes.start(2, 1, lambda i: ["-c", STOP])
    statuses, outputs = processes.finish(started, 300)
    assert statuses == [75, 75], "\n".join(outputs)
    calls = [re.search(r"stopped at (\d+) \[(\d+), (\d+)\]", output).groups() for output in outputs]
    assert calls[0] == calls[1] and len(set(calls[0])) == 1 and int(calls[0][0]) > 20


FAIL = """
import sys, time
from absl import flags
from semiseg_jax.runtime import cli, multihost
cli.define_process_flags()
flags.FLAGS(["fail"])
with cli.exit_on_user_error():
    cli.initialize_multihost(on_cpu=True)
    if multihost.process_index() == 1:
        raise ValueError("of process 1")
    time.sleep(60)
"""


def test_an_error_of_one_ends_the_other_with_its_sentence():
    started = processes.start(2, 1, lambda i: ["-c", FAIL])
    statuses, outputs = processes.finish(started, 300)
    assert statuses == [1, 1], "\n".join(outputs)
    reason = "ValueError: of process 1"
    assert processes.sentence(outputs[0]) == f"process 0 ends because process 1 did: {reason}"
    assert processes.sentence(outputs[1]) == f"process 1: {reason}"
    assert "Traceback" in outputs[1] and "Traceback" not in outputs[0]


def test_a_missing_platform_ends_both_with_one_sentence():
    script = FAIL.replace("on_cpu=True", "on_cpu=False")
    started = processes.start(2, 1, lambda i: ["-c", script], JAX_PLATFORMS="cuda")
    statuses, outputs = processes.finish(started, 300)
    assert statuses == [1, 1], "\n".join(outputs)
    for output in outputs:
        assert "JAX cannot start with JAX_PLATFORMS=cuda" in processes.sentence(output)
        assert "Traceback" not in output


@pytest.mark.parametrize(("index", "prefix"), [(0, ""), (1, "process 1: ")])
def test_an_error_that_cannot_be_published_names_its_process(monkeypatch, index, prefix):
    def refuse(kind, sentence):
        raise jax.errors.JaxRuntimeError("UNAVAILABLE: Socket closed")

    def exit_now(status, sentence):
        raise SystemExit(status, sentence)

    client = object.__new__(coordination.Client)
    client.index, client.publish = index, refuse
    monkeypatch.setattr(multihost, "_client", client)
    monkeypatch.setattr(coordination, "exit_now", exit_now)
    monkeypatch.setattr(multihost.signal, "signal", lambda *args: None)
    with pytest.raises(SystemExit) as ended, multihost.fail_together({}):
        raise UserError("The disk is full.", code="test")
    assert ended.value.args == (1, f"{prefix}The disk is full.")


ALONE = """
from semiseg_jax.runtime import cli, multihost
multihost.START_SECONDS = 3
with cli.exit_on_user_error():
    multihost.initialize("127.0.0.1:9", 2, 1, on_cpu=True)
"""


def test_a_coordinator_that_does_not_answer_is_one_sentence():
    statuses, outputs = processes.finish(processes.start(1, 1, lambda i: ["-c", ALONE]), 300)
    assert statuses == [1]
    sentence = processes.sentence(outputs[0])
    assert sentence.startswith("Not all processes of this run came to 127.0.0.1:9 within 3 s")


WITH_LIBTPU = """
import sys
def refuse(event, details):
    if event.startswith("socket."):
        print(event, details)
sys.addaudithook(refuse)
from semiseg_jax.runtime import multihost
import libtpu
multihost.initialize(None, None, None, on_cpu=True)
print(multihost.process_count())
"""


def test_libtpu_beside_jax_looks_for_no_cluster(tmp_path):
    """A stand-in for it; in a container of Kubernetes, which JAX would ask."""
    (tmp_path / "libtpu.py").write_text("def get_library_path(): return '/dev/null'")
    environment = {
        "JAX_PLATFORMS": "",
        "PYTHONPATH": str(tmp_path),
        "KUBERNETES_SERVICE_HOST": "10.0.0.1",
        "KUBERNETES_SERVICE_PORT": "443",
    }
    started = processes.start(1, 1, lambda i: ["-c", WITH_LIBTPU], **environment)
    statuses, outputs = processes.finish(started, 300)
    assert statuses == [0] and outputs[0].splitlines() == ["1"]
