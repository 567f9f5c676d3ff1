"""Downscaled copies of a data set's files, written to the cache once."""

import dataclasses
import hashlib
import io
import os
from collections.abc import Sequence
from concurrent import futures
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import UInt8
from PIL import Image

from semiseg_jax.data import image_io
from semiseg_jax.data.dataset import Dataset, Example
from semiseg_jax.runtime import fileio, rules
from semiseg_jax.runtime.paths import cache_dir

# The factors that `data.downscale` accepts.
DOWNSCALE = rules.integer(1, 64)


def downscale_dataset(dataset: Dataset, root: epath.Path, data_config: Any) -> Dataset:
    """Returns the data set with every side divided by `data.downscale`.

    Images are resized bilinearly with antialiasing, masks by nearest neighbour. A cached file has
    the modification time of its source and is written again when the two differ.

    Args:
        dataset: the data set to downscale.
        root: the folder of the source; paths in the cache are relative to it.
        data_config: `config.data`; `downscale` and `cache_dir` are read.
    """
    factor = data_config.downscale
    # Cached masks hold class ids, so the id table that produced them is part of the folder's name.
    cache_key = (os.path.realpath(root), dataset.table.tobytes(), dataset.palette)
    digest = hashlib.sha256(repr(cache_key).encode()).hexdigest()[:12]
    folder = cache_dir(data_config) / f"{dataset.name}-{digest}-by{factor}"

    def downscale_example(example: Example) -> Example:
        image = folder / "images" / f"{_cache_path(example.image, root)}.png"
        if _is_outdated(image, example.image):
            small = shrink_image(image_io.read_image(example.image), factor)
            buffer = io.BytesIO()
            Image.fromarray(small).save(buffer, "PNG", compress_level=1)
            _write_with_mtime_of(example.image, image, buffer.getvalue())
        if example.mask is None:
            return dataclasses.replace(example, image=os.fspath(image))
        mask = folder / "masks" / f"{_cache_path(example.mask, root)}.png"
        if _is_outdated(mask, example.mask):
            ids = Image.fromarray(image_io.read_mask(example.mask, dataset.table))
            small = ids.resize(shrunk(ids.size, factor), Image.Resampling.NEAREST)
            png = image_io.encode_mask(np.asarray(small), dataset.palette)
            _write_with_mtime_of(example.mask, mask, png)
        return dataclasses.replace(example, image=os.fspath(image), mask=os.fspath(mask))

    with futures.ThreadPoolExecutor() as pool:
        labeled, unlabeled, evaluation, selection = (
            tuple(pool.map(downscale_example, examples))
            for examples in (
                dataset.labeled,
                dataset.unlabeled,
                dataset.evaluation,
                dataset.selection,
            )
        )
    return dataclasses.replace(
        dataset,
        name=f"{dataset.name}_by{factor}",
        labeled=labeled,
        unlabeled=unlabeled,
        evaluation=evaluation,
        selection=selection,
        table=image_io.id_table(len(dataset.classes)),
    )


def _cache_path(path: str, root: epath.Path) -> str:
    """Returns a file's relative path in the cache; a file outside `root` gets a hashed folder."""
    relative = os.path.relpath(path, root)
    if not relative.startswith(".."):
        return relative
    folder = hashlib.sha256(os.path.realpath(os.path.dirname(path)).encode()).hexdigest()[:12]
    return os.path.join(f"outside-{folder}", os.path.basename(path))


def _is_outdated(cached: epath.Path, source: str) -> bool:
    return not cached.exists() or os.stat(cached).st_mtime_ns != os.stat(source).st_mtime_ns


def _write_with_mtime_of(source: str, path: epath.Path, content: bytes) -> None:
    """Writes a file and gives it the modification time of `source`."""
    fileio.write_bytes(path, content, sync=False)
    mtime = os.stat(source).st_mtime_ns
    os.utime(path, ns=(mtime, mtime))


def shrink_image(image: UInt8[np.ndarray, "h w 3"], factor: int) -> UInt8[np.ndarray, "sh sw 3"]:
    """Returns an RGB image with every side divided by `factor`; bilinear with antialiasing.

    Training, evaluation and prediction all downscale by this function.
    """
    if factor == 1:
        return image
    pixels = Image.fromarray(image)
    return np.asarray(pixels.resize(shrunk(pixels.size, factor), Image.Resampling.BILINEAR))


def shrunk(size: Sequence[int], factor: int) -> tuple[int, int]:
    """Returns both sides of a size in pixels divided by `factor`, rounded down, at least 1."""
    return max(size[0] // factor, 1), max(size[1] // factor, 1)
