"""Class probabilities of images, averaged over scales and mirror images.

The network processes whole images or sliding windows.
"""

import dataclasses
import functools
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

from semiseg_jax import mesh as mesh_lib
from semiseg_jax.models.layers import resize
from semiseg_jax.models.segmenter import normalize
from semiseg_jax.runtime import preemption, rules
from semiseg_jax.runtime.errors import UserError
from semiseg_jax.train_state import Variables

# The smallest and largest scale, and the largest side of a window in pixels, batch, and padding.
# A larger value is a mistake, and would end in a failed allocation.
_MIN_SCALE, _MAX_SCALE = 0.01, 16
_MAX_SIDE = 2**14
_MAX_BATCH = 4096
_MAX_PAD_TO = 4096


def _is_window(value: Any) -> bool:
    return isinstance(value, tuple) and (
        value == () or (len(value) == 2 and all(rules.is_integer(n, 1, _MAX_SIDE) for n in value))
    )


_WINDOW: rules.Rule = (
    _is_window,
    f"() or (height, width) in pixels, two integers above 0 and at most {_MAX_SIDE}",
)
# By setting of inference, as in `config.eval` and `config.pseudo`: the values it accepts.
RULES: dict[str, rules.Rule] = {
    "scales": rules.tuple_of(
        rules.number(_MIN_SCALE, _MAX_SCALE),
        f"a tuple of numbers above 0, at least one: each at least {_MIN_SCALE} and at most "
        f"{_MAX_SCALE}",
        shortest=1,
    ),
    "flip": rules.BOOL,
    "window": _WINDOW,
    "window_stride": _WINDOW,
    "batch": rules.integer(1, _MAX_BATCH),
    "pad_to": rules.integer(1, _MAX_PAD_TO),
}


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


def scaled_size(size: Sequence[int], scale: float) -> tuple[int, int]:
    """Returns (height, width) multiplied by the scale and rounded, in pixels."""
    return max(round(scale * size[0]), 1), max(round(scale * size[1]), 1)


def window_starts(size: int, window: int, stride: int) -> list[int]:
    """Returns the offsets of windows along one axis, in pixels; the last window ends at `size`."""
    return [*range(0, max(size - window, 0), stride), max(size - window, 0)]


def window_weights(window: Sequence[int]) -> Float[np.ndarray, "h w 1"]:
    """Returns the weights with which overlapping windows are averaged, float32.

    The weights are the product of a triangular function along each axis. They are almost zero at
    the border of a window, so that the average has no visible seam there.
    """
    triangles = (
        np.minimum(np.arange(n) + 0.5, n - np.arange(n) - 0.5).astype(np.float32) for n in window
    )
    return np.multiply.outer(*triangles)[..., None]


class Predictor:
    """Computes averaged class probabilities; compiles a program for each image size and scale.

    Source: ICCV 2021, section 2.1 (multi-scale and mirrored inference of the teacher).

    Attributes:
        model: network with `mean`, `std` and `align_corners`.
        mesh: the images of a batch are split over it.
        scales: sizes of the network's input, as multiples of the image size.
        flip: whether to average over the image and its mirror image.
        average: "softmax" averages probabilities; "logits" averages logits and applies one softmax
            to their mean.
        window: (height, width) of the sliding window in pixels of the scaled image; images that
            are larger are split into windows, whose logits are averaged with `window_weights`.
            () for no windows.
        window_stride: (down, across), pixels between neighbouring windows.
        add_scale: the jitted program of one scale: (total, variables, images, scale) -> total.
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
        scores = _Scores(model, flip, average, self.window, self.window_stride)
        options = tuple((mesh_lib.compiler_options(mesh) or {}).items())
        self.add_scale = _jit_add_scale(scores, mesh, options)
        by_image = mesh_lib.batch_sharding(mesh)
        self._finish = jax.jit(
            self._average, in_shardings=(by_image,), out_shardings=by_image, donate_argnums=0
        )

    def __call__(
        self, variables: Variables, images: UInt8[Array, "n h w 3"]
    ) -> Float[Array, "n h w classes"]:
        """Returns class probabilities, float32, on the devices and split by image.

        Args:
            variables: only the weak norm is read.
            images: RGB; n is a multiple of the number of devices.
        """
        total = jnp.zeros(
            (*images.shape[:3], self.model.num_classes),
            jnp.float32,
            device=mesh_lib.batch_sharding(self.mesh),
        )
        for scale in self.scales:
            total = self.add_scale(total, variables, images, scale)
        return self._finish(total)

    def _average(self, total: Float[Array, "n h w classes"]) -> Float[Array, "n h w classes"]:
        mean = total / (len(self.scales) * (2 if self.flip else 1))
        return mean if self.average == "softmax" else jax.nn.softmax(mean)


@dataclasses.dataclass(frozen=True)
class _Scores:
    """What the program of one scale depends on besides its arguments; see `Predictor`."""

    model: Any
    flip: bool
    average: str
    window: tuple[int, ...]
    window_stride: tuple[int, ...]

    def add_scale(
        self,
        total: Float[Array, "n h w classes"],
        variables: Variables,
        images: UInt8[Array, "n h w 3"],
        scale: float,
    ) -> Float[Array, "n h w classes"]:
        """Adds the scores of one scale to `total`, with those of the mirror images if `flip`."""
        size = images.shape[1:3]
        align = self.model.align_corners
        x = normalize(images, self.model.mean, self.model.std)
        x = resize(x, scaled_size(size, scale), align)

        if self.flip:
            # Each mirror image follows its original: one pass for both, and no image moves to
            # another device.
            x = jnp.stack([x, x[:, :, ::-1]], axis=1).reshape(-1, *x.shape[1:])
        logits = resize(self.logits(variables, x), size, align)
        scores = jax.nn.softmax(logits) if self.average == "softmax" else logits
        if self.flip:
            pairs = scores.reshape(-1, 2, *scores.shape[1:])
            scores = pairs[:, 0] + pairs[:, 1, :, ::-1]
        return total + scores

    def logits(
        self, variables: Variables, x: Float[Array, "n h w 3"]
    ) -> Float[Array, "n h w classes"]:
        """Returns the logits of normalised images, float32; larger ones are split into windows."""

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
        total_weight = np.zeros((*size, 1), np.float32)
        for top, left in corners:
            total_weight[top : top + window[0], left : left + window[1]] += weights

        def add_window(
            total: Float[Array, "n h w classes"], corner: Int32[Array, "2"]
        ) -> tuple[Float[Array, "n h w classes"], None]:
            start = (0, corner[0], corner[1], 0)
            logits = apply(jax.lax.dynamic_slice(x, start, (count, *window, 3))) * weights
            previous = jax.lax.dynamic_slice(total, start, logits.shape)
            return jax.lax.dynamic_update_slice(total, previous + logits, start), None

        # A scan over the windows, so that memory holds the activations of one window at a time.
        zeros = jnp.zeros((count, *size, self.model.num_classes), jnp.float32)
        total, _ = jax.lax.scan(add_window, zeros, jnp.asarray(corners))
        return total / total_weight


# Labelling and evaluation of a run, and the runs of a sweep, share programs.
@functools.lru_cache(maxsize=16)
def _jit_add_scale(scores: _Scores, mesh: Mesh, options: tuple[tuple[str, bool], ...]) -> Any:
    """The jitted `_Scores.add_scale`, with these compiler options."""
    replicated, by_image = mesh_lib.replicated(mesh), mesh_lib.batch_sharding(mesh)
    return jax.jit(
        scores.add_scale,
        static_argnums=3,
        in_shardings=(by_image, replicated, by_image),
        out_shardings=by_image,
        donate_argnums=0,
        compiler_options=dict(options) or None,
    )


Batch = TypeVar("Batch")


def pipelined_map(
    batches: Iterable[Batch],
    start: Callable[[Batch], Any],
    write: Callable[[Batch, Any], Iterable[Callable[[], None]]],
) -> Iterator[Batch]:
    """Overlaps reading, computation and writing: each works on another batch.

    Args:
        batches: the batches to process.
        start: starts the computation of a batch on the devices; returns its outputs.
        write: from a batch and its outputs to the functions that write its results. It is called
            once the computation of the next batch has started. The functions run in threads, and
            finish before those of the next batch start.

    Yields:
        Each batch when its writing starts.

    Raises:
        UserError: raised while reading a batch or writing its results.
        Preempted: the run must stop; all writing that had started has finished.
    """
    with futures.ThreadPoolExecutor() as pool:
        pending: list[futures.Future] = []
        for batch, outputs in lookahead(batches, start):
            for future in pending:
                future.result()
            preemption.raise_if_stopping()
            pending = [pool.submit(job) for job in write(batch, outputs)]
            yield batch
        for future in pending:
            future.result()


def lookahead(
    batches: Iterable[Batch], start: Callable[[Batch], Any]
) -> Iterator[tuple[Batch, Any]]:
    """Yields (batch, outputs of `start`), each after the next batch has been started."""
    previous = None
    for batch in batches:
        current = (batch, start(batch))
        if previous is not None:
            yield previous
        previous = current
    if previous is not None:
        yield previous
