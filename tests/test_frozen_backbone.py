"""model.freeze_backbone and optim.layer_decay: what moves in a step, and by how much."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from semiseg_jax import config_check, optim
from semiseg_jax.models import deeplab
from semiseg_jax.train_state import variable_shapes
from tests.conftest import tiny_config
from tests.errors import raises_code
from tests.models.test_pretrained import leaves, random_variables


def vit_config(**changes):
    return tiny_config(
        **{"model__backbone": "tiny_dinov2", "model__head": "linear", "optim__poly_power": 0.0}
        | changes
    )


def constant(config, value):
    """Parameters of the network, all of one value."""
    shapes = variable_shapes(deeplab.build(config.model, 3))["params"]
    return jax.tree.map(lambda s: jnp.full(s.shape, value, s.dtype), shapes)


def test_each_layer_moves_by_its_own_rate():
    """Unit gradients, SGD; the first step and the thousandth, so that nothing builds up."""
    config = vit_config(optim__layer_decay=0.5, optim__momentum=0.0, optim__weight_decay=0.0)
    rates = config.optim.student
    tx, _ = optim.make_optimizer(config.optim, "student", 2000)
    gradients = constant(config, 1.0)
    params = jax.tree.map(jnp.zeros_like, gradients)
    state = tx.init(params)
    update = jax.jit(tx.update)
    for step in range(1, 1001):
        updates, state = update(gradients, state, params)
        if step not in (1, 1000):
            continue
        for name, moved in leaves(updates).items():
            module, layer, *_ = name.split("/")
            if module != "backbone":
                expected = rates.learning_rate * rates.head_multiplier
            elif layer == "norm":
                expected = rates.learning_rate
            elif layer.startswith("block_"):
                expected = rates.learning_rate * 0.5 ** (4 - int(layer.removeprefix("block_")))
            else:
                assert layer in ("cls_token", "pos_embed", "patch_embed")
                expected = rates.learning_rate * 0.5**5
            np.testing.assert_allclose(moved, -expected, rtol=1e-5, err_msg=name)


def test_layers_are_those_of_vision_transformers_alone():
    config = tiny_config(optim__layer_decay=0.75)
    with raises_code("layer-decay-unsupported", "optim.layer_decay is 0.75", "tiny"):
        config_check.check(config)
    config_check.check(vit_config(optim__layer_decay=0.75))


def test_tokens_and_layer_scale_are_of_the_backbone_and_not_decayed():
    names = leaves(constant(vit_config(model__backbone="tiny_dinov3"), 0.0))
    for leaf in ("cls_token", "storage_tokens", "block_0/scale1/gamma", "norm/scale"):
        assert f"backbone/{leaf}" in names
        assert optim.group_of(f"backbone/{leaf}") == ("backbone", False)
    assert optim.group_of("backbone/pos_embed") == ("backbone", False)
    assert optim.group_of("backbone/patch_embed/kernel") == ("backbone", True)


def test_a_frozen_backbone_keeps_its_bits_and_has_no_state():
    """20 steps of AdamW, which would decay and move everything."""
    config = vit_config(
        model__freeze_backbone=True,
        optim__kind="adamw",
        optim__weight_decay=0.1,
        optim__decay_all=True,
        optim__layer_decay=0.5,
    )
    model = deeplab.build(config.model, 3)
    images = np.random.default_rng(0).integers(0, 256, (2, 28, 28, 3), np.uint8)
    tx, _ = optim.make_optimizer(config.optim, "student", 100, freeze_backbone=True)

    @jax.jit
    def step(params, state):
        def loss(params):
            logits = model.apply({"params": params}, images, domain="weak", train=True)
            return jnp.mean(jnp.square(logits - 1))

        gradients = jax.grad(loss)(params)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, gradients

    before = random_variables(model, 0)["params"]
    params = before = jax.tree.map(lambda leaf: np.where(leaf < 0.2, -0.0, leaf), before)
    state = tx.init(params)
    assert not [name for name in leaves(state) if "backbone" in name]
    for _ in range(20):
        params, state, gradients = step(params, state)
    for name, leaf in leaves(params).items():
        is_frozen = name.startswith("backbone/")
        same = np.asarray(leaf).tobytes() == np.asarray(leaves(before)[name]).tobytes()
        assert same == is_frozen, name
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradients["backbone"]))
    assert "frozen" in optim.table(params, True, True)


def test_a_frozen_convolutional_backbone_keeps_its_statistics():
    """Two passes in training mode have the same features: those of evaluation."""
    model = deeplab.build(tiny_config(model__freeze_backbone=True).model, 3)
    variables = random_variables(model, 0)
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 40, 3), np.uint8)
    stats = [name for name in variables if name != "params"]

    @jax.jit
    def features(variables):
        trained, updated = model.apply(
            variables, images, train=True, mutable=stats, method="encode"
        )
        return trained.high, updated, model.apply(variables, images, method="encode").high

    trained, updated, evaluated = features(variables)
    np.testing.assert_array_equal(trained, evaluated)
    for name, leaf in leaves(updated).items():
        np.testing.assert_array_equal(leaf, leaves(variables)[name], err_msg=name)
