"""mIoU of a network on whole images, every pixel counted exactly once."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int, UInt8

from semiseg_jax import interruption, metrics, provenance
from semiseg_jax import mesh as mesh_lib
from semiseg_jax.data.labels import IGNORE
from semiseg_jax.data.pipeline import image_batches, padding_for
from semiseg_jax.data.sources import Dataset
from semiseg_jax.inference import Predictor
from semiseg_jax.state import Variables, for_inference


@dataclasses.dataclass(frozen=True)
class Score:
    """An evaluation's sufficient statistic, and what follows from it.

    Attributes:
        confusion: pixel counts, rows the labels, int64.
    """

    confusion: Int[np.ndarray, "classes classes"]

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
        self._batch = eval_config.batch
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
            lambda probabilities, labels: metrics.confusion_matrix(
                jnp.argmax(probabilities, axis=-1), labels, len(dataset.classes), IGNORE
            ),
            out_shardings=mesh_lib.replicated(mesh),
        )

    def __call__(self, variables: Variables) -> Score:
        """Scores the network with its weak norm.

        Raises:
            UserError: an image or mask is missing or damaged.
            Interrupted: that was asked for.
        """
        variables = for_inference(variables)
        size = len(self._dataset.classes)
        total = np.zeros((size, size), np.int64)
        counting = None
        batches = image_batches(
            self._dataset.evaluation, self._dataset, self._batch, self.pad_to, self._colour
        )
        for batch in batches:
            interruption.stop_if(self._asked)
            arrays = mesh_lib.to_devices({"image": batch.image, "label": batch.label}, self._mesh)
            counts = self._count(self._predictor(variables, arrays["image"]), arrays["label"])
            # The last batch's counts are fetched while the device works on this one.
            if counting is not None:
                total += np.asarray(counting, np.int64)
            counting = counts
        if counting is not None:
            total += np.asarray(counting, np.int64)
        return Score(total)


# What must agree before two mIoU stand in one table; a row's protocol says more.
COMPARED = ("data", "split", "scales", "flip", "window", "pad_to", "selection", "split_hash")


def protocol(config: Any, dataset: Dataset, pad_to: int) -> dict[str, Any]:
    """How a result was obtained; stands on its row."""
    window = {"size": list(config.eval.window), "stride": list(config.eval.window_stride)}
    return {
        "data": dataset.name,
        "split": dataset.evaluated_on,
        "scales": list(config.eval.scales),
        "flip": config.eval.flip,
        "window": window if config.eval.window else "whole",
        "pad_to": pad_to,
        "selection": "last",
        "split_hash": dataset.split_hash,
        "seed": config.seed,
        "config_hash": provenance.config_hash(config),
    }


def comparable(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether results of these two protocols may stand in one table."""
    return all(one[key] == other[key] for key in COMPARED)
