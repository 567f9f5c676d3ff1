"""Features of a frozen backbone, kept on disk for images that are always shown alike."""

import contextlib
import dataclasses
import functools
import io
import zipfile
from collections.abc import Callable, Generator
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from jaxtyping import UInt8

from semiseg_jax import models
from semiseg_jax.data.batch_layout import BatchSpec, lay_out_batch
from semiseg_jax.data.input_pipeline import TrainBatch
from semiseg_jax.runtime import fileio, hashes, multihost
from semiseg_jax.runtime.errors import read_error
from semiseg_jax.runtime.logger import logger
from semiseg_jax.train_state import Variables


class FeatureCache:
    """Computes the features of each image once, and reads them from a file from then on.

    A file is found by the pixels of the image as the network sees it, by the values of the
    backbone's weights, and by all else that features depend on: the network's attributes and code,
    the version of JAX and the kind of device. With any of them changed other files are read, so
    that none is ever stale. The folder may be deleted at any time.

    An image is computed on its own, so that its features do not depend on the images beside it, and
    a resumed run has the same bits, whichever of its files it finds.

    Attributes:
        folder: with the files of this backbone.

    Args:
        folder: with the files of all backbones; it need not exist.
        model: the network, with `encode`.
        variables: of the network; those of the backbone are copied.
    """

    def __init__(self, folder: epath.Path, model: nn.Module, variables: Variables):
        own = {
            name: {"backbone": collection["backbone"]}
            for name, collection in variables.items()
            if "backbone" in collection and name != "batch_stats_strong"
        }
        own = jax.device_get(own)
        device = jax.local_devices()[0]
        names = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(own)}
        rules = (
            # The number of classes belongs to the head.
            repr(model.clone(num_classes=2)),  # type: ignore[call-arg]
            device.device_kind,
            jax.__version__,
            _code_hash(),
            hashes.hash_arrays(names),
        )
        self.folder = folder / hashes.hash_json(rules)
        self._encode = functools.partial(_jit_encode(model), jax.device_put(own, device))
        self._device = device
        self._is_announced = False

    def with_features(
        self, batches: Generator[TrainBatch], spec: BatchSpec, mesh: Mesh
    ) -> Generator[TrainBatch]:
        """Yields the batches of a process with the features of their weak images.

        Args:
            batches: from `input_pipeline.train_batches`.
            spec: composition of the batches.
            mesh: that the batches are laid out for.

        Raises:
            UserError: a file cannot be read or written.
        """
        layout = lay_out_batch(
            spec, mesh.size, multihost.process_index(), multihost.process_count()
        )
        with contextlib.closing(batches):
            for batch in batches:
                features = self.features(batch.image[~layout.strong])
                yield dataclasses.replace(batch, features=features)

    def features(self, images: UInt8[np.ndarray, "n h w 3"]) -> Any:
        """Returns the features of images, arrays [n, ...] in a `segmenter.Features`.

        Args:
            images: RGB, as the network sees them; at least one.

        Raises:
            UserError: a file cannot be read or written.
        """
        shapes = jax.eval_shape(self._encode, jax.ShapeDtypeStruct(images.shape[1:], np.uint8))
        expected, tree = jax.tree.flatten(shapes)
        if not self._is_announced:
            size = sum(leaf.size * leaf.dtype.itemsize for leaf in expected)
            logger.info(
                f"features of the images are kept in {self.folder}, {size / 1e6:.1f} MB each"
            )
            self._is_announced = True
        of_images = [self._of_image(image, expected) for image in images]
        return jax.tree.unflatten(
            tree, [np.stack(leaves) for leaves in zip(*of_images, strict=True)]
        )

    def _of_image(
        self, image: UInt8[np.ndarray, "h w 3"], expected: list[jax.ShapeDtypeStruct]
    ) -> list[np.ndarray]:
        """Returns the leaves of the features of an image, without an axis for images."""
        pixels = np.ascontiguousarray(image).tobytes()
        name = hashes.hash_bytes(repr(image.shape).encode() + pixels, 32)
        path = self.folder / name[:2] / f"{name}.npz"
        leaves = _read(path, expected)
        if leaves is None:
            computed = self._encode(jax.device_put(image, self._device))
            leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(computed)]
            _write(path, leaves)
        return leaves


@functools.cache
def _code_hash() -> str:
    """Returns a hash of the code of the networks."""
    return hashes.hash_files(*sorted(epath.Path(models.__path__[0]).glob("*.py")))


# Stages of one network share it.
@functools.lru_cache(maxsize=16)
def _jit_encode(model: nn.Module) -> Callable[[Variables, Any], Any]:
    """The jitted features of one image, without an axis for images."""

    def encode(variables: Variables, image: jax.Array) -> Any:
        # Eval mode: a frozen backbone has no other, and both norms of a frozen backbone are alike.
        features = model.apply(variables, image[None], domain="weak", method="encode")
        return jax.tree.map(lambda leaf: leaf[0], features)

    return jax.jit(encode)


def _write(path: epath.Path, leaves: list[np.ndarray]) -> None:
    """Writes arrays to a file, as bytes: NumPy's format has no bfloat16."""
    content = io.BytesIO()
    arrays = {str(i): np.frombuffer(leaf.tobytes(), np.uint8) for i, leaf in enumerate(leaves)}
    np.savez(content, allow_pickle=False, **arrays)  # type: ignore[arg-type]
    # Without sync: a truncated file is noticed by `_read`, and computed again.
    fileio.write_bytes(path, content.getvalue(), sync=False)


def _read(path: epath.Path, expected: list[jax.ShapeDtypeStruct]) -> list[np.ndarray] | None:
    """Returns the arrays in a file; None if it is missing or damaged.

    Args:
        path: of the file; its archive format stores a checksum of each array, which is verified.
        expected: shapes and dtypes of the arrays.

    Raises:
        UserError: the file is not readable.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise read_error(path, error, "make it readable, or remove it") from error
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as stored:
            leaves = [stored[str(i)] for i in range(len(expected))]
        return [
            np.frombuffer(leaf.tobytes(), want.dtype).reshape(want.shape)
            for leaf, want in zip(leaves, expected, strict=True)
        ]
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
