"""Exports the model of a run to a file that needs neither this package nor the weights file.

The formats are StableHLO for JAX and TensorFlow's SavedModel. The input is RGB images, the outputs
are class maps and class probabilities. Batch, height and width are symbolic, so that one exported
model accepts images of every size. It contains a program for each platform, computes in float32,
and has the weak norm folded into the convolutions.
"""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import traverse_util
from jax import export as jax_export
from jax.experimental import jax2tf
from jaxtyping import Array, UInt8

from semiseg_jax import __version__
from semiseg_jax import mesh as mesh_lib
from semiseg_jax.data.dataset import IMAGE_SUFFIXES, files_below, is_image
from semiseg_jax.data.image_io import read_image
from semiseg_jax.data.sources import streets
from semiseg_jax.data.sources.downscale import shrink_image
from semiseg_jax.inference import Predictor
from semiseg_jax.models import deeplab, folding
from semiseg_jax.models.segmenter import Segmenter
from semiseg_jax.runtime import fileio
from semiseg_jax.runtime.errors import UserError, reason
from semiseg_jax.runtime.logger import logger
from semiseg_jax.runtime.quiet_tensorflow import tf
from semiseg_jax.serving import downscaling, model_bundle
from semiseg_jax.train_state import Variables

# The main file of each format.
FORMATS = {"stablehlo": "model.stablehlo", "saved_model": "saved_model.pb"}
DESCRIPTION = "export.json"
# models/convolutions.py has one implementation for the CPU and another for all other platforms.
PLATFORMS = ("cpu", "tpu", "cuda")
SHAPE = "n, h, w, 3"
SIGNATURE = "serving_default"

# Limits of the difference between an exported model and the network.
MIN_AGREEMENT = 0.9999  # share of pixels with the same class
MAX_DIFFERENCE = 1e-4  # of a probability
# Largest number of photographs to compare on; each size is compiled twice.
MAX_PHOTOGRAPHS = 4

Images = UInt8[np.ndarray, "_ _ _ 3"]  # the batches of a list differ in size
# From images to {"class_map": uint8 [n, h, w], "probabilities": float32 [n, h, w, classes]}.
PredictFn = Callable[[Images], Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class ExportDiff:
    """Difference between the outputs of an exported model and of its network.

    Attributes:
        pixels: number of compared pixels.
        differing: number of pixels whose classes differ.
        difference: largest difference of two probabilities; NaN if any is NaN.
    """

    pixels: int
    differing: int
    difference: float

    @property
    def agreement(self) -> float:
        """Share of pixels with the same class, in 0..1."""
        return 1 - self.differing / self.pixels

    def __str__(self) -> str:
        return (
            f"class maps agree on {100 * self.agreement:.4f} % of {self.pixels:,} pixels, "
            f"probabilities differ by at most {self.difference:.1e}"
        )


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


def export(workdir: Path, output: Path, format_: str, photographs: Path | None) -> None:
    """Exports the model of a run, and compares the exported model with the network.

    Args:
        workdir: folder of the run.
        output: folder to create; it appears when the export is complete, or not at all.
        format_: a key of FORMATS.
        photographs: folder with images to compare on; None for built-in scenes.

    Raises:
        UserError: the format is unknown, the run has no model, the output cannot be written, or
            the outputs of exported model and network differ too much.
    """
    if format_ not in FORMATS:
        raise UserError(
            f"--format is {format_}: make it one of {', '.join(FORMATS)}.",
            code="export-format-unknown",
        )
    bundle = model_bundle.load(workdir)
    batches = draw_scenes() if photographs is None else read_photographs(photographs)
    config = bundle.model_config.copy_and_resolve_references()
    config.compute_dtype = "float32"
    model = deeplab.build(config, len(bundle.classes))
    with _atomic_folder(output) as folder:
        logger.info(f"{format_}: any batch, height and width; {', '.join(PLATFORMS)}; float32")
        differences = _protocol_differences(bundle)
        if differences:
            logger.info(
                f"the mIoU of {100 * bundle.description['miou']:.2f} was measured with "
                f"{', '.join(differences)}; the exported model predicts each image once, whole, at "
                "its own size" + f" divided by {bundle.downscale}" * (bundle.downscale > 1)
            )
        _write(model, bundle.variables, format_, folder, bundle.downscale)
        exported = load(folder, format_)
        diff = compare(model, bundle.variables, exported, batches, bundle.downscale)
        logger.info(f"parity on {sum(map(len, batches))} images: {diff}")
        check_diff(diff)
        weights = (workdir / model_bundle.FOLDER / model_bundle.WEIGHTS).stat().st_size
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        logger.info(f"size: {weights:,} bytes of weights before, {size:,} bytes after")
        text = json.dumps(_describe(bundle, format_, diff), indent=1) + "\n"
        (folder / DESCRIPTION).write_text(text)
    logger.info(f"{output / FORMATS[format_]} and {DESCRIPTION} beside it are written")


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
    model: Segmenter, variables: Variables, format_: str, folder: Path, downscale: int
) -> None:
    """Folds the weak norm into the convolutions and writes the model in a format."""
    folded, weights = folding.fold(model, variables)
    if format_ == "stablehlo":
        (folder / FORMATS[format_]).write_bytes(_stablehlo(folded, weights, downscale))
    else:
        _write_saved_model(folded, weights, folder, downscale)


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
    module = tf.saved_model.load(str(folder))

    def call(images: Images) -> Mapping[str, Any]:
        # The closure holds the module, because a signature does not keep the variables alive.
        return module.signatures[SIGNATURE](images=tf.constant(images))

    return call


def _describe(bundle: model_bundle.ModelBundle, format_: str, diff: ExportDiff) -> dict[str, Any]:
    """Returns the content of export.json, the interface description for users of the export."""
    num_classes = len(bundle.classes)
    description = bundle.description
    return {
        "format": format_,
        "made_by": {
            "semiseg_jax": __version__,
            "jax": jax.__version__,
            "tensorflow": tf.__version__,
        },
        "platforms": list(PLATFORMS),
        "classes": list(bundle.classes),
        "palette": [list(colour) for colour in bundle.palette],
        "input": {
            "images": {
                "dtype": "uint8",
                "shape": ["n", "h", "w", 3],
                "is": description["preprocessing"]["input"],
            }
        },
        "outputs": {
            "class_map": {"dtype": "uint8", "shape": ["n", "h", "w"], "is": "ids of classes"},
            "probabilities": {"dtype": "float32", "shape": ["n", "h", "w", num_classes]},
        },
        "inference": "each image once, whole, at its own size"
        + f" divided by {bundle.downscale}" * (bundle.downscale > 1)
        + "; the sizes of a batch are equal",
        "miou": description["miou"],
        "protocol": description["protocol"],
        "trained_on": description["trained_on"],
        "parity": {"agreement": diff.agreement, **dataclasses.asdict(diff)},
    }


# --- Parity --------------------------------------------------------------------------------------


def draw_scenes() -> list[Images]:
    """Returns built-in street scenes: two images of an even size, and one of an odd size."""
    even = [streets.draw(0, index, 96, 160)[0] for index in range(2)]
    odd = streets.draw(0, 2, 97, 131)[0]
    return [np.stack(even), odd[None]]


def read_photographs(folder: Path) -> list[Images]:
    """Returns the first images below a folder, and a crop of the first one of an odd size.

    Raises:
        UserError: the folder is missing or has no images, or an image is damaged.
    """
    if not folder.is_dir():
        raise UserError(
            f"The folder {folder} of --images is missing.",
            code="export-images-folder-missing",
        )
    files = [f for f in files_below(epath.Path(folder)) if is_image(f.name)]
    if not files:
        raise UserError(
            f"--images={folder} has no image ({', '.join(IMAGE_SUFFIXES)}) in it.",
            code="export-images-empty",
        )
    images = [read_image(file)[None] for file in files[:MAX_PHOTOGRAPHS]]
    height, width = ((n - 1) // 2 * 2 + 1 for n in images[0].shape[1:3])
    return [*images, images[0][:, :height, :width]]


def compare(
    model: nn.Module,
    variables: Variables,
    exported: PredictFn,
    batches: Sequence[Images],
    downscale: int = 1,
) -> ExportDiff:
    """Compares an exported model with the `Predictor` of the network on the same images.

    Args:
        model, variables: the network, in float32.
        exported: the exported model.
        batches: the images to compare on.
        downscale: factor of the model (`config.data.downscale`).
    """
    mesh = mesh_lib.make_mesh(jax.devices()[:1])
    predictor = Predictor(model, mesh)
    pixels = differing = 0
    difference = 0.0
    for images in batches:
        small = np.stack([shrink_image(image, downscale) for image in images])
        on_device = mesh_lib.shard_batch({"image": small}, mesh)["image"]
        probabilities = np.asarray(predictor(variables, on_device))
        expected = np.stack([downscaling.enlarge(p, images.shape[1:3]) for p in probabilities])
        outputs = {name: np.asarray(value) for name, value in exported(images).items()}
        pixels += outputs["class_map"].size
        differing += int((outputs["class_map"] != expected.argmax(-1)).sum())
        largest = np.abs(outputs["probabilities"] - expected).max()
        difference = float(np.maximum(difference, largest))  # propagates NaN
    return ExportDiff(pixels, differing, difference)


def check_diff(diff: ExportDiff) -> None:
    """Raises a UserError if the difference exceeds MAX_DIFFERENCE or MIN_AGREEMENT is missed."""
    if diff.agreement >= MIN_AGREEMENT and diff.difference <= MAX_DIFFERENCE:
        return
    raise UserError(
        f"The exported model differs from the network and was not kept: {diff}, where at least "
        f"{100 * MIN_AGREEMENT} % and at most {MAX_DIFFERENCE} are required; install the versions "
        "of jax and TensorFlow that requirements.txt names.",
        code="export-differs-from-model",
    )
