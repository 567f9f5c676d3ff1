"""The lists and the config that a merge writes."""

import shutil

import numpy as np
import pytest

from semiseg_jax.data import load
from semiseg_jax.data.annotations import mask_folder
from semiseg_jax.runtime import config_files
from semiseg_jax.suggestions import mask_writer, next_config


@pytest.mark.parametrize("held_out", [0.25, 0.0])
@pytest.mark.parametrize("labeled_by", ["a draw", "a list"])
def test_held_out_evaluation_stays_as_it_is_and_none_stays_none(
    folder_config, folder_data, tmp_path, labeled_by, held_out
):
    folder_config.data.holdout = held_out
    for kind in ("images", "masks"):
        shutil.rmtree(folder_data / kind / "val")
    if labeled_by == "a list":
        names = [f"images/train/00{i}.png masks/train/00{i}.png\n" for i in range(6)]
        (folder_data / "some.txt").write_text("".join(names))
        folder_config.data.labeled_list = "some.txt"
    before, _ = load.plan_dataset(folder_config)
    assert bool(before.evaluation) == bool(held_out)
    target = tmp_path / "more"
    target.mkdir()
    moved = before.unlabeled[0]
    mask = target / "masks" / "new.png"
    mask_writer.write(mask, np.ones((36, 48), np.uint8), before)
    next_config.write(target, target, folder_config, before, {moved.id: str(mask)})
    config = config_files.load(str(target / mask_folder.config_name(target.name)))
    after, _ = load.plan_dataset(config)
    assert after.evaluation == before.evaluation
    assert {e.id for e in after.labeled} == {e.id for e in before.labeled} | {moved.id}
    assert {e.id for e in after.unlabeled} == {e.id for e in before.unlabeled} - {moved.id}
