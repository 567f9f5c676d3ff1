"""The teacher's labels of the unlabelled images, on disk: palette PNGs and a manifest.

Source: ICCV 2021, section 3.1: arg max of the teacher's class probabilities on the clean image,
averaged over scales and mirror images.
"""

import functools
import hashlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import traverse_util
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int32, UInt8
from PIL import Image

from semiseg_jax import distributed, interruption, provenance
from semiseg_jax import mesh as mesh_lib
from semiseg_jax.data import labels
from semiseg_jax.data.pipeline import ImageBatch, image_batches, padding_for
from semiseg_jax.data.sources import Dataset, Example
from semiseg_jax.errors import UserError, unread
from semiseg_jax.inference import Predictor, one_behind
from semiseg_jax.state import Variables, for_inference

# The folder of a stage's label maps, and what it says of them.
PSEUDO_LABELS = "pseudo_labels"
MANIFEST = "manifest.json"
# Beside the labels' folder, because the images' ids name what is in that.
CONFIDENCE = "pseudo_confidence"

# What is said of a set of label maps; see `Labeler.__call__`.
Manifest = dict[str, Any]


class Labeler:
    """Labels images by the settings of `config.pseudo`; compiled once, used every round."""

    def __init__(
        self,
        model: nn.Module,
        dataset: Dataset,
        config: Any,
        mesh: Mesh,
        colour: UInt8[np.ndarray, "3"],
        asked: interruption.Asked = interruption.never,
    ):
        """Of the whole config `pseudo` and `eval.pad_to` are read; its hash is in the manifest.

        Args:
            model: the teacher's network.
            dataset: its unlabelled images are labelled.
            config: the whole config.
            mesh: images are split over it.
            colour: of the padding.
            asked: whether to stop.
        """
        self._dataset = dataset
        self._config = config.pseudo
        self._config_hash = provenance.config_hash(config)
        self._mesh = mesh
        self._batch = mesh_lib.batch_over(config.pseudo.batch, mesh.size)
        self._colour = colour
        self._asked = asked
        self._pad_if_many_sizes_to = config.eval.pad_to
        self._predictor = Predictor(
            model,
            mesh,
            self._config.scales,
            self._config.flip,
            self._config.average,
            self._config.window,
            self._config.window_stride,
        )
        self._decide = jax.jit(self._most_likely, out_shardings=mesh_lib.split_by_image(mesh))

    def __call__(
        self,
        variables: Variables,
        teacher: str,
        folder: epath.PathLike,
        progress: Callable[[int, int], None],
        say: Callable[[str], None],
    ) -> Manifest:
        """Writes a label map for each unlabelled image, and last the manifest.

        Goes on where an earlier call stopped. Where one ended, every file is read again, and those
        that are missing or not as they were written are made again. So are those without the
        confidence of their pixels, where that is to be kept.

        Args:
            variables: of the teacher; its weak norm is read.
            teacher: its name for the manifest, such as "round_0/teacher, step 500".
            folder: to write into.
            progress: called with (images done, images in all).
            say: prints a line.

        Returns:
            The manifest: whose labels these are, and of each image the file's hash, its size, the
            count of pixels of each label, and the mean confidence.

        Raises:
            UserError: the folder holds the labels of another teacher or of other settings.
            Interrupted: that was asked for; what is labelled is on disk.
        """
        folder = epath.Path(folder)
        variables = for_inference(variables)
        made_by = self._made_by(variables, teacher)
        stamp = hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()[:16]
        manifest = distributed.agree("manifest", lambda: _read_manifest(folder, made_by))
        todo = self._todo(folder, manifest, stamp)
        if manifest is not None:
            if not todo:
                return manifest
            confidence = ", or without their confidence" * self._config.keep_confidence
            say(
                f"{len(todo)} label maps are missing or damaged{confidence}, {todo[0].id} first: "
                "made again"
            )
        self._label(variables, todo, folder, stamp, progress)
        distributed.barrier(f"labels of {teacher}")
        with futures.ThreadPoolExecutor() as pool:
            mine = distributed.share(self._dataset.unlabeled)
            described = list(pool.map(lambda e: (e.id, _description(folder, e)), mine))
        images = dict(distributed.gather_shares("descriptions of the labels", described))
        manifest = made_by | {
            "stamp": stamp,
            "code_version": provenance.code_version(),
            "config_hash": self._config_hash,
            "images": images,
        }
        if distributed.is_main():
            labels.write_bytes(folder / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
        return manifest

    def _todo(self, folder: epath.Path, manifest: Manifest | None, stamp: str) -> list[Example]:
        """The images without a label map as it should be, the same in every process."""
        if distributed.is_main():
            labels.remove_leftovers(folder)
        unlabeled = self._dataset.unlabeled

        def is_good(example: Example) -> bool:
            if manifest is None:
                good = _is_labeled(folder, example, stamp)
            else:
                good = _is_as_written(folder, example, manifest["images"].get(example.id))
            return good and (not self._config.keep_confidence or _has_confidence(folder, example))

        with futures.ThreadPoolExecutor() as pool:
            good = list(pool.map(is_good, distributed.share(unlabeled)))
            found = distributed.gather_shares("label maps that are there", good)
        return [e for e, fine in zip(unlabeled, found, strict=True) if not fine]

    @functools.cached_property
    def _pad_to(self) -> int:
        """Found when first labelling: a run without students has no use for the images' sizes."""
        return padding_for(self._dataset.unlabeled, self._pad_if_many_sizes_to)

    def _made_by(self, variables: Variables, teacher: str) -> dict[str, Any]:
        """All that the labels follow from, besides the images."""
        config = self._config
        return {
            "teacher": teacher,
            "teacher_hash": variables_hash(variables),
            "scales": list(config.scales),
            "flip": config.flip,
            "average": config.average,
            "min_confidence": config.min_confidence,
            "window": [list(config.window), list(config.window_stride)],
            "pad_to": self._pad_to,
            "classes": list(self._dataset.classes),
        }

    def _label(
        self,
        variables: Variables,
        todo: Sequence[Example],
        folder: epath.Path,
        stamp: str,
        progress: Callable[[int, int], None],
    ) -> None:
        """Images are read ahead, and files written, while the devices are at a batch."""
        total = len(self._dataset.unlabeled)
        done = total - len(todo)
        batches = image_batches(todo, self._dataset, self._batch, self._pad_to, self._colour)
        start = functools.partial(self._start, variables)
        write = functools.partial(self._writing, folder, stamp)
        for batch in one_behind(batches, start, write, self._asked):
            done += batch.total
            progress(done, total)

    def _writing(
        self, folder: epath.Path, stamp: str, batch: ImageBatch, decided: tuple[Array, ...]
    ) -> Iterator[Callable[[], None]]:
        """What there is to write of a batch."""
        classes, means, confidence = map(mesh_lib.from_devices, decided)
        for i, name in enumerate(batch.ids):
            height, width = batch.sizes[i]
            cut = (i, slice(height), slice(width))
            grey = confidence[cut] if confidence.size else None
            of_image = (name, classes[cut], float(means[i]), grey)
            yield functools.partial(self._write, folder, stamp, *of_image)

    def _start(self, variables: Variables, batch: ImageBatch) -> tuple[Array, Array, Array]:
        """Sets the devices to work on a batch."""
        arrays = mesh_lib.to_devices({"image": batch.image, "size": batch.sizes}, self._mesh)
        return self._decide(self._predictor(variables, arrays["image"]), arrays["size"])

    def _most_likely(
        self, probabilities: Float[Array, "n h w classes"], sizes: Int32[Array, "n 2"]
    ) -> tuple[UInt8[Array, "n h w"], Float[Array, " n"], UInt8[Array, "n _ _"]]:
        """Class ids, IGNORE where the confidence is too low; each image's mean confidence; and, if
        that is kept, the confidence of each pixel as 0..255."""
        confidence = jnp.max(probabilities, axis=-1)
        classes = jnp.argmax(probabilities, axis=-1).astype(jnp.uint8)
        if self._config.min_confidence > 0:
            sure = confidence >= self._config.min_confidence
            classes = jnp.where(sure, classes, jnp.uint8(labels.IGNORE))
        rows, columns = (jnp.arange(n) for n in confidence.shape[1:])
        inside = (rows[:, None] < sizes[:, :1, None]) & (columns < sizes[:, 1:, None])
        pixels = jnp.maximum(jnp.sum(inside, axis=(1, 2)), 1)
        mean = jnp.sum(confidence * inside, axis=(1, 2)) / pixels
        kept = jnp.round(255 * confidence).astype(jnp.uint8)
        return classes, mean, kept if self._config.keep_confidence else kept[:, :0, :0]

    def _write(
        self,
        folder: epath.Path,
        stamp: str,
        name: str,
        classes: UInt8[np.ndarray, "h w"],
        mean_confidence: float,
        confidence: UInt8[np.ndarray, "h w"] | None,
    ) -> None:
        # First, because an image whose label map is there is not labelled again.
        if confidence is not None:
            _write_grey(folder.parent / CONFIDENCE / f"{name}.png", confidence)
        counts = np.bincount(classes.ravel(), minlength=256)
        text = {
            "stamp": stamp,
            "mean_confidence": repr(mean_confidence),
            "histogram": json.dumps({str(i): int(counts[i]) for i in np.flatnonzero(counts)}),
        }
        png = labels.encode_mask(classes, self._dataset.palette, text)
        # One that a power cut damages is found by `_todo`, and made again.
        labels.write_bytes(folder / f"{name}.png", png, sync=False)


def _write_grey(path: epath.Path, pixels: UInt8[np.ndarray, "h w"]) -> None:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    # Synced, however many: nobody would find a damaged one.
    labels.write_bytes(path, buffer.getvalue())


def variables_hash(variables: Variables) -> str:
    """16 hex digits that name these very weights."""
    digest = hashlib.sha256()
    flat = traverse_util.flatten_dict(jax.device_get(variables), sep="/")
    for name in sorted(flat):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(flat[name]).tobytes())
    return digest.hexdigest()[:16]


def _read_manifest(folder: epath.Path, made_by: dict[str, Any]) -> Manifest | None:
    """The folder's manifest, if it has one, which must be of this teacher and these settings."""
    manifest = labels.read_json(folder / MANIFEST)
    if manifest is None:
        return None  # Damaged, it is made again from the files.
    for key, value in made_by.items():
        if manifest.get(key) != value:
            raise UserError(
                f"The pseudo-labels in {folder} were made with {key}={manifest.get(key)!r}, this "
                f"run has {value!r}: remove that folder to make them again."
            )
    return manifest


def _is_labeled(folder: epath.Path, example: Example, stamp: str) -> bool:
    """Whether the image's label map is there, whole, and of this teacher."""
    path = folder / f"{example.id}.png"
    if not path.exists():
        return False
    try:
        return labels.read_text(path).get("stamp") == stamp
    except UserError:
        return False


def _is_as_written(folder: epath.Path, example: Example, entry: dict[str, Any] | None) -> bool:
    """Whether the image's label map is the one in the manifest, and of the image's size."""
    path = folder / f"{example.id}.png"
    if entry is None or not path.exists():
        return False
    if _digest(path) != entry["sha256"]:
        return False
    size = labels.image_size(example.image)
    if list(size) != entry["size"]:
        height, width = entry["size"]
        raise UserError(
            f"{example.image} is {size[1]}x{size[0]}, its pseudo-label in {folder} {width}x"
            f"{height}: the image was changed; restore it, or remove that folder to label again."
        )
    return True


def _digest(path: epath.Path) -> str:
    """16 hex digits that name the content of a label map's file."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    except OSError as error:
        raise unread(path, error, "make it readable") from error


def _has_confidence(folder: epath.Path, example: Example) -> bool:
    """Whether the image's confidence is there, which maps made without it have not."""
    return (folder.parent / CONFIDENCE / f"{example.id}.png").exists()


def _description(folder: epath.Path, example: Example) -> dict[str, Any]:
    path = folder / f"{example.id}.png"
    text = labels.read_text(path)
    return {
        "sha256": _digest(path),
        "size": list(labels.image_size(path)),
        "mean_confidence": float(text["mean_confidence"]),
        "histogram": json.loads(text["histogram"]),
    }
