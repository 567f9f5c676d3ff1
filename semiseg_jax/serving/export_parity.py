"""What an exported model computes beside its network: classes, probabilities, IoU of each class."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from etils import epath
from jaxtyping import Int, UInt8

from semiseg_jax import mesh as mesh_lib
from semiseg_jax import metrics
from semiseg_jax.data.dataset import IMAGE_SUFFIXES, Dataset, Example, files_below, is_image
from semiseg_jax.data.image_io import read_image, read_mask
from semiseg_jax.data.sources import streets
from semiseg_jax.data.sources.downscale import shrink_image
from semiseg_jax.inference import Predictor
from semiseg_jax.runtime.errors import UserError
from semiseg_jax.runtime.logger import logger
from semiseg_jax.serving import downscaling
from semiseg_jax.shape_buckets import Size
from semiseg_jax.train_state import Variables

# Limits of the difference between an exported model and the network.
MIN_AGREEMENT = 0.9999  # share of pixels with the same class
MAX_DIFFERENCE = 1e-4  # of a probability
# In points of IoU: a larger loss of the mean, or of a class, is a warning.
MAX_MEAN_LOSS, MAX_CLASS_LOSS = 1.0, 5.0
# Largest number of evaluation images for the IoU of an exported model.
MAX_EVALUATED = 200
# Largest number of photographs to compare on; each size is compiled twice.
MAX_PHOTOGRAPHS = 4

Images = UInt8[np.ndarray, "_ _ _ 3"]  # the batches of a list differ in size
# From images to {"class_map": uint8 [n, h, w], "probabilities": float32 [n, h, w, classes]}.
PredictFn = Callable[[Images], Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class ExportDiff:
    """Difference between the outputs of an exported model and of its network.

    Attributes:
        pixels: number of compared pixels.
        differing: number of pixels whose classes differ.
        difference: largest difference of two probabilities; NaN if any is NaN.
    """

    pixels: int
    differing: int
    difference: float

    @property
    def agreement(self) -> float:
        """Share of pixels with the same class, in 0..1."""
        return 1 - self.differing / self.pixels

    def __str__(self) -> str:
        return (
            f"class maps agree on {100 * self.agreement:.4f} % of {self.pixels:,} pixels, "
            f"probabilities differ by at most {self.difference:.1e}"
        )


def draw_scenes() -> list[Images]:
    """Returns built-in street scenes: two images of an even size, and one of an odd size."""
    even = [streets.draw(0, index, 96, 160)[0] for index in range(2)]
    odd = streets.draw(0, 2, 97, 131)[0]
    return [np.stack(even), odd[None]]


def read_photographs(folder: Path) -> list[Images]:
    """Returns the first images below a folder, and a crop of the first one of an odd size.

    Raises:
        UserError: the folder is missing or has no images, or an image is damaged.
    """
    if not folder.is_dir():
        raise UserError(
            f"The folder {folder} of --images is missing.",
            code="export-images-folder-missing",
        )
    files = [f for f in files_below(epath.Path(folder)) if is_image(f.name)]
    if not files:
        raise UserError(
            f"--images={folder} has no image ({', '.join(IMAGE_SUFFIXES)}) in it.",
            code="export-images-empty",
        )
    images = [read_image(file)[None] for file in files[:MAX_PHOTOGRAPHS]]
    height, width = ((n - 1) // 2 * 2 + 1 for n in images[0].shape[1:3])
    return [*images, images[0][:, :height, :width]]


def network(model: nn.Module, variables: Variables, downscale: int) -> PredictFn:
    """Returns the `Predictor` of a network in the form of an exported model."""
    mesh = mesh_lib.make_mesh(jax.devices()[:1])
    predictor = Predictor(model, mesh)

    def predict(images: Images) -> Mapping[str, Any]:
        small = np.stack([shrink_image(image, downscale) for image in images])
        on_device = mesh_lib.shard_batch({"image": small}, mesh)["image"]
        probabilities = np.asarray(predictor(variables, on_device))
        expected = np.stack([downscaling.enlarge(p, images.shape[1:3]) for p in probabilities])
        return {"class_map": expected.argmax(-1).astype(np.uint8), "probabilities": expected}

    return predict


def compare(
    model: nn.Module,
    variables: Variables,
    exported: PredictFn,
    batches: Sequence[Images],
    downscale: int = 1,
) -> ExportDiff:
    """Compares an exported model with the `Predictor` of the network on the same images.

    Args:
        model, variables: the network, in float32.
        exported: the exported model.
        batches: the images to compare on.
        downscale: factor of the model (`config.data.downscale`).
    """
    predict = network(model, variables, downscale)
    pixels = differing = 0
    difference = 0.0
    for images in batches:
        expected = predict(images)["probabilities"]
        outputs = {name: np.asarray(value) for name, value in exported(images).items()}
        pixels += outputs["class_map"].size
        differing += int((outputs["class_map"] != expected.argmax(-1)).sum())
        largest = np.abs(outputs["probabilities"] - expected).max()
        difference = float(np.maximum(difference, largest))  # propagates NaN
    return ExportDiff(pixels, differing, difference)


def check_diff(diff: ExportDiff) -> None:
    """Raises a UserError if the difference exceeds MAX_DIFFERENCE or MIN_AGREEMENT is missed."""
    if diff.agreement >= MIN_AGREEMENT and diff.difference <= MAX_DIFFERENCE:
        return
    raise UserError(
        f"The exported model differs from the network and was not kept: {diff}, where at least "
        f"{100 * MIN_AGREEMENT} % and at most {MAX_DIFFERENCE} are required; install the versions "
        "of jax and TensorFlow that requirements.txt names.",
        code="export-differs-from-model",
    )


# --- IoU of each class ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class IouChange:
    """The confusion matrices of a network and of its exported model, on the same images.

    Attributes:
        images: number of images.
        before, after: of the network, and of the exported model; labels by row.
    """

    images: int
    before: Int[np.ndarray, "classes classes"]
    after: Int[np.ndarray, "classes classes"]

    def to_json(self, classes: Sequence[str]) -> dict[str, Any]:
        """Returns the mean IoU and the IoU of each class, in 0..1; None for a class not seen."""
        sides = {"before": self.before, "after": self.after}
        return {
            "images": self.images,
            "miou": {side: metrics.mean_iou(matrix) for side, matrix in sides.items()},
            "iou": {
                side: {
                    name: None if np.isnan(value) else float(value)
                    for name, value in zip(classes, metrics.iou(matrix), strict=True)
                }
                for side, matrix in sides.items()
            },
        }

    def log(self, classes: Sequence[str]) -> None:
        """Prints the IoU of each class, and warns of classes that the exported model loses."""
        before, after = 100 * metrics.iou(self.before), 100 * metrics.iou(self.after)
        width = max(map(len, (*classes, "mean")))
        means = 100 * metrics.mean_iou(self.before), 100 * metrics.mean_iou(self.after)
        logger.info(f"IoU on {self.images} evaluation images, of the network and of the file:")
        for name, old, new in zip(
            (*classes, "mean"), (*before, means[0]), (*after, means[1]), strict=True
        ):
            logger.info(f"  {name:{width}} {old:6.2f} {new:6.2f}")
        lost = [n for n, a, b in zip(classes, before, after, strict=True) if a - b > MAX_CLASS_LOSS]
        if means[0] - means[1] > MAX_MEAN_LOSS or lost:
            logger.warning(
                f"The mean IoU changes by {means[1] - means[0]:+.2f} points"
                + f", and these classes lose more than {MAX_CLASS_LOSS}: {', '.join(lost)}"
                * bool(lost)
                + ": --precision=float16 is nearer to the network."
            )


def fit(image: UInt8[np.ndarray, "h w 3"], size: Size) -> UInt8[np.ndarray, "fh fw 3"]:
    """Resizes an image to the size of a file, by Pillow's bilinear filter."""
    return image if image.shape[:2] == size else downscaling.enlarge_image(image, size)


def spread(examples: Sequence[Example], count: int) -> list[Example]:
    """Returns at most `count` examples, evenly spread over all."""
    indices = np.unique(np.linspace(0, len(examples) - 1, min(count, len(examples))).astype(int))
    return [examples[index] for index in indices]


def iou_change(before: PredictFn, after: PredictFn, dataset: Dataset, size: Size) -> IouChange:
    """Evaluates a network and its exported model on evaluation images of one size.

    Each image is resized to the size, and the class maps are enlarged to the size of its mask.

    Args:
        before, after: the network, and the exported model.
        dataset: with the evaluation images, as they are before `data.downscale`.
        size: (height, width) of the exported model in pixels.
    """
    count = len(dataset.classes)
    matrices = [np.zeros((count, count), np.int64) for _ in range(2)]
    examples = spread(dataset.evaluation, MAX_EVALUATED)
    for example in examples:
        assert example.mask is not None, "evaluation images have masks"
        mask = read_mask(example.mask, dataset.table, dataset.mask_format)
        image = fit(read_image(example.image), size)[None]
        for matrix, predict in zip(matrices, (before, after), strict=True):
            class_map = np.asarray(predict(image)["class_map"])[0]
            class_map = downscaling.enlarge(class_map, mask.shape)
            matrix += np.asarray(metrics.confusion_matrix(class_map, mask, count), np.int64)
    return IouChange(len(examples), *matrices)
