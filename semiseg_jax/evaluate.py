"""mIoU of a network on whole images, every pixel counted exactly once."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, UInt8

from semiseg_jax import distributed, interruption, metrics, provenance
from semiseg_jax import mesh as mesh_lib
from semiseg_jax.data import splits
from semiseg_jax.data.labels import IGNORE
from semiseg_jax.data.pipeline import ImageBatch, image_batches, padding_for
from semiseg_jax.data.sources import Dataset
from semiseg_jax.inference import Predictor, overlapping
from semiseg_jax.state import Variables, for_inference


@dataclasses.dataclass(frozen=True)
class Score:
    """An evaluation's sufficient statistic, and what follows from it.

    Attributes:
        confusion: pixel counts, rows the labels, int64.
        by_image: mIoU of each image by itself, by its id; NaN where it has no labelled pixel.
    """

    confusion: Int[np.ndarray, "classes classes"]
    by_image: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def miou(self) -> float:
        """Mean over the classes that occur, in 0..1."""
        return metrics.mean_iou(self.confusion)

    @property
    def iou(self) -> list[float | None]:
        """By class, in 0..1; None where a class occurs neither in labels nor in predictions."""
        return [None if np.isnan(v) else float(v) for v in metrics.iou(self.confusion)]

    @property
    def pixels(self) -> int:
        """Labelled pixels counted."""
        return int(self.confusion.sum())


@dataclasses.dataclass(frozen=True)
class Seen:
    """An evaluation image, its labels, and the classes that the network sees in it."""

    id: str
    image: UInt8[np.ndarray, "h w 3"]
    label: UInt8[np.ndarray, "h w"]
    predicted: UInt8[np.ndarray, "h w"]


class Evaluator:
    """Evaluates on the evaluation set by the protocol of `config.eval`.

    Attributes:
        pad_to: what sides are padded to multiples of, in pixels; 1 for no padding.
    """

    def __init__(
        self,
        model: nn.Module,
        dataset: Dataset,
        eval_config: Any,
        mesh: Mesh,
        colour: UInt8[np.ndarray, "3"],
        asked: interruption.Asked = interruption.never,
    ):
        self.pad_to = padding_for(dataset.evaluation, eval_config.pad_to)
        self._dataset = dataset
        self._mesh = mesh
        self._batch = mesh_lib.batch_over(eval_config.batch, mesh.size)
        self._colour = colour
        self._asked = asked
        self._predictor = Predictor(
            model,
            mesh,
            eval_config.scales,
            eval_config.flip,
            window=eval_config.window,
            window_stride=eval_config.window_stride,
        )
        self._count = jax.jit(
            functools.partial(_count, num_classes=len(dataset.classes)),
            out_shardings=(mesh_lib.replicated(mesh), *[mesh_lib.split_by_image(mesh)] * 2),
        )

    def __call__(
        self,
        variables: Variables,
        shown: Collection[str] = (),
        show: Callable[[Seen], None] = lambda seen: None,
    ) -> Score:
        """Scores the network with its weak norm.

        Args:
            variables: of the network.
            shown: ids of images to show.
            show: takes each of them that this process evaluates, in that order.

        Raises:
            UserError: an image or mask is missing or damaged.
            Interrupted: that was asked for.
        """
        variables = for_inference(variables)
        size = len(self._dataset.classes)
        score = Score(np.zeros((size, size), np.int64), {})
        batches = image_batches(
            self._dataset.evaluation, self._dataset, self._batch, self.pad_to, self._colour
        )
        # A batch's counts are fetched while the device works on the next one.
        for batch, counts in overlapping(batches, functools.partial(self._start, variables)):
            interruption.stop_if(self._asked)
            total, by_image, predicted = counts
            _add(score, batch, total, by_image, predicted, shown, show)
        parts = distributed.gather("scores of images", score.by_image)
        return Score(score.confusion, {k: v for part in parts for k, v in part.items()})

    def _start(self, variables: Variables, batch: ImageBatch) -> tuple[Array, Array, Array]:
        """Sets the devices to work on a batch; see `_count`."""
        arrays = mesh_lib.to_devices({"image": batch.image, "label": batch.label}, self._mesh)
        return self._count(self._predictor(variables, arrays["image"]), arrays["label"])


def _count(
    probabilities: Float[Array, "n h w classes"], label: UInt8[Array, "n h w"], num_classes: int
) -> tuple[Int[Array, "classes classes"], Int[Array, "n classes classes"], UInt8[Array, "n h w"]]:
    """The confusion matrix of the batch, that of each image, and the predicted classes."""
    predicted = jnp.argmax(probabilities, axis=-1)
    count = functools.partial(metrics.confusion_matrix, num_classes=num_classes, ignore=IGNORE)
    by_image = jax.vmap(count)(predicted, label)
    return by_image.sum(axis=0), by_image, predicted.astype(jnp.uint8)


def _add(
    score: Score,
    batch: ImageBatch,
    total: Int[Array, "classes classes"],
    by_image: Int[Array, "n classes classes"],
    predicted: UInt8[Array, "n h w"],
    shown: Collection[str],
    show: Callable[[Seen], None],
) -> None:
    """Adds a batch to a score, and shows those of its images that are to be shown."""
    score.confusion[...] += np.asarray(total, np.int64)
    # The empty images that fill a batch have no id, and no labelled pixel.
    score.by_image.update(
        (name, metrics.mean_iou(confusion))
        for name, confusion in zip(batch.ids, mesh_lib.from_devices(by_image), strict=False)
    )
    if shown and any(name in shown for name in batch.ids):
        classes = mesh_lib.from_devices(predicted)
        for i, name in enumerate(batch.ids):
            if name in shown:
                height, width = batch.sizes[i]
                cut = (i, slice(height), slice(width))
                show(Seen(name, batch.image[cut], batch.label[cut], classes[cut]))


# By value of eval.select: what a row's protocol says.
SELECTIONS = {
    "last": "last",
    "holdout": "best on a hold-out of the labelled set",
    "reported": "best on the reported set",
}
# What must agree before two mIoU stand in one table; a row's protocol says more.
_HOW = ("data", "split", "scales", "flip", "window", "pad_to", "selection")
COMPARED = (*_HOW, "split_hash")
# The same where the images to train on are what is compared.
EVALUATION = (*_HOW, "evaluation_hash")


def protocol(config: Any, dataset: Dataset, pad_to: int) -> dict[str, Any]:
    """How a result was obtained; stands on its row."""
    return {
        "data": dataset.name,
        "split": dataset.evaluated_on,
        **_asked(config.eval),
        "pad_to": pad_to,
        "split_hash": dataset.split_hash,
        "evaluation_hash": splits.split_hash([[e.id for e in dataset.evaluation]]),
        "seed": config.seed,
        "config_hash": provenance.config_hash(config),
    }


def answers(found: dict[str, Any], eval_config: Any) -> bool:
    """Whether the protocol of a result is what `config.eval` asks for.

    As far as that can be told without the data: an evaluation set that was held out is any split's,
    and one of few sizes is padded for no `pad_to`.
    """
    return (
        found["split"] in (eval_config.split, "holdout")
        and found["pad_to"] in (1, eval_config.pad_to)
        and all(found[key] == value for key, value in _asked(eval_config).items())
    )


def _asked(eval_config: Any) -> dict[str, Any]:
    """What the config alone says of a protocol."""
    window = {"size": list(eval_config.window), "stride": list(eval_config.window_stride)}
    return {
        "scales": list(eval_config.scales),
        "flip": eval_config.flip,
        "window": window if eval_config.window else "whole",
        "selection": SELECTIONS[eval_config.select],
    }


def comparable(
    one: Mapping[str, Any], other: Mapping[str, Any], keys: Sequence[str] = COMPARED
) -> bool:
    """Whether results of these two protocols may stand in one table.

    Args:
        one, other: protocols.
        keys: COMPARED, or EVALUATION.
    """
    # Rows from before the evaluated images had a hash: those of one split are the same.
    if one.get("split_hash") == other.get("split_hash"):
        keys = [key for key in keys if key != "evaluation_hash"]
    return all(one.get(key) == other.get(key) for key in keys)
