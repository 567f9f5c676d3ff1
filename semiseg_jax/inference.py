"""Class probabilities of images, whole or by sliding window, averaged over scales and mirrors."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent import futures
from typing import Any, Literal, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int32, UInt8

from semiseg_jax import interruption
from semiseg_jax import mesh as mesh_lib
from semiseg_jax.models.deeplab import normalize
from semiseg_jax.models.layers import resize
from semiseg_jax.state import Variables


def scaled_size(size: Sequence[int], scale: float) -> tuple[int, int]:
    """(height, width) times scale, rounded, in pixels."""
    return max(round(scale * size[0]), 1), max(round(scale * size[1]), 1)


def window_starts(size: int, window: int, stride: int) -> list[int]:
    """Where windows along one axis begin, in pixels: every `stride`, and the last at the end."""
    return [*range(0, max(size - window, 0), stride), max(size - window, 0)]


def window_weights(window: Sequence[int]) -> Float[np.ndarray, "h w 1"]:
    """What a window's pixels weigh where windows overlap: most in its middle, little at its rim.

    The product of a tent along each axis: at a rim the weight is next to nothing, so that no seam
    shows where a window begins.
    """
    tents = (
        np.minimum(np.arange(n) + 0.5, n - np.arange(n) - 0.5).astype(np.float32) for n in window
    )
    return np.multiply.outer(*tents)[..., None]


class Predictor:
    """Averaged class probabilities; compiles one program for each image size and scale.

    Source: ICCV 2021, section 3.1 (multi-scale and mirrored inference of the teacher).

    Attributes:
        model: network with `mean`, `std` and `align_corners`.
        mesh: images are split over it.
        scales: multiples of the image size.
        flip: see the mirrored image too.
        average: "softmax" averages probabilities; "logits" logits, one softmax at the end.
        window: (height, width) in pixels of the scaled image; where that is larger, the network
            sees it through windows of this size, whose logits are averaged with the weights of
            `window_weights`. () for never.
        window_stride: pixels between neighbouring windows, (down, across).
        add_scale: the program of one scale: (total, variables, images, scale) -> total.
    """

    def __init__(
        self,
        model: nn.Module,
        mesh: Mesh,
        scales: Sequence[float] = (1.0,),
        flip: bool = False,
        average: Literal["softmax", "logits"] = "softmax",
        window: Sequence[int] = (),
        window_stride: Sequence[int] = (),
    ):
        self.model = model
        self.mesh = mesh
        self.scales = tuple(scales)
        self.flip = flip
        self.average = average
        self.window = tuple(window)
        self.window_stride = tuple(window_stride)
        whole, split = mesh_lib.replicated(mesh), mesh_lib.split_by_image(mesh)
        self.add_scale = jax.jit(
            self._add_scale,
            static_argnums=3,
            in_shardings=(split, whole, split),
            out_shardings=split,
            donate_argnums=0,
            compiler_options=mesh_lib.compiler_options(mesh),
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
            total = self.add_scale(total, variables, images, scale)
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
        logits = resize(self._logits(variables, x), size, align)
        scores = jax.nn.softmax(logits) if self.average == "softmax" else logits
        if self.flip:
            pairs = scores.reshape(-1, 2, *scores.shape[1:])
            scores = pairs[:, 0] + pairs[:, 1, :, ::-1]
        return total + scores

    def _logits(
        self, variables: Variables, x: Float[Array, "n h w 3"]
    ) -> Float[Array, "n h w classes"]:
        """float32 logits of normalised images, through windows where they are too large."""

        def apply(x: Float[Array, "n wh ww 3"]) -> Float[Array, "n wh ww classes"]:
            logits = self.model.apply(variables, x, domain="weak", train=False)
            return logits.astype(jnp.float32)

        count, *size, _ = x.shape
        if not self.window or all(n <= w for n, w in zip(size, self.window, strict=True)):
            return apply(x)
        window = [min(n, w) for n, w in zip(size, self.window, strict=True)]
        starts = map(window_starts, size, window, self.window_stride)
        corners = np.array(list(itertools.product(*starts)), np.int32)
        weights = window_weights(window)
        covered = np.zeros((*size, 1), np.float32)
        for top, left in corners:
            covered[top : top + window[0], left : left + window[1]] += weights

        def add(
            total: Float[Array, "n h w classes"], corner: Int32[Array, "2"]
        ) -> tuple[Float[Array, "n h w classes"], None]:
            place = (0, corner[0], corner[1], 0)
            seen = apply(jax.lax.dynamic_slice(x, place, (count, *window, 3))) * weights
            before = jax.lax.dynamic_slice(total, place, seen.shape)
            return jax.lax.dynamic_update_slice(total, before + seen, place), None

        # One window after the other: the activations of one are all that memory must hold.
        nothing = jnp.zeros((count, *size, self.model.num_classes), jnp.float32)
        total, _ = jax.lax.scan(add, nothing, jnp.asarray(corners))
        return total / covered

    def _average(self, total: Float[Array, "n h w classes"]) -> Float[Array, "n h w classes"]:
        mean = total / (len(self.scales) * (2 if self.flip else 1))
        return mean if self.average == "softmax" else jax.nn.softmax(mean)


Batch = TypeVar("Batch")


def one_behind(
    batches: Iterable[Batch],
    start: Callable[[Batch], Any],
    write: Callable[[Batch, Any], Iterable[Callable[[], None]]],
    asked: interruption.Asked,
) -> Iterator[Batch]:
    """Reads batches ahead, and writes results, while the devices are at another batch.

    Args:
        batches: to work on.
        start: sets the devices to work on a batch.
        write: given a batch and what `start` returned for it, once the next one is started too:
            the writing that there is to do. It is done in threads, before that of the next batch.
        asked: whether to stop.

    Yields:
        Each batch as its writing begins.

    Raises:
        UserError: what a batch, or writing, raised.
        Interrupted: that was asked for; what had begun to be written is on disk.
    """
    with futures.ThreadPoolExecutor() as pool:
        writing: list[futures.Future] = []
        for batch, started in overlapping(batches, start):
            for future in writing:
                future.result()
            interruption.stop_if(asked)
            writing = [pool.submit(job) for job in write(batch, started)]
            yield batch
        for future in writing:
            future.result()


def overlapping(
    batches: Iterable[Batch], start: Callable[[Batch], Any]
) -> Iterator[tuple[Batch, Any]]:
    """(batch, what was started for it), each once the next one is started too."""
    before = None
    for batch in batches:
        started = (batch, start(batch))
        if before is not None:
            yield before
        before = started
    if before is not None:
        yield before
