"""The padding rule: the few array shapes to which images of any size are padded.

Each array shape needs a compiled program of its own. A set of images with few sizes is therefore
processed without padding, and the sides of the images of any other set are padded to multiples.
Padding changes the network's output near the border, so evaluation, labelling and prediction must
apply one rule.
"""

import math
from collections.abc import Collection

from semiseg_jax.mesh import round_up_batch

# (height, width) in pixels.
Size = tuple[int, int]

# Sets of images with at most this many sizes are not padded.
MAX_EXACT_SIZES = 8


def has_few_sizes(sizes: Collection[Size]) -> bool:
    """Returns whether a set of images with these sizes is processed without padding."""
    return len(set(sizes)) <= MAX_EXACT_SIZES


def pad_multiple(sizes: Collection[Size], pad_to: int) -> int:
    """Returns the multiple, in pixels, to which the sides of a set's images are padded.

    Args:
        sizes: (height, width) of every image of the set, in pixels.
        pad_to: the multiple for sets with many sizes, in pixels (`config.eval.pad_to`).

    Returns:
        1, which means no padding, for a set with few sizes; otherwise `pad_to`.
    """
    return 1 if has_few_sizes(sizes) else pad_to


def pad_size(size: Size, multiple: int) -> Size:
    """Rounds both sides of a size up to a multiple, in pixels."""
    height, width = (-(-side // multiple) * multiple for side in size)
    return height, width


class ShapeBuckets:
    """Tile size, padded size and batch size of each image of a prediction.

    Prediction pads a set of images as evaluation would. In addition, an image of a size that was
    evaluated without padding is never padded, whatever the sizes of the other images are.

    Attributes:
        pad_to: multiple to which sides are padded, in pixels; 1 for no padding.
    """

    def __init__(
        self,
        sizes: Collection[Size],
        *,
        pad_to: int,
        exact_sizes: Collection[Size] | None,
        max_pixels: int,
        batch_size: int,
        num_devices: int,
    ):
        """Chooses the shapes for a set of images.

        Args:
            sizes: (height, width) of every image of the set, in pixels.
            pad_to: multiple to which sides are padded, in pixels.
            exact_sizes: sizes that are never padded; sets with few sizes are not padded either.
                None to pad every size of every set.
            max_pixels: pixels that a device processes at a time; larger images are split into
                tiles.
            batch_size: largest number of images per batch.
            num_devices: batches are multiples of this number.
        """
        self._max_pixels = max_pixels
        self._num_devices = num_devices
        # A batch with more places than the set has images would be filled up with empty images.
        self._max_batch = round_up_batch(min(batch_size, max(len(sizes), 1)), num_devices)
        self._exact_sizes = frozenset(exact_sizes or ())
        if exact_sizes is None:
            self.pad_to = pad_to
        else:
            self.pad_to = pad_multiple([self.tile_size(size) for size in sizes], pad_to)

    def tile_size(self, size: Size) -> Size:
        """Returns the size of the tiles of an image; small images are one tile of their size."""
        if size[0] * size[1] <= self._max_pixels:
            return size
        side = math.isqrt(self._max_pixels)
        return min(size[0], side), min(size[1], side)

    def padded_size(self, size: Size) -> Size:
        """Returns the size to which an image or a tile is padded."""
        return size if size in self._exact_sizes else pad_size(size, self.pad_to)

    def batch_size(self, padded_size: Size) -> int:
        """Returns the number of images or tiles of a padded size in a batch, on all devices."""
        per_device = self._max_pixels // (padded_size[0] * padded_size[1])
        return self._num_devices * min(max(per_device, 1), self._max_batch // self._num_devices)
