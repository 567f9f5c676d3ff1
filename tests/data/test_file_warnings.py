"""What training and the doctor say about files, through the functions that they call."""

import os

import numpy as np
import pytest
from PIL import ExifTags, Image

from semiseg_jax.data import image_header, load, splits
from semiseg_jax.runtime.logger import capture_lines
from tests.errors import raises_code


@pytest.fixture
def reset_limit():
    yield
    image_header.set_max_pixels(image_header.DEFAULT_MAX_PIXELS)


def turn_by_exif(path, orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.open(path).save(path, exif=exif)


def make_pages(path):
    image = Image.open(path)
    image.save(path, "TIFF", save_all=True, append_images=[image])


def make_bitmap_of_white_zeros(path):
    """Rewrites a mask as a TIFF of one bit, in which 0 is white, of an unknown program."""
    mask = np.asarray(Image.open(path)) == 1
    tags = {ExifTags.Base.PhotometricInterpretation: 0}
    Image.fromarray(mask).save(path, "TIFF", tiffinfo=tags)


@pytest.mark.parametrize(
    ("change", "files", "fragment"),
    [
        (lambda path: turn_by_exif(path, 3), "images", "EXIF orientation and the mask none"),
        (make_pages, "images", "only the first is read"),
        (make_pages, "masks", "only the first is read"),
        (make_bitmap_of_white_zeros, "masks", "0 is declared to be white"),
    ],
)
def test_training_and_the_doctor_warn_once(folder_config, folder_data, change, files, fragment):
    folder_config.data.labels = 0.0
    paths = sorted((folder_data / files / "train").iterdir())[:3]
    with capture_lines() as lines:
        load.load_dataset(folder_config)
    assert not [line for line in lines if fragment in line]
    for path in paths:
        change(path)
    with capture_lines() as lines:
        load.load_dataset(folder_config)
    (line,) = [line for line in lines if fragment in line]
    assert line.startswith("Warning: 3 ") and os.fspath(paths[0]) in line
    (warning,) = [w for w in splits.examine_config(folder_config).warnings if fragment in w]
    assert f"Warning: {warning}" == line


def test_the_key_sets_the_limit_of_training_and_the_doctor(folder_config, folder_data, reset_limit):
    height, width = np.asarray(Image.open(folder_data / "images/val/000.png")).shape[:2]
    folder_config.data.max_image_pixels = height * width
    load.load_dataset(folder_config)
    folder_config.data.max_image_pixels -= 1
    with raises_code("image-too-large", "data.max_image_pixels"):
        load.load_dataset(folder_config)
    errors = splits.examine_config(folder_config).errors
    assert any("pixels that are decoded" in error for error in errors)
