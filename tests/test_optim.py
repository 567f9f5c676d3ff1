import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

from semiseg_jax import mesh as mesh_lib
from semiseg_jax import optim, train_state
from semiseg_jax.models import deeplab
from tests import torch_optimizers
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


def compared_parameters(kind, decay_all, dtype):
    """As `torch_optimizers.fixture` has them, from our optimiser of that kind."""
    config = tiny_config(
        optim__kind=kind,
        optim__decay_all=decay_all,
        optim__weight_decay=torch_optimizers.DECAY,
        optim__momentum=torch_optimizers.MOMENTUM,
        optim__betas=torch_optimizers.BETAS,
        optim__epsilon=torch_optimizers.EPSILON,
        optim__poly_power=torch_optimizers.POWER,
        optim__student={
            "learning_rate": torch_optimizers.RATE,
            "head_multiplier": torch_optimizers.HEAD_MULTIPLIER,
        },
    ).optim
    tx, _ = optim.make_optimizer(config, "student", torch_optimizers.STEPS)

    def tree(flat):
        arrays = {path: jnp.asarray(value, dtype) for path, value in flat.items()}
        return traverse_util.unflatten_dict(arrays, sep="/")

    @jax.jit
    def step(gradients, state, params):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    params = tree(torch_optimizers.parameters())
    state, after = tx.init(params), []
    for number in range(torch_optimizers.STEPS):
        params, state = step(tree(torch_optimizers.gradients(number)), state, params)
        if number + 1 in torch_optimizers.COMPARED:
            flat = traverse_util.flatten_dict(params, sep="/")
            after.append(np.concatenate([flat[path].ravel() for path in torch_optimizers.SHAPES]))
    return after


@pytest.mark.parametrize("name", torch_optimizers.CASES)
def test_parameters_are_those_of_torch_in_20_steps(name):
    """With decayed and other groups, and a faster head."""
    expected = torch_optimizers.fixture()[name]
    kind, decay_all = torch_optimizers.CASES[name]
    # The learning rate is float32, whatever the parameters are.
    for dtype, rtol, atol in ((jnp.float64, 1e-7, 1e-7), (jnp.float32, 1e-6, 1e-6)):
        with jax.enable_x64(dtype == jnp.float64):
            after = compared_parameters(kind, decay_all, dtype)
        np.testing.assert_allclose(after, expected, rtol, atol)


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.999, 0.999999])
def test_the_first_update_of_adam_has_the_size_of_the_rate(beta):
    tx = optim.scale_by_adam((beta, beta), 1e-30)
    gradients = {"kernel": jnp.array([3.0, -1e-5, 0.0])}
    updates, state = tx.update(gradients, tx.init(gradients))
    np.testing.assert_allclose(updates["kernel"], [1, -1, 0], rtol=1e-6)
    assert state.count == 1


def test_every_group_is_decayed_with_decay_all():
    params = {"backbone": {"norm": {"scale": jnp.array(2.0)}}, "head": {"bias": jnp.array(3.0)}}
    tx = optim.decay_weights(0.1, decay_all=True)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    np.testing.assert_allclose(jax.tree.leaves(updates), [0.2, 0.3], rtol=1e-6)
    for line in optim.table(params, decay_all=True).splitlines():
        assert "not decayed" not in line


@pytest.mark.parametrize(("kind", "copies"), [("sgd", 1), ("adam", 2), ("adamw", 2)])
def test_the_state_is_float32_whatever_the_network_computes_in(kind, copies):
    """The state that checkpoints store and that `plan` counts: one or two copies of parameters."""
    config = tiny_config(optim__kind=kind, model__compute_dtype="bfloat16")
    shapes = train_state.variable_shapes(deeplab.build(config.model, 3))
    tx, _ = optim.make_optimizer(config.optim, "student", 10)
    mesh = mesh_lib.make_mesh(jax.devices()[:1])
    create = functools.partial(train_state.create_train_state, tx=tx, mesh=mesh)
    state = jax.eval_shape(create, shapes).opt_state
    leaves = [leaf for leaf in jax.tree.leaves(state) if leaf.shape]
    assert {leaf.dtype for leaf in leaves} == {np.dtype("float32")}
    sizes = [
        sum(leaf.size for leaf in part) for part in (leaves, jax.tree.leaves(shapes["params"]))
    ]
    assert sizes[0] == copies * sizes[1]


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


PATHS = {
    "sgd": ["[1].trace", "[3].count"],
    "adam": ["[1].count", "[1].mu", "[1].nu", "[3].count"],
    "adamw": ["[0].count", "[0].mu", "[0].nu", "[3].count"],
}


@pytest.mark.parametrize("kind", optim.OPTIMIZERS)
def test_paths_of_the_state_are_those_in_checkpoints(kind):
    """Checkpoints are restored by these paths: a change makes old checkpoints unreadable."""
    tx, _ = optim.make_optimizer(tiny_config(optim__kind=kind).optim, "student", 10)
    state = tx.init({"backbone": {"kernel": jnp.zeros(2)}, "classifier": {"bias": jnp.zeros(3)}})
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)]
    leaves = ("['backbone']['kernel']", "['classifier']['bias']")
    assert paths == [
        path + leaf
        for path in PATHS[kind]
        for leaf in (leaves if not path.endswith("count") else ("",))
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
