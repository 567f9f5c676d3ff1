"""The constraints of config keys, checked before a run starts, and the run's name."""

import difflib
from pathlib import Path
from typing import Any, get_args

from flax import traverse_util

from semiseg_jax import inference, optim, stages
from semiseg_jax.comparison import kept_stage
from semiseg_jax.data import mask_format
from semiseg_jax.data.batch_layout import KINDS
from semiseg_jax.data.load import LAYOUTS
from semiseg_jax.data.sda import OPS
from semiseg_jax.data.sources.downscale import MAX_DOWNSCALE
from semiseg_jax.data.sources.tfds import PREFIX
from semiseg_jax.data.view_augment import KINDS as VIEW_KINDS
from semiseg_jax.data.views import Partner
from semiseg_jax.eval_protocol import SELECTIONS
from semiseg_jax.losses import supervised_loss
from semiseg_jax.methods import registry
from semiseg_jax.models import deeplab, pretrained, published_weights, vit
from semiseg_jax.models.deeplab import BACKBONES
from semiseg_jax.runtime import config_files, rules
from semiseg_jax.runtime.errors import UserError, printable
from semiseg_jax.runtime.rules import BOOL, TEXT, Rule

# The largest side of a crop or window, in pixels, and numbers of images, seconds and steps that no
# run needs: a larger value is a mistake, and would end in a failed allocation or an overflow.
_MAX_SIDE = 2**14
_MAX_BATCH = 2**16
_MAX_IMAGES = 10**9
# So that a control, of train.steps * rounds.count steps, counts its steps in 32 bits.
_MAX_STEPS = 10**7
_MAX_ROUNDS = 100
_SEED_BITS = 63

_WEIGHTS: Rule = (
    rules.is_text,
    f"{', '.join(published_weights.NAMES)}, the path of a file, or empty",
)
_STEPS = rules.integer(1, _MAX_STEPS)
_INTERVAL = rules.integer(1, 10**9)
_INTERVAL_OR_0 = rules.integer(0, 10**9)
_IMAGES_OR_SHARE = rules.number(0, _MAX_IMAGES)
_BYTE = rules.integer(0, 255)
_SEED = rules.integer(0, 2**_SEED_BITS - 1)
_SIZE = rules.pair(
    rules.integer(1, _MAX_SIDE),
    f"(height, width) in pixels, two integers above 0 and at most {_MAX_SIDE}",
)
_SCENE_SIZE = rules.pair(
    rules.integer(16, 4096), "(height, width) in pixels, two integers from 16 to 4096"
)
_RANGE: Rule = (
    lambda v: (
        isinstance(v, tuple)
        and len(v) == 2
        and all(rules.is_number(n, 0.01, 100) for n in v)
        and v[0] <= v[1]
    ),
    "(low, high) with 0 < low <= high, from 0.01 to 100",
)
# The values of OPEN_VALUES in `data.size_settings`.
_CHOSEN = "to choose it from the sizes of the images"
_CHOSEN_DOWNSCALE: Rule = (
    rules.integer(0, MAX_DOWNSCALE)[0],
    f"at least 1 and at most {MAX_DOWNSCALE}, an integer, or 0 {_CHOSEN}",
)
_NAMES: Rule = (
    lambda v: (
        isinstance(v, tuple)
        # Bytes of a command line that are not UTF-8 cannot be written into files.
        and all(rules.is_text(n) and n and printable(n) == n for n in v)
        and len(set(v)) == len(v)
    ),
    "a tuple of distinct names",
)
_COLOURS: Rule = (
    lambda v: isinstance(v, tuple) and all(_are_bytes(colour, 3) for colour in v),
    "a tuple of colours (R, G, B), integers from 0 to 255",
)
_JITTER: Rule = (
    lambda v: (
        isinstance(v, tuple)
        and len(v) == 4
        and all(rules.is_number(n, 0, 100) for n in v)
        and v[3] <= 0.5
    ),
    "(brightness, contrast, saturation, hue), four numbers of at least 0, hue at most 0.5",
)
_ID_MAP: Rule = (
    lambda v: isinstance(v, tuple) and all(_are_bytes(pair, 2) for pair in v),
    "((mask value, class id), …), integers from 0 to 255",
)
_COLOR_MAP: Rule = (
    lambda v: (
        isinstance(v, tuple) and (all(map(_is_color_pair, v)) or all(map(mask_format.is_color, v)))
    ),
    "((R, G, B), …) or (((R, G, B), class id), …), integers from 0 to 255",
)
_CLASS_WEIGHTS: Rule = (
    lambda v: (
        (isinstance(v, str) and v in ("", "balanced"))
        or (isinstance(v, tuple) and all(map(rules.number(0, 10**6)[0], v)))
    ),
    'balanced, one number of at least 0 for each class, or "" for none',
)
_SOURCE: Rule = (
    lambda v: v in LAYOUTS or (rules.is_text(v) and len(v) > len(PREFIX) and v.startswith(PREFIX)),
    f"one of {', '.join(LAYOUTS)}, or {PREFIX}NAME",
)
_SUFFIX: Rule = (lambda v: rules.is_text(v) and len(v) > 0, "an ending, such as _mask.png")


def _are_bytes(value: Any, length: int) -> bool:
    return (
        isinstance(value, tuple | list)
        and len(value) == length
        and all(rules.is_integer(n, 0, 255) for n in value)
    )


def _is_color_pair(value: Any) -> bool:
    return (
        isinstance(value, tuple | list)
        and len(value) == 2
        and mask_format.is_color(value[0])
        and rules.is_integer(value[1], 0, 255)
    )


_INFERENCE_KEYS = ("scales", "flip", "window", "window_stride", "batch")

# Keys that may be None: the network or the loss then chooses the value.
_OPTIONAL_KEYS = frozenset(
    {
        "loss.scl.saturate",
        "model.align_corners",
        "model.norm_epsilon.backbone",
        "model.norm_epsilon.head",
    }
)

# By key: the values it accepts, whatever the others are; `check` has the constraints between keys.
# Every key that configs/default.py declares has an entry (a test).
RULES: dict[str, Rule] = {
    "seed": rules.integer(-(2**_SEED_BITS), 2**_SEED_BITS - 1),
    "data.name": _SOURCE,
    "data.root": TEXT,
    "data.cache_dir": TEXT,
    "data.downscale": _CHOSEN_DOWNSCALE,
    "data.max_image_pixels": rules.integer(1, 2**40),
    "data.image_dir": TEXT,
    "data.mask_dir": TEXT,
    "data.image_suffix": TEXT,
    "data.mask_suffix": _SUFFIX,
    "data.classes": _NAMES,
    "data.palette": _COLOURS,
    "data.ignore_ids": rules.tuple_of(_BYTE, "a tuple of integers from 0 to 255"),
    "data.id_map": _ID_MAP,
    "data.mask_colors": _COLOR_MAP,
    "data.mask_tolerance": rules.integer(0, 127),
    "data.mask_channel": rules.one_of(*mask_format.CHANNELS),
    "data.mask_threshold": rules.integer(0, 255),
    "data.tfds_image": TEXT,
    "data.tfds_mask": TEXT,
    "data.tfds_id": TEXT,
    "data.tfds_train": TEXT,
    "data.train_extra": BOOL,
    "data.voc_augmented": BOOL,
    "data.unlabeled_dir": TEXT,
    "data.labeled_list": TEXT,
    "data.unlabeled_list": TEXT,
    "data.in_both_lists": rules.one_of("refuse", "labeled", "both"),
    "data.evaluation_list": TEXT,
    "data.unlabeled_ratio": rules.number(0, 10**6),
    "data.labels": _IMAGES_OR_SHARE,
    "data.split_seed": _SEED,
    "data.holdout": _IMAGES_OR_SHARE,
    "data.streets_seed": _SEED,
    "data.streets_train": rules.integer(1, 10**6),
    "data.streets_val": rules.integer(1, 10**6),
    "data.streets_size": _SCENE_SIZE,
    "data.weak_stream": rules.all_of(*KINDS),
    "data.strong_stream": rules.all_of(*KINDS),
    "data.crop": rules.or_empty(_SIZE, _CHOSEN),
    "data.scale": rules.or_empty(_RANGE, _CHOSEN),
    "data.mirror": BOOL,
    "data.balance_crops": BOOL,
    "data.cache_features": BOOL,
    "data.prefetch": rules.integer(1, 1024),
    "data.threads": rules.integer(0, 1024),
    "sda.num_ops": rules.integer(0, 100),
    "sda.replace": BOOL,
    "sda.magnitude": rules.one_of("uniform", "released"),
    "sda.before_geometry": BOOL,
    "sda.ops": rules.keys_of(OPS),
    "method.name": rules.key_of(registry.METHODS),
    **registry.RULES,
    "method.views.kind": rules.one_of(*VIEW_KINDS),
    "method.views.jitter": _JITTER,
    "method.views.jitter_probability": rules.number(0, 1),
    "method.views.grey_probability": rules.number(0, 1),
    "method.views.blur_probability": rules.number(0, 1),
    "method.views.blur_sigma": _RANGE,
    "method.views.per_batch": BOOL,
    "method.views.partner": rules.one_of(*get_args(Partner)),
    **{f"model.{key}": rule for key, rule in deeplab.RULES.items()},
    "model.pretrained": _WEIGHTS,
    "loss.labeled": rules.one_of(*supervised_loss.KINDS),
    "loss.ohem.probability": rules.number(0, 1),
    "loss.ohem.share": rules.number(0, 1),
    "loss.focal_gamma": rules.number(0, 100),
    "loss.class_weights": _CLASS_WEIGHTS,
    "loss.absent_classes": rules.one_of("refuse", "zero"),
    "loss.unlabeled": rules.one_of("scl", "scl_official", "sce", "ce"),
    "loss.unlabeled_weight": rules.number(0, 10**6),
    "loss.scl.stop_gradient": BOOL,
    # float32 has no smaller numbers.
    "loss.scl.label_floor": (lambda v: rules.is_number(v, 1e-30, 1) and v < 1, "between 0 and 1"),
    "loss.scl.saturate": rules.or_none(BOOL),
    "loss.scl.alpha": rules.number(0, 10**6),
    "loss.scl.beta": rules.number(0, 10**6),
    "optim.teacher.learning_rate": rules.above(0, 1000),
    "optim.student.learning_rate": rules.above(0, 1000),
    "optim.teacher.head_multiplier": rules.above(0, 10**4),
    "optim.student.head_multiplier": rules.above(0, 10**4),
    "optim.reference_batch": rules.integer(0, _MAX_BATCH),
    "optim.kind": rules.key_of(optim.OPTIMIZERS),
    "optim.momentum": rules.below(0, 1),
    "optim.betas": rules.pair(rules.below(0, 1), "two numbers, each at least 0 and below 1"),
    # float32 has no smaller numbers.
    "optim.epsilon": rules.number(1e-30, 1),
    "optim.poly_power": rules.number(0, 1000),
    "optim.weight_decay": rules.number(0, 1000),
    "optim.decay_all": BOOL,
    "optim.layer_decay": rules.above(0, 1),
    "train.steps": _STEPS,
    "train.teacher_steps": rules.integer(0, _MAX_STEPS),
    "train.batch_labeled": rules.integer(1, _MAX_BATCH),
    "train.batch_unlabeled": rules.integer(1, _MAX_BATCH),
    "train.accumulate": rules.integer(1, _MAX_BATCH),
    "train.log_every": _INTERVAL,
    "train.checkpoint_every": _INTERVAL,
    "train.profile_at": _INTERVAL_OR_0,
    **{f"pseudo.{key}": inference.RULES[key] for key in _INFERENCE_KEYS},
    "pseudo.average": rules.one_of("softmax", "logits"),
    "pseudo.min_confidence": rules.below(0, 1),
    "pseudo.keep_confidence": BOOL,
    "eval.split": TEXT,
    **{f"eval.{key}": inference.RULES[key] for key in (*_INFERENCE_KEYS, "pad_to")},
    "eval.every": _INTERVAL_OR_0,
    "eval.select": rules.one_of(*SELECTIONS),
    "eval.unlabeled_masks": TEXT,
    "rounds.count": rules.integer(0, _MAX_ROUNDS),
    "rounds.student_model": rules.key_of(BACKBONES, ""),
    "rounds.student_pretrained": _WEIGHTS,
    "rounds.student_init": rules.one_of("teacher", "scratch"),
    "rounds.control": BOOL,
    "rounds.teacher_from": TEXT,
    "rounds.keep": rules.one_of(*kept_stage.KEEP),
}


def check(config: Any) -> None:
    """Checks every value of a config against its constraints.

    Args:
        config: a config with the keys of configs/default.py.

    Raises:
        UserError: naming the key, its value and the values that are accepted.
    """
    _check_values(traverse_util.flatten_dict(config.to_dict(), sep="."))
    if not (config.data.weak_stream or config.data.strong_stream):
        raise UserError(
            "data.weak_stream and data.strong_stream are both empty: fill one of them.",
            code="augment-streams-empty",
        )
    _check_mask_format(config.data)
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
        inference.check_window(f"{name}.", config[name].window, config[name].window_stride)
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
    if not stages.has_teacher(config):
        _check_starts_without_teacher(config)
    for backbone in {config.model.backbone, config.rounds.student_model or config.model.backbone}:
        deeplab.check_head(deeplab.config_for(config, backbone))
        _check_layer_decay(config, backbone)
    if config.data.cache_features:
        _check_cached_features(config)
    deeplab.check_multi_grid(config.model)
    stages.check_norm_values(config)
    supervised_loss.check(config)
    _check_weights(config)


def _check_mask_format(data: Any) -> None:
    """Checks that the data set is one whose masks the config describes.

    Raises:
        UserError: naming the key.
    """
    given = mask_format.keys_given(data)
    if given and data.name != "folder" and not data.name.startswith(PREFIX):
        raise UserError(
            f"{given[0]} is of data.name=folder and {PREFIX}NAME: the masks of {data.name} are "
            "read as its source has them; leave it out.",
            code="mask-format-of-source",
        )


def _check_layer_decay(config: Any, backbone: str) -> None:
    """Checks that a backbone has layers by which learning rates can decay.

    Raises:
        UserError: it has none.
    """
    if config.optim.layer_decay != 1 and backbone not in vit.BACKBONES:
        raise UserError(
            f"optim.layer_decay is {config.optim.layer_decay}, but {backbone} is no vision "
            f"transformer: make it 1, or choose one of {', '.join(vit.BACKBONES)}.",
            code="layer-decay-unsupported",
        )


def _check_cached_features(config: Any) -> None:
    """Checks that features can be kept: the backbone never changes, and no stage has views.

    Raises:
        UserError: naming the key that does not fit.
    """
    if not config.model.freeze_backbone:
        raise UserError(
            "data.cache_features is True, but the backbone is trained, so that its features "
            "change at every step: set model.freeze_backbone to True, or data.cache_features to "
            "False.",
            code="cached-features-of-trained-backbone",
        )
    if config.method.name != "self_training":
        raise UserError(
            f"data.cache_features is True, but method.name is {config.method.name}, whose step "
            "sees other random views of each image every time: set data.cache_features to False, "
            "or method.name to self_training.",
            code="cached-features-of-random-views",
        )


def _check_starts_without_teacher(config: Any) -> None:
    """Checks that students need no teacher where none is trained.

    Raises:
        UserError: naming the key that needs one.
    """
    rounds = config.rounds
    is_online = stages.online_method(config, "student") is not None
    if rounds.count and is_online and rounds.student_init == "scratch" and not rounds.teacher_from:
        return
    raise UserError(
        "train.teacher_steps is 0, but without a teacher only a method can be trained that labels "
        "images itself, from a new network: give the teacher steps, or set rounds.student_init to "
        "scratch, rounds.teacher_from to empty, rounds.count to at least 1 and method.name to one "
        "of the others.",
        code="teacher-without-steps",
    )


def _check_values(flat: dict[str, Any]) -> None:
    """Checks each value of a flat config by its rule.

    Raises:
        UserError: naming the key, its value and the values that are accepted.
    """
    for key, value in flat.items():
        if value is None and key not in _OPTIONAL_KEYS:
            raise UserError(
                f"{key} is None: give it a value, {config_files.default_path()} has the usual one.",
                code="config-value-none",
            )
        if not rules.is_finite(value):
            raise UserError(
                f"{key} is {value!r}: make it finite.",
                code="config-value-not-finite",
            )
    for key, rule in RULES.items():
        if key not in flat:
            raise UserError(
                f"The config has no {key}: start from configs.default.get_config().",
                code="config-key-missing",
            )
        value = flat[key]
        if not rules.accepts(rule, value):
            accepted = rule[1]
            hint = ""
            if isinstance(value, str) and accepted.startswith("one of "):
                choices = accepted.removeprefix("one of ").split(", ")
                matches = difflib.get_close_matches(value, choices, 1)
                hint = f" (did you mean {matches[0]}?)" if matches else ""
            raise UserError(
                f"{key} is {rules.shortened(value)}: make it {accepted}{hint}.",
                code="config-value-invalid",
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
        if path in published_weights.NAMES:
            # They fit, and may have to be downloaded, which this check is too early for.
            published_weights.check_available(weights_key, path, backbone[1])
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
