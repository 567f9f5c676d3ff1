"""The built-in street scenes: drawing, labels, and the files of the data set."""

import numpy as np
import pytest
from PIL import Image

from semiseg_jax.data.sources import streets
from semiseg_jax.data.sources.streets import CAR, CLASSES, IGNORE, PAVEMENT, ROAD, SKY, Canvas
from tests.errors import raises_code

SIZE = (32, 48)


@pytest.fixture(scope="module")
def scenes():
    return [streets.draw(0, index) for index in range(20)]


def test_scene_is_a_function_of_its_arguments(scenes):
    image, labels = streets.draw(0, 3)
    np.testing.assert_array_equal(image, scenes[3][0])
    np.testing.assert_array_equal(labels, scenes[3][1])
    for other in (streets.draw(1, 3), scenes[4]):
        assert np.mean(image != other[0]) > 0.5
        assert np.mean(labels != other[1]) > 0.05


def test_every_class_occurs_and_few_pixels_are_ignored(scenes):
    counts = sum(np.bincount(labels.ravel(), minlength=256) for _, labels in scenes)
    shares = counts / counts.sum()
    assert set(np.flatnonzero(counts)) == {*range(len(CLASSES)), IGNORE}
    assert 0.01 < shares[IGNORE] < 0.15
    assert min(shares[: len(CLASSES)]) > 0.002  # enough pixels of rare classes to learn


def test_scenes_differ_in_light_and_layout(scenes):
    brightness = [image.mean() for image, _ in scenes]
    road = [np.mean(labels == ROAD) for _, labels in scenes]
    assert np.std(brightness) > 15 and np.std(road) > 0.05


def test_colour_alone_does_not_separate_classes(scenes):
    """Classifying pixels by the nearest class mean often fails, even on the pixels of the mean."""
    colours = np.concatenate([image.reshape(-1, 3) for image, _ in scenes]).astype(float)[::7]
    labels = np.concatenate([labels.ravel() for _, labels in scenes])[::7]
    means = np.stack([colours[labels == c].mean(0) for c in range(len(CLASSES))])
    nearest = np.argmin(((colours[:, None] - means) ** 2).sum(-1), axis=1)
    assert np.mean((nearest == labels)[labels != IGNORE]) < 0.5


def test_scenes_change_only_with_the_version():
    """After an intended change, increment streets.VERSION and update the golden numbers.

    The tolerance allows for other versions of Pillow.
    """
    _, labels = streets.draw(0, 0)
    counts = np.bincount(labels.ravel(), minlength=256)[: len(CLASSES)]
    assert streets.VERSION == 2
    golden = [1631, 5446, 2332, 736, 1024, 294, 84, 2315, 22, 0, 171]
    np.testing.assert_allclose(counts, golden, atol=60)


@pytest.mark.parametrize("size", [(32, 32), (96, 160), (97, 161), (200, 120)])
def test_any_size(size):
    for index in range(3):
        image, labels = streets.draw(5, index, *size)
        assert image.shape == (*size, 3) and labels.shape == size
        assert image.dtype == labels.dtype == np.uint8
        assert np.all((labels < len(CLASSES)) | (labels == IGNORE))
        assert {ROAD, SKY} <= set(np.unique(labels))


def white_canvas(height=40, width=60):
    canvas = Canvas(height, width)
    corners = [(0, 0), (width, 0), (width, height), (0, height)]
    canvas.polygon(corners, (255, 255, 255), SKY)
    return canvas


@pytest.mark.parametrize("shape", ["polygon", "ellipse", "line"])
def test_pixel_has_label_of_its_largest_cover(shape):
    canvas = white_canvas()
    if shape == "polygon":
        canvas.polygon([(5.2, 4.1), (50.7, 11.4), (31.3, 35.9)], (0, 0, 0), CAR)
    elif shape == "ellipse":
        canvas.ellipse((28.4, 19.7), (21.3, 12.6), (0, 0, 0), CAR)
    else:
        canvas.line([(3.3, 8.8), (55.1, 33.3)], 4.0, (0, 0, 0), CAR)
    image, labels, cover = canvas.finish()
    dark = 1 - np.asarray(image)[..., 0] / 255
    assert np.sum(labels == CAR) > 100
    np.testing.assert_array_equal(labels == CAR, dark > 0.5)
    np.testing.assert_allclose(cover, np.maximum(dark, 1 - dark), atol=0.01)


def test_stroke_coordinates_are_pixels():
    canvas = white_canvas()
    canvas.polygon([(10, 8), (20, 8), (20, 16), (10, 16)], (0, 0, 0), CAR)
    _, labels, _ = canvas.finish()
    expected = np.full((40, 60), SKY)
    expected[8:16, 10:20] = CAR
    np.testing.assert_array_equal(labels, expected)


def test_no_class_appears_between_two_others():
    canvas = white_canvas()
    canvas.polygon([(3.1, 7.7), (52.9, 2.2), (29.0, 38.5)], (0, 0, 0), 4)
    canvas.ellipse((30.3, 17.6), (9.7, 6.2), (0, 0, 0), 9)
    assert set(np.unique(canvas.finish()[1])) <= {SKY, 4, 9, IGNORE}


def test_strokes_without_colour_or_without_label():
    canvas = white_canvas()
    square = [(10, 10), (20, 10), (20, 20), (10, 20)]
    canvas.polygon(square, None, CAR)
    canvas.polygon([(x + 20, y) for x, y in square], (0, 0, 0), None)
    image, labels, _ = canvas.finish()
    assert labels[15, 15] == CAR and image.getpixel((15, 15)) == (255, 255, 255)
    assert labels[15, 35] == SKY and image.getpixel((35, 15)) == (0, 0, 0)


def test_ground_agrees_with_camera_projection():
    """The ground is drawn from pixels to metres, all objects from metres to pixels."""
    checked = 0
    for seed in range(30):
        scene = streets._random_scene(streets.Dice(np.random.default_rng(seed)), 96, 160)
        street = scene.sides[1]
        if street.verge:
            continue
        streets._paint_ground(scene)
        _, labels, _ = scene.canvas.finish()
        for z in (5.0, 8.0, 11.0):  # nearer than any side street
            for x, label in ((street.kerb - 0.4, ROAD), (street.kerb + 0.4, PAVEMENT)):
                column, row = scene.project(x, 0, z)
                if 0 <= column < 160 and row < 96:
                    assert labels[int(row), int(column)] == label
                    checked += 1
    assert checked > 20


def test_write_creates_folder_layout(tmp_path):
    root = tmp_path / "cache" / "scenes"
    streets.write(root, 7, {"train": 3, "val": 2}, *SIZE)
    assert sorted(p.name for p in root.iterdir()) == ["images", "masks", "splits"]
    assert list(root.parent.iterdir()) == [root]
    for split, count in (("train", 3), ("val", 2)):
        lines = (root / "splits" / f"{split}.txt").read_text().splitlines()
        assert lines == [
            f"images/{split}/{n:05d}.png masks/{split}/{n:05d}.png" for n in range(count)
        ]
        for line in lines:
            image, mask = (Image.open(root / name) for name in line.split())
            assert image.mode == "RGB" and mask.mode == "P"
            assert image.size == mask.size == SIZE[::-1]
            indices = np.asarray(mask)
            assert np.all((indices < len(CLASSES)) | (indices == IGNORE))
            assert mask.getpalette()[: 3 * len(CLASSES)] == list(np.ravel(streets.PALETTE))


def test_splits_share_no_scene_and_are_independent(tmp_path):
    streets.write(tmp_path / "a", 7, {"train": 3, "val": 3}, *SIZE)
    streets.write(tmp_path / "b", 7, {"val": 2, "test": 1}, *SIZE)
    scenes = [p.read_bytes() for p in sorted((tmp_path / "a" / "images").glob("*/*.png"))]
    assert len(set(scenes)) == len(scenes) == 6
    for kind in ("images", "masks"):
        for name in ("val/00000.png", "val/00001.png"):
            path = f"{kind}/{name}"
            assert (tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes()


def test_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    draw, calls = streets.draw, []

    def fail_third_call(*args):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(args)
        return draw(*args)

    monkeypatch.setattr(streets, "draw", fail_third_call)
    with pytest.raises(KeyboardInterrupt):
        streets.write(tmp_path / "scenes", 0, {"train": 3}, *SIZE)
    assert len(calls) == 2 and not list(tmp_path.iterdir())


def test_unwritable_folder_raises(tmp_path):
    (tmp_path / "file").touch()
    with raises_code("cache-unwritable", "scenes", "data.cache_dir"):
        streets.write(tmp_path / "file" / "scenes", 0, {"train": 1}, *SIZE)


def test_existing_folder_is_not_changed(tmp_path):
    (tmp_path / "scenes").mkdir()
    streets.write(tmp_path / "scenes", 0, {"train": 1}, *SIZE)
    assert not list((tmp_path / "scenes").iterdir())


def test_slower_of_two_writers_discards_its_files(tmp_path, monkeypatch):
    root, draw = tmp_path / "scenes", streets.draw

    def draw_while_another_finishes(*args):
        (root / "images").mkdir(parents=True, exist_ok=True)
        return draw(*args)

    monkeypatch.setattr(streets, "draw", draw_while_another_finishes)
    streets.write(root, 0, {"train": 1}, *SIZE)
    assert [p.name for p in tmp_path.iterdir()] == ["scenes"]
    assert [p.name for p in root.iterdir()] == ["images"]
