"""Each format is read into the same masks; malformed files are refused in one sentence."""

import base64
import io
import json
import os
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from semiseg_jax.data.annotations import classes, coco, colors, cvat, detect, labelme, yolo
from semiseg_jax.data.annotations.drawing import DrawOptions, draw
from semiseg_jax.runtime.errors import UserError
from tests import json_mutants
from tests.data.annotations import folders
from tests.data.annotations.folders import HOLE, RING, RING_DRAWN, SQUARE, SQUARE_DRAWN
from tests.errors import raises_code

SIZE = (10, 12)


def masks_of(annotations, size=SIZE, background="background", **options):
    """The label map and the counts of each image, without files."""
    used = {o.label for image in annotations.images for o in image.objects}
    resolved = classes.resolve(annotations.labels, used, background)
    return [draw(image, size, resolved, DrawOptions(**options)) for image in annotations.images]


def read(folder, format_=""):
    return detect.read(folder, format_)[1]


# A ring in each format


def write_ring_coco_polygon(folder):
    folders.write_json(
        folder / "a.json", folders.coco(objects=[folders.coco_object(polygons=[RING])])
    )


def write_ring_coco_compressed(folder):
    encoded = coco_mask.encode(np.asfortranarray(RING_DRAWN))
    segmentation = {"size": list(SIZE), "counts": encoded["counts"].decode()}
    folders.write_json(
        folder / "a.json",
        folders.coco(objects=[folders.coco_object() | {"segmentation": segmentation}]),
    )


def write_ring_coco_runs(folder):
    flat = np.concatenate([[0], RING_DRAWN.ravel(order="F"), [2]])
    changes = np.flatnonzero(np.diff(flat))
    runs = np.diff(np.concatenate([[0], changes])).tolist()
    segmentation = {"size": list(SIZE), "counts": runs}
    folders.write_json(
        folder / "a.json",
        folders.coco(objects=[folders.coco_object() | {"segmentation": segmentation}]),
    )


def write_ring_labelme(folder):
    shapes = folders.shape(), folders.shape("_background_", HOLE)
    folders.write_json(folder / "a.json", folders.labelme(*shapes))


def write_ring_labelme_mask(folder):
    buffer = io.BytesIO()
    Image.fromarray(RING_DRAWN[2:8, 2:8] * 255).save(buffer, "PNG")
    shape = folders.shape(points=[[2, 2], [7, 7]], kind="mask")
    shape["mask"] = base64.b64encode(buffer.getvalue()).decode()
    folders.write_json(folder / "a.json", folders.labelme(shape))


def write_ring_yolo(folder):
    folders.write_text(folder / "labels/a.txt", folders.yolo_row(0, RING))
    folders.write_text(folder / "data.yaml", "names: [car]\n")


def write_ring_cvat_polygon(folder):
    points = folders.cvat_points(RING)
    folders.write_text(
        folder / "annotations.xml", folders.cvat(f'<polygon label="car" points="{points}"/>')
    )


def write_ring_cvat_cut(folder):
    """A polygon with another of a label "background" above it, which comes first in the file."""
    shapes = "".join(
        f'<polygon label="{label}" points="{folders.cvat_points(points)}" z_order="{z}"/>'
        for label, points, z in (("background", HOLE, 1), ("car", SQUARE, 0))
    )
    folders.write_text(folder / "annotations.xml", folders.cvat(shapes, ("background", "car")))


def write_ring_cvat_mask(folder):
    runs = ", ".join(map(str, [0, 14, 2, 4, 2, 14]))
    mask = f'<mask label="car" rle="{runs}" left="2" top="2" width="6" height="6"/>'
    folders.write_text(folder / "annotations.xml", folders.cvat(mask))


RINGS = {
    name.removeprefix("write_ring_"): f for name, f in globals().items() if "write_ring" in name
}


@pytest.mark.parametrize("name", RINGS)
def test_the_centre_of_a_ring_is_not_the_class(tmp_path, name):
    RINGS[name](tmp_path)
    ((label_map, counts),) = masks_of(read(tmp_path))
    np.testing.assert_array_equal(label_map, RING_DRAWN)
    assert counts.contested == (4 if name == "cvat_cut" else 0)
    assert counts.objects["car"] == 1


def test_polygons_of_one_coco_object_are_a_union(tmp_path):
    entry = folders.coco_object(polygons=[SQUARE, HOLE])
    folders.write_json(tmp_path / "a.json", folders.coco(objects=[entry]))
    ((label_map, _),) = masks_of(read(tmp_path))
    np.testing.assert_array_equal(label_map, SQUARE_DRAWN)


def test_a_part_without_an_area_is_counted(tmp_path):
    entry = folders.coco_object(polygons=[SQUARE, [[1, 1], [2, 2]]])
    folders.write_json(tmp_path / "a.json", folders.coco(objects=[entry]))
    ((label_map, counts),) = masks_of(read(tmp_path))
    np.testing.assert_array_equal(label_map, SQUARE_DRAWN)
    assert counts.objects == {"car": 1} and sum(counts.skipped.values()) == 1


@pytest.mark.parametrize("kind", ["coco text", "coco runs", "cvat"])
def test_an_l_in_runs_down_the_columns_and_along_the_rows(tmp_path, kind):
    """Three columns and five rows at (7, 2) in a picture of 20x11."""
    shape = np.array([[1, 0, 0], [1, 0, 0], [1, 0, 0], [1, 0, 0], [1, 1, 1]], np.uint8)
    expected = np.zeros((11, 20), np.uint8)
    expected[2:7, 7:10] = shape
    if kind == "cvat":
        # By hand: along the rows of its box.
        runs = "0, 1, 2, 1, 2, 1, 2, 1, 2, 3"
        mask = f'<mask label="car" rle="{runs}" left="7" top="2" width="3" height="5" z_order="0"/>'
        folders.write_text(tmp_path / "annotations.xml", folders.cvat(mask, size=(20, 11)))
    else:
        # By hand: down the columns of the image, 7 columns of 11 and 2 rows above.
        runs = [79, 5, 10, 1, 10, 1, 114]
        if kind == "coco text":
            runs = coco_mask.encode(np.asfortranarray(expected))["counts"].decode()
        entry = folders.coco_object() | {"segmentation": {"size": [11, 20], "counts": runs}}
        folders.write_json(tmp_path / "a.json", folders.coco(objects=[entry], size=(20, 11)))
    ((label_map, _),) = masks_of(read(tmp_path), (11, 20))
    np.testing.assert_array_equal(label_map, expected)


# Classes


def test_categories_are_matched_by_name_over_all_files(tmp_path):
    """Ids with gaps and of another order, a root that nobody uses, and two of one name."""
    train = folders.coco(categories=[(0, "things"), (1, "cat"), (3, "dog"), (90, "cow")])
    for category in train["categories"][1:]:
        category["supercategory"] = "things"
    train["annotations"] = [folders.coco_object(category_id=90)]
    valid = folders.coco(["b.png"], categories=[(1, "cow"), (2, "cat "), (7, "dog"), (9, "dog")])
    valid["annotations"] = [
        folders.coco_object(category_id=1),
        folders.coco_object(category_id=7, polygons=[HOLE]),
        folders.coco_object(category_id=9, polygons=[[[9, 9], [10, 9], [10, 10], [9, 10]]]),
    ]
    folders.write_json(tmp_path / "train/_annotations.coco.json", train)
    folders.write_json(tmp_path / "valid/_annotations.coco.json", valid)
    annotations = read(tmp_path)
    assert annotations.labels == ("cat", "dog", "cow")
    (first, _), (second, counts) = masks_of(annotations)
    np.testing.assert_array_equal(first, 3 * SQUARE_DRAWN)
    assert (second[5, 5], second[3, 3], second[9, 9]) == (2, 3, 2)
    assert counts.objects == {"cow": 1, "dog": 2}
    root, twice = sorted(annotations.notes, reverse=True)
    assert "things" in root and "2 categories called dog" in twice


def test_a_category_above_others_that_has_objects_is_a_class(tmp_path):
    content = folders.coco(categories=[(0, "animal"), (1, "cat")])
    content["categories"][1]["supercategory"] = "animal"
    content["categories"][0]["supercategory"] = "animal"
    content["annotations"] = [folders.coco_object(category_id=0)]
    folders.write_json(tmp_path / "a.json", content)
    assert read(tmp_path).labels == ("animal", "cat")
    # Its own name above it, as in COCO, says nothing.
    content["categories"].pop(1)
    content["annotations"] = []
    folders.write_json(tmp_path / "a.json", content)
    assert read(tmp_path).labels == ("animal",)


def test_names_of_classes_have_one_unicode_form(tmp_path):
    composed, decomposed = "\u00e9", "e\u0301"
    shapes = folders.shape(composed), folders.shape(decomposed, HOLE)
    folders.write_json(tmp_path / "a.json", folders.labelme(*shapes))
    ((label_map, _),) = masks_of(read(tmp_path))
    np.testing.assert_array_equal(label_map, SQUARE_DRAWN)


def test_labels_of_several_lines_and_of_no_text_are_one_line():
    assert classes.normal(" a \n  b\t") == "a b"
    assert classes.normal("a\udcff") == "a?"


def test_the_classes_of_labels():
    resolve = classes.resolve
    assert resolve(["a", "b"], ["b"], "background").names == ("background", "a", "b")
    with_own = resolve(["a", "background"], [], "background")
    assert with_own.names == ("background", "a") and with_own.background == 0
    ignored = resolve(["a", "b"], [], "ignore")
    assert ignored.names == ("a", "b") and ignored.background == 255
    assert ignored.ids == {"a": 0, "b": 1, "_background_": 255, "__ignore__": 255}
    assert resolve(["a"], ["_background_"], "road").ids["_background_"] == 0
    ordered = resolve(["a", "b"], ["b"], "background", ["b", "background", "a"])
    assert ordered.names == ("b", "background", "a") and ordered.background == 1
    assert resolve(["a"], ["a"], "background", ["b", "a"]).names == ("background", "b", "a")
    with raises_code("label-not-in-classes", "a"):
        resolve(["a"], ["a"], "background", ["b", "c"])
    assert len(resolve([str(i) for i in range(254)], [], "background").names) == 255
    for labels in ([str(i) for i in range(255)], []):
        with raises_code("annotation-class-count", f"{len(labels) + 1} classes"):
            resolve(labels, [], "background")
    assert classes.differ_in_case(["Car", "bus", "car"]) == [("Car", "car")]


# Who is on top


def test_of_cvat_shapes_the_z_order_decides_then_the_file(tmp_path):
    left, right = [[2, 2], [6, 2], [6, 8], [2, 8]], [[4, 2], [8, 2], [8, 8], [4, 8]]

    def shapes(*entries):
        text = "".join(
            f'<polygon label="{label}" points="{folders.cvat_points(points)}" z_order="{z}"/>'
            for label, points, z in entries
        )
        folders.write_text(tmp_path / "a.xml", folders.cvat(text, ("car", "bus")))
        ((label_map, counts),) = masks_of(read(tmp_path))
        assert counts.contested == 2 * 6
        return label_map[5, 5]

    assert shapes(("car", left, 0), ("bus", right, 0)) == 2
    assert shapes(("car", left, 1), ("bus", right, 0)) == 1
    assert shapes(("car", left, 2), ("bus", right, 10)) == 2


def test_later_or_smaller_objects_are_on_top(tmp_path):
    small, large = folders.coco_object(1, 1, [HOLE]), folders.coco_object(1, 2, [SQUARE])
    content = folders.coco(objects=[small, large], categories=[(1, "car"), (2, "bus")])
    folders.write_json(tmp_path / "a.json", content)
    for overlap, value in (("later", 2), ("smaller", 1)):
        ((label_map, counts),) = masks_of(read(tmp_path), overlap=overlap)
        assert label_map[5, 5] == value and label_map[3, 3] == 2
        assert counts.contested == 4


# Objects without an area


def test_crowds_are_drawn_as_their_class_unless_they_are_to_be_ignored(tmp_path):
    """CVAT marks every mask of its brush so."""
    entries = [folders.coco_object(iscrowd=1), folders.coco_object(polygons=[HOLE])]
    entries[1]["category_id"] = 2
    content = folders.coco(objects=entries, categories=[(1, "car"), (2, "bus")])
    folders.write_json(tmp_path / "a.json", content)
    ((label_map, counts),) = masks_of(read(tmp_path))
    assert label_map[3, 3] == 1 and label_map[5, 5] == 2
    assert [*counts.skipped.values()] == [1] and "iscrowd" in next(iter(counts.skipped))
    ((label_map, counts),) = masks_of(read(tmp_path), crowd="ignore")
    assert label_map[3, 3] == 255 and label_map[5, 5] == 2 and label_map[0, 0] == 0
    assert counts.objects == {"bus": 1} and counts.contested == 0


def test_rows_of_five_numbers_are_boxes(tmp_path):
    box = "0 0.5 0.5 0.5 0.6"  # x from 3 to 9, y from 2 to 8.
    folders.write_text(tmp_path / "labels/a.txt", f"{box}\n{folders.yolo_row(1, HOLE)}\n")
    folders.write_text(tmp_path / "classes.txt", "car\nbus\n")
    expected = folders.drawn((slice(3, 9), slice(2, 8), 255), (slice(4, 6), slice(4, 6), 2))
    ((label_map, counts),) = masks_of(read(tmp_path))
    np.testing.assert_array_equal(label_map, expected)
    assert counts.objects == {"bus": 1} and sum(counts.skipped.values()) == 1
    ((label_map, counts),) = masks_of(read(tmp_path), boxes="draw")
    np.testing.assert_array_equal(label_map, np.where(expected == 255, 1, expected))
    assert counts.objects == {"bus": 1, "car": 1} and sum(counts.skipped.values()) == 1


def test_a_coco_object_of_a_box_alone(tmp_path):
    entry = folders.coco_object() | {"segmentation": [], "bbox": [2, 2, 6, 6]}
    folders.write_json(tmp_path / "a.json", folders.coco(objects=[entry]))
    ((label_map, _),) = masks_of(read(tmp_path))
    np.testing.assert_array_equal(label_map, np.where(SQUARE_DRAWN, 255, 0))
    ((label_map, _),) = masks_of(read(tmp_path), boxes="draw")
    np.testing.assert_array_equal(label_map, SQUARE_DRAWN)


LABELME_AREAS = {
    "rectangle": ([[8, 8], [2, 2]], SQUARE_DRAWN),
    "polygon": (SQUARE, SQUARE_DRAWN),
    "rotation": (SQUARE, SQUARE_DRAWN),
    "oriented_rectangle": (SQUARE, SQUARE_DRAWN),
    None: (SQUARE, SQUARE_DRAWN),
}


@pytest.mark.parametrize("kind", LABELME_AREAS)
def test_shapes_of_labelme_with_an_area(tmp_path, kind):
    points, expected = LABELME_AREAS[kind]
    folders.write_json(
        tmp_path / "a.json", folders.labelme(folders.shape(points=points, kind=kind))
    )
    ((label_map, counts),) = masks_of(read(tmp_path))
    np.testing.assert_array_equal(label_map, expected)
    assert not counts.skipped


def test_circles_of_labelme(tmp_path):
    circle = folders.shape(points=[[5, 5], [5, 8]], kind="circle")
    folders.write_json(tmp_path / "a.json", folders.labelme(circle))
    ((label_map, _),) = masks_of(read(tmp_path))
    assert label_map.sum() == 32 and label_map[2, 5] and not label_map[2, 2]


@pytest.mark.parametrize("kind", ["line", "linestrip", "point", "points"])
def test_lines_and_points_are_counted_and_drawn_with_a_width(tmp_path, kind):
    points = [[2.5, 5.5]] if kind == "point" else [[2.5, 5.5], [8.5, 5.5]]
    shapes = folders.shape(), folders.shape("road", points, kind)
    folders.write_json(tmp_path / "a.json", folders.labelme(*shapes))
    ((label_map, counts),) = masks_of(read(tmp_path))
    assert counts.objects == {"car": 1} and [*counts.skipped.values()] == [1]
    ((label_map, counts),) = masks_of(read(tmp_path), line_width=1)
    assert counts.objects == {"car": 1, "road": 1}
    assert label_map[5, 2] == 2 and label_map[5, 5] == (1 if kind == "point" else 2)


CVAT_SHAPES = {
    '<box label="car" xtl="2" ytl="2" xbr="8" ybr="8"/>': SQUARE_DRAWN,
    '<box label="car" xtl="2" ytl="2" xbr="8" ybr="8" rotation="90"/>': SQUARE_DRAWN,
    '<ellipse label="car" cx="5" cy="5" rx="3" ry="3"/>': 32,
    '<polyline label="car" points="2,5;8,5"/>': None,
    '<points label="car" points="2,5;8,5"/>': None,
    '<cuboid label="car" xtl1="2"/>': None,
    '<tag label="car"/>': None,
    '<skeleton label="car"><points label="1" points="1,2"/></skeleton>': None,
    '<polygon label="car" points="2,2;8,2"/>': None,
    '<polygon label="car" points="20,20;30,20;30,30"/>': None,
    '<polygon label="car" points="2.1,2.1;2.2,2.1;2.2,2.2"/>': None,
}


@pytest.mark.parametrize("shape", CVAT_SHAPES)
def test_shapes_of_cvat(tmp_path, shape):
    folders.write_text(tmp_path / "a.xml", folders.cvat(shape))
    ((label_map, counts),) = masks_of(read(tmp_path))
    expected = CVAT_SHAPES[shape]
    if expected is None:
        assert label_map is None and sum(counts.skipped.values()) == 1
    else:
        assert (label_map == 1).sum() == np.sum(expected) and not counts.skipped


@pytest.mark.parametrize(
    ("points", "reason"),
    [
        ([[2, 2], [8, 2]], "too few vertices"),
        ([[2, 2], [8, 2], [5, 2]], "no pixel centre"),
        ([[2, 2], [2.2, 2], [2.2, 2.2]], "no pixel centre"),
        ([[-5, 2], [-1, 2], [-1, 8]], "outside of the image: not drawn"),
        ([[2, 12], [8, 12], [8, 15]], "outside of the image: not drawn"),
        ([[-2, 2], [8, 2], [8, 8]], "partly outside"),
        ([[0, 0], [12.5, 0], [12.5, 10.5]], None),
    ],
)
def test_what_has_no_area_or_lies_outside_is_counted(tmp_path, points, reason):
    entry = folders.coco_object(polygons=[points])
    folders.write_json(tmp_path / "a.json", folders.coco(objects=[folders.coco_object(), entry]))
    ((_, counts),) = masks_of(read(tmp_path))
    assert counts.objects["car"] == (2 if reason is None or "partly" in reason else 1)
    if reason is None:
        assert not counts.skipped
    else:
        ((said, count),) = counts.skipped.items()
        assert reason in said and count == 1 and counts.examples[said] == "a.png"


def test_ignored_areas_of_labelme(tmp_path):
    shapes = folders.shape(), folders.shape("__ignore__", HOLE)
    folders.write_json(tmp_path / "a.json", folders.labelme(*shapes))
    ((label_map, _),) = masks_of(read(tmp_path))
    assert label_map[5, 5] == 255 and label_map[3, 3] == 1
    assert read(tmp_path).labels == ("car",)


# Which format


def test_each_format_is_found_out(tmp_path):
    for name, write in RINGS.items():
        folder = tmp_path / name
        folder.mkdir()
        write(folder)
        assert detect.read(folder)[0] == name.partition("_")[0]
        assert detect.read(folder, name.partition("_")[0])[0] == name.partition("_")[0]


def test_two_formats_in_a_folder_are_refused_unless_one_is_named(tmp_path):
    write_ring_labelme(tmp_path)
    folders.write_json(tmp_path / "coco.json", folders.coco(objects=[folders.coco_object()]))
    with raises_code("annotation-formats-ambiguous", "a.json", "coco.json", "--from"):
        read(tmp_path)
    assert len(read(tmp_path, "labelme").images[0].objects) == 2
    assert len(read(tmp_path, "coco").images[0].objects) == 1


@pytest.mark.parametrize("name", ["notes.json", "README.txt", "annotations.zip", "a.xml"])
def test_a_folder_without_annotations(tmp_path, name):
    contents = {"notes.json": '{"info": 1}', "a.xml": "<annotation><size/></annotation>"}
    folders.write_text(tmp_path / name, contents.get(name, "Roboflow 3 times"))
    with raises_code("annotations-not-found"):
        read(tmp_path)
    with raises_code("annotations-missing"):
        read(tmp_path / "missing")


def test_captions_and_keypoints_of_coco_are_not_read(tmp_path):
    content = folders.coco(objects=[folders.coco_object()])
    for name in ("instances_train2017.json", "person_keypoints_train2017.json"):
        folders.write_json(tmp_path / name, content)
    captions = {"images": content["images"], "annotations": [{"image_id": 1, "caption": "a"}]}
    folders.write_json(tmp_path / "captions_train2017.json", captions)
    annotations = read(tmp_path)
    assert len(annotations.images) == 1 and "person_keypoints" in annotations.notes[0]


# Malformed files


def parsers():
    """A valid JSON of each kind, and its reader."""
    encoded = coco_mask.encode(np.asfortranarray(RING_DRAWN))
    masks = {"size": list(SIZE), "counts": encoded["counts"].decode()}
    runs = {"size": [10, 12], "counts": [20, 30, 70]}
    entries = [
        folders.coco_object(bbox=[1, 2, 3, 4]),
        folders.coco_object() | {"segmentation": masks},
        folders.coco_object() | {"segmentation": runs},
    ]
    yield "coco", folders.coco(objects=entries)
    shapes = [folders.shape(), folders.shape(kind="circle", points=[[5, 5], [5, 8]])]
    yield "labelme", folders.labelme(*shapes)


@pytest.mark.parametrize(("format_", "content"), list(parsers()), ids=["coco", "labelme"])
def test_json_of_any_other_form_is_one_sentence(tmp_path, format_, content):
    path = tmp_path / "a.json"
    outcomes = set()
    for text in json_mutants.mutants(content):
        path.write_text(text)
        try:
            annotations = read(tmp_path, format_)
            masks_of(annotations)
            outcomes.add("read")
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 600
            assert "a.json" in str(error) or error.code == "annotation-class-count"
            outcomes.add(error.code)
    assert outcomes >= {"read", "annotations-malformed", "annotations-not-found"}


XML = folders.cvat(
    '<polygon label="car" points="2,2;8,2;8,8" z_order="1"/>'
    '<mask label="car" rle="0, 14, 2, 4, 2, 14" left="2" top="2" width="6" height="6"/>'
    '<box label="car" xtl="2" ytl="2" xbr="8" ybr="8" rotation="30"/>'
    '<ellipse label="car" cx="5" cy="5" rx="3" ry="3"/>'
)


def test_xml_of_any_other_form_is_one_sentence(tmp_path):
    path = tmp_path / "a.xml"
    path.write_text(XML)
    assert len(read(tmp_path).images[0].objects) == 4
    outcomes = set()
    root = ElementTree.fromstring(XML)
    texts = ["", "<", "x", "<annotations>", XML[:-9], XML.replace("utf-8", "none"), "<a/>"]
    for element in root.iter():
        for key in list(element.attrib):
            before = element.get(key)
            for value in ("", "x", "nan", "-1", "1e400", "1,2,3", "99999999999", ";", "1 2"):
                element.set(key, value)
                texts.append(ElementTree.tostring(root, "unicode"))
            del element.attrib[key]
            texts.append(ElementTree.tostring(root, "unicode"))
            element.set(key, before)
    for text in texts:
        path.write_text(text)
        try:
            annotations = read(tmp_path, "cvat")
            masks_of(annotations)
            outcomes.add("read")
        except UserError as error:
            assert "\n" not in str(error) and "a.xml" in str(error)
            outcomes.add(error.code)
    assert outcomes == {"read", "annotations-malformed", "annotations-not-found"}


@pytest.mark.parametrize(
    "head",
    [
        '<!DOCTYPE annotations [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;&a;">]>',
        '<!DOCTYPE annotations SYSTEM "file:///etc/passwd">',
        '<!DOCTYPE annotations [<!ENTITY x SYSTEM "file:///etc/passwd">]>',
    ],
)
def test_xml_with_entities_is_not_read(tmp_path, head):
    text = XML.replace("<annotations>", head + "<annotations>")
    folders.write_text(tmp_path / "a.xml", text)
    with raises_code("xml-with-document-type", "a.xml"):
        read(tmp_path)


def test_cvat_for_video_is_refused(tmp_path):
    folders.write_text(
        tmp_path / "a.xml", "<annotations><version>1.1</version><track/></annotations>"
    )
    with raises_code("cvat-for-video", "a.xml"):
        read(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        *("0", "x 1 2 3 4 5 6", "0 1 2 3 4 5 x", "0 .1 .2 .3 .4 .5 .6 .7", "-1 0 0 1 0 1 1"),
        *("0.5 0 0 1 0 1 1", "7 0 0 1 0 1 1", "nan 0 0 1 0 1 1", "0 nan 0 1 0 1 1"),
        *("0 1e10 0 1 0 1 1", "inf 0 0 1 0 1 1", "0 .1 .1 .2 .2", "0 .1 .1 .2"),
    ],
)
def test_rows_of_yolo_of_any_other_form_are_one_sentence(tmp_path, text):
    folders.write_text(tmp_path / "labels/a.txt", f"0 0 0 1 0 1 1\n{text}\n")
    folders.write_text(tmp_path / "data.yaml", "names: {0: car}\n")
    if text in ("0 .1 .1 .2 .2",):
        assert len(masks_of(read(tmp_path))) == 1
    elif text == "0":
        assert sum(masks_of(read(tmp_path))[0][1].skipped.values()) == 1
    else:
        with raises_code("annotations-malformed", "a.txt", "row 2"):
            read(tmp_path)


@pytest.mark.parametrize(
    "text",
    ["names: 3", "names: []", "names: {1: a}", "names: [a, '']", "names: [[a]]", "names: {a: 0}"],
)
def test_names_of_yolo_of_any_other_form_are_one_sentence(tmp_path, text):
    folders.write_text(tmp_path / "labels/a.txt", "0 0 0 1 0 1 1\n")
    folders.write_text(tmp_path / "data.yaml", text)
    with raises_code("annotations-malformed", "data.yaml"):
        read(tmp_path)


def test_names_of_yolo_must_be_there_and_agree(tmp_path):
    folders.write_text(tmp_path / "labels/a.txt", "0 0 0 1 0 1 1\n")
    with raises_code("yolo-without-class-names", "labels"):
        read(tmp_path)
    folders.write_text(tmp_path / "data.yaml", "names: [yes, 3]\nnc: 2\n")
    assert read(tmp_path).labels == ("True", "3")
    folders.write_text(tmp_path / "classes.txt", "car\n")
    with raises_code("yolo-class-names-contradict", "data.yaml", "classes.txt"):
        read(tmp_path)
    folders.write_text(tmp_path / "data.yaml", "names: [")
    with raises_code("annotations-malformed", "data.yaml"):
        read(tmp_path)


def test_a_mask_larger_than_memory_is_refused_before_it_is_made(tmp_path):
    huge = '<mask label="car" rle="9999999999" left="0" top="0" width="99999" height="100001"/>'
    folders.write_text(tmp_path / "a.xml", folders.cvat(huge))
    with raises_code("annotations-malformed", "larger than the image"):
        read(tmp_path)
    entry = folders.coco_object() | {"segmentation": {"size": [99999, 99999], "counts": [1]}}
    for size in ((12, 10), None):
        content = folders.coco(objects=[entry], size=size)
        folders.write_json(tmp_path / "a.json", content)
        with raises_code("annotations-malformed", "run-length"):
            read(tmp_path, "coco")


@pytest.mark.parametrize("name", ["a.json", "a.xml", "data.yaml"])
def test_a_pipe_is_not_opened(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with raises_code("path-unreadable", name, "Not a regular file"):
        read(tmp_path)


def test_a_byte_order_mark_is_no_mistake(tmp_path):
    text = json.dumps(folders.labelme(folders.shape()))
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert len(read(tmp_path).images) == 1
    (tmp_path / "a.json").write_bytes(text.encode("utf-16"))
    with raises_code("annotations-malformed", "a.json", "UTF-8"):
        read(tmp_path)


def test_readers_are_named_in_one_place():
    assert set(detect.FORMATS) == {
        m.__name__.rpartition(".")[2] for m in (coco, labelme, yolo, cvat, colors)
    }
