"""The model that a run leaves in WORKDIR/model: network, weights, and what it says of itself.

The folder is all that is read. Copied elsewhere it works as well, without the run and its data.
"""

import dataclasses
import json
from collections.abc import Collection, Mapping
from typing import Any

import flax.linen as nn
import numpy as np
from etils import epath
from flax import traverse_util
from jaxtyping import UInt8
from ml_collections import ConfigDict

from semiseg_jax.data.pipeline import MAX_EXACT_SIZES
from semiseg_jax.errors import UserError
from semiseg_jax.models import deeplab, weight_files
from semiseg_jax.state import Variables, for_inference, variable_shapes

FOLDER = "model"
WEIGHTS = "weights.safetensors"
DESCRIPTION = "model.json"
# Of model.json; another number where a reader of this one would misread it.
FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Deployed:
    """A trained network, ready to be used.

    Attributes:
        model: to be applied with domain="weak" and train=False; has `mean`, `std`, `align_corners`.
        variables: its weights with the weak norm alone, NumPy arrays.
        classes: names in id order.
        palette: (R, G, B) of each class.
        model_config: `config.model` of the run, nothing left open.
        colour: of padding at the right and the bottom.
        pad_to: what the sides of images are padded to multiples of where there are many sizes, in
            pixels; 1 for never (`config.eval.pad_to`).
        exact_sizes: (height, width) that images of the evaluation had, if these were few and so not
            padded.
        batch: images that it was evaluated at a time (`config.eval.batch`).
        largest_pixels: of an image that it was evaluated on, padded.
        protocol: by which its mIoU was measured (see `evaluate.protocol`).
        description: all of model.json.
    """

    model: nn.Module
    variables: Variables
    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    model_config: ConfigDict
    colour: UInt8[np.ndarray, "3"]
    pad_to: int
    exact_sizes: frozenset[tuple[int, int]]
    batch: int
    largest_pixels: int
    protocol: Mapping[str, Any]
    description: Mapping[str, Any]


def describe(
    model_config: Any,
    eval_config: Any,
    classes: tuple[str, ...],
    palette: tuple[tuple[int, int, int], ...],
    trained_on: Mapping[str, Any],
    row: Mapping[str, Any],
    evaluated_sizes: Collection[tuple[int, int]] = (),
) -> dict[str, Any]:
    """What model.json says, which is what `load` reads.

    Args:
        model_config: `config.model` of the network, resolved.
        eval_config: `config.eval`.
        classes, palette: of the data set.
        trained_on: the training data, in words and counts.
        row: the network's row of results.json.
        evaluated_sizes: (height, width) of the images that the row is of.
    """
    pad_to = row["protocol"]["pad_to"]
    few = pad_to == 1 and len(evaluated_sizes) <= MAX_EXACT_SIZES
    largest = max((-(-h // pad_to) * -(-w // pad_to) for h, w in evaluated_sizes), default=0)
    mean, std = deeplab.INPUT_NORMALIZATIONS[model_config.input_normalization]
    corners = "corners aligned" if model_config.align_corners else "half-pixel centres"
    return {
        "format": FORMAT,
        "classes": list(classes),
        "palette": [list(colour) for colour in palette],
        "model": model_config.to_dict(),
        "preprocessing": {
            "input": "RGB, 0 to 255, upright as the EXIF orientation says",
            "mean": list(mean),
            "std": list(std),
            "resize": f"bilinear, {corners}, no antialiasing; sizes are rounded",
            "padding": "at the right and the bottom",
            "padding_colour": deeplab.input_mean(model_config).tolist(),
            "pad_to": eval_config.pad_to,
            "exact_sizes": sorted(map(list, evaluated_sizes)) if few else [],
        },
        "trained_on": dict(trained_on),
        "miou": row["miou"],
        "iou": row["iou"],
        "protocol": row["protocol"],
        "batch": eval_config.batch,
        "largest_pixels": largest * pad_to**2,
    }


def load(workdir: epath.PathLike) -> Deployed:
    """The model of a run that has ended.

    Args:
        workdir: of the run, or any folder with its model/ in it.

    Raises:
        UserError: the run has not ended, or its model/ is damaged, of another version, or not of
            one piece.
    """
    folder = epath.Path(workdir) / FOLDER
    for name in (WEIGHTS, DESCRIPTION):
        if not (folder / name).exists():
            raise UserError(
                f"{workdir} has no {FOLDER}/{name}: a run writes it when it ends; start "
                "semiseg_jax.main again with this workdir to end it, or correct --workdir."
            )
    description = _read_description(folder / DESCRIPTION)
    try:
        model_config = ConfigDict(description["model"]).lock()
        classes = tuple(map(str, description["classes"]))
        model = deeplab.build(model_config, len(classes))
        shapes = for_inference(variable_shapes(model))
        preprocessing = description["preprocessing"]
        read: dict[str, Any] = {
            "model": model,
            "classes": classes,
            "palette": tuple((int(r), int(g), int(b)) for r, g, b in description["palette"]),
            "model_config": model_config,
            "colour": np.asarray(preprocessing["padding_colour"], np.uint8),
            "pad_to": int(preprocessing["pad_to"]),
            "exact_sizes": frozenset((int(h), int(w)) for h, w in preprocessing["exact_sizes"]),
            "batch": int(description["batch"]),
            "largest_pixels": int(description["largest_pixels"]),
            "protocol": description["protocol"],
            "description": description,
        }
        says = (preprocessing["mean"], preprocessing["std"], len(read["palette"]))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _unknown_form(folder / DESCRIPTION, f"{type(error).__name__}: {error}") from error
    if says != ([*model.mean], [*model.std], len(classes)):
        raise _unknown_form(folder / DESCRIPTION, "its parts contradict each other")
    return Deployed(variables=_read_weights(folder, shapes, description), **read)


def _read_description(path: epath.Path) -> dict[str, Any]:
    try:
        description = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read ({error}): start the run's command again, which writes it anew."
        ) from error
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise _unknown_form(path, f"format {FORMAT} is known")
    return description


def _unknown_form(path: epath.Path, reason: str) -> UserError:
    return UserError(
        f"{path} is not of a form that is known here ({reason}): start the run's command again "
        "with this version of semiseg_jax, which writes it anew."
    )


def _read_weights(folder: epath.Path, shapes: Variables, description: dict[str, Any]) -> Variables:
    """The weights, each in its place, shape and dtype."""
    path = folder / WEIGHTS
    file = weight_files.read(path)
    # Names of classes and their colours may be changed in model.json as one likes.
    for key in ("model", "protocol", "miou"):
        if file.description.get(key) != description[key]:
            raise UserError(
                f"{path} and {DESCRIPTION} beside it are of two models, which differ in {key}: "
                "start the run's command again, which writes both anew."
            )
    wanted = traverse_util.flatten_dict(shapes, sep="/")
    for name in sorted(wanted.keys() | file.tensors.keys()):
        there, here = (
            f"{tree[name].dtype}{list(tree[name].shape)}" if name in tree else "nothing"
            for tree in (file.tensors, wanted)
        )
        if there != here:
            raise UserError(
                f"{path} holds {there} as {name} where the network of {DESCRIPTION} has {here}: "
                "start the run's command again, which writes both anew."
            )
    return traverse_util.unflatten_dict(dict(file.tensors), sep="/")
