"""The pixels of each class in each evaluated image, from which the mIoU of any of them follows.

    STAGE/image_counts.json      of the images whose mIoU is reported
    STAGE/holdout_counts.json    of the images held out by eval.select = "holdout"

A file is {"weights": hash of the evaluated weights, "images": {ID: [[class, pixels in the
intersection of label and prediction, in the label, in the prediction], ...]}, "hash": of the rest}.
Only classes that occur in an image are listed, so that many classes take little space.
"""

import dataclasses
import json
from collections.abc import Collection, Mapping, Sequence

import numpy as np
from etils import epath
from jaxtyping import Float, Int

from semiseg_jax import metrics
from semiseg_jax.runtime import fileio, hashes, json_forms
from semiseg_jax.runtime.logger import logger

EVALUATED, HELD_OUT = "image_counts.json", "holdout_counts.json"

# Lines of four integers that are stored at most, about 30 MB. With so many images an interval over
# them says little that the mIoU does not.
_MAX_LINES = 10**6

_FORM = json_forms.record(
    {
        "weights": json_forms.is_text,
        "images": json_forms.mapping_of(
            json_forms.list_of(json_forms.list_of(json_forms.is_count, range(4, 5)))
        ),
        hashes.SEAL: json_forms.is_text,
    }
)


@dataclasses.dataclass(frozen=True)
class ImageCounts:
    """The pixels of each class in each image of an evaluation.

    Attributes:
        weights_hash: `train_state.variables_hash` of the evaluated weights.
        by_image: by image id, a line for each class that occurs in label or prediction
            (`metrics.class_counts`).
    """

    weights_hash: str
    by_image: Mapping[str, Int[np.ndarray, "_present 4"]]

    def to_array(self, ids: Sequence[str], num_classes: int) -> Int[np.ndarray, "images 3 classes"]:
        """Returns the pixels in the intersection, in the labels and in the predictions, int64.

        Args:
            ids: images, in the order of the result.
            num_classes: number of classes.

        Raises:
            KeyError: an image is not there.
        """
        counts = np.zeros((len(ids), 3, num_classes), np.int64)
        for image, id_ in enumerate(ids):
            lines = self.by_image[id_]
            counts[image, :, lines[:, 0]] = lines[:, 1:]
        return counts

    def iou(self, num_classes: int) -> Float[np.ndarray, " classes"]:
        """Returns the IoU of each class over all images, as `metrics.iou`."""
        return metrics.iou_of_counts(self.to_array([*self.by_image], num_classes).sum(axis=0))

    def are_of(self, ids: Collection[str], num_classes: int) -> bool:
        """Returns whether these are the counts of these images, with no more classes."""
        classes = (lines[:, 0] for lines in self.by_image.values())
        return self.by_image.keys() == set(ids) and all((c < num_classes).all() for c in classes)


def write(path: epath.Path, counts: ImageCounts) -> None:
    """Writes the file, atomically; instead of too many counts, removes it and logs that."""
    if sum(map(len, counts.by_image.values())) > _MAX_LINES:
        path.unlink(missing_ok=True)
        logger.info(
            f"{path.name} is not written for {len(counts.by_image)} images: differences in mIoU "
            "are given without an interval."
        )
        return
    images = {id_: lines.tolist() for id_, lines in counts.by_image.items()}
    content = hashes.sealed({"weights": counts.weights_hash, "images": images})
    fileio.write_bytes(path, (json.dumps(content, separators=(",", ":")) + "\n").encode())


def read(path: epath.Path) -> ImageCounts | None:
    """Returns the counts in a file; None if it is missing, as in stages of older code, or damaged.

    Raises:
        UserError: the file is not readable.
    """
    content = fileio.read_json(path, _FORM)
    if content is None or not hashes.is_intact(content):
        return None
    by_image = {
        id_: np.array(lines, np.int64).reshape(-1, 4) for id_, lines in content["images"].items()
    }
    return ImageCounts(content["weights"], by_image)
