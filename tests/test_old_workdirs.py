"""Workdirs and models of the first version stay readable: tests/data/workdir_of_1870f58.tar.gz.

The archive was made by commit 1870f58 from the config in its config.json, on one CPU device with
XLA_FLAGS=--xla_backend_optimization_level=0. `begun` is a run after its labelling: a teacher with
its pseudo-labels. `finished` has results.json and model/ of the same run at its end.
"""

import json
import pathlib
import tarfile

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from configs import default
from semiseg_jax import self_training
from semiseg_jax.runtime.logger import capture_lines
from semiseg_jax.serving import model_bundle
from tests import mains, workdirs

ARCHIVE = pathlib.Path(__file__).parent / "data" / "workdir_of_1870f58.tar.gz"


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(ARCHIVE) as file:
        file.extractall(folder, filter="data")
    return folder


def config_of(workdir):
    """The config of a workdir; keys that it does not have are at their defaults."""
    config = default.get_config()
    stored = json.loads((workdir / "config.json").read_text())
    flat = {
        f"{name}.{k}": v
        for name, part in stored.items()
        if isinstance(part, dict)
        for k, v in part.items()
        if not isinstance(v, dict)
    }
    for section, key, values in (
        (s, k, v)
        for s, part in stored.items()
        if isinstance(part, dict)
        for k, v in part.items()
        if isinstance(v, dict)
    ):
        flat |= {f"{section}.{key}.{name}": value for name, value in values.items()}
    as_tuples = {k: tuple(v) if isinstance(v, list) else v for k, v in flat.items()}
    config.update_from_flattened_dict(as_tuples | {"seed": stored["seed"]})
    return config


def test_a_run_that_the_first_version_began_is_finished(archive, tmp_path, one_device):
    workdir, finished = archive / "begun", archive / "finished"
    config = config_of(workdir)
    config.data.cache_dir = str(tmp_path / "cache")
    begun = workdirs.rows(workdir)
    with capture_lines() as lines:
        self_training.run(config, workdir)
    assert any("[1/4] teacher: done before" in line for line in lines)
    rows, expected = workdirs.rows(workdir), workdirs.rows(finished)
    assert rows[: len(begun)] == begun
    key = ("stage", "round", "step", "pixels")
    assert [[row[k] for k in key] for row in rows] == [[row[k] for k in key] for row in expected]
    weights = load_file(workdir / "model" / "weights.safetensors")
    for name, value in load_file(finished / "model" / "weights.safetensors").items():
        # Another machine may round otherwise.
        np.testing.assert_allclose(weights[name], value, atol=1e-3, err_msg=name)


def test_a_model_of_the_first_version_predicts(archive, tmp_path, monkeypatch):
    bundle = model_bundle.load(archive / "finished")
    assert bundle.protocol.split == "val" and len(bundle.classes) == 11
    (tmp_path / "images").mkdir()
    Image.fromarray(np.zeros((32, 48, 3), np.uint8)).save(tmp_path / "images" / "a.png")
    paths = {"workdir": archive / "finished", "input": tmp_path / "images", "output": tmp_path}
    mains.run(monkeypatch, *(f"--{k}={v}" for k, v in paths.items()), command="predict")
    assert np.asarray(Image.open(tmp_path / "a.png")).shape == (32, 48)
