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
from PIL import Image

from semiseg_jax.data import image_io
from semiseg_jax.data.data_record import relative_path
from semiseg_jax.data.dataset import Dataset, Example
from semiseg_jax.runtime import fileio
from semiseg_jax.runtime.paths import cache_dir


def downscale_dataset(dataset: Dataset, root: epath.Path, data_config: Any) -> Dataset:
    """Returns the data set with every side divided by `data.downscale`.

    Images are resized bilinearly with antialiasing, masks by nearest neighbour. The name of a
    cached file contains the hash of its source's pixels, so that a changed source has another.

    Args:
        dataset: the data set to downscale, with its record.
        root: the folder of the source; paths in the cache are relative to it.
        data_config: `config.data`; `downscale` and `cache_dir` are read.
    """
    factor = data_config.downscale
    # Cached masks hold class ids, so the id table that produced them is part of the folder's name.
    cache_key = (os.path.realpath(root), dataset.table.tobytes(), dataset.palette)
    digest = hashlib.sha256(repr(cache_key).encode()).hexdigest()[:12]
    folder = cache_dir(data_config) / f"{dataset.name}-{digest}-by{factor}"

    assert dataset.record is not None
    hashes = {f.path: f.pixel_hash for _, _, e in dataset.record.examples() for f in e.files}

    def cached_file(kind: str, source: str) -> epath.Path:
        pixel_hash = hashes[relative_path(source, dataset.root)]
        return folder / kind / f"{_cache_path(source, root)}-{pixel_hash}.png"

    def downscale_example(example: Example) -> Example:
        image = cached_file("images", example.image)
        if not image.exists():
            pixels = Image.fromarray(image_io.read_image(example.image))
            small = pixels.resize(shrunk(pixels.size, factor), Image.Resampling.BILINEAR)
            buffer = io.BytesIO()
            small.save(buffer, "PNG", compress_level=1)
            fileio.write_bytes(image, buffer.getvalue(), sync=False)
        if example.mask is None:
            return dataclasses.replace(example, image=os.fspath(image))
        mask = cached_file("masks", example.mask)
        if not mask.exists():
            ids = Image.fromarray(image_io.read_mask(example.mask, dataset.table))
            small = ids.resize(shrunk(ids.size, factor), Image.Resampling.NEAREST)
            png = image_io.encode_mask(np.asarray(small), dataset.palette)
            fileio.write_bytes(mask, png, sync=False)
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


def shrunk(size: Sequence[int], factor: int) -> tuple[int, int]:
    """Returns both sides of a size in pixels divided by `factor`, rounded down, at least 1."""
    return max(size[0] // factor, 1), max(size[1] // factor, 1)
