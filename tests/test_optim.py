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
    variables = jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.zeros((2, 33, 33, 3)), domain="both")
    )
    lines = optim.table(variables["params"]).splitlines()
    assert [line.split()[0] for line in lines] == ["backbone", "backbone", "head", "head"]


def test_a_parameter_without_a_rule_is_named():
    with pytest.raises(ValueError, match="head/odd_one"):
        optim.table({"head": {"odd_one": jnp.zeros(3)}})


def test_updates_equal_torchs_sgd_with_decay_on_kernels_and_a_faster_head():
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


def test_rates_scale_with_the_batch_only_with_a_reference_batch():
    config = tiny_config(train__batch_labeled=32)
    assert optim.rate_factor(config) == 1
    config.optim.reference_batch = 16
    assert optim.rate_factor(config) == 2
    schedule = optim.make_optimizer(config.optim, "teacher", 10, 2.0)[1]
    np.testing.assert_allclose(float(schedule(0)), 0.02, rtol=1e-6)


def test_paths_of_the_state_are_those_in_checkpoints():
    """Checkpoints are restored by these paths: a change makes old checkpoints unreadable."""
    tx, _ = optim.make_optimizer(tiny_config().optim, "student", 10)
    state = tx.init({"backbone": {"kernel": jnp.zeros(2)}, "classifier": {"bias": jnp.zeros(3)}})
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)]
    assert paths == [
        "[1].trace['backbone']['kernel']",
        "[1].trace['classifier']['bias']",
        "[3].count",
    ]


def test_another_network_has_rules_and_factors_of_its_own():
    rules = ((r".*kernel$", "discriminator", True), (r".*bias$", "offsets", False))
    config = tiny_config(optim__weight_decay=0.1).optim
    tx = optim.sgd(config, optim.poly(0.5, 10, 0.9), {"discriminator": 2.0, "offsets": 3.0}, rules)
    params = {"kernel": jnp.array(2.0), "bias": jnp.array(2.0)}
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -0.5 * 2 * 1.2, rtol=1e-6)
    np.testing.assert_allclose(updates["bias"], -0.5 * 3 * 1.0, rtol=1e-6)
    assert optim.group_of("first/kernel", rules) == ("discriminator", True)


def test_a_group_without_a_factor_is_named():
    with pytest.raises(ValueError, match=r"groups head have no factor .* factors for backbone"):
        optim.scale_by_group({"backbone": 1.0})
