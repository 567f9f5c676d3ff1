"""Cityscapes and Pascal VOC from their archives: which files, and the class at every pixel."""

import numpy as np
import pytest
from PIL import Image

from semiseg_jax.data import cityscapes, labels, pascal_voc, pipeline, sources, streams
from semiseg_jax.errors import UserError
from tests.conftest import tiny_config
from tests.data import miniatures

COUNTS = {"train": 4, "val": 2, "test": 1, "train_extra": 2}


def config_for(name, root, tmp_path, **changes):
    return tiny_config(
        data__name=name,
        data__root=str(root),
        data__cache_dir=str(tmp_path / "cache"),
        **changes,
    )


def batch_without_geometry(config, data):
    """One step's labelled images as the network gets them, neither scaled nor cut, by id."""
    config.data.scale = (1.0, 1.0)
    config.data.mirror = False
    config.sda.num_ops = 0
    taken = streams.Streams(("labeled",), (), 8, 8)
    colour = np.zeros(3, np.uint8)
    made = pipeline.train_batches(config, data, (), taken, np.array((1, 2)), range(1), colour)
    (batch,) = list(made)
    return {id_: (batch.image[i], batch.label[i]) for i, id_ in enumerate(batch.ids)}


@pytest.mark.parametrize("kind", ["labelIds", "labelTrainIds"])
def test_cityscapes_class_at_every_pixel_of_a_batch(tmp_path, kind):
    root = miniatures.write_cityscapes(tmp_path / "cityscapes", COUNTS, kind)
    config = config_for("cityscapes", root, tmp_path, data__crop=(32, 64))
    data = sources.load(config)
    batch = batch_without_geometry(config, data)
    assert set(batch) == {f"aachen_{i:06d}_000019" for i in range(4)}
    for number in range(4):
        image, label = batch[f"aachen_{number:06d}_000019"]
        np.testing.assert_array_equal(image, miniatures.image(number, 32, 64))
        expected = miniatures.train_ids(miniatures.label_ids(number))
        np.testing.assert_array_equal(label, expected)


def test_cityscapes_takes_train_extra_for_its_images_alone(tmp_path):
    root = miniatures.write_cityscapes(tmp_path / "cityscapes", COUNTS)
    black = root / "leftImg8bit/train_extra/bamberg/troisdorf_000000_000073_leftImg8bit.png"
    black.write_bytes(miniatures.png(np.zeros((32, 64, 3), np.uint8)))
    config = config_for("cityscapes", root, tmp_path, data__labels=2.0)
    assert len(sources.load(config).unlabeled) == 2
    config.data.train_extra = True
    data = sources.load(config)
    assert [e.id for e in data.unlabeled[2:]] == ["bamberg_000000_000019", "bamberg_000001_000019"]
    assert all(e.mask is None for e in data.unlabeled)
    # With all training images labelled, train_extra is what is left: the paper's "Full".
    config.data.labels = 0.0
    data = sources.load(config)
    assert len(data.labeled) == 4
    assert [e.id for e in data.unlabeled] == ["bamberg_000000_000019", "bamberg_000001_000019"]


def test_cityscapes_lists_name_label_train_ids_that_are_not_there(tmp_path):
    root = miniatures.write_cityscapes(tmp_path / "cityscapes", COUNTS)
    line = "leftImg8bit/train/aachen/{0}_leftImg8bit.png gtFine/train/aachen/{0}_gtFine_{1}.png\n"
    ids = [f"aachen_{i:06d}_000019" for i in range(4)]
    (root / "labeled.txt").write_text("".join(line.format(i, "labelTrainIds") for i in ids[:2]))
    (root / "unlabeled.txt").write_text("\n".join(ids[2:]))
    config = config_for("cityscapes", root, tmp_path, data__labeled_list="labeled.txt")
    config.data.unlabeled_list = "unlabeled.txt"
    data = sources.load(config)
    assert [e.id for e in data.labeled] == ids[:2]
    assert [e.id for e in data.unlabeled] == ids[2:]
    mask = labels.read_mask(data.labeled[1].mask, data.table)
    np.testing.assert_array_equal(mask, miniatures.train_ids(miniatures.label_ids(1)))


def test_cityscapes_masks_of_both_kinds_and_neither_complete(tmp_path):
    root = miniatures.write_cityscapes(tmp_path / "cityscapes", COUNTS)
    one = root / "gtFine/train/aachen/aachen_000000_000019_gtFine_labelIds.png"
    one.rename(one.with_name("aachen_000000_000019_gtFine_labelTrainIds.png"))
    with pytest.raises(UserError, match=r"both labelIds and labelTrainIds .* complete one kind"):
        sources.load(config_for("cityscapes", root, tmp_path))


def test_cityscapes_table_and_colours():
    assert len(cityscapes.CLASSES) == len(cityscapes.PALETTE) == 19
    table = cityscapes.label_ids_table()
    expected = [miniatures.CITYSCAPES_TRAIN_IDS.get(i, 255) for i in range(34)]
    assert table[:34].tolist() == expected
    assert table[255] == 255 and (table[34:255] == labels.UNKNOWN).all()
    named = dict(zip(cityscapes.CLASSES, cityscapes.PALETTE, strict=True))
    assert named["road"] == (128, 64, 128) and named["bicycle"] == (119, 11, 32)
    assert named["train"] == (0, 80, 100) and cityscapes.CLASSES[16] == "train"


@pytest.mark.parametrize("sbd", ["mat", "png"])
def test_voc_class_at_every_pixel_of_a_batch(tmp_path, sbd):
    root = miniatures.write_voc(tmp_path / "voc", sbd)
    config = config_for("pascal_voc", root, tmp_path, data__crop=(40, 40))
    data = sources.load(config)
    everything = sorted({*miniatures.LISTED, *miniatures.SBD})
    val, train = miniatures.VOC_LISTS["val"], miniatures.VOC_LISTS["train"]
    assert [e.id for e in data.labeled] == sorted(set(everything) - set(val))
    assert [e.id for e in data.evaluation] == val
    batch = batch_without_geometry(config, data)
    for number, id_ in enumerate(everything):
        size = miniatures.voc_size(number)
        mask = miniatures.voc_mask if id_ in (*train, *val) else miniatures.sbd_mask
        expected = mask(number, *size)
        if id_ in val:
            evaluated = {e.id: e.mask for e in data.evaluation}
            np.testing.assert_array_equal(labels.read_mask(evaluated[id_], data.table), expected)
            continue
        _, label = batch[id_]
        # In the crop, the image stands where it was put; around it is padding.
        rows, columns = (np.flatnonzero((label != 255).any(axis)) for axis in (1, 0))
        held = label[rows[0] : rows[0] + size[0], columns[0] : columns[0] + size[1]]
        np.testing.assert_array_equal(held, expected)
        assert (label != 255).sum() == (expected != 255).sum()


def test_voc_alone_and_its_other_places(tmp_path):
    root = miniatures.write_voc(tmp_path / "voc", "png")
    config = config_for("pascal_voc", root, tmp_path, data__voc_augmented=False)
    assert [e.id for e in sources.load(config).labeled] == miniatures.VOC_LISTS["train"]
    # The folder that holds JPEGImages may be given as well, and lists lie below it.
    config.data.root = str(root / "VOCdevkit" / "VOC2012")
    config.data.voc_augmented = True
    config.data.labeled_list = "ImageSets/Segmentation/train.txt"
    data = sources.load(config)
    assert [e.id for e in data.labeled] == miniatures.VOC_LISTS["train"]
    assert [e.id for e in data.unlabeled] == ["2008_000002", "2008_000007", "2008_000008"]


def test_sbd_is_converted_once(tmp_path):
    root = miniatures.write_voc(tmp_path / "voc", "mat")
    config = config_for("pascal_voc", root, tmp_path)
    lines = []
    sources.load(config, lines.append)
    assert sum("masks of SBD are converted" in line for line in lines) == 1
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*.png")}
    assert len(before) == 5
    sources.load(config, lines.append)
    assert sum("masks of SBD are converted" in line for line in lines) == 1
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_a_damaged_mat_file_is_one_sentence(tmp_path):
    root = miniatures.write_voc(tmp_path / "voc", "mat")
    path = root / "benchmark_RELEASE/dataset/cls/2008_000002.mat"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match=r"2008_000002\.mat holds no GTcls\.Segmentation"):
        sources.load(config_for("pascal_voc", root, tmp_path))


def test_voc_colours_are_the_kits():
    assert len(pascal_voc.CLASSES) == 21
    assert [c for p in labels.generated_palette(21) for c in p] == miniatures.voc_palette(21)
    image = Image.fromarray(np.array([[20]], np.uint8))
    image.putpalette(miniatures.voc_palette(256))
    assert image.convert("RGB").getpixel((0, 0)) == (0, 64, 128)  # tvmonitor
