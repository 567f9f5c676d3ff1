"""Strides and dilations of the backbones, by hand; test_references.py compares their outputs."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from semiseg_jax.models import deeplab, layers
from semiseg_jax.models.dsbn import DomainLayout
from tests.conftest import tiny_config
from tests.errors import raises_code


def backbone_convolutions(**model):
    """Returns (layer, stride, dilation) of every 3x3 of the backbone except the stem, in order."""
    changes = {f"model__{key}": value for key, value in model.items()}
    built = deeplab.build(tiny_config(model__norm="shared", **changes).model, 5)
    convolutions = []

    def watch(next_method, args, kwargs, context):
        module = context.module
        if isinstance(module, layers.Conv) and module.kernel_size == 3:
            layer = "/".join(name for name in module.path if name != "conv")
            convolutions.append((layer, module.stride, module.dilation))
        return next_method(*args, **kwargs)

    images = jnp.zeros((1, 65, 65, 3))
    with nn.intercept_methods(watch):
        jax.eval_shape(lambda: built.init(jax.random.key(0), images))
    return [
        (layer.removeprefix("backbone/"), stride, dilation)
        for layer, stride, dilation in convolutions
        if layer.startswith("backbone/") and "stem" not in layer
    ]


def dilations(prefix, **model):
    return [d for layer, _, d in backbone_convolutions(**model) if layer.startswith(prefix)]


@pytest.mark.parametrize(
    ("first", "stride", "expected"),
    [
        ("previous", 32, [(1, 1, 1), (2, 1, 1), (2, 1, 1), (2, 1, 1)]),
        ("previous", 16, [(1, 1, 1), (2, 1, 1), (2, 1, 1), (1, 1, 2)]),
        ("previous", 8, [(1, 1, 1), (2, 1, 1), (1, 1, 2), (1, 2, 4)]),
        ("stage", 16, [(1, 1, 1), (2, 1, 1), (2, 1, 1), (1, 2, 2)]),
        ("stage", 8, [(1, 1, 1), (2, 1, 1), (1, 2, 2), (1, 4, 4)]),
    ],
)
def test_dilation_replaces_stride(first, stride, expected):
    """(stride, dilation of the strided layer, dilation after it) of ResNet's four stages."""
    assert layers.dilated_stages((1, 2, 2, 2), 4, stride, first) == expected


def test_a_basic_block_is_dilated_after_the_convolution_that_lost_its_stride():
    result = dilations("stage4", backbone="resnet18", output_stride=16)
    assert result == [1, 2, 2, 2]
    result = dilations("stage4", backbone="resnet18", output_stride=16, first_dilation="stage")
    assert result == [2, 2, 2, 2]


def test_xception_at_stride_8():
    """Entry block 3 and exit block 1 lose their stride; the blocks after them are dilated."""
    model = {"backbone": "xception65", "output_stride": 8, "multi_grid": (1, 2, 4)}
    by_block = {}
    for layer, stride, dilation in backbone_convolutions(**model):
        by_block.setdefault(layer.split("/")[0], []).append((stride, dilation))
    assert by_block["entry_block2"] == [(1, 1), (1, 1), (2, 1)]
    assert by_block["entry_block3"] == [(1, 1)] * 3
    assert by_block["middle_block1"] == by_block["exit_block1"] == [(1, 2)] * 3
    assert by_block["exit_block2"] == [(1, 4), (1, 8), (1, 16)]


def test_multi_grid_multiplies_the_last_stages_dilation():
    """DeepLabV3, section 3.3: 2 * (1, 2, 4) at stride 16."""
    result = dilations("stage4", backbone="resnet50", output_stride=16, multi_grid=(1, 2, 4))
    assert result == [2, 4, 8]


@pytest.mark.parametrize(
    ("backbone", "grid", "code"),
    [
        ("resnet101", (1, 2), "multi-grid-length"),
        ("efficientnet_lite0", (1, 2, 4), "multi-grid-unsupported"),
    ],
)
def test_an_unsupported_multi_grid_is_a_user_error(backbone, grid, code):
    config = tiny_config(model__backbone=backbone, model__multi_grid=grid)
    with raises_code(code, "model.multi_grid", backbone):
        deeplab.build(config.model, 5)


@pytest.mark.parametrize(
    ("head", "stride", "rates"),
    [
        ("v3plus", 8, (12, 24, 36)),
        ("v3plus", 16, (6, 12, 18)),
        ("v2", 8, (6, 12, 18, 24)),
        ("v2", 16, (3, 6, 9, 12)),
    ],
)
def test_default_rates(head, stride, rates):
    changes = {"model__head": head, "model__output_stride": stride}
    assert deeplab.build(tiny_config(**changes, model__aspp_rates=()).model, 5).rates == rates
    assert deeplab.build(tiny_config(**changes).model, 5).rates == (1, 2)


def test_a_dilated_network_equals_the_strided_network_on_common_pixels():
    config = tiny_config(model__backbone="resnet18", model__norm="shared").model
    backbones = {}
    for stride in (16, 32):
        config.output_stride = stride
        backbones[stride] = deeplab.build(config, 5).backbone
    layout = DomainLayout("weak", train=False)
    images = jnp.asarray(np.random.default_rng(0).normal(size=(1, 97, 97, 3)), jnp.float32)
    shapes = jax.eval_shape(lambda: backbones[16].init(jax.random.key(0), images, layout))
    rng = np.random.default_rng(1)
    variables = jax.tree.map(
        lambda s: rng.uniform(-0.8, 1, s.shape) / np.sqrt(max(np.prod(s.shape[:-1]), 1)), shapes
    )
    variables["batch_stats_weak"] = jax.tree.map(np.abs, variables["batch_stats_weak"])

    def run(variables):
        return [backbones[stride].apply(variables, images, layout)["high"] for stride in (16, 32)]

    dilated, strided = jax.jit(run)(variables)
    assert dilated.shape[1:3] == (7, 7) and float(strided.std()) > 0.01
    np.testing.assert_allclose(dilated[:, ::2, ::2], strided, atol=1e-4 * np.abs(strided).max())
