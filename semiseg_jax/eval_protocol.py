"""The protocol of an evaluation: which mIoU values may stand in one table."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from semiseg_jax import workdir
from semiseg_jax.data.dataset import Dataset
from semiseg_jax.runtime import json_forms

# By value of eval.select: the selection that a protocol names.
SELECTIONS = {
    "last": "last",
    "holdout": "best on a hold-out of the labelled set",
    "reported": "best on the reported set",
}
# Both sides of a window or of its stride, in pixels.
_SIDES = json_forms.list_of(json_forms.is_integer, range(2, 3))
_WINDOW = json_forms.record({"size": _SIDES, "stride": _SIDES})
# The form of each field in a JSON file.
_FORMS: Mapping[str, json_forms.Form] = {
    "data": json_forms.is_text,
    "split": json_forms.is_text,
    "scales": json_forms.list_of(json_forms.is_number),
    "flip": json_forms.is_flag,
    "window": lambda value: value == "whole" or _WINDOW(value),
    "selection": json_forms.is_text,
    "pad_to": json_forms.is_integer,
    "split_hash": json_forms.is_text,
    "evaluation_hash": json_forms.optional(json_forms.is_text),
    "seed": json_forms.is_integer,
    "config_hash": json_forms.is_text,
}
_METHOD = ("data", "split", "scales", "flip", "window", "pad_to", "selection")
# What must agree before two mIoU values stand in one table.
COMPARED = (*_METHOD, "split_hash")
# The same where different training images are compared.
EVALUATION = (*_METHOD, "evaluation_hash")


@dataclasses.dataclass(frozen=True)
class EvalProtocol:
    """How an mIoU was obtained; a part of its result row.

    Attributes:
        data: name of the data set.
        split: of the evaluated images, such as "val"; "holdout" for held-out training images.
        scales: sizes at which an image was seen, as multiples of its own.
        flip: mirrored images were seen too.
        window: "whole", or {"size": [height, width], "stride": [down, across]} in pixels.
        selection: which weights of a stage are reported, a value of SELECTIONS.
        pad_to: sides were padded to multiples of this, in pixels; 1 for no padding.
        split_hash: names the labelled, unlabelled and evaluated images.
        evaluation_hash: names the evaluated images; None in rows of early versions.
        seed: of the run.
        config_hash: of the run's config.
    """

    data: str
    split: str
    scales: tuple[float, ...]
    flip: bool
    window: str | Mapping[str, Any]
    selection: str
    pad_to: int
    split_hash: str
    evaluation_hash: str | None
    seed: int
    config_hash: str

    @classmethod
    def of_run(cls, config: Any, dataset: Dataset, pad_to: int) -> "EvalProtocol":
        """The protocol of the evaluations of a run.

        Args:
            config: the whole config.
            dataset: the images.
            pad_to: of the evaluator, in pixels.
        """
        return cls(
            data=dataset.name,
            split=dataset.evaluated_on,
            pad_to=pad_to,
            split_hash=dataset.split_hash,
            evaluation_hash=dataset.evaluation_hash,
            seed=config.seed,
            config_hash=workdir.config_hash(config),
            **_configured(config.eval),
        )

    @classmethod
    def from_json(cls, content: Any) -> "EvalProtocol":
        """The protocol that `to_json` gave.

        Raises:
            ValueError: it is no object, a key is missing, or a value is of another form.
        """
        values = json_forms.checked(content, _FORMS, {"evaluation_hash": None}, "a protocol")
        return cls(**values | {"scales": tuple(map(float, content["scales"]))})

    def to_json(self) -> dict[str, Any]:
        """What results.json holds of it; without `evaluation_hash` where that is None."""
        content = dataclasses.asdict(self) | {"scales": list(self.scales)}
        return {k: v for k, v in content.items() if v is not None}

    def matches_config(self, eval_config: Any) -> bool:
        """Whether this is the protocol that `config.eval` asks for.

        As far as that can be decided without the data: a held-out evaluation set belongs to any
        split, and a set of few image sizes is not padded, whatever `pad_to`.
        """
        return (
            self.split in (eval_config.split, "holdout")
            and self.pad_to in (1, eval_config.pad_to)
            and all(getattr(self, k) == value for k, value in _configured(eval_config).items())
        )

    def is_comparable(self, other: "EvalProtocol", keys: Sequence[str] = COMPARED) -> bool:
        """Whether results of the two protocols may stand in one table.

        Args:
            other: protocol of the other result.
            keys: COMPARED, or EVALUATION.
        """
        # In rows of early versions only the hash of the split names the evaluated images.
        if self.split_hash == other.split_hash:
            keys = [key for key in keys if key != "evaluation_hash"]
        return all(getattr(self, key) == getattr(other, key) for key in keys)


def _configured(eval_config: Any) -> dict[str, Any]:
    """The fields of a protocol that follow from the config alone."""
    window = {"size": list(eval_config.window), "stride": list(eval_config.window_stride)}
    return {
        "scales": tuple(map(float, eval_config.scales)),
        "flip": eval_config.flip,
        "window": window if eval_config.window else "whole",
        "selection": SELECTIONS[eval_config.select],
    }
