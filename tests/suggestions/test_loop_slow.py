"""The whole loop: a run, suggestions, corrected labels, their merge, and the next runs."""

import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest

from semiseg_jax import self_training
from semiseg_jax.data import image_io, load
from semiseg_jax.data.annotations import export
from semiseg_jax.runtime import config_files
from tests import mains
from tests.conftest import in_pairs, tiny_config, tiny_folder_config, write_folder_data

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_device", "without_report")]

CLASSES = ("ground", "thing", "corner")


def suggest(monkeypatch, capsys, *arguments):
    """What the command prints."""
    capsys.readouterr()
    mains.run(monkeypatch, *arguments, command="suggest")
    return capsys.readouterr().out


def commands(text):
    """The arguments of each command in a text, as a shell reads them."""
    return [shlex.split(line)[3:] for line in text.splitlines() if line.startswith("  python -m ")]


def suggested(folder):
    """Entries of suggestions.json, the first suggestion first."""
    return json.loads((folder / "suggestions.json").read_text())["images"]


def read_labels(dataset, examples):
    """Label maps by id."""
    return {e.id: image_io.read_mask(e.mask, dataset.table, dataset.mask_format) for e in examples}


def write_shapes(folder, entry, mask, scratch):
    """Replaces the LabelMe file of an image by one of the labels in a mask."""
    name = Path(entry["name"])
    for kind, file in (("images", Path(entry["image"])), ("masks", mask)):
        (scratch / kind).mkdir(parents=True)
        shutil.copy(file, (scratch / kind / name.name).with_suffix(file.suffix))
    (scratch / "classes.txt").write_text("\n".join(CLASSES))
    output = scratch.with_name("shapes")
    export.write(scratch, "labelme", output, min_area=0)
    (shapes,) = output.rglob("*.json")
    shutil.copy(shapes, (folder / "labelme" / name).with_suffix(".json"))


def test_corrected_suggestions_train_the_next_run(tmp_path, monkeypatch, capsys):
    root, run = write_folder_data(tmp_path / "data"), tmp_path / "run"
    config = in_pairs(tiny_folder_config(root, tmp_path / "cache"))
    config.train.teacher_steps = config.train.steps = 2
    self_training.run(config, run)
    before = load.load_dataset(config)

    printed = suggest(monkeypatch, capsys, f"--workdir={run}", "--count=3")
    folder = run / "suggest"
    first, second, third = suggested(folder)
    assert {e["id"] for e in (first, second, third)} <= {e.id for e in before.unlabeled}
    ((merging,),) = commands(printed)
    sentence = mains.refused(monkeypatch, merging, command="suggest")
    assert "None of the 3 labels" in sentence and "--take_untouched" in sentence
    truth = {e["id"]: root / "masks" / "train" / f"{e['id']}.png" for e in suggested(folder)}
    write_shapes(folder, first, truth[first["id"]], tmp_path / "tool")
    shutil.copy(truth[second["id"]], (folder / "masks" / second["name"]).with_suffix(".png"))

    printed = suggest(monkeypatch, capsys, merging)
    outcome = json.loads((tmp_path / "data_6_labels" / "merge.json").read_text())
    assert outcome["taken"] == {first["id"]: "labelme", second["id"]: "mask"}
    assert outcome["untouched"] == [third["id"]]
    assert "1 were not changed since they were suggested, and are left out" in printed
    assert third["id"] in printed

    from_start, going_on = commands(printed)
    after = load.load_dataset(config_files.load(from_start[0].removeprefix("--config=")))
    moved = {first["id"], second["id"]}
    assert ids(after.labeled) == ids(before.labeled) | moved
    assert ids(after.unlabeled) == ids(before.unlabeled) - moved
    assert after.evaluation == before.evaluation
    labels = read_labels(after, after.labeled)
    for name in moved:
        np.testing.assert_array_equal(labels[name], image_io.read_mask(truth[name], after.table))
    for name, values in read_labels(before, before.labeled).items():
        np.testing.assert_array_equal(labels[name], values)

    taking = (merging, "--take_untouched", f"--output={tmp_path / 'all'}")
    assert "7 images are labelled now, 4 before" in suggest(monkeypatch, capsys, *taking)

    for command in (from_start, going_on):
        mains.run(monkeypatch, *command)
        workdir = Path(command[1].removeprefix("--workdir="))
        assert json.loads((workdir / "results.json").read_text())["rows"]


def ids(examples):
    return {e.id for e in examples}


def test_built_in_scenes_merge_into_lists(tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    config = in_pairs(tiny_config(model__head="v2", data__name="streets", data__labels=4.0))
    config.data.cache_dir = str(tmp_path / "cache")
    config.data.streets_train, config.data.streets_val = 10, 3
    config.data.streets_size = (32, 48)
    config.train.teacher_steps = config.train.steps = 2
    config.rounds.count = 0
    self_training.run(config, run)
    before = load.load_dataset(config)
    output = tmp_path / "to label"
    printed = suggest(
        monkeypatch, capsys, f"--workdir={run}", "--count=2", "--by=entropy", f"--output={output}"
    )
    one, _ = suggested(output)
    masks = Path(one["image"].replace("/images/", "/masks/"))
    shutil.copy(masks, (output / "masks" / one["name"]).with_suffix(".png"))
    ((merging,),) = commands(printed)
    from_start, _ = commands(suggest(monkeypatch, capsys, merging))
    after = load.load_dataset(config_files.load(from_start[0].removeprefix("--config=")))
    assert ids(after.labeled) == ids(before.labeled) | {one["id"]}
    assert ids(after.unlabeled) == ids(before.unlabeled) - {one["id"]}
    assert after.evaluation == before.evaluation
    np.testing.assert_array_equal(
        read_labels(after, after.labeled)[one["id"]], image_io.read_mask(masks, after.table)
    )
