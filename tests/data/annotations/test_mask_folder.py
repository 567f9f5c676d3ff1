"""Folders as tools export them become folders that `configs/folder.py` reads."""

import base64
import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image, ImageOps

from configs import folder as folder_config
from semiseg_jax.data import load, split_lists
from semiseg_jax.data.annotations import mask_folder
from semiseg_jax.data.sources import folder as folder_source
from tests.data.annotations import folders
from tests.data.annotations.folders import HOLE, SQUARE, SQUARE_DRAWN, convert, read_mask
from tests.errors import raises_code


def files(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir())


def images_and_masks(output):
    return [name for name in files(output) if name.startswith(("images/", "masks/"))]


def layout_of(output):
    """The layout that configs/folder.py reads from a converted folder."""
    config = folder_config.get_config()
    config.data.root = str(output)
    config.data.classes = tuple((output / "classes.txt").read_text().splitlines())
    return folder_source.layout(config)


def write_labelme(folder, name="a.png", **options):
    """An image with a square, and its LabelMe file."""
    path = folders.write_image(folder / name, **options)
    content = folders.labelme(folders.shape(), image=path.name)
    folders.write_json(path.with_suffix(".json"), content)


def test_what_is_written(tmp_path):
    write_labelme(tmp_path / "in")
    folders.write_image(tmp_path / "in/b c.PNG")
    done = convert(tmp_path / "in", tmp_path / "out")
    assert files(tmp_path / "out") == [
        *("classes.txt", "conversion.json", "images/a.png", "images/b c.PNG", "labeled.txt"),
        *("masks/a.png", "out.py", "unlabeled.txt"),
    ]
    assert (tmp_path / "out/classes.txt").read_text() == "background\ncar\n"
    np.testing.assert_array_equal(read_mask(tmp_path / "out/masks/a.png"), SQUARE_DRAWN)
    labeled = split_lists.read_list(tmp_path / "out/labeled.txt")
    assert [(e.image, e.mask) for e in labeled] == [("images/a.png", "masks/a.png")]
    (unlabeled,) = split_lists.read_list(tmp_path / "out/unlabeled.txt")
    assert (unlabeled.image, unlabeled.without_mask) == ("images/b c.PNG", True)
    assert done.images == {"labeled": 1, "unlabeled": 1} and done.unnamed == 1
    record = json.loads((tmp_path / "out/conversion.json").read_text())
    assert record["objects"] == {"car": 1} and record["uncovered_pixels"] == 120 - 36
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]
    train = layout_of(tmp_path / "out").train
    assert [(e.id, bool(e.mask)) for e in train] == [("a", True), ("b c", False)]


def test_the_config_of_a_folder_is_the_config_of_its_data(tmp_path):
    write_labelme(tmp_path / "in")
    convert(tmp_path / "in", tmp_path / "my data-1")
    path = tmp_path / "my data-1/my_data_1.py"
    moved = tmp_path / "moved"
    shutil.move(path.parent, moved)
    scope = {"__file__": str(moved / path.name)}
    exec(compile((moved / path.name).read_text(), path.name, "exec"), scope)
    config = scope["get_config"]()
    assert config.data.root == str(moved) and config.data.classes == ("background", "car")


def test_names_of_classes_cannot_run_as_code(tmp_path):
    folders.write_image(tmp_path / "in/a.png")
    label = '"\'), __import__("os").mkdir("x"), ("{} \\'
    folders.write_json(tmp_path / "in/a.json", folders.labelme(folders.shape(label)))
    convert(tmp_path / "in", tmp_path / "out")
    scope = {"__file__": str(tmp_path / "out/out.py")}
    exec(compile((tmp_path / "out/out.py").read_text(), "out.py", "exec"), scope)
    assert scope["CLASSES"] == ("background", label)


def test_images_are_linked_or_copied(tmp_path):
    write_labelme(tmp_path / "in")
    convert(tmp_path / "in", tmp_path / "copied")
    convert(tmp_path / "in", tmp_path / "linked", link=True)
    assert not (tmp_path / "copied/images/a.png").is_symlink()
    assert os.readlink(tmp_path / "linked/images/a.png") == str(tmp_path / "in/a.png")
    for name in ("copied", "linked"):
        image = tmp_path / name / "images/a.png"
        assert image.read_bytes() == (tmp_path / "in/a.png").read_bytes()


def test_nothing_is_overwritten_and_nothing_half_written_stays(tmp_path, monkeypatch):
    write_labelme(tmp_path / "in")
    (tmp_path / "out").mkdir()
    convert(tmp_path / "in", tmp_path / "out")  # An empty folder is used.
    before = files(tmp_path / "out")
    with raises_code("conversion-output-exists", "out"):
        convert(tmp_path / "in", tmp_path / "out")
    assert files(tmp_path / "out") == before
    with raises_code("conversion-output-inside-input", "in/out"):
        convert(tmp_path / "in", tmp_path / "in/out")
    (tmp_path / "file").write_text("")
    with raises_code("conversion-output-exists", "file"):
        convert(tmp_path / "in", tmp_path / "file")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(mask_folder.shutil, "copyfile", fail)
    with raises_code("path-unwritable", "new", "No space left"):
        convert(tmp_path / "in", tmp_path / "new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "in", "out"]


# Folders of tools


def test_roboflow_coco(tmp_path):
    """train, valid and test, each with its images and a file."""
    for split, names in (
        ("train", ["a.jpg", "b.jpg"]),
        ("valid", ["a.jpg", "c.jpg"]),
        ("test", ["d.jpg"]),
    ):
        for level, name in enumerate(names):
            folders.write_image(tmp_path / "in" / split / name, level=10 * level + len(split))
        content = folders.coco(names, [folders.coco_object()])
        folders.write_json(tmp_path / "in" / split / "_annotations.coco.json", content)
    folders.write_text(tmp_path / "in/README.roboflow.txt", "Exported by roboflow.com\n")
    done = convert(tmp_path / "in", tmp_path / "out")
    assert images_and_masks(tmp_path / "out") == [
        *("images/test/d.jpg", "images/train/a.jpg", "images/train/b.jpg", "images/val/a.jpg"),
        *("masks/test/d.png", "masks/train/a.png", "masks/val/a.png"),
    ]
    assert done.images == {"labeled": 1, "unlabeled": 1, "val": 1, "test": 1}
    assert done.left_out == 1 and done.empty == 2  # b.jpg and c.jpg
    layout = layout_of(tmp_path / "out")
    assert [(e.id, bool(e.mask)) for e in layout.train] == [("a", True), ("b", False)]
    assert [(e.id, bool(e.mask)) for e in layout.evaluation] == [("a", True)]
    for name in ("val", "test"):
        assert len(split_lists.read_list(tmp_path / f"out/{name}.txt")) == 1


def test_cvat_coco(tmp_path):
    folders.write_image(tmp_path / "in/images/a.png")
    folders.write_image(tmp_path / "in/images/sub/b.png")
    content = folders.coco(["a.png", "sub/b.png"], [folders.coco_object(image_id=2)])
    folders.write_json(tmp_path / "in/annotations/instances_default.json", content)
    for source in (tmp_path / "in", tmp_path / "in/annotations/instances_default.json"):
        images = tmp_path / "in"
        output = tmp_path / f"out_{source.name}"
        convert(source, output, images=images)
        assert images_and_masks(output) == ["images/a.png", "images/sub/b.png", "masks/sub/b.png"]


def test_the_lists_name_what_the_folders_hold(tmp_path):
    for split, names in (("train", "abc"), ("val", "d")):
        for name in names:
            folders.write_image(tmp_path / f"in/{split}/{name} {name}.png", level=ord(name))
            if name != "c":
                content = folders.labelme(folders.shape(), image=f"{name} {name}.png")
                folders.write_json(tmp_path / f"in/{split}/{name} {name}.json", content)
    convert(tmp_path / "in", tmp_path / "out")
    config = folder_config.get_config()
    config.data.root = str(tmp_path / "out")
    config.data.classes = ("background", "car")
    by_folders, _ = load.plan_dataset(config)
    config.data.labeled_list, config.data.unlabeled_list = "labeled.txt", "unlabeled.txt"
    config.data.evaluation_list = "val.txt"
    by_lists, _ = load.plan_dataset(config)
    for name, ids in (
        ("labeled", ["a a", "b b"]),
        ("unlabeled", ["c c"]),
        ("evaluation", ["d d"]),
    ):
        listed, found = getattr(by_lists, name), getattr(by_folders, name)
        assert [e.id for e in found] == ids
        assert [(e.image, e.mask) for e in listed] == [(e.image, e.mask) for e in found]


@pytest.mark.parametrize("subset", ["", "Train"])
def test_cvat_xml(tmp_path, subset):
    folders.write_image(tmp_path / "in/images/a.png")
    points = folders.cvat_points(SQUARE)
    text = folders.cvat(f'<polygon label="car" points="{points}"/>', subset=subset)
    folders.write_text(tmp_path / "in/annotations.xml", text)
    convert(tmp_path / "in", tmp_path / "out")
    assert images_and_masks(tmp_path / "out") == ["images/a.png", "masks/a.png"]


def test_subsets_of_cvat_are_splits(tmp_path):
    points = folders.cvat_points(SQUARE)
    shape = f'<polygon label="car" points="{points}"/>'
    for name, subset in (("a.png", "Train"), ("b.png", "Validation")):
        folders.write_image(tmp_path / "in/images" / name, level=len(subset))
        text = folders.cvat(shape, name=name, subset=subset)
        folders.write_text(tmp_path / f"in/{name}.xml", text)
    convert(tmp_path / "in", tmp_path / "out")
    assert [n for n in files(tmp_path / "out") if n.startswith("masks")] == [
        *("masks/train/a.png", "masks/val/b.png"),
    ]


def test_ultralytics_yolo(tmp_path):
    """images/train beside labels/train: an empty file says that there is nothing."""
    for split, names in (("train", "abc"), ("val", "d")):
        for name in names:
            folders.write_image(tmp_path / f"in/images/{split}/{name}.1.jpg", level=ord(name))
    folders.write_text(tmp_path / "in/labels/train/a.1.txt", folders.yolo_row(0, SQUARE))
    folders.write_text(tmp_path / "in/labels/train/b.1.txt", "")
    folders.write_text(tmp_path / "in/labels/val/d.1.txt", folders.yolo_row(0, SQUARE))
    folders.write_text(tmp_path / "in/data.yaml", "path: .\ntrain: images/train\nnames: {0: car}\n")
    done = convert(tmp_path / "in", tmp_path / "out")
    assert images_and_masks(tmp_path / "out") == [
        *("images/train/a.1.jpg", "images/train/b.1.jpg", "images/train/c.1.jpg"),
        *("images/val/d.1.jpg", "masks/train/a.1.png", "masks/train/b.1.png", "masks/val/d.1.png"),
    ]
    np.testing.assert_array_equal(read_mask(tmp_path / "out/masks/train/a.1.png"), SQUARE_DRAWN)
    assert not read_mask(tmp_path / "out/masks/train/b.1.png").any()
    assert (done.empty, done.unnamed, done.empty_are) == (1, 1, "background")


def test_roboflow_yolo_and_lists_of_cvat(tmp_path):
    for split, name in (("train", "a"), ("valid", "b")):
        folders.write_image(tmp_path / f"in/{split}/images/{name}.jpg", level=ord(name))
        folders.write_text(tmp_path / f"in/{split}/labels/{name}.txt", folders.yolo_row(0, SQUARE))
    folders.write_text(tmp_path / "in/data.yaml", "train: ../train/images\nnames: ['car']\nnc: 1\n")
    convert(tmp_path / "in", tmp_path / "out")
    masks = ["masks/train/a.png", "masks/val/b.png"]
    assert [n for n in files(tmp_path / "out") if n.startswith("masks")] == masks
    for name in "ab":
        folders.write_image(tmp_path / f"lists/images/{name}.jpg", level=ord(name))
        folders.write_text(tmp_path / f"lists/labels/{name}.txt", folders.yolo_row(0, SQUARE))
    folders.write_text(tmp_path / "lists/train.txt", "data/images/a.jpg\n")
    folders.write_text(tmp_path / "lists/val.txt", "data/images/b.jpg\n")
    text = "train: train.txt\nval: val.txt\nnames: {0: car}\n"
    folders.write_text(tmp_path / "lists/data.yaml", text)
    convert(tmp_path / "lists", tmp_path / "out2")
    assert [n for n in files(tmp_path / "out2") if n.startswith("masks")] == masks


def test_label_studio_coco(tmp_path):
    folders.write_image(tmp_path / "in/images/1a2b-a.png")
    content = folders.coco(["images\\1a2b-a.png"], [folders.coco_object()])
    folders.write_json(tmp_path / "in/result.json", content)
    convert(tmp_path / "in", tmp_path / "out")
    assert images_and_masks(tmp_path / "out") == ["images/1a2b-a.png", "masks/1a2b-a.png"]


# Images


NAMES = [
    *("..\\images\\a b.PNG", "C:\\Users\\me\\images\\a b.PNG", "/home/me/a b.PNG", "./a b.PNG"),
    *("a b.png", "images/a b.PNG", "../../../a b.PNG"),
]


@pytest.mark.parametrize("name", NAMES)
def test_image_paths_of_other_systems_and_of_moved_folders(tmp_path, name):
    folders.write_image(tmp_path / "in/images/a b.PNG")
    content = folders.labelme(folders.shape(), image=name)
    folders.write_json(tmp_path / "in/labels/x.json", content)
    convert(tmp_path / "in", tmp_path / "out")
    assert images_and_masks(tmp_path / "out") == ["images/a b.PNG", "masks/a b.png"]


def test_names_in_another_unicode_form(tmp_path):
    folders.write_image(tmp_path / "in/e\u0301 \u8857.png")
    content = folders.coco(["\u00e9 \u8857.png"], [folders.coco_object()])
    folders.write_json(tmp_path / "in/a.json", content)
    done = convert(tmp_path / "in", tmp_path / "out")
    assert done.images == {"labeled": 1, "unlabeled": 0}
    (example,) = layout_of(tmp_path / "out").train
    assert example.mask


def test_two_images_of_one_name_in_different_folders(tmp_path):
    for folder, points in (("x", SQUARE), ("y", HOLE)):
        folders.write_image(tmp_path / f"in/{folder}/a.png", level=ord(folder))
        content = folders.labelme(folders.shape(points=points))
        folders.write_json(tmp_path / f"in/{folder}/a.json", content)
    convert(tmp_path / "in", tmp_path / "out")
    for folder, pixels in (("x", 36), ("y", 4)):
        assert read_mask(tmp_path / f"out/masks/{folder}/a.png").sum() == pixels
        copied = (tmp_path / f"out/images/{folder}/a.png").read_bytes()
        assert copied == (tmp_path / f"in/{folder}/a.png").read_bytes()


def test_images_that_would_have_one_name_get_two(tmp_path):
    for name in ("images/a.png", "data/a.png", "images/b.png", "images/b.jpg", "images/c.png"):
        folders.write_image(tmp_path / "in" / name)
    content = folders.coco(["images/c.png"], [folders.coco_object()])
    folders.write_json(tmp_path / "in/a.json", content)
    convert(tmp_path / "in", tmp_path / "out")
    assert images_and_masks(tmp_path / "out") == [
        *("images/c.png", "images/data/a.png", "images/images/a.png", "images/images/b_jpg.jpg"),
        *("images/images/b_png.png", "masks/c.png"),
    ]
    assert len(layout_of(tmp_path / "out").train) == 5


def test_an_image_that_may_be_two_files_is_refused(tmp_path):
    for folder in ("x", "y"):
        folders.write_image(tmp_path / f"in/{folder}/a.png")
    folders.write_json(tmp_path / "in/a.json", folders.coco(objects=[folders.coco_object()]))
    with raises_code("annotated-image-ambiguous", "x/a.png", "y/a.png"):
        convert(tmp_path / "in", tmp_path / "out")


def test_an_image_that_is_annotated_twice_is_refused(tmp_path):
    folders.write_image(tmp_path / "in/a.png")
    for name in ("one", "two"):
        content = folders.coco(objects=[folders.coco_object()])
        folders.write_json(tmp_path / f"in/{name}.json", content)
    with raises_code("image-annotated-twice", "one.json", "two.json", "a.png"):
        convert(tmp_path / "in", tmp_path / "out")


def test_missing_images_are_named_and_an_error_if_all_are(tmp_path):
    folders.write_image(tmp_path / "in/a.png")
    content = folders.coco(["a.png", "gone.png"], [folders.coco_object()])
    folders.write_json(tmp_path / "in/a.json", content)
    assert convert(tmp_path / "in", tmp_path / "out").missing == ["gone.png"]
    (tmp_path / "in/a.png").unlink()
    with raises_code("annotated-images-missing", "2 annotated images", "gone.png", "--images"):
        convert(tmp_path / "in", tmp_path / "out2")
    folders.write_image(tmp_path / "elsewhere/a.png")
    done = convert(tmp_path / "in", tmp_path / "out3", images=tmp_path / "elsewhere")
    assert done.images["labeled"] == 1
    with raises_code("images-folder-missing", "nowhere"):
        convert(tmp_path / "in", tmp_path / "out4", images=tmp_path / "nowhere")


def test_an_image_inside_of_its_labelme_file(tmp_path):
    image = folders.write_image(tmp_path / "a.png")
    content = folders.labelme(folders.shape(), image="..\\..\\x\\a.png")
    content["imageData"] = base64.b64encode(image.read_bytes()).decode()
    folders.write_json(tmp_path / "in/a.json", content)
    convert(tmp_path / "in", tmp_path / "out")
    assert images_and_masks(tmp_path / "out") == ["images/a.png", "masks/a.png"]
    assert (tmp_path / "out/images/a.png").read_bytes() == image.read_bytes()
    for data, code in (("!", "annotations-malformed"), (3, "annotations-malformed")):
        content["imageData"] = data
        folders.write_json(tmp_path / "in/a.json", content)
        with raises_code(code, "a.json", "imageData"):
            convert(tmp_path / "in", tmp_path / "out2")
    content["imageData"] = base64.b64encode(b"no image").decode()
    folders.write_json(tmp_path / "in/a.json", content)
    with raises_code("annotations-malformed", "a.json", "no image"):
        convert(tmp_path / "in", tmp_path / "out2")


@pytest.mark.parametrize(
    "name", ["../../evil.png", "/evil.png", "..", "", ".hidden.png", "a\0b.png"]
)
def test_names_in_annotations_do_not_lead_out_of_the_folder(tmp_path, name):
    image = folders.write_image(tmp_path / "a.png")
    content = folders.labelme(folders.shape(), image=name)
    content["imageData"] = base64.b64encode(image.read_bytes()).decode()
    folders.write_json(tmp_path / "x/in/a.json", content)
    before = files(tmp_path)
    convert(tmp_path / "x/in", tmp_path / "x/out")
    new = set(files(tmp_path)) - set(before)
    assert len(new) == 6 and all(path.startswith("x/out/") for path in new)


def test_names_that_a_list_cannot_hold(tmp_path):
    write_labelme(tmp_path / "in", "a\tb\nc.png")
    convert(tmp_path / "in", tmp_path / "out")
    (entry,) = split_lists.read_list(tmp_path / "out/labeled.txt")
    assert entry.image == "images/a_b_c.png" and (tmp_path / "out" / entry.image).exists()


def test_masks_beside_the_images_are_no_images(tmp_path):
    write_labelme(tmp_path / "in")
    for folder in ("SegmentationClassPNG", "masks", "Visualization"):
        folders.write_image(tmp_path / "in" / folder / "a.png")
    convert(tmp_path / "in", tmp_path / "out")
    assert images_and_masks(tmp_path / "out") == ["images/a.png", "masks/a.png"]


def test_damaged_images_are_named(tmp_path):
    write_labelme(tmp_path / "in")
    (tmp_path / "in/a.png").write_bytes(b"no image")
    with raises_code("image-undecodable", "in/a.png"):
        convert(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Images without objects


@pytest.mark.parametrize("empty", ["", "unlabeled", "background"])
@pytest.mark.parametrize("format_", ["labelme", "coco", "yolo"])
def test_images_without_annotations_are_what_a_key_says(tmp_path, format_, empty):
    """a has an object, b has none, and c is not named at all."""
    for name in "abc":
        folders.write_image(tmp_path / f"in/{name}.png", level=ord(name))
    if format_ == "labelme":
        write_labelme(tmp_path / "in")
        folders.write_json(tmp_path / "in/b.json", folders.labelme(image="b.png"))
    elif format_ == "coco":
        content = folders.coco(["a.png", "b.png"], [folders.coco_object()])
        folders.write_json(tmp_path / "in/x.json", content)
    else:
        folders.write_text(tmp_path / "in/a.txt", folders.yolo_row(0, SQUARE))
        folders.write_text(tmp_path / "in/b.txt", "\n")
        folders.write_text(tmp_path / "in/classes.txt", "car\n")
    done = convert(tmp_path / "in", tmp_path / "out", empty=empty)
    masks = [name for name in files(tmp_path / "out") if name.startswith("masks")]
    is_background = empty == "background" or (format_ == "yolo" and not empty)
    assert masks == ["masks/a.png", "masks/b.png"][: 1 + is_background]
    assert done.empty == 1 and done.unnamed == 1
    assert done.images == {"labeled": 1 + is_background, "unlabeled": 2 - is_background}


def test_an_image_whose_objects_have_no_area_is_not_background(tmp_path):
    write_labelme(tmp_path / "in")
    folders.write_image(tmp_path / "in/b.png", level=3)
    line = folders.shape(points=[[1, 1], [5, 5]], kind="line")
    folders.write_json(tmp_path / "in/b.json", folders.labelme(line, image="b.png"))
    done = convert(tmp_path / "in", tmp_path / "out")
    assert images_and_masks(tmp_path / "out") == ["images/a.png", "images/b.png", "masks/a.png"]
    assert done.areas_missing == 1


def test_where_all_objects_would_be_ignored(tmp_path):
    folders.write_image(tmp_path / "in/a.png")
    entry = folders.coco_object(iscrowd=1)
    folders.write_json(tmp_path / "in/a.json", folders.coco(objects=[entry]))
    with raises_code("all-objects-ignored", "--crowd=class"):
        convert(tmp_path / "in", tmp_path / "out", crowd="ignore")
    assert convert(tmp_path / "in", tmp_path / "out").counts.objects == {"car": 1}


def test_where_nothing_can_be_drawn(tmp_path):
    folders.write_image(tmp_path / "in/a.png")
    folders.write_json(tmp_path / "in/a.json", folders.labelme())
    with raises_code("conversion-without-masks", "--empty"):
        convert(tmp_path / "in", tmp_path / "out", classes=("a", "b"))
    assert not (tmp_path / "out").exists()


# Background


@pytest.mark.parametrize(
    ("background", "classes", "names", "value_outside", "value_inside"),
    [
        ("background", (), ["background", "bus", "car"], 0, 2),
        ("road", (), ["road", "bus", "car"], 0, 2),
        ("car", (), ["car", "bus"], 0, 0),
        ("ignore", (), ["bus", "car"], 255, 1),
        ("background", ("car", "bus", "background"), ["car", "bus", "background"], 2, 0),
    ],
)
def test_pixels_of_no_object(tmp_path, background, classes, names, value_outside, value_inside):
    folders.write_image(tmp_path / "in/a.png")
    shapes = folders.shape("car"), folders.shape("bus", HOLE)
    folders.write_json(tmp_path / "in/a.json", folders.labelme(*shapes))
    done = convert(tmp_path / "in", tmp_path / "out", background=background, classes=classes)
    assert (tmp_path / "out/classes.txt").read_text().splitlines() == names
    mask = read_mask(tmp_path / "out/masks/a.png")
    assert (mask[0, 0], mask[3, 3]) == (value_outside, value_inside)
    assert done.counts.uncovered == 120 - 36


def test_a_background_of_no_pixel_is_no_class(tmp_path):
    folders.write_image(tmp_path / "in/a.png")
    everything = [[0, 0], [12, 0], [12, 10], [0, 10]]
    shapes = folders.shape("road", everything), folders.shape("__ignore__", HOLE)
    shapes = (*shapes, folders.shape("car", [[0, 0], [2, 0], [2, 2], [0, 2]]))
    folders.write_json(tmp_path / "in/a.json", folders.labelme(*shapes))
    done = convert(tmp_path / "in", tmp_path / "out")
    assert done.classes == ("car", "road")
    mask = read_mask(tmp_path / "out/masks/a.png")
    assert (mask[0, 0], mask[9, 9], mask[5, 5]) == (0, 1, 255)
    assert done.pixels[[0, 1, 255]].tolist() == [4, 112, 4] and done.pixels.sum() == 120


# EXIF


CORNER = [[1, 2], [9, 2], [9, 12], [1, 12]]


@pytest.mark.parametrize("recorded", ["stored", "upright", "none"])
@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_the_recorded_size_says_how_a_photograph_was_annotated(tmp_path, recorded, orientation):
    """A JPEG of 40x30, and a polygon in the upper left of what the annotator saw."""
    image = folders.write_image(tmp_path / "in/a.jpg", (40, 30), orientation)
    size = {"stored": (40, 30), "upright": (30, 40), "none": None}[recorded]
    content = folders.labelme(folders.shape(points=CORNER), image="a.jpg", size=size)
    folders.write_json(tmp_path / "in/a.json", content)
    done = convert(tmp_path / "in", tmp_path / "out")
    seen = folders.drawn((slice(1, 9), slice(2, 12), 1), size=size or (30, 40))
    if recorded == "stored":
        # Pillow turns a picture of the mask as it turns the photograph.
        exif = Image.open(image).getexif()
        buffer = tmp_path / "seen.png"
        Image.fromarray(seen).save(buffer, exif=exif)
        seen = np.array(ImageOps.exif_transpose(Image.open(buffer)))
    np.testing.assert_array_equal(read_mask(tmp_path / "out/masks/a.png"), seen)
    assert done.turned == (recorded == "stored") and not done.orientation_unclear


def test_an_orientation_that_sizes_do_not_tell_is_said(tmp_path):
    folders.write_image(tmp_path / "in/a.jpg", orientation=3)
    folders.write_json(tmp_path / "in/a.json", folders.labelme(folders.shape(), image="a.jpg"))
    done = convert(tmp_path / "in", tmp_path / "out")
    np.testing.assert_array_equal(read_mask(tmp_path / "out/masks/a.png"), SQUARE_DRAWN)
    assert len(done.orientation_unclear) == 1


def test_another_size_is_refused(tmp_path):
    folders.write_image(tmp_path / "in/a.png", (24, 20))
    folders.write_json(tmp_path / "in/a.json", folders.labelme(folders.shape()))
    with raises_code("annotated-size-differs", "a.png is 24x20", "a.json", "12x10"):
        convert(tmp_path / "in", tmp_path / "out")
