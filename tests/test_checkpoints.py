import dataclasses
import errno
import json
import os
import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from safetensors import safe_open

from semiseg_jax import checkpoints, mesh, train_state
from semiseg_jax.runtime.errors import UserError
from semiseg_jax.runtime.logger import capture_lines
from tests.errors import raises_code


@pytest.fixture
def made():
    params = {"b": {"kernel": jnp.arange(6.0).reshape(2, 3)}, "a": {"kernel": jnp.ones(4)}}
    norms = {"batch_stats_weak": {"mean": jnp.full(3, 7.0)}}
    return train_state.TrainState(
        jnp.asarray(5), params, norms, ({"trace": params}, jnp.asarray(5))
    )


def shapes(tree):
    whole = mesh.replicated(mesh.make_mesh(jax.devices()[:1]))
    return jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=whole), tree)


def test_what_is_saved_comes_back_to_the_bit_and_the_newest_two_stay(tmp_path, made):
    with checkpoints.Checkpoints(tmp_path / "c") as kept:
        assert kept.latest() is None
        for step in (3, 5, 9):
            kept.save(step, jax.tree.map(lambda v, s=step: v + s, made))
    with checkpoints.Checkpoints(tmp_path / "c") as kept:
        assert kept.latest() == 9
        restored = kept.restore(9, shapes(made))
        for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(made), strict=True):
            np.testing.assert_array_equal(a, b + 9)
            assert a.dtype == b.dtype
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["5", "9"]


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (lambda k: k.astype(jnp.bfloat16), "bfloat16[2, 3]"),
        (lambda k: k[:1], "float32[1, 3]"),
    ],
)
def test_another_dtype_or_shape_is_refused_by_name(tmp_path, made, change, wanted):
    with checkpoints.Checkpoints(tmp_path / "c") as kept:
        kept.save(1, made)
    params = {**made.params, "b": {"kernel": change(made.params["b"]["kernel"])}}
    other = train_state.TrainState(made.step, params, made.norms, made.opt_state)
    with (
        checkpoints.Checkpoints(tmp_path / "c") as kept,
        raises_code("checkpoint-of-another-model", "float32[2, 3]", "params.b.kernel", wanted),
    ):
        kept.restore(1, shapes(other))


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def out_of_reach(path):
    """There, and an error of the file system to read."""
    path.unlink()
    if path.name == "_METADATA":  # read by Python, which would miss such a link
        path.mkdir()
    else:
        path.symlink_to(path.name)


@pytest.fixture
def two(tmp_path, made):
    """The folder of two checkpoints, of steps 3 and 5."""
    with checkpoints.Checkpoints(tmp_path / "c") as kept:
        for step in (3, 5):
            kept.save(step, made)
    return tmp_path / "c"


def newest(folder, made):
    with checkpoints.Checkpoints(folder) as kept, capture_lines() as said:
        found = kept.restore_newest(shapes(made))
    return found and found[0], said


def test_damaged_checkpoints_are_removed(two, made):
    cut(two / "5/state/manifest.ocdbt")
    step, said = newest(two, made)
    assert step == 3 and said[0].startswith("the checkpoint of step 5 is damaged (DATA_LOSS")
    assert [p.name for p in two.iterdir()] == ["3"]
    cut(two / "3/state/_METADATA")
    assert newest(two, made)[0] is None
    assert not list(two.iterdir())


def test_a_bit_flipped_in_any_file_of_a_checkpoint_gives_no_other_state(tmp_path, made):
    rng = random.Random(0)
    # Large enough to be a file of its own, which tensorstore does not check.
    drawn = jnp.asarray(np.random.default_rng(0).normal(size=(40, 40)), jnp.float32)
    made = dataclasses.replace(made, params={**made.params, "c": {"kernel": drawn}})
    with checkpoints.Checkpoints(tmp_path / "whole") as kept:
        kept.save(3, made)
    names = [p.relative_to(tmp_path / "whole") for p in (tmp_path / "whole").rglob("*")]
    outcomes = []
    for name in sorted(name for name in names if (tmp_path / "whole" / name).is_file()):
        folder = tmp_path / "damaged"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "whole", folder)
        content = bytearray((folder / name).read_bytes())
        bit = rng.randrange(8 * len(content))
        content[bit // 8] ^= 1 << bit % 8
        (folder / name).write_bytes(content)
        try:
            with checkpoints.Checkpoints(folder) as kept:
                restored = kept.restore_newest(shapes(made))
        except UserError as error:
            outcomes.append(error.code)
            continue
        outcomes.append(restored and "the same")
        if restored:
            jax.tree.map(np.testing.assert_array_equal, restored[1], made)
    assert {None, "the same"} <= set(outcomes)


def test_a_checkpoint_of_another_stage_is_refused(tmp_path, made):
    for seed in (1, 2):
        with checkpoints.Checkpoints(tmp_path / str(seed), np.array([seed, 7])) as kept:
            kept.save(3, made)
    shutil.rmtree(tmp_path / "1")
    (tmp_path / "2").rename(tmp_path / "1")
    with (
        checkpoints.Checkpoints(tmp_path / "1", np.array([1, 7])) as kept,
        raises_code("checkpoint-of-another-stage", "1/3"),
    ):
        kept.restore_newest(shapes(made))
    assert (tmp_path / "1/3").exists()


def test_a_checkpoint_of_older_code_has_no_hash(two, made):
    for step in (3, 5):
        path = two / str(step) / "_CHECKPOINT_METADATA"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"custom_metadata": {}}))
    assert newest(two, made)[0] == 5


def test_best_weights_are_known_by_their_content(tmp_path):
    """A bit anywhere in the file, its description included."""
    variables = {"params": {"a": {"kernel": jnp.arange(30.0)}}}
    best = checkpoints.BestWeights(epath.Path(tmp_path), 10)
    best.write(checkpoints.Candidate(20, 0.5, variables))
    path = tmp_path / checkpoints.BEST_WEIGHTS
    whole = path.read_bytes()
    one_device = mesh.make_mesh(jax.devices()[:1])
    candidate_shapes = jax.eval_shape(lambda: variables)
    for bit in random.Random(0).sample(range(8 * len(whole)), 200):
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        try:
            read = best.load(candidate_shapes, one_device)
        except UserError as error:
            assert error.code == "best-weights-missing"
            continue
        assert (read.step, read.miou) == (20, 0.5)
        np.testing.assert_array_equal(read.variables["params"]["a"]["kernel"], jnp.arange(30.0))


@pytest.mark.parametrize("name", ["state/manifest.ocdbt", "state/_METADATA"])
@pytest.mark.parametrize("harm", [out_of_reach, cut])
def test_where_the_storage_fails_no_checkpoint_is_removed(two, made, name, harm):
    out_of_reach(two / "3" / name)
    harm(two / "5" / name)
    with raises_code("checkpoint-storage-unreadable", "c/"):
        newest(two, made)
    assert sorted(p.name for p in two.iterdir()) == ["3", "5"]


def test_an_error_of_the_storage_is_known_below_that_of_orbax(two, made, monkeypatch):
    def restore(*_):
        raise Exception("Encountered error while reading") from ValueError("UNAVAILABLE: no store")

    monkeypatch.setattr(checkpoints.Checkpoints, "restore", restore)
    with raises_code("checkpoint-storage-unreadable", "c/5", "Encountered"):
        newest(two, made)
    assert sorted(p.name for p in two.iterdir()) == ["3", "5"]


def test_weights_are_one_file_with_a_description(tmp_path):
    path = tmp_path / "weights.safetensors"
    variables = {"params": {"a": {"kernel": jnp.arange(3.0)}}}
    checkpoints.save_weights(path, variables, {"classes": ["x"]})
    with safe_open(path, "np") as file:
        assert list(file.keys()) == ["params/a/kernel"]
        np.testing.assert_array_equal(file.get_tensor("params/a/kernel"), [0, 1, 2])
        assert json.loads(file.metadata()["description"]) == {"classes": ["x"]}


@pytest.mark.parametrize("place", ["file", "file/checkpoints", "closed/checkpoints"])
def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path, monkeypatch, place):
    (tmp_path / "file").write_text("")
    makedirs = os.makedirs

    def refuse(path, *args, **kwargs):
        if "closed" in os.fspath(path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        makedirs(path, *args, **kwargs)

    monkeypatch.setattr(os, "makedirs", refuse)
    reason = "Not a directory" if "file" in place else "Permission denied"
    with raises_code("checkpoint-folder-unusable", str(tmp_path / place), reason):
        checkpoints.Checkpoints(tmp_path / place)
