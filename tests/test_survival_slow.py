"""Two rounds, killed at every kind of write and at seeded steps, against an uninterrupted run."""

import json
import signal

import pytest

from tests.conftest import FEW_OPERATIONS
from tests.killed_run import run
from tests.workdirs import metrics, same

pytestmark = pytest.mark.slow

# In the order in which a run comes to them: what is written, when the process ends, at which match.
KILLS = [
    ("config.json", "before", 1),
    ("data.json", "after", 1),
    ("round_0/teacher/checkpoints/2", "before", 1),
    ("round_0/teacher/checkpoints/4", "after", 1),
    ("results.json", "before", 1),
    ("round_0/teacher/DONE", "before", 1),
    ("round_0/teacher/DONE", "after", 1),
    ("round_0/teacher/pseudo_labels/.*png", "before", 1),
    ("round_0/teacher/pseudo_labels/.*png", "after", 3),
    ("round_0/teacher/pseudo_labels/manifest", "before", 1),
    ("round_0/teacher/pseudo_labels/manifest", "after", 1),
    ("round_0/teacher/pseudo_labels/health", "before", 1),
    ("round_1/student/checkpoints/2", "after", 1),
    ("round_1/student/checkpoints/4", "before", 1),
    ("round_1/student/DONE", "before", 1),
    ("round_1/student/pseudo_labels/.*png", "before", 5),
    ("round_1/student/pseudo_labels/manifest", "before", 1),
    ("round_2/student/checkpoints/2", "before", 1),
    ("results.json", "after", 1),
    ("round_2/student/DONE", "after", 1),
    ("round_2/control/checkpoints/4", "before", 1),
    ("round_2/control/checkpoints/8", "after", 1),
    ("weights.safetensors", "before", 1),
    ("model.json", "before", 1),
]


# On a store without rename: nothing of a file, half of it, or all of it is there.
KILLS_ON_A_STORE = [
    ("config.json", "half", 1),
    ("data.json", "before", 1),
    ("round_0/teacher/checkpoints/2", "before", 1),
    ("round_0/teacher/checkpoints/4/commit_success", "before", 1),
    ("results.json", "before", 1),
    ("results.json", "after", 1),
    ("round_0/teacher/DONE", "before", 1),
    ("round_0/teacher/pseudo_labels/.*png", "half", 3),
    ("round_0/teacher/pseudo_labels/manifest", "half", 1),
    ("round_1/student/checkpoints/2/commit_success", "after", 1),
    ("round_1/student/DONE", "after", 1),
    ("weights.safetensors", "half", 1),
    ("model.json", "half", 1),
]


def write_config(tmp_path, folder_config, **changes):
    config = {
        "data.name": "folder",
        "data.root": folder_config.data.root,
        "data.classes": list(folder_config.data.classes),
        "data.labels": folder_config.data.labels,
        "data.cache_dir": str(tmp_path / "cache"),
        "data.crop": [32, 40],
        "model.backbone": "tiny",
        "model.head": "v2",
        "model.head_features": 8,
        "model.low_level_features": 4,
        "model.aspp_rates": [1],
        "train.steps": 4,
        "train.batch_labeled": 2,
        "train.batch_unlabeled": 2,
        "train.checkpoint_every": 2,
        "pseudo.scales": [1.0],
        "pseudo.batch": 2,
        "eval.batch": 2,
        "rounds.count": 2,
        "rounds.control": True,
        "sda.ops": FEW_OPERATIONS,
    } | changes
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    return path


def test_kills_at_every_kind_of_write_change_no_bit(tmp_path, folder_config):
    config = write_config(tmp_path, folder_config)
    status, output = run(config, tmp_path / "whole")
    assert status == 0, output
    for pattern, phase, count in KILLS:
        status, output = run(config, tmp_path / "killed", pattern, phase, count)
        assert status == -signal.SIGKILL, f"{pattern} {phase}: {output}"
    status, output = run(config, tmp_path / "killed")
    assert status == 0, output
    same(tmp_path / "whole", tmp_path / "killed")
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "killed")


def test_kills_on_a_store_without_rename_change_no_bit(tmp_path, folder_config):
    """The bits are those of a file system, too."""
    changes = {"rounds.count": 1, "rounds.control": False}
    config = write_config(tmp_path, folder_config, **changes)
    status, output = run(config, tmp_path / "whole")
    assert status == 0, output
    for kill in KILLS_ON_A_STORE:
        status, output = run(config, tmp_path / "killed", *kill, store=True)
        assert status == -signal.SIGKILL, f"{kill}: {output}"
    status, output = run(config, tmp_path / "killed", store=True)
    assert status == 0, output
    same(tmp_path / "whole", tmp_path / "killed")
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "killed")
