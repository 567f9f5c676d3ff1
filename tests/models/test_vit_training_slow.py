"""Training steps of the smallest vision transformer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.test_train_step import run_steps

pytestmark = pytest.mark.slow

# Images of 32x40 are resized to 2x3 patches and their logits back.
NETWORK = {
    "model__backbone": "tiny_dinov2",
    "model__head": "dpt",
    "optim__kind": "adamw",
    "optim__teacher__learning_rate": 1e-3,
}


def test_bfloat16_follows_float32_within_2_percent_of_the_loss():
    """20 steps on one batch, in which the loss moves by more than that."""
    plain, _ = run_steps(1, 20, jnp.float32, batches=1, **NETWORK)
    half, state = run_steps(
        1, 20, jnp.float32, batches=1, model__compute_dtype="bfloat16", **NETWORK
    )
    assert np.ptp(plain) > 0.05 * plain[0]
    assert not np.array_equal(half, plain)
    np.testing.assert_allclose(half, plain, rtol=0.02)
    kept = {leaf.dtype for leaf in jax.tree.leaves((state.params, state.opt_state))}
    assert kept <= {np.dtype("float32"), np.dtype("int32")}


def test_one_device_is_eight_devices_in_float64():
    changes = NETWORK | {"model__head": "linear"}
    with jax.enable_x64(True):
        one, _ = run_steps(1, 10, jnp.float64, **changes)
        eight, _ = run_steps(8, 10, jnp.float64, **changes)
    assert np.ptp(one) > 0.01
    np.testing.assert_allclose(eight, one, rtol=1e-9)
