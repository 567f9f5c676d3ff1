"""Invalid data ends the command with one sentence, before anything is written to the workdir."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests import mains
from tests.data import miniatures

CONFIGS = Path(__file__).parents[1] / "configs"
PAIR = "images/train/{0:03d}.png masks/train/{0:03d}.png\n"


def refused(monkeypatch, tmp_path, config, *overrides):
    """Runs the command; returns its one-line error after checking that it wrote nothing."""
    sentence = mains.refused(
        monkeypatch,
        f"--config={CONFIGS / config}",
        f"--workdir={tmp_path / 'run'}",
        f"--config.data.cache_dir={tmp_path / 'cache'}",
        *mains.TINY,
        *overrides,
    )
    assert not (tmp_path / "run").exists()
    assert sentence.startswith("Error: ") and "\n" not in sentence
    return sentence.replace(str(tmp_path), "")


def write_list(root, name, content):
    (root / name).write_text(content)
    return f"--config.data.{name.removesuffix('.txt')}_list={name}"


def no_folder(root):
    return ["--config.data.root=/nowhere"]


def no_list(root):
    return ["--config.data.labeled_list=none.txt"]


def empty_list(root):
    return [write_list(root, "labeled.txt", "\n")]


def no_mask(root):
    return [write_list(root, "labeled.txt", "images/train/000.png None\n")]


def missing_mask(root):
    return [write_list(root, "labeled.txt", "images/train/000.png masks/train/999.png\n")]


def mask_of_another_size(root):
    Image.fromarray(np.zeros((10, 12), np.uint8)).save(root / "masks/train/000.png")
    return [write_list(root, "labeled.txt", PAIR.format(0))]


def mask_not_rotated(root):
    """An image with an EXIF rotation, whose mask is not rotated."""
    exif = Image.Exif()
    exif[0x0112] = 6
    path = root / "images/train/001.png"
    Image.open(path).save(path.with_suffix(".jpg"), exif=exif)
    path.unlink()
    return ["--config.data.labels=0.0"]


def unknown_value(root):
    mask = np.asarray(Image.open(root / "masks/train/000.png"))
    Image.fromarray(np.where(mask == 2, 9, mask).astype(np.uint8)).save(
        root / "masks/train/000.png"
    )
    return ["--config.data.labels=0.0"]


def binary_masks(root):
    for path in (root / "masks/train").iterdir():
        mask = np.asarray(Image.open(path))
        Image.fromarray(np.where(mask == 1, 255, 0).astype(np.uint8)).save(path)
    return ["--config.data.ignore_ids=()"]


def coloured_mask(root):
    path = root / "masks/train/000.png"
    Image.open(path).convert("RGB").save(path)
    return ["--config.data.labels=0.0"]


def corrupt_image(root):
    (root / "images/train/000.png").write_bytes(b"not an image")
    return [write_list(root, "labeled.txt", PAIR.format(0) + PAIR.format(1))]


def truncated_image(root):
    """Its header is sound."""
    path = root / "images/train/001.png"
    path.write_bytes(path.read_bytes()[:-40])
    return [write_list(root, "labeled.txt", PAIR.format(0) + PAIR.format(1))]


def corrupt_mask(root):
    path = root / "masks/val/000.png"
    path.write_bytes(path.read_bytes()[:-30])
    return []


def sixteen_bits(root):
    Image.fromarray(np.full((36, 48), 4000, np.uint16)).save(root / "images/train/004.png")
    return [write_list(root, "labeled.txt", PAIR.format(0) + PAIR.format(1))]


def labelled_in_evaluation(root):
    return [
        write_list(root, "labeled.txt", PAIR.format(0) + PAIR.format(1)),
        write_list(root, "evaluation.txt", PAIR.format(0)),
    ]


def unlabelled_in_evaluation(root):
    return [
        write_list(root, "labeled.txt", PAIR.format(0)),
        write_list(root, "unlabeled.txt", PAIR.format(1)),
        write_list(root, "evaluation.txt", PAIR.format(1)),
    ]


def labelled_and_unlabelled(root):
    return [
        write_list(root, "labeled.txt", PAIR.format(0) + PAIR.format(1)),
        write_list(root, "unlabeled.txt", PAIR.format(1) + PAIR.format(2)),
    ]


def labelled_twice(root):
    return [write_list(root, "labeled.txt", PAIR.format(0) + PAIR.format(0))]


def too_many(root):
    return ["--config.data.labels=13"]


def all_images_held_out(root):
    (root / "images/val").rename(root / "elsewhere")
    return ["--config.data.holdout=1.0"]


def no_evaluation_image(root):
    (root / "images/val").rename(root / "elsewhere")
    return []


def select_without_every(root):
    return ["--config.eval.select=reported"]


def select_without_holdout(root):
    return ["--config.eval.select=holdout", "--config.eval.every=1"]


def select_on_reported_images(root):
    (root / "images/val").rename(root / "elsewhere")
    return [*select_without_holdout(root), "--config.data.holdout=0.25"]


def same_names(root):
    Image.new("RGB", (48, 36)).save(root / "images/train/001.jpg")
    return []


def bad_id_map(root):
    return ["--config.data.id_map=((0,0),(1,9))"]


def no_unlabelled_image(root):
    (root / "more").mkdir()
    return ["--config.data.unlabeled_dir=more"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (no_folder, "The data folder /nowhere is missing: make it, with the images in one folder"),
        (no_list, "The split list none.txt is missing: give a file that exists."),
        (empty_list, "/labeled.txt is empty: give one with at least one image."),
        (no_mask, "/images/train/000.png has no mask: add one, or take it out of its list."),
        (missing_mask, "/masks/train/999.png is missing: restore it or take it out of its list."),
        (mask_of_another_size, "000.png is 12x10: they must be of one size."),
        (mask_not_rotated, "as its EXIF orientation says, and its mask must be too"),
        (unknown_value, "000.png holds the values 9, which are neither a class nor ignored: give "),
        (binary_masks, "map 255 to class 1 with '--config.data.id_map=((0,0),(255,1))'"),
        (
            coloured_mask,
            "(0, 255, 0) in 958 pixels, (1, 254, 0) in 638 pixels, (255, 0, 127) in 72",
        ),
        (corrupt_image, "000.png is not an image ("),
        (truncated_image, "001.png cannot be decoded ("),
        (corrupt_mask, "000.png cannot be decoded ("),
        (sixteen_bits, "004.png has more than 8 bits a channel (mode I;16B): convert it to 8 bits"),
        (labelled_in_evaluation, "000.png is labelled and also in the evaluation set: take it out"),
        (unlabelled_in_evaluation, "001.png is unlabelled and also in the evaluation set: take it"),
        (
            labelled_and_unlabelled,
            "001.png is labelled and unlabelled: take it out of one list, or",
        ),
        (labelled_twice, "000 is labelled twice: list every image once."),
        (too_many, "data.labels=13 asks for 13 of 12 training images: give a count from 2 to 12"),
        (all_images_held_out, "data.holdout=1 holds out all 12 images with masks: lower it."),
        (no_evaluation_image, "There is no evaluation image: give data.evaluation_list, a fol"),
        (select_without_every, "eval.select is reported and eval.every 0: say how many steps"),
        (
            select_without_holdout,
            "eval.select is holdout and data.holdout 0: say how many labelled",
        ),
        (select_on_reported_images, "the images of data.holdout are those that are reported"),
        (same_names, "001.png have the same name: rename one of them, or say with data.image_"),
        (bad_id_map, "makes mask value 1 class 9: mask values are 0 to 255 and class ids 0 to"),
        (no_unlabelled_image, "/more holds no image: put the unlabelled images there."),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_folder(folder_data, tmp_path, monkeypatch, change, sentence):
    message = refused(
        monkeypatch,
        tmp_path,
        "folder.py",
        f"--config.data.root={folder_data}",
        "--config.data.classes=('ground','thing','corner')",
        "--config.data.labels=4.0",
        "--config.data.holdout=0.0",
        *change(folder_data),
    )
    assert sentence in message, message


CITYSCAPES = {"train": 2, "val": 1}
VAL = "val/frankfurt/frankfurt_000000_000019"


@pytest.mark.parametrize(
    ("argument", "remove", "sentence"),
    [
        ("--config.eval.split=test", "", "eval.split is test, but the labels of Cityscapes' test"),
        ("--config.data.train_extra=True", "", "leftImg8bit/train_extra is missing: extract the"),
        ("--config.data.labels=0.0", "", "There is no unlabelled image: give data.unlabeled_list"),
        ("--config.data.labels=2.0", f"gtFine/{VAL}_gtFine_labelIds.png",
         "frankfurt_000000_000019_leftImg8bit.png has no mask: add one"),
    ],
)  # fmt: skip
def test_cityscapes(tmp_path, monkeypatch, argument, remove, sentence):
    root = miniatures.write_cityscapes(tmp_path / "cityscapes", CITYSCAPES)
    if remove:
        (root / remove).unlink()
    message = refused(
        monkeypatch, tmp_path, "cityscapes.py", f"--config.data.root={root}", argument
    )
    assert sentence in message, message


@pytest.mark.parametrize(
    ("remove", "sentence"),
    [
        ("VOCdevkit", "holds neither VOCdevkit/VOC2012 nor JPEGImages: extract VOCtrainval_11-May"),
        ("benchmark_RELEASE", "or train on VOC's own 1,464 masks with data.voc_augmented=False."),
        ("VOCdevkit/VOC2012/ImageSets", "ImageSets/Segmentation/train.txt is missing: give a file"),
        ("VOCdevkit/VOC2012/JPEGImages/2008_000002.jpg", "2008_000002.jpg is missing: restore it"),
    ],
)
def test_pascal_voc(tmp_path, monkeypatch, remove, sentence):
    root = miniatures.write_voc(tmp_path / "voc")
    (root / remove).rename(tmp_path / "removed")
    message = refused(monkeypatch, tmp_path, "pascal_voc.py:voc", f"--config.data.root={root}")
    assert sentence in message, message


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["cityscapes.py:1_3"],
            "is '1_3': make it one of xception65, dinov2_s, dinov2_b, 1_30, 1_8, 1_4, 1_2, full",
        ),
        (
            ["pascal_voc.py:vgg,1_8"],
            "is 'vgg': make it one of resnet101, xception65, dinov2_s, dinov2_b, 1_1",
        ),
        (
            ["folder.py", "--config.data.name=cityscape"],
            "data.name is 'cityscape': make it one of streets, camvid, cityscapes, pascal_voc, "
            "folder, or tfds:NAME (did you mean cityscapes?)",
        ),
        (
            ["folder.py", "--config.data.name=tfds:oxford_iiit_pet"],
            "oxford_iiit_pet is not prepared in ",
        ),
        (
            ["folder.py", "--config.data.name=tfds:oxford_pets"],
            "data.name=tfds:oxford_pets is not known to TFDS (",
        ),
        (
            ["folder.py", "--config.data.name=tfds:cityscapes/semantic_segmentation"],
            "you must download 'leftImg8bit_trainvaltest.zip' and 'gtFine_trainvaltest.zip'",
        ),
        # Rejected before anything is downloaded.
        (
            ["folder.py", "--config.data.name=tfds:voc/2012"],
            "tfds:voc has no feature segmentation_mask: set data.tfds_mask to one of image, ",
        ),
        (
            ["folder.py", "--config.data.name=tfds:cityscapes/semantic_segmentation_extra"],
            "are coarse: set data.name=tfds:cityscapes/semantic_segmentation, and data.train_extra",
        ),
    ],
)
def test_data_set_names(tmp_path, monkeypatch, arguments, sentence):
    config, *overrides = arguments
    message = refused(monkeypatch, tmp_path, config, f"--config.data.root={tmp_path}", *overrides)
    assert sentence in message, message
