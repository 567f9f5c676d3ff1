"""Label maps become annotations that other tools open, and come back as they were."""

import contextlib
import io
import json

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from semiseg_jax.data import image_io
from semiseg_jax.data.annotations import detect, export
from semiseg_jax.data.annotations.record import AnnotationSet
from semiseg_jax.serving import downscaling
from tests.data.annotations import folders
from tests.data.annotations.folders import RING_DRAWN, coco_decode, convert, read_mask
from tests.errors import raises_code

NAMES = ["background", "car", "bus"]


def write_masks(folder, label_maps, names=NAMES, suffix=".jpg"):
    """A folder with images and masks of these names, and the list of classes."""
    palette = image_io.generated_palette(len(names))
    for number, (name, label_map) in enumerate(label_maps.items()):
        size = label_map.shape[::-1]
        folders.write_image(folder / "images" / f"{name}{suffix}", size, level=20 * number)
        mask = folder / "masks" / f"{name}.png"
        mask.parent.mkdir(parents=True, exist_ok=True)
        mask.write_bytes(image_io.encode_mask(label_map, palette))
    folders.write_text(folder / "classes.txt", "".join(f"{name}\n" for name in names))
    return folder


def noise(seed, size=(24, 20), num_values=4):
    """Objects that touch, lie in each other's holes and touch at corners; 3 is no label."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, num_values, (size[0] // 3, size[1] // 3)).astype(np.uint8)
    label_map = np.kron(coarse, np.ones((3, 3), np.uint8))[: size[0], : size[1]]
    label_map = np.pad(label_map, [(0, s - n) for s, n in zip(size, label_map.shape, strict=True)])
    speckle = rng.random(size) < 0.1
    label_map[speckle] = rng.integers(0, num_values, speckle.sum())
    return np.where(label_map == 3, 255, label_map).astype(np.uint8)


def nested():
    """A ring of cars around a ring of buses around a car, on background."""
    label_map = np.zeros((20, 24), np.uint8)
    for margin, value in ((1, 1), (3, 2), (5, 0), (7, 1), (8, 2)):
        label_map[margin : 20 - margin, margin : 24 - margin] = value
    return label_map


@pytest.mark.parametrize("format_", export.FORMATS)
@pytest.mark.parametrize("background", ["background", "none"])
def test_ten_round_trips_change_no_pixel(tmp_path, format_, background):
    maps = {f"s {i}/ä": noise(i) for i in range(3)} | {"nested": nested()}
    names = NAMES if background == "background" else ["sky", "car", "bus"]
    source = write_masks(tmp_path / "0", maps, names)
    for trip in range(10):
        annotated, output = tmp_path / f"{trip}_{format_}", tmp_path / f"{trip + 1}"
        done = export.write(source, format_, annotated)
        assert done.images == 4 and not done.missing
        options = {"background": "ignore"} if background == "none" else {}
        back = convert(annotated, output, classes=tuple(names), **options)
        assert not back.counts.contested
        for name, label_map in maps.items():
            np.testing.assert_array_equal(read_mask(output / f"masks/{name}.png"), label_map)
        source = output


@pytest.mark.parametrize("format_", export.FORMATS)
def test_the_centre_of_a_ring_is_not_the_class(tmp_path, format_):
    source = write_masks(tmp_path / "in", {"a": RING_DRAWN})
    done = export.write(source, format_, tmp_path / "out")
    assert done.objects == {"car": 1} and done.with_holes == 1
    convert(tmp_path / "out", tmp_path / "back", classes=tuple(NAMES))
    np.testing.assert_array_equal(read_mask(tmp_path / "back/masks/a.png"), RING_DRAWN)


def test_coco_opens_in_pycocotools(tmp_path):
    maps = {"a": noise(1), "b": nested()}
    source = write_masks(tmp_path / "in", maps)
    export.write(source, "coco", tmp_path / "out")
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(tmp_path / "out/annotations/instances_default.json")
    assert {c["id"]: c["name"] for c in coco.dataset["categories"]} == {
        **{1: "car", 2: "bus", 3: "__ignore__"},
    }
    ids = [annotation["id"] for annotation in coco.dataset["annotations"]]
    assert ids == list(range(1, len(ids) + 1))
    for image in coco.dataset["images"]:
        label_map = maps[image["file_name"].removesuffix(".jpg")]
        assert (image["height"], image["width"]) == label_map.shape
        back = np.zeros_like(label_map)
        for annotation in coco.loadAnns(coco.getAnnIds(image["id"])):
            pixels = coco_decode(coco.annToRLE(annotation))
            assert annotation["iscrowd"] == 0 and annotation["area"] == pixels.sum()
            rows, columns = np.nonzero(pixels)
            left, top, width, height = annotation["bbox"]
            assert (left, top) == (columns.min(), rows.min())
            assert (left + width, top + height) == (columns.max() + 1, rows.max() + 1)
            assert not back[pixels].any()
            back[pixels] = {1: 1, 2: 2, 3: 255}[annotation["category_id"]]
            assert all(isinstance(v, int) for v in annotation["segmentation"][0])
        np.testing.assert_array_equal(back, label_map)


def test_labelme_files_are_those_that_labelme_opens(tmp_path):
    """Its own reader takes these keys, opens the image beside the file, and draws in order."""
    source = write_masks(tmp_path / "in", {"sub/b c": nested()})
    export.write(source, "labelme", tmp_path / "out")
    content = json.loads((tmp_path / "out/sub/b c.json").read_text())
    assert content["imageData"] is None and content["imagePath"] == "b c.jpg"
    assert (tmp_path / "out/sub" / content["imagePath"]).exists()
    assert (content["imageHeight"], content["imageWidth"]) == (20, 24)
    assert content["version"][0] == "5" and content["flags"] == {}
    back = np.zeros((20, 24), np.uint8)
    for shape in content["shapes"]:
        assert shape["shape_type"] == "polygon" and len(shape["points"]) >= 3
        assert shape["flags"] == {} and shape["group_id"] is None and shape["mask"] is None
        # By hand: all of these are rectangles.
        (left, top), (right, bottom) = np.min(shape["points"], 0), np.max(shape["points"], 0)
        back[top:bottom, left:right] = {"_background_": 0, "car": 1, "bus": 2}[shape["label"]]
    np.testing.assert_array_equal(back, nested())


def test_sizes_are_those_of_the_upright_image(tmp_path):
    label_map = folders.drawn((slice(1, 4), slice(2, 12), 1), size=(30, 40))
    source = write_masks(tmp_path / "in", {"a": label_map})
    folders.write_image(source / "images/a.jpg", (40, 30), orientation=6)
    for format_ in export.FORMATS:
        export.write(source, format_, tmp_path / format_)
        _, annotations = detect.read(tmp_path / format_)
        assert isinstance(annotations, AnnotationSet) and annotations.images[0].size == (40, 30)
        done = convert(tmp_path / format_, tmp_path / f"back_{format_}")
        np.testing.assert_array_equal(
            read_mask(tmp_path / f"back_{format_}/masks/a.png"), label_map
        )
        assert not done.turned


@pytest.mark.parametrize("record", ["predictions.json", "manifest.json"])
def test_predictions_and_pseudo_labels(tmp_path, record):
    """Label maps in the folder itself, with a record of the classes, of images elsewhere."""
    folder = write_masks(tmp_path / "in", {"sub/a": nested(), "lost": nested()})
    (folder / "images/lost.jpg").unlink()
    (folder / "classes.txt").unlink()
    folder = (folder / "masks").rename(tmp_path / "predicted")
    folders.write_json(folder / record, {"classes": NAMES, "ended": True})
    folders.write_image(folder / "overlays/sub/a.jpg")
    images = tmp_path / "in/images"
    done = export.write(folder, "coco", tmp_path / "out", images=images, link=True)
    assert done.images == 1 and done.missing == ["lost"]
    assert (tmp_path / "out/images/sub/a.jpg").is_symlink()
    with raises_code("export-images-not-named", "--images"):
        export.write(folder, "coco", tmp_path / "out2")
    with raises_code("masks-without-images", "2 masks", "--images"):
        export.write(folder, "coco", tmp_path / "out2", images=tmp_path / "out/annotations")
    (folder / record).unlink()
    with raises_code("masks-without-class-names", "--classes"):
        export.write(folder, "coco", tmp_path / "out2", images=images)
    assert export.write(folder, "coco", tmp_path / "out2", images=images, names=NAMES).images == 1
    folders.write_json(folder / record, {"classes": [3]})
    with raises_code("annotations-malformed", record):
        export.write(folder, "coco", tmp_path / "out3", images=images)


def test_labels_of_downscaled_images_are_enlarged(tmp_path):
    source = write_masks(tmp_path / "in", {"a": noise(5, (7, 9), 3)})
    folders.write_image(source / "images/a.jpg", (29, 23))  # A third, rounded down.
    done = export.write(source, "coco", tmp_path / "out")
    assert done.enlarged == 1
    convert(tmp_path / "out", tmp_path / "back", classes=tuple(NAMES))
    enlarged = downscaling.enlarge(noise(5, (7, 9), 3), (23, 29))
    np.testing.assert_array_equal(read_mask(tmp_path / "back/masks/a.png"), enlarged)


def test_small_objects_may_be_left_out(tmp_path):
    label_map = folders.drawn((slice(1, 4), slice(2, 5), 1), (slice(6, 7), slice(2, 3), 1))
    source = write_masks(tmp_path / "in", {"a": label_map})
    done = export.write(source, "coco", tmp_path / "out", min_area=2)
    assert done.objects == {"car": 1} and done.too_small == 1
    assert export.write(source, "coco", tmp_path / "out2").objects == {"car": 2}


def test_what_cannot_be_written(tmp_path):
    source = write_masks(tmp_path / "in", {"a": nested()})
    with raises_code("masks-folder-missing", "nowhere"):
        export.write(tmp_path / "nowhere", "coco", tmp_path / "out")
    with raises_code("conversion-output-inside-input"):
        export.write(source, "coco", source / "out")
    folders.write_image(source / "images/a.jpg", (48, 20))
    with raises_code("mask-of-another-size", "24x20", "48x20"):
        export.write(source, "coco", tmp_path / "out")
    Image.fromarray(np.full((20, 24), 7, np.uint8)).save(source / "masks/a.png")
    with raises_code("mask-values-unknown", "a.png", "7"):
        export.write(source, "coco", tmp_path / "out")
    (source / "masks/a.png").unlink()
    with raises_code("masks-folder-empty", "masks"):
        export.write(source, "coco", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["in"]
