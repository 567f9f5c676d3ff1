"""A program as the TPU's compiler has it before it makes machine code of it.

Machine code takes by far the longest to make, and of what a plan tells it adds its own size and the
compiler's counts. What is optimised and has its place in memory XLA writes down, where it is asked
to dump; so a process of its own compiles the program, and is ended once that is written.
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

# Ends of the names of what is dumped: the program, its buffers, and what is written after both.
_PROGRAM = "after_optimizations.txt"
_BUFFERS = "after_optimizations-buffer-assignment.txt"
_LAST = "after_optimizations_after_buffer_assignment.txt"
# Buffers with a colour lie on the chip.
_ALLOCATION = re.compile(r"^allocation \d+: size (\d+), (?!color)(.*)$", re.MULTILINE)
_PATIENCE = 0.2  # seconds between two looks


@dataclasses.dataclass(frozen=True)
class Draft:
    """An optimised program.

    Attributes:
        program: its text, for `hlo.Module`.
        buffers: the text of their places in memory.
    """

    program: str
    buffers: str

    def memory(self) -> tuple[int, int, int]:
        """Bytes of main memory on one chip without code: all, arguments, temporaries."""
        found = [(int(size), what) for size, what in _ALLOCATION.findall(self.buffers)]
        arguments, temporaries = (
            sum(size for size, what in found if what.startswith(kind))
            for kind in ("parameter", "preallocated-temp")
        )
        return sum(size for size, _ in found), arguments, temporaries


def draft(trace: Trace, topology: Topology, name: str) -> Draft | str:
    """The optimised program, or what the compiler says where it has no place in memory.

    Args:
        trace: traces it for a topology; another process calls it, so that it has to be picklable.
        topology: of TPU chips.
        name: of the traced function.

    Raises:
        RuntimeError: the compiler ended in another way.
    """
    context = multiprocessing.get_context("spawn")
    hearing, saying = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder, hearing:
        process = context.Process(target=_compile, args=(trace, topology.name, saying), daemon=True)
        with _dumping(folder, name):
            process.start()
        saying.close()
        try:
            ended = False
            while not any(epath.Path(folder).glob(f"*{_LAST}")):
                if ended:
                    raise RuntimeError(f"The process that compiles {name} ended without a word.")
                if hearing.poll(_PATIENCE):
                    with contextlib.suppress(EOFError):
                        return hearing.recv()
                    ended = True
            program, buffers = (
                next(epath.Path(folder).glob(f"*.{end}")).read_text()
                for end in (_PROGRAM, _BUFFERS)
            )
            return Draft(program, buffers)
        finally:
            process.kill()
            process.join()


def _compile(trace: Trace, name: str, saying: Connection) -> None:
    """Compiles in a process of its own; says the compiler's sentence where it refuses."""
    found = mesh_lib.compiled(trace(chips.topology(name)))
    if isinstance(found, str):
        saying.send(found)


@contextlib.contextmanager
def _dumping(folder: str, name: str) -> Iterator[None]:
    """Processes that start meanwhile write programs of a name into a folder."""
    before = os.environ.get("XLA_FLAGS")
    asked = f"--xla_dump_to={folder} --xla_dump_hlo_as_text --xla_dump_hlo_module_re=jit_{name}"
    os.environ["XLA_FLAGS"] = f"{before or ''} {asked}"
    try:
        yield
    finally:
        if before is None:
            del os.environ["XLA_FLAGS"]
        else:
            os.environ["XLA_FLAGS"] = before
