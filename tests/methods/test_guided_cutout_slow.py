"""Guided cutout beside OpenCV's contours: larger masks, and contours of any length."""

import numpy as np
import pytest

from tests.methods.test_guided_cutout import boxes_of, find, opencv_boxes, smooth_masks, spiral

pytestmark = pytest.mark.slow

SIZE = (97, 130)


# The published threshold is 51; with 2 the lengths of nearly all contours count.
@pytest.mark.parametrize("min_points", [51, 2])
def test_the_objects_are_those_of_opencv(min_points):
    masks = [
        smooth_masks(sigma, share, count=2, size=SIZE)
        for sigma in (0, 1, 3)
        for share in (0.3, 0.4, 0.5)
    ]
    masks = np.concatenate([*masks, [spiral(SIZE)]])
    objects = find(masks, min_points, 1000)
    expected = [opencv_boxes(mask, min_points) for mask in masks]
    assert [boxes_of(objects, i) for i in range(len(masks))] == expected
