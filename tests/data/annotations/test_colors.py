"""Masks in colour with a list of their colours, as CVAT exports "Segmentation mask 1.1"."""

import numpy as np
import pytest
from PIL import Image

from semiseg_jax.data.annotations import detect
from tests.data.annotations import folders
from tests.errors import raises_code

ROAD, CAR, NONE = (10, 20, 30), (250, 0, 0), (0, 0, 0)
LIST = "# label:color_rgb:parts:actions\nbackground:0,0,0::\ncar:250,0,0::\nroad:10,20,30::\n"
# A row each of road, car and background; the car has a hole of road.
PIXELS = np.array([[ROAD] * 4, [CAR, CAR, ROAD, CAR], [NONE] * 4], np.uint8)
IDS = [[2, 2, 2, 2], [1, 1, 2, 1], [0, 0, 0, 0]]


@pytest.fixture
def exported(tmp_path):
    """Three images in two splits, one of them without a mask."""
    folder = tmp_path / "in"
    folders.write_text(folder / "labelmap.txt", LIST)
    for name in ("a", "deep/b", "c"):
        folders.write_image(folder / "JPEGImages" / f"{name}.jpg", (4, 3), level=len(name))
    for name, mode in (("a", "RGB"), ("deep/b", "P")):
        path = folder / "SegmentationClass" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(PIXELS).convert(mode, palette=Image.Palette.ADAPTIVE).save(path)
    folders.write_text(folder / "ImageSets/Segmentation/train.txt", "a\nc\n")
    folders.write_text(folder / "ImageSets/Segmentation/val.txt", "deep/b\n")
    folders.write_text(folder / "ImageSets/Segmentation/trainval.txt", "a\nc\ndeep/b\n")
    return folder


def test_colors_become_classes_and_lists_become_splits(tmp_path, exported):
    done = folders.convert(exported, tmp_path / "out")
    assert done.classes == ("background", "car", "road")
    assert done.images == {"labeled": 1, "unlabeled": 1, "val": 1}
    assert folders.read_mask(tmp_path / "out/masks/train/a.png").tolist() == IDS
    assert folders.read_mask(tmp_path / "out/masks/val/deep/b.png").tolist() == IDS
    assert (done.counts.contested, done.counts.uncovered) == (0, 0)
    assert detect.read(exported, "colors")[0] == detect.read(exported)[0] == "colors"


def test_colors_that_are_not_listed_are_refused(tmp_path, exported):
    pixels = PIXELS.copy()
    pixels[0, 0] = (9, 9, 9)
    mask = exported / "SegmentationClass/a.png"
    Image.fromarray(pixels).save(mask)
    with raises_code("mask-colors-not-in-label-map", str(mask), "labelmap.txt"):
        folders.convert(exported, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("car\n", "line 1 that is not"),
        ("car:1,2\n", "line 1 that is not"),
        ("\ncar:256,0,0::\n", "line 2 with a colour above 255"),
        ("car:1,2,3::\nbus:1,2,3::\n", "line 2 whose label or colour"),
        ("car:1,2,3::\ncar:3,2,1::\n", "line 2 whose label or colour"),
        ("# nothing\n", "0 labels"),
        ("".join(f"c{i}:{i},0,{j}::\n" for i in range(128) for j in (0,)) * 2, "line 129"),
    ],
)
def test_malformed_lists_are_refused(exported, text, problem):
    folders.write_text(exported / "labelmap.txt", text)
    with raises_code("annotations-malformed", "labelmap.txt", problem):
        detect.read(exported)


def test_a_list_without_masks_is_refused(tmp_path):
    folders.write_text(tmp_path / "labelmap.txt", LIST)
    with raises_code("annotations-malformed", "no masks in a folder SegmentationClass"):
        detect.read(tmp_path)
