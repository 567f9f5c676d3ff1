"""Findings about split lists, their files, and the data of a config."""

import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from semiseg_jax.data import load, split_lists, splits
from semiseg_jax.runtime.errors import UserError

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "configs" / "splits").glob("*/*.txt"))


def write_lists(folder, **contents):
    """Writes split lists with the given lines; returns their paths by name."""
    paths = {}
    for name, lines in contents.items():
        paths[name] = str(folder / f"{name}.txt")
        content = lines if isinstance(lines, bytes) else "\n".join(lines).encode()
        (folder / f"{name}.txt").write_bytes(content)
    return paths


PAIR = "images/{0}/{1:03d}.png masks/{0}/{1:03d}.png"


@pytest.fixture
def valid_lists(folder_data):
    """Returns valid lists of `folder_data`."""
    return write_lists(
        folder_data,
        labeled=[PAIR.format("train", i) for i in range(4)],
        unlabeled=[f"images/train/{i:03d}.png None" for i in range(4, 12)],
        val=[PAIR.format("val", i) for i in range(5)],
    )


def test_valid_lists_with_and_without_files(valid_lists, folder_data):
    for root in ("", str(folder_data)):
        report = splits.examine_lists(valid_lists, root)
        assert report.errors == report.warnings == []
        assert report.sizes == {"labeled": 4, "unlabeled": 8, "val": 5}
        assert report.masks == {"labeled": 4, "unlabeled": 0, "val": 5}
    masks = [np.asarray(Image.open(folder_data / f"masks/train/{i:03d}.png")) for i in range(4)]
    counts = np.bincount(np.concatenate([m.ravel() for m in masks]), minlength=256)
    np.testing.assert_array_equal(report.classes["labeled"], counts)
    assert "unlabeled" not in report.classes


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"labeled": ["a.jpg a.png", "b.jpg b.png", "a.jpg a.png"]}, "labeled list has a.jpg more"),
        ({"labeled": ["a", "b"], "unlabeled": ["b", "c"]}, "b in the labeled and in the unlabeled"),
        (
            {"labeled": ["a"], "val": ["JPEGImages/a.jpg m/a.png"]},
            "a in the labeled and in the val",
        ),
        (
            {"labeled": ["x"], "unlabeled": ["train/a.png"], "val": ["images/train/a.jpg"]},
            "train/a.png in the unlabeled and in the val list: the score would be",
        ),
        (
            {
                "labeled": ["leftImg8bit/train/ulm/ulm_000000_000019_leftImg8bit.png g.png"],
                "unlabeled": ["ulm_000000_000019"],
            },
            "ulm_000000_000019_leftImg8bit.png in the labeled and in the unlabeled list",
        ),
        ({"labeled": [""]}, "labeled.txt is empty"),
        ({"labeled": ["a b c"]}, "labeled.txt, line 1, has 3 columns"),
        ({"labeled": ["a.jpg None"]}, "a.jpg labelled without a mask: name its mask."),
    ],
)
def test_corrupting_mistakes_are_errors(tmp_path, changes, sentence):
    errors = splits.examine_lists(write_lists(tmp_path, **changes)).errors
    assert len(errors) == 1 and sentence in errors[0], errors


def test_same_file_name_in_other_folder_is_another_image(tmp_path):
    paths = write_lists(tmp_path, labeled=["train/a.png m/a.png"], val=["val/a.png n/a.png"])
    assert splits.examine_lists(paths).errors == []


def test_missing_list_is_error_but_omitted_list_is_note(tmp_path):
    report = splits.examine_lists({"labeled": str(tmp_path / "l.txt"), "unlabeled": "", "val": ""})
    assert [e.split(": ")[0] for e in report.errors] == [
        f"The split list {tmp_path}/l.txt is missing"
    ]
    assert len([n for n in report.notes if "list of" in n]) == 2


def test_cr_line_ends_and_byte_order_mark_are_warnings(tmp_path):
    report = splits.examine_lists(write_lists(tmp_path, labeled=b"\xef\xbb\xbfa.jpg m.png\r\n"))
    assert report.errors == []
    assert "CR line ends" in report.warnings[0] and "byte order mark" in report.warnings[1]


def test_missing_files_and_mismatched_masks_are_errors(valid_lists, folder_data):
    (folder_data / "images/train/000.png").unlink()
    (folder_data / "masks/train/001.png").unlink()
    Image.new("L", (5, 5)).save(folder_data / "masks/train/002.png")
    Image.new("RGB", (48, 36)).save(folder_data / "masks/val/001.png")
    (folder_data / "images/train/007.png").unlink()
    errors = splits.examine_lists(valid_lists, str(folder_data)).errors
    for message in (
        "labeled list names images/train/000.png, missing below",
        "masks/train/001.png, missing: ",
        "masks/train/002.png is 5x5: they must be of one size",
        "masks/val/001.png holds the colours",
        "unlabeled list names images/train/007.png, missing below",
    ):
        assert sum(message in error for error in errors) == 1, (message, errors)
    assert len(errors) == 5


def test_a_broken_unlabelled_image_is_a_warning_as_in_a_run(valid_lists, folder_data):
    (folder_data / "images/train/007.png").write_bytes(b"nothing")
    (folder_data / "images/train/001.png").write_bytes(b"nothing")
    report = splits.examine_lists(valid_lists, str(folder_data))
    (error,), (warning,) = report.errors, report.warnings
    assert "images/train/001.png" in error
    assert "images/train/007.png" in warning and "is left out" in warning


def test_masks_of_unlabelled_images_are_not_read(valid_lists, folder_data):
    lines = [PAIR.format("train", i) for i in range(4, 12)]
    valid_lists |= write_lists(folder_data, unlabeled=lines)
    (folder_data / "masks/train/005.png").write_bytes(b"nothing")
    assert splits.examine_lists(valid_lists, str(folder_data)).errors == []


def test_bare_ids_are_found_below_the_root(folder_data):
    (folder_data / "images/val").rename(folder_data / "elsewhere")
    (folder_data / "masks").rename(folder_data.parent / "masks")
    paths = write_lists(folder_data, labeled=["000", "011"], unlabeled=["002", "077"])
    (error,) = splits.examine_lists(paths, str(folder_data)).errors
    assert "unlabeled list names 077, missing below" in error


def test_class_without_labelled_pixel_is_warning(valid_lists, folder_data):
    for path in (folder_data / "masks/train").iterdir():
        mask = np.asarray(Image.open(path))
        Image.fromarray(np.where(mask == 2, 0, mask).astype(np.uint8)).save(path)
    report = splits.examine_lists(valid_lists, str(folder_data))
    assert report.errors == [] and report.warnings == ["No labelled pixel of value 2."]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: f"{p.parent.name} {p.stem}")
def test_shipped_lists_are_recognised(path):
    entries = split_lists.read_list(path)
    report = splits.examine_lists({"labeled": str(path), "unlabeled": "", "val": ""})
    assert any(f"configs/splits/{path.parent.name}/{path.name}" in n for n in report.notes)
    # The fingerprint does not depend on format and order.
    reformatted = [f"images/train/{e.image}.jpg" for e in reversed(entries)]
    assert splits.fingerprint(reformatted) in splits.KNOWN_LISTS
    assert splits.fingerprint(reformatted[1:]) not in splits.KNOWN_LISTS


def test_every_known_list_is_shipped():
    assert len(splits.KNOWN_LISTS) == len(SHIPPED) == 5


def test_common_split_sizes_are_named(tmp_path):
    paths = write_lists(
        tmp_path, labeled=[f"a{i}" for i in range(372)], unlabeled=[f"b{i}" for i in range(2603)]
    )
    (note,) = [n for n in splits.examine_lists(paths).notes if "sizes" in n]
    assert note.startswith("Cityscapes 1/8 has these sizes; the images may be others")


def test_examine_config(folder_config, folder_data):
    report = splits.examine_config(folder_config)
    assert report.errors == [] and report.names == ("ground", "thing", "corner")
    assert report.sizes == {"labeled": 4, "unlabeled": 8, "val": 5}
    assert any("The split's hash is" in note for note in report.notes)
    (folder_data / "evaluation.txt").write_text(PAIR.format("train", 0))
    folder_config.data.evaluation_list = folder_config.data.labeled_list = "evaluation.txt"
    (error,) = [e for e in splits.examine_config(folder_config).errors if "in the val list" in e]
    assert "images/train/000.png in the labeled" in error
    folder_config.data.root = "/nowhere"
    (error,) = splits.examine_config(folder_config).errors
    assert error.startswith("The data folder /nowhere is missing")


def test_0_255_masks_give_same_error_as_a_run(folder_config, folder_data):
    for path in (folder_data / "masks").glob("*/*.png"):
        binary = 255 * (np.asarray(Image.open(path)) == 1).astype(np.uint8)
        Image.fromarray(binary).save(path)
    (error,) = splits.examine_config(folder_config).errors
    with pytest.raises(UserError) as refused:
        load.load_dataset(folder_config)
    assert error == str(refused.value) and "data.id_map=((0,0),(255,1))" in error
    # The errors for damaged masks do not mention missing classes.
    for path in (folder_data / "masks").glob("*/*.png"):
        path.write_bytes(b"")
    assert all("cannot be decoded" in e for e in splits.examine_config(folder_config).errors[:3])
    assert "no class" not in " ".join(splits.examine_config(folder_config).errors)


def test_report_without_data_prints_no_table(folder_config, capsys):
    folder_config.data.root = "/nowhere"
    splits.print_report(splits.examine_config(folder_config), Console(width=100))
    assert capsys.readouterr().out.startswith("Error: The data folder /nowhere is missing")


def test_table_shows_class_shares(valid_lists, folder_data, capsys):
    report = splits.examine_lists(valid_lists, str(folder_data))
    report.names = ("ground", "thing", "corner")
    splits.print_report(report, Console(soft_wrap=True, width=100))
    printed = capsys.readouterr().out
    counts = report.classes["labeled"][:3]
    assert f"{100 * counts[1] / counts.sum():.2f}" in printed
    assert "thing" in printed and "Nothing was found that would corrupt" in printed


def run_command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "semiseg_jax.data.splits", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ({"data.name": "foldr"}, "data.name is 'foldr': make it one of "),
        ({"data.split_seed": -1}, "data.split_seed is -1: make it at least 0"),
    ],
)
def test_invalid_config_exits_with_one_line(folder_config, monkeypatch, override, sentence):
    folder_config.update_from_flattened_dict(override)
    # The test calls `main` in this process, because a new process starts slowly.
    values = mock.MagicMock(config=folder_config)
    monkeypatch.setattr(splits, "flags", mock.Mock(FLAGS=values))
    with pytest.raises(SystemExit) as exit_info:
        splits.main(["splits"])
    assert str(exit_info.value.code).startswith(f"Error: {sentence}")


def test_command_exit_status(valid_lists, folder_data):
    done = run_command(*(f"--{k}={v}" for k, v in valid_lists.items()), f"--root={folder_data}")
    assert (done.returncode, done.stderr) == (0, "")
    assert "Nothing was found" in done.stdout
    done = run_command(
        f"--labeled={valid_lists['labeled']}", f"--unlabeled={valid_lists['labeled']}"
    )
    assert done.returncode == 1
    assert "Error: images/train/000.png, images/train/001.png, images/train/002.png and 1 more" in (
        done.stdout
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        ((), 1, "Error: Nothing to check"),
        (("--labelled=x",), 1, "Unknown command line flag 'labelled'"),
        (("--config=configs/streets.py", "--config.data.lables=3"), 1, "lables"),
        (("--config=configs/streets.py", "--config.data.streets_train=20"), 0, "pavement"),
    ],
)
def test_command_flags(tmp_path, arguments, status, text):
    if arguments and "streets" in arguments[0]:
        arguments = (*arguments, f"--config.data.cache_dir={tmp_path}")
    done = run_command(*arguments)
    assert done.returncode == status and text in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
