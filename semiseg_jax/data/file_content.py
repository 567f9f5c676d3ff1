"""The content of image and mask files: each file is decoded once, and its content is remembered.

A file is read again only if its size, its inode or one of its times differs from when it was read.
The memory is a file in the cache folder. If it is lost, all files are read again.
"""

import dataclasses
import functools
import hashlib
import io
import json
import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import PIL
from etils import epath
from jaxtyping import UInt8
from PIL import Image

from semiseg_jax.data import image_header, image_io
from semiseg_jax.data.mask_format import VALUES, MaskFormat
from semiseg_jax.runtime import fileio, hashes, multihost
from semiseg_jax.runtime.errors import UserError
from semiseg_jax.runtime.logger import logger
from semiseg_jax.runtime.paths import default_cache_dir

# Folder of the remembered contents in the cache folder.
FOLDER = "file_content"
# Contents that another version of this module or of Pillow read are not used.
_VERSION = f"1, Pillow {PIL.__version__}"
# A file that changed less than this before it was read is not remembered: a second change within
# the resolution of the file system's clock (10 ms or less) would leave the same times.
_SETTLED_NS = 50_000_000
# Masks are read as the values in the file, so that no content depends on the classes of a config.
_MASK_VALUES = np.arange(256, dtype=np.int16)

# What tells whether a file changed: size, modification time, change time and inode; times in
# nanoseconds. In stores such as gs://, size and modification time.
FileState = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class FileContent:
    """What is in an image or mask file.

    Attributes:
        file_hash: a hash of the bytes of the file, 16 hex digits.
        pixel_hash: a hash of the size and the decoded pixels: RGB values of an image, values of a
            mask; 16 hex digits. Files of different formats may have the same pixels.
        size: (height, width) in pixels.
        is_blank: whether all pixels of an image have one colour; False for masks.
        values: for masks, the number of pixels by mask value.
        colors: for masks with a palette, the colour of each value in `values`, such as "ff0000".
    """

    file_hash: str
    pixel_hash: str
    size: tuple[int, int]
    is_blank: bool = False
    values: dict[int, int] = dataclasses.field(default_factory=dict)
    colors: dict[int, str] = dataclasses.field(default_factory=dict)

    def to_json(self) -> list[Any]:
        """Returns the fields in their order, for JSON."""
        return [getattr(self, field.name) for field in dataclasses.fields(self)]

    @classmethod
    def from_json(cls, fields: Any) -> "FileContent":
        """Returns the content that `to_json` converted; JSON turns the keys of dicts into strings.

        Raises:
            ValueError, TypeError, AttributeError: it has another form.
        """
        file_hash, pixel_hash, (height, width), is_blank, values, colors = fields
        return cls(
            str(file_hash),
            str(pixel_hash),
            (int(height), int(width)),
            bool(is_blank),
            {int(value): int(count) for value, count in values.items()},
            {int(value): str(color) for value, color in colors.items()},
        )


class FileCache:
    """Reads the content of files and remembers it.

    Threads may share it. Each process of a run writes what it has read to a file of its own, and
    loads the files of all processes.
    """

    def __init__(self, folder: epath.Path, name: str):
        """Loads the remembered contents.

        Args:
            folder: the folder of the remembered contents; created by `save`.
            name: start of the names of the files in it, without a suffix.
        """
        self._path = folder / f"{name}-{multihost.process_index()}.json"
        self._contents: dict[str, tuple[FileState, FileContent]] = {}
        self._has_new = False
        paths = sorted(folder.glob(f"{name}-*.json")) if folder.is_dir() else []
        # The own file last: where another one is older, the entries that replaced its entries win.
        for path in sorted(paths, key=lambda path: path == self._path):
            self._contents |= _load(path)

    def image(self, path: str) -> FileContent:
        """Returns the content of an image file.

        Raises:
            UserError: as `image_io.read_image`.
        """
        return self._content(path, "image", _read_image)

    def mask(self, path: str, form: MaskFormat = VALUES) -> FileContent:
        """Returns the content of a mask file.

        Args:
            path: of the file.
            form: how its pixels hold its values.

        Raises:
            UserError: as `image_io.read_mask`, but not for unknown values.
        """
        # In another format the same file has other values.
        digest = hashes.hash_bytes(repr(form).encode(), 8)
        kind = "mask" if form == VALUES else f"mask {digest}"
        return self._content(path, kind, functools.partial(_read_mask, form=form))

    def _content(self, path: str, kind: str, read: Callable[[str], FileContent]) -> FileContent:
        key = f"{kind} {path if '://' in path else os.path.abspath(path)}"
        state = file_state(path)
        known = self._contents.get(key)
        if state is not None and known is not None and known[0] == state:
            # The limit may be lower than when the file was decoded.
            image_header.check_num_pixels(path, known[1].size[::-1])
            return known[1]
        content = read(path)
        if state is not None and state == file_state(path) and _is_settled(state):
            self._contents[key] = state, content
            self._has_new = True
        return content

    def save(self) -> None:
        """Writes what was read since the last call; logs a line if the folder is not writable."""
        if not self._has_new:
            return
        files = {key: [state, c.to_json()] for key, (state, c) in self._contents.items()}
        content = json.dumps({"version": _VERSION, "files": files}).encode()
        self._has_new = False
        try:
            fileio.write_bytes(self._path, content, sync=False)
        except UserError as error:
            logger.info(f"The next start reads all images again: {error}")


@functools.cache
def _open(folder: str, name: str) -> FileCache:
    return FileCache(epath.Path(folder), name)


def open_cache(cache_folder: str, root: epath.PathLike) -> FileCache:
    """Returns the cache of a data set; in a process always the same object.

    Args:
        cache_folder: `data.cache_dir`; "" for the default.
        root: the folder of the data set.
    """
    root = os.fspath(root)
    root = root if "://" in root else os.path.realpath(root)
    name = hashes.hash_bytes(os.fsencode(root), 12)
    return _open(os.fspath(default_cache_dir(cache_folder) / FOLDER), name)


def file_state(path: str) -> FileState | None:
    """Returns the state of a file; None if there is none or it cannot be told."""
    try:
        if "://" in path:
            remote = epath.Path(path).stat()
            return int(remote.length), int(remote.mtime or 0)
        stat = os.stat(path)
    except (OSError, ValueError):
        return None
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino


def _is_settled(state: FileState) -> bool:
    return len(state) < 4 or state[2] < time.time_ns() - _SETTLED_NS


def _load(path: epath.Path) -> dict[str, tuple[FileState, FileContent]]:
    """Returns the contents in a file that `FileCache.save` wrote; none if it is not readable."""
    try:
        stored = fileio.parse_json(path.read_text())
        if stored["version"] != _VERSION:
            return {}
        return {
            key: (tuple(state), FileContent.from_json(content))
            for key, (state, content) in stored["files"].items()
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def _hash(*parts: Any) -> str:
    digest = hashlib.blake2b(digest_size=8)  # Faster than SHA-256 on CPUs without SHA extensions.
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _pixel_hash(pixels: UInt8[np.ndarray, "h w *channels"]) -> str:
    return _hash(repr(pixels.shape).encode(), np.ascontiguousarray(pixels))


def _read_image(path: str) -> FileContent:
    try:
        pixels = image_io.read_image(path)
    except UserError:
        image_io.image_size(path)  # Raises a more specific error if the header is damaged.
        raise
    first = pixels[:1, :1]
    is_blank = bool((pixels[:1] == first).all() and (pixels == first).all())
    height, width = pixels.shape[:2]
    return FileContent(_hash(_bytes(path)), _pixel_hash(pixels), (height, width), is_blank)


def _read_mask(path: str, form: MaskFormat = VALUES) -> FileContent:
    pixels = image_io.read_mask(path, _MASK_VALUES, form)
    content = _bytes(path)
    # Pillow counts bytes several times faster than NumPy.
    counts = Image.fromarray(pixels).histogram()
    values = {value: count for value, count in enumerate(counts) if count}
    colors = {} if form.gives_classes else _palette_colors(content, values)
    height, width = pixels.shape
    size = (height, width)
    return FileContent(_hash(content), _pixel_hash(pixels), size, False, values, colors)


def _bytes(path: str) -> bytes:
    return epath.Path(path).read_bytes()


def _palette_colors(content: bytes, values: dict[int, int]) -> dict[int, str]:
    """Returns the palette's colour of each value; empty for a file without a palette.

    The file has been decoded before; here only its header is read.
    """
    with Image.open(io.BytesIO(content), formats=image_header.FORMATS) as image:
        palette = (image.getpalette("RGB") or []) if image.mode == "P" else []
    return {v: bytes(palette[3 * v : 3 * v + 3]).hex() for v in values if 3 * v + 3 <= len(palette)}
