"""Downscaled copies of a data set's files, written to the cache once."""

import dataclasses
import functools
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
from semiseg_jax.data.data_record import relative_path
from semiseg_jax.data.dataset import MAX_NAME_BYTES, Dataset, Example
from semiseg_jax.data.mask_format import VALUES
from semiseg_jax.runtime import fileio, hashes, rules
from semiseg_jax.runtime.paths import cache_dir

MAX_DOWNSCALE = 64
# The factors by which images are downscaled; `data.downscale` may also be open.
DOWNSCALE = rules.integer(1, MAX_DOWNSCALE)


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
    # Cached masks hold class ids, so that what they were read by is part of the folder's name.
    masks_as: tuple[Any, ...] = (dataset.table.tobytes(), dataset.palette)
    if dataset.mask_format != VALUES:
        masks_as += (dataset.mask_format,)
    cache_key = (os.path.realpath(root), *masks_as)
    digest = hashes.hash_bytes(repr(cache_key).encode(), 12)
    folder = cache_dir(data_config) / f"{dataset.name}-{digest}-by{factor}"

    read_mask = functools.partial(image_io.read_mask, table=dataset.table, form=dataset.mask_format)
    assert dataset.record is not None
    pixel_hashes = {f.path: f.pixel_hash for _, _, e in dataset.record.examples() for f in e.files}

    def cached_file(kind: str, source: str) -> epath.Path:
        pixel_hash = pixel_hashes[relative_path(source, dataset.root)]
        path = folder / kind / f"{_cache_path(source, root)}-{pixel_hash}.png"
        name = os.fsencode(path.stem)
        # The name is longer than that of the source, and a file system may refuse it.
        return path if len(name) <= MAX_NAME_BYTES else path.with_name(_short_name(name))

    def downscale_example(example: Example) -> Example:
        image = cached_file("images", example.image)
        if not image.exists():
            small = shrink_image(image_io.read_image(example.image), factor)
            buffer = io.BytesIO()
            Image.fromarray(small).save(buffer, "PNG", compress_level=1)
            fileio.write_bytes(image, buffer.getvalue(), sync=False)
        if example.mask is None:
            return dataclasses.replace(example, image=os.fspath(image))
        mask = cached_file("masks", example.mask)
        if not mask.exists():
            ids = Image.fromarray(read_mask(example.mask))
            small_ids = ids.resize(shrunk(ids.size, factor), Image.Resampling.NEAREST)
            png = image_io.encode_mask(np.asarray(small_ids), dataset.palette)
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
        mask_format=VALUES,
    )


def _cache_path(path: str, root: epath.Path) -> str:
    """Returns a file's relative path in the cache; a file outside `root` gets a hashed folder."""
    relative = os.path.relpath(path, root)
    if not relative.startswith(".."):
        return relative
    folder = hashes.hash_bytes(os.fsencode(os.path.realpath(os.path.dirname(path))), 12)
    return os.path.join(f"outside-{folder}", os.path.basename(path))


def _short_name(name: bytes) -> str:
    return f"{hashes.hash_bytes(name, 32)}.png"


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
