"""Files and folders without read permission raise a UserError of one sentence."""

import os

import pytest
from etils import epath

from semiseg_jax import results
from semiseg_jax import workdir as workdir_lib
from semiseg_jax.data import dataset, image_io, load, split_lists, splits
from semiseg_jax.models import weight_files
from semiseg_jax.reporting import page
from semiseg_jax.runtime import metric_writer
from semiseg_jax.runtime.errors import UserError
from semiseg_jax.serving import inputs
from tests.errors import raises_code


def test_a_split_list(tmp_path, closed):
    path = tmp_path / "train.txt"
    path.write_text("a.png\n")
    closed(path)
    sentence = f"The split list {path} cannot be read (Permission denied): make it readable."
    with pytest.raises(UserError) as refused:
        split_lists.read_list(path)
    assert str(refused.value) == sentence
    assert splits.examine_lists({"labeled": os.fspath(path)}).errors == [sentence]


@pytest.mark.parametrize("kind", ["images", "masks"])
def test_a_folder_below_images_or_masks(folder_config, folder_data, closed, kind):
    (folder_data / kind / "train" / "more").mkdir()
    closed(folder_data / kind / "train" / "more")
    with raises_code("path-unreadable", "/train/more", "Permission denied"):
        load.load_dataset(folder_config)


def test_a_folder_below_the_input_of_predict(folder_data, tmp_path, closed):
    (folder_data / "images/val/more").mkdir()
    closed(folder_data / "images/val/more")
    with raises_code("path-unreadable", "/val/more", "Permission denied"):
        inputs.Images(folder_data / "images", tmp_path / "output")


def test_the_folder_of_images(folder_data, closed):
    closed(folder_data / "images")
    with raises_code("path-unreadable", "/images", "Permission denied"):
        list(dataset.files_below(epath.Path(folder_data / "images")))


@pytest.mark.parametrize(
    ("name", "read", "remedy"),
    [
        (
            "config.json",
            lambda workdir: workdir_lib.read_fingerprint(workdir, "config.json"),
            "make it readable, or give another --workdir",
        ),
        (
            "results.json",
            lambda workdir: results.read(workdir / "results.json"),
            "make it readable",
        ),
        ("config.json", page.write, "make it readable"),
        ("metrics.jsonl", metric_writer.read_metrics, "make it readable"),
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
        ("a.png", image_io.read_image, "make it readable, or take it out of its list"),
    ],
)
def test_weights_and_images(tmp_path, closed, name, read, remedy):
    """A file without read permission is not reported as damaged."""
    path = tmp_path / name
    path.write_bytes(b"sound")
    closed(path)
    with pytest.raises(UserError) as refused:
        read(path)
    assert str(refused.value) == f"{path} cannot be read (Permission denied): {remedy}."
