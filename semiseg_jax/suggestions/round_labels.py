"""How much the labels of an image changed between the last two rounds of a run."""

from collections.abc import Iterable
from typing import Any

from etils import epath

from semiseg_jax import pseudo_labels, stages
from semiseg_jax.runtime.errors import UserError
from semiseg_jax.suggestions.uncertainty import label_difference


def differences(workdir: epath.Path, config: Any, ids: Iterable[str]) -> dict[str, float | None]:
    """Returns the share of pixels whose labels differ, by id; None where a round has no label.

    Args:
        workdir: of the run. Methods that label inside the step, and runs of one round, store no two
            sets of labels: all values are then None.
        config: of the run.
        ids: of the images.
    """
    folders = [
        stage.folder / pseudo_labels.PSEUDO_LABELS for stage in stages.schedule(config, workdir)
    ]
    rounds = [
        pseudo_labels.read(folder)
        for folder in folders
        if pseudo_labels.read_manifest(folder) is not None
    ]
    if len(rounds) < 2:
        return dict.fromkeys(ids)
    before, last = rounds[-2:]
    return {id_: _difference(before, last, id_) for id_ in ids}


def _difference(
    before: pseudo_labels.PseudoLabels, last: pseudo_labels.PseudoLabels, id_: str
) -> float | None:
    if id_ not in before or id_ not in last:
        return None
    try:
        one, other = before[id_].classes, last[id_].classes
    except UserError:
        return None  # Labels that were deleted to save space are not needed for the rest.
    return label_difference(one, other) if one.shape == other.shape else None
