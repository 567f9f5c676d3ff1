"""The model carries everything that it was trained with: each config key, in one of three groups.

A key that acts on what the network sees or computes for an image must be in model.json, and predict
and export must obey it. test_carried_keys_slow.py has a run for each of these keys.
"""

import functools
import json

import jax
import numpy as np
import pytest
from flax import traverse_util
from PIL import Image

from configs import default
from semiseg_jax import compiled_model
from semiseg_jax.data import load
from semiseg_jax.models import deeplab
from semiseg_jax.runtime.logger import capture_lines
from semiseg_jax.serving import model_bundle
from tests import test_predict
from tests.conftest import tiny_config
from tests.rows import PROTOCOL
from tests.test_export import make_workdir

# Keys that act on what the network sees of an image or on what it computes, each with another value
# than that of the tests' config. `eval.window_stride` belongs to `eval.window`.
ACTING = {
    "data.downscale": 2,
    "eval.scales": (0.5, 1.0),
    "eval.flip": True,
    "eval.window": (24, 32),
    "eval.window_stride": (16, 16),
    "eval.pad_to": 32,
    "eval.batch": 3,
    "model.backbone": "resnet10_slim",
    "model.head": "v2",
    "model.output_stride": 8,
    "model.first_dilation": "stage",
    "model.multi_grid": (1, 2),
    "model.norm": "shared",
    "model.norm_epsilon.backbone": 0.5,
    "model.norm_epsilon.head": 0.5,
    "model.head_features": 4,
    "model.low_level_features": 8,
    "model.aspp_rates": (2,),
    "model.align_corners": True,
    "model.position_rule": "timm",
    "model.token_multiple": 8,
    "model.input_normalization": "half",
    "model.compute_dtype": "bfloat16",
    "rounds.student_model": "resnet10_slim",
}
# Sections and keys whose effect on a prediction is the weights, which they lead to: seeds, losses,
# optimisers, augmentation, the split, labelling, and the choice of weights.
TRAINING = (
    *("seed", "sda.", "loss.", "optim.", "train.", "pseudo."),
    *("data.train_extra", "data.voc_augmented", "data.unlabeled", "data.labeled_list"),
    "data.in_both_lists",
    *("data.evaluation_list", "data.labels", "data.split_seed", "data.holdout", "data.streets_"),
    *("data.weak_stream", "data.strong_stream", "data.crop", "data.scale", "data.mirror"),
    *("data.prefetch", "data.threads", "eval.split", "eval.every", "eval.select"),
    "eval.unlabeled_masks",
    *("model.freeze_backbone", "data.cache_features", "data.balance_crops"),
    *("model.pretrained", "model.norm_momentum", "model.dropout", "model.remat"),
    *("rounds.count", "rounds.student_pretrained", "rounds.student_init", "rounds.control"),
    *("rounds.teacher_from", "rounds.keep", "method."),
)
# Keys that say where images and masks are and what the values of masks mean. Predictions are class
# ids; names and colours of the classes are in model.json.
FILES = (
    *("data.name", "data.root", "data.cache_dir", "data.image_", "data.mask_", "data.tfds_"),
    *("data.classes", "data.palette", "data.ignore_ids", "data.id_map", "data.max_image_pixels"),
)


def test_every_declared_key_is_in_one_group():
    keys = traverse_util.flatten_dict(default.get_config().to_dict(), sep=".")
    for key in keys:
        groups = (key in ACTING, key.startswith(TRAINING), key.startswith(FILES))
        assert sum(groups) == 1, (
            f"{key} is in {sum(groups)} groups of this file: if it acts on what the network sees, "
            "put it into model.json, and into ACTING"
        )
    assert ACTING.keys() <= keys.keys()
    config = tiny_config()
    for key, value in ACTING.items():
        assert functools.reduce(lambda section, k: section[k], key.split("."), config) != value


def evaluated_maps(config, workdir):
    """Returns the classes that the run's evaluation predicts, in the size that it sees, by id."""
    dataset = load.load_dataset(config)
    mesh = test_predict.one_device_mesh()
    model = compiled_model.CompiledModel(config, config.model.backbone, dataset, mesh)
    weights = model_bundle.weight_files.read(workdir / "model" / "weights.safetensors").tensors
    variables = traverse_util.unflatten_dict(dict(weights), sep="/")
    maps = {}
    score = model.evaluate(
        jax.device_put(variables),
        [e.id for e in dataset.evaluation],
        lambda example: maps.update({example.id: example.predicted}),
    )
    assert maps.keys() == {e.id for e in dataset.evaluation}
    return maps, score.miou


def check_prediction_equals_evaluation(config, workdir, output, monkeypatch):
    """Compares each pixel that predict writes for the evaluation images with the evaluation."""
    images = workdir.parent / "data" / "images" / "val"
    test_predict.predict(monkeypatch, *test_predict.flags(workdir, images, output))
    predicted = test_predict.read_maps(output)
    evaluated, miou = evaluated_maps(config, workdir)
    (row,) = json.loads((workdir / "results.json").read_text())["rows"]
    assert row["miou"] == pytest.approx(miou, abs=1e-6)
    assert len(predicted) == len(evaluated)
    for name, ids in predicted.items():
        with Image.open(images / name) as image:
            assert ids.shape == image.size[::-1]
        (expected,) = (m for key, m in evaluated.items() if name.removesuffix(".png").endswith(key))
        # As masks are downscaled.
        small = Image.fromarray(ids).resize(expected.shape[::-1], Image.Resampling.NEAREST)
        np.testing.assert_array_equal(np.asarray(small), expected, err_msg=name)
    assert len(np.unique(np.concatenate([ids.ravel() for ids in predicted.values()]))) > 1


def test_predictions_equal_the_evaluation_on_downscaled_images(tmp_path, monkeypatch):
    """test_carried_keys_slow.py has the other keys."""
    config, workdir = test_predict.run(tmp_path, test_predict.FEW, data__downscale=2)
    assert model_bundle.load(workdir).downscale == 2
    check_prediction_equals_evaluation(config, workdir, tmp_path / "out", monkeypatch)


@pytest.mark.parametrize("key", [key for key in ACTING if key.startswith("model.")])
def test_the_loaded_network_is_the_trained_one(key, tmp_path, monkeypatch):
    """Networks are compared by their attributes, which repr shows: equal ones compute the same."""
    on_vit = {"model__backbone": "tiny_dinov2", "model__head": "dpt"}
    base = {
        "model.multi_grid": {"model__backbone": "resnet18"},  # tiny takes no multi-grid.
        "model.position_rule": on_vit,
        "model.token_multiple": on_vit,
    }.get(key, {})
    changes = base | {key.replace(".", "__"): ACTING[key]}
    # A file without weights, so that no network is traced.
    no_variables = {"params": {}, "batch_stats_weak": {}}
    monkeypatch.setattr(model_bundle, "variable_shapes", lambda model: no_variables)
    workdir = make_workdir(tmp_path, make_weights=lambda model: no_variables, **changes)
    loaded = model_bundle.load(workdir).model
    assert repr(loaded) == repr(deeplab.build(tiny_config(**changes).model, 3))
    assert repr(loaded) != repr(deeplab.build(tiny_config(**base).model, 3))


def test_a_model_of_older_code_predicts_as_it_did_and_warns(tmp_path):
    workdir = make_workdir(tmp_path, protocol=PROTOCOL | {"data": "camvid_by2"})
    path = workdir / "model" / "model.json"
    description = json.loads(path.read_text())
    assert description["format"] == 1
    with capture_lines() as lines:
        assert model_bundle.load(workdir).downscale == 1
    assert lines == []  # Its downscale is recorded, and 1.
    del description["preprocessing"]["downscale"]
    path.write_text(json.dumps(description))
    with capture_lines() as lines:
        assert model_bundle.load(workdir).downscale == 1
    assert len(lines) == 1 and "downscaled by 2" in lines[0]
