"""Pictures for people: label maps laid over images, words, and the legend of classes."""

import functools
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from semiseg_jax.data import labels

INK, PALE, PAPER = (28, 30, 34), (112, 117, 125), (255, 255, 255)
# Height of a legend's letters, in pixels.
TEXT = 17
# Share of a class's colour in what is laid over an image.
_OPACITY = 0.55
# A picture's longest side at most, and its shortest width if enlarging by so much gives it; below
# the second width a legend has the small letters.
_LARGEST, _SMALLEST, _MOST_ENLARGED = 2048, 240, 8
_SMALL_BELOW, _SMALL_TEXT = 480, 12
# Around a legend, in pixels.
_GAP = 6

Picture = UInt8[np.ndarray, "h w 3"]


def overlay(
    image: Picture, label: UInt8[np.ndarray, "h w"], palette: Sequence[Sequence[int]]
) -> Picture:
    """The image with its labels' colours over it; unlabelled pixels as they are."""
    mixed = np.asarray(_mixed(Image.fromarray(image), Image.fromarray(label), palette))
    unlabelled = label == labels.IGNORE
    return np.where(unlabelled[..., None], image, mixed) if unlabelled.any() else mixed


def _mixed(image: Image.Image, label: Image.Image, palette: Sequence[Sequence[int]]) -> Image.Image:
    """The image with the colours of all labels over it; Pillow mixes four times as fast as NumPy.

    Args:
        image: RGB.
        label: grey levels that are class ids; it has the palette afterwards.
        palette: their colours.
    """
    label.putpalette(labels.full_palette(palette).tobytes())
    return Image.blend(image, label.convert("RGB"), _OPACITY)


def font(size: int) -> Any:
    """Pillow's own, so that pictures are the same everywhere; `size` in pixels."""
    return ImageFont.load_default(size)


def words(text: str, size: int, colour: tuple[int, int, int] = INK) -> Image.Image:
    """One line of text on paper."""
    letters = font(size)
    image = Image.new("RGB", (round(letters.getlength(text)) + 2, round(1.35 * size)), PAPER)
    ImageDraw.Draw(image).text((0, 0), text, colour, letters)
    return image


def shortened(text: str, size: int, width: int) -> str:
    """The text, its middle left out where it is wider than `width` pixels."""
    letters, kept = font(size), text
    while letters.getlength(kept) > width and len(text) > 2:
        text = text[: len(text) // 2 - 1] + text[len(text) // 2 + 1 :]
        kept = text[: len(text) // 2] + "…" + text[len(text) // 2 :]
    return kept


def legend(
    entries: Iterable[tuple[str, Sequence[int]]],
    width: int,
    shares: Iterable[float] = (),
    text: int = TEXT,
) -> Image.Image:
    """Colours, each with what it stands for, in rows of at most `width` pixels.

    Args:
        entries: (name, colour) of each.
        width: in pixels.
        shares: of each, in 0..1, to stand behind its name; none by default.
        text: height of the letters, in pixels.
    """
    between, line, for_share = round(1.3 * text), _line(text), round(3.5 * text)
    places, x, y = [], 0, 0
    for (name, colour), share in itertools.zip_longest(entries, shares):
        parts = [_entry(name, (colour[0], colour[1], colour[2]), width - for_share, text)]
        if share is not None:
            parts.append(_words_again(_percent(share), text))
        taken = sum(part.width for part in parts)
        if x and x + taken + between > width:
            x, y = 0, y + line
        for part in parts:
            places.append((part, (x, y)))
            x += part.width
        x += between
    image = Image.new("RGB", (width, y + line), PAPER)
    for part, place in places:
        image.paste(part, place)
    return image


# Drawing letters takes longer than all else about an overlay, and the same ones come again: names
# and shares each by themselves, because together they would be nearly always new.
@functools.lru_cache(maxsize=4096)
def _entry(name: str, colour: tuple[int, int, int], width: int, text: int) -> Image.Image:
    """A colour and its name."""
    swatch, after = text + 1, text + 7
    name_drawn = words(shortened(name, text, width - after), text)
    image = Image.new("RGB", (after + name_drawn.width, _line(text)), PAPER)
    ImageDraw.Draw(image).rectangle((0, 1, swatch, 1 + swatch), colour, PALE)
    image.paste(name_drawn, (after, 0))
    return image


def _line(text: int) -> int:
    """Height of a legend's row, in pixels."""
    return round(1.65 * text)


@functools.lru_cache(maxsize=256)
def _words_again(word: str, text: int) -> Image.Image:
    return words(word, text)


def _percent(share: float) -> str:
    return f" {100 * share:.0f} %" if share >= 0.01 else " < 1 %"


def with_legend(
    image: Picture,
    classes: UInt8[np.ndarray, "h w"],
    names: Sequence[str],
    palette: Sequence[Sequence[int]],
) -> Image.Image:
    """A picture to look at: the classes' colours over the image, above their names and shares.

    Images of more than 2,048 pixels a side are shown smaller, and small ones enlarged by whole
    pixels, so that the legend has room.

    Args:
        image: to lay the colours over.
        classes: ids of all pixels, none of them IGNORE.
        names: of the classes.
        palette: their colours.
    """
    # Pillow counts bytes twice as fast as NumPy, and its images need not be made again.
    below, above = Image.fromarray(image), Image.fromarray(classes)
    counts = np.array(above.histogram())
    factor = -(-max(classes.shape) // _LARGEST)
    if factor > 1:
        below = below.reduce(factor)
        # The middle of each block of pixels that became one.
        rows, columns = (
            np.minimum(np.arange(n) * factor + factor // 2, full - 1)
            for n, full in zip(reversed(below.size), classes.shape, strict=True)
        )
        above = Image.fromarray(classes[rows[:, None], columns])
    picture = _mixed(below, above, palette)
    enlarged = min(-(-_SMALLEST // picture.width), _MOST_ENLARGED)
    size = (picture.width * enlarged, picture.height * enlarged)
    picture = picture.resize(size, Image.Resampling.NEAREST)
    present = np.flatnonzero(counts).tolist()
    entries = [(names[i], palette[i]) for i in present]
    shares = counts[present] / counts.sum()
    text = TEXT if picture.width >= _SMALL_BELOW else _SMALL_TEXT
    words_below = legend(entries, max(picture.width, _SMALLEST) - 2 * _GAP, shares, text)
    size = (words_below.width + 2 * _GAP, picture.height + words_below.height + 2 * _GAP)
    sheet = Image.new("RGB", size, PAPER)
    sheet.paste(picture, (0, 0))
    sheet.paste(words_below, (_GAP, picture.height + _GAP))
    return sheet
