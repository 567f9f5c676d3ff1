"""Split lists in the forms that people write, and the files that their paths lead to."""

import itertools
import unicodedata

import numpy as np
import pytest
from etils import epath
from PIL import Image

from semiseg_jax.data import load, split_lists, splits
from semiseg_jax.data.split_lists import Entry
from semiseg_jax.runtime.logger import capture_lines
from tests.errors import raises_code


def read(tmp_path, text):
    path = tmp_path / "list.txt"
    path.write_text(text)
    return [(e.image, e.mask, e.without_mask) for e in split_lists.read_list(path)]


NAMES = ("a", "street 1", "x,1", "2007_000032", "day 2/a;b", "é", "foo_jpg.rf.0a1b")
SEPARATORS = {"TAB": "\t", "comma": ",", "comma and blank": ", ", "semicolon": ";", "blank": " "}


def fits(name, separator):
    """Returns whether names may hold what separates them; quotes allow it for commas."""
    return separator == "\t" or not (separator == " " and " " in name)


@pytest.mark.parametrize("separator", SEPARATORS)
@pytest.mark.parametrize("endings", [(".jpg", ".png"), (".PNG", ".png"), (".tiff", ".bmp")])
def test_two_columns_with_each_separator(tmp_path, separator, endings):
    names = [n for n in NAMES if fits(n, SEPARATORS[separator])]
    pairs = [(f"images/{n}{endings[0]}", f"masks/{n}{endings[1]}") for n in names]
    if separator.startswith(("comma", "semicolon")):
        character = SEPARATORS[separator].strip()
        pairs = [pair for pair in pairs if character not in pair[0]]
    text = "\n".join(SEPARATORS[separator].join(pair) for pair in pairs)
    assert read(tmp_path, text) == [(*pair, False) for pair in pairs]
    without = "\n".join(f"{image}{SEPARATORS[separator]}None" for image, _ in pairs)
    assert read(tmp_path, without) == [(image, None, True) for image, _ in pairs]


@pytest.mark.parametrize("name", [n for n in NAMES if " " not in n])
def test_names_with_commas_in_one_column_and_in_quotes(tmp_path, name):
    assert read(tmp_path, f"{name}\n{name}.png") == [
        (name, None, False),
        (f"{name}.png", None, False),
    ]
    line = f'"images/{name}.jpg","masks/{name}.png"'
    assert read(tmp_path, line) == [(f"images/{name}.jpg", f"masks/{name}.png", False)]


@pytest.mark.parametrize("titles", ["image,mask", "Image, Mask", '"filename","label"', "img;seg"])
def test_titles_of_columns_are_no_image(tmp_path, titles):
    separator = ";" if ";" in titles else ","
    lines = [f"{i}.jpg{separator}{i}.png" for i in range(2)]
    assert read(tmp_path, "\n".join([titles, *lines])) == [
        (f"{i}.jpg", f"{i}.png", False) for i in range(2)
    ]


def test_an_empty_column_names_no_mask(tmp_path):
    assert read(tmp_path, "a.jpg,\nb.jpg,b.png\n") == [
        ("a.jpg", None, False),
        ("b.jpg", "b.png", False),
    ]


@pytest.mark.parametrize("end", ["\t", "\t \r\n", " \t\n"])
def test_a_tab_at_the_end_allows_blanks_in_the_name(tmp_path, end):
    assert read(tmp_path, f"my image.jpg{end}") == [("my image.jpg", None, False)]


def test_three_comma_separated_files_are_refused(tmp_path):
    with raises_code("split-list-columns", "line 1", "3 columns"):
        read(tmp_path, "a.jpg,a.png,b.png\n")


def test_entries_of_equal_paths_are_equal():
    assert Entry("a", "b", absolute_image="/a") == Entry("a", "b")


# --- Absolute paths


@pytest.fixture
def elsewhere(folder_data, tmp_path):
    """A folder with files of the same relative paths as the data, and other pixels."""
    root = tmp_path / "elsewhere"
    for kind, mode in (("images", "RGB"), ("masks", "L")):
        (root / kind / "train").mkdir(parents=True)
        for number in range(3):
            Image.new(mode, (40, 30)).save(root / kind / "train" / f"{number:03d}.png")
    return root


def labelled(config, root, lines):
    """Returns the labelled examples of a list, and the lines that are logged."""
    (root / "l.txt").write_text("\n".join(lines) + "\n")
    config.data.labeled_list = "l.txt"
    with capture_lines() as logged:
        dataset, _ = load.plan_dataset(config)
    return dataset.labeled, "\n".join(logged)


@pytest.mark.parametrize("columns", [1, 2])
def test_an_absolute_path_is_that_file(folder_config, folder_data, elsewhere, columns):
    paths = [
        (f"{elsewhere}/images/train/00{i}.png", f"{elsewhere}/masks/train/00{i}.png")
        for i in (0, 1)
    ]
    examples, _ = labelled(folder_config, folder_data, ["\t".join(p[:columns]) for p in paths])
    assert [e.image for e in examples] == [image for image, _ in paths]
    assert [e.mask for e in examples] == [mask if columns == 2 else None for _, mask in paths]
    report = splits.examine_lists({"labeled": str(folder_data / "l.txt")}, str(folder_data))
    assert report.errors == []


def test_a_missing_absolute_path_in_an_existing_folder_is_refused(
    folder_config, folder_data, elsewhere
):
    path = f"{elsewhere}/images/train/007.png"
    with raises_code("listed-image-missing", path):
        labelled(folder_config, folder_data, [path])
    report = splits.examine_lists({"labeled": str(folder_data / "l.txt")}, str(folder_data))
    assert any("missing below" in error for error in report.errors)


def test_an_absolute_path_below_the_root_has_the_mask_of_its_image(folder_config, folder_data):
    (folder_data.parent / "link").symlink_to(folder_data)
    for root in (folder_data, folder_data.parent / "link"):
        examples, _ = labelled(folder_config, folder_data, [f"{root}/images/train/003.png"])
        assert [(e.id, e.mask) for e in examples] == [("003", f"{folder_data}/masks/train/003.png")]


def test_a_leading_slash_below_the_root(folder_config, folder_data):
    examples, logged = labelled(folder_config, folder_data, ["/images/train/003.png"])
    assert [e.id for e in examples] == ["003"] and "not on this machine" not in logged


def test_folders_of_another_machine_are_named(folder_config, folder_data):
    lines = [f"/author/data/images/train/00{i}.png" for i in range(3)]
    examples, logged = labelled(folder_config, folder_data, lines)
    assert [e.id for e in examples] == ["000", "001", "002"]
    assert "names 3 images below /author/data, which is not on this machine" in logged


def test_the_home_folder(folder_config, folder_data, elsewhere, monkeypatch):
    monkeypatch.setenv("HOME", str(elsewhere))
    examples, _ = labelled(folder_config, folder_data, ["~/images/train/000.png"])
    assert [e.image for e in examples] == [f"{elsewhere}/images/train/000.png"]


# --- Unicode forms


@pytest.mark.parametrize("forms", [*itertools.product(("NFC", "NFD"), repeat=3)], ids="-".join)
@pytest.mark.parametrize(
    "line", ["{0}", "images/train/{0}.png", "images/train/{0}.png\tmasks/train/{0}.png"]
)
def test_listed_names_in_either_unicode_form(folder_config, folder_data, forms, line):
    image_form, mask_form, list_form = forms
    for kind, form in (("images", image_form), ("masks", mask_form)):
        path = folder_data / kind / "train"
        (path / "000.png").rename(path / f"{unicodedata.normalize(form, 'Straße_é_각')}.png")
    listed = line.format(unicodedata.normalize(list_form, "Straße_é_각"))
    (example,), _ = labelled(folder_config, folder_data, [listed])
    assert epath.Path(example.image).exists() and epath.Path(example.mask).exists()
    assert example.id == unicodedata.normalize(image_form, "Straße_é_각")
    assert np.asarray(Image.open(example.mask)).max() == 255


def test_the_doctor_finds_a_name_in_two_lists_in_either_form(tmp_path):
    for name, form in (("labeled", "NFC"), ("val", "NFD")):
        (tmp_path / name).write_text(f"{unicodedata.normalize(form, 'é')}.png\tm.png\n")
    report = splits.examine_lists({n: str(tmp_path / n) for n in ("labeled", "val")})
    assert any("in the labeled and in the val" in error for error in report.errors)
