"""Drawing and tracing of areas, beside scikit-image and pycocotools."""

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from scipy import ndimage
from skimage.draw import polygon2mask

from semiseg_jax.data.annotations import regions
from semiseg_jax.data.annotations.coco import decode_counts
from semiseg_jax.data.annotations.regions import Bitmap, Ellipse, Polygons, Stroke, fill
from tests.data.annotations.folders import coco_decode


def whole(patch, size):
    pixels = np.zeros(size, bool)
    pixels[patch.window] = patch.pixels
    return pixels


def distance_to_edges(points, size):
    """The distance of each pixel centre from the nearest edge of a polygon."""
    x, y = np.meshgrid(np.arange(size[1]) + 0.5, np.arange(size[0]) + 0.5)
    centers = np.stack([x, y], axis=-1)
    distances = np.full(size, np.inf)
    for start, end in zip(points, np.roll(points, -1, axis=0), strict=True):
        share = ((centers - start) @ (end - start)) / ((end - start) @ (end - start))
        nearest = start + np.clip(share, 0, 1)[..., None] * (end - start)
        distances = np.minimum(distances, np.linalg.norm(centers - nearest, axis=-1))
    return distances


@pytest.mark.parametrize("seed", range(40))
def test_polygons_agree_with_independent_libraries(seed):
    rng = np.random.default_rng(seed)
    size = (30, 40)
    points = rng.uniform(-5, 45, (int(rng.integers(3, 9)), 2))
    ours = whole(fill(points, size), size)
    # scikit-image has the centres of pixels at whole numbers.
    theirs = polygon2mask(size, points[:, ::-1] - 0.5)
    assert (distance_to_edges(points, size)[ours != theirs] < 1e-9).all()
    encoded = coco_mask.frPyObjects([points.ravel().tolist()], *size)
    theirs = coco_decode(coco_mask.merge(encoded))
    assert (distance_to_edges(points, size)[ours != theirs] < 0.5).all()
    assert ours.any()


def test_a_pixel_is_inside_if_its_centre_is():
    square = np.array([[1.5, 0.5], [3.5, 0.5], [3.5, 2.5], [1.5, 2.5]])
    # Of the centres on the edges, those on the left and at the top belong to it.
    expected = np.zeros((4, 5), bool)
    expected[0:2, 1:3] = True
    np.testing.assert_array_equal(whole(fill(square, (4, 5)), (4, 5)), expected)
    np.testing.assert_array_equal(whole(fill(square[::-1], (4, 5)), (4, 5)), expected)


@pytest.mark.parametrize("seed", range(20))
def test_areas_with_a_common_edge_have_each_pixel_once(seed):
    rng = np.random.default_rng(seed)
    left, right, (top, bottom) = [-9.0, 5.0], [40.0, 7.0], rng.integers(-9, 60, (2, 2)) / 2
    middle = [top.tolist(), bottom.tolist()]
    one = fill(np.array([left, *middle]), (30, 30))
    # The same edge in the other direction, of a polygon on its other side or on the same.
    other = fill(np.array([right, *middle[::-1]]), (30, 30))
    both = fill(np.array([left, middle[0], right, middle[1]]), (30, 30))
    joined = whole(one, (30, 30)) ^ whole(other, (30, 30))
    np.testing.assert_array_equal(joined, whole(both, (30, 30)))


def test_where_a_polygon_is_wound_twice_it_is_outside():
    twice = np.array(
        [[0, 0], [6, 0], [6, 6], [0, 6], [0, 0], [2, 2], [2, 4], [4, 4], [4, 2], [2, 2]]
    )
    pixels = whole(fill(twice.astype(float), (6, 6)), (6, 6))
    assert pixels.sum() == 32 and not pixels[2:4, 2:4].any()


def test_vertices_far_outside_need_no_memory():
    points = np.array([[-1e99, -1e99], [1e99, 0], [0, 1e99]])
    assert fill(points, (3, 4)).pixels.all()
    assert not fill(points + np.array([5e99, 0]), (3, 4)).pixels.any()


def test_a_union_of_polygons_has_no_hole():
    outer, inner = (
        np.array([[0, 0], [6, 0], [6, 6], [0, 6.0]]),
        np.array([[2, 2], [4, 2], [4, 4.0]]),
    )
    assert whole(Polygons((outer, inner)).draw((8, 8)), (8, 8)).sum() == 36
    apart = Polygons((inner, inner + 3)).draw((8, 8))
    assert whole(apart, (8, 8)).sum() == 2 * fill(inner, (8, 8)).pixels.sum()


def test_relative_vertices_are_shares_of_width_and_height():
    half = Polygons((np.array([[0, 0], [0.5, 0], [0.5, 1], [0, 1]]),), is_relative=True)
    expected = np.zeros((4, 10), bool)
    expected[:, :5] = True
    np.testing.assert_array_equal(whole(half.draw((4, 10)), (4, 10)), expected)
    assert half.bounds((4, 10)) == (0, 0, 5, 4)


def test_ellipses():
    circle = whole(Ellipse((5, 5), (3, 3)).draw((10, 10)), (10, 10))
    # By hand: in a row 2.5 from the centre, centres of pixels up to 1.66 beside it are within 3.
    assert circle.sum(axis=1).tolist() == [0, 0, 4, 6, 6, 6, 6, 4, 0, 0]
    flat = whole(Ellipse((5, 5), (4, 1)).draw((10, 10)), (10, 10))
    turned = whole(Ellipse((5, 5), (4, 1), angle=90).draw((10, 10)), (10, 10))
    np.testing.assert_array_equal(turned, flat.T)
    diagonal = whole(Ellipse((5, 5), (5, 1), angle=45).draw((10, 10)), (10, 10))
    assert diagonal[7, 7] and not diagonal[2, 7]  # Clockwise as seen: down to the right.


def test_ellipses_of_no_and_of_any_size():
    assert not Ellipse((5, 5), (0, 3)).draw((10, 10)).pixels.size
    assert Ellipse((5, 5), (1e99, 1e99)).draw((10, 10)).pixels.all()


def test_lines_have_a_width():
    line = Stroke(np.array([[1, 3], [7, 3.0]]), width=2)
    pixels = whole(line.draw((6, 9)), (6, 9))
    assert pixels[2:4, 1:7].all() and pixels.sum() == pixels[2:4].sum() <= 2 * 8
    point = whole(Stroke(np.array([[4.5, 2.5]]), width=1).draw((6, 9)), (6, 9))
    assert point.sum() == 1 and point[2, 4]


def test_a_turned_rectangle():
    upright = regions.rectangle(2, 4, 8, 6)
    turned = regions.rectangle(2, 4, 8, 6, angle=90)
    (points,) = turned.parts
    assert sorted(map(tuple, points.round(9).tolist())) == [(4, 2), (4, 8), (6, 2), (6, 8)]
    (slanted,) = regions.rectangle(0, -1, 10, 1, angle=30).parts
    right = (slanted[1] + slanted[2]) / 2
    np.testing.assert_allclose(right, [5 + 5 * np.cos(np.pi / 6), 2.5])  # Down: clockwise.
    assert upright.bounds((9, 9)) == (2, 4, 8, 6)


@pytest.mark.parametrize("by_column", [False, True])
def test_bitmaps_are_cut_at_the_image(by_column):
    pixels = np.array([[0, 1, 1], [1, 0, 1]], bool)
    runs = regions.runs_of(pixels.T if by_column else pixels)
    for top, left in ((0, 0), (2, 1), (-1, -1), (3, 4), (-9, 0), (9, 9)):
        expected = np.zeros((4, 5), bool)
        for row, column in zip(*np.nonzero(pixels), strict=True):
            if 0 <= row + top < 4 and 0 <= column + left < 5:
                expected[row + top, column + left] = True
        patch = Bitmap(top, left, runs, (2, 3), by_column).draw((4, 5))
        np.testing.assert_array_equal(whole(patch, (4, 5)), expected)


@pytest.mark.parametrize("seed", range(20))
def test_compressed_counts_are_those_of_pycocotools(seed):
    rng = np.random.default_rng(seed)
    size = tuple(rng.integers(1, 90, 2).tolist())
    pixels = ndimage.gaussian_filter(rng.random(size), seed / 10) > 0.5
    encoded = coco_mask.encode(np.asfortranarray(pixels.astype(np.uint8)))
    runs = decode_counts(encoded["counts"].decode())
    patch = Bitmap(0, 0, runs, size, by_column=True).draw(size)
    np.testing.assert_array_equal(patch.pixels, coco_decode(encoded))
    np.testing.assert_array_equal(patch.pixels, pixels)


@pytest.mark.parametrize("text", ["p", "oooooooooooooooo0", "ä", "0 0", "00O", "P" * 50])
def test_counts_that_cannot_be_decoded(text):
    with pytest.raises(ValueError, match="cannot be decoded"):
        decode_counts(text)


# Tracing


def draw_rings(rings, size):
    pixels = np.zeros(size, bool)
    for ring in rings:
        pixels ^= whole(fill(regions.corners(ring).astype(float), size), size)
    return pixels


def test_the_rings_of_an_area_with_a_hole_by_hand():
    pixels = np.ones((3, 3), bool)
    pixels[1, 1] = False
    outer, hole = map(regions.corners, regions.trace(pixels))
    assert outer.tolist() == [[0, 0], [3, 0], [3, 3], [0, 3]]
    assert sorted(hole.tolist()) == [[1, 1], [1, 2], [2, 1], [2, 2]]
    assert regions.signed_area(outer) == 9 and regions.signed_area(hole) == -1
    joined = regions.corners(
        regions.join_holes(*regions.trace(pixels)[:1], regions.trace(pixels)[1:])
    )
    assert abs(regions.signed_area(joined)) == 8


def test_cuts_do_not_pass_through_other_holes():
    pixels = np.ones((3, 7), bool)
    pixels[1, [2, 4]] = False
    outer, *holes = regions.trace(pixels)
    joined = regions.join_holes(outer, holes)
    np.testing.assert_array_equal(joined, regions.join_holes(outer, holes[::-1]))
    # The second hole begins at x = 4, and its cut ends at x = 3, where the first hole ends.
    at = joined.tolist().index([4, 1])
    assert joined[at - 1].tolist() == [3, 1]


def test_pixels_that_touch_at_a_corner_have_rings_of_their_own():
    rings = regions.trace(np.eye(2, dtype=bool))
    assert [regions.signed_area(ring) for ring in rings] == [1, 1]
    assert all(len(ring) == 4 for ring in rings)


@pytest.mark.parametrize("seed", range(60))
def test_what_is_traced_is_drawn_the_same(seed):
    rng = np.random.default_rng(seed)
    size = tuple(rng.integers(1, 24, 2).tolist())
    pixels = rng.random(size) < rng.random()
    rings = regions.trace(pixels)
    assert sum(map(regions.signed_area, rings)) == pixels.sum()
    np.testing.assert_array_equal(draw_rings(rings, size), pixels)


@pytest.mark.parametrize("seed", range(40))
def test_joined_holes_are_holes_for_pycocotools_too(seed):
    rng = np.random.default_rng(seed)
    size = tuple(rng.integers(3, 24, 2).tolist())
    components, count = ndimage.label(rng.random(size) < 0.75)
    for number in range(1, count + 1):
        pixels = components == number
        rings = regions.trace(pixels)
        outer = [ring for ring in rings if regions.signed_area(ring) > 0]
        holes = [ring for ring in rings if regions.signed_area(ring) < 0]
        assert len(outer) == 1
        joined = regions.corners(regions.join_holes(outer[0], holes)).astype(float)
        np.testing.assert_array_equal(whole(fill(joined, size), size), pixels)
        (encoded,) = coco_mask.frPyObjects([joined.ravel().tolist()], *size)
        np.testing.assert_array_equal(coco_decode(encoded), pixels)
