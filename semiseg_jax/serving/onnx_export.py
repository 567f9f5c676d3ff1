"""Writes a network as an ONNX file for images of every size, and runs it by onnxruntime."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
from jax import export as jax_export
from jaxtyping import UInt8
from onnx import TensorProto, helper

from semiseg_jax import __version__
from semiseg_jax.serving import jaxpr_program
from semiseg_jax.serving.onnx_graph import OnnxGraph
from semiseg_jax.serving.onnx_operations import OnnxBuilder

INPUT = "images"
OUTPUTS = ("class_map", "probabilities")
SHAPE = "n, h, w, 3"

VERSIONS = {"onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__}


def write(
    predict: Callable[..., Mapping[str, Any]],
    num_classes: int,
    metadata: Mapping[str, str],
    path: Path,
) -> None:
    """Writes a program.

    Args:
        predict: from images, uint8 [n, h, w, 3], to `class_map`, uint8 [n, h, w], and
            `probabilities`, float32 [n, h, w, classes].
        num_classes: number of classes.
        metadata: texts by name, the file's `metadata_props`.
        path: of the file.

    Raises:
        UserError: ONNX does not have an operation of the program.
    """
    shape = jax_export.symbolic_shape(SHAPE)

    def outputs_in_order(images: jax.Array) -> Sequence[jax.Array]:
        outputs = predict(images)
        return [outputs[name] for name in OUTPUTS]

    program = jax.jit(outputs_in_order).trace(jax.ShapeDtypeStruct(shape, jnp.uint8)).jaxpr
    graph = OnnxGraph()
    graph.name_sizes(INPUT, shape)
    results = jaxpr_program.rebuild(program, OnnxBuilder(graph), [INPUT])
    for name, result in zip(OUTPUTS, results, strict=True):
        graph.node("Identity", result, outputs=[name])
    model = graph.model(
        [helper.make_tensor_value_info(INPUT, TensorProto.UINT8, ["n", "h", "w", 3])],
        [
            helper.make_tensor_value_info(OUTPUTS[0], TensorProto.UINT8, ["n", "h", "w"]),
            helper.make_tensor_value_info(
                OUTPUTS[1], TensorProto.FLOAT, ["n", "h", "w", num_classes]
            ),
        ],
        dict(metadata),
        __version__,
    )
    path.write_bytes(model.SerializeToString())


def load(path: Path) -> Callable[[UInt8[np.ndarray, "n h w 3"]], dict[str, np.ndarray]]:
    """Loads a file that `write` wrote, on the CPU."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def call(images: UInt8[np.ndarray, "n h w 3"]) -> dict[str, np.ndarray]:
        return dict(zip(OUTPUTS, session.run(OUTPUTS, {INPUT: images}), strict=True))

    return call
