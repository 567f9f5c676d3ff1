"""mIoU of a network on whole images; every pixel is counted exactly once."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, UInt8

from semiseg_jax import mesh as mesh_lib
from semiseg_jax import metrics
from semiseg_jax.data.image_io import IGNORE
from semiseg_jax.data.input_pipeline import ImageBatch, image_batches, image_sizes
from semiseg_jax.data.load import Dataset, Example
from semiseg_jax.inference import Predictor, lookahead
from semiseg_jax.runtime import multihost, preemption
from semiseg_jax.shape_buckets import pad_multiple
from semiseg_jax.train_state import Variables, inference_variables

# Images whose counts a process sends at a time, some ten kilobytes.
_IMAGES_PER_MESSAGE = 1000


@dataclasses.dataclass(frozen=True)
class Score:
    """The sufficient statistic of an evaluation, and the scores computed from it.

    Attributes:
        confusion: pixel counts, int64; rows are labels, columns are predictions.
        by_image: mIoU of each single image by its id; NaN for images without a labelled pixel.
        counts_by_image: `metrics.class_counts` of each image by its id.
    """

    confusion: Int[np.ndarray, "classes classes"]
    by_image: dict[str, float] = dataclasses.field(default_factory=dict)
    counts_by_image: dict[str, Int[np.ndarray, "_present 4"]] = dataclasses.field(
        default_factory=dict
    )

    @property
    def miou(self) -> float:
        """Mean IoU over the classes that occur, in 0..1."""
        return metrics.mean_iou(self.confusion)

    @property
    def iou(self) -> list[float | None]:
        """IoU of each class, in 0..1; None for classes in neither labels nor predictions."""
        return [None if np.isnan(v) else float(v) for v in metrics.iou(self.confusion)]

    @property
    def pixels(self) -> int:
        """Number of labelled pixels."""
        return int(self.confusion.sum())


@dataclasses.dataclass(frozen=True)
class EvalExample:
    """An evaluation image, its label and its predicted classes, all without padding."""

    id: str
    image: UInt8[np.ndarray, "h w 3"]
    label: UInt8[np.ndarray, "h w"]
    predicted: UInt8[np.ndarray, "h w"]


class Evaluator:
    """Evaluates a network on the evaluation set with the protocol of `config.eval`.

    Attributes:
        pad_to: multiple to which the sides of images are padded, in pixels; 1 for no padding.
    """

    def __init__(
        self,
        model: nn.Module,
        dataset: Dataset,
        eval_config: Any,
        mesh: Mesh,
        pad_value: UInt8[np.ndarray, "3"],
    ):
        """Compiles nothing yet; reads the headers of the evaluation images.

        Args:
            model: the network.
            dataset: its evaluation images are evaluated.
            eval_config: `config.eval`.
            mesh: the images of a batch are split over it.
            pad_value: RGB of the padding.

        Raises:
            UserError: an image is missing or damaged.
        """
        self.pad_to = pad_multiple(image_sizes(dataset.evaluation), eval_config.pad_to)
        self._dataset = dataset
        self._mesh = mesh
        self._batch_size = mesh_lib.round_up_batch(eval_config.batch, mesh.size)
        self._pad_value = pad_value
        self._predictor = Predictor(
            model,
            mesh,
            eval_config.scales,
            eval_config.flip,
            window=eval_config.window,
            window_stride=eval_config.window_stride,
        )
        self._count_pixels = jax.jit(
            functools.partial(_count_pixels, num_classes=len(dataset.classes)),
            out_shardings=(mesh_lib.replicated(mesh), *[mesh_lib.batch_sharding(mesh)] * 2),
        )

    def __call__(
        self,
        variables: Variables,
        render_ids: Collection[str] = (),
        on_example: Callable[[EvalExample], None] = lambda example: None,
        examples: Sequence[Example] | None = None,
    ) -> Score:
        """Evaluates the network with its weak norm.

        Args:
            variables: variables of the network; the strong norm is ignored.
            render_ids: ids of the images to pass to `on_example`.
            on_example: receives each of these images that this process evaluates, in the order of
                evaluation.
            examples: the images to evaluate; all evaluation images unless given.

        Raises:
            UserError: an image or mask is missing or damaged.
            Preempted: the run must stop.
        """
        variables = inference_variables(variables)
        num_classes = len(self._dataset.classes)
        confusion = np.zeros((num_classes, num_classes), np.int64)
        by_image: dict[str, float] = {}
        examples = self._dataset.evaluation if examples is None else examples
        counts_by_image: dict[str, Int[np.ndarray, "_present 4"]] = {}
        batches = image_batches(
            examples, self._dataset, self._batch_size, self.pad_to, self._pad_value
        )
        # The counts of a batch are fetched while the device computes the next batch.
        for batch, outputs in lookahead(batches, functools.partial(self._dispatch, variables)):
            preemption.raise_if_stopping()
            batch_confusion, image_confusions, predicted = outputs
            confusion += np.asarray(batch_confusion, np.int64)
            # The empty images that fill up a batch have no id and no labelled pixel.
            for name, counts in zip(batch.ids, mesh_lib.local_data(image_confusions), strict=False):
                by_image[name] = metrics.mean_iou(counts)
                counts_by_image[name] = metrics.class_counts(counts)
            for example in _select_examples(batch, predicted, render_ids):
                on_example(example)
        shards = multihost.all_gather("scores of images", by_image)
        return Score(
            confusion,
            {k: v for shard in shards for k, v in shard.items()},
            self._gather_counts(counts_by_image),
        )

    def _gather_counts(
        self, local: dict[str, Int[np.ndarray, "_present 4"]]
    ) -> dict[str, Int[np.ndarray, "_present 4"]]:
        """Returns the counts by image of all processes."""
        if multihost.process_count() == 1:
            return local
        items = [(name, counts.tolist()) for name, counts in local.items()]
        gathered: dict[str, Int[np.ndarray, "_present 4"]] = {}
        # In parts, because a message must not become too large; as many in every process.
        for start in range(0, len(self._dataset.evaluation), _IMAGES_PER_MESSAGE):
            part = items[start : start + _IMAGES_PER_MESSAGE]
            for shard in multihost.all_gather(f"counts of images from {start}", part):
                gathered |= {name: np.array(c, np.int64).reshape(-1, 4) for name, c in shard}
        return gathered

    def _dispatch(self, variables: Variables, batch: ImageBatch) -> tuple[Array, Array, Array]:
        """Starts the computation of a batch on the devices; returns as `_count_pixels` does."""
        arrays = mesh_lib.shard_batch({"image": batch.image, "label": batch.label}, self._mesh)
        return self._count_pixels(self._predictor(variables, arrays["image"]), arrays["label"])


def _count_pixels(
    probabilities: Float[Array, "n h w classes"], label: UInt8[Array, "n h w"], num_classes: int
) -> tuple[Int[Array, "classes classes"], Int[Array, "n classes classes"], UInt8[Array, "n h w"]]:
    """Returns the confusion matrices of the batch and of each image, and the predicted classes."""
    predicted = jnp.argmax(probabilities, axis=-1)
    count = functools.partial(metrics.confusion_matrix, num_classes=num_classes, ignore=IGNORE)
    by_image = jax.vmap(count)(predicted, label)
    return by_image.sum(axis=0), by_image, predicted.astype(jnp.uint8)


def _select_examples(
    batch: ImageBatch, predicted: UInt8[Array, "n h w"], ids: Collection[str]
) -> list[EvalExample]:
    """Returns the images of this process's shard whose ids are in `ids`, without their padding."""
    indices = [i for i, name in enumerate(batch.ids) if name in ids]
    if not indices:
        return []
    examples = []
    classes = mesh_lib.local_data(predicted)
    for i in indices:
        height, width = batch.sizes[i]
        region = (i, slice(height), slice(width))
        examples.append(
            EvalExample(batch.ids[i], batch.image[region], batch.label[region], classes[region])
        )
    return examples
