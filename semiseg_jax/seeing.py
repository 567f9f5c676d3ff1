"""How a deployed model sees images: those of any size as evaluation saw its own, or in tiles."""

import dataclasses
import itertools
import math
from collections.abc import Collection

from semiseg_jax import mesh as mesh_lib
from semiseg_jax.data.pipeline import MAX_EXACT_SIZES, Size
from semiseg_jax.deployed import Deployed
from semiseg_jax.inference import window_starts

# Pixels of a padded image that a device is given at a time, unless evaluation gave it more.
USUAL_PIXELS = 2**22
# Neighbouring tiles share one in so many pixels of their sides.
_SHARED = 4


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How images are seen; by default as those that the model's mIoU was measured on.

    Attributes:
        scales, flip, window, window_stride: as `Predictor` takes them.
        pad_to: sides of all images are padded to multiples of it, in pixels; 1 for none of them;
            None for what evaluation does (see `Sizes`).
        batch: images at a time at most, filled up to a multiple of the number of devices.
        max_pixels: that a device is given at a time; larger images are seen in tiles.
    """

    scales: tuple[float, ...]
    flip: bool
    window: tuple[int, ...]
    window_stride: tuple[int, ...]
    pad_to: int | None
    batch: int
    max_pixels: int


def as_evaluated(deployed: Deployed, num_devices: int) -> Protocol:
    """The protocol of the model's mIoU."""
    says = deployed.protocol
    whole = says["window"] == "whole"
    # The batch is a multiple of the devices that there were; here may be others.
    batch = mesh_lib.batch_over(deployed.batch, num_devices)
    return Protocol(
        scales=tuple(says["scales"]),
        flip=says["flip"],
        window=() if whole else tuple(says["window"]["size"]),
        window_stride=() if whole else tuple(says["window"]["stride"]),
        pad_to=None,
        batch=batch,
        max_pixels=max(USUAL_PIXELS, batch // num_devices * deployed.largest_pixels),
    )


class Sizes:
    """How images of each size are brought to few shapes of batch.

    Evaluation sees a set of few sizes as it is, and pads the images of one with many. So does
    prediction, and an image that was evaluated is seen as it was there, whatever lies beside it.

    Attributes:
        pad_to: what sides are padded to multiples of, in pixels; 1 for no padding.
    """

    def __init__(
        self,
        sizes: Collection[Size],
        deployed: Deployed,
        protocol: Protocol,
        num_devices: int,
    ):
        self._max_pixels = protocol.max_pixels
        self._num_devices = num_devices
        # No more than there are images, so that a few are not computed among many empty ones.
        count = mesh_lib.batch_over(max(len(sizes), 1), num_devices)
        self._most = min(mesh_lib.batch_over(protocol.batch, num_devices), count)
        self._exact: frozenset[Size] = frozenset()
        if protocol.pad_to is not None:
            self.pad_to = protocol.pad_to
        elif deployed.protocol["pad_to"] > 1:
            self.pad_to = deployed.protocol["pad_to"]
        else:
            self._exact = deployed.exact_sizes
            few = len({self.seen(size) for size in sizes}) <= MAX_EXACT_SIZES
            self.pad_to = 1 if few else deployed.pad_to

    def seen(self, size: Size) -> Size:
        """The (height, width) of an image, or of a tile where it is seen in tiles."""
        if size[0] * size[1] <= self._max_pixels:
            return size
        side = math.isqrt(self._max_pixels)
        return min(size[0], side), min(size[1], side)

    def padded(self, size: Size) -> Size:
        """What an image or tile of a (height, width) is padded to."""
        if size in self._exact:
            return size
        height, width = (-(-side // self.pad_to) * self.pad_to for side in size)
        return height, width

    def batch(self, padded: Size) -> int:
        """How many images or tiles of a padded (height, width) make a batch."""
        fit = self._max_pixels // (padded[0] * padded[1])
        return self._num_devices * min(max(fit, 1), self._most // self._num_devices)


@dataclasses.dataclass(frozen=True)
class Span:
    """A tile along one axis: where it begins, and which pixels of the image it decides on."""

    start: int
    low: int
    high: int


def spans(size: int, tile: int) -> list[Span]:
    """Tiles along an axis; where two overlap, each decides on its half."""
    starts = window_starts(size, tile, tile - tile // _SHARED)
    cuts = [(one + tile + other) // 2 for one, other in itertools.pairwise(starts)]
    return [Span(*t) for t in zip(starts, [0, *cuts], [*cuts, size], strict=True)]
