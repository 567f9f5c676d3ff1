"""The command on a run of the quickstart's config, and its artefacts where only JAX or TF is."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from semiseg_jax import deployed, mesh
from semiseg_jax.data import streets
from semiseg_jax.inference import Predictor

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.slow

# In a folder of their own and isolated from this one (-I); what must not be there cannot be.
IN_PLAIN_JAX = """
import sys
for name in ("semiseg_jax", "flax", "tensorflow"):
    sys.modules[name] = None
import jax, numpy as np
program = jax.export.deserialize(bytearray(open("stablehlo/model.stablehlo", "rb").read()))
run = jax.jit(program.call)
"""
IN_PLAIN_TENSORFLOW = """
import sys
for name in ("semiseg_jax", "flax", "jax", "jaxlib"):
    sys.modules[name] = None
import numpy as np, tensorflow as tf
module = tf.saved_model.load("saved_model")
def run(images):
    return module.signatures["serving_default"](images=tf.constant(images))
"""
SAVE_OUTPUTS = """
outputs = {}
for name, images in np.load("images.npz").items():
    for key, value in run(images).items():
        outputs[f"{name}/{key}"] = np.asarray(value)
np.savez("outputs.npz", **outputs)
"""


def run(command, folder):
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "PYTHONPATH")}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """A workdir of configs/streets.py, its stages cut short; images, and what evaluation says."""
    folder = tmp_path_factory.mktemp("quickstart")
    run(
        [
            *(sys.executable, "-m", "semiseg_jax.main", "--config=configs/streets.py"),
            f"--workdir={folder / 'run'}",
            f"--config.data.cache_dir={folder / 'cache'}",
            *("--config.data.streets_train=24", "--config.data.streets_val=4"),
            *("--config.train.steps=4", "--config.train.teacher_steps=8"),
            *("--config.rounds.count=1", "--config.rounds.control=False"),
        ],
        ROOT,
    )
    sizes = {"even": (96, 160), "odd": (121, 83), "large": (480, 640)}
    images = {name: streets.draw(1, 0, *size)[0][None] for name, size in sizes.items()}
    found = deployed.load(folder / "run")
    predictor = Predictor(found.model, mesh.make_mesh(jax.devices()[:1]))
    expected = {
        name: np.asarray(predictor(found.variables, jnp.asarray(image)))
        for name, image in images.items()
    }
    return folder / "run", images, expected


@pytest.mark.parametrize(
    ("format_", "script"), [("stablehlo", IN_PLAIN_JAX), ("saved_model", IN_PLAIN_TENSORFLOW)]
)
def test_artefacts_are_the_model_where_this_package_is_not(tmp_path, quickstart, format_, script):
    workdir, images, expected = quickstart
    command = [sys.executable, "-m", "semiseg_jax.export", f"--workdir={workdir}"]
    printed = run([*command, f"--output={tmp_path / format_}", f"--format={format_}"], ROOT)
    assert "parity on 3 images: class maps agree on 100.0000 %" in printed
    np.savez(tmp_path / "images.npz", **images)
    run([sys.executable, "-I", "-c", script + SAVE_OUTPUTS], tmp_path)
    outputs = np.load(tmp_path / "outputs.npz")
    pixels = same = 0
    for name, probabilities in expected.items():
        class_map = outputs[f"{name}/class_map"]
        assert (class_map.dtype, class_map.shape) == (np.uint8, probabilities.shape[:3])
        np.testing.assert_allclose(outputs[f"{name}/probabilities"], probabilities, atol=1e-4)
        same += (class_map == probabilities.argmax(-1)).sum()
        pixels += class_map.size
    assert same / pixels >= 0.9999
