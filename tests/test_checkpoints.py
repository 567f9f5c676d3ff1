import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from semiseg_jax import checkpoints, mesh, state
from semiseg_jax.errors import UserError


@pytest.fixture
def made():
    params = {"b": {"kernel": jnp.arange(6.0).reshape(2, 3)}, "a": {"kernel": jnp.ones(4)}}
    norms = {"batch_stats_weak": {"mean": jnp.full(3, 7.0)}}
    return state.TrainState(jnp.asarray(5), params, norms, ({"trace": params}, jnp.asarray(5)))


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
    ("change", "sentence"),
    [
        (lambda k: k.astype(jnp.bfloat16), r"holds float32\[2, 3\] as params.b.kernel .* bfloat16"),
        (lambda k: k[:1], r"holds float32\[2, 3\] as params.b.kernel .* float32\[1, 3\]"),
    ],
)
def test_another_dtype_or_shape_is_refused_by_name(tmp_path, made, change, sentence):
    with checkpoints.Checkpoints(tmp_path / "c") as kept:
        kept.save(1, made)
    params = {**made.params, "b": {"kernel": change(made.params["b"]["kernel"])}}
    other = state.TrainState(made.step, params, made.norms, made.opt_state)
    with (
        checkpoints.Checkpoints(tmp_path / "c") as kept,
        pytest.raises(UserError, match=sentence),
    ):
        kept.restore(1, shapes(other))


def test_weights_are_one_file_with_a_description(tmp_path):
    path = tmp_path / "weights.safetensors"
    variables = {"params": {"a": {"kernel": jnp.arange(3.0)}}}
    checkpoints.save_weights(path, variables, {"classes": ["x"]})
    with safe_open(path, "np") as file:
        assert list(file.keys()) == ["params/a/kernel"]
        np.testing.assert_array_equal(file.get_tensor("params/a/kernel"), [0, 1, 2])
        assert json.loads(file.metadata()["description"]) == {"classes": ["x"]}
