"""Files are decoded once, known by their content, and compared across the sets of a data set."""

import dataclasses
import io
import itertools
import json
import os

import numpy as np
import pytest
from etils import epath
from PIL import Image

from semiseg_jax import workdir
from semiseg_jax.data import content_check, file_content, image_io, load, splits
from semiseg_jax.data.data_record import DataRecord
from semiseg_jax.pseudo_labels import MANIFEST, restrict_to_labeled
from semiseg_jax.runtime.logger import capture_lines
from tests.errors import raises_code

LOSSLESS = {"png": {}, "bmp": {}, "tif": {}, "ppm": {}, "webp": {"lossless": True, "exact": True}}
LOSSY = {"jpg": {}}
FORMATS = LOSSLESS | LOSSY


@pytest.fixture(autouse=True)
def settled(monkeypatch):
    """Files that a test has just written are remembered."""
    monkeypatch.setattr(file_content, "_SETTLED_NS", -(10**12))


@pytest.fixture
def reads(monkeypatch):
    """Collects the paths of the files that are decoded."""
    paths = []

    def count(read):
        def read_and_count(path, *args):
            paths.append(os.path.basename(path))
            return read(path, *args)

        return read_and_count

    for name in ("read_image", "read_mask"):
        monkeypatch.setattr(image_io, name, count(getattr(image_io, name)))
    return paths


def forget():
    """Forgets what the process remembers, as a new process does."""
    file_content._open.cache_clear()


def start(config, recorded=None):
    forget()
    return load.load_dataset(config, recorded)


def is_same(dataset, other):
    """Whether two data sets are equal; == does not compare arrays."""
    names = {field.name for field in dataclasses.fields(dataset)} - {"table"}
    return (dataset.table == other.table).all() and all(
        getattr(dataset, name) == getattr(other, name) for name in names
    )


# What a manifest says of a label map.
LABELED = {"sha256": "0", "size": [36, 48], "mean_confidence": 0.5, "histogram": {"0": 1728}}


def noise(seed, size=(36, 48)):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3)).astype(np.uint8)


def repaint(path):
    """Changes pixels of an image or mask; size, name and, if the file allows it, times stay."""
    before = os.stat(path)
    with Image.open(path) as image:
        values, palette = np.array(image), image.getpalette()
    values[10:14, 10:14] = 2 - values[10:14, 10:14] % 2
    changed = Image.fromarray(values)
    if palette:
        changed.putpalette(palette)
    changed.save(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


# ---- remembered


def test_files_are_decoded_once(folder_config, folder_data, reads):
    first = start(folder_config)
    assert len(reads) == 4 * 2 + 8 + 5 * 2
    reads.clear()
    assert is_same(start(folder_config), first) and reads == []
    repaint(first.evaluation[0].mask)
    os.utime(first.labeled[0].image)
    again = start(folder_config)
    names = (first.evaluation[0].mask, first.labeled[0].image)
    assert sorted(reads) == sorted(map(os.path.basename, names))
    assert again.record.first_change(first.record) is None
    assert again.record.evaluation != first.record.evaluation


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"[" * 10**5, b'{"version": 1}', b'{"files": 3}']
)
def test_a_damaged_memory_is_not_used(folder_config, tmp_path, reads, content):
    first = start(folder_config)
    (path,) = (tmp_path / "cache" / file_content.FOLDER).iterdir()
    stored = path.read_bytes()
    path.write_bytes(content)
    reads.clear()
    assert is_same(start(folder_config), first) and len(reads) == 26
    assert json.loads(path.read_bytes()) == json.loads(stored)


def test_a_file_that_has_just_changed_is_not_remembered(folder_config, reads, monkeypatch):
    monkeypatch.setattr(file_content, "_SETTLED_NS", 10**12)
    start(folder_config)
    start(folder_config)
    assert len(reads) == 2 * 26


@pytest.mark.parametrize("suffix", LOSSLESS)
def test_the_same_pixels_in_another_format_are_the_same(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    pixels = noise(0)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(pixels).save(path, **FORMATS[suffix])
    cache = file_content.FileCache(epath.Path(tmp_path), "cache")
    contents = [cache.image(str(tmp_path / "a.png")), cache.image(str(path))]
    assert contents[0].pixel_hash == contents[1].pixel_hash
    assert file_content.FileContent.from_json(json.loads(json.dumps(contents[1].to_json())))


# ---- lost and broken images


def damaged(path, share):
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("share", [0, 0.3, 0.8])
def test_a_truncated_unlabelled_image_is_left_out(folder_config, folder_data, suffix, share):
    (folder_data / "more").mkdir()
    path = folder_data / "more" / f"x.{suffix}"
    Image.fromarray(noise(0)).save(path, **FORMATS[suffix])
    folder_config.data.unlabeled_dir = "more"
    whole = start(folder_config)
    damaged(path, share)
    with capture_lines() as lines:
        data = start(folder_config)
    assert list(data.left_out) == ["more/x"] and data.unlabeled == whole.unlabeled[:-1]
    assert sum("is left out" in line and f"x.{suffix}" in line for line in lines) == 1
    assert data.split_hash == whole.split_hash
    report = splits.examine_config(folder_config)
    assert not report.errors
    assert any(f"x.{suffix}" in w and "is left out" in w for w in report.warnings)


@pytest.fixture
def begun(folder_config, tmp_path):
    """(workdir of a run that has begun, its data set)."""
    folder = epath.Path(tmp_path / "run")
    data = start(folder_config)
    workdir.write_data(folder, data)
    return folder, data


def continued(config, folder):
    data = start(config, workdir.read_record(folder))
    workdir.check_data(folder, data)
    workdir.write_data(folder, data)
    return restrict_to_labeled(data, folder / "labels")


def lose(path):
    os.unlink(path)


def break_(path):
    with open(path, "r+b") as file:
        file.truncate(60)


@pytest.mark.parametrize("damage", [lose, break_])
def test_an_image_lost_before_labelling_is_left_out(folder_config, begun, damage):
    """The draw of the labelled images would be another one without it."""
    folder, first = begun
    lost = first.unlabeled[2]
    content = epath.Path(lost.image).read_bytes()
    damage(lost.image)
    data = continued(folder_config, folder)
    assert data.labeled == first.labeled and list(data.left_out) == [lost.id]
    assert data.split_hash == first.split_hash
    # Once the others are labelled, it stays out.
    manifest = {"images": {e.id: LABELED for e in data.unlabeled}, "left_out": dict(data.left_out)}
    (folder / "labels").mkdir()
    (folder / "labels" / MANIFEST).write_text(json.dumps(manifest))
    assert continued(folder_config, folder).unlabeled == data.unlabeled
    epath.Path(lost.image).write_bytes(content)
    restored = continued(folder_config, folder)
    assert restored.unlabeled == data.unlabeled and list(restored.left_out) == [lost.id]


@pytest.mark.parametrize("damage", [lose, break_])
def test_an_image_lost_after_labelling_is_refused(folder_config, begun, damage):
    folder, data = begun
    manifest = {"images": {e.id: LABELED for e in data.unlabeled}}
    (folder / "labels").mkdir()
    (folder / "labels" / MANIFEST).write_text(json.dumps(manifest))
    damage(data.unlabeled[2].image)
    with raises_code("pseudo-labeled-image-lost", data.unlabeled[2].image):
        continued(folder_config, folder)


def test_an_image_repaired_before_labelling_is_used(folder_config, folder_data, tmp_path):
    path = epath.Path(folder_data / "images/train/011.png")
    content = path.read_bytes()
    folder_config.data.labeled_list = "l.txt"
    (folder_data / "l.txt").write_text("000\n001\n002\n")
    break_(path)
    folder = epath.Path(tmp_path / "run")
    assert list(continued(folder_config, folder).left_out) == ["011"]
    path.write_bytes(content)
    assert not continued(folder_config, folder).left_out
    repaint(path)
    with raises_code("training-file-changed", "011.png"):
        continued(folder_config, folder)


@pytest.mark.parametrize("kind", ["image", "mask"])
def test_a_lost_labelled_file_is_refused_by_name(folder_config, begun, kind):
    folder, data = begun
    path = getattr(data.labeled[1], kind)
    os.unlink(path)
    with raises_code("image-missing", path):
        continued(folder_config, folder)


# ---- changed files


@pytest.mark.parametrize(
    ("name", "kind"), [("labeled", "image"), ("labeled", "mask"), ("unlabeled", "image")]
)
@pytest.mark.parametrize("during_run", [True, False])
def test_a_changed_training_file_is_refused_by_name(folder_config, begun, name, kind, during_run):
    folder, data = begun
    assert is_same(load.verify(data, folder_config.data.cache_dir), data)
    paths = [getattr(example, kind) for example in getattr(data, name)]
    for path in paths[1:3]:
        repaint(path)
    if during_run:
        with raises_code("file-changed-during-run", paths[1]):
            load.verify(data, folder_config.data.cache_dir)
    else:
        with raises_code("training-file-changed", paths[1]):
            continued(folder_config, folder)


def test_a_file_that_is_encoded_again_is_not_changed(folder_config, begun):
    folder, data = begun
    for path in (data.labeled[0].image, data.labeled[0].mask, data.evaluation[0].mask):
        with Image.open(path) as image:
            image.load()
        image.save(path, compress_level=1, bits=8)
    again = continued(folder_config, folder)
    assert is_same(load.verify(data, folder_config.data.cache_dir), data)
    assert again.record.evaluation == data.record.evaluation


def test_a_workdir_without_a_record_goes_on(folder_config, begun):
    folder, data = begun
    content = json.loads((folder / "data.json").read_text())
    del content["files"]
    (folder / "data.json").write_text(json.dumps(content))
    repaint(data.labeled[0].mask)
    continued(folder_config, folder)
    repaint(data.labeled[0].mask)
    continued(folder_config, folder)  # The pixels that are repainted twice are the same.
    (folder / "round_0").mkdir()
    (folder / "data.json").write_text(json.dumps(content | {"files": {"sets": 3}}))
    with raises_code("fingerprint-damaged", "data.json"):
        continued(folder_config, folder)


def test_a_record_is_restored_from_json(folder_config):
    record = start(folder_config).record
    restored = DataRecord.from_json(json.loads(json.dumps(record.to_json())))
    assert list(restored.examples()) == list(record.examples())
    assert restored.evaluation == record.evaluation


# ---- the contents of several files together


@pytest.mark.parametrize("suffix", LOSSLESS)
@pytest.mark.parametrize("name", ["labeled", "unlabeled"])
def test_an_evaluated_image_in_training_is_refused(folder_config, folder_data, suffix, name):
    data = start(folder_config)
    path = epath.Path(getattr(data, name)[1].image)
    with Image.open(data.evaluation[2].image) as image:
        copy = image.convert("RGB")
    path.unlink()
    copy.save(path.with_suffix(f".{suffix}"), **FORMATS[suffix])
    if image.size != Image.open(epath.Path(folder_data / "masks/train" / path.name)).size:
        epath.Path(folder_data / "masks/train" / path.name).unlink()
        folder_config.data.labels = 0.0
    with raises_code("eval-image-content-in-training", f"{path.stem}.{suffix}", "val/002.png"):
        start(folder_config)
    errors = splits.examine_config(folder_config).errors
    assert any("same pixels" in error and f"{path.stem}.{suffix}" in error for error in errors)


@pytest.mark.parametrize("name", ["labeled", "unlabeled", "evaluation", "selection"])
def test_the_check_of_splits_decodes_every_set(folder_config, name):
    folder_config.data.holdout = 0.5
    folder_config.eval.select, folder_config.eval.every = "holdout", 2
    data = start(folder_config)
    path = epath.Path(getattr(data, name)[-1].image)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    report = splits.examine_config(folder_config)
    (sentence,) = report.warnings if name == "unlabeled" else report.errors
    assert path.name in sentence and "cannot be decoded" in sentence
    path.write_bytes(content)
    if name != "evaluation":
        size = image_io.image_size(path)
        evaluated = next(e for e in data.evaluation if image_io.image_size(e.image) == size)
        path.write_bytes(epath.Path(evaluated.image).read_bytes())
        (error,) = splits.examine_config(folder_config).errors
        assert "same pixels" in error and path.name in error


def test_blank_images_may_be_in_both_sets(folder_config):
    data = start(folder_config)
    for example in (data.unlabeled[0], data.evaluation[0]):
        size = image_io.image_size(example.image)
        Image.new("RGB", size[::-1]).save(example.image)
    start(folder_config)


def mask_content(tmp_path, number, values, colors=None):
    """(path, content) of a mask with these values and the palette {value: colour}."""
    mask = Image.fromarray(np.resize(np.array(values, np.uint8), (6, 8)))
    if colors is not None:
        palette = np.zeros((max(colors) + 1, 3), np.uint8)
        for value, color in colors.items():
            palette[value] = color
        mask.putpalette(palette.tobytes())
    path = str(tmp_path / f"{number}.png")
    mask.save(path)
    return path, file_content._read_mask(path)


BLACK, RED, GREEN = (0, 0, 0), (200, 0, 0), (0, 200, 0)


@pytest.mark.parametrize("order", [*itertools.permutations((BLACK, RED, GREEN))])
@pytest.mark.parametrize("used", [(0, 1), (0, 2), (0, 1, 2)])
def test_palettes_that_contradict_each_other(tmp_path, order, used):
    """In each pair the second mask uses one of the colours of the first for another value."""
    table = image_io.id_table(3)
    masks = [
        mask_content(tmp_path, 0, (0, 1), {0: BLACK, 1: RED, 2: GREEN}),
        mask_content(tmp_path, 1, used, dict(enumerate(order))),
    ]
    first, second = {0: BLACK, 1: RED}, {value: order[value] for value in used}
    is_other = any((v == w) != (c == d) for v, c in first.items() for w, d in second.items())
    warnings = content_check.mask_warnings(masks, table)
    assert len(warnings) == is_other
    assert all(path in warning for warning in warnings for path, _ in masks)


@pytest.mark.parametrize(
    ("values", "warns"),
    [
        ([(0, 1), (0, 255)], True),
        ([(0,), (0, 255), (0, 1)], True),
        ([(1,), (0, 255)], True),
        ([(0, 1), (0, 255), (0, 1, 255)], False),
        ([(0, 1), (0, 255), (0, 2)], False),
        ([(0, 1), (0, 1)], False),
        ([(0, 255), (0, 255)], False),
    ],
)
def test_masks_of_0_and_1_beside_masks_of_0_and_255(tmp_path, values, warns):
    masks = [mask_content(tmp_path, i, v) for i, v in enumerate(values)]
    warnings = content_check.mask_warnings(masks, image_io.id_table(3))
    assert len(warnings) == warns
    assert all(".png is a mask of 0 and 1" in warning for warning in warnings)
    merged = image_io.id_table(2, (), ((0, 0), (1, 1), (255, 1)))
    if {v for mask in values for v in mask} <= {0, 1, 255}:
        assert content_check.mask_warnings(masks, merged) == []


@pytest.mark.parametrize("removed", [(1,), (2,), (1, 2)])
@pytest.mark.parametrize("held_out", [True, False])
def test_an_evaluation_set_that_lacks_classes(folder_config, folder_data, removed, held_out):
    folder = folder_data / "masks" / ("train" if held_out else "val")
    for path in sorted(folder.iterdir()):
        mask = np.asarray(Image.open(path))
        Image.fromarray(np.where(np.isin(mask, removed), 0, mask).astype(np.uint8)).save(path)
    if held_out:
        with Image.open(folder / "000.png") as image:
            mask = np.array(image)
        for value in removed:
            mask[20 + value, 20] = value
        Image.fromarray(mask).save(folder / "000.png")
        (folder_data / "l.txt").write_text("\n".join(f"{i:03d}" for i in range(4)))
        folder_config.data.labeled_list = "l.txt"
        (folder_data / "e.txt").write_text("\n".join(f"{i:03d}" for i in range(4, 8)))
        folder_config.data.evaluation_list = "e.txt"
        for path in (folder_data / "images/val").iterdir():
            path.unlink()
    with capture_lines() as lines:
        start(folder_config)
    names = [("ground", "thing", "corner")[i] for i in removed]
    found = [line for line in lines if "mIoU tells nothing" in line]
    assert len(found) == 1 and all(name in found[0] for name in names)
    assert ("no class but ground" in found[0]) == (len(removed) == 2)
    found = [w for w in splits.examine_config(folder_config).warnings if "mIoU tells" in w]
    assert len(found) == 1 and all(name in found[0] for name in names)


def test_a_png_of_few_bits_keeps_its_colors():
    buffer = io.BytesIO()
    image = Image.fromarray(np.zeros((4, 4), np.uint8))
    image.putpalette([1, 2, 3, 4, 5, 6])
    image.save(buffer, "PNG", bits=1)
    assert file_content._palette_colors(buffer.getvalue(), {0: 16, 3: 0}) == {0: "010203"}
