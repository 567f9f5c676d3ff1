"""Pictures for people: label maps laid over images, words, and the legend of classes."""

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

Picture = UInt8[np.ndarray, "h w 3"]


def overlay(
    image: Picture, label: UInt8[np.ndarray, "h w"], palette: Sequence[Sequence[int]]
) -> Picture:
    """The image with its labels' colours over it; unlabelled pixels as they are."""
    colours = labels.full_palette(palette)[label]
    mixed = image + _OPACITY * (colours - image.astype(np.float32))
    labelled = (label != labels.IGNORE)[..., None]
    return np.where(labelled, np.round(mixed), image).astype(np.uint8)


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


def legend(entries: Iterable[tuple[str, Sequence[int]]], width: int) -> Image.Image:
    """Colours, each with what it stands for, in rows of at most `width` pixels."""
    swatch, line = 18, 28
    letters, places, x, y = font(TEXT), [], 0, 0
    for name, colour in entries:
        name = shortened(name, TEXT, width - swatch - 6)
        needed = swatch + 6 + round(letters.getlength(name)) + 22
        if x and x + needed > width:
            x, y = 0, y + line
        places.append((name, colour, x, y))
        x += needed
    image = Image.new("RGB", (width, y + line), PAPER)
    draw = ImageDraw.Draw(image)
    for name, colour, x, y in places:
        draw.rectangle((x, y + 1, x + swatch, y + 1 + swatch), tuple(colour), PALE)
        draw.text((x + swatch + 6, y), name, INK, letters)
    return image
