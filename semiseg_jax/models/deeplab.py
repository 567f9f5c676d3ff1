"""DeepLab: backbone, head, logits at the size of the input; built from the config.

Source: DeepLabV3+ (Chen et al., ECCV 2018).
"""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Num

from semiseg_jax.models import dsbn, efficientnet_lite, layers, pretrained, resnet

# Mean and standard deviation by channel, of RGB values 0..255.
INPUT_NORMALIZATIONS = {
    "imagenet": ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
    "half": ((127.5, 127.5, 127.5), (127.5, 127.5, 127.5)),
    "lite": ((127.0, 127.0, 127.0), (128.0, 128.0, 128.0)),
}

BACKBONES = {**resnet.BACKBONES, **efficientnet_lite.BACKBONES}

# What each backbone's published weights were trained with.
USUAL_NORMALIZATIONS = dict.fromkeys(resnet.BACKBONES, "imagenet") | dict.fromkeys(
    efficientnet_lite.BACKBONES, "lite"
)


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling: 1x1, three dilated separable 3x3, image pooling; then 1x1.

    Source: DeepLabV3+, figure 2; rates are those of output stride 16, doubled at 8.
    """

    features: int
    rates: tuple[int, ...]
    norm: layers.NormFactory
    dropout: float
    align_corners: bool
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], batch: dsbn.Batch
    ) -> Float[Array, "b h w features"]:
        """Features at the resolution of x."""
        point = functools.partial(layers.ConvNorm, self.features, self.norm, dtype=self.dtype)
        branches = [point(name="point")(x, batch)]
        for i, rate in enumerate(self.rates):
            branches.append(
                layers.SeparableConvNorm(
                    self.features, self.norm, dilation=rate, dtype=self.dtype, name=f"atrous{i + 1}"
                )(x, batch)
            )
        pooled = jnp.mean(x, axis=(1, 2), keepdims=True)
        pooled = point(name="image_pooling")(pooled, batch)
        branches.append(layers.resize(pooled, x.shape[1:3], self.align_corners))
        y = point(name="project")(jnp.concatenate(branches, axis=-1), batch)
        return layers.Dropout(self.dropout)(y, batch)


class DeepLabV3Plus(nn.Module):
    """Encoder with ASPP, decoder with a branch from stride 4, classifier.

    Attributes:
        backbone: gives {"low": stride 4, "high": output stride}.
        num_classes: C.
        norm: makes the head's norms.
        features: channels of ASPP and decoder.
        low_features: channels of the low-level branch.
        rates: ASPP's dilation rates.
        dropout: share of the encoder's features dropped in training.
        mean, std: input normalisation, of RGB values 0..255.
        align_corners: how every resize inside places its corners.
        dtype: of the computation; None for that of input and parameters together.
    """

    backbone: nn.Module
    num_classes: int
    norm: layers.NormFactory
    features: int
    low_features: int
    rates: tuple[int, ...]
    dropout: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    align_corners: bool = False
    dtype: DTypeLike | None = None

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
        features = self.backbone(x, batch)
        high = ASPP(
            self.features,
            self.rates,
            self.norm,
            self.dropout,
            self.align_corners,
            self.dtype,
            name="aspp",
        )(features["high"], batch)
        low = layers.ConvNorm(self.low_features, self.norm, dtype=self.dtype, name="low")(
            features["low"], batch
        )
        y = layers.resize(high, low.shape[1:3], self.align_corners)
        y = jnp.concatenate([y, low], axis=-1)
        for i in (1, 2):
            y = layers.SeparableConvNorm(
                self.features, self.norm, dtype=self.dtype, name=f"decoder{i}"
            )(y, batch)
        logits = layers.Conv(
            self.num_classes,
            use_bias=True,
            kernel_init=nn.initializers.normal(0.01),
            dtype=self.dtype,
            name="classifier",
        )(y)
        return layers.resize(logits, images.shape[1:3], self.align_corners)


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


def build(model_config: Any, num_classes: int) -> DeepLabV3Plus:
    """The network of `config.model`, not yet initialised.

    Initialise with `domain="both"` to make the parameters and statistics of both domains:
    `params`, `batch_stats_weak`, `batch_stats_strong`.

    Args:
        model_config: `config.model` of configs/default.py.
        num_classes: C, at least 2.
    """
    # float32 leaves the dtype to promotion, so that float64 parameters compute in float64.
    dtype = (
        None if model_config.compute_dtype == "float32" else jnp.dtype(model_config.compute_dtype)
    )
    norm = functools.partial(
        dsbn.DomainNorm, kind=model_config.norm, momentum=model_config.norm_momentum, dtype=dtype
    )
    backbone = BACKBONES[model_config.backbone](
        norm=functools.partial(norm, epsilon=model_config.norm_epsilon.backbone),
        output_stride=model_config.output_stride,
        dtype=dtype,
    )
    mean, std = INPUT_NORMALIZATIONS[input_normalization(model_config)]
    widen = 2 if model_config.output_stride == 8 else 1
    return DeepLabV3Plus(
        # Flax names a submodule by the attribute that holds it; optim.RULES go by "backbone".
        backbone=backbone,
        num_classes=num_classes,
        norm=functools.partial(norm, epsilon=model_config.norm_epsilon.head),
        features=model_config.head_features,
        low_features=model_config.low_level_features,
        rates=tuple(rate * widen for rate in model_config.aspp_rates),
        dropout=model_config.dropout,
        mean=mean,
        std=std,
        align_corners=model_config.align_corners,
        dtype=dtype,
    )


def input_normalization(model_config: Any) -> str:
    """The name in INPUT_NORMALIZATIONS that `config.model` means.

    "auto" is that of the weights in `pretrained` where they say, else the backbone's usual one.

    Raises:
        UserError: the weights cannot be read.
    """
    name = model_config.input_normalization
    if name == "auto" and model_config.pretrained:
        name = pretrained.inspect(model_config.pretrained).input_normalization or "auto"
    return USUAL_NORMALIZATIONS[model_config.backbone] if name == "auto" else name


def input_mean(model_config: Any) -> np.ndarray:
    """The mean colour that padding has, uint8 [3]: what normalises to about 0."""
    mean, _ = INPUT_NORMALIZATIONS[input_normalization(model_config)]
    return np.round(mean).astype(np.uint8)


def untrained_rates(model_config: Any, crop: tuple[int, int]) -> tuple[int, ...]:
    """The rates of `config.model.aspp_rates` whose outer taps meet padding alone in every crop.

    No gradient reaches those taps, and evaluation on larger images then uses them as they were
    drawn. On CamVid at 240x180, crops of 128x160 with rates 6, 12 and 18 scored 27.6 % mIoU for
    that reason.

    Args:
        model_config: `config.model`.
        crop: (height, width) in pixels.
    """
    stride = model_config.output_stride
    smallest = min(-(-side // stride) for side in crop)
    widen = 2 if stride == 8 else 1
    return tuple(rate for rate in model_config.aspp_rates if rate * widen >= smallest)
