import numpy as np
import pytest
import tensorflow as tf

from semiseg_jax.data import weak
from tests.conftest import tiny_config


def data_config(scale, crop, mirror=False):
    return tiny_config(data__scale=scale, data__crop=crop, data__mirror=mirror).data


def crop(image, label, seed, config):
    return weak.random_crop(*map(tf.convert_to_tensor, (image, label, seed)), config)


def random_pair(height, width, seed=0):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
    return image, rng.integers(0, 5, (height, width)).astype(np.uint8)


@pytest.mark.parametrize("factor", [0.5, 0.73, 1.0, 1.4, 2.0])
@pytest.mark.parametrize("size", [(24, 31), (1, 1), (5, 40)])
def test_is_a_resize_of_the_whole_image(factor, size):
    image, label = random_pair(*size)
    config = data_config((factor, factor), (200, 200))
    ours, ours_label, _ = crop(image, label, [1, 2], config)
    scaled = [max(round(factor * s), 1) for s in size]
    theirs = tf.raw_ops.ResizeBilinear(images=image[None], size=scaled, half_pixel_centers=True)[0]
    assert np.abs(ours.numpy().astype(float) - theirs.numpy()).max() <= 0.51
    nearest = tf.raw_ops.ResizeNearestNeighbor(
        images=label[None, ..., None], size=scaled, half_pixel_centers=True
    )[0, ..., 0]
    np.testing.assert_array_equal(ours_label, nearest)


def test_a_crop_is_a_window_of_the_resized_image():
    image, label = random_pair(24, 31)
    whole, whole_label, _ = crop(image, label, [0, 0], data_config((1.5, 1.5), (99, 99)))
    places = set()
    for i in range(20):
        part, part_label, _ = crop(image, label, [i, 7], data_config((1.5, 1.5), (10, 12)))
        assert part.shape == (10, 12, 3)
        windows = np.lib.stride_tricks.sliding_window_view(whole.numpy(), (10, 12), (0, 1))
        found = np.argwhere((windows == part.numpy().transpose(2, 0, 1)).all((2, 3, 4)))
        assert len(found) == 1
        y, x = found[0]
        np.testing.assert_array_equal(part_label, whole_label[y : y + 10, x : x + 12])
        places.add((y, x))
    assert len(places) > 15


def test_half_are_mirrored_image_and_label_alike():
    image, label = random_pair(8, 9)
    config = data_config((1.0, 1.0), (8, 9), mirror=True)
    mirrored = 0
    for i in range(60):
        x, y, _ = crop(image, label, [i, 0], config)
        flipped = np.array_equal(x, image[:, ::-1])
        assert flipped or np.array_equal(x, image)
        np.testing.assert_array_equal(y, label[:, ::-1] if flipped else label)
        mirrored += flipped
    assert 15 < mirrored < 45


@pytest.mark.parametrize("factor", [0.5, 0.8, 1.7])
def test_label_and_image_edges_stay_within_half_a_pixel(factor):
    """A vertical edge at column 20 of 41, black to white and class 0 to 1."""
    image = np.zeros((30, 41, 3), np.uint8)
    image[:, 20:] = 255
    label = (image[..., 0] > 0).astype(np.uint8)
    x, y, _ = crop(image, label, [3, 4], data_config((factor, factor), (99, 99)))
    row = x.numpy()[5, :, 0].astype(float) / 255
    image_edge = len(row) - row.sum()
    label_edge = np.argmax(y.numpy()[5])
    assert abs(image_edge - label_edge) <= 0.5
    assert set(np.unique(y)) == {0, 1}


def test_scale_is_uniform_in_its_range():
    image, label = random_pair(100, 100)
    config = data_config((0.5, 2.0), (400, 400))
    sizes = [crop(image, label, [i, 1], config)[1].shape[0] for i in range(300)]
    assert 50 <= min(sizes) < 60 and 190 < max(sizes) <= 200
    assert abs(np.mean(sizes) - 125) < 10


def test_padding_is_mean_colour_and_ignored():
    image, label = random_pair(4, 6)
    colour = np.array([1, 2, 3], np.uint8)
    x, y = weak.pad(tf.constant(image), tf.constant(label), tf.constant([2, 1]), (9, 8), colour)
    np.testing.assert_array_equal(x[2:6, 1:7], image)
    np.testing.assert_array_equal(y[2:6, 1:7], label)
    outside = np.ones((9, 8), bool)
    outside[2:6, 1:7] = False
    assert (y.numpy()[outside] == 255).all()
    assert (x.numpy()[outside] == colour).all()


def test_small_images_are_placed_all_over_the_canvas():
    image, label = random_pair(4, 4)
    config = data_config((1.0, 1.0), (8, 8))
    places = {tuple(crop(image, label, [i, 0], config)[2].numpy()) for i in range(300)}
    assert places == {(y, x) for y in range(5) for x in range(5)}


def test_the_same_in_a_graph():
    image, label = random_pair(20, 30)
    config = data_config((0.5, 2.0), (16, 16), mirror=True)
    eager = crop(image, label, [5, 6], config)
    graph = tf.function(lambda *a: crop(*a, config))(*map(tf.constant, (image, label, [5, 6])))
    for a, b in zip(eager, graph, strict=True):
        np.testing.assert_array_equal(a, b)
