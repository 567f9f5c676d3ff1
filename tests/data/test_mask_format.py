"""Masks of colours, of ids in three channels, and of grey levels with a threshold."""

import numpy as np
import pytest
from etils import epath
from PIL import Image

from configs import default
from semiseg_jax import config_check
from semiseg_jax.data import file_content, image_io, load
from semiseg_jax.data.mask_format import VALUES, MaskFormat
from semiseg_jax.data.sources import folder
from tests.errors import raises_code

GROUND, THING, NONE = (10, 20, 30), (200, 0, 0), (0, 0, 0)
COLORS = ((GROUND, 0), (THING, 1), (NONE, 255))
TABLE = image_io.id_table(2)
# One row of each colour.
PIXELS = np.array([[GROUND] * 3, [THING] * 3, [NONE] * 3], np.uint8)
IDS = [[0] * 3, [1] * 3, [255] * 3]


def save(folder, pixels, name="m.png", mode=None, **options):
    image = Image.fromarray(np.asarray(pixels, np.uint8))
    (image.convert(mode) if mode else image).save(folder / name, **options)
    return folder / name


def data_config(**values):
    data = default.get_config().data
    data.classes = ("ground", "thing")
    data.update(values)
    return data


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_colors_are_classes(tmp_path, mode):
    """Of a palette image too, whose indices follow another order."""
    options = {"palette": Image.Palette.ADAPTIVE} if mode == "P" else {}
    image = Image.fromarray(PIXELS).convert(mode, **options)
    image.save(tmp_path / "m.png")
    read = image_io.read_mask(tmp_path / "m.png", TABLE, MaskFormat(colors=COLORS))
    assert read.tolist() == IDS


def test_grey_masks_have_colors_too(tmp_path):
    path = save(tmp_path, [[0, 90], [255, 0]])
    form = MaskFormat(colors=(((0, 0, 0), 0), ((90, 90, 90), 1), ((255, 255, 255), 255)))
    assert image_io.read_mask(path, TABLE, form).tolist() == [[0, 1], [255, 0]]


def test_unknown_colors_are_named_with_their_counts(tmp_path):
    pixels = PIXELS.copy()
    pixels[0, :2], pixels[1, 0] = (1, 2, 3), (9, 9, 99)
    path = save(tmp_path, pixels)
    with raises_code(
        "mask-colors-unknown", str(path), "(1, 2, 3) in 2 pixels, (9, 9, 99) in 1 pixel,"
    ):
        image_io.read_mask(path, TABLE, MaskFormat(colors=COLORS))


def test_many_unknown_colors_are_counted(tmp_path):
    pixels = np.arange(20 * 3).reshape(4, 5, 3) + 60
    with raises_code("mask-colors-unknown", "and 12 more colours"):
        image_io.read_mask(save(tmp_path, pixels), TABLE, MaskFormat(colors=COLORS))


def test_a_tolerance_takes_in_the_nearest_color(tmp_path):
    pixels = PIXELS.astype(int)
    pixels[0, 0], pixels[1, 1] = (12, 18, 31), (198, 2, 1)
    path = save(tmp_path, pixels)
    assert image_io.read_mask(path, TABLE, MaskFormat(COLORS, tolerance=2)).tolist() == IDS
    with raises_code("mask-colors-unknown", "set data.mask_tolerance to 2"):
        image_io.read_mask(path, TABLE, MaskFormat(COLORS, tolerance=1))


def test_a_jpeg_of_colors_points_to_its_source(tmp_path):
    noise = np.random.default_rng(0).integers(0, 2, (32, 32))
    path = save(tmp_path, np.array([GROUND, THING])[noise], "m.jpg", quality=30)
    with raises_code("mask-colors-unknown", "this is a JPEG"):
        image_io.read_mask(path, TABLE, MaskFormat(COLORS))


@pytest.mark.parametrize(
    ("channel", "expected"), [("red", [0, 1]), ("green", [1, 1]), ("blue", [1, 0])]
)
def test_ids_in_one_channel(tmp_path, channel, expected):
    path = save(tmp_path, [[(0, 1, 1), (1, 1, 0)]])
    assert image_io.read_mask(path, TABLE, MaskFormat(channel=channel)).tolist() == [expected]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "L"])
def test_equal_channels(tmp_path, mode):
    path = save(tmp_path, [[0, 1], [255, 1]], mode=mode)
    form = MaskFormat(channel="grey")
    assert image_io.read_mask(path, TABLE, form).tolist() == [[0, 1], [255, 1]]


def test_channels_that_differ_are_not_grey(tmp_path):
    path = save(tmp_path, [[(0, 0, 0), (1, 1, 2)]])
    with raises_code("mask-not-grey", str(path), "in 1 pixels"):
        image_io.read_mask(path, TABLE, MaskFormat(channel="grey"))


def test_the_values_of_a_channel_go_through_the_table(tmp_path):
    path = save(tmp_path, [[(7, 7, 7), (9, 9, 9)]])
    table = image_io.id_table(2, id_map=((7, 1), (9, 0)))
    assert image_io.read_mask(path, table, MaskFormat(channel="grey")).tolist() == [[1, 0]]


@pytest.mark.parametrize("mode", ["L", "RGB", "LA", "1", "P"])
def test_levels_from_the_threshold_on(tmp_path, mode):
    """Level 255 is the object, whatever data.ignore_ids says; 1 bit shows 0 and 255."""
    levels = [[0, 255]] if mode == "1" else [[0, 127, 128, 255]]
    expected = [[0, 1]] if mode == "1" else [[0, 0, 1, 1]]
    path = save(tmp_path, levels, mode=mode)
    assert image_io.read_mask(path, TABLE, MaskFormat(threshold=128)).tolist() == expected


def test_more_than_8_bits_are_refused(tmp_path):
    Image.fromarray(np.array([[0, 60000]], np.uint16)).save(tmp_path / "m.png")
    for form in (MaskFormat(COLORS), MaskFormat(threshold=128), MaskFormat(channel="grey")):
        with raises_code("mask-mode-unsupported", "outside 0 to 255"):
            image_io.read_mask(tmp_path / "m.png", TABLE, form)


@pytest.mark.parametrize(
    ("values", "code", "part"),
    [
        ({"mask_colors": COLORS, "mask_threshold": 9}, "mask-formats-contradict", "mask_threshold"),
        ({"mask_colors": COLORS, "id_map": ((0, 0),)}, "id-map-without-values", "mask_colors"),
        ({"mask_threshold": 9, "classes": ("a", "b", "c")}, "mask-threshold-not-binary", "3"),
        ({"mask_colors": (GROUND, THING, NONE)}, "mask-colors-count", "3 colours for 2 classes"),
        ({"mask_colors": ((GROUND, 2),)}, "mask-color-class-out-of-range", "0 to 1"),
        ({"mask_colors": ((GROUND, 0), (GROUND, 1))}, "mask-colors-overlap", "take one out"),
        (
            {"mask_colors": (((0, 0, 0), 0), ((6, 0, 0), 1)), "mask_tolerance": 3},
            "mask-colors-overlap",
            "lower data.mask_tolerance",
        ),
    ],
)
def test_contradictions_are_refused(values, code, part):
    with raises_code(code, part):
        MaskFormat.from_config(data_config(**values))


def test_colors_may_be_in_the_order_of_the_classes():
    form = MaskFormat.from_config(data_config(mask_colors=(GROUND, THING)))
    assert form.colors == ((GROUND, 0), (THING, 1))


@pytest.mark.parametrize(
    ("colors", "palette", "expected"),
    [
        ((GROUND, THING), (), (GROUND, THING)),
        (((THING, 1), (NONE, 1), (GROUND, 0)), (), (GROUND, THING)),
        ((GROUND, THING), ((1, 1, 1), (2, 2, 2)), ((1, 1, 1), (2, 2, 2))),
        # No colour of the second class: none is taken.
        (((GROUND, 0), (NONE, 255)), (), image_io.generated_palette(2)),
    ],
)
def test_the_palette_is_that_of_the_masks(colors, palette, expected):
    data = data_config(mask_colors=colors, palette=palette)
    config_check.RULES["data.mask_colors"][0](data.mask_colors)
    assert folder.classes_from_config(data)[1] == expected


def test_colors_of_one_class_may_be_near():
    colors = (((0, 0, 0), 0), ((1, 0, 0), 0))
    form = MaskFormat.from_config(data_config(mask_colors=colors, mask_tolerance=3))
    assert form.colors == colors


@pytest.mark.parametrize("key", ["mask_colors", "mask_channel", "mask_threshold"])
def test_sources_with_masks_of_their_own_refuse_the_keys(key):
    config = default.get_config()
    config.data.name = "streets"
    config.data[key] = {"mask_colors": COLORS, "mask_channel": "red", "mask_threshold": 9}[key]
    with raises_code("mask-format-of-source", f"data.{key}"):
        config_check.check(config)


def test_the_content_of_a_file_is_remembered_by_format(tmp_path):
    path = str(save(tmp_path, [[0, 90], [255, 0]]))
    cache = file_content.FileCache(epath.Path(tmp_path / "cache"), "x")
    plain = cache.mask(path)
    halves = cache.mask(path, MaskFormat(threshold=128))
    assert plain.values == {0: 2, 90: 1, 255: 1} and halves.values == {0: 3, 1: 1}
    assert plain == cache.mask(path) and plain.pixel_hash != halves.pixel_hash


@pytest.mark.parametrize("downscale", [1, 2])
def test_a_data_set_of_colored_masks_is_that_of_ids(folder_config, folder_data, downscale):
    """Drawn labels, counts and the masks themselves."""
    folder_config.data.downscale = downscale
    folder_config.data.holdout = 0.5
    plain = load.load_dataset(folder_config)
    before = [image_io.read_mask(e.mask, plain.table) for e in plain.labeled]
    colors = ((5, 5, 5), (250, 0, 0), (0, 99, 0))
    for path in (folder_data / "masks").rglob("*.png"):
        ids = np.asarray(Image.open(path))
        table = np.zeros((256, 3), np.uint8)
        table[:3], table[255] = colors, (1, 1, 1)
        Image.fromarray(table[ids]).save(path)
    pairs = (*((c, i) for i, c in enumerate(colors)), ((1, 1, 1), 255))
    folder_config.data.mask_colors = pairs
    colored = load.load_dataset(folder_config)
    assert colored.labeled_pixels == plain.labeled_pixels
    assert [e.id for e in colored.labeled] == [e.id for e in plain.labeled]
    for example, mask in zip(colored.labeled, before, strict=True):
        read = image_io.read_mask(example.mask, colored.table, colored.mask_format)
        np.testing.assert_array_equal(read, mask)
    # Smaller copies hold class ids.
    assert (colored.mask_format == VALUES) == (downscale > 1)
