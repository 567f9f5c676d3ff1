"""Class probabilities of whole images, averaged over scales and mirror images."""

from collections.abc import Sequence
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, UInt8

from semiseg_jax import mesh as mesh_lib
from semiseg_jax.models.deeplab import normalize
from semiseg_jax.models.layers import resize
from semiseg_jax.state import Variables


def scaled_size(size: Sequence[int], scale: float) -> tuple[int, int]:
    """(height, width) times scale, rounded, in pixels."""
    return max(round(scale * size[0]), 1), max(round(scale * size[1]), 1)


class Predictor:
    """Averaged class probabilities; compiles one program for each image size and scale.

    Source: ICCV 2021, section 3.1 (multi-scale and mirrored inference of the teacher).

    Attributes:
        model: network with `mean`, `std` and `align_corners`.
        mesh: images are split over it.
        scales: multiples of the image size.
        flip: see the mirrored image too.
        average: "softmax" averages probabilities; "logits" logits, one softmax at the end.
    """

    def __init__(
        self,
        model: nn.Module,
        mesh: Mesh,
        scales: Sequence[float] = (1.0,),
        flip: bool = False,
        average: Literal["softmax", "logits"] = "softmax",
    ):
        self.model = model
        self.mesh = mesh
        self.scales = tuple(scales)
        self.flip = flip
        self.average = average
        whole, split = mesh_lib.replicated(mesh), mesh_lib.split_by_image(mesh)
        self._add = jax.jit(
            self._add_scale,
            static_argnums=3,
            in_shardings=(split, whole, split),
            out_shardings=split,
            donate_argnums=0,
        )
        self._finish = jax.jit(
            self._average, in_shardings=(split,), out_shardings=split, donate_argnums=0
        )

    def __call__(
        self, variables: Variables, images: UInt8[Array, "n h w 3"]
    ) -> Float[Array, "n h w classes"]:
        """Probabilities [n, h, w, classes] float32, on the device, split by image.

        Args:
            variables: the weak norm alone is read.
            images: RGB, n a multiple of the number of devices.
        """
        total = jnp.zeros(
            (*images.shape[:3], self.model.num_classes),
            jnp.float32,
            device=mesh_lib.split_by_image(self.mesh),
        )
        for scale in self.scales:
            total = self._add(total, variables, images, scale)
        return self._finish(total)

    def _add_scale(
        self,
        total: Float[Array, "n h w classes"],
        variables: Variables,
        images: UInt8[Array, "n h w 3"],
        scale: float,
    ) -> Float[Array, "n h w classes"]:
        """Adds what the network says at one scale, plain and mirrored."""
        size = images.shape[1:3]
        align = self.model.align_corners
        x = normalize(images, self.model.mean, self.model.std)
        x = resize(x, scaled_size(size, scale), align)

        if self.flip:
            # Each mirror image beside its original: one pass for both, and no image leaves its
            # device.
            x = jnp.stack([x, x[:, :, ::-1]], axis=1).reshape(-1, *x.shape[1:])
        logits = self.model.apply(variables, x, domain="weak", train=False)
        logits = resize(logits.astype(jnp.float32), size, align)
        scores = jax.nn.softmax(logits) if self.average == "softmax" else logits
        if self.flip:
            pairs = scores.reshape(-1, 2, *scores.shape[1:])
            scores = pairs[:, 0] + pairs[:, 1, :, ::-1]
        return total + scores

    def _average(self, total: Float[Array, "n h w classes"]) -> Float[Array, "n h w classes"]:
        mean = total / (len(self.scales) * (2 if self.flip else 1))
        return mean if self.average == "softmax" else jax.nn.softmax(mean)
