import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from semiseg_jax.data import labels, pictures, pipeline, preview, sda, sources, streams
from semiseg_jax.errors import UserError
from tests.conftest import tiny_config

ROOT = Path(__file__).parents[2]
COLOUR = np.array([124, 116, 104], np.uint8)
SEED = np.array([5, 6])


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Noise in two sizes, 4 of 8 images labelled with blocks of 3 classes; few operations."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for folder in ("images/train", "masks/train", "images/val", "masks/val"):
        (root / folder).mkdir(parents=True)
    for number in range(9):
        image = rng.integers(0, 256, (36 + 12 * (number % 2), 48, 3)).astype(np.uint8)
        mask = np.kron(rng.integers(0, 3, (6, 4)), np.ones((8, 12))).astype(np.uint8)
        split = "train" if number < 8 else "val"
        Image.fromarray(image).save(root / "images" / split / f"{number}.png")
        Image.fromarray(mask[: len(image)]).save(root / "masks" / split / f"{number}.png")
    return tiny_config(
        data__name="folder",
        data__root=str(root),
        data__cache_dir=str(root / "cache"),
        data__classes=("a", "b", "c"),
        data__labels=4.0,
        sda__ops=("multiply", "blur", "invert_channel", "noise_gau", "channel_shuffle"),
    )


@pytest.fixture(scope="module")
def data(config):
    return sources.load(config)


TAKEN = streams.Streams(("labeled",), ("pseudo",), 4, 4)


@pytest.fixture(scope="module")
def views(config, data):
    return preview.views(config, data, data.unlabeled, TAKEN, SEED, COLOUR, 5)


def test_shows_the_very_pixels_of_training(config, data, views):
    """5 views of either stream are the first step's 4 and one of the second."""
    made = pipeline.train_batches(config, data, data.unlabeled, TAKEN, SEED, range(2), COLOUR)
    first, second = list(made)
    for stream, places in (("weak", range(4)), ("strong", range(4, 8))):
        expected = [(first, place) for place in places] + [(second, places[0])]
        assert len(views[stream]) == 5
        for view, (batch, place) in zip(views[stream], expected, strict=True):
            assert view.example.id == batch.ids[place]
            np.testing.assert_array_equal(view.image, batch.image[place])
            np.testing.assert_array_equal(view.label, batch.label[place])


def test_names_the_operations_that_made_a_strong_view(views):
    """Those it names, one after the other, turn the plain view into the strong one."""
    for view in views["strong"]:
        assert len(view.operations) == 3
        (top, left), (height, width) = view.geometry.place.numpy(), view.geometry.valid.numpy()
        window = (slice(top, top + height), slice(left, left + width))
        image = view.without_sda[window]
        for name, magnitude in view.operations:
            image = sda.OPS[name].apply(image, **magnitude).numpy()
        np.testing.assert_array_equal(image, view.image[window])
    assert all(view.operations == [] for view in views["weak"])


def test_names_the_geometry_of_a_view(data, views):
    """Each label of a view is the one that the named scale, crop and mirror point at."""
    for view in views["weak"]:
        mask = labels.read_mask(view.example.mask, data.table)
        g = view.geometry
        corner, valid, scaled = g.corner.numpy(), g.valid.numpy(), g.scaled.numpy()
        rows, columns = (np.arange(valid[axis]) + corner[axis] for axis in (0, 1))
        if g.mirrored:
            columns = scaled[1] - 1 - columns
        rows = ((rows + 0.5) * mask.shape[0] / scaled[0]).astype(int)
        columns = ((columns + 0.5) * mask.shape[1] / scaled[1]).astype(int)
        expected = np.full(view.label.shape, 255)
        top, left = g.place.numpy()
        expected[top : top + len(rows), left : left + len(columns)] = mask[np.ix_(rows, columns)]
        np.testing.assert_array_equal(view.label, expected)
    scale = scaled[0] / len(mask)
    assert preview.describe_geometry(view).startswith(f"scale {scale:.2f}")


def found_in(sheet, picture):
    """Whether `picture` stands somewhere in the sheet, pixel by pixel."""
    pixels = np.asarray(sheet)
    for y in range(len(pixels) - len(picture) + 1):
        x = pixels[y].tobytes().find(picture[0].tobytes()) // 3
        if x >= 0:
            window = pixels[y : y + len(picture), x : x + picture.shape[1]]
            if np.array_equal(window, picture):
                return True
    return False


def test_a_sheet_holds_views_and_their_labels_enlarged_by_whole_pixels(data, views):
    sheet = preview.contact_sheet([("Weak", "", views["weak"][:2])], data, "title")
    factor = round(300 / 40)
    for view in views["weak"][:2]:
        for picture in (view.image, pictures.overlay(view.image, view.label, data.palette)):
            enlarged = np.kron(picture, np.ones((factor, factor, 1), np.uint8))
            assert found_in(sheet, enlarged)
    other = np.kron(views["strong"][0].image, np.ones((factor, factor, 1), np.uint8))
    assert not found_in(sheet, other)


def test_an_overlay_mixes_class_colours_and_leaves_unlabelled_pixels():
    image = np.full((1, 3, 3), 100, np.uint8)
    mixed = pictures.overlay(image, np.array([[0, 1, 255]], np.uint8), ((0, 0, 0), (200, 100, 0)))
    # 45 % of the image and 55 % of the class's colour.
    assert mixed.tolist() == [[[45, 45, 45], [155, 100, 45], [100, 100, 100]]]


@pytest.mark.parametrize(
    ("operation", "share", "described"),
    [
        ("blur", 0.5, "sigma 1.25"),
        ("brightness_channel", 0, "v -20"),
        ("invert_channel", 0.5, "R G"),
        ("channel_shuffle", 1, "RGB from BGR"),
        ("coarse_dropout", 1, "p 0.20, 16x16 cells"),
        ("jpeg_compression", 0, "quality 7"),
        ("equalize", 0, ""),
    ],
)
def test_magnitudes_in_words(operation, share, described):
    magnitude = sda.OPS[operation].at(share, (0, 0))
    assert preview.describe_magnitude(magnitude) == described


def test_operations_sheet_shows_each_at_both_ends_and_the_middle(config, views):
    image = views["weak"][0].image
    sheet = preview.operations_sheet(image, config, "title")
    factor = round(230 / 40)
    for name in ("solarize", "multiply", "dropout"):
        number = list(sda.OPS).index(name)
        for share in (0, 0.5, 1):
            changed = sda.OPS[name].apply(image, **sda.OPS[name].at(share, (number, 0))).numpy()
            assert found_in(sheet, np.kron(changed, np.ones((factor, factor, 1), np.uint8)))


def test_the_command_writes_both_sheets(config, tmp_path):
    data = config.data
    command = [sys.executable, "-m", "semiseg_jax.data.preview", "--config=configs/default.py"]
    command += [f"--config.data.{k}={data[k]}" for k in ("root", "cache_dir", "classes", "labels")]
    command += [
        "--config.data.crop=(32,40)",
        "--config.sda.ops=('blur',)",
        "--images=2",
        f"--output={tmp_path}/sheet.png",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for name in ("sheet.png", "sheet_operations.png"):
        assert f"{tmp_path}/{name}" in done.stdout
        with Image.open(tmp_path / name) as sheet:
            assert sheet.width > 800


def test_pseudo_labels_that_are_not_there_are_one_sentence(config, tmp_path):
    with pytest.raises(UserError, match=r"has no label map of 4 of 4 unlabelled images, \d first"):
        preview.make_sheets(config, "title", 1, str(tmp_path))


@pytest.mark.slow
def test_without_a_file_to_write_it_says_so():
    command = [sys.executable, "-m", "semiseg_jax.data.preview", "--config=configs/streets.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "Say where the sheet goes, such as --output=preview.png." in done.stderr
