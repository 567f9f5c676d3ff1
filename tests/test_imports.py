"""Modules that a machine without TensorFlow imports."""

import pkgutil
import subprocess
import sys

import pytest

from semiseg_jax import methods, models

MODULES = [
    "semiseg_jax.data.folder_walk",
    "semiseg_jax.data.image_header",
    "semiseg_jax.data.views",
    "semiseg_jax.inference",
    "semiseg_jax.losses",
    "semiseg_jax.losses.supervised_loss",
    "semiseg_jax.mesh",
    "semiseg_jax.metrics",
    "semiseg_jax.optim",
    "semiseg_jax.results",
    "semiseg_jax.serving.trained_model",
    "semiseg_jax.shape_buckets",
    "semiseg_jax.train_step",
    *(
        f"{package.__name__}.{module.name}"
        for package in (methods, models)
        for module in pkgutil.iter_modules(package.__path__)
    ),
]

IMPORT_ALL = """
import importlib
import sys


class NoTensorFlow:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "tensorflow":
            raise ModuleNotFoundError("TensorFlow is not installed", name=name)


sys.meta_path.insert(0, NoTensorFlow())
for name in sys.argv[1:]:
    importlib.import_module(name)
"""


def import_without_tensorflow(names):
    """Imports modules in a process where importing TensorFlow raises an error."""
    return subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, *names], capture_output=True, text=True
    )


def test_modules_import_without_tensorflow():
    process = import_without_tensorflow(MODULES)
    assert process.returncode == 0, process.stderr


def test_the_import_hook_blocks_tensorflow():
    """Guards the test above: the hook must be effective."""
    process = import_without_tensorflow(["semiseg_jax.data.input_pipeline"])
    assert "TensorFlow is not installed" in process.stderr


@pytest.mark.parametrize(
    "name", ["models.deeplab", "models.pretrained", "models.weight_files", "methods.mixing"]
)
def test_the_list_of_modules_covers_the_packages(name):
    assert f"semiseg_jax.{name}" in MODULES
