"""Data sets whose files are resized once, into the cache."""

import dataclasses
import hashlib
import io
import os
from collections.abc import Sequence
from concurrent import futures
from typing import Any

import numpy as np
from etils import epath
from PIL import Image

from semiseg_jax.data import labels
from semiseg_jax.data.examples import Dataset, Example
from semiseg_jax.data.places import cache_dir


def downscaled(dataset: Dataset, root: epath.Path, data_config: Any) -> Dataset:
    """The data set with every file `data.downscale` times smaller a side.

    Images bilinear and antialiased, masks nearest. A cached file has the time stamp of its
    source, and is made again when they differ.

    Args:
        dataset: to shrink.
        root: of the source; its part of the files' paths is left out of the cache.
        data_config: `config.data`; `downscale` and `cache_dir` are read.
    """
    factor = data_config.downscale
    # Cached masks are class ids already, so the table they were made by is part of their name.
    made_from = (os.path.realpath(root), dataset.table.tobytes(), dataset.palette)
    key = hashlib.sha256(repr(made_from).encode()).hexdigest()[:12]
    folder = cache_dir(data_config) / f"{dataset.name}-{key}-by{factor}"

    def shrink(example: Example) -> Example:
        image = folder / "images" / f"{_place(example.image, root)}.png"
        if _outdated(image, example.image):
            pixels = Image.fromarray(labels.read_image(example.image))
            small = pixels.resize(shrunk(pixels.size, factor), Image.Resampling.BILINEAR)
            _write_as_old_as(image, _png(small), example.image)
        if example.mask is None:
            return dataclasses.replace(example, image=os.fspath(image))
        mask = folder / "masks" / f"{_place(example.mask, root)}.png"
        if _outdated(mask, example.mask):
            ids = Image.fromarray(labels.read_mask(example.mask, dataset.table))
            small = ids.resize(shrunk(ids.size, factor), Image.Resampling.NEAREST)
            png = labels.encode_mask(np.asarray(small), dataset.palette)
            _write_as_old_as(mask, png, example.mask)
        return Example(example.id, os.fspath(image), os.fspath(mask))

    with futures.ThreadPoolExecutor() as pool:
        parts = [
            tuple(pool.map(shrink, part))
            for part in (
                dataset.labeled,
                dataset.unlabeled,
                dataset.evaluation,
                dataset.selection,
            )
        ]
    return dataclasses.replace(
        dataset,
        name=f"{dataset.name}_by{factor}",
        labeled=parts[0],
        unlabeled=parts[1],
        evaluation=parts[2],
        selection=parts[3],
        table=labels.id_table(len(dataset.classes)),
    )


def _place(path: str, root: epath.Path) -> str:
    """Where a file goes below the cache's folder, also one that does not lie below the root."""
    relative = os.path.relpath(path, root)
    if not relative.startswith(".."):
        return relative
    folder = hashlib.sha256(os.path.realpath(os.path.dirname(path)).encode()).hexdigest()[:12]
    return os.path.join(f"outside-{folder}", os.path.basename(path))


def _outdated(cached: epath.Path, source: str) -> bool:
    return not cached.exists() or os.stat(cached).st_mtime_ns != os.stat(source).st_mtime_ns


def _write_as_old_as(path: epath.Path, content: bytes, source: str) -> None:
    labels.write_bytes(path, content, sync=False)
    stamp = os.stat(source).st_mtime_ns
    os.utime(path, ns=(stamp, stamp))


def shrunk(size: Sequence[int], factor: int) -> tuple[int, int]:
    """A size in pixels, divided."""
    return max(size[0] // factor, 1), max(size[1] // factor, 1)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
