"""Images and masks are paired by name, whatever the case of the endings or the form of accents."""

import itertools
import json
import os
import unicodedata

import numpy as np
import pytest
from etils import epath
from PIL import Image

from semiseg_jax.data import load, splits
from semiseg_jax.data.dataset import (
    IMAGE_SUFFIXES,
    MAX_NAME_BYTES,
    Example,
    check_name,
    pairs,
)
from semiseg_jax.runtime import fileio
from semiseg_jax.runtime.logger import capture_lines
from semiseg_jax.serving import inputs, prediction_writer
from tests.errors import raises_code

MASK = Image.fromarray(np.eye(8, dtype=np.uint8))


def cases_of(ending):
    """Returns forms of an ending in other case: lower, upper, title and mixed."""
    mixed = "".join(c.upper() if i % 2 else c for i, c in enumerate(ending))
    return sorted({ending, ending.upper(), ending.title(), mixed})


def paired(root, *suffixes, masks="masks"):
    """Returns the pairs below `root` and the lines that are logged."""
    with capture_lines() as lines:
        return pairs(epath.Path(root / "images"), epath.Path(root / masks), *suffixes), lines


@pytest.fixture
def root(tmp_path):
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
    return tmp_path


@pytest.mark.parametrize("ending", IMAGE_SUFFIXES)
def test_endings_of_images_and_masks_in_any_case(root, ending):
    forms = list(itertools.product(cases_of(ending), cases_of(ending)))
    for number, (image, mask) in enumerate(forms):
        (root / "images" / f"{number}{image}").touch()
        (root / "masks" / f"{number}{mask}").touch()
    examples, lines = paired(root, "", ending)
    assert {e.id for e in examples} == {str(number) for number in range(len(forms))}
    assert all(e.mask and e.mask.split("/")[-1].startswith(f"{e.id}.") for e in examples)
    assert lines == []


@pytest.mark.parametrize("masks", ["masks", "images"])
def test_longer_suffixes_in_any_case(root, masks):
    for number, (image, mask) in enumerate(
        itertools.product(cases_of("_im.jpg"), cases_of("_m.png"))
    ):
        (root / "images" / f"{number}{image}").touch()
        (root / masks / f"{number}{mask}").touch()
    examples, lines = paired(root, "_IM.jpg", "_m.PNG", masks=masks)
    assert len(examples) == number + 1 and all(e.mask for e in examples) and lines == []


def test_the_exact_ending_takes_precedence(root):
    (root / "images" / "a.jpg").touch()
    for mask in ("a.PNG", "a.png", "a.Png"):
        (root / "masks" / mask).touch()
    (example,), lines = paired(root)
    assert example.mask == str(root / "masks/a.png")
    assert "2 masks below" in lines[0]


@pytest.mark.parametrize("ending", [".gif", ".jfif", ".GIF", ".heic", ".avif", ".txt", ".npy", ""])
@pytest.mark.parametrize("kind", ["images", "masks"])
def test_files_of_other_endings_are_counted_and_named(root, kind, ending):
    for name in ("images/a.jpg", "masks/a.png", f"{kind}/b{ending}", f"{kind}/more/c{ending}"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).touch()
    (root / kind / ".hidden").touch()
    examples, (line,) = paired(root)
    assert [e.id for e in examples] == ["a"] and examples[0].mask
    assert line.startswith(f"2 files below {root / kind} are left out (2 {ending.lower()}")
    assert f"{root / kind}/b{ending}" in line and ".png" in line


def test_masks_of_another_ending_below_the_images_are_no_images(root):
    for name in ("a.jpg", "a.png", "b.bmp"):
        (root / "images/masks").mkdir(exist_ok=True)
        (root / ("images" if name == "a.jpg" else "images/masks") / name).touch()
    examples, (line,) = paired(root, masks="images/masks")
    assert [e.id for e in examples] == ["a"] and "1 .bmp" in line


NAMES = ("café", "Müller ß", "한글", "が", "Å", "naïve/über")


@pytest.mark.parametrize("forms", [*itertools.product(("NFC", "NFD"), repeat=2)], ids="-".join)
def test_names_in_either_unicode_form_are_paired(root, forms):
    for kind, form in zip(("images", "masks"), forms, strict=True):
        for name in NAMES:
            path = root / kind / f"{unicodedata.normalize(form, name)}.png"
            path.parent.mkdir(exist_ok=True)
            path.touch()
    examples, lines = paired(root)
    assert len(examples) == len(NAMES) and all(e.mask for e in examples) and lines == []
    # Ids are the names as the folder has them.
    assert {e.id for e in examples} == {unicodedata.normalize(forms[0], name) for name in NAMES}


def test_names_that_differ_in_their_form_alone_keep_their_masks(root):
    for kind in ("images", "masks"):
        for form in ("NFC", "NFD"):
            (root / kind / f"{unicodedata.normalize(form, 'é')}.png").touch()
    examples, _ = paired(root)
    assert len(examples) == 2 and len({e.mask for e in examples}) == 2


def test_folders_of_images_that_share_masks_through_a_link(root):
    for name in ("images/a/x.png", "images/b/x.png", "masks/a/x.png"):
        (root / name).parent.mkdir(exist_ok=True)
        MASK.save(root / name)
    (root / "masks/b").symlink_to(root / "masks/a")
    examples, _ = paired(root)
    assert [e.mask for e in examples] == [f"{root}/masks/{name}/x.png" for name in "ab"]


# --- Names that files cannot be named after


def bad_names():
    """Names that are not UTF-8, and names that are too long, as the bytes of the file system."""
    for encoding in ("latin-1", "utf-16-le"):
        yield "café".encode(encoding).replace(b"\0", b"\xff"), "image-name-not-utf8"
    yield "日本".encode("shift-jis"), "image-name-not-utf8"
    for name in ("a" * 236, "é" * 118, "車" * 79, "x" * 251):
        yield name.encode(), "image-name-too-long"


@pytest.mark.parametrize(("name", "code"), list(bad_names()))
@pytest.mark.parametrize("folder", ["images/train", "images/val", "more"])
def test_bad_names_are_found_before_training(folder_config, folder_data, folder, name, code):
    (folder_data / "more").mkdir()
    content = (folder_data / "images/train/000.png").read_bytes()
    (folder_data / "more/a.png").write_bytes(content)
    (folder_data / folder / os.fsdecode(name + b".png")).write_bytes(content)
    folder_config.data.unlabeled_dir = "more"
    with raises_code(code) as error:
        load.plan_dataset(folder_config)
    str(error.value).encode()
    assert any(str(error.value) in line for line in splits.examine_config(folder_config).errors)


def test_the_longest_names_are_written(tmp_path):
    for name in ("a" * MAX_NAME_BYTES, "é" * (MAX_NAME_BYTES // 2), "車" * (MAX_NAME_BYTES // 3)):
        check_name(Example(f"folder/{name}", "x.png", None))
        fileio.write_bytes(tmp_path / f"{name}.png", b"content")


@pytest.mark.parametrize("name", ["a" * MAX_NAME_BYTES, "車" * (MAX_NAME_BYTES // 3)])
def test_images_with_the_longest_names_are_downscaled(folder_config, folder_data, name):
    for kind in ("images", "masks"):
        (folder_data / kind / "train/000.png").rename(folder_data / kind / f"train/{name}.png")
    folder_config.data.downscale = 2
    dataset = load.load_dataset(folder_config)
    examples = (*dataset.labeled, *dataset.unlabeled)
    assert sum(e.id == name for e in examples) == 1
    assert len({e.image for e in examples}) == len(examples)


def test_lines_and_tables_with_such_names_are_printed(folder_config, folder_data, capsys):
    (folder_data / "images/train" / os.fsdecode(b"caf\xe9.gif")).touch()
    load.plan_dataset(folder_config)
    assert "caf\\udce9.gif" in capsys.readouterr().out


def test_predict_names_such_files_and_reads_the_others(tmp_path):
    names = [name for name, _ in bad_names()]
    for name in (b"a", *names):
        MASK.save(tmp_path / os.fsdecode(name + b".png"), format="PNG")
    images = inputs.Images(tmp_path, tmp_path / "output")
    errors = {}
    sizes = prediction_writer._read_sizes(
        images.examples, lambda example, error: errors.update({example.image: str(error)})
    )
    assert sizes == {str(tmp_path / "a.png"): (8, 8)}
    assert len(errors) == len(names)
    json.dumps(errors).encode()
