"""WORKDIR/model: what is loaded from it, and the errors for a damaged one."""

import functools
import json
import random
import shutil

import jax
import numpy as np
import pytest

from configs import default
from semiseg_jax import checkpoints, train_state
from semiseg_jax.models import deeplab
from semiseg_jax.runtime.errors import UserError
from semiseg_jax.serving import model_bundle
from tests.conftest import tiny_config
from tests.errors import raises_code
from tests.rows import result_row

CLASSES = ("ground", "thing", "corner")
PALETTE = ((0, 0, 0), (200, 30, 30), (30, 200, 30))
ROW = result_row()


@pytest.fixture
def saved(tmp_path):
    """Returns a workdir with a model of random weights, and the weights."""
    config = deeplab.resolve(tiny_config().model)
    shapes = train_state.variable_shapes(deeplab.build(config, 3))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda s: rng.uniform(0.1, 1, s.shape).astype(s.dtype), shapes)
    weights = train_state.inference_variables(variables)
    description = model_bundle.describe(
        config, default.get_config().eval, CLASSES, PALETTE, {"data": "folder"}, ROW
    )
    digest = checkpoints.save_weights(
        tmp_path / "model" / "weights.safetensors", weights, description
    )
    description[model_bundle.WEIGHTS_HASH] = digest
    (tmp_path / "model" / "model.json").write_text(json.dumps(description))
    return tmp_path, weights


def test_a_copy_of_the_folder_loads_the_network_and_its_weights(saved, tmp_path):
    workdir, weights = saved
    shutil.copytree(workdir / "model", tmp_path / "elsewhere" / "model")
    shutil.rmtree(workdir / "model")
    loaded = model_bundle.load(tmp_path / "elsewhere")
    assert (loaded.classes, loaded.palette) == (CLASSES, PALETTE)
    assert loaded.protocol == ROW.protocol
    assert (loaded.pad_to, loaded.batch) == (128, 8)
    assert loaded.pad_value.tolist() == [124, 116, 104]
    jax.tree.map(np.testing.assert_array_equal, loaded.variables, weights)
    image = np.full((1, 33, 40, 3), 90, np.uint8)
    # domain="weak" needs only the saved variables.
    apply = jax.jit(functools.partial(loaded.model.apply, domain="weak", train=False))
    logits = apply(loaded.variables, image)
    assert logits.shape == (1, 33, 40, 3) and np.isfinite(logits).all()


def test_the_description_contains_the_preprocessing(saved):
    workdir, _ = saved
    preprocessing = json.loads((workdir / "model" / "model.json").read_text())["preprocessing"]
    assert preprocessing["mean"] == [123.675, 116.28, 103.53]
    assert preprocessing["std"] == [58.395, 57.12, 57.375]
    assert "half-pixel centres" in preprocessing["resize"]
    assert preprocessing["padding_colour"] == [124, 116, 104] and preprocessing["pad_to"] == 128


def change(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-40])


def use_weights_of_another_head(folder):
    """Makes both files agree on a smaller head than the head of the weights."""
    description = json.loads((folder / "model.json").read_text())
    description["model"]["head_features"] = 4
    del description[model_bundle.WEIGHTS_HASH]
    (folder / "model.json").write_text(json.dumps(description))
    weights = model_bundle.weight_files.read(folder / "weights.safetensors").tensors
    checkpoints.save_weights(folder / "weights.safetensors", dict(weights), description)


@pytest.mark.parametrize(
    ("damage", "code", "part"),
    [
        (shutil.rmtree, "model-bundle-missing", "model/weights.safetensors"),
        (lambda m: (m / "model.json").unlink(), "model-bundle-missing", "model/model.json"),
        (lambda m: truncate(m / "model.json"), "model-description-damaged", "model.json"),
        (lambda m: truncate(m / "weights.safetensors"), "weights-damaged", "weights.safetensors"),
        (lambda m: change(m / "model.json", format=2), "model-bundle-format-unknown", "format 1"),
        (
            lambda m: change(m / "model.json", palette=[[0, 0]]),
            "model-bundle-format-unknown",
            "palette",
        ),
        (
            lambda m: change(m / "model.json", classes=["a", "b"]),
            "model-bundle-format-unknown",
            "contradict",
        ),
        (lambda m: change(m / "model.json", miou=0.5), "model-weights-of-another-model", "miou"),
        (
            use_weights_of_another_head,
            "model-weights-of-another-shape",
            "float32[8]",
        ),
    ],
)
def test_a_damaged_model_raises_a_user_error(saved, damage, code, part):
    workdir, _ = saved
    damage(workdir / "model")
    with raises_code(code, part):
        model_bundle.load(workdir)


@pytest.fixture
def traced_once(monkeypatch):
    """The shapes of equal networks are traced once."""
    shapes = functools.cache(train_state.variable_shapes)
    monkeypatch.setattr(model_bundle, "variable_shapes", shapes)


def test_a_bit_flipped_in_the_weights_is_found(saved, traced_once):
    path = saved[0] / "model" / "weights.safetensors"
    whole = path.read_bytes()
    for bit in random.Random(0).sample(range(8 * len(whole)), 8):
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        with pytest.raises(UserError) as refused:
            model_bundle.load(saved[0])
        assert refused.value.code in ("model-weights-changed", "weights-damaged")


def leaves(content, path=()):
    """The paths of all values in a JSON object that are no object."""
    for key, value in content.items():
        yield from leaves(value, (*path, key)) if isinstance(value, dict) else [(*path, key)]


def test_people_edit_names_and_colours_alone(saved, traced_once):
    path = saved[0] / "model" / "model.json"
    whole = json.loads(path.read_text())
    edited = whole | {"classes": ["x", "y", "z"], "palette": [[1, 2, 3]] * 3}
    path.write_text(json.dumps(edited))
    loaded = model_bundle.load(saved[0])
    assert loaded.classes == ("x", "y", "z") and loaded.palette == ((1, 2, 3),) * 3
    others = [leaf for leaf in leaves(whole) if leaf[0] not in model_bundle.EDITABLE]
    # An entry of the network takes long to refuse, because the network is built first.
    of_network = [leaf for leaf in others if leaf[0] == "model"]
    drawn = random.Random(0).sample(of_network, 1)
    for *parents, key in (leaf for leaf in others if leaf not in of_network or leaf in drawn):
        changed = json.loads(json.dumps(whole))
        functools.reduce(dict.get, parents, changed)[key] = "changed"
        path.write_text(json.dumps(changed))
        with pytest.raises(UserError):
            model_bundle.load(saved[0])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused(saved, value):
    workdir, weights = saved
    description = json.loads((workdir / "model" / "model.json").read_text())
    del description[model_bundle.WEIGHTS_HASH]
    last = jax.tree.leaves(weights)[-1]
    last[..., 0] = value
    checkpoints.save_weights(workdir / "model" / "weights.safetensors", weights, description)
    (workdir / "model" / "model.json").write_text(json.dumps(description))
    with raises_code("model-weights-not-finite", "weights.safetensors"):
        model_bundle.load(workdir)
