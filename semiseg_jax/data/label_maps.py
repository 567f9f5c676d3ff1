"""The label maps that a run writes: PNGs that name their image and hold a hash of their pixels.

A label map that was exchanged with another image's, or whose pixels were changed, is detected when
it is read. Label maps of older code, and masks from elsewhere, hold neither and are read without
this check.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence

import numpy as np
from etils import epath
from jaxtyping import Int16, UInt8

from semiseg_jax.data import image_io
from semiseg_jax.runtime.errors import UserError

# Text chunks of a label map.
_IMAGE_ID, _PIXELS = "id", "pixels"


def encode(
    labels: UInt8[np.ndarray, "h w"],
    palette: Sequence[Sequence[int]],
    image_id: str,
    text: Mapping[str, str],
) -> bytes:
    """Encodes the label map of an image as a palette PNG.

    Args:
        labels: class ids and IGNORE.
        palette: (R, G, B) of each class.
        image_id: id of the image.
        text: more text chunks.
    """
    own = {_IMAGE_ID: json.dumps(image_id), _PIXELS: _pixel_hash(labels)}
    return image_io.encode_mask(labels, palette, {**text, **own})


def read(
    path: epath.PathLike, image_id: str, table: Int16[np.ndarray, "256"]
) -> UInt8[np.ndarray, "h w"]:
    """Reads the label map of an image: class ids and IGNORE.

    Args:
        path: of a file that `encode` wrote, or of any mask.
        image_id: id of the image.
        table: from `image_io.id_table`.

    Raises:
        UserError: the file is missing or damaged, is another image's, or was changed; or as
            `image_io.read_mask`.
    """
    values, text = image_io.read_png(path)
    if _PIXELS not in text:
        return image_io.read_mask(path, table)
    _check(path, image_id, values, text)
    return table.astype(np.uint8)[values]


def read_text(path: epath.PathLike, image_id: str) -> dict[str, str]:
    """Returns the text chunks of the label map of an image; checks its pixels, too.

    Raises:
        UserError: the file is missing or damaged, is another image's, or was changed.
    """
    values, text = image_io.read_png(path)
    if _PIXELS in text:
        _check(path, image_id, values, text)
    return text


def _check(
    path: epath.PathLike, image_id: str, values: UInt8[np.ndarray, "..."], text: Mapping[str, str]
) -> None:
    if text.get(_IMAGE_ID) != json.dumps(image_id) or text[_PIXELS] != _pixel_hash(values):
        raise UserError(
            f"{path} is not the label map that was written for {image_id}, or was changed: start "
            "the run's command again, which makes it anew.",
            code="label-map-changed",
        )


def _pixel_hash(values: UInt8[np.ndarray, "..."]) -> str:
    """Returns a hash of the shape and the values of a label map, 16 hex digits."""
    digest = hashlib.sha256(repr(values.shape).encode())
    digest.update(np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()[:16]
