"""A whole run whose settings are chosen from the images, and what is done with its model."""

import jax
import numpy as np
import pytest
from flax import traverse_util
from PIL import Image

from semiseg_jax import checkpoints, self_training
from semiseg_jax.data import image_io, load, size_settings
from semiseg_jax.data.sources.downscale import shrink_image
from semiseg_jax.models import deeplab
from semiseg_jax.serving import exporters, model_bundle
from tests import mains, workdirs
from tests.conftest import FEW_OPERATIONS, tiny_config
from tests.models.test_folding import random_variables
from tests.test_export import one_small_scene  # noqa: F401 - a fixture
from tests.test_predict import (
    CLASSES,
    compute_miou,
    flags,
    make_data,
    read_maps,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("one_device", "without_report", "one_small_scene"),
]


@pytest.fixture
def open_config(tmp_path, monkeypatch):
    """All settings are open; images are halved; the network predicts several classes."""
    monkeypatch.setattr(size_settings, "MAX_PIXELS", 900)
    make_data(tmp_path / "data", [(36, 52), (48, 36)])
    config = tiny_config(
        data__root=str(tmp_path / "data"),
        data__cache_dir=str(tmp_path / "cache"),
        data__classes=CLASSES,
        data__labels=0.5,
        data__downscale=0,
        data__crop=(),
        data__scale=(),
        model__aspp_rates=(),
        sda__ops=FEW_OPERATIONS,
        train__steps=1,
        train__teacher_steps=1,
        train__batch_labeled=2,
        train__batch_unlabeled=2,
        pseudo__batch=2,
        eval__batch=2,
    )
    # A step changes the weights of several classes by next to nothing.
    config.model.norm_momentum = 0.9999
    for kind in ("teacher", "student"):
        config.optim[kind].learning_rate = 1e-6
    weights = tmp_path / "weights.safetensors"
    image = image_io.read_image(tmp_path / "data" / "images" / "val" / "3.png")
    write_weights(weights, size_settings.resolve(config).model, shrink_image(image, 2))
    config.model.pretrained = str(weights)
    return config


def write_weights(path, model_config, image):
    """Writes random weights whose classes have the same mean logit on an image."""
    network = deeplab.build(deeplab.resolve(model_config), len(CLASSES))
    variables = random_variables(network)
    logits = jax.jit(network.apply)(variables, image[None])
    flat = traverse_util.flatten_dict(variables, sep="/")
    (bias,) = (name for name in flat if name.endswith("classifier/bias"))
    flat[bias] = flat[bias] - np.asarray(logits).mean((0, 1, 2))
    checkpoints.save_weights(path, traverse_util.unflatten_dict(flat, sep="/"), {})


def test_the_model_predicts_and_is_exported(open_config, tmp_path, monkeypatch):
    run = tmp_path / "run"
    self_training.run(open_config, run)
    bundle = model_bundle.load(run)
    assert bundle.downscale == 2 and len(bundle.model_config.aspp_rates) == 3

    images = tmp_path / "data" / "images" / "val"
    mains.run(monkeypatch, *flags(run, images, tmp_path / "maps"), command="predict")
    predicted = read_maps(tmp_path / "maps")
    sources = {
        path.relative_to(images).as_posix(): image_io.read_image(path)
        for path in images.rglob("*.png")
    }
    assert {n: m.shape for n, m in predicted.items()} == {
        n: image.shape[:2] for n, image in sources.items()
    }
    assert len({*np.concatenate([class_map.ravel() for class_map in predicted.values()])}) > 1
    # The evaluation's own images are the halves, of which each pixel was enlarged to four.
    halves = {name: class_map[::2, ::2] for name, class_map in predicted.items()}
    masks = tmp_path / "masks"
    (masks / "nested").mkdir(parents=True)
    dataset = load.load_dataset(size_settings.resolve(open_config))
    for example in dataset.evaluation:
        mask = image_io.read_mask(example.mask, dataset.table)
        Image.fromarray(mask).save(masks / f"{example.id}.png")
    assert compute_miou(halves, masks) == pytest.approx(workdirs.rows(run)[-1]["miou"], abs=1e-6)

    exporters.export(run, tmp_path / "exported", "stablehlo", None)
    exported = exporters.load(tmp_path / "exported", "stablehlo")
    name, image = next(iter(sources.items()))
    (class_map,) = np.asarray(exported(image[None])["class_map"])
    assert (class_map == predicted[name]).mean() > 0.999
