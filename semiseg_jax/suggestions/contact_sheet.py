"""Pictures for people: the sheet of suggested images, and maps of where the network is unsure."""

import io
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from semiseg_jax.data import visualize

_TILE_WIDTH, _COLUMNS, _GAP, _TEXT = 300, 4, 10, 15
# Colours from sure to unsure: black, purple, orange, pale yellow, evenly spaced.
_COLORS = np.array([(0, 0, 0), (90, 20, 110), (230, 95, 40), (252, 250, 190)], np.float32)


def uncertainty_picture(entropy: Float[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h w 3"]:
    """Returns the entropy of each pixel, 0 to 1, in colours from black to pale yellow."""
    position = entropy.clip(0, 1) * (len(_COLORS) - 1)
    levels = np.arange(len(_COLORS))
    channels = [np.interp(position, levels, _COLORS[:, c]) for c in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def encode_png(picture: UInt8[np.ndarray, "h w 3"]) -> bytes:
    """Returns a picture as a PNG."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()


def draw(
    names: Sequence[str],
    images: Sequence[UInt8[np.ndarray, "_ _ 3"]],
    maps: Sequence[UInt8[np.ndarray, "_ _ 3"]],
) -> bytes:
    """Returns a JPEG of all images, each above its uncertainty map, with rank and name.

    Args:
        names: in the order of the ranks.
        images, maps: RGB, of any sizes.
    """
    tiles = [
        _tile(f"{rank}  {name}", image, uncertain)
        for rank, (name, image, uncertain) in enumerate(zip(names, images, maps, strict=True), 1)
    ]
    columns = min(_COLUMNS, len(tiles))
    rows = [tiles[i : i + columns] for i in range(0, len(tiles), columns)]
    heights = [max(tile.height for tile in row) for row in rows]
    width = columns * (_TILE_WIDTH + _GAP) + _GAP
    sheet = Image.new("RGB", (width, sum(heights) + _GAP * (len(rows) + 1)), visualize.PAPER)
    top = _GAP
    for row, height in zip(rows, heights, strict=True):
        for column, tile in enumerate(row):
            sheet.paste(tile, (_GAP + column * (_TILE_WIDTH + _GAP), top))
        top += height + _GAP
    buffer = io.BytesIO()
    sheet.save(buffer, "JPEG", quality=88)
    return buffer.getvalue()


def _tile(
    title: str, image: UInt8[np.ndarray, "h w 3"], uncertain: UInt8[np.ndarray, "_ _ 3"]
) -> Image.Image:
    # Tall images are limited, so that the sheet stays within what JPEG can hold.
    height = min(max(1, round(_TILE_WIDTH * image.shape[0] / image.shape[1])), 2 * _TILE_WIDTH)
    text = visualize.words(visualize.shorten(title, _TEXT, _TILE_WIDTH), _TEXT)
    tile = Image.new("RGB", (_TILE_WIDTH, text.height + 2 * height + 2), visualize.PAPER)
    tile.paste(text, (0, 0))
    for top, picture in ((text.height, image), (text.height + height + 2, uncertain)):
        resized = Image.fromarray(picture).resize((_TILE_WIDTH, height), Image.Resampling.BILINEAR)
        tile.paste(resized, (0, top))
    return tile
