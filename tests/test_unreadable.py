"""Files and folders that are there, and may not be read, are one sentence each."""

import errno
import os
import pathlib

import pytest
from etils import epath

from semiseg_jax import health, history, identity, pseudo_labels, report, results
from semiseg_jax.data import doctor, examples, inputs, labels, sources, splits
from semiseg_jax.errors import UserError
from semiseg_jax.models import weight_files


@pytest.fixture
def closed(monkeypatch):
    """Closes a file or folder to reading, for whoever runs the tests."""
    refused = set()

    def guard(owner, name):
        plain = getattr(owner, name)

        def call(path, *args, **kwargs):
            if os.fspath(path) in refused:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), os.fspath(path))
            return plain(path, *args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    guard(os, "listdir")
    for name in ("iterdir", "read_bytes", "read_text"):
        guard(type(epath.Path("/")), name)
        guard(pathlib.Path, name)
    return lambda path: refused.add(os.fspath(path))


def test_a_split_list(tmp_path, closed):
    path = tmp_path / "train.txt"
    path.write_text("a.png\n")
    closed(path)
    sentence = f"The split list {path} cannot be read (Permission denied): make it readable."
    with pytest.raises(UserError) as refused:
        splits.read_list(path)
    assert str(refused.value) == sentence
    assert doctor.examine_lists({"labeled": os.fspath(path)}).errors == [sentence]


@pytest.mark.parametrize("kind", ["images", "masks"])
def test_a_folder_below_images_or_masks(folder_config, folder_data, closed, kind):
    (folder_data / kind / "train" / "more").mkdir()
    closed(folder_data / kind / "train" / "more")
    with pytest.raises(UserError, match=r"/train/more cannot be read \(Permission denied\): make"):
        sources.load(folder_config)


def test_a_folder_below_the_input_of_predict(folder_data, tmp_path, closed):
    (folder_data / "images/val/more").mkdir()
    closed(folder_data / "images/val/more")
    with pytest.raises(UserError, match=r"/val/more cannot be read \(Permission denied\): make"):
        inputs.Images(folder_data / "images", tmp_path / "output")


def test_the_folder_itself(folder_data, closed):
    closed(folder_data / "images")
    with pytest.raises(UserError, match=r"/images cannot be read \(Permission denied\)"):
        list(examples.files_below(epath.Path(folder_data / "images")))


@pytest.mark.parametrize(
    ("name", "read", "remedy"),
    [
        (
            "config.json",
            lambda workdir: identity.known(workdir, "config.json"),
            "make it readable, or give another --workdir",
        ),
        (
            "results.json",
            lambda workdir: results.read(workdir / "results.json"),
            "make it readable",
        ),
        ("config.json", report.write, "make it readable"),
        ("metrics.jsonl", history.read, "make it readable"),
        (
            "manifest.json",
            lambda folder: pseudo_labels._read_manifest(folder, {}),
            "make it readable",
        ),
        ("manifest.json", health._earlier_manifest, "make it readable"),
        ("a.png", lambda folder: pseudo_labels._digest(folder / "a.png"), "make it readable"),
    ],
)
def test_a_file_of_the_workdir(tmp_path, closed, name, read, remedy):
    (tmp_path / name).write_text("{}")
    closed(tmp_path / name)
    with pytest.raises(UserError) as refused:
        read(epath.Path(tmp_path))
    path = tmp_path / name
    assert str(refused.value) == f"{path} cannot be read (Permission denied): {remedy}."


@pytest.mark.parametrize(
    ("name", "read", "remedy"),
    [
        ("a.npz", weight_files.read, "make it readable"),
        ("a.safetensors", weight_files.read, "make it readable"),
        ("a.png", labels.read_image, "make it readable, or take it out of its list"),
    ],
)
def test_weights_and_images(tmp_path, closed, name, read, remedy):
    """None of them is called damaged."""
    path = tmp_path / name
    path.write_bytes(b"sound")
    closed(path)
    with pytest.raises(UserError) as refused:
        read(path)
    assert str(refused.value) == f"{path} cannot be read (Permission denied): {remedy}."
