"""Writes a network as a TFLite file for images of one size, and runs it by TFLite's interpreter."""

import contextlib
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

from semiseg_jax.runtime.errors import UserError, first_line
from semiseg_jax.runtime.quiet_tensorflow import tf
from semiseg_jax.serving import jaxpr_program
from semiseg_jax.serving.tf_operations import TensorFlowBuilder
from semiseg_jax.shape_buckets import Size

PRECISIONS = ("float32", "float16", "int8")
OUTPUTS = ("class_map", "probabilities")
# Operations of transformers and ConvNeXt. In int8 their variances become 0, or the classes wrong.
_COARSE = {"erfc": "of GELU", "rsqrt": "of layer norm"}


def write(
    predict: Callable[..., Mapping[str, Any]],
    size: Size,
    precision: str,
    calibration: Sequence[UInt8[np.ndarray, "h w 3"]],
    path: Path,
) -> None:
    """Writes a program.

    Args:
        predict: from images, uint8 [1, h, w, 3], to `class_map`, uint8 [1, h, w], and
            `probabilities`, float32 [1, h, w, classes].
        size: (height, width) of the images in pixels.
        precision: one of PRECISIONS; "float16" stores the weights so, and "int8" computes in
            integers. Inputs and outputs have the same types in all.
        calibration: images of that size, whose features determine the ranges of the integers;
            read for "int8" alone.
        path: of the file.

    Raises:
        UserError: TFLite does not have an operation of the program.
    """

    def outputs_in_order(images: jax.Array) -> Sequence[jax.Array]:
        outputs = predict(images)
        return [outputs[name] for name in OUTPUTS]

    shape = (1, *size, 3)
    program = jax.jit(outputs_in_order).trace(jax.ShapeDtypeStruct(shape, jnp.uint8)).jaxpr
    jaxpr_program.check_operations(program, TensorFlowBuilder())
    if precision == "int8":
        check_integers(program)
    module = tf.Module()

    @tf.function(autograph=False, input_signature=[tf.TensorSpec(shape, tf.uint8, name="images")])
    def serve(images: tf.Tensor) -> dict[str, tf.Tensor]:
        results = jaxpr_program.rebuild(program, TensorFlowBuilder(), [images])
        return dict(zip(OUTPUTS, results, strict=True))

    module.serve = serve
    with tempfile.TemporaryDirectory() as folder:
        # A SavedModel, because the converter takes the names of inputs and outputs from it.
        tf.saved_model.save(module, folder, signatures={"serving_default": serve})
        converter = tf.lite.TFLiteConverter.from_saved_model(folder)
        _set_precision(converter, precision, calibration)
        try:
            with _no_warnings():
                content = converter.convert()
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"TensorFlow cannot convert this network to TFLite with --precision={precision} "
                f"({first_line(error)}): give --precision=float32, or export it with "
                "--format=saved_model.",
                code="export-tflite-refused",
            ) from error
    path.write_bytes(content)


def check_integers(program: Any) -> None:
    """Raises a UserError that names operations whose results 8 bits cannot hold."""
    coarse = sorted(jaxpr_program.operations(program) & _COARSE.keys())
    if coarse:
        raise UserError(
            f"--precision=int8 does not suit this network, because 8 bits are too coarse for "
            f"{' and '.join(f'{name} ({_COARSE[name]})' for name in coarse)}: give "
            "--precision=float16.",
            code="export-int8-too-coarse",
        )


def _set_precision(converter: Any, precision: str, calibration: Sequence[Any]) -> None:
    builtins = tf.lite.OpsSet.TFLITE_BUILTINS
    if precision == "float16":
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        converter.target_spec.supported_types = [tf.float16]
    if precision == "int8":

        def images() -> Iterator[dict[str, Any]]:
            for image in calibration:
                yield {"images": image[None]}

        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        converter.representative_dataset = images
        builtins = tf.lite.OpsSet.TFLITE_BUILTINS_INT8
    converter.target_spec.supported_ops = [builtins]


@contextlib.contextmanager
def _no_warnings() -> Iterator[None]:
    """Drops TensorFlow's warning that its interpreter moves to another package, ai-edge-litert."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def load(path: Path) -> Callable[[UInt8[np.ndarray, "n h w 3"]], dict[str, np.ndarray]]:
    """Loads a file that `write` wrote; the images of a batch are predicted one by one."""
    with _no_warnings():
        interpreter = tf.lite.Interpreter(str(path), num_threads=os.cpu_count())
    runner = interpreter.get_signature_runner()

    def call(images: UInt8[np.ndarray, "n h w 3"]) -> dict[str, np.ndarray]:
        results = [runner(images=image[None]) for image in images]
        return {name: np.concatenate([r[name] for r in results]) for name in OUTPUTS}

    return call
