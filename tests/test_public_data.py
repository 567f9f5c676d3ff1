"""The paper's configs on miniatures of its data sets, from archives to results, by the command."""

import json
import os
import sys
from pathlib import Path

import pytest

from tests import mains
from tests.data import miniatures

CONFIGS = Path(__file__).parents[1] / "configs"
COUNTS = {"train": 5, "val": 2, "test": 1, "train_extra": 2}


def run(tmp_path, monkeypatch, config, root, *overrides, tiny=mains.TINY):
    """All of Algorithm 1 on a miniature; the result rows, and the ids of the pseudo-labels."""
    mains.run(
        monkeypatch,
        f"--config={CONFIGS}/{config}",
        f"--workdir={tmp_path / 'run'}",
        f"--config.data.root={root}",
        f"--config.data.cache_dir={tmp_path / 'cache'}",
        *tiny,
        *overrides,
    )
    rows = json.loads((tmp_path / "run" / "results.json").read_text())["rows"]
    assert [(r["stage"], r["split"], r["step"]) for r in rows] == [
        ("teacher", "val", 2),
        ("student", "val", 2),
    ]
    return rows, {p.stem for p in (tmp_path / "run/round_0/teacher/pseudo_labels").glob("*.png")}


def check_cityscapes(rows, labelled_by_teacher):
    truth = [miniatures.train_ids(miniatures.label_ids(seed)) for seed in (5, 6)]
    assert rows[0]["pixels"] == sum((t != 255).sum() for t in truth)
    assert len(rows[0]["iou"]) == 19
    # 3 of 5 training images, and those of train_extra
    assert len(labelled_by_teacher) == 5
    assert {"bamberg_000000_000019", "bamberg_000001_000019"} < labelled_by_teacher


@pytest.fixture
def opened():
    """The files that are opened while a test runs; Python itself reports each."""
    paths, watching = set(), True

    def note(event, arguments):
        if watching and event == "open" and isinstance(arguments[0], str | bytes):
            paths.add(os.path.realpath(os.fsdecode(arguments[0])))

    sys.addaudithook(note)
    yield paths
    watching = False  # a hook cannot be taken away


@pytest.mark.slow
def test_cityscapes_from_lists_that_pair_every_image_with_its_truth(tmp_path, monkeypatch, opened):
    """The masks that the list of unlabelled images names are never opened."""
    root = miniatures.write_cityscapes(tmp_path / "cityscapes", COUNTS)
    ids = [f"aachen_{i:06d}_000019" for i in range(5)]
    fine = (
        "leftImg8bit/train/aachen/{0}_leftImg8bit.png gtFine/train/aachen/{0}_gtFine_labelIds.png"
    )
    coarse = (
        "leftImg8bit/train_extra/bamberg/{0}_leftImg8bit.png "
        "gtCoarse/train_extra/bamberg/{0}_gtCoarse_labelIds.png"
    )
    extra = ["bamberg_000000_000019", "bamberg_000001_000019"]
    labeled, unlabeled = tmp_path / "labeled.txt", tmp_path / "unlabeled.txt"
    labeled.write_text("\n".join(fine.format(i) for i in ids[:2]))
    unlabeled.write_text("\n".join([*map(fine.format, ids[2:]), *map(coarse.format, extra)]))
    opened.clear()
    found = run(
        tmp_path,
        monkeypatch,
        "cityscapes.py",
        root,
        f"--config.data.labeled_list={labeled}",
        f"--config.data.unlabeled_list={unlabeled}",
        "--config.data.train_extra=True",
    )
    check_cityscapes(*found)
    masks = {os.path.realpath(p) for p in root.glob("gt*/**/*.png")}
    truth = {p for p in masks if "/gtFine/" in p and p.endswith("_labelIds.png")}
    read = {p for p in truth if "/val/" in p or any(i in p for i in ids[:2])}
    assert opened & masks == read


@pytest.mark.slow
def test_cityscapes_through_tfds(tmp_path, monkeypatch):
    root = tmp_path / "tensorflow_datasets"
    miniatures.write_cityscapes_archives(root / "downloads" / "manual", COUNTS)
    overrides = (
        "--config.data.name=tfds:cityscapes/semantic_segmentation",
        "--config.data.labels=2.0",
        "--config.data.train_extra=True",
    )
    check_cityscapes(*run(tmp_path, monkeypatch, "cityscapes.py", root, *overrides))


@pytest.mark.slow
def test_pascal_voc_with_sbd(tmp_path, monkeypatch):
    """A list of the community's kind names the labelled images; the rest is unlabelled."""
    root = miniatures.write_voc(tmp_path / "voc", "mat")
    lines = "JPEGImages/{0}.jpg SegmentationClass/{0}.png\r\n"
    labelled = ["2007_000032", "2008_000007"]
    (tmp_path / "labeled.txt").write_bytes("".join(map(lines.format, labelled)).encode())
    rows, labelled_by_teacher = run(
        tmp_path,
        monkeypatch,
        "pascal_voc.py",
        root,
        f"--config.data.labeled_list={tmp_path / 'labeled.txt'}",
    )
    assert len(rows[0]["iou"]) == 21
    everything = {*miniatures.VOC_LISTS["train"], *miniatures.SBD}
    val = set(miniatures.VOC_LISTS["val"])
    assert labelled_by_teacher == everything - val - set(labelled)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "write"),
    [
        ("cityscapes.py", lambda root: miniatures.write_cityscapes(root, COUNTS)),
        ("pascal_voc.py", lambda root: miniatures.write_voc(root, "mat")),
    ],
)
def test_the_papers_networks_go_through_all_of_algorithm_1(tmp_path, monkeypatch, config, write):
    """Xception-65 and ResNet-101 as the configs have them, at tiny crops."""
    small = tuple(change for change in mains.TINY if not change.startswith("--config.model."))
    root = write(tmp_path / "data")
    run(tmp_path, monkeypatch, config, root, "--config.data.labels=2.0", tiny=small)
