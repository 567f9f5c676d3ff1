"""Images for display: label overlays, lines of text, and class legends."""

import functools
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from semiseg_jax.data import fonts, image_io

# Colours of text, of secondary text, and of the background.
TEXT_COLOUR, SECONDARY_COLOUR, PAPER = (28, 30, 34), (112, 117, 125), (255, 255, 255)
# Default font size of a legend in pixels.
TEXT = 17
# Opacity of the class colours in an overlay.
_OPACITY = 0.55
# `with_legend` reduces images to this longest side in pixels, and enlarges them to this width
# by a factor of at most _MAX_ENLARGEMENT.
_MAX_SIDE, _MIN_WIDTH, _MAX_ENLARGEMENT = 2048, 240, 8
# Below this width in pixels, the legend has the small font size.
_SMALL_TEXT_BELOW_WIDTH, _SMALL_TEXT = 480, 12
# The margin around a legend in pixels.
_GAP = 6

Picture = UInt8[np.ndarray, "h w 3"]


def overlay(
    image: Picture, label: UInt8[np.ndarray, "h w"], palette: Sequence[Sequence[int]]
) -> Picture:
    """Blends the colours of the labels over an image; pixels labelled IGNORE stay unchanged."""
    blended = np.asarray(_blend(Image.fromarray(image), Image.fromarray(label), palette))
    ignored = label == image_io.IGNORE
    return np.where(ignored[..., None], image, blended) if ignored.any() else blended


def _blend(image: Image.Image, label: Image.Image, palette: Sequence[Sequence[int]]) -> Image.Image:
    """Blends the colours of all labels over an image; Pillow is four times as fast as NumPy.

    Args:
        image: RGB.
        label: class ids as grey levels; the function attaches the palette to it.
        palette: colours of the classes.
    """
    label.putpalette(image_io.full_palette(palette).tobytes())
    return Image.blend(image, label.convert("RGB"), _OPACITY)


@functools.cache
def _default_font(size: int) -> Any:
    # Pillow's built-in font, so that the images are equal on every machine.
    return ImageFont.load_default(size)


@functools.lru_cache(maxsize=1024)
def _has_glyph(character: str) -> bool:
    """Returns whether Pillow's built-in font has a glyph for a character."""
    font = _default_font(TEXT)
    no_character = "\uffff"
    return bytes(font.getmask(character)) != bytes(font.getmask(no_character))


def _font(text: str, size: int) -> tuple[str, Any]:
    """Returns what to draw for a text, and the font for it; see `fonts.choose`."""
    text, path = fonts.choose(text, _has_glyph)
    return text, _default_font(size) if path is None else ImageFont.truetype(path, size)


def words(text: str, size: int, colour: tuple[int, int, int] = TEXT_COLOUR) -> Image.Image:
    """Draws one line of text on the background colour; `size` is the font size in pixels."""
    text, font = _font(text, size)
    image = Image.new("RGB", (round(font.getlength(text)) + 2, round(1.35 * size)), PAPER)
    ImageDraw.Draw(image).text((0, 0), text, colour, font)
    return image


def shorten(text: str, size: int, width: int) -> str:
    """Replaces the middle of a text by "…" until it is at most `width` pixels wide."""
    # The font must also have the "…".
    text, font = _font(f"{text}…", size)
    text = shortened = text.removesuffix("…")
    while font.getlength(shortened) > width and len(text) > 2:
        text = text[: len(text) // 2 - 1] + text[len(text) // 2 + 1 :]
        shortened = text[: len(text) // 2] + "…" + text[len(text) // 2 :]
    return shortened


def legend(
    entries: Iterable[tuple[str, Sequence[int]]],
    width: int,
    shares: Iterable[float] = (),
    text: int = TEXT,
) -> Image.Image:
    """Draws a legend of colours and names in rows of at most `width` pixels.

    Args:
        entries: (name, colour) of each entry.
        width: in pixels.
        shares: a fraction 0..1 per entry, printed after its name; none by default.
        text: font size in pixels.
    """
    space, row_height, share_width = round(1.3 * text), _row_height(text), round(3.5 * text)
    placed, x, y = [], 0, 0
    for (name, colour), share in itertools.zip_longest(entries, shares):
        rgb = (colour[0], colour[1], colour[2])
        images = [_legend_entry(name, rgb, width - share_width, text)]
        if share is not None:
            images.append(
                _cached_words(f" {100 * share:.0f} %" if share >= 0.01 else " < 1 %", text)
            )
        entry_width = sum(image.width for image in images)
        if x and x + entry_width + space > width:
            x, y = 0, y + row_height
        for image in images:
            placed.append((image, (x, y)))
            x += image.width
        x += space
    sheet = Image.new("RGB", (width, y + row_height), PAPER)
    for image, corner in placed:
        sheet.paste(image, corner)
    return sheet


# Drawing text takes most of the time of an overlay, and the same texts recur. Names and shares
# are cached separately, because their combinations hardly ever recur.
@functools.lru_cache(maxsize=4096)
def _legend_entry(name: str, colour: tuple[int, int, int], width: int, text: int) -> Image.Image:
    """Draws a colour swatch and its name."""
    swatch, text_left = text + 1, text + 7
    name_image = words(shorten(name, text, width - text_left), text)
    image = Image.new("RGB", (text_left + name_image.width, _row_height(text)), PAPER)
    ImageDraw.Draw(image).rectangle((0, 1, swatch, 1 + swatch), colour, SECONDARY_COLOUR)
    image.paste(name_image, (text_left, 0))
    return image


def _row_height(text: int) -> int:
    """Returns the height of a legend's row in pixels."""
    return round(1.65 * text)


@functools.lru_cache(maxsize=256)
def _cached_words(text: str, size: int) -> Image.Image:
    return words(text, size)


def with_legend(
    image: Picture,
    classes: UInt8[np.ndarray, "h w"],
    names: Sequence[str],
    palette: Sequence[Sequence[int]],
) -> Image.Image:
    """Draws the classes over an image, above a legend with the names and shares of the classes.

    Images of more than 2,048 pixels a side are reduced. Small images are enlarged by a whole
    factor, so that the legend has room.

    Args:
        image: RGB.
        classes: class ids; no pixel is IGNORE.
        names: names of the classes in id order.
        palette: colours of the classes in id order.
    """
    # Pillow counts bytes twice as fast as NumPy, and the blend needs Pillow's images anyway.
    background, class_map = Image.fromarray(image), Image.fromarray(classes)
    counts = np.array(class_map.histogram())
    factor = -(-max(classes.shape) // _MAX_SIDE)
    if factor > 1:
        background = background.reduce(factor)
        # The class at the centre of each block of pixels that is reduced to one pixel.
        rows, columns = (
            np.minimum(np.arange(n) * factor + factor // 2, full - 1)
            for n, full in zip(reversed(background.size), classes.shape, strict=True)
        )
        class_map = Image.fromarray(classes[rows[:, None], columns])
    picture = _blend(background, class_map, palette)
    enlargement = min(-(-_MIN_WIDTH // picture.width), _MAX_ENLARGEMENT)
    size = (picture.width * enlargement, picture.height * enlargement)
    picture = picture.resize(size, Image.Resampling.NEAREST)
    present = np.flatnonzero(counts).tolist()
    entries = [(names[i], palette[i]) for i in present]
    shares = counts[present] / counts.sum()
    text = TEXT if picture.width >= _SMALL_TEXT_BELOW_WIDTH else _SMALL_TEXT
    legend_image = legend(entries, max(picture.width, _MIN_WIDTH) - 2 * _GAP, shares, text)
    size = (legend_image.width + 2 * _GAP, picture.height + legend_image.height + 2 * _GAP)
    sheet = Image.new("RGB", size, PAPER)
    sheet.paste(picture, (0, 0))
    sheet.paste(legend_image, (_GAP, picture.height + _GAP))
    return sheet
