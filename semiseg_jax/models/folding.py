"""Batch norm folded into the convolutions before it: the deployed network has a bias instead.

At inference a norm is y * scale + shift by channel, with scale = gamma / sqrt(variance + epsilon)
and shift = beta - mean * scale. A convolution whose kernel is multiplied by scale gives y * scale
itself, in as many operations as before; shift is its bias.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Array, Float

from semiseg_jax.models import deeplab, dsbn


class Shift(nn.Module):
    """What is left of a norm whose scale is in the kernel before it: a bias [channels] float32."""

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], batch: dsbn.Batch) -> Float[Array, "b h w c"]:
        """x + bias, whatever the batch."""
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), jnp.float32)
        return x + bias


def fold(
    model: deeplab.DeepLab, variables: Mapping[str, Any]
) -> tuple[deeplab.DeepLab, dict[str, Any]]:
    """The network with its weak norm folded into the kernels, and its variables.

    It computes what the model does with domain="weak" and train=False, and has parameters alone.
    Every norm of every network is that of a `layers.ConvNorm`, after the convolution beside it.

    Args:
        model: as `deeplab.build` makes it.
        variables: its weak norm alone is read, and may be all there is.
    """
    params = traverse_util.flatten_dict(variables["params"])
    statistics = traverse_util.flatten_dict(variables[dsbn.stats_collection("weak")])
    folded = {path: leaf for path, leaf in params.items() if "norm" not in path}
    for norm in {path[:-1] for path in statistics}:
        factory = model.backbone.norm if norm[0] == "backbone" else model.norm
        gamma, beta, mean, variance, kernel = (
            np.asarray(leaf, np.float64)
            for leaf in (
                params[(*norm, "weak", "scale")],
                params[(*norm, "weak", "bias")],
                statistics[(*norm, "mean")],
                statistics[(*norm, "var")],
                params[(*norm[:-1], "conv", "kernel")],
            )
        )
        # The last axis of a kernel is its output channels, of a depthwise one too.
        scale = gamma / np.sqrt(variance + factory().epsilon)
        folded[(*norm[:-1], "conv", "kernel")] = (kernel * scale).astype(np.float32)
        folded[(*norm, "bias")] = (beta - mean * scale).astype(np.float32)
    return _without_norms(model), {"params": traverse_util.unflatten_dict(folded)}


def _without_norms(model: deeplab.DeepLab) -> deeplab.DeepLab:
    changed: dict[str, Any] = {"backbone": model.backbone.clone(norm=Shift)}
    if isinstance(model, deeplab.DeepLabV3Plus):  # V2's head has no norm.
        changed["norm"] = Shift
    return model.clone(**changed)
