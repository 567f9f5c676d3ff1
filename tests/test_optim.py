import jax
import jax.numpy as jnp
import numpy as np
import pytest

from semiseg_jax import optim
from semiseg_jax.models import deeplab
from tests.conftest import tiny_config


def test_poly_by_hand():
    schedule = optim.poly(0.1, 100, 0.9)
    np.testing.assert_allclose(
        [schedule(s) for s in (0, 25, 99, 100)],
        [0.1, 0.1 * 0.75**0.9, 0.1 * 0.01**0.9, 0],
        rtol=1e-5,
    )


def test_every_parameter_of_a_network_has_a_rule():
    model = deeplab.build(tiny_config().model, 5)
    made = jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.zeros((2, 33, 33, 3)), domain="both")
    )
    lines = optim.table(made["params"]).splitlines()
    assert [line.split()[0] for line in lines] == ["backbone", "backbone", "head", "head"]


def test_a_parameter_without_a_rule_is_named():
    with pytest.raises(ValueError, match="head/odd_one"):
        optim.table({"head": {"odd_one": jnp.zeros(3)}})


def test_updates_are_torchs_sgd_with_decay_on_kernels_and_a_faster_head():
    """By hand: v <- .9 v + (g + decay * p); p <- p - rate * v."""
    config = tiny_config(
        optim__weight_decay=0.1, optim__student={"learning_rate": 0.5, "head_multiplier": 4.0}
    ).optim
    tx, _ = optim.make_optimizer(config, "student", 10)
    params = {
        "backbone": {"conv": {"kernel": jnp.array(2.0)}, "norm": {"scale": jnp.array(2.0)}},
        "classifier": {"kernel": jnp.array(2.0), "bias": jnp.array(2.0)},
    }
    state = tx.init(params)
    gradients = jax.tree.map(jnp.ones_like, params)
    first, state = tx.update(gradients, state, params)
    rate = 0.5
    np.testing.assert_allclose(first["backbone"]["conv"]["kernel"], -rate * 1.2, rtol=1e-6)
    np.testing.assert_allclose(first["backbone"]["norm"]["scale"], -rate * 1.0, rtol=1e-6)
    np.testing.assert_allclose(first["classifier"]["kernel"], -4 * rate * 1.2, rtol=1e-6)
    np.testing.assert_allclose(first["classifier"]["bias"], -4 * rate * 1.0, rtol=1e-6)
    second, _ = tx.update(gradients, state, params)
    rate = 0.5 * 0.9**0.9
    np.testing.assert_allclose(
        second["backbone"]["conv"]["kernel"], -rate * (0.9 * 1.2 + 1.2), rtol=1e-5
    )


def test_teacher_and_student_have_their_own_rates():
    config = tiny_config().optim
    rates = {
        s: float(optim.make_optimizer(config, s, 10)[1](0))
        for s in ("teacher", "student", "control")
    }
    np.testing.assert_allclose(
        [rates["teacher"], rates["student"], rates["control"]], [0.01, 0.002, 0.002]
    )


def test_rates_follow_the_batch_only_when_asked():
    config = tiny_config(train__batch_labeled=32)
    assert optim.rate_factor(config) == 1
    config.optim.reference_batch = 16
    assert optim.rate_factor(config) == 2
    schedule = optim.make_optimizer(config.optim, "teacher", 10, 2.0)[1]
    np.testing.assert_allclose(float(schedule(0)), 0.02, rtol=1e-6)
