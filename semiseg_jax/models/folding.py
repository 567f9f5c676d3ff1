"""Folding of batch norm into the preceding convolutions, for deployment.

At inference a norm computes y * scale + shift for each channel, with
scale = gamma / sqrt(variance + epsilon) and shift = beta - mean * scale. With its kernel multiplied
by scale, the convolution computes y * scale at no extra cost; shift becomes a bias.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Array, Float

from semiseg_jax.models import deeplab, dsbn
from semiseg_jax.models.segmenter import Segmenter


class Shift(nn.Module):
    """The remainder of a folded norm: a bias [channels] float32."""

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], layout: dsbn.DomainLayout
    ) -> Float[Array, "b h w c"]:
        """Returns x + bias for every layout."""
        del layout
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), jnp.float32)
        return x + bias


def fold(model: Segmenter, variables: Mapping[str, Any]) -> tuple[Segmenter, dict[str, Any]]:
    """Returns the network with the weak norm folded into the kernels, and its variables.

    It computes the same function as the model with domain="weak" and train=False, and has no
    variables but parameters. Every batch norm is part of a `layers.ConvNorm`, whose convolution
    precedes it. A network without batch norms is returned as it is.

    Args:
        model: from `deeplab.build`.
        variables: of the model; the strong norm is not read and may be missing.
    """
    if dsbn.stats_collection("weak") not in variables:
        return model, dict(variables)
    params = traverse_util.flatten_dict(variables["params"])
    statistics = traverse_util.flatten_dict(variables[dsbn.stats_collection("weak")])
    norms = {path[:-1] for path in statistics}
    # Without the affine parameters, which lie below the norm's domain. Layer norms stay.
    folded = {path: leaf for path, leaf in params.items() if path[:-2] not in norms}
    for norm in norms:
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
        # The last axis of a kernel is the output channels, also for a depthwise kernel.
        scale = gamma / np.sqrt(variance + factory().epsilon)
        folded[(*norm[:-1], "conv", "kernel")] = (kernel * scale).astype(np.float32)
        folded[(*norm, "bias")] = (beta - mean * scale).astype(np.float32)
    replaced: dict[str, Any] = {}
    if any(norm[0] == "backbone" for norm in norms):
        replaced["backbone"] = model.backbone.clone(norm=Shift)
    if isinstance(model, deeplab.DeepLabV3Plus):  # V2's head has no norm.
        replaced["norm"] = Shift
    return model.clone(**replaced), {"params": traverse_util.unflatten_dict(folded)}
