"""The constraints of config keys, checked before a run starts, and the run's name."""

import difflib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flax import traverse_util

from semiseg_jax.data.batch_layout import KINDS
from semiseg_jax.data.load import LAYOUTS
from semiseg_jax.data.sda import OPS
from semiseg_jax.data.sources.tfds import PREFIX
from semiseg_jax.eval_protocol import SELECTIONS
from semiseg_jax.models import deeplab, pretrained, published_weights
from semiseg_jax.models.deeplab import BACKBONES, HEADS, INPUT_NORMALIZATIONS
from semiseg_jax.models.dsbn import NORM_KINDS
from semiseg_jax.models.layers import FIRST_DILATIONS
from semiseg_jax.runtime.errors import UserError

# A predicate on the value, and the values it accepts in words, as the error message gives them.
Rule = tuple[Callable[[Any], bool], str]


def _one_of(*choices: str) -> Rule:
    return lambda v: v in choices, f"one of {', '.join(choices)}"


def _all_of(*choices: str) -> Rule:
    return (
        lambda v: isinstance(v, tuple) and len(set(v)) == len(v) and set(v) <= set(choices),
        f"a tuple of distinct names out of {', '.join(choices)}",
    )


def _at_least(low: float) -> Rule:
    return lambda v: v >= low, f"at least {low}"


def _between(low: float, high: float) -> Rule:
    """Accepts low <= value < high."""
    return lambda v: low <= v < high, f"at least {low} and below {high}"


_WEIGHTS: Rule = (
    lambda v: isinstance(v, str),
    f"{published_weights.IMAGENET}, the path of a file, or empty",
)
_POSITIVE: Rule = (lambda v: v > 0, "above 0")
_NONE_OR_POSITIVE: Rule = (lambda v: v is None or v > 0, "above 0, or leave it out")
_POSITIVE_INTS: Rule = (
    lambda v: isinstance(v, tuple) and all(type(n) is int and n > 0 for n in v),
    "a tuple of integers above 0, or ()",
)
_SIZE: Rule = (
    lambda v: isinstance(v, tuple) and len(v) == 2 and all(type(n) is int and n > 0 for n in v),
    "(height, width) in pixels, two integers above 0",
)
_WINDOW: Rule = (lambda v: v == () or _SIZE[0](v), f"() or {_SIZE[1]}")
_RANGE: Rule = (
    lambda v: isinstance(v, tuple) and len(v) == 2 and 0 < v[0] <= v[1],
    "(low, high) with 0 < low <= high",
)
_SCALES: Rule = (
    lambda v: isinstance(v, tuple) and len(v) > 0 and all(s > 0 for s in v),
    "a tuple of numbers above 0, at least one",
)
_NAMES: Rule = (
    lambda v: (
        isinstance(v, tuple) and all(isinstance(n, str) and n for n in v) and len(set(v)) == len(v)
    ),
    "a tuple of distinct names",
)
_BYTES: Rule = (
    lambda v: isinstance(v, tuple) and all(type(n) is int and 0 <= n < 256 for n in v),
    "a tuple of integers from 0 to 255",
)
_SOURCE: Rule = (
    lambda v: (
        v in LAYOUTS or (isinstance(v, str) and len(v) > len(PREFIX) and v.startswith(PREFIX))
    ),
    f"one of {', '.join(LAYOUTS)}, or {PREFIX}NAME",
)

# Keys that may be None: the network or the loss then chooses the value.
_OPTIONAL_KEYS = frozenset(
    {
        "loss.scl.saturate",
        "model.align_corners",
        "model.norm_epsilon.backbone",
        "model.norm_epsilon.head",
    }
)

# Keys with a constraint on the value alone; `check` has those between keys.
RULES: dict[str, Rule] = {
    "data.name": _SOURCE,
    "data.classes": _NAMES,
    "data.ignore_ids": _BYTES,
    "data.downscale": _at_least(1),
    "data.unlabeled_ratio": _at_least(0),
    "data.labels": _at_least(0),
    "data.split_seed": _at_least(0),
    "data.holdout": _at_least(0),
    "data.mask_suffix": (lambda v: len(v) > 0, "an ending, such as _mask.png"),
    "data.streets_seed": _at_least(0),
    "data.streets_train": _at_least(1),
    "data.streets_val": _at_least(1),
    "data.streets_size": _SIZE,
    "data.weak_stream": _all_of(*KINDS),
    "data.strong_stream": _all_of(*KINDS),
    "data.crop": _SIZE,
    "data.scale": _RANGE,
    "data.prefetch": _at_least(1),
    "data.threads": _at_least(0),
    "sda.num_ops": _at_least(0),
    "sda.magnitude": _one_of("uniform", "released"),
    "sda.ops": _all_of(*OPS),
    "model.backbone": _one_of(*BACKBONES),
    "model.head": _one_of(*HEADS),
    "model.output_stride": (lambda v: v in (8, 16, 32), "8, 16 or 32"),
    "model.first_dilation": _one_of("auto", *FIRST_DILATIONS),
    "model.multi_grid": _POSITIVE_INTS,
    "model.norm": _one_of(*NORM_KINDS),
    "model.norm_momentum": _between(0, 1),
    "model.norm_epsilon.backbone": _NONE_OR_POSITIVE,
    "model.norm_epsilon.head": _NONE_OR_POSITIVE,
    "model.head_features": _at_least(1),
    "model.low_level_features": _at_least(1),
    "model.aspp_rates": _POSITIVE_INTS,
    "model.dropout": _between(0, 1),
    "model.pretrained": _WEIGHTS,
    "model.input_normalization": _one_of("auto", *INPUT_NORMALIZATIONS),
    "model.compute_dtype": _one_of("float32", "bfloat16"),
    "loss.unlabeled": _one_of("scl", "scl_official", "sce", "ce"),
    "loss.unlabeled_weight": _at_least(0),
    "loss.scl.label_floor": (lambda v: 0 < v < 1, "between 0 and 1"),
    "optim.teacher.learning_rate": _POSITIVE,
    "optim.student.learning_rate": _POSITIVE,
    "optim.teacher.head_multiplier": _POSITIVE,
    "optim.student.head_multiplier": _POSITIVE,
    "optim.reference_batch": _at_least(0),
    "optim.momentum": _between(0, 1),
    "optim.poly_power": _at_least(0),
    "optim.weight_decay": _at_least(0),
    "train.steps": _at_least(1),
    "train.teacher_steps": _at_least(1),
    "train.batch_labeled": _at_least(1),
    "train.batch_unlabeled": _at_least(1),
    "train.accumulate": _at_least(1),
    "train.log_every": _at_least(1),
    "train.checkpoint_every": _at_least(1),
    "train.profile_at": _at_least(0),
    "pseudo.scales": _SCALES,
    "pseudo.average": _one_of("softmax", "logits"),
    "pseudo.min_confidence": _between(0, 1),
    "pseudo.window": _WINDOW,
    "pseudo.window_stride": _WINDOW,
    "pseudo.batch": _at_least(1),
    "eval.scales": _SCALES,
    "eval.window": _WINDOW,
    "eval.window_stride": _WINDOW,
    "eval.batch": _at_least(1),
    "eval.pad_to": _at_least(1),
    "eval.every": _at_least(0),
    "eval.select": _one_of(*SELECTIONS),
    "rounds.count": _at_least(0),
    "rounds.student_model": _one_of("", *BACKBONES),
    "rounds.student_pretrained": _WEIGHTS,
    "rounds.student_init": _one_of("teacher", "scratch"),
}


def check(config: Any) -> None:
    """Checks every value of a config against its constraints.

    Args:
        config: a config with the keys of configs/default.py.

    Raises:
        UserError: naming the key, its value and the values that are accepted.
    """
    flat = traverse_util.flatten_dict(config.to_dict(), sep=".")
    for key, value in flat.items():
        if value is None and key not in _OPTIONAL_KEYS:
            raise UserError(
                f"{key} is None: give it a value, configs/default.py has the usual one.",
                code="config-value-none",
            )
        if not is_finite(value):
            raise UserError(
                f"{key} is {value!r}: make it finite.",
                code="config-value-not-finite",
            )
    for key, (is_valid, accepted) in RULES.items():
        if key not in flat:
            raise UserError(
                f"The config has no {key}: start from configs.default.get_config().",
                code="config-key-missing",
            )
        value = flat[key]
        try:
            valid = is_valid(value)
        except TypeError:  # A value of another type, such as "3" >= 1.
            valid = False
        if not valid:
            hint = ""
            if isinstance(value, str) and accepted.startswith("one of "):
                choices = accepted.removeprefix("one of ").split(", ")
                matches = difflib.get_close_matches(value, choices, 1)
                hint = f" (did you mean {matches[0]}?)" if matches else ""
            raise UserError(
                f"{key} is {value!r}: make it {accepted}{hint}.",
                code="config-value-invalid",
            )
    if not (config.data.weak_stream or config.data.strong_stream):
        raise UserError(
            "data.weak_stream and data.strong_stream are both empty: fill one of them.",
            code="augment-streams-empty",
        )
    if config.sda.num_ops and not config.sda.ops:
        raise UserError(
            "sda.ops is empty: name operations, or set sda.num_ops to 0.",
            code="sda-ops-empty",
        )
    if not config.sda.replace and config.sda.num_ops > len(config.sda.ops):
        raise UserError(
            f"sda.num_ops is {config.sda.num_ops} without replacement from {len(config.sda.ops)} "
            "operations: lower it, or set sda.replace.",
            code="sda-ops-too-few",
        )
    for name in ("eval", "pseudo"):
        check_window(f"{name}.", config[name].window, config[name].window_stride)
    if config.eval.select != "last" and not config.eval.every:
        raise UserError(
            f"eval.select is {config.eval.select} and eval.every 0: say how many steps lie between "
            "the evaluations to choose from, or select the last weights.",
            code="select-without-evaluations",
        )
    if config.eval.select == "holdout" and not config.data.holdout:
        raise UserError(
            "eval.select is holdout and data.holdout 0: say how many labelled images to hold out.",
            code="select-without-holdout",
        )
    deeplab.check_multi_grid(config.model)
    _check_weights(config)


def is_finite(value: Any) -> bool:
    """Returns False for an infinite or NaN float, also inside a tuple; True for other values."""
    if isinstance(value, tuple):
        return all(map(is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def check_window(prefix: str, window: tuple[int, ...], stride: tuple[int, ...]) -> None:
    """Checks that a window has a stride, and that no pixels lie between windows.

    Args:
        prefix: prefix of the keys in the error message, such as "eval.".
        window: (height, width) in pixels, or ().
        stride: (down, across) in pixels, or ().

    Raises:
        UserError: naming the keys.
    """
    if bool(window) != bool(stride):
        raise UserError(
            f"{prefix}window is {window!r} and {prefix}window_stride {stride!r}: give both, or "
            "none.",
            code="window-or-stride-missing",
        )
    if any(step > side for step, side in zip(stride, window, strict=True)):
        raise UserError(
            f"{prefix}window_stride {stride!r} is longer than {prefix}window {window!r}: pixels "
            "would lie between the windows; make it shorter.",
            code="window-stride-too-long",
        )


def _check_weights(config: Any) -> None:
    """Checks that the pretrained weights exist and fit the backbone and the head.

    Checked here, before the workdir belongs to this config; loading compares every tensor.

    Raises:
        UserError: naming the file and the key that disagree.
    """
    rounds = config.rounds
    if rounds.student_pretrained and rounds.student_model in ("", config.model.backbone):
        raise UserError(
            "rounds.student_pretrained is given, but students are the teacher's network: leave it "
            "empty, or give another backbone as rounds.student_model.",
            code="student-pretrained-unused",
        )
    for weights_key, path, backbone in (
        ("model.pretrained", config.model.pretrained, ("model.backbone", config.model.backbone)),
        (
            "rounds.student_pretrained",
            rounds.student_pretrained,
            ("rounds.student_model", rounds.student_model),
        ),
    ):
        if not path:
            continue
        if path == published_weights.IMAGENET:
            # They fit, and may have to be downloaded, which this check is too early for.
            published_weights.check_available(weights_key, backbone[1])
            continue
        conventions = pretrained.inspect(path)
        head = ("model.head", config.model.head)
        # None if the weights do not determine the setting.
        for (key, value), needed in ((backbone, conventions.backbone), (head, conventions.head)):
            if needed not in (None, value):
                raise UserError(
                    f"{path} holds weights of {needed}, and {key} is {value}: make it {needed}, or "
                    "give other weights.",
                    code="pretrained-of-another-model",
                )


def run_name(config_path: str) -> str:
    """Returns the name of a run for the value of --config.

    For example camvid_half for configs/camvid.py:half.
    """
    path, _, argument = config_path.partition(":")
    return "_".join([Path(path).stem, *argument.replace(",", ":").split(":")]).rstrip("_")
