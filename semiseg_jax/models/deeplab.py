"""DeepLab: backbone, head, logits at the size of the input; built from the config.

Sources: DeepLabV3+ (Chen et al., ECCV 2018), DeepLabV2 (Chen et al., 2017).
"""

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Num

from semiseg_jax.errors import UserError
from semiseg_jax.models import (
    dsbn,
    efficientnet_lite,
    layers,
    pretrained,
    resnet,
    xception,
)

# Mean and standard deviation by channel, of RGB values 0..255.
INPUT_NORMALIZATIONS = {
    "imagenet": ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
    "half": ((127.5, 127.5, 127.5), (127.5, 127.5, 127.5)),
    "lite": ((127.0, 127.0, 127.0), (128.0, 128.0, 128.0)),
}

BACKBONES = {**resnet.BACKBONES, **xception.BACKBONES, **efficientnet_lite.BACKBONES}
GRID_SIZES = {**resnet.GRID_SIZES, **xception.GRID_SIZES}

# What each backbone's published weights were trained with.
USUAL_NORMALIZATIONS = (
    dict.fromkeys(resnet.BACKBONES, "imagenet")
    | dict.fromkeys(xception.BACKBONES, "half")
    | dict.fromkeys(efficientnet_lite.BACKBONES, "lite")
)

HEADS = ("v3plus", "v3plus_smp", "v2")


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling: 1x1, dilated separable 3x3, image pooling; then 1x1.

    Source: DeepLabV3+, figure 2; dropout as in its authors' code.

    Attributes:
        features: channels of every branch and of the result.
        rates: dilation of the 3x3 convolutions, in pixels of the features.
        norm: makes the norms.
        dropout: share of the result dropped in training.
        align_corners: how the pooled features are enlarged.
        norm_between: see `layers.SeparableConvNorm`.
        remat: keep no activations from inside the separable convolutions for the backward pass.
        dtype: of the computation; None for that of input and parameters together.
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
        self, x: Float[Array, "b h w c"], batch: dsbn.Batch
    ) -> Float[Array, "b h w features"]:
        """Features at the resolution of x."""
        point = functools.partial(layers.ConvNorm, self.features, self.norm, dtype=self.dtype)
        separable = functools.partial(
            layers.rematerialized(layers.SeparableConvNorm, self.remat),
            self.features,
            self.norm,
            norm_between=self.norm_between,
            dtype=self.dtype,
        )
        branches = [point(name="point")(x, batch)]
        for i, rate in enumerate(self.rates):
            branches.append(separable(dilation=rate, name=f"atrous{i + 1}")(x, batch))
        pooled = jnp.mean(x, axis=(1, 2), keepdims=True)
        pooled = point(name="image_pooling")(pooled, batch)
        branches.append(layers.resize(pooled, x.shape[1:3], self.align_corners))
        y = point(name="project")(jnp.concatenate(branches, axis=-1), batch)
        return layers.Dropout(self.dropout)(y, batch)


class DeepLab(nn.Module):
    """Backbone, then what a subclass makes of its features, at the size of the images.

    Attributes:
        backbone: gives {"low": stride 4, "high": output stride}.
        num_classes: C.
        rates: the head's dilation rates, in pixels of the features.
        mean, std: input normalisation, of RGB values 0..255.
        align_corners: how every resize inside places its corners.
        remat: keep no activations from inside the head's separable convolutions either.
        dtype: of the computation; None for that of input and parameters together.
    """

    backbone: nn.Module
    num_classes: int
    rates: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    align_corners: bool
    remat: bool
    dtype: DTypeLike | None

    @nn.compact
    def __call__(
        self,
        images: Num[ArrayLike, "b h w 3"],
        domain: dsbn.Domain = "weak",
        groups: int = 1,
        train: bool = False,
        num_weak: int | None = None,
    ) -> Float[Array, "b h w classes"]:
        """Logits at the size of the images, in the compute dtype.

        Args:
            images: RGB; uint8 is normalised here, floats are taken as normalised already.
            domain: which norm the images meet; "both" for blocks of weak and strong images.
            groups: with "both", the number of equal blocks (see `dsbn.Batch`).
            train: batch statistics and dropout; pass the statistics as mutable, and a
                `dropout` key where the dropout rate is not 0.
            num_weak: with "both", weak images in each block; None for half of it.
        """
        batch = dsbn.Batch(domain, train, groups, num_weak)
        images = jnp.asarray(images)
        x = normalize(images, self.mean, self.std)
        x = x if self.dtype is None else x.astype(self.dtype)
        logits = self._logits(self.backbone(x, batch), batch)
        return layers.resize(logits, images.shape[1:3], self.align_corners)

    def _logits(
        self, features: Mapping[str, Float[Array, "b _ _ _"]], batch: dsbn.Batch
    ) -> Float[Array, "b h w classes"]:
        """Logits at a resolution of the head's own; submodules are made in the caller's scope."""
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
    """ASPP, a decoder with a branch from stride 4, a classifier.

    Attributes:
        norm: makes the head's norms.
        features: channels of ASPP and decoder.
        low_features: channels of the low-level branch.
        dropout: share of the encoder's features dropped in training.
        decoder: separable 3x3 convolutions before and after the low-level branch joins.
        norm_between: see `layers.SeparableConvNorm`.
    """

    norm: layers.NormFactory
    features: int
    low_features: int
    dropout: float
    decoder: tuple[int, int] = (0, 2)
    norm_between: bool = True

    def _logits(
        self, features: Mapping[str, Float[Array, "b _ _ _"]], batch: dsbn.Batch
    ) -> Float[Array, "b h w classes"]:
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
        )(features["high"], batch)
        separable = functools.partial(
            layers.rematerialized(layers.SeparableConvNorm, self.remat),
            self.features,
            self.norm,
            norm_between=self.norm_between,
            dtype=self.dtype,
        )
        before, after = self.decoder
        for i in range(before):
            y = separable(name=f"decoder{i + 1}")(y, batch)
        low = layers.ConvNorm(self.low_features, self.norm, dtype=self.dtype, name="low")(
            features["low"], batch
        )
        y = layers.resize(y, low.shape[1:3], self.align_corners)
        y = jnp.concatenate([y, low], axis=-1)
        for i in range(before, before + after):
            y = separable(name=f"decoder{i + 1}")(y, batch)
        return self._classifier(1, 1, "classifier")(y)


class DeepLabV2(DeepLab):
    """The sum of dilated 3x3 classifiers.

    Source: DeepLabV2, section 3.2 (ASPP-L, ResNet-101: classifiers on the last features).
    """

    def _logits(
        self, features: Mapping[str, Float[Array, "b _ _ _"]], batch: dsbn.Batch
    ) -> Float[Array, "b h w classes"]:
        branches = [
            self._classifier(3, rate, f"classifier{i + 1}")(features["high"])
            for i, rate in enumerate(self.rates)
        ]
        return functools.reduce(jnp.add, branches)


def normalize(
    images: Num[ArrayLike, "b h w 3"],
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Float[Array, "b h w 3"]:
    """(image - mean) / std for uint8 images; float images pass unchanged."""
    images = jnp.asarray(images)
    if jnp.issubdtype(images.dtype, jnp.floating):
        return images
    scale = 1.0 / np.asarray(std, np.float32)
    return (images.astype(jnp.float32) - np.asarray(mean, np.float32)) * scale


def usual_rates(head: str, output_stride: int) -> tuple[int, ...]:
    """The dilation rates that a head has at an output stride, in pixels of the features.

    DeepLabV3+ and V2 state them at strides 16 and 8, and other strides have what spans as many
    pixels of the image; segmentation_models_pytorch has the same rates at every stride.
    """
    if head == "v3plus_smp":
        return (12, 24, 36)
    stated, rates = {"v3plus": (16, (6, 12, 18)), "v2": (8, (6, 12, 18, 24))}[head]
    return tuple(max(round(rate * stated / output_stride), 1) for rate in rates)


def build(model_config: Any, num_classes: int) -> DeepLab:
    """The network of `config.model`, not yet initialised.

    Initialise with `domain="both"` to make the parameters and statistics of both domains:
    `params`, `batch_stats_weak`, `batch_stats_strong`.

    Args:
        model_config: `config.model` of configs/default.py; what it leaves open is resolved as
            `resolve` does.
        num_classes: C, at least 2.

    Raises:
        UserError: the weights to resolve it by cannot be read, or the backbone has no multi-grid
            like the one asked for.
    """
    config = resolve(model_config)
    # float32 leaves the dtype to promotion, so that float64 parameters compute in float64.
    dtype = None if config.compute_dtype == "float32" else jnp.dtype(config.compute_dtype)
    norm = functools.partial(
        dsbn.DomainNorm, kind=config.norm, momentum=config.norm_momentum, dtype=dtype
    )
    check_multi_grid(config)
    grid = {"multi_grid": tuple(config.multi_grid)} if config.multi_grid else {}
    mean, std = INPUT_NORMALIZATIONS[config.input_normalization]
    common = {
        # Flax names a submodule by the attribute that holds it; optim.RULES go by "backbone".
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
    as_smp = {"decoder": (1, 1), "norm_between": False}
    return DeepLabV3Plus(
        **common,
        norm=functools.partial(norm, epsilon=config.norm_epsilon.head),
        features=config.head_features,
        low_features=config.low_level_features,
        dropout=config.dropout,
        **(as_smp if config.head == "v3plus_smp" else {}),
    )


def check_multi_grid(model_config: Any) -> None:
    """Raises a UserError where the backbone cannot have the multi-grid."""
    grid, backbone = model_config.multi_grid, model_config.backbone
    if not grid:
        return
    if backbone not in GRID_SIZES:
        raise UserError(
            f"model.multi_grid is {grid}, but {backbone} takes none: leave it empty, or choose "
            f"one of {', '.join(GRID_SIZES)}."
        )
    if len(grid) != GRID_SIZES[backbone]:
        raise UserError(
            f"model.multi_grid is {grid}: {backbone} takes {GRID_SIZES[backbone]} factors."
        )


# What the weights decide where the config leaves it open, and what holds without weights.
_USUAL: dict[str, Any] = {
    "first_dilation": "previous",
    "align_corners": False,
    "norm_epsilon.backbone": 1e-3,
    "norm_epsilon.head": 1e-5,
}


def _open_keys(model_config: Any) -> list[str]:
    """Keys of `config.model` that leave the value to the weights."""
    return [
        key
        for key in ("input_normalization", *_USUAL)
        if _value(model_config, key) in (None, "auto")
    ]


def _value(model_config: Any, key: str) -> Any:
    for part in key.split("."):
        model_config = model_config[part]
    return model_config


def resolve(model_config: Any) -> Any:
    """A copy of `config.model` in which nothing is left open.

    Open values are those of the weights in `pretrained` where they say, else the usual ones.

    Raises:
        UserError: the weights cannot be read.
    """
    resolved = model_config.copy_and_resolve_references()
    missing = _open_keys(model_config)
    said: Mapping[str, Any] = {}
    if missing and model_config.pretrained:
        said = pretrained.inspect(model_config.pretrained).settings()
    usual = {**_USUAL, "input_normalization": USUAL_NORMALIZATIONS[model_config.backbone]}
    resolved.update_from_flattened_dict({key: said.get(key, usual[key]) for key in missing})
    resolved.aspp_rates = _rates(resolved)
    return resolved


def _rates(model_config: Any) -> tuple[int, ...]:
    """The head's dilation rates; no weights say them."""
    usual = usual_rates(model_config.head, model_config.output_stride)
    return tuple(model_config.aspp_rates) or usual


def config_for(config: Any, backbone: str) -> Any:
    """`config.model` for the teacher's backbone, or another one that students have.

    Args:
        config: the whole config; `model` and `rounds.student_pretrained` are read.
        backbone: of the stage's network.
    """
    model_config = config.model.copy_and_resolve_references()
    if backbone != model_config.backbone:
        model_config.backbone = backbone
        model_config.pretrained = config.rounds.student_pretrained
    return model_config


def departures(model_config: Any) -> list[str]:
    """Sentences on what `config.model` sets otherwise than the weights in `pretrained` expect.

    Raises:
        UserError: the weights cannot be read.
    """
    if not model_config.pretrained:
        return []
    said = pretrained.inspect(model_config.pretrained).settings()
    resolved = resolve(model_config)
    return [
        f"model.{key} is {_value(resolved, key)}, where the weights were trained with {value}: "
        "they will not predict as they did."
        for key, value in said.items()
        if _value(resolved, key) != value
    ]


def input_mean(model_config: Any) -> np.ndarray:
    """The mean colour that padding has, uint8 [3]: what normalises to about 0."""
    mean, _ = INPUT_NORMALIZATIONS[resolve(model_config).input_normalization]
    return np.round(mean).astype(np.uint8)


def untrained_rates(model_config: Any, crop: tuple[int, int]) -> tuple[int, ...]:
    """The dilation rates of the head whose outer taps meet padding alone in every crop.

    No gradient reaches those taps, and evaluation on larger images then uses them as they were
    drawn. On CamVid at 240x180, crops of 128x160 with rates 6, 12 and 18 scored 27.6 % mIoU for
    that reason.

    Args:
        model_config: `config.model`.
        crop: (height, width) in pixels.
    """
    smallest = min(-(-side // model_config.output_stride) for side in crop)
    return tuple(rate for rate in _rates(model_config) if rate >= smallest)


def parts(model_config: Any, variables: Mapping[str, Any]) -> list[tuple[str, int, str]]:
    """Rows of (part, parameters, what is particular); the last is the network as deployed.

    A part's parameters are those with one norm; what the strong norm adds is a row of its own.

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
    rows = [(part, count, notes.get(part, "")) for part, count in counts.items()]
    corners = "aligned corners" if config.align_corners else "half-pixel centres"
    conventions = f"input {config.input_normalization}, {corners}, {config.compute_dtype}"
    second = [("strong norm", strong, "in training alone")] if strong else []
    return [*rows, *second, ("deployed", sum(counts.values()), conventions)]
