"""Networks whose norm is in their kernels compute what they did; test_folding_slow has the rest."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from configs import default
from semiseg_jax import state
from semiseg_jax.models import deeplab, folding


def network(backbone, head, **changes):
    config = default.get_config().model
    config.backbone, config.head = backbone, head
    config.head_features, config.low_level_features = 16, 8
    config.update_from_flattened_dict(changes)
    return deeplab.build(config, 5)


def random_variables(model):
    """As after training: kernels that keep activations, and a norm with a state of its own."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        kind = path[-1]
        if kind == "kernel":
            fan = np.prod(leaf.shape[:3])
            return rng.normal(0, np.sqrt(2 / fan), leaf.shape).astype(np.float32)
        low, high = {"scale": (0.4, 1.4), "var": (0.5, 2.0)}.get(kind, (-0.5, 0.5))
        return rng.uniform(low, high, leaf.shape).astype(np.float32)

    shapes = state.for_inference(state.variable_shapes(model))
    flat = traverse_util.flatten_dict(shapes)
    return traverse_util.unflatten_dict({path: draw(path, leaf) for path, leaf in flat.items()})


def check_parity(model):
    """Logits of the folded network against those of the whole, of images of an odd size."""
    variables = random_variables(model)
    folded, fewer = folding.fold(model, variables)
    images = np.random.default_rng(1).integers(0, 256, (2, 47, 33, 3)).astype(np.uint8)
    before = jax.jit(model.apply)(variables, images)
    after = jax.jit(folded.apply)(fewer, images)
    assert float(jnp.std(before)) > 0.01
    error = float(jnp.abs(before - after).max() / jnp.abs(before).max())
    assert error < 1e-5


@pytest.mark.parametrize(
    ("head", "norm"),
    [("v3plus", "dsbn"), ("v3plus_smp", "dsbn_shared_affine"), ("v2", "shared"), ("v2", "frozen")],
)
def test_logits_stay(head, norm):
    check_parity(network("tiny", head, norm=norm, output_stride=8))


def test_logits_stay_where_backbone_and_head_have_epsilons_of_their_own():
    # Far from each other, so that one in the other's place would be seen.
    changes = {"norm_epsilon.backbone": 0.5, "norm_epsilon.head": 1e-5}
    check_parity(network("tiny", "v3plus", **changes))


@pytest.mark.parametrize("backbone", ["resnet50c", "xception65", "efficientnet_lite0"])
def test_no_norm_is_left_in_networks_of_full_depth(backbone):
    model = network(backbone, "v3plus")
    shapes = state.for_inference(state.variable_shapes(model))
    zeros = jax.tree.map(lambda s: np.zeros(s.shape, np.float32), shapes)
    folded, fewer = folding.fold(model, zeros)
    wanted = jax.eval_shape(folded.init, jax.random.key(0), np.zeros((1, 33, 33, 3), np.uint8))
    assert jax.tree.map(np.shape, fewer) == jax.tree.map(lambda s: s.shape, wanted)
    assert set(fewer) == {"params"}
    names = {path[-1] for path in traverse_util.flatten_dict(fewer)}
    assert names == {"kernel", "bias"}
