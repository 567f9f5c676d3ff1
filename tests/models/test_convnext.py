"""ConvNeXt against timm's networks; make_vit_fixtures.py writes the expected values."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from semiseg_jax.models import deeplab, folding, pretrained
from semiseg_jax.models.dsbn import DomainLayout
from semiseg_jax.train_state import inference_variables, variable_shapes
from tests.conftest import tiny_config
from tests.errors import raises_code
from tests.models import reference_weights
from tests.models.test_pretrained import leaves, random_variables
from tests.models.test_references import fixture
from tests.models.test_vit import compare, reference_state, zeros


def build(backbone, **changes):
    return deeplab.build(tiny_config(model__backbone=backbone, **changes).model, 5)


def write(path, state):
    safetensors.numpy.save_file({k: np.ascontiguousarray(v) for k, v in state.items()}, path)
    return path


def check_features(name, stride, folder):
    fixture_name = f"timm{stride}_{name}"
    path = write(folder / "weights.safetensors", reference_state(fixture_name))
    model = build(name, model__output_stride=stride, model__pretrained=str(path))
    variables, report = pretrained.load(path, zeros(model))
    assert all(name.startswith("head.") for name in report.unused)
    backbone = {"params": variables["params"]["backbone"]}
    layout = DomainLayout("weak", train=False)
    run = jax.jit(lambda v, x: model.backbone.apply(v, x, layout))
    results = run(backbone, reference_weights.image(64, 96))
    for key in ("low", "high"):
        compare(fixture(fixture_name)["arrays"], f"64x96/{key}", results[key])


@pytest.mark.parametrize("stride", [8, 16])
def test_features_equal_timms(stride, tmp_path):
    check_features("tiny_convnext", stride, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "stride"), [("tiny_convnext", 32), *(("convnext_tiny", n) for n in (8, 16, 32))]
)
def test_features_equal_timms_at_full_width(name, stride, tmp_path):
    check_features(name, stride, tmp_path)


def test_parameter_count_of_convnext_tiny():
    """timm's has a norm and a classifier of 1000 classes as well."""
    shapes = variable_shapes(build("convnext_tiny"))["params"]["backbone"]
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert count + 2 * 768 + 1000 * 769 == fixture("timm16_convnext_tiny")["parameters"]


def original(state):
    """timm's tensors with the original names, which DINOv3's own files have too."""
    patterns = (
        (r"^stem\.", "downsample_layers.0."),
        (r"^stages\.(\d)\.downsample\.", r"downsample_layers.\1."),
        (r"^stages\.(\d)\.blocks\.", r"stages.\1."),
        (r"conv_dw", "dwconv"),
        (r"mlp\.fc", "pwconv"),
    )
    return rename(state, patterns) | {"norms.3.weight": np.ones(24, np.float32)}


def transformers(state):
    """timm's tensors with the names of DINOv3's networks in transformers."""
    patterns = (
        (r"^stem\.", "stages.0.downsample_layers."),
        (r"^stages\.(\d)\.downsample\.", r"stages.\1.downsample_layers."),
        (r"^stages\.(\d)\.blocks\.", r"stages.\1.layers."),
        (r"conv_dw", "depthwise_conv"),
        (r"(\d)\.norm\.", r"\1.layer_norm."),
        (r"mlp\.fc", "pointwise_conv"),
    )
    return rename(state, patterns) | {"layer_norm.weight": np.ones(24, np.float32)}


def rename(state, patterns):
    renamed = {}
    for name, tensor in state.items():
        for pattern, replacement in patterns:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed


def test_every_layout_gives_the_same_bits(tmp_path):
    state = reference_state("timm16_tiny_convnext")
    before = zeros(build("tiny_convnext"))
    loaded = {}
    for layout in (dict, original, transformers):
        path = write(tmp_path / f"{layout.__name__}.safetensors", layout(state))
        variables, report = pretrained.load(path, before)
        loaded[layout.__name__] = leaves(variables)
        assert len(report.loaded) == len([n for n in leaves(before) if "/backbone/" in n])
        assert pretrained.inspect(path).backbone == "tiny_convnext"
    for name, variables in loaded.items():
        for key, value in variables.items():
            np.testing.assert_array_equal(value, loaded["dict"][key], err_msg=f"{name} {key}")


def test_another_convnext_is_refused_by_name(tmp_path):
    state = reference_state("timm16_tiny_convnext")
    state["stages.2.blocks.2.gamma"] = np.ones(16, np.float32)
    path = write(tmp_path / "other.safetensors", state)
    with raises_code("weights-network-unsupported", "depths (1, 1, 3, 1)", "convnext_small"):
        pretrained.inspect(path)


def test_folding_keeps_the_layer_norms():
    """The head's batch norms become part of its convolutions, at sizes that are no multiples."""
    model = build("tiny_convnext")
    variables = inference_variables(random_variables(model, 0))
    folded, weights = folding.fold(model, variables)
    assert weights.keys() == {"params"}
    images = jnp.asarray(reference_weights.image(33, 50))
    both = jax.jit(lambda v, w: (model.apply(v, images), folded.apply(w, images)))
    logits, of_folded = both(variables, weights)
    assert logits.shape == (1, 33, 50, 5)
    np.testing.assert_allclose(of_folded, logits, atol=1e-4 * np.abs(logits).max())
