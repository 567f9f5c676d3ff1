"""Starting, sharing and agreeing; whole runs of two processes are in test_processes_slow.py."""

import threading

import numpy as np
import pytest
from etils import epath

from semiseg_jax import distributed, selection
from semiseg_jax.data import pipeline, sources
from semiseg_jax.errors import UserError, first_line
from tests import mains, processes


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (("10.0.0.1:8476", None, None), "belong together: give all three"),
        ((None, 2, 1), "belong together: give all three"),
        (("10.0.0.1", 2, 1), "--coordinator=10.0.0.1 is not HOST:PORT"),
        (("10.0.0.1:8476", 2, 2), "--process_id=2 is not one of --num_processes=2"),
        (("10.0.0.1:8476", 2, -1), "--process_id=-1 is not one of --num_processes=2"),
    ],
)
def test_what_does_not_fit_together_is_one_sentence(given, sentence):
    with pytest.raises(UserError, match=sentence):
        distributed.start(*given, on_cpu=True)


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
    distributed.start(None, None, None, on_cpu=True)
    assert (distributed.index(), distributed.count(), distributed.is_main()) == (0, 1, True)
    assert distributed.gather("name", (1, 2)) == [(1, 2)]
    assert distributed.agree("name", lambda: "value") == "value"


def as_process(monkeypatch, index, count):
    monkeypatch.setattr(distributed, "index", lambda: index)
    monkeypatch.setattr(distributed, "count", lambda: count)


def test_shares_are_a_sequence_again(monkeypatch):
    for length in (0, 1, 5, 6):
        parts = []
        for index in range(3):
            as_process(monkeypatch, index, 3)
            parts.append(distributed.share(range(length)))
        monkeypatch.setattr(distributed, "gather", lambda name, value, p=parts: list(map(list, p)))
        assert distributed.gather_shares("name", []) == list(range(length))


@pytest.mark.parametrize("pad_to", [1, 32])
def test_each_process_has_its_part_of_every_batch(monkeypatch, folder_config, pad_to):
    """Five images of two sizes: batches that are full, and one that is empty in a process."""
    data = sources.load(folder_config)
    colour = np.zeros(3, np.uint8)
    whole = list(pipeline.image_batches(data.evaluation, data, 4, pad_to, colour))
    sizes = pipeline.image_sizes(data.evaluation)
    monkeypatch.setattr(pipeline, "image_sizes", lambda examples: sizes)
    parts = []
    for index in range(2):
        as_process(monkeypatch, index, 2)
        parts.append(list(pipeline.image_batches(data.evaluation, data, 4, pad_to, colour)))
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
from semiseg_jax import command_line, distributed
from semiseg_jax.errors import UserError, first_line
command_line.define_processes()
flags.FLAGS(["two"])
def refuse():
    raise UserError(f"refused by {distributed.index()}")
if sys.argv[1] == "1":
    distributed._TICK_SECONDS = 7.0  # as on a machine that has more to do
with command_line.one_sentence():
    command_line.start_processes(on_cpu=True)
    index = distributed.index()
    print(distributed.gather("values", {"of": index}), distributed.agree("it", lambda: index))
    print(distributed.gather_shares("shares", distributed.share([5, 6, 7])))
    print(distributed.total("sum", np.array([[1, index]])).tolist())
    try:
        distributed.agree("refusal", refuse)
    except UserError as error:
        print(error)
    with distributed.main_first("data"):
        print("alone", flush=True)
    if index == 1:
        time.sleep(60)
    distributed.barrier("end of teacher", seconds=1)
"""


def test_two_processes_agree_and_a_barrier_names_itself_and_who_did_not_come():
    started = processes.start(2, 1, lambda i: ["-c", TWO, i])
    statuses, outputs = processes.finish(started, 300)
    assert statuses == [1, 1], "\n".join(outputs)
    said = 'Process 1 did not come to the barrier "end of teacher" within 1 s'
    for output, whose in zip(outputs, ("", "process 1 ends because process 0 did: "), strict=True):
        lines = output.splitlines()
        assert "[{'of': 0}, {'of': 1}] 0" in lines
        assert "[5, 6, 7]" in lines and "[[2, 1]]" in lines and "refused by 0" in lines
        assert processes.sentence(output).startswith(whose + said)


def test_all_processes_learn_that_the_best_weights_are_gone(monkeypatch, tmp_path):
    said = []

    def gather(name, value):
        said.append(value)
        return [said[0], value]

    monkeypatch.setattr(distributed, "gather", gather)
    best = selection.Best(epath.Path(tmp_path), 10)
    for index in range(2):
        monkeypatch.setattr(distributed, "is_main", lambda index=index: index == 0)
        with pytest.raises(UserError, match=r"best\.safetensors, .* is missing or damaged"):
            best.offer(20, 0.5, {})
    assert len(said) == 2 and not any(tmp_path.iterdir())


LAST = """
import os, sys, time
import jax
from absl import flags
from semiseg_jax import command_line, distributed, interruption
command_line.define_processes()
flags.FLAGS(["last"])
def shutdown():
    if distributed.index() == 0:
        os._exit(0)
    time.sleep(60)
jax.distributed.shutdown = shutdown
with command_line.one_sentence():
    command_line.start_processes(on_cpu=True)
    if sys.argv[1] == "interrupted":
        raise interruption.Interrupted
"""


@pytest.mark.parametrize(("outcome", "status"), [("done", 0), ("interrupted", 75)])
def test_losing_process_0_once_all_is_done_changes_no_outcome(outcome, status):
    started = processes.start(2, 1, lambda i: ["-c", LAST, outcome])
    statuses, outputs = processes.finish(started, 300)
    assert statuses == [0, status], "\n".join(outputs)


class Client:
    """Of a coordination service that is a dictionary."""

    def __init__(self, said):
        self.said = said

    def key_value_set(self, key, value, allow_overwrite=False):
        self.said[key] = value

    def key_value_dir_get(self, place):
        return [(key, value) for key, value in self.said.items() if key.startswith(place)]


def test_a_process_that_told_its_own_error_is_not_ended_by_it(monkeypatch):
    monkeypatch.setattr(distributed, "_TICK_SECONDS", 0.01)
    monkeypatch.setattr(distributed, "_end", pytest.fail)
    distributed._watch(distributed._Run(Client({"semiseg/ended/1": "its reason"}), 1, 2))


def test_all_stop_at_the_call_after_that_of_the_furthest():
    said, asked = {}, set()
    one, other = (
        distributed._Stop(distributed._Run(Client(said), i, 2), lambda i=i: i in asked)
        for i in range(2)
    )
    assert not any([one(), one(), one(), other(), other(), other(), other()])
    assert not one.look() and not other.look()
    asked.add(0)
    assert one.look()  # it waits for the other,
    waiting = threading.Thread(target=one)
    waiting.start()
    waiting.join(0.1)
    assert waiting.is_alive()  # and makes no call meanwhile.
    assert not other.look() and not one.look()
    waiting.join()
    assert one() and other()
    assert not one() and not other()


ALONE = """
from semiseg_jax import command_line, distributed
distributed.START_SECONDS = 3
with command_line.one_sentence():
    distributed.start("127.0.0.1:9", 2, 1, on_cpu=True)
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
from semiseg_jax import distributed
import libtpu
distributed.start(None, None, None, on_cpu=True)
print(distributed.count())
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
