"""Folding the norm into the kernels preserves the logits; test_folding_slow has large networks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from configs import default
from semiseg_jax import train_state
from semiseg_jax.models import deeplab, folding


def network(backbone, head, **changes):
    config = default.get_config().model
    config.backbone, config.head = backbone, head
    config.head_features, config.low_level_features = 16, 8
    config.update_from_flattened_dict(changes)
    return deeplab.build(config, 5)


def random_variables(model):
    """Draws variables like those of a trained network: no norm is the identity."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        kind = path[-1]
        if kind == "kernel":
            fan = np.prod(leaf.shape[:3])
            return rng.normal(0, np.sqrt(2 / fan), leaf.shape).astype(np.float32)
        low, high = {"scale": (0.4, 1.4), "var": (0.5, 2.0)}.get(kind, (-0.5, 0.5))
        return rng.uniform(low, high, leaf.shape).astype(np.float32)

    shapes = train_state.inference_variables(train_state.variable_shapes(model))
    flat = traverse_util.flatten_dict(shapes)
    return traverse_util.unflatten_dict({path: draw(path, leaf) for path, leaf in flat.items()})


def check_parity(model):
    """Compares the logits of the folded and the original network, for images of an odd size."""
    variables = random_variables(model)
    folded, folded_variables = folding.fold(model, variables)
    images = np.random.default_rng(1).integers(0, 256, (2, 47, 33, 3)).astype(np.uint8)
    before = jax.jit(model.apply)(variables, images)
    after = jax.jit(folded.apply)(folded_variables, images)
    assert float(jnp.std(before)) > 0.01
    error = float(jnp.abs(before - after).max() / jnp.abs(before).max())
    assert error < 1e-5


@pytest.mark.parametrize(
    ("head", "norm"),
    [("v3plus", "dsbn"), ("v3plus_smp", "dsbn_shared_affine"), ("v2", "shared"), ("v2", "frozen")],
)
def test_folding_preserves_the_logits(head, norm):
    check_parity(network("tiny", head, norm=norm, output_stride=8))


def test_backbone_and_head_are_folded_with_their_own_epsilons():
    # Very different, so that an exchange changes the logits.
    changes = {"norm_epsilon.backbone": 0.5, "norm_epsilon.head": 1e-5}
    check_parity(network("tiny", "v3plus", **changes))


@pytest.mark.parametrize("backbone", ["resnet50c", "xception65", "efficientnet_lite0"])
def test_folded_networks_of_full_depth_have_no_norm(backbone):
    model = network(backbone, "v3plus")
    shapes = train_state.inference_variables(train_state.variable_shapes(model))
    zeros = jax.tree.map(lambda s: np.zeros(s.shape, np.float32), shapes)
    folded, variables = folding.fold(model, zeros)
    expected = jax.eval_shape(folded.init, jax.random.key(0), np.zeros((1, 33, 33, 3), np.uint8))
    assert jax.tree.map(np.shape, variables) == jax.tree.map(lambda s: s.shape, expected)
    assert set(variables) == {"params"}
    names = {path[-1] for path in traverse_util.flatten_dict(variables)}
    assert names == {"kernel", "bias"}
