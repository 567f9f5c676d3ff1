"""Synchronous calls on the CPU, and batch sizes rounded up to the devices."""

import os
import subprocess
import sys

import pytest

from semiseg_jax import mesh as mesh_lib

TIMED_STEPS = """
import sys
if sys.argv[1] == "synchronous":
    from semiseg_jax.runtime import xla
    xla.force_cpu()
import jax
import jax.numpy as jnp

step = jax.jit(lambda x: jax.lax.fori_loop(0, 200, lambda i, x: x @ x * 1e-3, x))
x = step(jnp.ones((300, 300))).block_until_ready()
print(all(step(x).is_ready() for _ in range(3)))
"""


@pytest.mark.parametrize(("mode", "ready"), [("synchronous", "True"), ("default", "False")])
def test_a_call_on_the_cpu_returns_when_its_results_are_computed(mode, ready):
    command = [sys.executable, "-c", TIMED_STEPS, mode]
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    process = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    assert process.stdout.strip() == ready


@pytest.mark.parametrize(("images", "rounded"), [(1, 8), (8, 8), (9, 16)])
def test_a_batch_is_rounded_up_to_the_devices(images, rounded):
    assert mesh_lib.round_up_batch(images, 8) == rounded
