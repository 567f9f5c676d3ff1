"""What WORKDIR/model gives back, alone, and what is said of one that is not whole."""

import functools
import json
import shutil

import jax
import numpy as np
import pytest

from configs import default
from semiseg_jax import checkpoints, deployed, state
from semiseg_jax.errors import UserError
from semiseg_jax.models import deeplab
from tests.conftest import tiny_config

CLASSES = ("ground", "thing", "corner")
PALETTE = ((0, 0, 0), (200, 30, 30), (30, 200, 30))
ROW = {"miou": 0.25, "iou": [0.5, 0.25, None], "protocol": {"scales": [1.0], "pad_to": 1}}


@pytest.fixture
def kept(tmp_path):
    """A workdir with a model of random weights, and these."""
    config = deeplab.resolve(tiny_config().model)
    shapes = state.variable_shapes(deeplab.build(config, 3))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda s: rng.uniform(0.1, 1, s.shape).astype(s.dtype), shapes)
    weights = state.for_inference(variables)
    described = deployed.describe(
        config, default.get_config().eval, CLASSES, PALETTE, {"data": "folder"}, ROW
    )
    checkpoints.save_weights(tmp_path / "model" / "weights.safetensors", weights, described)
    (tmp_path / "model" / "model.json").write_text(json.dumps(described))
    return tmp_path, weights


def test_a_copy_of_the_folder_alone_gives_back_the_network_and_its_weights(kept, tmp_path):
    workdir, weights = kept
    shutil.copytree(workdir / "model", tmp_path / "elsewhere" / "model")
    shutil.rmtree(workdir / "model")
    loaded = deployed.load(tmp_path / "elsewhere")
    assert (loaded.classes, loaded.palette) == (CLASSES, PALETTE)
    assert loaded.protocol == ROW["protocol"]
    assert (loaded.pad_to, loaded.batch) == (128, 8)
    assert loaded.colour.tolist() == [124, 116, 104]
    jax.tree.map(np.testing.assert_array_equal, loaded.variables, weights)
    image = np.full((1, 33, 40, 3), 90, np.uint8)
    # domain="weak" needs no more than what was kept.
    apply = jax.jit(functools.partial(loaded.model.apply, domain="weak", train=False))
    logits = apply(loaded.variables, image)
    assert logits.shape == (1, 33, 40, 3) and np.isfinite(logits).all()


def test_it_says_how_images_are_prepared(kept):
    workdir, _ = kept
    says = json.loads((workdir / "model" / "model.json").read_text())["preprocessing"]
    assert says["mean"] == [123.675, 116.28, 103.53] and says["std"] == [58.395, 57.12, 57.375]
    assert "half-pixel centres" in says["resize"]
    assert says["padding_colour"] == [124, 116, 104] and says["pad_to"] == 128


def change(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-40])


def of_a_larger_head(folder):
    """Both files agree, and the weights are those of a smaller head."""
    described = json.loads((folder / "model.json").read_text())
    described["model"]["head_features"] = 4
    (folder / "model.json").write_text(json.dumps(described))
    weights = deployed.weight_files.read(folder / "weights.safetensors").tensors
    checkpoints.save_weights(folder / "weights.safetensors", dict(weights), described)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (shutil.rmtree, r"has no model/weights.safetensors: a run writes it when it ends"),
        (lambda m: (m / "model.json").unlink(), r"has no model/model.json: a run writes it"),
        (lambda m: truncate(m / "model.json"), r"model.json cannot be read"),
        (lambda m: truncate(m / "weights.safetensors"), r"weights.safetensors cannot be read"),
        (lambda m: change(m / "model.json", format=2), r"not of a form .* \(format 1 is known\)"),
        (lambda m: change(m / "model.json", palette=[[0, 0]]), r"not of a form .* \(ValueError"),
        (lambda m: change(m / "model.json", classes=["a", "b"]), r"its parts contradict"),
        (lambda m: change(m / "model.json", miou=0.5), r"are of two models, which differ in miou"),
        (of_a_larger_head, r"holds float32\[8\] as .* where the network of model.json has"),
    ],
)
def test_a_model_that_is_not_whole_is_one_sentence(kept, damage, sentence):
    workdir, _ = kept
    damage(workdir / "model")
    with pytest.raises(UserError, match=sentence):
        deployed.load(workdir)
