"""How calls of compiled programs return, and batches that fill the devices."""

import os
import subprocess
import sys

import pytest

from semiseg_jax import mesh as mesh_lib

IN_ORDER = """
import sys
if sys.argv[1] == "one":
    from semiseg_jax import mesh
    mesh.compute_on_cpu()
import jax
import jax.numpy as jnp

step = jax.jit(lambda x: jax.lax.fori_loop(0, 200, lambda i, x: x @ x * 1e-3, x))
x = step(jnp.ones((300, 300))).block_until_ready()
print(all(step(x).is_ready() for _ in range(3)))
"""


@pytest.mark.parametrize(("mode", "ready"), [("one", "True"), ("ahead", "False")])
def test_a_step_is_done_when_its_call_returns(mode, ready):
    command = [sys.executable, "-c", IN_ORDER, mode]
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == ready


@pytest.mark.parametrize("images, filled", [(1, 8), (8, 8), (9, 16)])
def test_a_batch_that_fills_the_devices(images, filled):
    assert mesh_lib.batch_over(images, 8) == filled
