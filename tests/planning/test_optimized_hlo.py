"""Optimized HLO that is read before the compiler generates machine code."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest

from semiseg_jax import mesh as mesh_lib
from semiseg_jax.planning import chips, optimized_hlo, programs
from semiseg_jax.planning.chips import Topology

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu, the TPU's compiler, is not installed (pip install libtpu==0.0.42.1)",
)

# As XLA prints them for v5e; allocations with a color are on the chip.
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


def test_memory_from_the_buffer_assignment():
    arguments, temporaries = 9437184 + 4096, 32227840
    total = 512 + arguments + 20480 + temporaries
    assert optimized_hlo.OptimizedHlo("", BUFFERS).memory() == (total, arguments, temporaries)


def untraceable(topology):
    raise SystemExit(0)


def test_a_compiler_process_that_ends_without_a_result_raises():
    with pytest.raises(RuntimeError, match="compiles step ended without a result"):
        optimized_hlo.optimized_hlo(untraceable, Topology("cpu", (), 1, None), "step")


def products(side, topology):
    """Traces products of a matrix with itself on every chip; needs three matrices at a time."""
    replicated = mesh_lib.replicated(mesh_lib.make_mesh(topology.devices))

    def product(x):
        return jnp.sin(x @ x) @ x

    jitted = jax.jit(product, in_shardings=replicated, out_shardings=replicated)
    return jitted.trace(jax.ShapeDtypeStruct((side, side), jnp.bfloat16))


def small(topology):
    return products(1024, topology)


def large(topology):
    return products(2**16, topology)  # 8 GiB per matrix, of 16 GiB


@needs_libtpu
def test_optimized_hlo_for_v5e_costs_the_same_as_the_compiled_program():
    topology = chips.topology("v5e:2x2")
    optimized, compiled = (
        programs.program_cost(small, topology, level) for level in ("optimised", "compiled")
    )
    assert isinstance(optimized, programs.Cost) and isinstance(compiled, programs.Cost)
    assert optimized.total_traffic == compiled.total_traffic > 0
    assert optimized.main_traffic == compiled.main_traffic > 0
    assert optimized.convolved == compiled.convolved == {"bf16 × bf16": 2}
    assert optimized.memory.arguments == compiled.memory.arguments == 2 * 1024**2
    assert optimized.traffic is None and compiled.traffic is not None


@needs_libtpu
def test_optimized_hlo_for_v5e_that_does_not_fit():
    cost = programs.program_cost(large, chips.topology("v5e:2x2"), "optimised")
    assert isinstance(cost, programs.TooLarge)
    assert cost.needed > 16 * 2**30
