"""Guided cutout, beside OpenCV's contours as the authors use them."""

import cv2
import jax
import jax.numpy as jnp
import numpy as np

from semiseg_jax.methods import connected_components, guided_cutout
from semiseg_jax.methods.image_keys import image_keys

SIZE = (37, 45)
find = jax.jit(guided_cutout.find_objects, static_argnums=2)


def smooth_masks(sigma, share, count=8, size=SIZE):
    """Masks of blobs: the largest values of noise, blurred unless sigma is 0."""
    noise = np.random.default_rng(0).normal(size=(count, *size))
    if sigma:
        noise = np.stack([cv2.GaussianBlur(image, (0, 0), sigma) for image in noise])
    return noise > np.quantile(noise, 1 - share)


def spiral(size=SIZE):
    """A path of one pixel, with one turn after the other."""
    mask = np.zeros(size, bool)
    low, high, left, right = 1, size[0] - 2, 1, size[1] - 2
    while high - low > 2 and right - left > 2:
        mask[low, left : right + 1] = mask[low : high + 1, right] = True
        mask[high, left + 2 : right + 1] = mask[low + 2 : high + 1, left + 2] = True
        mask[low + 2, left + 2 : left + 4] = True
        low, high, left, right = low + 2, high - 2, left + 2, right - 2
    return mask


MASKS = np.concatenate(
    [
        *(smooth_masks(sigma, share, count=3) for sigma in (0, 1, 2) for share in (0.3, 0.5)),
        [spiral(), np.ones(SIZE, bool), np.zeros(SIZE, bool)],
    ]
)


def opencv_boxes(mask, min_points):
    """(top, left, height, width) of the contours, as yassouali/CCT measures them."""
    contours, _ = cv2.findContours(
        mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE
    )
    polygons = [contour[:, 0, ::-1] for contour in contours if len(contour) >= min_points]
    return sorted(tuple(map(int, (*p.min(axis=0), *np.ptp(p, axis=0)))) for p in polygons)


def boxes_of(objects, image):
    columns = (objects.top, objects.left, objects.height, objects.width)
    table = np.stack([np.asarray(column[image]) for column in columns], axis=-1)
    return sorted(tuple(map(int, row)) for row in table[np.asarray(objects.exists[image])])


def test_the_objects_are_those_of_opencv():
    objects = find(MASKS, 12, 100)
    expected = [opencv_boxes(mask, 12) for mask in MASKS]
    assert [boxes_of(objects, i) for i in range(len(MASKS))] == expected
    assert sum(map(len, expected)) > 50


def one_box():
    values = {"top": 3, "left": 10, "height": 30, "width": 5}
    arrays = {name: jnp.full((1, 1), value, jnp.int32) for name, value in values.items()}
    return guided_cutout.ObjectBoxes(jnp.ones((1, 1), bool), **arrays)


def test_rectangles_follow_the_published_law():
    """Rows and columns apart: .4 x 30 = 12 rows and .4 x 5 = 2 columns, uniform in the box."""
    count = 2000
    boxes = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (count + 1, 1)), one_box())
    boxes = boxes.replace(exists=boxes.exists.at[-1].set(False))
    keys = image_keys(jax.random.key(0), count + 1)
    cut = ~np.asarray(jax.jit(guided_cutout.keep_mask, static_argnums=2)(keys, boxes, SIZE))
    assert not cut[-1].any()  # no object there
    rows, columns = cut[:-1].any(axis=2), cut[:-1].any(axis=1)
    assert (rows.sum(axis=1) == 12).all() and (columns.sum(axis=1) == 2).all()
    np.testing.assert_array_equal(cut[:-1], rows[:, :, None] & columns[:, None])
    # random.randint(0, int(30 * .6)) is 0 to 18, both included.
    np.testing.assert_array_equal(np.unique(rows.argmax(axis=1)), 3 + np.arange(19))
    np.testing.assert_array_equal(np.unique(columns.argmax(axis=1)), 10 + np.arange(4))
    counts = np.bincount(rows.argmax(axis=1) - 3)
    assert np.sum((counts - count / 19) ** 2 / (count / 19)) < 43  # chi-squared, p = .001


def test_holes_are_filled_and_islands_in_them_belong_to_the_ring():
    closed = np.zeros((9, 9), bool)
    closed[1:8, 1:8] = True
    filled = closed.copy()
    closed[2:7, 2:7] = False
    closed[4, 4] = True
    opened = closed.copy()
    opened[1, 4] = False  # a gap in a side opens the hole
    fill = jax.jit(connected_components.fill_holes)
    np.testing.assert_array_equal(fill(np.stack([closed, opened])), [filled, opened])
