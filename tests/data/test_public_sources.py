"""Cityscapes and Pascal VOC from their archives: the files in use, and the class of every pixel."""

import os
import time

import numpy as np
import pytest
from PIL import Image

from semiseg_jax.data import batch_layout, image_io, input_pipeline, load
from semiseg_jax.data.sources import cityscapes, pascal_voc
from semiseg_jax.runtime.logger import capture_lines
from tests.conftest import tiny_config
from tests.data import miniatures
from tests.errors import raises_code

COUNTS = {"train": 4, "val": 2, "test": 1, "train_extra": 2}


def config_for(name, root, tmp_path, **changes):
    return tiny_config(
        data__name=name,
        data__root=str(root),
        data__cache_dir=str(tmp_path / "cache"),
        **changes,
    )


def batch_without_geometry(config, data):
    """Returns image and label of each image of a training batch by id, not scaled or cropped."""
    config.data.scale = (1.0, 1.0)
    config.data.mirror = False
    config.sda.num_ops = 0
    weak_only = batch_layout.BatchSpec(("labeled",), (), 8, 8)
    seed, pad_value = np.array((1, 2)), np.zeros(3, np.uint8)
    (batch,) = input_pipeline.train_batches(config, data, (), weak_only, seed, range(1), pad_value)
    return {id_: (batch.image[i], batch.label[i]) for i, id_ in enumerate(batch.ids)}


@pytest.mark.parametrize("kind", ["labelIds", "labelTrainIds"])
def test_cityscapes_class_at_every_pixel_of_a_batch(tmp_path, kind):
    root = miniatures.write_cityscapes(tmp_path / "cityscapes", COUNTS, kind)
    config = config_for("cityscapes", root, tmp_path, data__crop=(32, 64))
    data = load.load_dataset(config)
    batch = batch_without_geometry(config, data)
    assert set(batch) == {f"aachen_{i:06d}_000019" for i in range(4)}
    for number in range(4):
        image, label = batch[f"aachen_{number:06d}_000019"]
        np.testing.assert_array_equal(image, miniatures.image(number, 32, 64))
        expected = miniatures.train_ids(miniatures.label_ids(number))
        np.testing.assert_array_equal(label, expected)


def test_cityscapes_uses_only_images_of_train_extra(tmp_path):
    root = miniatures.write_cityscapes(tmp_path / "cityscapes", COUNTS)
    black = root / "leftImg8bit/train_extra/bamberg/troisdorf_000000_000073_leftImg8bit.png"
    black.write_bytes(miniatures.png(np.zeros((32, 64, 3), np.uint8)))
    config = config_for("cityscapes", root, tmp_path, data__labels=2.0)
    assert len(load.load_dataset(config).unlabeled) == 2
    config.data.train_extra = True
    data = load.load_dataset(config)
    assert [e.id for e in data.unlabeled[2:]] == ["bamberg_000000_000019", "bamberg_000001_000019"]
    assert all(e.mask is None for e in data.unlabeled)
    # With all training images labelled, only train_extra is unlabelled: the paper's "Full".
    config.data.labels = 0.0
    data = load.load_dataset(config)
    assert len(data.labeled) == 4
    assert [e.id for e in data.unlabeled] == ["bamberg_000000_000019", "bamberg_000001_000019"]


def test_cityscapes_list_may_name_missing_label_train_ids(tmp_path):
    root = miniatures.write_cityscapes(tmp_path / "cityscapes", COUNTS)
    line = "leftImg8bit/train/aachen/{0}_leftImg8bit.png gtFine/train/aachen/{0}_gtFine_{1}.png\n"
    ids = [f"aachen_{i:06d}_000019" for i in range(4)]
    (root / "labeled.txt").write_text("".join(line.format(i, "labelTrainIds") for i in ids[:2]))
    (root / "unlabeled.txt").write_text("\n".join(ids[2:]))
    config = config_for("cityscapes", root, tmp_path, data__labeled_list="labeled.txt")
    config.data.unlabeled_list = "unlabeled.txt"
    data = load.load_dataset(config)
    assert [e.id for e in data.labeled] == ids[:2]
    assert [e.id for e in data.unlabeled] == ids[2:]
    mask = image_io.read_mask(data.labeled[1].mask, data.table)
    np.testing.assert_array_equal(mask, miniatures.train_ids(miniatures.label_ids(1)))


def test_cityscapes_with_two_incomplete_mask_kinds_raises(tmp_path):
    root = miniatures.write_cityscapes(tmp_path / "cityscapes", COUNTS)
    mask = root / "gtFine/train/aachen/aachen_000000_000019_gtFine_labelIds.png"
    mask.rename(mask.with_name("aachen_000000_000019_gtFine_labelTrainIds.png"))
    with raises_code("cityscapes-masks-incomplete", "gtFine_labelTrainIds"):
        load.load_dataset(config_for("cityscapes", root, tmp_path))


def test_cityscapes_id_table_and_colours():
    assert len(cityscapes.CLASSES) == len(cityscapes.PALETTE) == 19
    table = cityscapes.label_ids_table()
    expected = [miniatures.CITYSCAPES_TRAIN_IDS.get(i, 255) for i in range(34)]
    assert table[:34].tolist() == expected
    assert table[255] == 255 and (table[34:255] == image_io.UNKNOWN).all()
    colours = dict(zip(cityscapes.CLASSES, cityscapes.PALETTE, strict=True))
    assert colours["road"] == (128, 64, 128) and colours["bicycle"] == (119, 11, 32)
    assert colours["train"] == (0, 80, 100) and cityscapes.CLASSES[16] == "train"


@pytest.mark.parametrize("sbd", ["mat", "png"])
def test_voc_class_at_every_pixel_of_a_batch(tmp_path, sbd):
    root = miniatures.write_voc(tmp_path / "voc", sbd)
    config = config_for("pascal_voc", root, tmp_path, data__crop=(40, 40))
    data = load.load_dataset(config)
    all_ids = sorted({*miniatures.LISTED, *miniatures.SBD})
    val, train = miniatures.VOC_LISTS["val"], miniatures.VOC_LISTS["train"]
    assert [e.id for e in data.labeled] == sorted(set(all_ids) - set(val))
    assert [e.id for e in data.evaluation] == val
    batch = batch_without_geometry(config, data)
    for number, id_ in enumerate(all_ids):
        size = miniatures.voc_size(number)
        mask = miniatures.voc_mask if id_ in (*train, *val) else miniatures.sbd_mask
        expected = mask(number, *size)
        if id_ in val:
            masks = {e.id: e.mask for e in data.evaluation}
            np.testing.assert_array_equal(image_io.read_mask(masks[id_], data.table), expected)
            continue
        _, label = batch[id_]
        # Padding surrounds the image at a random offset in the crop.
        rows, columns = (np.flatnonzero((label != 255).any(axis)) for axis in (1, 0))
        unpadded = label[rows[0] : rows[0] + size[0], columns[0] : columns[0] + size[1]]
        np.testing.assert_array_equal(unpadded, expected)
        assert (label != 255).sum() == (expected != 255).sum()


def test_voc_without_sbd_and_with_inner_root(tmp_path):
    root = miniatures.write_voc(tmp_path / "voc", "png")
    config = config_for("pascal_voc", root, tmp_path, data__voc_augmented=False)
    assert [e.id for e in load.load_dataset(config).labeled] == miniatures.VOC_LISTS["train"]
    # The root may also be the folder of JPEGImages; lists are then relative to it.
    config.data.root = str(root / "VOCdevkit" / "VOC2012")
    config.data.voc_augmented = True
    config.data.labeled_list = "ImageSets/Segmentation/train.txt"
    data = load.load_dataset(config)
    assert [e.id for e in data.labeled] == miniatures.VOC_LISTS["train"]
    assert [e.id for e in data.unlabeled] == ["2008_000002", "2008_000007", "2008_000008"]


def test_sbd_is_converted_once(tmp_path):
    root = miniatures.write_voc(tmp_path / "voc", "mat")
    config = config_for("pascal_voc", root, tmp_path)
    with capture_lines() as lines:
        load.load_dataset(config)
    assert sum("masks of SBD are converted" in line for line in lines) == 1
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*.png")}
    assert len(before) == 5
    with capture_lines() as lines:
        load.load_dataset(config)
    assert not any("masks of SBD are converted" in line for line in lines)
    assert {p: p.stat().st_mtime_ns for p in before} == before
    # A corrected mask under the old name, with the old time of modification.
    changed = root / "benchmark_RELEASE/dataset/cls/2008_000008.mat"
    times = changed.stat()
    time.sleep(0.02)
    miniatures.write_sbd_mask(root, "2008_000008", np.full((32, 40), 7, np.uint8), "mat")
    os.utime(changed, ns=(times.st_atime_ns, times.st_mtime_ns))
    (example,) = (e for e in load.load_dataset(config).labeled if e.id == "2008_000008")
    assert (image_io.read_mask(example.mask, image_io.id_table(21)) == 7).all()
    assert sum(p.stat().st_mtime_ns != before[p] for p in before) == 1


def test_damaged_mat_file_raises(tmp_path):
    root = miniatures.write_voc(tmp_path / "voc", "mat")
    path = root / "benchmark_RELEASE/dataset/cls/2008_000002.mat"
    path.write_bytes(path.read_bytes()[:200])
    with raises_code("sbd-mask-malformed", "2008_000002.mat"):
        load.load_dataset(config_for("pascal_voc", root, tmp_path))


def test_voc_palette_equals_devkit():
    assert len(pascal_voc.CLASSES) == 21
    assert [c for p in image_io.generated_palette(21) for c in p] == miniatures.voc_palette(21)
    image = Image.fromarray(np.array([[20]], np.uint8))
    image.putpalette(miniatures.voc_palette(256))
    assert image.convert("RGB").getpixel((0, 0)) == (0, 64, 128)  # tvmonitor
