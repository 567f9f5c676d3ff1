"""The teacher's labels of the unlabelled images, on disk: palette PNGs and a manifest.

Source: ICCV 2021, section 3.1: arg max of the teacher's class probabilities on the clean image,
averaged over scales and mirror images.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import traverse_util
from jax.sharding import Mesh
from jaxtyping import Array, Float, UInt8

from semiseg_jax import mesh as mesh_lib
from semiseg_jax.data import labels
from semiseg_jax.data.pipeline import image_batches
from semiseg_jax.data.sources import Dataset, Example
from semiseg_jax.errors import UserError
from semiseg_jax.inference import Predictor
from semiseg_jax.state import Variables, for_inference

MANIFEST = "manifest.json"


class Labeler:
    """Labels images by the settings of `config.pseudo`; compiled once, used every round."""

    def __init__(self, model: nn.Module, dataset: Dataset, pseudo_config: Any, mesh: Mesh):
        self._dataset = dataset
        self._config = pseudo_config
        self._mesh = mesh
        self._predictor = Predictor(
            model, mesh, pseudo_config.scales, pseudo_config.flip, pseudo_config.average
        )
        self._decide = jax.jit(self._most_likely)

    def __call__(
        self,
        variables: Variables,
        teacher: str,
        folder: epath.PathLike,
        progress: Callable[[int, int], None],
    ) -> None:
        """Writes a label map for each unlabelled image, and last the manifest.

        Goes on where an earlier call stopped; does nothing where one ended.

        Args:
            variables: of the teacher; its weak norm is read.
            teacher: its name for the manifest, such as "round_0/teacher, step 500".
            folder: to write into.
            progress: called with (images done, images in all).

        Raises:
            UserError: the folder holds the labels of another teacher or of other settings.
        """
        folder = epath.Path(folder)
        variables = for_inference(variables)
        made_by = {
            "teacher": teacher,
            "teacher_hash": variables_hash(variables),
            "scales": list(self._config.scales),
            "flip": self._config.flip,
            "average": self._config.average,
            "min_confidence": self._config.min_confidence,
            "classes": list(self._dataset.classes),
        }
        if _is_complete(folder, made_by, self._dataset.unlabeled):
            return
        stamp = hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()[:16]
        todo = [e for e in self._dataset.unlabeled if not _is_labeled(folder, e, stamp)]
        self._label(variables, todo, folder, stamp, progress)
        with futures.ThreadPoolExecutor() as pool:
            read = pool.map(lambda e: (e.id, _description(folder, e)), self._dataset.unlabeled)
            images = dict(read)
        manifest = made_by | {"stamp": stamp, "images": images}
        labels.write_bytes(folder / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())

    def _label(
        self,
        variables: Variables,
        todo: Sequence[Example],
        folder: epath.Path,
        stamp: str,
        progress: Callable[[int, int], None],
    ) -> None:
        total = len(self._dataset.unlabeled)
        done = total - len(todo)
        with futures.ThreadPoolExecutor() as pool:
            writing: list[futures.Future] = []
            for batch in image_batches(todo, self._dataset, self._config.batch):
                images = mesh_lib.to_devices({"image": batch.image}, self._mesh)["image"]
                classes, confidence = self._decide(self._predictor(variables, images))
                # The files of the last batch are written while the device is at this one.
                for future in writing:
                    future.result()
                classes, confidence = np.asarray(classes), np.asarray(confidence)
                writing = [
                    pool.submit(self._write, folder, name, classes[i], float(confidence[i]), stamp)
                    for i, name in enumerate(batch.ids)
                ]
                done += len(batch.ids)
                progress(done, total)
            for future in writing:
                future.result()

    def _most_likely(
        self, probabilities: Float[Array, "n h w classes"]
    ) -> tuple[UInt8[Array, "n h w"], Float[Array, " n"]]:
        """Class ids, IGNORE where the confidence is too low; and each image's mean confidence."""
        confidence = jnp.max(probabilities, axis=-1)
        classes = jnp.argmax(probabilities, axis=-1).astype(jnp.uint8)
        if self._config.min_confidence > 0:
            sure = confidence >= self._config.min_confidence
            classes = jnp.where(sure, classes, jnp.uint8(labels.IGNORE))
        return classes, jnp.mean(confidence, axis=(1, 2))

    def _write(
        self, folder: epath.Path, name: str, classes: np.ndarray, confidence: float, stamp: str
    ) -> None:
        counts = np.bincount(classes.ravel(), minlength=256)
        text = {
            "stamp": stamp,
            "mean_confidence": repr(confidence),
            "histogram": json.dumps({str(i): int(counts[i]) for i in np.flatnonzero(counts)}),
        }
        png = labels.encode_mask(classes, self._dataset.palette, text)
        labels.write_bytes(folder / f"{name}.png", png)


def variables_hash(variables: Variables) -> str:
    """16 hex digits that name these very weights."""
    digest = hashlib.sha256()
    flat = traverse_util.flatten_dict(jax.device_get(variables), sep="/")
    for name in sorted(flat):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(flat[name]).tobytes())
    return digest.hexdigest()[:16]


def _is_complete(folder: epath.Path, made_by: dict[str, Any], examples: Sequence[Example]) -> bool:
    """Whether the folder's manifest is there, of this teacher, and of these images."""
    path = folder / MANIFEST
    if not path.exists():
        return False
    manifest = json.loads(path.read_text())
    for key, value in made_by.items():
        if manifest.get(key) != value:
            raise UserError(
                f"The pseudo-labels in {folder} were made with {key}={manifest.get(key)!r}, this "
                f"run has {value!r}: remove that folder to make them again."
            )
    return manifest["images"].keys() == {e.id for e in examples}


def _is_labeled(folder: epath.Path, example: Example, stamp: str) -> bool:
    """Whether the image's label map is there, whole, and of this teacher."""
    path = folder / f"{example.id}.png"
    if not path.exists():
        return False
    try:
        return labels.read_text(path).get("stamp") == stamp
    except UserError:
        return False


def _description(folder: epath.Path, example: Example) -> dict[str, Any]:
    text = labels.read_text(folder / f"{example.id}.png")
    return {
        "mean_confidence": float(text["mean_confidence"]),
        "histogram": json.loads(text["histogram"]),
    }
