"""Split folders are found by any of the names that people give them, in both orders of folders."""

import itertools

import numpy as np
import pytest
from PIL import Image

from semiseg_jax.data import load, split_folders
from semiseg_jax.runtime.logger import capture_lines
from tests.conftest import tiny_folder_config
from tests.errors import raises_code

TRAIN = (
    *("train", "Train", "TRAIN", "training", "Training", "train2017", "train_set"),
    *("train_images", "01_train"),
)
EVALUATION = {
    "val": (
        *("val", "Val", "VAL", "valid", "Valid", "validation", "Validation", "val2017"),
        *("val_images", "Images-Val", "02_val"),
    ),
    "test": ("test", "Test", "testing", "Testing", "test_set", "test-imgs"),
}
# Where the images and masks of a split lie.
LAYOUTS = ("{kind}/{split}", "{split}/{kind}")
CASES = [
    (layout, train, evaluation, split)
    for (number, (split, evaluation)), layout in itertools.product(
        enumerate((s, name) for s, names in EVALUATION.items() for name in names), LAYOUTS
    )
    for train in (TRAIN[number % len(TRAIN)],)
]


def write_images(root, layout, counts):
    """Writes images and masks of two classes into the folders of the splits named in `counts`."""
    mask = np.zeros((12, 16), np.uint8)
    mask[4:] = 1
    for split, count in counts.items():
        for kind in ("images", "masks"):
            folder = root / layout.format(kind=kind, split=split)
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                name = f"{split.strip('.') or 'all'}_{number}.png"
                image = Image.fromarray(mask) if kind == "masks" else Image.new("RGB", (16, 12))
                image.save(folder / name)
    return root


def loaded(root, **changes):
    """Returns the data set, with all images with masks labelled, and the lines that are logged."""
    config = tiny_folder_config(root, root.parent / "cache")
    config.data.labels = 0.0
    config.data.classes = ("ground", "thing")
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    with capture_lines() as lines:
        return load.load_dataset(config), "\n".join(lines)


@pytest.mark.parametrize(("layout", "train", "evaluation", "split"), CASES)
def test_every_name_of_a_split_folder(tmp_path, layout, train, evaluation, split):
    root = write_images(tmp_path / "data", layout, {train: 3, evaluation: 2})
    data, lines = loaded(root, eval__split=split, data__holdout=0.5)
    assert [e.id.rpartition("_")[0] for e in data.labeled] == [train] * 3
    assert [e.id.rpartition("_")[0] for e in data.evaluation] == [evaluation] * 2
    assert not data.unlabeled and data.evaluated_on == split
    assert "Not read" not in lines


def test_masks_may_use_other_names_than_images(tmp_path):
    root = write_images(tmp_path / "data", LAYOUTS[0], {"training": 3, "validation": 2})
    (root / "masks/training").rename(root / "masks/Train")
    (root / "masks/validation").rename(root / "masks/val_labels")
    data, _ = loaded(root)
    assert len(data.labeled) == 3 and len(data.evaluation) == 2


def test_the_folder_of_the_exact_name_is_read_and_the_other_named(tmp_path):
    root = write_images(tmp_path / "data", LAYOUTS[0], {"train": 3, "val": 2, "valid": 4})
    data, lines = loaded(root)
    assert len(data.evaluation) == 2
    assert f"Not read: {root}/images/valid (4 images)" in lines


def test_two_other_names_of_a_split_are_refused(tmp_path):
    root = write_images(tmp_path / "data", LAYOUTS[0], {"train": 3, "valid": 2, "Val": 2})
    with raises_code("split-folders-ambiguous", "images/valid", "images/Val"):
        loaded(root)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("other", ["test", "Testing", "extra"])
def test_folders_that_are_not_read_are_named(tmp_path, layout, other):
    root = write_images(tmp_path / "data", layout, {"train": 6, other: 2})
    data, lines = loaded(root, data__holdout=0.5)
    assert len(data.labeled) + len(data.evaluation) == 6 and not data.unlabeled
    if layout == LAYOUTS[0] or other != "extra":
        assert f"Not read: {root}/{layout.format(kind='images', split=other)} (2 images)" in lines


@pytest.mark.parametrize("name", ["val", "Validation", "test", "testing"])
def test_evaluation_images_are_not_trained_on(tmp_path, name):
    """The folder of training images is the image folder itself."""
    root = write_images(tmp_path / "data", LAYOUTS[0], {".": 6, name: 2})
    data, lines = loaded(root, data__holdout=0.5)
    assert not [e for e in (*data.labeled, *data.unlabeled) if f"/{name}/" in e.image]
    evaluated = split_folders.split_of(name) == "val"
    assert (data.evaluated_on == "val") == evaluated
    assert (f"Not read: {root}/images/{name} (2 images)" in lines) == (not evaluated)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_split_beside_an_image_folder_of_training_images_is_named(tmp_path, layout):
    root = write_images(tmp_path / "data", layout, {"train": 6, "valid": 2})
    dirs = {f"data__{k}_dir": layout.format(kind=f"{k}s", split="train") for k in ("image", "mask")}
    data, lines = loaded(root, data__holdout=0.5, **dirs)
    assert data.evaluated_on == "holdout"
    assert f"Not read: {root}/{layout.format(kind='images', split='valid')} (2 images)" in lines


def test_images_beside_the_split_folders_are_named(tmp_path):
    root = write_images(tmp_path / "data", LAYOUTS[0], {"train": 3, "val": 2, ".": 4})
    _, lines = loaded(root)
    assert f"Not read: {root}/images (4 images)" in lines


def test_an_evaluation_list_decides_for_itself(tmp_path):
    root = write_images(tmp_path / "data", LAYOUTS[0], {".": 6, "test": 2})
    (root / "e.txt").write_text("test/test_0\ntest/test_1\n")
    data, lines = loaded(root, data__evaluation_list="e.txt")
    assert len(data.labeled) == 6 and len(data.evaluation) == 2 and "Not read" not in lines


@pytest.mark.parametrize(
    "name",
    ["trainer", "validity", "testimony", "street", "2017", "evaluate me", "train_masks", "test1"],
)
def test_other_names_are_no_splits(name):
    assert split_folders.split_of(name) == name
