"""Writes a teacher's labels of the unlabelled images: palette PNGs and a manifest.

Source: ICCV 2021, section 2.1: arg max of the teacher's class probabilities on the clean image,
averaged over scales and mirror images.
"""

import dataclasses
import functools
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int32, UInt8
from PIL import Image

from semiseg_jax import mesh as mesh_lib
from semiseg_jax import workdir
from semiseg_jax.data import image_io, label_maps
from semiseg_jax.data.input_pipeline import ImageBatch, image_batches, image_sizes
from semiseg_jax.data.load import Dataset, Example
from semiseg_jax.inference import Predictor, pipelined_map
from semiseg_jax.runtime import fileio, hashes, json_forms, multihost
from semiseg_jax.runtime.errors import UserError, read_error
from semiseg_jax.runtime.logger import logger
from semiseg_jax.shape_buckets import pad_multiple
from semiseg_jax.train_state import Variables, inference_variables, variables_hash

# Folder of a stage's label maps, and the file in it that describes them.
PSEUDO_LABELS = "pseudo_labels"
MANIFEST = "manifest.json"
# A folder beside PSEUDO_LABELS, in which each file is named after an image.
CONFIDENCE = "pseudo_confidence"

# Describes a set of label maps (see `Labeler.__call__`).
Manifest = dict[str, Any]

_LABELS = frozenset(map(str, range(image_io.IGNORE + 1)))
_SIDE = json_forms.both(json_forms.is_count, lambda side: side > 0)
_ENTRY = json_forms.record(
    {
        "sha256": json_forms.is_text,
        "size": json_forms.list_of(_SIDE, range(2, 3)),
        "mean_confidence": json_forms.is_number,
        # By class id, and IGNORE, as text.
        "histogram": json_forms.mapping_of(json_forms.is_count, lambda k: k in _LABELS),
    }
)
_MANIFEST = json_forms.record(
    {"images": json_forms.mapping_of(_ENTRY, json_forms.is_name)},
    {"left_out": json_forms.mapping_of(json_forms.is_text)},
)


class Labeler:
    """Labels images with the settings of `config.pseudo`; one compiled program for all rounds."""

    def __init__(
        self,
        model: nn.Module,
        dataset: Dataset,
        config: Any,
        mesh: Mesh,
        pad_value: UInt8[np.ndarray, "3"],
    ):
        """Compiles nothing yet.

        Args:
            model: the teacher's network.
            dataset: its unlabelled images are labelled.
            config: the whole config; `pseudo` and `eval.pad_to` are read. The manifest contains
                its hash.
            mesh: the images of a batch are split over it.
            pad_value: RGB of the padding.
        """
        self._dataset = dataset
        self._examples: Sequence[Example] = dataset.unlabeled
        self._config = config.pseudo
        self._config_hash = workdir.config_hash(config)
        self._mesh = mesh
        self._batch_size = mesh_lib.round_up_batch(config.pseudo.batch, mesh.size)
        self._pad_value = pad_value
        self._config_pad_to = config.eval.pad_to
        self._predictor = Predictor(
            model,
            mesh,
            self._config.scales,
            self._config.flip,
            self._config.average,
            self._config.window,
            self._config.window_stride,
        )
        self._assign_labels = jax.jit(
            self._compute_labels, out_shardings=mesh_lib.batch_sharding(mesh)
        )

    def __call__(
        self,
        variables: Variables,
        teacher: str,
        folder: epath.PathLike,
        progress: Callable[[int, int], None],
        left_out: Mapping[str, str] | None = None,
    ) -> Manifest:
        """Writes the label map of each unlabelled image, and then the manifest.

        Continues where an interrupted call stopped. If an earlier call finished, every label map is
        read again, and images are labelled again if their label map is missing or damaged. With
        `config.pseudo.keep_confidence`, images without a confidence map are also labelled again.

        Args:
            variables: variables of the teacher; only the weak norm is read.
            teacher: name of the teacher for the manifest, such as "round_0/teacher, step 500".
            folder: folder of the label maps.
            progress: called with (number of labelled images, number of images).
            left_out: ids of unlabelled images that are lost or not decodable, with the reasons.

        Returns:
            The manifest: the teacher and the settings; and for each image the hash of its label
            map, its size, the number of pixels of each label, and its mean confidence; if images
            were left out, their ids and reasons; and a hash of all of this.

        Raises:
            UserError: the folder contains the labels of another teacher or of other settings.
            Preempted: the run must stop; all label maps so far are on disk.
        """
        folder = epath.Path(folder)
        left_out = left_out or self._dataset.left_out
        self._examples = [e for e in self._dataset.unlabeled if e.id not in left_out]
        variables = inference_variables(variables)
        provenance = self._provenance(variables, teacher)
        stamp = hashes.hash_json(provenance)
        manifest = multihost.broadcast_from_main(
            "manifest", lambda: _read_manifest(folder, provenance)
        )
        unlabeled = self._find_unlabeled(folder, manifest, stamp)
        if manifest is not None:
            if not unlabeled:
                return manifest
            confidence = ", or without their confidence" * self._config.keep_confidence
            logger.info(
                f"{len(unlabeled)} label maps are missing or damaged{confidence}, "
                f"{unlabeled[0].id} first: made again"
            )
        self._label(variables, unlabeled, folder, stamp, progress)
        multihost.barrier(f"labels of {teacher}")
        with futures.ThreadPoolExecutor() as pool:
            examples = multihost.local_shard(self._examples)
            local = list(pool.map(lambda e: (e.id, _manifest_entry(folder, e)), examples))
        entries = dict(multihost.all_gather_shards("descriptions of the labels", local))
        # From now on the unlabelled images are those of the manifest, see `restrict_to_labeled`.
        left_out = manifest.get("left_out", {}) if manifest else left_out
        manifest = provenance | {
            "stamp": stamp,
            "code_version": workdir.code_version(),
            "config_hash": self._config_hash,
            "images": entries,
        }
        if left_out:
            manifest["left_out"] = dict(left_out)
        manifest = hashes.sealed(manifest)
        if multihost.is_main():
            fileio.write_bytes(folder / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
        return manifest

    def _find_unlabeled(
        self, folder: epath.Path, manifest: Manifest | None, stamp: str
    ) -> list[Example]:
        """Returns the images without a valid label map; the same list in every process."""
        if multihost.is_main():
            fileio.remove_leftovers(folder)

        def is_labeled(example: Example) -> bool:
            if manifest is None:
                is_valid = _has_stamp(folder, example, stamp)
            else:
                is_valid = _matches_manifest(folder, example, manifest["images"].get(example.id))
            return is_valid and (
                not self._config.keep_confidence or _has_confidence(folder, example)
            )

        examples = self._examples
        with futures.ThreadPoolExecutor() as pool:
            local = list(pool.map(is_labeled, multihost.local_shard(examples)))
        labeled = multihost.all_gather_shards("label maps that are there", local)
        return [e for e, is_done in zip(examples, labeled, strict=True) if not is_done]

    @functools.cached_property
    def _pad_to(self) -> int:
        """The padding multiple; computed lazily, because a run without students labels nothing."""
        return pad_multiple(image_sizes(self._examples), self._config_pad_to)

    def _provenance(self, variables: Variables, teacher: str) -> dict[str, Any]:
        """Returns everything that determines the labels except the images."""
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
        examples: Sequence[Example],
        folder: epath.Path,
        stamp: str,
        progress: Callable[[int, int], None],
    ) -> None:
        """Labels images; reading, computation and writing overlap."""
        total = len(self._examples)
        num_labeled = total - len(examples)
        batches = image_batches(
            examples, self._dataset, self._batch_size, self._pad_to, self._pad_value
        )
        start = functools.partial(self._dispatch, variables)
        write = functools.partial(self._write_jobs, folder, stamp)
        for batch in pipelined_map(batches, start, write):
            num_labeled += batch.total
            progress(num_labeled, total)

    def _write_jobs(
        self, folder: epath.Path, stamp: str, batch: ImageBatch, outputs: tuple[Array, ...]
    ) -> Iterator[Callable[[], None]]:
        """Yields a function for each image of a batch that writes its files."""
        classes, means, confidence = map(mesh_lib.local_data, outputs)
        for i, name in enumerate(batch.ids):
            height, width = batch.sizes[i]
            region = (i, slice(height), slice(width))
            yield functools.partial(
                self._write,
                folder,
                stamp,
                name,
                classes[region],
                float(means[i]),
                confidence[region] if confidence.size else None,
            )

    def _dispatch(self, variables: Variables, batch: ImageBatch) -> tuple[Array, Array, Array]:
        """Starts the computation of a batch; returns as `_compute_labels` does."""
        arrays = mesh_lib.shard_batch({"image": batch.image, "size": batch.sizes}, self._mesh)
        return self._assign_labels(self._predictor(variables, arrays["image"]), arrays["size"])

    def _compute_labels(
        self, probabilities: Float[Array, "n h w classes"], sizes: Int32[Array, "n 2"]
    ) -> tuple[UInt8[Array, "n h w"], Float[Array, " n"], UInt8[Array, "n _ _"]]:
        """Returns class ids, the mean confidence of each image, and confidence maps as 0..255.

        The class id is IGNORE where the confidence is below `min_confidence`. The confidence maps
        are empty without `keep_confidence`.
        """
        confidence = jnp.max(probabilities, axis=-1)
        classes = jnp.argmax(probabilities, axis=-1).astype(jnp.uint8)
        if self._config.min_confidence > 0:
            is_confident = confidence >= self._config.min_confidence
            classes = jnp.where(is_confident, classes, jnp.uint8(image_io.IGNORE))
        rows, columns = (jnp.arange(n) for n in confidence.shape[1:])
        inside = (rows[:, None] < sizes[:, :1, None]) & (columns < sizes[:, 1:, None])
        pixels = jnp.maximum(jnp.sum(inside, axis=(1, 2)), 1)
        mean = jnp.sum(confidence * inside, axis=(1, 2)) / pixels
        levels = jnp.round(255 * confidence).astype(jnp.uint8)
        return classes, mean, levels if self._config.keep_confidence else levels[:, :0, :0]

    def _write(
        self,
        folder: epath.Path,
        stamp: str,
        name: str,
        classes: UInt8[np.ndarray, "h w"],
        mean_confidence: float,
        confidence: UInt8[np.ndarray, "h w"] | None,
    ) -> None:
        """Writes the confidence map, if any, and the label map of an image."""
        # The confidence map first, because an image with a label map is not labelled again.
        if confidence is not None:
            buffer = io.BytesIO()
            Image.fromarray(confidence).save(buffer, "PNG")
            # Synced, because no later check would find a damaged confidence map.
            fileio.write_bytes(folder.parent / CONFIDENCE / f"{name}.png", buffer.getvalue())
        counts = np.bincount(classes.ravel(), minlength=256)
        text = {
            "stamp": stamp,
            "mean_confidence": repr(mean_confidence),
            "histogram": json.dumps({str(i): int(counts[i]) for i in np.flatnonzero(counts)}),
        }
        png = label_maps.encode(classes, self._dataset.palette, name, text)
        # Not synced: `_find_unlabeled` finds a label map that a power cut damaged.
        fileio.write_bytes(folder / f"{name}.png", png, sync=False)


def restrict_to_labeled(dataset: Dataset, folder: epath.Path) -> Dataset:
    """Returns a data set without the unlabelled images that a manifest leaves out.

    Images that were left out when the others were labelled stay out, even if they are restored.
    Without a manifest the data set is unchanged.

    Args:
        dataset: the data set as its files are now.
        folder: the folder of the first label maps of the run.

    Raises:
        UserError: an image that was labelled is lost or damaged.
    """

    def read() -> list[list[str]]:
        manifest = read_manifest(folder) or {}
        return [sorted(manifest.get(name, {})) for name in ("images", "left_out")]

    ids = multihost.broadcast_from_main("labelled images", read)
    labeled_ids, left_out_ids = (set(part) for part in ids)
    for id_, error in dataset.left_out.items():
        if id_ in labeled_ids:
            raise UserError(
                f"{error.removesuffix('.')}; it was pseudo-labelled before: restore the image, or "
                "give another --workdir.",
                code="pseudo-labeled-image-lost",
            )
    restored = [e for e in dataset.unlabeled if e.id in left_out_ids]
    if not restored:
        return dataset
    logger.info(
        f"{len(restored)} unlabelled images, {restored[0].image} first, stay left out: the others "
        "were labelled without them."
    )
    reason = "It was left out when the others were labelled."
    return dataclasses.replace(
        dataset,
        unlabeled=tuple(e for e in dataset.unlabeled if e.id not in left_out_ids),
        left_out={**dataset.left_out, **{e.id: reason for e in restored}},
    )


@dataclasses.dataclass(frozen=True)
class PseudoLabel:
    """The pseudo-label of an image.

    Attributes:
        id: of the image.
        classes: class ids; IGNORE where the confidence is below `pseudo.min_confidence`.
        mean_confidence: mean over the pixels of the teacher's largest class probability, in 0..1.
        confidence: this probability of each pixel, rounded to multiples of 1/255; None in a run
            without `pseudo.keep_confidence`.
    """

    id: str
    classes: UInt8[np.ndarray, "h w"]
    mean_confidence: float
    confidence: Float[np.ndarray, "h w"] | None


class PseudoLabels(Mapping[str, PseudoLabel]):
    """The pseudo-labels that one teacher gave, by id of the image; each is read when it is used.

    Attributes:
        folder: of the label maps.
        manifest: see `Labeler.__call__`.
    """

    def __init__(self, folder: epath.Path, manifest: Manifest):
        self.folder = folder
        self.manifest = manifest

    def __len__(self) -> int:
        return len(self.manifest["images"])

    def __iter__(self) -> Iterator[str]:
        return iter(self.manifest["images"])

    def __getitem__(self, image_id: str) -> PseudoLabel:
        """Reads the pseudo-label of an image.

        Raises:
            KeyError: there is no image of this id.
            UserError: its label map is missing or damaged, or was changed.
        """
        mean_confidence = self.manifest["images"][image_id]["mean_confidence"]
        # A run writes class ids and IGNORE, however many classes there are.
        table = image_io.id_table(image_io.IGNORE)
        classes = label_maps.read(self.folder / f"{image_id}.png", image_id, table)
        confidence = None
        path = self.folder.parent / CONFIDENCE / f"{image_id}.png"
        if path.exists():
            levels, _ = image_io.read_png(path)
            confidence = levels.astype(np.float32) / 255
        return PseudoLabel(image_id, classes, mean_confidence, confidence)

    @property
    def mean_confidences(self) -> dict[str, float]:
        """The mean confidence of each image, in 0..1, by id; no label map is read for it."""
        images = self.manifest["images"]
        return {image_id: entry["mean_confidence"] for image_id, entry in images.items()}


def read(folder: epath.PathLike) -> PseudoLabels:
    """Opens the pseudo-labels of a round.

    Args:
        folder: of the label maps, such as runs/streets/round_0/teacher/pseudo_labels for those that
            the student of round 1 is trained on.

    Raises:
        UserError: the folder has no manifest, or a damaged one.
    """
    folder = epath.Path(folder)
    manifest = read_manifest(folder)
    if manifest is None:
        raise UserError(
            f"{folder / MANIFEST} is missing or damaged: give the folder {PSEUDO_LABELS} of a "
            "stage, or start the run's command again to make it anew.",
            code="pseudo-labels-missing",
        )
    return PseudoLabels(folder, manifest)


def read_manifest(folder: epath.Path) -> Manifest | None:
    """Returns the manifest of a folder; None if it is missing, damaged or of another form.

    Raises:
        UserError: the file is not readable.
    """
    return fileio.read_json(folder / MANIFEST, _MANIFEST)


def _read_manifest(folder: epath.Path, provenance: dict[str, Any]) -> Manifest | None:
    """Returns the manifest of a folder; None if it is missing or damaged.

    Raises:
        UserError: the labels are of another teacher or of other settings.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        return None
    for key, value in provenance.items():
        if manifest.get(key) != value:
            raise UserError(
                f"The pseudo-labels in {folder} were made with {key}={manifest.get(key)!r}, this "
                f"run has {value!r}: remove that folder to make them again.",
                code="pseudo-labels-of-another-run",
            )
    # A damaged manifest is computed again from the label maps.
    return manifest if hashes.is_intact(manifest) else None


def _has_stamp(folder: epath.Path, example: Example, stamp: str) -> bool:
    """Returns whether the image has an unchanged label map of its own with this stamp."""
    path = folder / f"{example.id}.png"
    if not path.exists():
        return False
    try:
        return label_maps.read_text(path, example.id).get("stamp") == stamp
    except UserError:
        return False


def _matches_manifest(folder: epath.Path, example: Example, entry: dict[str, Any] | None) -> bool:
    """Returns whether the image has the label map of its entry in the manifest.

    Raises:
        UserError: the image has another size than its label map.
    """
    path = folder / f"{example.id}.png"
    if entry is None or not path.exists():
        return False
    if _digest(path) != entry["sha256"]:
        return False
    size = image_io.image_size(example.image)
    if list(size) != entry["size"]:
        height, width = entry["size"]
        raise UserError(
            f"{example.image} is {size[1]}x{size[0]}, its pseudo-label in {folder} {width}x"
            f"{height}: the image was changed; restore it, or remove that folder to label again.",
            code="pseudo-label-size-differs",
        )
    return True


def _digest(path: epath.Path) -> str:
    """Returns a hash of the content of a file, 16 hex digits."""
    try:
        return hashes.hash_bytes(path.read_bytes())
    except OSError as error:
        raise read_error(path, error, "make it readable") from error


def _has_confidence(folder: epath.Path, example: Example) -> bool:
    """Returns whether the image has a confidence map."""
    return (folder.parent / CONFIDENCE / f"{example.id}.png").exists()


def _manifest_entry(folder: epath.Path, example: Example) -> dict[str, Any]:
    """Returns the entry of an image in the manifest, read from its label map."""
    path = folder / f"{example.id}.png"
    text = label_maps.read_text(path, example.id)
    return {
        "sha256": _digest(path),
        "size": list(image_io.image_size(path)),
        "mean_confidence": float(text["mean_confidence"]),
        "histogram": json.loads(text["histogram"]),
    }
