"""The model that a run writes to WORKDIR/model: network, weights and description.

No other file of the run is read, so that a copy of the folder works without the run and its data.
"""

import dataclasses
import math
import re
from collections.abc import Collection, Mapping
from typing import Any

import flax.linen as nn
import numpy as np
from etils import epath
from flax import traverse_util
from jaxtyping import UInt8
from ml_collections import ConfigDict

from semiseg_jax import inference
from semiseg_jax import mesh as mesh_lib
from semiseg_jax.data.sources.downscale import DOWNSCALE
from semiseg_jax.eval_protocol import EvalProtocol
from semiseg_jax.models import deeplab, weight_files
from semiseg_jax.results import ResultRow
from semiseg_jax.runtime import fileio, hashes, json_forms, rules
from semiseg_jax.runtime.errors import UserError, first_line
from semiseg_jax.runtime.logger import logger
from semiseg_jax.runtime.rules import Rule
from semiseg_jax.shape_buckets import ShapeBuckets, Size, has_few_sizes, pad_size
from semiseg_jax.train_state import Variables, inference_variables, variable_shapes

FOLDER = "model"
WEIGHTS = "weights.safetensors"
DESCRIPTION = "model.json"
# Entries of model.json that people may edit, and the one that only the file itself can hold; all
# others are also in the header of the weights, and must agree.
EDITABLE = ("classes", "palette")
WEIGHTS_HASH = "weights_sha256"
# Format numbers of model.json; increased if a reader of the earlier format would misread the file.
# Readers of format 1 do not downscale images.
FORMAT, FORMAT_DOWNSCALED = 1, 2

_COLOUR = rules.tuple_of(rules.integer(0, 255), "three integers from 0 to 255", 3, 3)
_NUMBERS = rules.tuple_of(rules.number(-1e6, 1e6), "three numbers", 3, 3)
_TEXT: Rule = (json_forms.is_text, "text")
_NAME: Rule = (lambda v: json_forms.is_text(v) and v != "", "a name")
_SIZE = rules.pair(rules.integer(1, 2**31), "(height, width)")


def _is_window(value: Any) -> bool:
    sides = value["size"], value["stride"]
    return all(len(v) == 2 and rules.accepts(inference.RULES["window"], v) for v in sides) and all(
        step <= side for side, step in zip(*sides, strict=True)
    )


# By field of model.json: the values it accepts, lists as tuples. Other fields are not read.
_SCHEMA: dict[str, Rule] = {
    "classes": rules.tuple_of(_NAME, "2 to 255 class names", 2, 255),
    "palette": rules.tuple_of(_COLOUR, "a colour (R, G, B) for each class, 0 to 255"),
    **{f"model.{key}": rule for key, rule in deeplab.RESOLVED_RULES.items()},
    "preprocessing.input": _TEXT,
    "preprocessing.downscale": DOWNSCALE,
    "preprocessing.mean": _NUMBERS,
    "preprocessing.std": _NUMBERS,
    "preprocessing.padding_colour": _COLOUR,
    "preprocessing.pad_to": inference.RULES["pad_to"],
    "preprocessing.exact_sizes": rules.tuple_of(_SIZE, "a list of sizes (height, width)"),
    "trained_on": (lambda v: isinstance(v, dict), "an object"),
    "miou": rules.number(0, 1),
    # `EvalProtocol.from_json` checks the other fields of the protocol.
    "protocol.scales": inference.RULES["scales"],
    "protocol.flip": rules.BOOL,
    "protocol.window": (
        lambda v: v == "whole" or _is_window(v),
        '"whole", or the size and stride of a window',
    ),
    "protocol.pad_to": inference.RULES["pad_to"],
    "batch": inference.RULES["batch"],
    "largest_pixels": rules.integer(0, 2**40),
}
# Fields that older code did not write, each with the value that equals its behaviour.
_ADDED_FIELDS = {
    "model": {"position_rule": "original", "token_multiple": 1, "freeze_backbone": False},
    "preprocessing": {"downscale": 1},
    "protocol": {"evaluation_hash": None},
}


@dataclasses.dataclass(frozen=True)
class ModelBundle:
    """A trained network with everything that inference needs.

    Attributes:
        model: the network, applied with domain="weak" and train=False; has `mean`, `std` and
            `align_corners`.
        variables: NumPy arrays; the weak norm alone.
        classes: class names in id order.
        palette: (R, G, B) of each class.
        model_config: `config.model` of the run, resolved.
        pad_value: RGB of the padding at the right and bottom of images.
        pad_to: multiple to which the sides of images are padded in sets with many sizes, in
            pixels; 1 for no padding (`config.eval.pad_to`).
        exact_sizes: (height, width) of the evaluation images in pixels, if they were not padded.
        downscale: factor by which the sides of images are divided before anything else
            (`config.data.downscale`); all sizes here are those of downscaled images.
        batch: number of images per batch in the evaluation (`config.eval.batch`).
        largest_pixels: number of pixels of the largest evaluation image, with padding.
        protocol: evaluation protocol of the mIoU.
        description: the content of model.json.
    """

    model: nn.Module
    variables: Variables
    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    model_config: ConfigDict
    pad_value: UInt8[np.ndarray, "3"]
    pad_to: int
    exact_sizes: frozenset[Size]
    downscale: int
    batch: int
    largest_pixels: int
    protocol: EvalProtocol
    description: Mapping[str, Any]


def describe(
    model_config: Any,
    eval_config: Any,
    classes: tuple[str, ...],
    palette: tuple[tuple[int, int, int], ...],
    trained_on: Mapping[str, Any],
    row: ResultRow,
    evaluated_sizes: Collection[Size] = (),
    downscale: int = 1,
    initial_weights: Mapping[str, Any] | None = None,
    kept: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Returns the content of model.json, from which `load` builds the network.

    Args:
        model_config: `config.model` of the network, resolved.
        eval_config: `config.eval`.
        classes, palette: of the data set.
        trained_on: name of the training data and numbers of images.
        row: result row of the network.
        evaluated_sizes: (height, width) of the evaluation images in pixels, downscaled.
        downscale: `config.data.downscale`.
        initial_weights: that the network started from, see `published_weights.describe`; None for
            random ones. A model.json of older code has no such key.
        kept: which stage the weights are of and why, the fields of `KeptStage`; None if that is
            not known. A model.json of older code has no such key.
    """
    pad_to = row.protocol.pad_to
    is_exact = pad_to == 1 and has_few_sizes(evaluated_sizes)
    largest_pixels = max((math.prod(pad_size(s, pad_to)) for s in evaluated_sizes), default=0)
    mean, std = deeplab.INPUT_NORMALIZATIONS[model_config.input_normalization]
    corners = "corners aligned" if model_config.align_corners else "half-pixel centres"
    return {
        "format": FORMAT if downscale == 1 else FORMAT_DOWNSCALED,
        "classes": list(classes),
        "palette": [list(colour) for colour in palette],
        "model": model_config.to_dict(),
        "preprocessing": {
            "input": "RGB, 0 to 255, upright as the EXIF orientation says",
            # Sides are divided by it and rounded down: bilinear, with antialiasing, to 8 bits.
            "downscale": downscale,
            "mean": list(mean),
            "std": list(std),
            "resize": f"bilinear, {corners}, no antialiasing; sizes are rounded",
            "padding": "at the right and the bottom",
            "padding_colour": deeplab.input_mean(model_config).tolist(),
            "pad_to": eval_config.pad_to,
            "exact_sizes": sorted(map(list, evaluated_sizes)) if is_exact else [],
        },
        "trained_on": dict(trained_on),
        "pretrained": initial_weights and dict(initial_weights),
        "kept": kept and dict(kept),
        "miou": row.miou,
        "iou": list(row.iou),
        "protocol": row.protocol.to_json(),
        "batch": eval_config.batch,
        "largest_pixels": largest_pixels,
    }


def load(workdir: epath.PathLike) -> ModelBundle:
    """Loads the model of a finished run.

    Args:
        workdir: folder of the run, or any other folder with a copy of its model/, or that model/
            itself.

    Raises:
        UserError: the run has not finished, or its model/ is damaged, of another version, or
            inconsistent.
    """
    folder = epath.Path(workdir)
    if not (folder / DESCRIPTION).is_file():
        folder = folder / FOLDER
    for name in (WEIGHTS, DESCRIPTION):
        if not (folder / name).is_file():
            raise UserError(
                f"{workdir} has no {FOLDER}/{name}: a run writes it when it ends; start "
                "semiseg_jax.main again with this workdir to end it, or correct --workdir.",
                code="model-bundle-missing",
            )
    description = _read_description(folder / DESCRIPTION)
    # The file of the weights that training started from is not needed.
    model_config = ConfigDict(description["model"] | {"pretrained": ""}).lock()
    classes = tuple(description["classes"])
    try:
        model = deeplab.build(model_config, len(classes))
        protocol = EvalProtocol.from_json(description["protocol"])
    except (UserError, ValueError) as error:
        raise _format_error(folder / DESCRIPTION, str(error)) from error
    preprocessing = description["preprocessing"]
    normalization = tuple(preprocessing["mean"]), tuple(preprocessing["std"])
    if normalization != (model.mean, model.std) or len(description["palette"]) != len(classes):
        raise _format_error(folder / DESCRIPTION, "its parts contradict each other")
    shapes = inference_variables(variable_shapes(model))
    return ModelBundle(
        model=model,
        variables=_read_weights(folder, shapes, description),
        classes=classes,
        palette=tuple((r, g, b) for r, g, b in description["palette"]),
        model_config=model_config,
        pad_value=np.asarray(preprocessing["padding_colour"], np.uint8),
        pad_to=preprocessing["pad_to"],
        exact_sizes=frozenset((h, w) for h, w in preprocessing["exact_sizes"]),
        downscale=preprocessing["downscale"],
        batch=description["batch"],
        largest_pixels=description["largest_pixels"],
        protocol=protocol,
        description=description,
    )


def _read_description(path: epath.Path) -> dict[str, Any]:
    """Returns the content of model.json, with _ADDED_FIELDS.

    Raises:
        UserError: the file is unreadable, of another format, or a field is not as _SCHEMA says.
    """
    try:
        description = fileio.parse_json(fileio.read_text(path))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read ({first_line(error)}): start the run's command again, which "
            "writes it anew.",
            code="model-description-damaged",
        ) from error
    if not isinstance(description, dict):
        raise _format_error(path, "it is no JSON object")
    _warn_of_unknown_downscaling(path, description)
    description = _with_added_fields(description)
    is_downscaled = rules.find(description, "preprocessing.downscale") not in (1, None)
    expected = FORMAT_DOWNSCALED if is_downscaled else FORMAT
    if (number := description.get("format")) != expected or type(number) is not int:
        raise _format_error(path, f"format {expected} is known")
    if violations := rules.violations(rules.to_tuples(description), _SCHEMA):
        raise _format_error(path, violations[0])
    return description


def _with_added_fields(description: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the content of model.json, or of the header of its weights, with _ADDED_FIELDS."""
    added = {
        name: fields | description[name]
        for name, fields in _ADDED_FIELDS.items()
        if isinstance(description.get(name), dict)
    }
    return {**description, **added}


def _warn_of_unknown_downscaling(path: epath.Path, description: Mapping[str, Any]) -> None:
    """Logs a warning for a model of older code that was trained on downscaled images."""
    # `downscale_dataset` ends the names of data sets so.
    suffix = re.search(r"_by(\d+)$", str(rules.find(description, "protocol.data")))
    if suffix and rules.find(description, "preprocessing.downscale") is None:
        logger.warning(
            f"{path} was written by older code, which did not record that the images were "
            f"downscaled by {suffix[1]} (data.downscale): give images of that size, or start the "
            "run's command again, which writes the file anew."
        )


def _format_error(path: epath.Path, reason: str) -> UserError:
    """Returns the error for a model.json that cannot be interpreted."""
    return UserError(
        f"{path} is not of a form that is known here ({reason}): start the run's command again "
        "with this version of semiseg_jax, which writes it anew.",
        code="model-bundle-format-unknown",
    )


def _read_weights(folder: epath.Path, shapes: Variables, description: dict[str, Any]) -> Variables:
    """Returns the weights as a tree of NumPy arrays.

    Args:
        folder: the folder model/.
        shapes: the variables of the network, with the required shapes and dtypes.
        description: the content of model.json.

    Raises:
        UserError: the file is damaged, or the weights are of another model.
    """
    path = folder / WEIGHTS
    file = weight_files.read(path)
    _check_hash(path, description.get(WEIGHTS_HASH))
    header = _with_added_fields(file.description)
    keys = dict.fromkeys(("model", "protocol", "miou", *header))
    for key in (key for key in keys if key not in EDITABLE):
        if header.get(key) != description.get(key):
            raise UserError(
                f"{path} and {DESCRIPTION} beside it are of two models, which differ in {key}: "
                "start the run's command again, which writes both anew.",
                code="model-weights-of-another-model",
            )
    expected = traverse_util.flatten_dict(shapes, sep="/")
    for name in sorted(expected.keys() | file.tensors.keys()):
        stored, required = (
            f"{tree[name].dtype}{list(tree[name].shape)}" if name in tree else "nothing"
            for tree in (file.tensors, expected)
        )
        if stored != required:
            raise UserError(
                f"{path} holds {stored} as {name} where the network of {DESCRIPTION} has "
                f"{required}: start the run's command again, which writes both anew.",
                code="model-weights-of-another-shape",
            )
        if stored.startswith(("float", "bfloat")) and not np.isfinite(file.tensors[name]).all():
            raise UserError(
                f"{path} holds values as {name} that are not finite, with which every pixel would "
                "be of the first class: train again with a lower learning rate, or restore the "
                "weights.",
                code="model-weights-not-finite",
            )
    return traverse_util.unflatten_dict(dict(file.tensors), sep="/")


def _check_hash(path: epath.Path, expected: str | None) -> None:
    """Refuses weights that are not those that model.json was written for.

    Args:
        path: of the weights.
        expected: their SHA-256; None in a model.json of older code.
    """
    if expected not in (None, hashes.hash_files(path)):
        raise UserError(
            f"{path} was changed or damaged after it was written (its SHA-256 is not that in "
            f"{DESCRIPTION}): restore it, or start the run's command again, which writes both "
            "anew.",
            code="model-weights-changed",
        )


# Default of the number of pixels that a device processes at a time, padding included. It is larger
# if the evaluation processed more.
DEFAULT_MAX_PIXELS = 2**22


@dataclasses.dataclass(frozen=True)
class InferenceConfig:
    """Settings of inference; `evaluation_config` returns those of the model's evaluation.

    Attributes:
        scales, flip, window, window_stride: as in `Predictor`.
        pad_to: multiple to which the sides of every image are padded, in pixels; 1 for no
            padding; None for the padding rule of the evaluation (see `make_shape_buckets`).
        batch: largest number of images per batch, rounded up to a multiple of the number of
            devices.
        max_pixels: pixels that a device processes at a time; larger images are split into tiles.
    """

    scales: tuple[float, ...]
    flip: bool
    window: tuple[int, ...]
    window_stride: tuple[int, ...]
    pad_to: int | None
    batch: int
    max_pixels: int


# By field of InferenceConfig: the values that a user may give.
_SETTINGS: dict[str, Rule] = {**inference.RULES, "max_pixels": rules.integer(1, 2**62)}


def check_settings(settings: Mapping[str, Any], prefix: str = "") -> None:
    """Checks fields of `InferenceConfig` that a user gives.

    Args:
        settings: the values by name of the field.
        prefix: of the names in the error message, such as "--".

    Raises:
        UserError: a field is unknown, or a value is not accepted.
    """
    for name, value in settings.items():
        if name not in _SETTINGS:
            raise UserError(
                f"{prefix}{name} is no setting of inference: there are {', '.join(_SETTINGS)}.",
                code="inference-setting-unknown",
            )
        if not rules.is_finite(value):
            raise UserError(
                f"{prefix}{name} is {value!r}: make it finite.",
                code="flag-value-not-finite",
            )
        if not rules.accepts(_SETTINGS[name], value):
            raise UserError(
                f"{prefix}{name} is {rules.shortened(value)}: make it {_SETTINGS[name][1]}.",
                code="flag-value-invalid",
            )
    if ("window" in settings) != ("window_stride" in settings):
        raise UserError(
            f"{prefix}window and {prefix}window_stride go together: give both, or none.",
            code="window-flag-missing",
        )
    inference.check_window(prefix, settings.get("window", ()), settings.get("window_stride", ()))


def evaluation_config(bundle: ModelBundle, num_devices: int) -> InferenceConfig:
    """Returns the settings of the evaluation, with which the model's mIoU is valid.

    Args:
        bundle: the model.
        num_devices: of this machine; the evaluation may have used another number.
    """
    protocol = bundle.protocol
    window = protocol.window if isinstance(protocol.window, Mapping) else {"size": (), "stride": ()}
    batch = mesh_lib.round_up_batch(bundle.batch, num_devices)
    return InferenceConfig(
        scales=protocol.scales,
        flip=protocol.flip,
        window=tuple(window["size"]),
        window_stride=tuple(window["stride"]),
        pad_to=None,
        batch=batch,
        max_pixels=max(DEFAULT_MAX_PIXELS, batch // num_devices * bundle.largest_pixels),
    )


def make_shape_buckets(
    bundle: ModelBundle, config: InferenceConfig, sizes: Collection[Size], num_devices: int
) -> ShapeBuckets:
    """Returns the array shapes for a set of images.

    Args:
        bundle: the model.
        config: the settings of inference.
        sizes: (height, width) of every image, in pixels.
        num_devices: of this machine.
    """
    exact_sizes: Collection[Size] | None = None
    if config.pad_to is not None:
        pad_to = config.pad_to
    elif bundle.protocol.pad_to > 1:
        # All evaluation images were padded.
        pad_to = bundle.protocol.pad_to
    else:
        pad_to, exact_sizes = bundle.pad_to, bundle.exact_sizes
    return ShapeBuckets(
        sizes,
        pad_to=pad_to,
        exact_sizes=exact_sizes,
        max_pixels=config.max_pixels,
        batch_size=config.batch,
        num_devices=num_devices,
    )
