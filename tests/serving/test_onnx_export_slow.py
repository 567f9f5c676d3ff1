"""ONNX files of every kind of network, at every kind of size; some without this package."""

import subprocess
import sys

import jax
import numpy as np
import pytest

from tests.serving.test_onnx_export import SHAPES, check_sizes, folded_program, needs_onnx

pytestmark = [pytest.mark.slow, needs_onnx]

IN_PLAIN_ONNXRUNTIME = """
import sys
for name in ("semiseg_jax", "flax", "jax", "tensorflow", "onnx"):
    sys.modules[name] = None
import numpy as np, onnxruntime
session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
images = np.load("images.npy")
np.save("class_map.npy", session.run(["class_map"], {"images": images})[0])
"""


@pytest.mark.parametrize(
    ("downscale", "changes"),
    [
        (1, {}),
        (2, {}),
        (1, {"model__backbone": "tiny_dinov2", "model__head": "dpt"}),
        (1, {"model__backbone": "tiny_dinov3", "model__head": "linear"}),
        (1, {"model__backbone": "tiny_convnext"}),
    ],
    ids=["resnet", "downscaled", "dinov2", "dinov3", "convnext"],
)
def test_one_file_takes_every_size_and_batch(tmp_path, downscale, changes):
    path = tmp_path / "model.onnx"
    program = folded_program(downscale, **changes)
    check_sizes(program, path, SHAPES)
    images = np.random.default_rng(1).integers(0, 256, SHAPES[0]).astype(np.uint8)
    np.save(tmp_path / "images.npy", images)
    subprocess.run([sys.executable, "-I", "-c", IN_PLAIN_ONNXRUNTIME], cwd=tmp_path, check=True)
    expected = jax.jit(program)(images)["class_map"]
    assert (np.load(tmp_path / "class_map.npy") == expected).mean() >= 0.9999
