"""The building blocks of CCT, beside results of the authors' functions (fixtures/cct.json)."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from semiseg_jax.methods import (
    auxiliary_decoder,
    cct,
    consistency,
    masks,
    perturbations,
    virtual_adversarial,
)
from semiseg_jax.methods.image_keys import image_keys
from tests.methods import arrays
from tests.methods.published import fixture

PUBLISHED = fixture("cct")
KEYS = image_keys(jax.random.key(0), 2)


def decoder_params(dtype):
    kernels = [jnp.asarray(kernel, dtype) for kernel in arrays.DECODER_KERNELS]
    enlarge = {
        f"enlarge{i + 1}": {"kernel": kernels[i + 1], "bias": jnp.asarray(bias, dtype)}
        for i, bias in enumerate(arrays.DECODER_BIASES)
    }
    return {"params": {"project": {"kernel": kernels[0]}} | enlarge}


def decode(params, x):
    return auxiliary_decoder.AuxiliaryDecoder(2).apply(params, x)


def test_decoder_agrees_with_the_published_one():
    logits = jax.jit(decode)(decoder_params(jnp.float32), arrays.FEATURES.astype(np.float32))
    np.testing.assert_allclose(logits, PUBLISHED["decoder"], rtol=1e-5, atol=1e-5)


def test_initial_decoder_has_no_checkerboard():
    model = auxiliary_decoder.AuxiliaryDecoder(2, upscale=4)
    x = jnp.asarray(arrays.FEATURES, jnp.float32)
    logits = np.asarray(jax.jit(lambda x: model.apply(model.init(jax.random.key(0), x), x))(x))
    np.testing.assert_array_equal(logits, logits[:, ::4, ::4].repeat(4, axis=1).repeat(4, axis=2))
    with pytest.raises(ValueError, match="power of 2"):
        auxiliary_decoder.AuxiliaryDecoder(2, upscale=6).init(jax.random.key(0), x)


@pytest.mark.parametrize(
    ("case", "linearized"),
    [*((c, True) for c in list(PUBLISHED["vat"])[:2]), ("0.1 10.0 1", False)],
)
def test_vat_agrees_with_the_published_one(case, linearized):
    xi, eps, iterations = map(float, case.split())
    with jax.enable_x64(True):
        params = decoder_params(jnp.float64)
        ours = jax.jit(
            lambda x, start: virtual_adversarial.perturbation(
                lambda x: decode(params, x),
                x,
                start,
                xi,
                eps,
                int(iterations),
                norm_floor=1e-8,
                linearized=linearized,
            )
        )(arrays.FEATURES, arrays.START)
    # A second iteration takes the gradient at a step of the first one's length, 1e-10 and less.
    published = np.asarray(PUBLISHED["vat"][case])
    np.testing.assert_allclose(
        ours, published, rtol=1e-5 if iterations == 1 else 1e-2, atol=1e-5 * np.abs(published).max()
    )


def vat(x, **kwargs):
    params = decoder_params(jnp.float32)
    return virtual_adversarial.perturb(KEYS, lambda x: decode(params, x), x, **kwargs)


def test_vat_of_bfloat16_features_is_that_of_float32():
    """The published step of 1e-6 changes no feature in bfloat16, and few in float32."""
    x = jnp.asarray(arrays.FEATURES, jnp.bfloat16)
    # One program: the bits of bfloat16 are those of the same float32.
    ours, wide = jax.jit(lambda x: (vat(x), vat(x.astype(jnp.float32))))(x)
    assert ours.dtype == jnp.float32
    np.testing.assert_array_equal(ours, wide)
    lengths = np.sqrt(np.sum((np.asarray(ours) - np.asarray(x, np.float32)) ** 2, axis=(1, 2, 3)))
    np.testing.assert_allclose(lengths, 2, rtol=1e-5)


def test_vat_takes_no_part_in_gradients_and_padding_takes_none_in_vat():
    x = jnp.asarray(arrays.FEATURES, jnp.float32)
    valid = jnp.ones((2, 24, 16), bool).at[:, 16:].set(False)
    change = jax.jit(lambda x: vat(x, valid=valid) - x)
    before, after = change(x), change(x.at[:, 2:].set(9.0))
    np.testing.assert_allclose(before[:, :2], after[:, :2], rtol=1e-4, atol=1e-5)
    assert np.abs(before[:, 2:]).max() == 0 < np.abs(before[:, :2]).max()

    def loss(x, params):
        return jnp.sum(virtual_adversarial.perturb(KEYS, lambda x: decode(params, x), x))

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1)))(x, decoder_params(jnp.float32))
    np.testing.assert_array_equal(gradients[0], 1.0)
    for leaf in jax.tree.leaves(gradients[1]):
        np.testing.assert_array_equal(leaf, 0)


def test_feature_drop_agrees_with_the_published_one():
    x = jnp.asarray(arrays.FEATURES, jnp.float32)
    dropped = jax.jit(lambda x: perturbations.drop_attended(KEYS, x, low=0.8, high=0.8))(x)
    np.testing.assert_allclose(dropped, PUBLISHED["feature_drop"], rtol=1e-6)
    assert (np.asarray(dropped) == 0).any() and (np.asarray(dropped) != 0).any()


def test_feature_drop_ignores_padding():
    x = jnp.asarray(arrays.FEATURES, jnp.float32)

    @jax.jit
    def drop(value):
        valid = jnp.ones((2, 3, 2), bool).at[:, 2].set(False)
        return perturbations.drop_attended(KEYS, x.at[:, 2].set(value), valid=valid)[:, :2]

    np.testing.assert_array_equal(drop(0.0), drop(100.0))


def test_masks_agree_with_the_published_ones():
    @jax.jit
    def hide(x, logits):
        objects = masks.predicted_objects(logits)
        return [perturbations.keep_positions(x, keep) for keep in (objects, ~objects)]

    context_hidden, objects_hidden = hide(arrays.FEATURES, arrays.MAIN_LOGITS)
    np.testing.assert_allclose(context_hidden, PUBLISHED["context_mask"], rtol=1e-6)
    np.testing.assert_allclose(objects_hidden, PUBLISHED["object_mask"], rtol=1e-6)


def test_objects_without_a_background_class_are_all_but_the_most_frequent():
    labels = np.array([[[2, 2, 1], [255, 255, 255]]], np.uint8)
    background = jax.jit(masks.most_frequent_class, static_argnums=1)(labels, 3)
    assert background == 2
    logits = np.eye(3)[[[[0, 1], [2, 2]]]]
    valid = np.array([[[False, True], [True, True]]])
    objects = jax.jit(masks.predicted_objects)(logits, background, valid)
    np.testing.assert_array_equal(objects, [[[False, True], [False, False]]])


def test_noise_is_uniform_and_one_key_draws_once_for_the_batch():
    x = np.full((2, 30, 20, 9), 2.0, np.float32)
    noisy = jax.jit(lambda x: [perturbations.add_noise(keys, x) for keys in (KEYS, KEYS[0])])(x)
    by_image, shared = (np.asarray(x) / 2 - 1 for x in noisy)
    assert -0.3 <= by_image.min() < -0.29 and 0.29 < by_image.max() <= 0.3
    assert by_image.std() == pytest.approx(0.6 / np.sqrt(12), rel=0.02)
    assert (by_image[0] != by_image[1]).any()
    np.testing.assert_array_equal(shared[0], shared[1])
    np.testing.assert_array_equal(shared[0], by_image[0])


def test_random_perturbations_keep_bfloat16():
    x = jax.ShapeDtypeStruct((2, 2, 2, 4), jnp.bfloat16)
    for perturb in (perturbations.drop_attended, perturbations.add_noise):
        assert jax.eval_shape(perturb, KEYS, x).dtype == jnp.bfloat16


def test_consistency_agrees_with_the_published_loss():
    @jax.jit
    def loss(valid):
        auxiliary = [jnp.asarray(logits, jnp.float32) for logits in arrays.AUXILIARY_LOGITS]
        main = jnp.asarray(arrays.MAIN_LOGITS, jnp.float32)
        return [
            consistency.auxiliary_consistency(auxiliary, main, valid, divide_by)
            for divide_by in ("valid", "all")
        ]

    valid = np.ones((2, 5, 4), bool)
    for total, count in loss(valid):
        np.testing.assert_allclose(total / count, np.mean(PUBLISHED["consistency"]), rtol=1e-5)
    valid[0] = False
    assert [count for _, count in loss(valid)] == [20, 40]


def test_consistency_reaches_the_auxiliary_decoders_alone_and_no_padding():
    auxiliary = [jnp.asarray(logits, jnp.float32) for logits in arrays.AUXILIARY_LOGITS]
    main = jnp.asarray(arrays.MAIN_LOGITS, jnp.float32)

    def loss(auxiliary, main, valid):
        total, count = consistency.auxiliary_consistency(auxiliary, main, valid)
        return total / jnp.maximum(count, 1)

    valid = jnp.ones(main.shape[:3], bool).at[0, :, 2:].set(False)
    gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    value, (to_auxiliary, to_main) = gradient(auxiliary, main, valid)
    assert value > 0
    np.testing.assert_array_equal(to_main, 0)
    for leaf in to_auxiliary:
        assert (np.asarray(leaf)[np.asarray(valid)] != 0).all()
        np.testing.assert_array_equal(np.asarray(leaf)[~np.asarray(valid)], 0)
    value, (to_auxiliary, _) = gradient(auxiliary, main, jnp.zeros_like(valid))
    assert value == 0 and not np.any(to_auxiliary)


@pytest.mark.parametrize(
    # Patches of 14 pixels are enlarged beyond the size of the image.
    ("stride", "upscale"),
    [(1, 1), (4, 4), (8, 8), (14, 16), (16, 16), (32, 32)],
)
def test_decoders_enlarge_by_the_stride_of_the_features(stride, upscale):
    features = types.SimpleNamespace(stride=stride)
    assert cct._decoder(features, 4).upscale == upscale
