"""The model of a run as an artefact that needs neither this package nor its weights' file.

StableHLO for JAX, or a TensorFlow SavedModel: RGB images in, class map and probabilities out.
Batch, height and width are symbolic, so that one artefact takes images of every size. It holds the
form of every platform, of which the one that loads it keeps its own. It computes in float32.
"""

import contextlib
import dataclasses
import functools
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tensorflow as tf
from etils import epath
from flax import traverse_util
from jax import export as jax_export
from jax.experimental import jax2tf
from jaxtyping import Array, UInt8

from semiseg_jax import __version__, deployed
from semiseg_jax import mesh as mesh_lib
from semiseg_jax.data import streets
from semiseg_jax.data.examples import IMAGE_SUFFIXES, files_below, is_image
from semiseg_jax.data.labels import read_image
from semiseg_jax.errors import UserError, reason
from semiseg_jax.inference import Predictor
from semiseg_jax.models import deeplab, folding
from semiseg_jax.state import Variables

# What each holds beside the description.
FORMATS = {"stablehlo": "model.stablehlo", "saved_model": "saved_model.pb"}
DESCRIPTION = "export.json"
# convolutions.py has a form of its own for the first, and another for all others.
PLATFORMS = ("cpu", "tpu", "cuda")
SHAPE = "n, h, w, 3"
SIGNATURE = "serving_default"

# What an artefact and the network it was made from must agree on.
MIN_AGREEMENT = 0.9999  # share of pixels with one and the same class
MAX_DIFFERENCE = 1e-4  # of a probability
# Photographs that are looked at, at most; each is a size to compile for, once on either side.
MAX_PHOTOGRAPHS = 4

Images = UInt8[np.ndarray, "_ _ _ 3"]  # batches of several sizes stand side by side
Run = Callable[[Images], Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Parity:
    """How far an artefact is from the network that it was made from.

    Attributes:
        pixels: compared.
        differing: of them, those whose class differs.
        difference: the largest between two probabilities; NaN where one is.
    """

    pixels: int
    differing: int
    difference: float

    @property
    def agreement(self) -> float:
        """Share of pixels with one and the same class."""
        return 1 - self.differing / self.pixels

    def __str__(self) -> str:
        return (
            f"class maps agree on {100 * self.agreement:.4f} % of {self.pixels:,} pixels, "
            f"probabilities differ by at most {self.difference:.1e}"
        )


def predict(
    model: nn.Module, variables: Variables, images: UInt8[Array, "n h w 3"]
) -> dict[str, Array]:
    """What an artefact computes: {"class_map": uint8 [n, h, w], "probabilities": [n, h, w, C]}.

    The protocol is evaluation's simplest: each image once, whole, at its own size.
    """
    logits = model.apply(variables, images, domain="weak", train=False)
    probabilities = jax.nn.softmax(logits)
    # At most 255 classes: label maps keep 255 for unlabelled pixels.
    class_map = jnp.argmax(probabilities, axis=-1).astype(jnp.uint8)
    return {"class_map": class_map, "probabilities": probabilities}


def export(
    workdir: Path, output: Path, format_: str, photographs: Path | None, say: Callable[[str], None]
) -> None:
    """Makes an artefact of a run's model, and compares it with the model.

    Args:
        workdir: of the run.
        output: the folder to make; appears whole or not at all.
        format_: of `FORMATS`.
        photographs: a folder with images to compare on; None for built-in scenes.
        say: takes a line about what was made.

    Raises:
        UserError: there is no such format, the run has no model, the output cannot be made, or
            artefact and model disagree.
    """
    if format_ not in FORMATS:
        raise UserError(f"--format is {format_}: make it one of {', '.join(FORMATS)}.")
    found = deployed.load(workdir)
    batches = scenes() if photographs is None else from_folder(photographs)
    model = _in_float32(found)
    with _appears_whole(output) as folder:
        say(f"{format_}: any batch, height and width; {', '.join(PLATFORMS)}; float32")
        for line in _departures(found):
            say(line)
        _write(model, found.variables, format_, folder)
        parity = compare(model, found.variables, load(folder, format_), batches)
        say(f"parity on {sum(map(len, batches))} images: {parity}")
        check(parity)
        before = (workdir / deployed.FOLDER / deployed.WEIGHTS).stat().st_size
        after = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        say(f"size: {before:,} bytes of weights before, {after:,} bytes after")
        text = json.dumps(_describe(found, format_, parity), indent=1) + "\n"
        (folder / DESCRIPTION).write_text(text)
    say(f"{output / FORMATS[format_]} and {DESCRIPTION} beside it are written")


def _in_float32(found: deployed.Deployed) -> deeplab.DeepLab:
    config = found.model_config.copy_and_resolve_references()
    config.compute_dtype = "float32"
    return deeplab.build(config, len(found.classes))


def _departures(found: deployed.Deployed) -> list[str]:
    """What the measured mIoU had that the artefact has not."""
    protocol = found.protocol
    had = [
        f"scales {', '.join(map(str, protocol['scales']))}" * (protocol["scales"] != [1.0]),
        "mirrored images too" * protocol["flip"],
        "windows" * (protocol["window"] != "whole"),
        f"sides padded to multiples of {protocol['pad_to']}" * (protocol["pad_to"] != 1),
        "bfloat16" * (found.model_config.compute_dtype != "float32"),
    ]
    if not any(had):
        return []
    return [
        f"the mIoU of {100 * found.description['miou']:.2f} was measured with "
        f"{', '.join(filter(None, had))}; the artefact sees each image once, whole, at its own size"
    ]


@contextlib.contextmanager
def _appears_whole(output: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `output` at the end and vanishes where that is not reached.

    Raises:
        UserError: there is something at `output` already, or it cannot be written.
    """
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise UserError(f"{output} exists already: remove it, or give another --output.")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as scratch:
            # A folder inside, because the temporary one itself is closed to other users.
            made = Path(scratch) / output.name
            made.mkdir()
            yield made
            made.rename(output)
    except (OSError, tf.errors.OpError) as error:
        raise UserError(
            f"{output} cannot be written ({reason(error)}): free space or give another --output, "
            "and start again."
        ) from error


# --- The formats ---------------------------------------------------------------------------------


def _write(model: deeplab.DeepLab, variables: Variables, format_: str, folder: Path) -> None:
    folded, weights = folding.fold(model, variables)
    if format_ == "stablehlo":
        (folder / FORMATS[format_]).write_bytes(_stablehlo(folded, weights))
    else:
        _write_saved_model(folded, weights, folder)


def _stablehlo(model: nn.Module, variables: Variables) -> bytearray:
    """The serialised program, the weights among its constants."""
    images = jax.ShapeDtypeStruct(jax_export.symbolic_shape(SHAPE), jnp.uint8)
    program = jax.jit(functools.partial(predict, model, variables))
    return jax_export.export(program, platforms=PLATFORMS)(images).serialize()


def _write_saved_model(model: nn.Module, variables: Variables, folder: Path) -> None:
    """The weights are its variables, so that the programs of all sizes share them."""
    names = sorted(traverse_util.flatten_dict(variables, sep="/"))
    flat = traverse_util.flatten_dict(variables, sep="/")
    module = tf.Module()
    module.weights = [tf.Variable(flat[name], trainable=False, name=name) for name in names]

    def by_name(weights: Sequence[Array], images: Array) -> dict[str, Array]:
        tree = traverse_util.unflatten_dict(dict(zip(names, weights, strict=True)), sep="/")
        return predict(model, tree, images)

    program = jax2tf.convert(
        by_name,
        polymorphic_shapes=[None, SHAPE],
        with_gradient=False,
        native_serialization_platforms=PLATFORMS,
    )
    images = tf.TensorSpec([None, None, None, 3], tf.uint8, name="images")

    @functools.partial(tf.function, autograph=False, input_signature=[images])
    def serve(images: tf.Tensor) -> dict[str, tf.Tensor]:
        return program(list(module.weights), images)

    tf.saved_model.save(module, str(folder), signatures={SIGNATURE: serve})


def load(folder: Path, format_: str) -> Run:
    """An artefact as it lies on the disk, as a function of images."""
    if format_ == "stablehlo":
        content = bytearray((folder / FORMATS[format_]).read_bytes())
        return jax.jit(jax_export.deserialize(content).call)
    module = tf.saved_model.load(str(folder))

    def run(images: Images) -> Mapping[str, Any]:
        # By way of the module: a signature alone does not keep the variables alive.
        return module.signatures[SIGNATURE](images=tf.constant(images))

    return run


def _describe(found: deployed.Deployed, format_: str, parity: Parity) -> dict[str, Any]:
    """What stands beside an artefact, for those who use it."""
    count = len(found.classes)
    says = found.description
    return {
        "format": format_,
        "made_by": {
            "semiseg_jax": __version__,
            "jax": jax.__version__,
            "tensorflow": tf.__version__,
        },
        "platforms": list(PLATFORMS),
        "classes": list(found.classes),
        "palette": [list(colour) for colour in found.palette],
        "input": {
            "images": {
                "dtype": "uint8",
                "shape": ["n", "h", "w", 3],
                "is": says["preprocessing"]["input"],
            }
        },
        "outputs": {
            "class_map": {"dtype": "uint8", "shape": ["n", "h", "w"], "is": "ids of classes"},
            "probabilities": {"dtype": "float32", "shape": ["n", "h", "w", count]},
        },
        "inference": "each image once, whole, at its own size; the sizes of a batch are equal",
        "miou": says["miou"],
        "protocol": says["protocol"],
        "trained_on": says["trained_on"],
        "parity": {"agreement": parity.agreement, **dataclasses.asdict(parity)},
    }


# --- Parity --------------------------------------------------------------------------------------


def scenes() -> list[Images]:
    """Built-in street scenes: a batch of two of an even size, and one of an odd size."""
    even = [streets.draw(0, index, 96, 160)[0] for index in range(2)]
    odd = streets.draw(0, 2, 97, 131)[0]
    return [np.stack(even), odd[None]]


def from_folder(folder: Path) -> list[Images]:
    """The first images below a folder, and the first of all cut to an odd size.

    Raises:
        UserError: there are none, or one is damaged.
    """
    if not folder.is_dir():
        raise UserError(f"The folder {folder} of --images is missing.")
    files = [f for f in files_below(epath.Path(folder)) if is_image(f.name)]
    if not files:
        raise UserError(f"--images={folder} has no image ({', '.join(IMAGE_SUFFIXES)}) in it.")
    images = [read_image(file)[None] for file in files[:MAX_PHOTOGRAPHS]]
    height, width = ((n - 1) // 2 * 2 + 1 for n in images[0].shape[1:3])
    return [*images, images[0][:, :height, :width]]


def compare(model: nn.Module, variables: Variables, run: Run, batches: Sequence[Images]) -> Parity:
    """An artefact beside what evaluation predicts with the network, on the same images."""
    mesh = mesh_lib.make_mesh(jax.devices()[:1])
    evaluate = Predictor(model, mesh)
    pixels = differing = 0
    difference = 0.0
    for images in batches:
        on_device = mesh_lib.to_devices({"image": images}, mesh)["image"]
        expected = np.asarray(evaluate(variables, on_device))
        found = {name: np.asarray(value) for name, value in run(images).items()}
        pixels += found["class_map"].size
        differing += int((found["class_map"] != expected.argmax(-1)).sum())
        largest = np.abs(found["probabilities"] - expected).max()
        difference = float(np.maximum(difference, largest))  # which keeps NaN
    return Parity(pixels, differing, difference)


def check(parity: Parity) -> None:
    """Raises a UserError where artefact and network are not one and the same."""
    if parity.agreement >= MIN_AGREEMENT and parity.difference <= MAX_DIFFERENCE:
        return
    raise UserError(
        f"The artefact is not the model, and was not kept: {parity}, where {100 * MIN_AGREEMENT} % "
        f"and {MAX_DIFFERENCE} are asked for; install the versions of jax and TensorFlow that "
        "requirements.txt names."
    )
