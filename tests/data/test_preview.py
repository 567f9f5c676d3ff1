"""The sheets of the preview command, against the pixels of training."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from semiseg_jax import stages
from semiseg_jax.data import batch_layout, image_io, input_pipeline, load, preview, sda, visualize
from tests.conftest import tiny_config
from tests.errors import raises_code

ROOT = Path(__file__).parents[2]
PAD_VALUE = np.array([124, 116, 104], np.uint8)
SEED = np.array([5, 6])


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Returns a config of 8 noise images in two sizes, 4 of them labelled, and few operations."""
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
    return load.load_dataset(config)


PAPER_STREAMS = batch_layout.BatchSpec(("labeled",), ("pseudo",), 4, 4)


@pytest.fixture(scope="module")
def views(config, data):
    return preview.first_views(config, data, data.unlabeled, PAPER_STREAMS, SEED, PAD_VALUE, 5)


def test_views_equal_training_batches(config, data, views):
    """The 5 views of each stream are the 4 images of step 0 and the first image of step 1."""
    first, second = input_pipeline.train_batches(
        config, data, data.unlabeled, PAPER_STREAMS, SEED, range(2), PAD_VALUE
    )
    for stream, indices in (("weak", range(4)), ("strong", range(4, 8))):
        expected = [(first, i) for i in indices] + [(second, indices[0])]
        assert len(views[stream]) == 5
        for view, (batch, i) in zip(views[stream], expected, strict=True):
            assert view.example.id == batch.ids[i]
            np.testing.assert_array_equal(view.image, batch.image[i])
            np.testing.assert_array_equal(view.label, batch.label[i])


def test_listed_operations_reproduce_strong_view(views):
    """Applied in order to the view without SDA, the operations yield the strong view."""
    for view in views["strong"]:
        assert len(view.operations) == 3
        (top, left), (height, width) = view.geometry.offset.numpy(), view.geometry.valid.numpy()
        window = (slice(top, top + height), slice(left, left + width))
        image = view.without_sda[window]
        for name, magnitude in view.operations:
            image = sda.OPS[name].apply(image, **magnitude).numpy()
        np.testing.assert_array_equal(image, view.image[window])
    assert all(view.operations == [] for view in views["weak"])


def test_listed_geometry_reproduces_label(data, views):
    """Sampling the mask by the listed scale, crop and mirror yields the label of the view."""
    for view in views["weak"]:
        mask = image_io.read_mask(view.example.mask, data.table)
        g = view.geometry
        corner, valid, scaled = g.corner.numpy(), g.valid.numpy(), g.scaled.numpy()
        rows, columns = (np.arange(valid[axis]) + corner[axis] for axis in (0, 1))
        if g.mirrored:
            columns = scaled[1] - 1 - columns
        rows = ((rows + 0.5) * mask.shape[0] / scaled[0]).astype(int)
        columns = ((columns + 0.5) * mask.shape[1] / scaled[1]).astype(int)
        expected = np.full(view.label.shape, 255)
        top, left = g.offset.numpy()
        expected[top : top + len(rows), left : left + len(columns)] = mask[np.ix_(rows, columns)]
        np.testing.assert_array_equal(view.label, expected)
    scale = scaled[0] / len(mask)
    assert preview.describe_geometry(view).startswith(f"scale {scale:.2f}")


def contains(sheet, picture):
    """Returns whether the sheet contains the picture, pixel by pixel."""
    pixels = np.asarray(sheet)
    for y in range(len(pixels) - len(picture) + 1):
        x = pixels[y].tobytes().find(picture[0].tobytes()) // 3
        if x >= 0:
            window = pixels[y : y + len(picture), x : x + picture.shape[1]]
            if np.array_equal(window, picture):
                return True
    return False


def test_contact_sheet_contains_enlarged_views_and_overlays(data, views):
    sheet = preview.contact_sheet([("Weak", "", views["weak"][:2])], data, "title")
    factor = round(300 / 40)
    for view in views["weak"][:2]:
        for picture in (view.image, visualize.overlay(view.image, view.label, data.palette)):
            enlarged = np.kron(picture, np.ones((factor, factor, 1), np.uint8))
            assert contains(sheet, enlarged)
    other = np.kron(views["strong"][0].image, np.ones((factor, factor, 1), np.uint8))
    assert not contains(sheet, other)


def test_overlay_blends_class_colours_except_ignored_pixels():
    image = np.full((1, 3, 3), 100, np.uint8)
    blended = visualize.overlay(
        image, np.array([[0, 1, 255]], np.uint8), ((0, 0, 0), (200, 100, 0))
    )
    # 45 % of the image's colour and 55 % of the class's colour.
    assert blended.tolist() == [[[45, 45, 45], [155, 100, 45], [100, 100, 100]]]


@pytest.mark.parametrize(
    ("operation", "fraction", "caption"),
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
def test_describe_magnitude(operation, fraction, caption):
    magnitude = sda.OPS[operation].at_fraction(fraction, (0, 0))
    assert preview.describe_magnitude(magnitude) == caption


def test_operations_sheet_contains_each_operation(config, views):
    image = views["weak"][0].image
    sheet = preview.operations_sheet(image, config, "title")
    factor = round(230 / 40)
    for name in ("solarize", "multiply", "dropout"):
        number = list(sda.OPS).index(name)
        for fraction in (0, 0.5, 1):
            magnitude = sda.OPS[name].at_fraction(fraction, (number, 0))
            augmented = sda.OPS[name].apply(image, **magnitude).numpy()
            assert contains(sheet, np.kron(augmented, np.ones((factor, factor, 1), np.uint8)))


@pytest.mark.slow
def test_command_writes_both_sheets(config, tmp_path):
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


def test_missing_pseudo_labels_raise(config, tmp_path):
    with raises_code("pseudo-labels-incomplete", "4 of 4"):
        preview.make_sheets(config, "title", 1, str(tmp_path))


@pytest.mark.slow
def test_command_without_output_exits_with_error():
    command = [sys.executable, "-m", "semiseg_jax.data.preview", "--config=configs/streets.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "Say where the sheet goes, such as --output=preview.png." in done.stderr


def test_views_of_unlabelled_images_are_those_of_the_batches(config, data):
    config = config.copy_and_resolve_references()
    config.method.name = "unimatch_v2"
    config.train.batch_labeled, config.train.batch_unlabeled = 2, 4
    spec = stages.batch_spec(config, "student")
    shown = preview.first_unlabeled_views(config, data, spec, SEED, PAD_VALUE, 3)
    (batch,) = input_pipeline.train_batches(config, data, (), spec, SEED, range(1), PAD_VALUE)
    assert [views.id for views in shown] == list(batch.unlabeled_ids[:3])
    for views, images in zip(shown, batch.views, strict=False):
        assert views.names == ["weak view", "strong view 1", "strong view 2"]
        np.testing.assert_array_equal(views.images, images)
    sheet, _ = preview.make_sheets(config, "a title", 2)
    assert sheet.width > 3 * 40
