"""Weak augmentation against TensorFlow's resize, and padding."""

import numpy as np
import pytest
import tensorflow as tf

from semiseg_jax.data import weak_augment
from tests.conftest import tiny_config


def data_config(scale, crop, mirror=False):
    return tiny_config(data__scale=scale, data__crop=crop, data__mirror=mirror).data


def crop(image, label, seed, config):
    return weak_augment.random_crop(*map(tf.convert_to_tensor, (image, label, seed)), config)


def random_pair(height, width, seed=0):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
    return image, rng.integers(0, 5, (height, width)).astype(np.uint8)


@pytest.mark.parametrize("factor", [0.5, 0.73, 1.0, 1.4, 2.0])
@pytest.mark.parametrize("size", [(24, 31), (1, 1), (5, 40)])
def test_random_crop_equals_resize_of_whole_image(factor, size):
    image, label = random_pair(*size)
    config = data_config((factor, factor), (200, 200))
    view, view_label, _ = crop(image, label, [1, 2], config)
    scaled = [max(round(factor * s), 1) for s in size]
    bilinear = tf.raw_ops.ResizeBilinear(images=image[None], size=scaled, half_pixel_centers=True)[
        0
    ]
    assert np.abs(view.numpy().astype(float) - bilinear.numpy()).max() <= 0.51
    nearest = tf.raw_ops.ResizeNearestNeighbor(
        images=label[None, ..., None], size=scaled, half_pixel_centers=True
    )[0, ..., 0]
    np.testing.assert_array_equal(view_label, nearest)


def test_crop_is_a_window_of_the_resized_image():
    image, label = random_pair(24, 31)
    resized, resized_label, _ = crop(image, label, [0, 0], data_config((1.5, 1.5), (99, 99)))
    corners = set()
    for i in range(20):
        view, view_label, _ = crop(image, label, [i, 7], data_config((1.5, 1.5), (10, 12)))
        assert view.shape == (10, 12, 3)
        windows = np.lib.stride_tricks.sliding_window_view(resized.numpy(), (10, 12), (0, 1))
        matches = np.argwhere((windows == view.numpy().transpose(2, 0, 1)).all((2, 3, 4)))
        assert len(matches) == 1
        y, x = matches[0]
        np.testing.assert_array_equal(view_label, resized_label[y : y + 10, x : x + 12])
        corners.add((y, x))
    assert len(corners) > 15


def test_half_of_the_views_are_mirrored():
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


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("size", [(30, 41), (17, 64)])
@pytest.mark.parametrize("limits", [(0.5, 0.5), (0.8, 0.8), (1.0, 1.0), (1.7, 1.7), (0.5, 2.0)])
def test_label_and_image_edges_stay_within_half_a_pixel(limits, size, axis):
    """An edge from black and class 3 to white and class 7 is where the geometry projects it.

    The mean brightness of a line determines the position of the edge to fractions of a pixel.
    """
    edge = size[axis] // 2
    white = np.arange(size[axis]) >= edge
    white = np.broadcast_to(white if axis else white[:, None], size)
    image, label = np.repeat(255 * white[..., None], 3, -1).astype(np.uint8), 3 + 4 * white
    config = data_config(limits, (24, 28), mirror=True)
    cases = set()
    for i in range(12):
        seed = [i, 3]
        x, y, _ = crop(image, label.astype(np.uint8), seed, config)
        geometry = weak_augment.draw(tf.constant(size), tf.constant(seed), config)
        scaled, corner, valid = (
            int(t[axis]) for t in (geometry.scaled, geometry.corner, geometry.valid)
        )
        before, after = edge * scaled / size[axis], (size[axis] - edge) * scaled / size[axis]
        if axis == 1 and geometry.mirrored:
            expected = min(max(after - corner, 0), valid)
        else:
            expected = min(max(corner + valid - before, 0), valid)
        line, classes = (t.numpy().take(1, 1 - axis) for t in (x, y))
        assert abs(line[:, 0].sum() / 255 - expected) <= 0.5 + 1e-6
        assert abs((classes == 7).sum() - expected) <= 0.5 + 1e-6
        assert set(classes) <= {3, 7}
        cases.add((bool(geometry.mirrored), 0 < expected < valid))
    assert (True, True) in cases and (False, True) in cases


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (3, 2), (40, 7)])
def test_tiny_images_are_padded_without_new_values(size):
    """A view contains only the colour and class of the image, and padding."""
    image, label = np.full((*size, 3), 200, np.uint8), np.full(size, 4, np.uint8)
    config = data_config((0.3, 2.0), (16, 20), mirror=True)
    pad_value = np.array([1, 2, 3], np.uint8)
    for i in range(10):
        x, y, offset = crop(image, label, [i, 5], config)
        assert 1 <= y.shape[0] <= 16 and 1 <= y.shape[1] <= 20
        padded, padded_label = weak_augment.pad(x, y, offset, (16, 20), pad_value)
        inside = padded_label.numpy() == 4
        assert inside.sum() == y.shape[0] * y.shape[1]
        assert set(np.unique(padded_label)) <= {4, 255}
        assert (padded.numpy()[inside] == 200).all()
        assert (padded.numpy()[~inside] == pad_value).all()


def test_scale_is_uniform():
    image, label = random_pair(100, 100)
    config = data_config((0.5, 2.0), (400, 400))
    sizes = [crop(image, label, [i, 1], config)[1].shape[0] for i in range(300)]
    assert 50 <= min(sizes) < 60 and 190 < max(sizes) <= 200
    assert abs(np.mean(sizes) - 125) < 10


def test_padding_has_pad_value_and_ignore():
    image, label = random_pair(4, 6)
    pad_value = np.array([1, 2, 3], np.uint8)
    x, y = weak_augment.pad(
        tf.constant(image), tf.constant(label), tf.constant([2, 1]), (9, 8), pad_value
    )
    np.testing.assert_array_equal(x[2:6, 1:7], image)
    np.testing.assert_array_equal(y[2:6, 1:7], label)
    outside = np.ones((9, 8), bool)
    outside[2:6, 1:7] = False
    assert (y.numpy()[outside] == 255).all()
    assert (x.numpy()[outside] == pad_value).all()


def test_offsets_of_small_images_cover_the_crop():
    image, label = random_pair(4, 4)
    config = data_config((1.0, 1.0), (8, 8))
    offsets = {tuple(crop(image, label, [i, 0], config)[2].numpy()) for i in range(300)}
    assert offsets == {(y, x) for y in range(5) for x in range(5)}


def test_graph_equals_eager():
    image, label = random_pair(20, 30)
    config = data_config((0.5, 2.0), (16, 16), mirror=True)
    eager = crop(image, label, [5, 6], config)
    graph = tf.function(lambda *a: crop(*a, config))(*map(tf.constant, (image, label, [5, 6])))
    for a, b in zip(eager, graph, strict=True):
        np.testing.assert_array_equal(a, b)


def rare_crops(label, weights, config, count):
    """(corner, mirrored) of crops of a label that are moved to its rare classes."""
    size = tf.constant(label.shape)
    for seed in range(count):
        drawn = weak_augment.draw(size, tf.constant((seed, 0)), config)
        yield weak_augment.around_rare(
            drawn, tf.constant(label), tf.constant(weights, tf.float64), tf.constant((seed, 1))
        )


@pytest.mark.parametrize("place", [(0, 0), (23, 30), (11, 4), (12, 30)])
@pytest.mark.parametrize("scale", [0.7, 1.0, 1.6])
def test_every_balanced_crop_contains_the_pixel_of_the_rare_class(place, scale):
    """3x3 pixels of class 2 among others without weight; padded where the image is small."""
    label = np.random.default_rng(0).integers(0, 2, (24, 31)).astype(np.uint8)
    rows, columns = (slice(max(p - 1, 0), p + 2) for p in place)
    label[rows, columns] = 2
    label[5] = 255
    image = np.zeros((24, 31, 3), np.uint8)
    config = data_config((scale, scale), (10, 40), mirror=True)
    mirrored, corners = set(), set()
    for geometry in rare_crops(label, (0.0, 0.0, 1.0), config, 40):
        _, crop_label, _ = weak_augment.crop(tf.constant(image), tf.constant(label), geometry)
        assert np.any(crop_label == 2)
        mirrored.add(bool(geometry.mirrored))
        corners.add(tuple(geometry.corner.numpy()))
        end = geometry.corner + geometry.valid
        assert np.all(geometry.corner >= 0) and np.all(end <= geometry.scaled)
    assert mirrored == {True, False}
    assert len(corners) > 1 or place[0] in (0, 23)


def test_classes_are_drawn_by_their_weights_among_those_present():
    """One pixel of class 1, 799 of class 0, none of class 2: 1 has a third of their weights."""
    label = np.zeros((20, 40), np.uint8)
    label[10, 20] = 1
    config = data_config((1.0, 1.0), (2, 2))
    weights = (2.0, 1.0, 5.0)
    corners = [tuple(g.corner.numpy()) for g in rare_crops(label, weights, config, 120)]
    around = {(9, 19), (9, 20), (10, 19), (10, 20)}
    count = sum(corner in around for corner in corners)
    # Four standard deviations; crops that contain a pixel of class 0 hardly ever are among them.
    assert abs(count - 40) < 4 * np.sqrt(120 * (1 / 3) * (2 / 3))
    assert around <= set(corners) and len(set(corners)) > 60


def test_a_label_without_weight_keeps_its_crop():
    label = np.full((20, 40), 255, np.uint8)
    label[3, 3] = 1
    config = data_config((0.5, 2.0), (8, 8), mirror=True)
    for seed, moved in enumerate(rare_crops(label, (1.0, 0.0), config, 5)):
        drawn = weak_augment.draw(tf.constant(label.shape), tf.constant((seed, 0)), config)
        np.testing.assert_array_equal(moved.corner, drawn.corner)
