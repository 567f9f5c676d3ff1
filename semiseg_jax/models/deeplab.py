"""Networks, built from the config: DeepLab, and the choice between it and `vit_segmenter`.

Sources: DeepLabV3+ (Chen et al., ECCV 2018), DeepLabV2 (Chen et al., 2017).
"""

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from semiseg_jax.models import (
    convnext,
    dpt,
    dsbn,
    efficientnet_lite,
    layers,
    positions,
    pretrained,
    published_weights,
    resnet,
    vit,
    vit_segmenter,
    xception,
)
from semiseg_jax.models.segmenter import Features, Segmenter
from semiseg_jax.runtime import rules
from semiseg_jax.runtime.errors import UserError

# By name: mean and standard deviation of each channel, for RGB values 0..255.
INPUT_NORMALIZATIONS = {
    "imagenet": ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
    "half": ((127.5, 127.5, 127.5), (127.5, 127.5, 127.5)),
    "lite": ((127.0, 127.0, 127.0), (128.0, 128.0, 128.0)),
    "dinov3_satellite": ((109.65, 104.805, 75.48), (54.315, 39.78, 36.465)),
}

BACKBONES = {
    **resnet.BACKBONES,
    **xception.BACKBONES,
    **efficientnet_lite.BACKBONES,
    **convnext.BACKBONES,
    **vit.BACKBONES,
}
GRID_SIZES = {**resnet.GRID_SIZES, **xception.GRID_SIZES}

# By backbone: the input normalisation of its published weights.
USUAL_NORMALIZATIONS = (
    dict.fromkeys(resnet.BACKBONES, "imagenet")
    | dict.fromkeys(xception.BACKBONES, "half")
    | dict.fromkeys(efficientnet_lite.BACKBONES, "lite")
    | dict.fromkeys(convnext.BACKBONES, "imagenet")
    | dict.fromkeys(vit.BACKBONES, "imagenet")
)

_CONVOLUTIONAL_HEADS = ("v3plus", "v3plus_smp", "v2")
HEADS = (*_CONVOLUTIONAL_HEADS, *vit_segmenter.HEADS)

_CHANNELS = rules.integer(1, 4096)
# float32 has no smaller numbers.
_EPSILON: rules.Rule = (lambda v: rules.is_number(v, 1e-30, 1000), "at most 1000 and above 0")
# By key of `config.model`: the values it accepts; `check_multi_grid` has the constraint between
# keys, and `check_head`. `resolve` gives the keys a value that may be open, None or "auto".
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
    "position_rule": rules.one_of(*positions.POSITION_RULES),
    "token_multiple": rules.integer(1, 1024),
    "input_normalization": rules.one_of("auto", *INPUT_NORMALIZATIONS),
    "freeze_backbone": rules.BOOL,
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


class DeepLab(Segmenter):
    """A convolutional backbone and a head with dilated convolutions.

    Attributes:
        rates: dilations of the head, in pixels of the features.
    """

    rates: tuple[int, ...]

    def _stride(self) -> int:
        return self.backbone.output_stride


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


def default_rates(head: str, output_stride: int) -> tuple[int, ...]:
    """Returns the published dilation rates of a head, in pixels of the features; () without any.

    DeepLabV3+ and V2 publish them for strides 16 and 8; at other strides the rates span the same
    distance in the image. segmentation_models_pytorch has the same rates at every stride.
    """
    if head in vit_segmenter.HEADS:
        return ()
    if head == "v3plus_smp":
        return (12, 24, 36)
    published_stride, rates = {"v3plus": (16, (6, 12, 18)), "v2": (8, (6, 12, 18, 24))}[head]
    return tuple(max(round(rate * published_stride / output_stride), 1) for rate in rates)


def build(model_config: Any, num_classes: int) -> Segmenter:
    """Builds the network of `config.model`, without variables.

    `model.init(…, domain="both")` creates the variables of both domains: `params`, and, if the
    network has batch norms, `batch_stats_weak` and `batch_stats_strong`.

    Args:
        model_config: `config.model` of configs/default.py; `resolve` fills in its open values.
        num_classes: C, at least 2.

    Raises:
        UserError: the weights that determine open values cannot be read, or the backbone does not
            support the multi-grid or the head.
    """
    config = resolve(model_config)
    check_head(config)
    check_multi_grid(config)
    # float32 is None, which promotes dtypes, so that float64 parameters compute in float64.
    dtype = None if config.compute_dtype == "float32" else jnp.dtype(config.compute_dtype)
    mean, std = INPUT_NORMALIZATIONS[config.input_normalization]
    common = {
        "num_classes": num_classes,
        "mean": mean,
        "std": std,
        "align_corners": config.align_corners,
        "freeze_backbone": config.freeze_backbone,
        "remat": config.remat,
        "dtype": dtype,
    }
    build_network = _build_vit if config.backbone in vit.BACKBONES else _build_deeplab
    return build_network(config, common)


def _build_vit(config: Any, common: Mapping[str, Any]) -> Segmenter:
    """Builds a network on a vision transformer; `common` are attributes of every Segmenter."""
    spec = vit.SPECS[config.backbone]
    backbone = BACKBONES[config.backbone](
        epsilon=config.norm_epsilon.backbone,
        position_rule=config.position_rule,
        token_multiple=config.token_multiple,
        remat=config.remat,
        dtype=common["dtype"],
    )
    if config.head == "linear":
        return vit_segmenter.LinearSegmenter(**common, backbone=backbone, patch=spec.patch)
    return vit_segmenter.DPTSegmenter(
        **common, backbone=backbone, patch=spec.patch, head=dpt.SPECS[spec.width]
    )


def _build_deeplab(config: Any, common: Mapping[str, Any]) -> Segmenter:
    """Builds a DeepLab; `common` are attributes of every Segmenter."""
    norm = functools.partial(
        dsbn.DomainNormFactory, config.norm, config.norm_momentum, dtype=common["dtype"]
    )
    epsilon = config.norm_epsilon.backbone
    of_backbone: dict[str, Any] = {"norm": norm(epsilon)}
    if config.backbone in convnext.BACKBONES:
        of_backbone = {"epsilon": epsilon}
    if config.multi_grid:
        of_backbone["multi_grid"] = tuple(config.multi_grid)
    attributes = {
        **common,
        # Flax names a submodule after its attribute; optim.RULES match the name "backbone".
        "backbone": BACKBONES[config.backbone](
            output_stride=config.output_stride,
            first_dilation=config.first_dilation,
            remat=config.remat,
            dtype=common["dtype"],
            **of_backbone,
        ),
        "rates": tuple(config.aspp_rates),
    }
    if config.head == "v2":
        return DeepLabV2(**attributes)
    smp_head = {"decoder": (1, 1), "norm_between": False}
    return DeepLabV3Plus(
        **attributes,
        norm=norm(config.norm_epsilon.head),
        features=config.head_features,
        low_features=config.low_level_features,
        dropout=config.dropout,
        **(smp_head if config.head == "v3plus_smp" else {}),
    )


def check_head(model_config: Any) -> None:
    """Raises a UserError if the head does not fit the kind of backbone."""
    head, backbone = model_config.head, model_config.backbone
    heads = vit_segmenter.HEADS if backbone in vit.BACKBONES else _CONVOLUTIONAL_HEADS
    if head not in heads:
        raise UserError(
            f"model.head is {head}, which does not fit the backbone {backbone}: make it one of "
            f"{', '.join(heads)}.",
            code="head-of-another-backbone",
        )


def has_batch_norm(model_config: Any) -> bool:
    """Whether the network has batch norms, on which `model.norm` acts."""
    is_convnext = model_config.backbone in convnext.BACKBONES
    return model_config.backbone not in vit.BACKBONES and not (
        is_convnext and model_config.head == "v2"
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


def _defaults(model_config: Any) -> dict[str, Any]:
    """Returns values of the open keys, for where the weights do not determine them."""
    epsilons = {name: spec.epsilon for name, spec in vit.SPECS.items()}
    epsilons |= dict.fromkeys(convnext.BACKBONES, convnext.EPSILON)
    return {
        "first_dilation": "previous",
        # UniMatch V2's code aligns corners everywhere.
        "align_corners": model_config.head == "dpt",
        "norm_epsilon.backbone": epsilons.get(model_config.backbone, 1e-3),
        "norm_epsilon.head": 1e-5,
        "input_normalization": USUAL_NORMALIZATIONS[model_config.backbone],
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
    defaults = _defaults(model_config)
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
    if spec := vit.SPECS.get(config.backbone):
        stride = f"patches of {spec.patch} pixels, no batch norm for model.norm to act on"
    else:
        stride = f"output stride {config.output_stride}{grid}"
    if config.backbone in convnext.BACKBONES:
        stride += ", batch norm in the head alone"
    notes = {
        "backbone": f"{config.backbone}, {stride}",
        "aspp": rates,
        "classifier1": rates,
    }
    part_rows = [(part, count, notes.get(part, "")) for part, count in counts.items()]
    strong_rows = [("strong norm", strong, "in training alone")] if strong else []
    corners = "aligned corners" if config.align_corners else "half-pixel centres"
    conventions = f"input {config.input_normalization}, {corners}, {config.compute_dtype}"
    return [*part_rows, *strong_rows, ("deployed", sum(counts.values()), conventions)]
