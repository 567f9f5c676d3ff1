"""Programs read before the compiler makes machine code of them."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest

from semiseg_jax import mesh as mesh_lib
from semiseg_jax.planning import chips, drafts, programs
from semiseg_jax.planning.chips import Topology

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu, the TPU's compiler, is not installed (pip install libtpu==0.0.42.1)",
)

# As XLA prints them for v5e; what has a colour lies on the chip.
BUFFERS = """\
BufferAssignment:
allocation 0: size 512, thread-local:
 value: <2 reduce_sum.2 @0> (size=512,offset=0): f32[]{:T(128)}
allocation 1: size 9437184, parameter 121, shape |f32[3,3,512,512]| at ShapeIndex {}, maybe-live-out:
 value: <17187 param.83 @0> (size=9437184,offset=0): f32[3,3,512,512]{3,2,1,0:T(8,128)}
allocation 2: size 4096, parameter 3, shape |f32[512]| at ShapeIndex {}:
allocation 3: size 20480, constant:
allocation 4: size 32227840, preallocated-temp:
allocation 5: size 5120, color 6, preallocated-temp:
allocation 6: size 117440512, color 1, preallocated-temp:
"""  # noqa: E501


def test_memory_from_the_places_of_buffers():
    arguments, temporaries = 9437184 + 4096, 32227840
    together = 512 + arguments + 20480 + temporaries
    assert drafts.Draft("", BUFFERS).memory() == (together, arguments, temporaries)


def untraceable(topology):
    raise SystemExit(0)


def test_a_compiler_that_ends_without_a_word():
    with pytest.raises(RuntimeError, match="compiles step ended without a word"):
        drafts.draft(untraceable, Topology("cpu", (), 1, None), "step")


def products(side, topology):
    """Of a matrix with itself, on every chip; three such are there at once."""
    whole = mesh_lib.replicated(mesh_lib.make_mesh(topology.devices))

    def product(x):
        return jnp.sin(x @ x) @ x

    made = jax.jit(product, in_shardings=whole, out_shardings=whole)
    return made.trace(jax.ShapeDtypeStruct((side, side), jnp.bfloat16))


def small(topology):
    return products(1024, topology)


def large(topology):
    return products(2**16, topology)  # 8 GiB each, of 16


@needs_libtpu
def test_a_draft_for_v5e_is_the_program_that_is_compiled():
    topology = chips.topology("v5e:2x2")
    drafted, compiled = (
        programs.cost_of(small, topology, how) for how in ("optimised", "compiled")
    )
    assert isinstance(drafted, programs.Cost) and isinstance(compiled, programs.Cost)
    assert drafted.moved == compiled.moved > 0
    assert drafted.main_traffic == compiled.main_traffic > 0
    assert drafted.convolved == compiled.convolved == {"bf16 × bf16": 2}
    assert drafted.memory.arguments == compiled.memory.arguments == 2 * 1024**2
    assert drafted.traffic is None and compiled.traffic is not None


@needs_libtpu
def test_a_draft_for_v5e_that_does_not_fit():
    cost = programs.cost_of(large, chips.topology("v5e:2x2"), how="optimised")
    assert isinstance(cost, programs.TooLarge)
    assert cost.needed > 16 * 2**30
