"""Mask files whose pixels are colours, copies of ids in several channels, or grey levels.

By default the pixels of a mask file are values, which `image_io.id_table` maps to class ids. The
keys `data.mask_colors`, `data.mask_channel` and `data.mask_threshold` say what else they are.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

from semiseg_jax.data.image_header import format_of
from semiseg_jax.losses import IGNORE
from semiseg_jax.runtime import rules
from semiseg_jax.runtime.errors import UserError

# (R, G, B), each 0 to 255.
Color = tuple[int, int, int]
# Of the colours that are not in `data.mask_colors`, so many are named.
_MAX_NAMED = 8
# Other programs round colours so far, at most.
_SMALL_TOLERANCE = 8
CHANNELS = ("", "grey", "red", "green", "blue")


@dataclasses.dataclass(frozen=True)
class MaskFormat:
    """How the pixels of mask files hold values; by default they are the values.

    Attributes:
        colors: (colour, value) pairs; () if colours mean nothing.
        tolerance: largest difference to a colour in each channel.
        channel: of masks with three channels, the one that holds the values; "grey" if all do.
        threshold: grey levels from this one on have the value 1, others 0; 0 for no threshold.
    """

    colors: tuple[tuple[Color, int], ...] = ()
    tolerance: int = 0
    channel: str = ""
    threshold: int = 0

    @classmethod
    def from_config(cls, data: Any) -> "MaskFormat":
        """Returns the format that the keys of `config.data` describe.

        Raises:
            UserError: keys contradict each other, or colours cannot be told apart.
        """
        colors = colors_of_classes(data)
        form = cls(colors, data.mask_tolerance, data.mask_channel, data.mask_threshold)
        given = keys_given(data)
        if len(given) > 1:
            raise UserError(
                f"{given[0]} and {given[1]} each say what the pixels of masks are: give one of "
                "them.",
                code="mask-formats-contradict",
            )
        if data.id_map and (colors or form.threshold):
            raise UserError(
                f"data.id_map is of masks of values, and {given[0]} gives the classes already: "
                "leave it out.",
                code="id-map-without-values",
            )
        if form.threshold and len(data.classes) != 2:
            raise UserError(
                f"data.mask_threshold tells two classes apart, and data.classes has "
                f"{len(data.classes)}: name two, or read the masks by data.mask_colors or "
                "data.id_map.",
                code="mask-threshold-not-binary",
            )
        _check_colors(colors, form.tolerance, len(data.classes))
        return form

    @property
    def gives_classes(self) -> bool:
        """Whether the values are class ids, and IGNORE, whatever the keys of values say."""
        return bool(self.colors or self.threshold)


def is_color(value: Any) -> bool:
    """Whether a value of a config is (R, G, B), each 0 to 255."""
    return (
        isinstance(value, tuple | list)
        and len(value) == 3
        and all(rules.is_integer(n, 0, 255) for n in value)
    )


def colors_of_classes(data: Any) -> tuple[tuple[Color, int], ...]:
    """Returns the pairs (colour, class id) of `data.mask_colors`, in either of its forms.

    Raises:
        UserError: colours in the order of the classes are not as many as these.
    """
    listed = data.mask_colors
    if not all(map(is_color, listed)):
        return tuple(((int(r), int(g), int(b)), int(value)) for (r, g, b), value in listed)
    if len(listed) not in (0, len(data.classes)):
        raise UserError(
            f"data.mask_colors has {len(listed)} colours for {len(data.classes)} classes: give one "
            "for each, in their order, or pairs (colour, class id).",
            code="mask-colors-count",
        )
    return tuple(((int(r), int(g), int(b)), value) for value, (r, g, b) in enumerate(listed))


def palette_of_colors(form: MaskFormat, num_classes: int) -> tuple[Color, ...]:
    """Returns the first colour of each class in masks; () if a class has none."""
    first = dict(reversed([(value, color) for color, value in form.colors]))
    return (
        tuple(first[i] for i in range(num_classes))
        if first.keys() >= set(range(num_classes))
        else ()
    )


def keys_given(data: Any) -> list[str]:
    """Returns the keys of `config.data` that say what the pixels of masks are, if not values."""
    keys = ("mask_colors", "mask_channel", "mask_threshold")
    return [f"data.{key}" for key in keys if data[key]]


# Masks whose pixels are values.
VALUES = MaskFormat()


def _check_colors(colors: Sequence[tuple[Color, int]], tolerance: int, num_classes: int) -> None:
    """Checks that each colour has a class, and that none is taken for another.

    Raises:
        UserError: naming the colours.
    """
    for color, value in colors:
        if value not in range(num_classes) and value != IGNORE:
            raise UserError(
                f"data.mask_colors gives {color} the class {value}: class ids are 0 to "
                f"{num_classes - 1}, and {IGNORE} for no label.",
                code="mask-color-class-out-of-range",
            )
    for (one, value), (other, other_value) in itertools.combinations(colors, 2):
        if value != other_value and _distance(one, other) <= 2 * tolerance:
            remedy = "take one out" if one == other else "lower data.mask_tolerance"
            raise UserError(
                f"data.mask_colors gives {one} the class {value} and {other} the class "
                f"{other_value}, and with data.mask_tolerance={tolerance} a pixel may be both: "
                f"{remedy}.",
                code="mask-colors-overlap",
            )


def _distance(one: Color, other: Color) -> int:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def values_of_colors(path: Any, image: Image.Image, form: MaskFormat) -> UInt8[np.ndarray, "h w"]:
    """Returns the value of the colour of each pixel; of a palette image, of its palette's colours.

    Args:
        path: of the file, for the error.
        image: the decoded mask, in any mode; alpha is not read.
        form: with colours.

    Raises:
        UserError: naming the colours without a value, the most frequent first.
    """
    codes = _codes(image)
    known = np.array([_code(color) for color, _ in form.colors], np.int32)
    values = np.array([value for _, value in form.colors], np.uint8)
    order = np.argsort(known, kind="stable")
    known, values = known[order], values[order]
    places = np.searchsorted(known, codes).clip(max=len(known) - 1)
    result, unknown = values[places], known[places] != codes
    if not unknown.any():
        return result
    present, inverse, counts = np.unique(codes[unknown], return_inverse=True, return_counts=True)
    differences = np.abs(_channels(present)[:, None] - _channels(known)).max(axis=-1)
    nearest = differences.argmin(axis=1)
    is_far = differences.min(axis=1) > form.tolerance
    if is_far.any():
        raise UserError(
            f"{path} holds {_listing(present[is_far], counts[is_far])}, which data.mask_colors "
            f"does not name: add them, with {IGNORE} for no label"
            f"{_hint_of_tolerance(path, differences.min(axis=1), counts)}.",
            code="mask-colors-unknown",
        )
    result[unknown] = values[nearest][inverse]
    return result


def _hint_of_tolerance(
    path: Any, distances: Int[np.ndarray, " colors"], counts: Int[np.ndarray, " colors"]
) -> str:
    """Returns words on `data.mask_tolerance` where it would take in most of the unknown pixels."""
    if format_of(path) in ("JPEG", "MPO"):
        return (
            ", or save the masks as PNGs from their source: this is a JPEG, whose compression "
            "changes colours where classes meet"
        )
    order = np.argsort(distances)
    share = np.cumsum(counts[order]) / counts.sum()
    needed = int(distances[order][np.searchsorted(share, 0.9)])
    return f", or set data.mask_tolerance to {needed}" if needed <= _SMALL_TOLERANCE else ""


def values_of_channel(path: Any, image: Image.Image, form: MaskFormat) -> UInt8[np.ndarray, "h w"]:
    """Returns the values in the channel that the format names.

    Args:
        path: of the file, for the error.
        image: the decoded mask, with three channels or more.
        form: with a channel.

    Raises:
        UserError: the channels differ where the format says that they are equal.
    """
    pixels = _rgb(image)
    if form.channel == "grey":
        differs = (pixels != pixels[..., :1]).any(axis=-1)
        if differs.any():
            raise UserError(
                f"{path} is not grey: its channels differ in {int(differs.sum())} pixels; read "
                "colours by data.mask_colors, or name the channel that holds the ids in "
                "data.mask_channel.",
                code="mask-not-grey",
            )
    return pixels[..., max(CHANNELS.index(form.channel) - 2, 0)]


def values_of_levels(image: Image.Image, form: MaskFormat) -> UInt8[np.ndarray, "h w"]:
    """Returns 1 from the threshold on, 0 below, by the grey levels as they are shown.

    Args:
        image: the decoded mask, in any mode of at most 8 bits; alpha is not read.
        form: with a threshold.
    """
    if image.mode == "La":
        image = image.convert("LA")
    return (np.asarray(image.convert("L")) >= form.threshold).astype(np.uint8)


def describe_colors(image: Image.Image) -> tuple[str, UInt8[np.ndarray, "h w"] | None]:
    """Returns the most frequent colours in words, and the grey levels if all colours are grey.

    Args:
        image: a decoded mask with three channels or more.
    """
    present, counts = np.unique(_codes(image), return_counts=True)
    channels = _channels(present)
    is_grey = bool((channels == channels[:, :1]).all())
    return _listing(present, counts), _rgb(image)[..., 0].copy() if is_grey else None


def _codes(image: Image.Image) -> Int[np.ndarray, "h w"]:
    """One integer for each pixel's colour."""
    pixels = _rgb(image).astype(np.int32)
    return (pixels[..., 0] << 16) | (pixels[..., 1] << 8) | pixels[..., 2]


def _rgb(image: Image.Image) -> UInt8[np.ndarray, "h w 3"]:
    if image.mode == "La":  # Pillow converts grey with premultiplied alpha to LA alone.
        image = image.convert("LA")
    return np.asarray(image.convert("RGB"))


def _code(color: Color) -> int:
    return (color[0] << 16) | (color[1] << 8) | color[2]


def _channels(codes: Int[np.ndarray, " colors"]) -> Int[np.ndarray, "colors 3"]:
    return np.stack([codes >> 16, (codes >> 8) & 255, codes & 255], axis=-1)


def _listing(codes: Int[np.ndarray, " colors"], counts: Int[np.ndarray, " colors"]) -> str:
    """Names colours with their numbers of pixels, the most frequent first."""
    order = np.argsort(-counts, kind="stable")[:_MAX_NAMED]
    named = [
        f"({', '.join(map(str, channels))}) in {count} {'pixel' if count == 1 else 'pixels'}"
        for channels, count in zip(_channels(codes[order]), counts[order], strict=True)
    ]
    more = f" and {len(codes) - len(named)} more colours" if len(codes) > len(named) else ""
    return f"the colours {', '.join(named)}{more}"
