"""Exports the model of a run to a file that needs neither this package nor the weights file.

The formats are StableHLO for JAX, TensorFlow's SavedModel, ONNX and TFLite. The input is RGB
images, the outputs are class maps and class probabilities; the weak norm is folded into the
convolutions. A TFLite file is for images of one size. In the other formats batch, height and width
are symbolic, so that one exported model accepts images of every size, in float32.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util
from jax import export as jax_export
from jax.experimental import jax2tf
from jaxtyping import Array, UInt8

from semiseg_jax import __version__
from semiseg_jax.data.dataset import Dataset
from semiseg_jax.data.image_io import read_image
from semiseg_jax.models import deeplab, folding
from semiseg_jax.models.segmenter import Segmenter
from semiseg_jax.runtime import fileio
from semiseg_jax.runtime.errors import UserError, reason
from semiseg_jax.runtime.logger import logger
from semiseg_jax.runtime.quiet_tensorflow import tf
from semiseg_jax.serving import (
    downscaling,
    export_description,
    export_parity,
    model_bundle,
    run_images,
    tflite_export,
)
from semiseg_jax.serving.export_parity import PredictFn
from semiseg_jax.shape_buckets import Size
from semiseg_jax.train_state import Variables

# The main file of each format.
FORMATS = {
    "stablehlo": "model.stablehlo",
    "saved_model": "saved_model.pb",
    "onnx": "model.onnx",
    "tflite": "model.tflite",
}
DESCRIPTION = "export.json"
# models/convolutions.py has one implementation for the CPU and another for all other platforms.
PLATFORMS = ("cpu", "tpu", "cuda")
SHAPE = "n, h, w, 3"
SIGNATURE = "serving_default"


@dataclasses.dataclass(frozen=True)
class FixedForm:
    """What a TFLite file fixes, besides the network.

    Attributes:
        size: (height, width) of the images in pixels.
        precision: one of `tflite_export.PRECISIONS`.
        dataset: images of the run, which calibrate integers, and on which the file is evaluated.
    """

    size: Size
    precision: str
    dataset: Dataset


def predict(
    model: nn.Module,
    variables: Variables,
    images: UInt8[Array, "n h w 3"],
    downscale: int = 1,
) -> dict[str, Array]:
    """Computes the outputs of an exported model (see `PredictFn`).

    Each image is processed once, without windows, at its own size divided by `downscale`.
    """
    height, width = images.shape[1:3]
    if downscale > 1:
        images = downscaling.traced_shrink(images, downscale)
    logits = model.apply(variables, images, domain="weak", train=False)
    probabilities = jax.nn.softmax(logits)
    # uint8 is sufficient: there are at most 255 classes, because 255 is the ignore label.
    class_map = jnp.argmax(probabilities, axis=-1).astype(jnp.uint8)
    outputs = {"class_map": class_map, "probabilities": probabilities}
    if downscale > 1:
        outputs = {k: downscaling.traced_enlarge(v, (height, width)) for k, v in outputs.items()}
    return outputs


def export(
    workdir: Path,
    output: Path,
    format_: str,
    photographs: Path | None,
    precision: str | None = None,
    size: str | None = None,
) -> None:
    """Exports the model of a run, and compares the exported model with the network.

    Args:
        workdir: folder of the run.
        output: folder to create; it appears when the export is complete, or not at all.
        format_: a key of FORMATS.
        photographs: folder with images to compare on; None for built-in scenes.
        precision: of TFLite, one of `tflite_export.PRECISIONS`; None for float32.
        size: of TFLite's images, such as "96x160"; None for that of the run's images.

    Raises:
        UserError: the format is unknown or lacks an operation of the network, its packages are
            missing, the run has no model, the output cannot be written, or the outputs of exported
            model and network differ too much.
    """
    _check_format(format_, precision, size)
    bundle = model_bundle.load(workdir)
    if photographs is None:
        batches = export_parity.draw_scenes()
    else:
        batches = export_parity.read_photographs(photographs)
    config = bundle.model_config.copy_and_resolve_references()
    config.compute_dtype = "float32"
    model = deeplab.build(config, len(bundle.classes))
    form = None
    if format_ == "tflite":
        form = _fixed_form(workdir, bundle, precision or "float32", size)
        batches = [export_parity.fit(image, form.size)[None] for b in batches for image in b]
    with _atomic_folder(output) as folder:
        logger.info(f"{format_}: {_variants(format_, form)}")
        differences = _protocol_differences(bundle)
        if differences:
            logger.info(
                f"the mIoU of {100 * bundle.description['miou']:.2f} was measured with "
                f"{', '.join(differences)}; the exported model predicts each image once, whole, at "
                "its own size" + f" divided by {bundle.downscale}" * (bundle.downscale > 1)
            )
        _write(model, bundle, format_, folder, form)
        exported = load(folder, format_)
        diff = export_parity.compare(model, bundle.variables, exported, batches, bundle.downscale)
        logger.info(f"parity on {sum(map(len, batches))} images: {diff}")
        if form is None or form.precision == "float32":
            export_parity.check_diff(diff)
        content = export_description.describe(bundle, _interface(format_, form), diff)
        if form is not None:
            network = export_parity.network(model, bundle.variables, bundle.downscale)
            change = export_parity.iou_change(network, exported, form.dataset, form.size)
            change.log(bundle.classes)
            content["iou_of_file"] = change.to_json(bundle.classes)
        weights = (workdir / model_bundle.FOLDER / model_bundle.WEIGHTS).stat().st_size
        total = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        logger.info(f"size: {weights:,} bytes of weights before, {total:,} bytes after")
        (folder / DESCRIPTION).write_text(json.dumps(content, indent=1) + "\n")
    logger.info(f"{output / FORMATS[format_]} and {DESCRIPTION} beside it are written")


def _check_format(format_: str, precision: str | None, size: str | None) -> None:
    """Raises a UserError for an unknown format, missing packages, and flags of another format."""
    if format_ not in FORMATS:
        raise UserError(
            f"--format is {format_}: make it one of {', '.join(FORMATS)}.",
            code="export-format-unknown",
        )
    if format_ != "tflite" and (precision or size):
        raise UserError(
            f"--precision and --size belong to --format=tflite, and not to {format_}: leave them "
            "out.",
            code="export-flag-of-tflite",
        )
    if precision and precision not in tflite_export.PRECISIONS:
        raise UserError(
            f"--precision is {precision}: make it one of {', '.join(tflite_export.PRECISIONS)}.",
            code="export-precision-unknown",
        )
    if format_ == "onnx":
        missing = [n for n in ("onnx", "onnxruntime") if importlib.util.find_spec(n) is None]
        if missing:
            raise UserError(
                f"--format=onnx needs {' and '.join(missing)}: install them by pip install -r "
                "requirements-onnx.txt, or with the extra semiseg_jax[onnx].",
                code="export-packages-missing",
            )


def _fixed_form(
    workdir: Path, bundle: model_bundle.ModelBundle, precision: str, size: str | None
) -> FixedForm:
    """Returns what a TFLite file fixes; prints a size that the user did not give."""
    config = run_images.read_config(workdir)
    parsed = run_images.parse_size(size) if size else run_images.default_size(bundle, config)
    if not size:
        logger.info(
            f"--size is {parsed[0]}x{parsed[1]}, the size of the run's "
            + ("evaluation images" if len(bundle.exact_sizes) == 1 else "crops")
        )
    return FixedForm(parsed, precision, run_images.load_dataset(config))


def _variants(format_: str, form: FixedForm | None) -> str:
    """Returns the images and platforms of a format, for people."""
    if form is not None:
        return f"one image of {form.size[0]}x{form.size[1]} at a time; {form.precision}"
    platforms = f"{', '.join(PLATFORMS)}; " * (format_ in ("stablehlo", "saved_model"))
    return f"any batch, height and width; {platforms}float32"


def _interface(format_: str, form: FixedForm | None) -> dict[str, Any]:
    """Returns the entries of export.json that depend on the format."""
    versions = {"semiseg_jax": __version__, "jax": jax.__version__, "tensorflow": tf.__version__}
    if format_ == "onnx":
        # Imported here and below, because no other format needs the packages.
        from semiseg_jax.serving import onnx_export

        versions |= onnx_export.VERSIONS
    interface: dict[str, Any] = {"format": format_, "made_by": versions}
    if format_ in ("stablehlo", "saved_model"):
        interface["platforms"] = list(PLATFORMS)
    interface["precision"] = "float32" if form is None else form.precision
    interface["shape"] = ["n", "h", "w"] if form is None else [1, *form.size]
    return interface


def _protocol_differences(bundle: model_bundle.ModelBundle) -> list[str]:
    """Returns the settings of the mIoU's evaluation that the exported model does not have."""
    protocol = bundle.protocol
    differences = [
        f"scales {', '.join(map(str, protocol.scales))}" * (protocol.scales != (1.0,)),
        "mirrored images too" * protocol.flip,
        "windows" * (protocol.window != "whole"),
        f"sides padded to multiples of {protocol.pad_to}" * (protocol.pad_to != 1),
        "bfloat16" * (bundle.model_config.compute_dtype != "float32"),
    ]
    return [difference for difference in differences if difference]


@contextlib.contextmanager
def _atomic_folder(output: Path) -> Iterator[Path]:
    """Yields a temporary folder that is renamed to `output` on success and removed on failure.

    Raises:
        UserError: `output` exists already, or it cannot be written.
    """
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise UserError(
            f"{output} exists already: remove it, or give another --output.",
            code="export-output-exists",
        )
    try:
        with fileio.complete_folder(output) as folder:
            yield folder
    except (OSError, tf.errors.OpError) as error:
        raise UserError(
            f"{output} cannot be written ({reason(error)}): free space or give another --output, "
            "and start again.",
            code="export-unwritable",
        ) from error


# --- The formats ---------------------------------------------------------------------------------


def _write(
    model: Segmenter,
    bundle: model_bundle.ModelBundle,
    format_: str,
    folder: Path,
    form: FixedForm | None,
) -> None:
    """Folds the weak norm into the convolutions and writes the model in a format."""
    folded, weights = folding.fold(model, bundle.variables)
    program = functools.partial(predict, folded, weights, downscale=bundle.downscale)
    path = folder / FORMATS[format_]
    if format_ == "stablehlo":
        path.write_bytes(_stablehlo(folded, weights, bundle.downscale))
    elif format_ == "saved_model":
        _write_saved_model(folded, weights, folder, bundle.downscale)
    elif format_ == "onnx":
        from semiseg_jax.serving import onnx_export

        texts = export_description.texts(bundle)
        onnx_export.write(program, len(bundle.classes), texts, path)
    elif form is not None:
        images = []
        if form.precision == "int8":
            examples = run_images.calibration_examples(form.dataset)
            images = [export_parity.fit(read_image(e.image), form.size) for e in examples]
            logger.info(f"calibrated on {len(images)} training images")
        tflite_export.write(program, form.size, form.precision, images, path)


def _stablehlo(model: nn.Module, variables: Variables, downscale: int) -> bytearray:
    """Returns the serialised program, which contains the weights as constants."""
    images = jax.ShapeDtypeStruct(jax_export.symbolic_shape(SHAPE), jnp.uint8)
    program = jax.jit(functools.partial(predict, model, variables, downscale=downscale))
    return jax_export.export(program, platforms=PLATFORMS)(images).serialize()


def _write_saved_model(
    model: nn.Module, variables: Variables, folder: Path, downscale: int
) -> None:
    """Writes a SavedModel; its variables are the weights, which the programs of all sizes share."""
    flat = traverse_util.flatten_dict(variables, sep="/")
    names = sorted(flat)
    module = tf.Module()
    module.weights = [tf.Variable(flat[name], trainable=False, name=name) for name in names]

    def predict_from_list(weights: Sequence[Array], images: Array) -> dict[str, Array]:
        tree = traverse_util.unflatten_dict(dict(zip(names, weights, strict=True)), sep="/")
        return predict(model, tree, images, downscale)

    program = jax2tf.convert(
        predict_from_list,
        polymorphic_shapes=[None, SHAPE],
        with_gradient=False,
        native_serialization_platforms=PLATFORMS,
    )
    images = tf.TensorSpec([None, None, None, 3], tf.uint8, name="images")

    @functools.partial(tf.function, autograph=False, input_signature=[images])
    def serve(images: tf.Tensor) -> dict[str, tf.Tensor]:
        return program(list(module.weights), images)

    tf.saved_model.save(module, str(folder), signatures={SIGNATURE: serve})


def load(folder: Path, format_: str) -> PredictFn:
    """Loads an exported model from its folder."""
    if format_ == "stablehlo":
        content = bytearray((folder / FORMATS[format_]).read_bytes())
        return jax.jit(jax_export.deserialize(content).call)
    if format_ == "onnx":
        from semiseg_jax.serving import onnx_export

        return onnx_export.load(folder / FORMATS[format_])
    if format_ == "tflite":
        return tflite_export.load(folder / FORMATS[format_])
    module = tf.saved_model.load(str(folder))

    def call(images: export_parity.Images) -> Mapping[str, Any]:
        # The closure holds the module, because a signature does not keep the variables alive.
        return module.signatures[SIGNATURE](images=tf.constant(images))

    return call
