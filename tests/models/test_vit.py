"""Vision transformers with loaded weights against timm's networks and PyTorch's DPT head.

make_vit_fixtures.py writes the expected values; test_references.py has the other networks and says
how values are compared.
"""

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from semiseg_jax.models import deeplab, positions, pretrained, vit, vit_segmenter
from semiseg_jax.models.dsbn import DomainLayout
from semiseg_jax.train_state import variable_shapes
from tests.conftest import tiny_config
from tests.errors import raises_code
from tests.models import reference_weights
from tests.models.test_pretrained import random_variables
from tests.models.test_references import BOUND, fixture

LAYOUT = DomainLayout("weak", train=False)
CLASSES = 5


def reference_state(name):
    """Returns the weights of a reference in its layout."""
    shapes = fixture(name)["shapes"]
    return {k: reference_weights.drawn(k, tuple(v)) for k, v in shapes.items()}


def build(backbone, **changes):
    config = tiny_config(model__backbone=backbone, **{"model__head": "dpt"} | changes)
    return deeplab.build(config.model, CLASSES)


def zeros(model):
    return jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), variable_shapes(model))


def load(state, folder, backbone, **changes):
    """Writes weights, builds the network and loads them: (model, variables, report)."""
    path = folder / "weights.safetensors"
    safetensors.numpy.save_file({k: np.ascontiguousarray(v) for k, v in state.items()}, path)
    model = build(backbone, model__pretrained=str(path), **changes)
    return model, *pretrained.load(path, zeros(model))


def block_outputs(model, variables, images):
    """Returns the result of every block of a backbone, [b, tokens, width] each."""

    def run(params, x):
        _, kept = model.backbone.apply(
            {"params": params},
            x,
            LAYOUT,
            capture_intermediates=lambda module, _: isinstance(module, vit.Block),
        )
        return kept["intermediates"]

    kept = jax.jit(run)(variables["params"]["backbone"], images)
    return {name: value["__call__"][0] for name, value in kept.items()}


def compare(expected, key, result):
    result = np.asarray(result)
    assert result.shape == tuple(expected[f"{key}/shape"]), key
    error = np.abs(reference_weights.sampled(result) - expected[key]).max()
    assert error <= BOUND * expected[f"{key}/max"], key


def check_blocks(name, size, rule, folder):
    model, variables, report = load(
        reference_state(name), folder, name.partition("_")[2], model__position_rule=rule
    )
    assert report.unused == ()
    expected = fixture(name)["arrays"]
    results = block_outputs(model, variables, reference_weights.image(*size))
    prefix = f"{size[0]}x{size[1]}/{rule}/"
    keys = [k for k in expected if k.startswith(prefix) and k.endswith("/shape")]
    assert len(keys) == len(results) > 0
    for block, result in results.items():
        compare(expected, prefix + block, result)


BLOCKS = [
    ("tiny_dinov2", (98, 98), "original"),
    ("tiny_dinov2", (112, 70), "original"),
    ("tiny_dinov2", (112, 70), "timm"),
    # Not square, so that rows are not columns.
    ("tiny_dinov3", (128, 80), "timm"),
    ("tiny_dinov3", (256, 384), "timm"),
]
BLOCKS_SLOW = [
    ("tiny_dinov2", (98, 98), "timm"),
    ("dinov2_vits14", (98, 98), "original"),
    ("dinov2_vits14", (112, 70), "timm"),
    ("tiny_dinov3", (96, 96), "timm"),
    ("dinov3_vits16", (96, 96), "timm"),
    ("dinov3_vits16", (128, 80), "timm"),
]


@pytest.mark.parametrize(("name", "size", "rule"), BLOCKS)
def test_every_block_equals_timms(name, size, rule, tmp_path):
    check_blocks(f"timm_{name}", size, rule, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size", "rule"), BLOCKS_SLOW)
def test_every_block_equals_timms_at_full_width(name, size, rule, tmp_path):
    check_blocks(f"timm_{name}", size, rule, tmp_path)


def check_logits(name, size, folder):
    """Compares both heads, at sizes that are multiples of the patch or not."""
    state = reference_state(name)
    model, variables, report = load(state, folder, name.partition("_")[2])
    assert report.initial == () and all("refinenet4.resConfUnit1" in n for n in report.unused)
    images = reference_weights.image(*size)
    expected = fixture(name)["arrays"]
    prefix = f"{size[0]}x{size[1]}/"
    compare(expected, f"{prefix}dpt", jax.jit(model.apply)(variables, images))
    if size[0] % 14:
        return  # The reference of the linear head has logits at the size of the features.
    linear = build(name.partition("_")[2], model__head="linear")
    shape = CLASSES, variables["params"]["backbone"]["norm"]["scale"].size, 1, 1
    classifier = {
        "kernel": reference_weights.drawn("classifier.weight", shape).transpose(2, 3, 1, 0),
        "bias": reference_weights.drawn("classifier.bias", (CLASSES,)),
    }
    params = {"backbone": variables["params"]["backbone"], "classifier": classifier}
    # Resized to the size of the features: the logits before they are enlarged.
    features = jax.jit(lambda p: linear.apply({"params": p}, images, method="encode"))(params)
    grid = features.replace(size=features.high.shape[1:3])
    small = linear.clone(patch=1).apply({"params": params}, grid, method="decode")
    compare(expected, f"{prefix}linear", small)


@pytest.mark.parametrize("size", [(98, 98), (100, 75)])
def test_the_heads_equal_those_of_the_reference(size, tmp_path):
    check_logits("unimatch_tiny_dinov2", size, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("size", [(98, 98), (112, 70)])
def test_the_heads_equal_those_of_the_reference_at_full_width(size, tmp_path):
    check_logits("unimatch_dinov2_vits14", size, tmp_path)


def test_parameter_counts_equal_the_references():
    """timm's DINOv2 lacks the mask token, as ours; the DPT has a unit that it never uses."""
    for name, backbone in (
        ("timm_dinov2_vits14", "dinov2_vits14"),
        ("timm_tiny_dinov2", "tiny_dinov2"),
    ):
        shapes = variable_shapes(build(backbone))
        count = sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]["backbone"]))
        assert count == fixture(name)["parameters"]
    unused = 2 * (64 * 64 * 9 + 64)
    count = sum(leaf.size for leaf in jax.tree.leaves(variable_shapes(build("dinov2_vits14"))))
    assert count == fixture("unimatch_dinov2_vits14")["parameters"] - unused


def test_parameter_counts_of_dinov3():
    """timm leaves out the biases of queries and values, which are 0, as we the keys'."""
    shapes = variable_shapes(build("tiny_dinov3"))["params"]["backbone"]
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert count - 4 * 2 * 32 == fixture("timm_tiny_dinov3")["parameters"]
    assert shapes["storage_tokens"].shape == (1, 4, 32)


def test_bfloat16_agrees_at_the_last_of_57x57_tokens_as_at_the_first(tmp_path):
    """Angles in bfloat16 would displace the last rows and columns."""
    state = reference_state("timm_tiny_dinov3")
    images = reference_weights.image(57 * 16, 57 * 16)
    results = []
    for dtype in ("float32", "bfloat16"):
        model, variables, _ = load(state, tmp_path, "tiny_dinov3", model__compute_dtype=dtype)
        encode = jax.jit(lambda v, x, m=model: m.apply(v, x, method="encode").high)
        results.append(np.asarray(encode(variables, images), np.float32)[0])
    error = np.abs(results[1] - results[0]).mean(axis=-1)
    assert error.shape == (57, 57) and error[:8, :8].mean() > 0
    assert error[-8:, -8:].mean() < 1.5 * error[:8, :8].mean()
    assert error.max() < 0.1 * np.abs(results[0]).max()


@pytest.mark.parametrize("rule", positions.POSITION_RULES)
@pytest.mark.parametrize("grid", [(37, 37), (37, 38), (39, 43), (7, 7), (8, 5)])
def test_positions_equal_pytorchs(rule, grid):
    """The grids of 518x518, 518x532, 546x602, 98x98 and 112x70 pixels."""
    embedding = jnp.asarray(reference_weights.drawn("pos_embed", (1, 37 * 37, 3))[0])
    result = positions.interpolate(embedding, grid, rule).reshape(-1, 3)
    expected = fixture("positions")["arrays"][f"{rule}/{grid[0]}x{grid[1]}"]
    # PyTorch multiplies the factors in float32.
    np.testing.assert_allclose(reference_weights.sampled(result), expected, atol=2e-4)
    if grid == (37, 37):
        np.testing.assert_array_equal(result, embedding)


def test_the_position_rules_differ_away_from_the_own_size():
    matrices = [positions.bicubic_matrix(37, 7, rule) for rule in positions.POSITION_RULES]
    assert np.abs(matrices[0] - matrices[1]).max() > 0.1
    for matrix in matrices:
        np.testing.assert_allclose(matrix.sum(axis=1), 1, atol=1e-12)


@pytest.mark.parametrize(
    ("side", "expected"), [(1, 14), (20, 14), (21, 28), (518, 518), (519, 518), (525, 532)]
)
def test_sides_become_the_nearest_multiple_of_the_patch(side, expected):
    assert vit_segmenter.nearest_multiple(side, 14) == expected


def test_the_last_columns_of_any_image_are_seen():
    """Of 519x700 pixels, cut to patches, the last row would be lost; at 56x72, two columns."""
    model = build("tiny_dinov2", model__head="linear")
    variables = random_variables(model, 0)
    image = np.full((1, 57, 72, 3), 100, np.uint8)
    with_object = image.copy()
    with_object[:, 20:30, -2:] = 255
    run = jax.jit(model.apply)
    difference = np.abs(run(variables, with_object) - run(variables, image)).max(axis=(0, 3))
    assert difference.shape == (57, 72)
    # The features of the patch that shows the object change most.
    row, column = np.unravel_index(difference.argmax(), difference.shape)
    assert 14 <= row < 43 and column >= 56


@pytest.mark.parametrize("backbone", ["tiny_dinov2", "tiny_dinov3"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_padded_tokens_change_nothing_whatever_they_hold(backbone, dtype, monkeypatch):
    """0, 1 and 127 of them: 21 or 25 tokens, and multiples of 1, of one more, of all and 127."""
    changes = {"model__head": "linear", "model__compute_dtype": dtype}
    model = build(backbone, **changes)
    variables = random_variables(model, 0)
    patch = vit.SPECS[backbone].patch
    image = np.random.default_rng(0).integers(0, 256, (2, 4 * patch, 5 * patch, 3), np.uint8)
    expected = np.asarray(model.apply(variables, image), np.float32)
    pads = []

    def pad(self, x, count):
        pads.append(count)
        return jnp.pad(x, ((0, 0), (0, count), (0, 0)), constant_values=1e4)

    monkeypatch.setattr(vit.VisionTransformer, "_pad", pad)
    tokens = 4 * 5 + 1 + vit.SPECS[backbone].storage
    for multiple in (1, tokens, tokens + 1, tokens + 127):
        padded = build(backbone, model__token_multiple=multiple, **changes)
        found = np.asarray(padded.apply(variables, image), np.float32)
        # Sums over more keys may be in another order; those of bfloat16 are float32.
        bound = {"float32": 1e-5, "bfloat16": 1e-2}[dtype] * np.abs(expected).max()
        np.testing.assert_allclose(found, expected, rtol=0, atol=bound)
    assert pads == [0, 0, 1, 127]


def test_no_gradient_comes_through_padded_tokens():
    images = np.random.default_rng(0).integers(0, 256, (1, 28, 42, 3), np.uint8)
    plain = build("tiny_dinov3", model__head="linear")
    variables = random_variables(plain, 0)
    one, other = (
        jax.grad(lambda v, m=model: jnp.square(m.apply(v, images)).mean())(variables)["params"]
        for model in (plain, build("tiny_dinov3", model__head="linear", model__token_multiple=16))
    )
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-5 * max(np.abs(a).max(), 1e-3))


@pytest.mark.parametrize("token_multiple", [1, 16])
def test_an_export_predicts_images_of_any_size(token_multiple):
    """Positions are then interpolated inside the program."""
    model = build("tiny_dinov2", model__head="linear", model__token_multiple=token_multiple)
    variables = random_variables(model, 0)
    program = jax.jit(lambda images: model.apply(variables, images))
    shape = jax.export.symbolic_shape("n, h, w, 3")
    exported = jax.export.export(program)(jax.ShapeDtypeStruct(shape, jnp.uint8))
    images = np.random.default_rng(0).integers(0, 256, (1, 57, 72, 3), np.uint8)
    expected = program(images)
    bound = 1e-4 * np.abs(expected).max()
    np.testing.assert_allclose(exported.call(images), expected, atol=bound)


def test_a_head_of_another_kind_of_backbone_is_refused():
    for backbone, head in (("tiny_dinov2", "v3plus"), ("tiny", "dpt")):
        config = tiny_config(model__backbone=backbone, model__head=head)
        with raises_code("head-of-another-backbone", f"model.head is {head}", backbone):
            deeplab.build(config.model, 5)
