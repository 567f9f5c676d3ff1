"""True masks of unlabelled images: who may read them, and what they change."""

import ast
import dataclasses
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

import semiseg_jax
from semiseg_jax import self_training
from semiseg_jax.data import image_io, load, unlabeled_truth
from semiseg_jax.reporting import page
from tests import workdirs
from tests.errors import raises_code

PACKAGE = Path(semiseg_jax.__file__).parent


def imports_of(path):
    """The names that a module imports, as dotted names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_only_the_evaluator_of_stages_reaches_the_masks():
    readers = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if "semiseg_jax.data.unlabeled_truth" in imports_of(path)
    }
    assert readers == {"stage_evaluator.py"}
    named = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if "unlabeled_masks" in path.read_text()
    }
    declared = {"config_check.py", "workdir.py", "runtime/paths.py", "results.py"}
    # Makes the path absolute in the config of the next run.
    declared.add("suggestions/next_config.py")
    assert named - declared == {"data/unlabeled_truth.py", "stage_evaluator.py"}


def separate_masks(root):
    """Moves the masks of the training images out of the data set, but for four."""
    truth = root.parent / "truth"
    truth.mkdir()
    for mask in sorted((root / "masks" / "train").iterdir())[4:]:
        shutil.move(mask, truth / mask.name)
    return truth


@pytest.mark.parametrize("factor", [1, 2])
def test_masks_are_paired_by_name_and_follow_the_images(folder_config, folder_data, factor):
    truth = separate_masks(folder_data)
    (truth / "005.png").unlink()
    folder_config.data.downscale = factor
    dataset = load.load_dataset(folder_config)
    assert unlabeled_truth.load_truth(folder_config, dataset) is None
    folder_config.eval.unlabeled_masks = str(truth)
    examples = unlabeled_truth.load_truth(folder_config, dataset).evaluation
    assert [e.id for e in examples] == [e.id for e in dataset.unlabeled if e.id != "005"]
    images = {e.id: e.image for e in dataset.unlabeled}
    for example in examples:
        mask = image_io.read_mask(example.mask, dataset.table)
        with Image.open(truth / f"{example.id}.png") as whole:
            small = whole.resize((whole.width // factor, whole.height // factor), 0)
        np.testing.assert_array_equal(mask, np.asarray(small))
        np.testing.assert_array_equal(
            image_io.read_image(example.image), image_io.read_image(images[example.id])
        )


def test_a_folder_without_masks_of_unlabelled_images_is_refused(folder_config, folder_data):
    dataset = load.load_dataset(folder_config)
    for folder in (folder_data / "masks" / "val", folder_data / "nowhere"):
        folder_config.eval.unlabeled_masks = str(folder)
        renamed = dataclasses.replace(
            dataset,
            unlabeled=tuple(dataclasses.replace(e, id=f"x{e.id}") for e in dataset.unlabeled),
        )
        with raises_code("unlabeled-masks-missing", f"x{dataset.unlabeled[0].id}.png"):
            unlabeled_truth.load_truth(folder_config, renamed)


def test_a_mask_of_another_size_is_refused(folder_config, folder_data):
    truth = separate_masks(folder_data)
    Image.fromarray(np.zeros((5, 7), np.uint8)).save(truth / "007.png")
    folder_config.eval.unlabeled_masks = str(truth)
    with raises_code("mask-size-differs", "007"):
        unlabeled_truth.load_truth(folder_config, load.load_dataset(folder_config))


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_a_run_is_judged_by_the_masks_and_not_changed(
    config_of_pairs, folder_data, tmp_path, monkeypatch
):
    truth = separate_masks(folder_data)
    # Nearly every label is another one: a run that read them would be another.
    for path in truth.iterdir():
        ids = np.asarray(Image.open(path))
        Image.fromarray(np.where(ids == 255, 255, (ids + 1) % 3).astype(np.uint8)).save(path)
    with monkeypatch.context() as patch:
        # Drawn once, below.
        patch.setattr(page, "write", lambda workdir: [])
        self_training.run(config_of_pairs, tmp_path / "without")
        config_of_pairs.eval.unlabeled_masks = str(truth)
        self_training.run(config_of_pairs, tmp_path / "with")
    without, judged = (workdirs.rows(tmp_path / name) for name in ("without", "with"))
    for row, other in zip(judged, without, strict=True):
        assert 0 <= row.pop("unlabeled_miou") < 0.9
        assert 0 <= row.pop("unlabeled_pixel_accuracy") < 0.9
        for content in (row, other):
            del content["protocol"]["config_hash"]
        assert row == other
    weights = [
        load_file(tmp_path / name / "model" / "weights.safetensors") for name in ("without", "with")
    ]
    jax.tree.map(np.testing.assert_array_equal, *weights)
    page.write(tmp_path / "with")
    report = (tmp_path / "with" / "report.html").read_text()
    assert "mIoU on the unlabelled images" in report
