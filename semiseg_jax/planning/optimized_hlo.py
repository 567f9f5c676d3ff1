"""Reads the optimized HLO of a TPU program without waiting for its machine code.

Generating machine code takes most of the compile time and adds only the size of the code and the
compiler's own cost counts. XLA can dump the optimized HLO and the buffer assignment before that
phase. A separate process therefore compiles the program with dumping enabled and is killed as soon
as both files are complete.
"""

import contextlib
import dataclasses
import multiprocessing
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection

import jax
from etils import epath

from semiseg_jax import mesh as mesh_lib
from semiseg_jax.planning import chips
from semiseg_jax.planning.chips import Topology

Trace = Callable[[Topology], jax.stages.Traced]

# Suffixes of the dumped files: the program, its buffers, and the file that XLA writes after both.
_PROGRAM = "after_optimizations.txt"
_BUFFERS = "after_optimizations-buffer-assignment.txt"
_LAST = "after_optimizations_after_buffer_assignment.txt"
# Allocations with a color are on-chip memory.
_ALLOCATION = re.compile(r"^allocation \d+: size (\d+), (?!color)(.*)$", re.MULTILINE)
_POLL_SECONDS = 0.2


@dataclasses.dataclass(frozen=True)
class OptimizedHlo:
    """An optimized program.

    Attributes:
        text: the HLO, for `hlo.Module`.
        buffer_assignment: text of the buffer assignment.
    """

    text: str
    buffer_assignment: str

    def memory(self) -> tuple[int, int, int]:
        """Returns bytes of main memory on one chip without code: total, arguments, temporaries."""
        allocations = [
            (int(size), description)
            for size, description in _ALLOCATION.findall(self.buffer_assignment)
        ]
        arguments, temporaries = (
            sum(size for size, description in allocations if description.startswith(kind))
            for kind in ("parameter", "preallocated-temp")
        )
        return sum(size for size, _ in allocations), arguments, temporaries


def optimized_hlo(trace: Trace, topology: Topology, name: str) -> OptimizedHlo | str:
    """Returns the optimized program, or the compiler's message if the program does not fit.

    Args:
        trace: traces the program for a topology; must be picklable, another process calls it.
        topology: of TPU chips.
        name: name of the traced function.

    Raises:
        RuntimeError: the compiler process ended without a result.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder, receiver:
        process = context.Process(target=_compile, args=(trace, topology.name, sender), daemon=True)
        with _dump_hlo(folder, name):
            process.start()
        sender.close()
        try:
            ended = False
            while not any(epath.Path(folder).glob(f"*{_LAST}")):
                if ended:
                    raise RuntimeError(f"The process that compiles {name} ended without a result.")
                if receiver.poll(_POLL_SECONDS):
                    with contextlib.suppress(EOFError):
                        return receiver.recv()
                    ended = True
            text, buffer_assignment = (
                next(epath.Path(folder).glob(f"*.{suffix}")).read_text()
                for suffix in (_PROGRAM, _BUFFERS)
            )
            return OptimizedHlo(text, buffer_assignment)
        finally:
            process.kill()
            process.join()


def _compile(trace: Trace, name: str, sender: Connection) -> None:
    """Compiles in a process of its own; sends the compiler's message if the program is rejected."""
    result = mesh_lib.try_compile(trace(chips.topology(name)))
    if isinstance(result, str):
        sender.send(result)


@contextlib.contextmanager
def _dump_hlo(folder: str, name: str) -> Iterator[None]:
    """Makes processes that start in this context dump the programs of a name into a folder."""
    before = os.environ.get("XLA_FLAGS")
    flags = f"--xla_dump_to={folder} --xla_dump_hlo_as_text --xla_dump_hlo_module_re=jit_{name}"
    os.environ["XLA_FLAGS"] = f"{before or ''} {flags}"
    try:
        yield
    finally:
        if before is None:
            del os.environ["XLA_FLAGS"]
        else:
            os.environ["XLA_FLAGS"] = before
