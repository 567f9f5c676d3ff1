"""Averaged probabilities and mIoU, compared with plain loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow as tf

from semiseg_jax import evaluate, inference, mesh, metrics
from semiseg_jax.data import image_io, load
from semiseg_jax.models import deeplab
from tests.conftest import tiny_config
from tests.networks import Pointwise

MEAN = np.array([123.675, 116.28, 103.53])
STD = np.array([58.395, 57.12, 57.375])
BLACK = np.zeros(3, np.uint8)


@pytest.fixture(scope="module")
def network():
    model = deeplab.build(tiny_config().model, 3)
    images = np.zeros((2, 33, 33, 3), np.uint8)
    variables = jax.jit(lambda k: model.init(k, images, domain="both"))(jax.random.key(0))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda v: v + rng.uniform(-0.3, 0.3, v.shape).astype(np.float32), variables
    )
    return model, variables


@pytest.fixture(scope="module")
def two_devices():
    return mesh.make_mesh(jax.devices()[:2])


@functools.cache
def jitted(model):
    """Returns the jitted network; each image size is traced once for all tests."""
    return jax.jit(model.apply)


def resize(x, size):
    return tf.raw_ops.ResizeBilinear(images=x, size=size, half_pixel_centers=True).numpy()


def reference_probabilities(model, variables, image, scales, flip, average):
    """Averages in float64 over one image, one scale and one direction at a time."""
    apply = jitted(model)
    size = image.shape[:2]
    total, count = 0.0, 0
    for scale in scales:
        x = ((image - MEAN) / STD).astype(np.float32)[None]
        x = resize(x, [round(scale * s) for s in size])
        for mirrored in (False, True)[: 1 + flip]:
            logits = apply(variables, x[:, :, ::-1] if mirrored else x)
            logits = resize(logits, size).astype(np.float64)[0]
            logits = logits[:, ::-1] if mirrored else logits
            exp = np.exp(logits)
            total = total + (exp / exp.sum(-1, keepdims=True) if average == "softmax" else logits)
            count += 1
    mean = total / count
    return mean if average == "softmax" else np.exp(mean) / np.exp(mean).sum(-1, keepdims=True)


@pytest.mark.parametrize("average", ["softmax", "logits"])
def test_scales_and_mirror_images_equal_a_plain_loop(network, two_devices, average):
    model, variables = network
    images = np.random.default_rng(1).integers(0, 256, (2, 31, 45, 3)).astype(np.uint8)
    scales = (0.5, 1.0, 1.75)
    predictor = inference.Predictor(model, two_devices, scales, flip=True, average=average)
    ours = np.asarray(predictor(variables, jnp.asarray(images)))
    np.testing.assert_allclose(ours.sum(-1), 1, atol=1e-5)
    for image, probabilities in zip(images, ours, strict=True):
        expected = reference_probabilities(model, variables, image, scales, True, average)
        np.testing.assert_allclose(probabilities, expected, atol=1e-5)


@pytest.mark.parametrize("batch", [4, 3])
def test_evaluation_counts_every_pixel_once(network, two_devices, folder_config, batch):
    """5 images of 2 sizes in 2 batches of 4; on 2 devices a batch of 3 is rounded up to 4."""
    model, variables = network
    folder_config.eval.batch = batch
    data = load.load_dataset(folder_config)
    rendered = {}
    render_ids = ("000", "004")
    evaluator = evaluate.Evaluator(model, data, folder_config.eval, two_devices, BLACK)
    score = evaluator(variables, render_ids, lambda e: rendered.update({e.id: e}))
    assert sorted(rendered) == ["000", "004"] and len(score.by_image) == 5
    expected = np.zeros((3, 3), np.int64)
    for example in data.evaluation:
        image = image_io.read_image(example.image)
        probabilities = reference_probabilities(model, variables, image, (1.0,), False, "softmax")
        truth = image_io.read_mask(example.mask, data.table)
        counted = np.asarray(metrics.confusion_matrix(probabilities.argmax(-1), truth, 3))
        expected += counted
        np.testing.assert_allclose(score.by_image[example.id], metrics.mean_iou(counted))
        if example.id in render_ids:
            np.testing.assert_array_equal(rendered[example.id].image, image)
            np.testing.assert_array_equal(rendered[example.id].label, truth)
            np.testing.assert_array_equal(rendered[example.id].predicted, probabilities.argmax(-1))
    np.testing.assert_array_equal(score.confusion, expected)
    assert score.pixels == 3 * (36 - 2) * 48 + 2 * (48 - 2) * 36
    np.testing.assert_allclose(score.miou, np.nanmean(metrics.iou(expected)), rtol=1e-12)


def test_scaled_sizes_are_rounded():
    assert inference.scaled_size((31, 45), 0.5) == (16, 22)  # rounds half to even
    assert inference.scaled_size((1, 1), 0.25) == (1, 1)


@pytest.mark.parametrize("size", [(20, 29), (16, 40), (9, 33), (41, 12)])
def test_sliding_windows_of_a_pointwise_network_equal_the_whole_image(two_devices, size):
    network = Pointwise()
    pixels = np.random.default_rng(0).integers(0, 256, (2, *size, 3)).astype(np.uint8)
    images = jnp.asarray(pixels)
    variables = network.init(jax.random.key(0), jnp.zeros((1, 4, 4, 3)))
    whole = inference.Predictor(network, two_devices, (0.75, 1.0), flip=True)
    sliding = inference.Predictor(
        network, two_devices, (0.75, 1.0), flip=True, window=(16, 16), window_stride=(11, 7)
    )
    np.testing.assert_allclose(
        sliding(variables, jnp.asarray(images)),
        whole(variables, jnp.asarray(images)),
        rtol=1e-5,
        atol=1e-6,
    )


def test_sliding_windows_equal_a_plain_loop(network, two_devices):
    """With a receptive field above one pixel: each window is computed, weighted and summed."""
    model, variables = network
    images = np.random.default_rng(2).integers(0, 256, (2, 40, 52, 3)).astype(np.uint8)
    sliding = inference.Predictor(model, two_devices, window=(32, 32), window_stride=(20, 16))
    ours = np.asarray(sliding(variables, jnp.asarray(images)))
    apply = jitted(model)
    total, weight = np.zeros((2, 40, 52, 3)), np.zeros((40, 52, 1))
    triangle = np.array([min(i + 0.5, 31.5 - i) for i in range(32)])
    for top in (0, 8):
        for left in (0, 16, 20):
            x = ((images[:, top : top + 32, left : left + 32] - MEAN) / STD).astype(np.float32)
            weights = np.outer(triangle, triangle)[..., None]
            total[:, top : top + 32, left : left + 32] += apply(variables, x) * weights
            weight[top : top + 32, left : left + 32] += weights
    exp = np.exp(total / weight)
    np.testing.assert_allclose(ours, exp / exp.sum(-1, keepdims=True), atol=1e-5)


@pytest.mark.parametrize(
    ("size", "window", "stride", "expected"),
    [(10, 4, 3, [0, 3, 6]), (11, 4, 3, [0, 3, 6, 7]), (4, 4, 3, [0]), (5, 4, 9, [0, 1])],
)
def test_windows_cover_an_axis_and_the_last_ends_at_its_end(size, window, stride, expected):
    assert inference.window_starts(size, window, stride) == expected
