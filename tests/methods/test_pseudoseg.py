"""The building blocks of PseudoSeg, beside the authors' results (fixtures/pseudoseg.json)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from semiseg_jax.methods import (
    consistency,
    fusion,
    grad_cam,
    image_classifier,
    image_cutout,
    masks,
    self_attention,
)
from semiseg_jax.methods.image_keys import image_keys
from semiseg_jax.models import dsbn
from tests.methods import arrays
from tests.methods.published import fixture

PUBLISHED = fixture("pseudoseg")
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
LAST = jnp.asarray(arrays.LAST, jnp.float32)
LEVELS = [LAST, jnp.asarray(arrays.MIDDLE, jnp.float32)]
VALID = jnp.asarray(arrays.PADDED)
KERNEL = jnp.asarray(arrays.CLASSIFIER_KERNEL, jnp.float32)
PRESENT = jnp.asarray(arrays.PRESENT)
TRAINING = dsbn.DomainLayout("weak", train=True)
INFERENCE = dsbn.DomainLayout("weak", train=False)
NORM = functools.partial(dsbn.DomainNorm, kind="shared", momentum=0.999, epsilon=1e-3)
ATTENTION = self_attention.SelfAttention(4, NORM)


def classify(features):
    return jnp.mean(features, axis=(1, 2)) @ KERNEL


def attention_variables():
    kernels = {
        "query": arrays.QUERY_KERNEL,
        "key": arrays.KEY_KERNEL,
        "conv": arrays.CONV_KERNEL,
    }
    params = {
        name: {"kernel": jnp.asarray(kernel[None, None], jnp.float32)}
        for name, kernel in kernels.items()
    }
    norm = {"weak": {"scale": jnp.ones(4), "bias": jnp.zeros(4)}}
    stats = {"norm": {"mean": jnp.zeros(4), "var": jnp.ones(4)}}
    return {"params": params | {"norm": norm}, "batch_stats_weak": stats}


@functools.partial(jax.jit, static_argnames="layout")
def refine(variables, levels, scores, valid=None, layout=TRAINING):
    return ATTENTION.apply(variables, levels, scores, layout, valid, mutable=["batch_stats_weak"])[
        0
    ]


def published_scores():
    """The class maps without the background's."""
    return jnp.asarray(np.asarray(PUBLISHED["maps"])[..., 1:], jnp.float32)


def test_class_maps_agree_with_the_published_ones():
    maps = jax.jit(functools.partial(grad_cam.grad_cam, classify))(LAST, PRESENT)
    np.testing.assert_allclose(maps, published_scores(), **CLOSE)
    np.testing.assert_array_equal(np.asarray(maps)[0, ..., 1], 0)


def test_class_maps_follow_the_gradients_of_each_image():
    """A classifier that is not linear: its gradients differ by image and position."""
    present = jnp.ones((2, 3), bool)
    maps = jax.jit(lambda x: grad_cam.grad_cam(lambda x: classify(x**3), x, present))(LAST)
    for image in range(2):
        weights = 3 * np.mean(arrays.LAST[image] ** 2, axis=(0, 1))[:, None]
        expected = np.maximum(arrays.LAST[image] @ (weights * arrays.CLASSIFIER_KERNEL) / 12, 0)
        expected /= np.maximum(expected.max(axis=(0, 1)), 1e-5)
        np.testing.assert_allclose(maps[image], expected, **CLOSE)


def test_attention_agrees_with_the_published_one():
    logits = refine(attention_variables(), LEVELS, published_scores())
    np.testing.assert_allclose(logits, PUBLISHED["refined"], rtol=1e-4, atol=1e-4)


def test_attention_ignores_padding_as_the_published_one():
    # The published maps hold values at padding too, which ours set to 0 before.
    cut = jnp.where(VALID[..., None], published_scores(), 0)
    logits = refine(attention_variables(), LEVELS, cut, VALID, layout=INFERENCE)
    valid = np.asarray(VALID)
    np.testing.assert_allclose(
        np.asarray(logits)[1], np.asarray(PUBLISHED["refined_with_padding"])[1], **CLOSE
    )
    np.testing.assert_allclose(
        np.asarray(logits)[valid], np.asarray(PUBLISHED["refined_with_padding"])[valid], **CLOSE
    )


def test_repainted_padding_changes_nothing():
    classifier = {"classifier": {"kernel": KERNEL[None, None], "bias": jnp.zeros(3)}}
    variables = attention_variables()

    def compute(last):
        def classify_valid(x):
            model = image_classifier.ImageClassifier(3)
            return model.apply({"params": classifier}, x, INFERENCE, VALID)

        maps = grad_cam.grad_cam(classify_valid, last, PRESENT, VALID)
        return maps, refine(variables, [last, LEVELS[1]], maps, VALID)

    compute = jax.jit(compute)
    maps, logits = compute(LAST)
    repainted_maps, repainted = compute(LAST.at[0, 3].set(50.0).at[0, :, 2].set(-50.0))
    np.testing.assert_array_equal(maps, repainted_maps)
    np.testing.assert_allclose(logits[VALID], repainted[VALID], rtol=1e-4, atol=1e-5)


def test_the_attention_branch_trains_itself_alone():
    def loss(variables, levels, last):
        scores = grad_cam.grad_cam(classify, last, PRESENT)
        return jnp.sum(refine(variables, levels, scores) ** 3)

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(attention_variables(), LEVELS, LAST)
    to_params, to_levels, to_last = gradients
    for leaf in jax.tree.leaves((to_levels, to_last)):
        np.testing.assert_array_equal(leaf, 0)
    for name in ("query", "key", "conv"):
        assert np.abs(to_params["params"][name]["kernel"]).max() > 0, name


def test_attention_without_a_background_has_a_map_for_each_class():
    scores = jnp.asarray(np.random.default_rng(0).uniform(size=(2, 4, 3, 4)), jnp.float32)
    logits = refine(attention_variables(), LEVELS, scores, layout=INFERENCE)
    assert logits.shape == (2, 4, 3, 4)
    with pytest.raises(ValueError, match="2 class maps for 4 classes"):
        refine(attention_variables(), LEVELS, scores[..., :2])


def test_attention_computes_in_float32_for_bfloat16_features():
    levels = [level.astype(jnp.bfloat16) for level in LEVELS]
    assert refine(attention_variables(), levels, published_scores()).dtype == jnp.float32


def as_float32(*values):
    return [jnp.asarray(value, jnp.float32) for value in values]


def test_fusion_agrees_with_the_published_one():
    logits = as_float32(arrays.DECODER_LOGITS, arrays.ATTENTION_LOGITS)
    labels = jax.jit(fusion.calibrated_fusion)(*logits)
    np.testing.assert_allclose(labels, PUBLISHED["labels"], **CLOSE)


def test_soft_cross_entropy_agrees_with_the_published_one():
    logits, labels = as_float32(arrays.STRONG_LOGITS, PUBLISHED["labels"])
    total, count = jax.jit(consistency.soft_cross_entropy)(logits, labels, VALID)
    np.testing.assert_allclose(total / count, PUBLISHED["loss"], **CLOSE)


def test_pseudo_labels_get_no_gradient_and_padding_counts_nowhere():
    weak, attention, strong = as_float32(
        arrays.DECODER_LOGITS, arrays.ATTENTION_LOGITS, arrays.STRONG_LOGITS
    )

    def loss(weak, attention, strong):
        labels = fusion.calibrated_fusion(weak, attention, VALID)
        total, count = consistency.soft_cross_entropy(strong, labels, VALID)
        return total / count

    compute = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
    value, grads = compute(weak, attention, strong)
    np.testing.assert_array_equal(grads[0], 0)
    np.testing.assert_array_equal(grads[1], 0)
    np.testing.assert_array_equal(np.asarray(grads[2])[~arrays.PADDED], 0)
    assert np.abs(np.asarray(grads[2])[arrays.PADDED]).min() > 0
    repainted = [x.at[0, 3].set(70.0) for x in (weak, attention, strong)]
    np.testing.assert_allclose(compute(*repainted)[0], value, rtol=1e-6)


def test_classifier_agrees_with_the_published_loss():
    loss = jax.jit(
        lambda x, labeled: image_classifier.sigmoid_cross_entropy(classify(x), PRESENT, labeled)
    )
    total, count = loss(LAST, np.array([True, True]))
    np.testing.assert_allclose(total / count, PUBLISHED["classification"], **CLOSE)
    first, one = loss(LAST, np.array([True, False]))
    assert one == 1 and first < total
    predicted = jax.jit(image_classifier.predicted_classes)(np.array([[-0.1, 0.0, 2.0]]))
    np.testing.assert_array_equal(predicted, [[False, True, True]])


def test_classes_of_an_image_are_those_of_its_labels():
    labels = np.array([[[0, 2], [255, 255]]], np.uint8)
    present = jax.jit(masks.classes_in_labels, static_argnums=1)(labels, 3)
    np.testing.assert_array_equal(present, [[True, False, True]])


def test_the_mean_of_the_classifier_is_over_valid_positions():
    model = image_classifier.ImageClassifier(3)
    params = {"classifier": {"kernel": KERNEL[None, None], "bias": jnp.ones(3)}}
    logits = jax.jit(lambda x, valid: model.apply({"params": params}, x, INFERENCE, valid))(
        LAST, VALID.at[1].set(False)
    )
    expected = arrays.LAST[0, :3, :2].mean(axis=(0, 1)) @ arrays.CLASSIFIER_KERNEL + 1
    np.testing.assert_allclose(logits, [expected, [1, 1, 1]], **CLOSE)


def test_the_cut_square_by_axis():
    """Not square: rows and columns apart, beside the published code's arithmetic."""
    height, width, count = 129, 257, 300
    keys = image_keys(jax.random.key(3), count)

    @jax.jit
    def draw(keys):
        images = jnp.zeros((count, height, width, 1), jnp.uint8)
        valid = jnp.ones((count, height, width), bool).at[:, :, 200:].set(False)
        filled, left = image_cutout.cut_square(keys, images, valid, fill=7.0)
        cut = filled[..., 0] == 7
        return cut, jnp.all(left == (valid & ~cut))

    cut, is_left_out = draw(keys)
    assert is_left_out
    cut = np.asarray(cut)
    rng = np.random.default_rng(0)
    for axis, size in ((2, height), (1, width)):
        extent = cut.any(axis=axis).sum(axis=1)
        centre = rng.integers(0, size, 200_000)
        expected = np.minimum(size, centre + 50) - np.maximum(0, centre - 50)
        assert 50 <= extent.min() < 55 and extent.max() == expected.max() == 100
        assert abs(extent.mean() - expected.mean()) < 4
        assert abs((extent == 100).mean() - (expected == 100).mean()) < 0.12
