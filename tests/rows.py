"""Result rows for tests, as small as the reader of results.json permits."""

from semiseg_jax.results import ResultRow

PROTOCOL = {
    "data": "d",
    "split": "val",
    "scales": [1.0],
    "flip": False,
    "window": "whole",
    "selection": "last",
    "pad_to": 1,
    "split_hash": "a",
    "evaluation_hash": "e",
    "seed": 0,
    "config_hash": "c",
}


def result_json(protocol=PROTOCOL, **changes):
    """A row as results.json has it: of the teacher, after 10 steps, unless changed."""
    row = {"stage": "teacher", "round": 0, "step": 10, "weights_step": 10}
    row |= {"split": protocol["split"], "miou": 0.25, "iou": [0.5, 0.25, None]}
    row |= {"pixel_accuracy": 0.5, "mean_class_accuracy": 0.5, "pixels": 20, "seed": 0}
    return row | {"protocol": protocol} | changes


def result_row(protocol=PROTOCOL, **changes):
    """The same as a ResultRow."""
    return ResultRow.from_json(result_json(protocol, **changes))
