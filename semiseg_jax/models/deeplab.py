"""DeepLab, built from the config: a backbone, a head, and logits at the size of the input.

Sources: DeepLabV3+ (Chen et al., ECCV 2018), DeepLabV2 (Chen et al., 2017).
"""

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Num

from semiseg_jax.models import (
    convolutions,
    dsbn,
    efficientnet_lite,
    layers,
    pretrained,
    published_weights,
    resnet,
    xception,
)
from semiseg_jax.runtime import rules
from semiseg_jax.runtime.errors import UserError

# By name: mean and standard deviation of each channel, for RGB values 0..255.
INPUT_NORMALIZATIONS = {
    "imagenet": ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
    "half": ((127.5, 127.5, 127.5), (127.5, 127.5, 127.5)),
    "lite": ((127.0, 127.0, 127.0), (128.0, 128.0, 128.0)),
}

BACKBONES = {**resnet.BACKBONES, **xception.BACKBONES, **efficientnet_lite.BACKBONES}
GRID_SIZES = {**resnet.GRID_SIZES, **xception.GRID_SIZES}

# By backbone: the input normalisation of its published weights.
USUAL_NORMALIZATIONS = (
    dict.fromkeys(resnet.BACKBONES, "imagenet")
    | dict.fromkeys(xception.BACKBONES, "half")
    | dict.fromkeys(efficientnet_lite.BACKBONES, "lite")
)

HEADS = ("v3plus", "v3plus_smp", "v2")

_CHANNELS = rules.integer(1, 4096)
# float32 has no smaller numbers.
_EPSILON: rules.Rule = (lambda v: rules.is_number(v, 1e-30, 1000), "at most 1000 and above 0")
# By key of `config.model`: the values it accepts; `check_multi_grid` has the constraint between
# keys. `resolve` gives the keys a value that may be open, None or "auto".
RULES: dict[str, rules.Rule] = {
    "backbone": rules.key_of(BACKBONES),
    "head": rules.one_of(*HEADS),
    "pretrained": rules.TEXT,
    "output_stride": (lambda v: type(v) is int and v in (8, 16, 32), "8, 16 or 32"),
    "first_dilation": rules.one_of("auto", *layers.FIRST_DILATIONS),
    "multi_grid": rules.tuple_of(
        rules.integer(1, 64), "a tuple of integers above 0 and at most 64, or ()"
    ),
    "norm": rules.one_of(*dsbn.NORM_KINDS),
    "norm_momentum": rules.below(0, 1),
    "norm_epsilon.backbone": rules.or_none(_EPSILON),
    "norm_epsilon.head": rules.or_none(_EPSILON),
    "head_features": _CHANNELS,
    "low_level_features": _CHANNELS,
    "aspp_rates": rules.tuple_of(
        rules.integer(1, 256),
        "a tuple of integers above 0 and at most 256, at most 16 of them, or ()",
        longest=16,
    ),
    "dropout": rules.below(0, 1),
    "align_corners": rules.or_none(rules.BOOL),
    "input_normalization": rules.one_of("auto", *INPUT_NORMALIZATIONS),
    "compute_dtype": rules.one_of("float32", "bfloat16"),
    "remat": rules.BOOL,
}
# The same for a config whose open keys have values.
RESOLVED_RULES = RULES | {
    "first_dilation": rules.one_of(*layers.FIRST_DILATIONS),
    "norm_epsilon.backbone": _EPSILON,
    "norm_epsilon.head": _EPSILON,
    "align_corners": rules.BOOL,
    "input_normalization": rules.one_of(*INPUT_NORMALIZATIONS),
}


@flax.struct.dataclass
class Features:
    """The result of `DeepLab.encode`: a pytree of feature maps, and the size of the input.

    Attributes:
        low: features at stride 4, [b, h, w, c].
        high: the last features, at the output stride, [b, h, w, c].
        size: (height, width) of the images, in pixels; static.
    """

    low: Any
    high: Any
    size: tuple[convolutions.Dim, convolutions.Dim] = flax.struct.field(pytree_node=False)


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling: 1x1, dilated separable 3x3, image pooling; then 1x1.

    Source: DeepLabV3+, figure 2; dropout as in its authors' code.

    Attributes:
        features: channels of every branch and of the result.
        rates: dilations of the 3x3 convolutions, in pixels of the features.
        norm: factory of the norms.
        dropout: rate of the dropout on the result.
        align_corners: see `layers.interpolation_matrix`; for enlarging the pooled features.
        norm_between: see `layers.SeparableConvNorm`.
        remat: recompute the activations inside the separable convolutions in the backward pass.
        dtype: of the computation; None to promote the dtypes of input and parameters.
    """

    features: int
    rates: tuple[int, ...]
    norm: layers.NormFactory
    dropout: float
    align_corners: bool
    norm_between: bool = True
    remat: bool = False
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], layout: dsbn.DomainLayout
    ) -> Float[Array, "b h w features"]:
        """Computes features at the resolution of x."""
        pointwise = functools.partial(layers.ConvNorm, self.features, self.norm, dtype=self.dtype)
        separable = functools.partial(
            layers.rematerialized(layers.SeparableConvNorm, self.remat),
            self.features,
            self.norm,
            norm_between=self.norm_between,
            dtype=self.dtype,
        )
        branches = [pointwise(name="point")(x, layout)]
        for i, rate in enumerate(self.rates):
            branches.append(separable(dilation=rate, name=f"atrous{i + 1}")(x, layout))
        pooled = jnp.mean(x, axis=(1, 2), keepdims=True)
        pooled = pointwise(name="image_pooling")(pooled, layout)
        branches.append(layers.resize(pooled, x.shape[1:3], self.align_corners))
        y = pointwise(name="project")(jnp.concatenate(branches, axis=-1), layout)
        return layers.Dropout(self.dropout)(y, layout)


class DeepLab(nn.Module):
    """A backbone and a head; subclasses define the head in `_head`.

    `encode` computes the backbone's features and `decode` the logits from them, so that a caller
    can change the features in between or decode them by another head:

        features = model.apply(variables, images, domain="strong", method="encode")
        logits = model.apply(variables, features, domain="strong", method="decode")

    Attributes:
        backbone: returns {"low": features at stride 4, "high": at the output stride}.
        num_classes: C.
        rates: dilations of the head, in pixels of the features.
        mean, std: input normalisation, for RGB values 0..255.
        align_corners: see `layers.interpolation_matrix`; for every resize in the network.
        remat: recompute the activations inside the head's separable convolutions in the backward
            pass too.
        dtype: of the computation; None to promote the dtypes of input and parameters.
    """

    backbone: nn.Module
    num_classes: int
    rates: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    align_corners: bool
    remat: bool
    dtype: DTypeLike | None

    def __call__(
        self,
        images: Num[ArrayLike, "b h w 3"],
        domain: dsbn.Domain = "weak",
        groups: int = 1,
        train: bool = False,
        num_weak: int | None = None,
    ) -> Float[Array, "b h w classes"]:
        """Computes logits at the size of the images, in the compute dtype.

        Args:
            images: RGB; uint8 images are normalised here, float images must be normalised already.
            domain: the norm of the images; "both" for blocks of weak and strong images.
            groups: with "both", the number of equal blocks (see `dsbn.DomainLayout`).
            train: use batch statistics and dropout; the statistics collections must be mutable,
                and a dropout rate other than 0 needs a `dropout` key.
            num_weak: with "both", the number of weak images in each block; None for half of it.
        """
        features = self.encode(images, domain, groups, train, num_weak)
        return self.decode(features, domain, groups, train, num_weak)

    def encode(
        self,
        images: Num[ArrayLike, "b h w 3"],
        domain: dsbn.Domain = "weak",
        groups: int = 1,
        train: bool = False,
        num_weak: int | None = None,
    ) -> Features:
        """Computes the backbone's features; arguments as for `__call__`."""
        layout = dsbn.DomainLayout(domain, train, groups, num_weak)
        images = jnp.asarray(images)
        x = normalize(images, self.mean, self.std)
        x = x if self.dtype is None else x.astype(self.dtype)
        features = self.backbone(x, layout)
        return Features(features["low"], features["high"], images.shape[1:3])

    @nn.compact
    def decode(
        self,
        features: Features,
        domain: dsbn.Domain = "weak",
        groups: int = 1,
        train: bool = False,
        num_weak: int | None = None,
    ) -> Float[Array, "b h w classes"]:
        """Computes logits at the size of the images from features, in the compute dtype.

        Args:
            features: from `encode`, changed or not. Their batch need not be that of the images: the
                other arguments describe the batch of the features.
            domain, groups, train, num_weak: as for `__call__`.
        """
        logits = self._head(features, dsbn.DomainLayout(domain, train, groups, num_weak))
        return layers.resize(logits, features.size, self.align_corners)

    def _head(self, features: Features, layout: dsbn.DomainLayout) -> Float[Array, "b h w classes"]:
        """Computes logits at any resolution; its submodules belong to the scope of `decode`."""
        raise NotImplementedError

    def _classifier(self, kernel_size: int, dilation: int, name: str) -> layers.Conv:
        return layers.Conv(
            self.num_classes,
            kernel_size,
            dilation=dilation,
            use_bias=True,
            kernel_init=nn.initializers.normal(0.01),
            dtype=self.dtype,
            name=name,
        )


class DeepLabV3Plus(DeepLab):
    """ASPP, a decoder with a low-level branch from stride 4, and a classifier.

    Attributes:
        norm: factory of the head's norms.
        features: channels of ASPP and decoder.
        low_features: channels of the low-level branch.
        dropout: rate of the dropout on the features of ASPP.
        decoder: numbers of separable 3x3 convolutions before and after the concatenation with the
            low-level branch.
        norm_between: see `layers.SeparableConvNorm`.
    """

    norm: layers.NormFactory
    features: int
    low_features: int
    dropout: float
    decoder: tuple[int, int] = (0, 2)
    norm_between: bool = True

    def _head(self, features: Features, layout: dsbn.DomainLayout) -> Float[Array, "b h w classes"]:
        y = ASPP(
            self.features,
            self.rates,
            self.norm,
            self.dropout,
            self.align_corners,
            self.norm_between,
            self.remat,
            self.dtype,
            name="aspp",
        )(features.high, layout)
        separable = functools.partial(
            layers.rematerialized(layers.SeparableConvNorm, self.remat),
            self.features,
            self.norm,
            norm_between=self.norm_between,
            dtype=self.dtype,
        )
        before, after = self.decoder
        for i in range(before):
            y = separable(name=f"decoder{i + 1}")(y, layout)
        low = layers.ConvNorm(self.low_features, self.norm, dtype=self.dtype, name="low")(
            features.low, layout
        )
        y = layers.resize(y, low.shape[1:3], self.align_corners)
        y = jnp.concatenate([y, low], axis=-1)
        for i in range(before, before + after):
            y = separable(name=f"decoder{i + 1}")(y, layout)
        return self._classifier(1, 1, "classifier")(y)


class DeepLabV2(DeepLab):
    """A head that adds up dilated 3x3 classifiers of the last features.

    Source: DeepLabV2, section 3.2 (ASPP-L, ResNet-101: classifiers on the last features).
    """

    def _head(self, features: Features, layout: dsbn.DomainLayout) -> Float[Array, "b h w classes"]:
        branches = [
            self._classifier(3, rate, f"classifier{i + 1}")(features.high)
            for i, rate in enumerate(self.rates)
        ]
        return functools.reduce(jnp.add, branches)


def normalize(
    images: Num[ArrayLike, "b h w 3"],
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Float[Array, "b h w 3"]:
    """Returns (image - mean) / std for uint8 images, and float images unchanged."""
    images = jnp.asarray(images)
    if jnp.issubdtype(images.dtype, jnp.floating):
        return images
    scale = 1.0 / np.asarray(std, np.float32)
    return (images.astype(jnp.float32) - np.asarray(mean, np.float32)) * scale


def default_rates(head: str, output_stride: int) -> tuple[int, ...]:
    """Returns the published dilation rates of a head, in pixels of the features.

    DeepLabV3+ and V2 publish them for strides 16 and 8; at other strides the rates span the same
    distance in the image. segmentation_models_pytorch has the same rates at every stride.
    """
    if head == "v3plus_smp":
        return (12, 24, 36)
    published_stride, rates = {"v3plus": (16, (6, 12, 18)), "v2": (8, (6, 12, 18, 24))}[head]
    return tuple(max(round(rate * published_stride / output_stride), 1) for rate in rates)


def build(model_config: Any, num_classes: int) -> DeepLab:
    """Builds the network of `config.model`, without variables.

    `model.init(…, domain="both")` creates the variables of both domains: `params`,
    `batch_stats_weak`, `batch_stats_strong`.

    Args:
        model_config: `config.model` of configs/default.py; `resolve` fills in its open values.
        num_classes: C, at least 2.

    Raises:
        UserError: the weights that determine open values cannot be read, or the backbone does not
            support the multi-grid.
    """
    config = resolve(model_config)
    # float32 is None, which promotes dtypes, so that float64 parameters compute in float64.
    dtype = None if config.compute_dtype == "float32" else jnp.dtype(config.compute_dtype)
    norm = functools.partial(
        dsbn.DomainNorm, kind=config.norm, momentum=config.norm_momentum, dtype=dtype
    )
    check_multi_grid(config)
    grid = {"multi_grid": tuple(config.multi_grid)} if config.multi_grid else {}
    mean, std = INPUT_NORMALIZATIONS[config.input_normalization]
    common = {
        # Flax names a submodule after its attribute; optim.RULES match the name "backbone".
        "backbone": BACKBONES[config.backbone](
            norm=functools.partial(norm, epsilon=config.norm_epsilon.backbone),
            output_stride=config.output_stride,
            first_dilation=config.first_dilation,
            remat=config.remat,
            dtype=dtype,
            **grid,
        ),
        "num_classes": num_classes,
        "rates": tuple(config.aspp_rates),
        "mean": mean,
        "std": std,
        "align_corners": config.align_corners,
        "remat": config.remat,
        "dtype": dtype,
    }
    if config.head == "v2":
        return DeepLabV2(**common)
    smp_head = {"decoder": (1, 1), "norm_between": False}
    return DeepLabV3Plus(
        **common,
        norm=functools.partial(norm, epsilon=config.norm_epsilon.head),
        features=config.head_features,
        low_features=config.low_level_features,
        dropout=config.dropout,
        **(smp_head if config.head == "v3plus_smp" else {}),
    )


def check_multi_grid(model_config: Any) -> None:
    """Raises a UserError if the backbone does not support the multi-grid."""
    grid, backbone = model_config.multi_grid, model_config.backbone
    if not grid:
        return
    if backbone not in GRID_SIZES:
        raise UserError(
            f"model.multi_grid is {grid}, but {backbone} takes none: leave it empty, or choose "
            f"one of {', '.join(GRID_SIZES)}.",
            code="multi-grid-unsupported",
        )
    if len(grid) != GRID_SIZES[backbone]:
        raise UserError(
            f"model.multi_grid is {grid}: {backbone} takes {GRID_SIZES[backbone]} factors.",
            code="multi-grid-length",
        )


# Values of open keys where the weights do not determine them.
_DEFAULTS: dict[str, Any] = {
    "first_dilation": "previous",
    "align_corners": False,
    "norm_epsilon.backbone": 1e-3,
    "norm_epsilon.head": 1e-5,
}


def _value(model_config: Any, key: str) -> Any:
    """Returns the value of a dotted key."""
    return functools.reduce(lambda section, name: section[name], key.split("."), model_config)


def resolve(model_config: Any) -> Any:
    """Returns a copy of `config.model` with a value for every open key.

    The open keys, which are None or "auto", take the values that the weights in `pretrained` were
    trained with, and defaults where the weights do not determine them.

    Raises:
        UserError: the weights cannot be read.
    """
    resolved = model_config.copy_and_resolve_references()
    defaults = {**_DEFAULTS, "input_normalization": USUAL_NORMALIZATIONS[model_config.backbone]}
    open_keys = [key for key in defaults if _value(model_config, key) in (None, "auto")]
    trained_with: Mapping[str, Any] = {}
    if open_keys and (path := published_weights.path(model_config)):
        trained_with = pretrained.inspect(path).settings()
        for key, value in trained_with.items():
            if not rules.accepts(RESOLVED_RULES[key], value):
                raise UserError(
                    f"{path} says that its network has {key} "
                    f"{rules.shortened(value)}, which is not {RESOLVED_RULES[key][1]}: get the "
                    "file again.",
                    code="weights-description-invalid",
                )
    resolved.update_from_flattened_dict(
        {key: trained_with.get(key, defaults[key]) for key in open_keys}
    )
    resolved.aspp_rates = _aspp_rates(resolved)
    return resolved


def _aspp_rates(model_config: Any) -> tuple[int, ...]:
    """Returns the dilation rates of the head; weight files do not contain them."""
    default = default_rates(model_config.head, model_config.output_stride)
    return tuple(model_config.aspp_rates) or default


def config_for(config: Any, backbone: str) -> Any:
    """Returns `config.model` for the backbone of a stage.

    Args:
        config: the whole config.
        backbone: the teacher's, `model.backbone`, or another one for students, whose weights are
            then `rounds.student_pretrained`.
    """
    model_config = config.model.copy_and_resolve_references()
    if backbone != model_config.backbone:
        model_config.backbone = backbone
        model_config.pretrained = config.rounds.student_pretrained
    return model_config


def pretrained_mismatches(model_config: Any) -> list[str]:
    """Returns a sentence for each key of `config.model` that the pretrained weights contradict.

    Raises:
        UserError: the weights cannot be read.
    """
    path = published_weights.path(model_config)
    if not path:
        return []
    trained_with = pretrained.inspect(path).settings()
    resolved = resolve(model_config)
    return [
        f"model.{key} is {_value(resolved, key)}, where the weights were trained with {value}: "
        "they will not predict as they did."
        for key, value in trained_with.items()
        if _value(resolved, key) != value
    ]


def input_mean(model_config: Any) -> np.ndarray:
    """Returns the colour of padding, uint8 [3]: the mean, which normalisation maps to about 0."""
    mean, _ = INPUT_NORMALIZATIONS[resolve(model_config).input_normalization]
    return np.round(mean).astype(np.uint8)


def dead_aspp_rates(model_config: Any, crop: tuple[int, int]) -> tuple[int, ...]:
    """Returns the head's dilation rates whose outer taps read only padding in every crop.

    No gradient reaches those taps, and evaluation on larger images uses their initial values. On
    CamVid at 240x180, crops of 128x160 with rates 6, 12 and 18 scored 27.6 % mIoU for that reason.

    Args:
        model_config: `config.model`.
        crop: (height, width) in pixels.
    """
    smallest = min(-(-side // model_config.output_stride) for side in crop)
    return tuple(rate for rate in _aspp_rates(model_config) if rate >= smallest)


def parameter_table(model_config: Any, variables: Mapping[str, Any]) -> list[tuple[str, int, str]]:
    """Returns table rows (part, number of parameters, note); the last is the deployed network.

    The rows of the parts count parameters with one norm; the strong norm has a row of its own.

    Args:
        model_config: `config.model`.
        variables: of the network, or their shapes.
    """
    config = resolve(model_config)
    counts: dict[str, int] = {"backbone": 0}
    strong = 0
    for path, leaf in traverse_util.flatten_dict(variables["params"]).items():
        if "strong" in path:
            strong += leaf.size
        else:
            counts[path[0]] = counts.get(path[0], 0) + leaf.size
    rates = f"rates {', '.join(map(str, config.aspp_rates))}"
    grid = f", multi-grid {', '.join(map(str, config.multi_grid))}" if config.multi_grid else ""
    notes = {
        "backbone": f"{config.backbone}, output stride {config.output_stride}{grid}",
        "aspp": rates,
        "classifier1": rates,
    }
    part_rows = [(part, count, notes.get(part, "")) for part, count in counts.items()]
    strong_rows = [("strong norm", strong, "in training alone")] if strong else []
    corners = "aligned corners" if config.align_corners else "half-pixel centres"
    conventions = f"input {config.input_normalization}, {corners}, {config.compute_dtype}"
    return [*part_rows, *strong_rows, ("deployed", sum(counts.values()), conventions)]
