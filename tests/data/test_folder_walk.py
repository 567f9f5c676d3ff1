"""The walk of a folder lists each file once, whatever its links form."""

import os

import numpy as np
import pytest
from etils import epath

from semiseg_jax.data import load
from semiseg_jax.data.dataset import files_below
from semiseg_jax.data.folder_walk import walk_files


def names(paths, root):
    return [path.relative_to(root).as_posix() for path in paths]


def test_files_of_a_tree_are_sorted_by_component(tmp_path):
    for name in ("b.png", "a/z.png", "a/.hidden", "a.png", "a/b/c.png", ".git/x.png", "a b.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    everything = [".git/x.png", "a/.hidden", "a/b/c.png", "a/z.png", "a b.png", "a.png", "b.png"]
    assert names(walk_files(tmp_path), tmp_path) == everything
    shown = [name for name in everything if "." not in (name[0], name[2])]
    assert names(files_below(epath.Path(tmp_path)), tmp_path) == shown


def test_a_skipped_folder_is_not_read(tmp_path):
    for name in ("in/a.png", "out/b.png", "in/out/c.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "in" / "link").symlink_to(tmp_path / "out")
    walked = walk_files(tmp_path, lambda folder: folder.name in ("out", "link"))
    assert names(walked, tmp_path) == ["in/a.png"]


@pytest.mark.parametrize("seed", range(12))
def test_links_between_folders_list_each_file_once(tmp_path, seed):
    """Trees of random folders in and outside the root, with random links between all of them."""
    rng = np.random.default_rng(seed)
    root = tmp_path / "root"
    folders = [root, tmp_path / "outside"]
    for number in range(6):
        folders.append(folders[rng.integers(len(folders))] / f"{rng.integers(9)}{number}")
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "image.png").touch()
    for number in range(8):
        parent, target = (folders[i] for i in rng.integers(len(folders), size=2))
        (parent / f"{'0z'[number % 2]}link{number}").symlink_to(target)
    reachable, pending = set(), [root]
    while pending:
        folder = os.path.realpath(pending.pop())
        if folder not in reachable:
            reachable.add(folder)
            pending += [entry.path for entry in os.scandir(folder) if entry.is_dir()]
    walked = walk_files(root)
    assert walked == sorted(walked, key=lambda path: path.parts)
    real = [os.path.realpath(path.parent) for path in walked]
    assert len(set(real)) == len(real) and set(real) == reachable
    # A folder that has a path without links is listed under that path.
    below = [folder for folder in folders if root in (folder, *folder.parents)]
    assert {folder / "image.png" for folder in below} <= set(walked)


def test_a_link_without_target_is_a_file(tmp_path):
    (tmp_path / "lost.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "self").symlink_to(tmp_path / "self")
    assert names(walk_files(tmp_path), tmp_path) == ["lost.png", "self"]


def test_a_cycle_in_the_image_folder_adds_no_image(folder_config, folder_data):
    before = load.load_dataset(folder_config)
    (folder_data / "images/train/loop").symlink_to(folder_data / "images/train")
    (folder_data / "images/train/up").symlink_to(folder_data)
    (folder_data / "masks/train/loop").symlink_to(folder_data / "masks")
    after = load.load_dataset(folder_config)
    for name in ("labeled", "unlabeled", "evaluation"):
        assert getattr(after, name) == getattr(before, name)
