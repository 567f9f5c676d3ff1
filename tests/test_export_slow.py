"""Predict and export after a run of the quickstart's config.

Exported models are loaded in environments with JAX alone and with TensorFlow alone; also with
ImageNet weights and photographs, if these files exist.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from semiseg_jax import mesh, train_state
from semiseg_jax.data.image_io import read_image
from semiseg_jax.data.sources import streets
from semiseg_jax.inference import Predictor
from semiseg_jax.models import pretrained
from semiseg_jax.serving import model_bundle
from tests import FAST_COMPILATION
from tests.conftest import FEW_OPERATIONS
from tests.test_export import make_workdir
from tests.test_predict import compute_miou, read_maps

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
PHOTOGRAPHS = SHARED / "data" / "camvid" / "images" / "test"
IMAGENET = SHARED / "weights" / "efficientnet_lite0_nofc.npz"

pytestmark = pytest.mark.slow

# These scripts run in a separate folder with `python -I`, and cannot import the blocked packages.
IN_PLAIN_JAX = """
import sys
for name in ("semiseg_jax", "flax", "tensorflow"):
    sys.modules[name] = None
import jax, numpy as np
program = jax.export.deserialize(bytearray(open("stablehlo/model.stablehlo", "rb").read()))
predict = jax.jit(program.call)
"""
IN_PLAIN_TENSORFLOW = """
import sys
for name in ("semiseg_jax", "flax", "jax", "jaxlib"):
    sys.modules[name] = None
import numpy as np, tensorflow as tf
module = tf.saved_model.load("saved_model")
def predict(images):
    return module.signatures["serving_default"](images=tf.constant(images))
"""
SAVE_OUTPUTS = """
outputs = {}
for name, images in np.load("images.npz").items():
    for key, value in predict(images).items():
        outputs[f"{name}/{key}"] = np.asarray(value)
np.savez("outputs.npz", **outputs)
"""


def run(command, folder, **variables):
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "PYTHONPATH")}
    environment |= variables
    process = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """Returns a folder with the cache and the workdir of a short run of configs/streets.py."""
    folder = tmp_path_factory.mktemp("quickstart")
    run(
        [
            *(sys.executable, "-m", "semiseg_jax.main", "--config=configs/streets.py"),
            f"--workdir={folder / 'run'}",
            f"--config.data.cache_dir={folder / 'cache'}",
            *("--config.data.streets_train=24", "--config.data.streets_val=4"),
            *("--config.train.steps=4", "--config.train.teacher_steps=8"),
            *("--config.rounds.count=1", "--config.rounds.control=False"),
            *("--config.model.backbone=resnet10_slim", "--config.model.pretrained="),
            f"--config.sda.ops={FEW_OPERATIONS}",
        ],
        ROOT,
        XLA_FLAGS=FAST_COMPILATION,
    )
    return folder


def test_predictions_have_the_miou_of_the_quickstart(quickstart, tmp_path):
    (data,) = (quickstart / "cache").glob("streets-*")
    command = [sys.executable, "-m", "semiseg_jax.predict", f"--workdir={quickstart / 'run'}"]
    command += [f"--input={data / 'images' / 'val'}", f"--output={tmp_path}"]
    assert "4 images predicted" in run(command, ROOT, XLA_FLAGS=FAST_COMPILATION)
    row = json.loads((quickstart / "run" / "results.json").read_text())["rows"][-1]
    miou = compute_miou(read_maps(tmp_path), data / "masks" / "val", len(row["iou"]))
    assert miou == pytest.approx(row["miou"], abs=1e-6)
    assert len(list((tmp_path / "overlays").glob("*.jpg"))) == 4


@pytest.fixture(scope="module")
def scenes(quickstart):
    """Returns the quickstart's workdir, no arguments, and built-in scenes of several sizes."""
    sizes = {"even": (96, 160), "odd": (121, 83), "large": (480, 640)}
    images = {name: streets.draw(1, 0, *size)[0][None] for name, size in sizes.items()}
    return quickstart / "run", (), images


def load_imagenet_weights(model):
    """Returns variables with ImageNet weights in the backbone and a random head."""
    variables = train_state.init_variables(model, 0, mesh.make_mesh(jax.devices()[:1]))
    return train_state.inference_variables(pretrained.load(IMAGENET, variables)[0])


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Returns a workdir with ImageNet weights, arguments, and photographs, some of odd sizes."""
    for path in (PHOTOGRAPHS, IMAGENET):
        if not path.exists():
            pytest.skip(f"there is no ../{path.relative_to(ROOT.parent)}")
    workdir = make_workdir(
        tmp_path_factory.mktemp("imagenet"),
        make_weights=load_imagenet_weights,
        model__backbone="efficientnet_lite0",
        model__head_features=64,
        model__low_level_features=24,
    )
    images = [read_image(path)[None] for path in sorted(PHOTOGRAPHS.iterdir())[:3]]
    crops = {"odd": images[1][:, :359, :479], "tall": images[2][:, :301, 7:204]}
    return workdir, (f"--images={PHOTOGRAPHS}",), {"whole": images[0], **crops}


@pytest.mark.parametrize("source", ["scenes", "photographs"])
@pytest.mark.parametrize(
    ("format_", "script"), [("stablehlo", IN_PLAIN_JAX), ("saved_model", IN_PLAIN_TENSORFLOW)]
)
def test_exported_model_equals_the_network_without_this_package(
    tmp_path, request, source, format_, script
):
    workdir, arguments, images = request.getfixturevalue(source)
    command = [sys.executable, "-m", "semiseg_jax.export", f"--workdir={workdir}", *arguments]
    # The command exits with an error if its own comparison fails.
    run([*command, f"--output={tmp_path / format_}", f"--format={format_}"], ROOT)
    np.savez(tmp_path / "images.npz", **images)
    run([sys.executable, "-I", "-c", script + SAVE_OUTPUTS], tmp_path)
    bundle = model_bundle.load(workdir)
    predictor = Predictor(bundle.model, mesh.make_mesh(jax.devices()[:1]))
    outputs = np.load(tmp_path / "outputs.npz")
    pixels = same = 0
    for name, image in images.items():
        probabilities = np.asarray(predictor(bundle.variables, jnp.asarray(image)))
        class_map = outputs[f"{name}/class_map"]
        assert (class_map.dtype, class_map.shape) == (np.uint8, probabilities.shape[:3])
        np.testing.assert_allclose(outputs[f"{name}/probabilities"], probabilities, atol=1e-4)
        same += (class_map == probabilities.argmax(-1)).sum()
        pixels += class_map.size
    assert same / pixels >= 0.9999
