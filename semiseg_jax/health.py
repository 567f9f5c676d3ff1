"""How pseudo-labels fare from round to round, told without true labels.

Self-training can feed on its own mistakes: a class that the teacher rarely predicts is one that the
student sees rarely, until it is gone. What is measured here shows that while it happens.
"""

import json
from collections.abc import Mapping
from concurrent import futures
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float, Int

from semiseg_jax import distributed
from semiseg_jax.data import labels
from semiseg_jax.data.sources import Dataset
from semiseg_jax.pseudo_labels import MANIFEST

HEALTH = "health.json"
# A class counts as collapsed below this share of what it has among the labelled pixels, or of what
# it had in the round before.
COLLAPSED_AGAINST_LABELS = 0.1
COLLAPSED_AGAINST_BEFORE = 1 / 3
# Label maps compared with those of the round before; of more, as many evenly spaced ones.
MOST_COMPARED = 2000
# Of those that changed most, how many are named.
MOST_CHANGED = 4


def check(
    folder: epath.Path, manifest: Mapping[str, Any], dataset: Dataset, before: epath.Path | None
) -> list[str]:
    """Measures a round's label maps, and writes what was found beside them.

    Args:
        folder: of the label maps.
        manifest: theirs.
        dataset: its labelled masks are read, to compare the classes' shares.
        before: the folder of the round before, if there was one; of one that is gone, to save disk
            perhaps, nothing is compared.

    Returns:
        Lines for a person: the figures, and a warning for each class that collapses.
    """
    share = class_shares(manifest, len(dataset.classes))
    labeled = _shares(_labeled_counts(dataset))
    found: dict[str, Any] = {
        "mean_confidence": _mean_confidence(manifest),
        "ignored": _ignored(manifest),
        "class_share": dict(zip(dataset.classes, share.tolist(), strict=True)),
        "labeled_share": dict(zip(dataset.classes, labeled.tolist(), strict=True)),
    }
    line = f"mean confidence {found['mean_confidence']:.3f}"
    then = None
    earlier = None if before is None else _earlier_manifest(before)
    if before is not None and earlier is None:
        line += f", not compared with the round before: {before / MANIFEST} is missing or damaged"
    elif before is not None and earlier is not None:
        then = class_shares(earlier, len(share))
        changes = changed_pixels(folder, before, sorted(manifest["images"]), dataset)
        changed, compared = np.sum(list(changes.values()), axis=0)
        found["changed"] = float(changed / max(compared, 1))
        shares = {name: int(n) / max(int(of), 1) for name, (n, of) in changes.items()}
        most = sorted(shares, key=lambda name: -shares[name])[:MOST_CHANGED]
        found["most_changed"] = {name: shares[name] for name in most}
        found["drift"] = float(np.abs(share - then).sum() / 2)
        line += f", {100 * found['changed']:.1f} % of the pixels changed since the round before"
    warnings = _warnings(dataset.classes, share, labeled, then)
    found["warnings"] = warnings
    if distributed.is_main():
        labels.write_bytes(folder / HEALTH, (json.dumps(found, indent=1) + "\n").encode())
    return [line, *(f"Warning: {warning}" for warning in warnings)]


def _earlier_manifest(before: epath.Path) -> dict[str, Any] | None:
    """What the round before says of its label maps; None where it is missing or damaged."""
    return distributed.agree(
        "label maps of the round before", lambda: labels.read_json(before / MANIFEST)
    )


def class_shares(manifest: Mapping[str, Any], num_classes: int) -> Float[np.ndarray, " classes"]:
    """Each class's share of the pixels that have a label, in 0..1."""
    counts = np.zeros(num_classes, np.int64)
    for entry in manifest["images"].values():
        for value, count in entry["histogram"].items():
            if int(value) != labels.IGNORE:
                counts[int(value)] += count
    return _shares(counts)


def changed_pixels(
    folder: epath.Path, before: epath.Path, names: list[str], dataset: Dataset
) -> dict[str, tuple[int, int]]:
    """Pixels whose label is another one than in the round before, and pixels compared, by image.

    Pixels that either round left without a label do not count.
    """
    step = -(-len(names) // MOST_COMPARED)
    table = labels.id_table(len(dataset.classes))

    def compare(name: str) -> tuple[int, int]:
        new, old = (labels.read_mask(place / f"{name}.png", table) for place in (folder, before))
        both = (new != labels.IGNORE) & (old != labels.IGNORE)
        return int((both & (new != old)).sum()), int(both.sum())

    with futures.ThreadPoolExecutor() as pool:
        mine = distributed.share(names[::step])
        pairs = distributed.gather_shares("changed labels", list(pool.map(compare, mine)))
    return {name: (n, of) for name, (n, of) in zip(names[::step], pairs, strict=True)}


def _labeled_counts(dataset: Dataset) -> Int[np.ndarray, " classes"]:
    """Pixels of each class in the labelled masks."""
    size = len(dataset.classes)

    def count(mask: str) -> np.ndarray:
        return np.bincount(labels.read_mask(mask, dataset.table).ravel(), minlength=256)[:size]

    with futures.ThreadPoolExecutor() as pool:
        masks = distributed.share([e.mask for e in dataset.labeled if e.mask])
        counts = sum(pool.map(count, masks), np.zeros(size, np.int64))
    return distributed.total("classes of the labelled masks", counts)


def _shares(counts: Int[np.ndarray, " classes"]) -> Float[np.ndarray, " classes"]:
    return counts / max(counts.sum(), 1)


def _mean_confidence(manifest: Mapping[str, Any]) -> float:
    """Over all pixels."""
    entries = manifest["images"].values()
    pixels = [entry["size"][0] * entry["size"][1] for entry in entries]
    return float(np.average([entry["mean_confidence"] for entry in entries], weights=pixels))


def _ignored(manifest: Mapping[str, Any]) -> float:
    """Share of the pixels that were left without a label, in 0..1."""
    entries = manifest["images"].values()
    ignored = sum(entry["histogram"].get(str(labels.IGNORE), 0) for entry in entries)
    return ignored / sum(sum(entry["histogram"].values()) for entry in entries)


def _warnings(
    classes: tuple[str, ...],
    share: Float[np.ndarray, " classes"],
    labeled: Float[np.ndarray, " classes"],
    before: Float[np.ndarray, " classes"] | None,
) -> list[str]:
    found = []
    for i, name in enumerate(classes):
        if labeled[i] > 0 and share[i] == 0:
            found.append(
                f"{name} has vanished from the pseudo-labels; it is {100 * labeled[i]:.2f} % of "
                "the labelled pixels: students will unlearn it, label more of it."
            )
        elif share[i] < COLLAPSED_AGAINST_LABELS * labeled[i]:
            found.append(
                f"{name} is {100 * share[i]:.2f} % of the pseudo-labels and {100 * labeled[i]:.2f} "
                "% of the labelled pixels: it is collapsing, label more of it."
            )
        elif before is not None and share[i] < COLLAPSED_AGAINST_BEFORE * before[i]:
            found.append(
                f"{name} fell from {100 * before[i]:.2f} % of the pseudo-labels to "
                f"{100 * share[i]:.2f} % in one round: it is collapsing, label more of it."
            )
    return found
