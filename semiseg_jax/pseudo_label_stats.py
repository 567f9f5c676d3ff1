"""Statistics of a round's pseudo-labels that need no true labels, and warnings about classes.

Self-training can reinforce its own mistakes: a class that the teacher rarely predicts is rare in
the student's labels, until no label contains it. The statistics show this while it happens.
"""

import json
from collections.abc import Mapping
from concurrent import futures
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float, Int

from semiseg_jax.data import image_io
from semiseg_jax.data.load import Dataset
from semiseg_jax.pseudo_labels import MANIFEST, read_manifest
from semiseg_jax.runtime import fileio, hashes, json_forms, multihost
from semiseg_jax.runtime.errors import UserError

STATS_FILE = "health.json"
_SHARES = json_forms.mapping_of(json_forms.is_number)
_STATS = json_forms.record(
    {
        "mean_confidence": json_forms.is_number,
        "ignored": json_forms.is_number,
        "class_share": _SHARES,
        "labeled_share": _SHARES,
        "warnings": json_forms.list_of(json_forms.is_text),
    },
    {
        "changed": json_forms.is_number,
        "drift": json_forms.is_number,
        "most_changed": json_forms.mapping_of(json_forms.is_number, json_forms.is_name),
    },
)
# A class is reported as collapsing if its share of the pixels is less than this fraction of its
# share of the labelled pixels, or of its share in the previous round.
COLLAPSED_AGAINST_LABELS = 0.1
COLLAPSED_AGAINST_PREVIOUS = 1 / 3
# Largest number of label maps compared with the previous round, evenly spaced over the set.
MAX_COMPARED = 2000
# Number of images listed as those with the most changed pixels.
NUM_MOST_CHANGED = 4


def write_stats(
    folder: epath.Path, manifest: Mapping[str, Any], dataset: Dataset, previous: epath.Path | None
) -> list[str]:
    """Computes the statistics of a round's label maps, and writes them to the folder.

    Args:
        folder: folder of the label maps.
        manifest: manifest of the label maps.
        dataset: its labelled masks are read for the class shares of the labelled pixels.
        previous: folder of the previous round; None for the first round. Without a readable
            manifest in it nothing is compared: the folder may have been removed to save space.

    Returns:
        Lines for the user: the figures, and a warning for each class that collapses.
    """
    share = class_shares(manifest, len(dataset.classes))
    labeled_share = _normalize(_labeled_counts(dataset))
    stats: dict[str, Any] = {
        "mean_confidence": _mean_confidence(manifest),
        "ignored": _ignored_share(manifest),
        "class_share": dict(zip(dataset.classes, share.tolist(), strict=True)),
        "labeled_share": dict(zip(dataset.classes, labeled_share.tolist(), strict=True)),
    }
    line = f"mean confidence {stats['mean_confidence']:.3f}"
    previous_share = None
    previous_manifest = None if previous is None else _previous_manifest(previous)
    if previous is not None and previous_manifest is None:
        line += f", not compared with the round before: {previous / MANIFEST} is missing or damaged"
    elif previous is not None and previous_manifest is not None:
        previous_share = class_shares(previous_manifest, len(share))
        counts = changed_pixels(folder, previous, sorted(manifest["images"]), dataset)
        changed, compared = np.sum(list(counts.values()), axis=0)
        stats["changed"] = float(changed / max(compared, 1))
        changes = {name: int(n) / max(int(total), 1) for name, (n, total) in counts.items()}
        most_changed = sorted(changes, key=lambda name: -changes[name])[:NUM_MOST_CHANGED]
        stats["most_changed"] = {name: changes[name] for name in most_changed}
        # Total variation distance of the class distributions of the two rounds.
        stats["drift"] = float(np.abs(share - previous_share).sum() / 2)
        line += f", {100 * stats['changed']:.1f} % of the pixels changed since the round before"
    warnings = _collapse_warnings(dataset.classes, share, labeled_share, previous_share)
    stats["warnings"] = warnings
    if multihost.is_main():
        fileio.write_bytes(folder / STATS_FILE, (json.dumps(stats, indent=1) + "\n").encode())
    return [line, *(f"Warning: {warning}" for warning in warnings)]


def read_stats(folder: epath.Path) -> dict[str, Any] | None:
    """Returns the content of health.json; None if it is missing, damaged or of another form.

    Raises:
        UserError: the file is not readable.
    """
    stats = fileio.read_json(folder / STATS_FILE, _STATS)
    if stats is None or stats["class_share"].keys() != stats["labeled_share"].keys():
        return None
    return stats


def _previous_manifest(folder: epath.Path) -> dict[str, Any] | None:
    """Returns the manifest of the previous round; None if it is missing or damaged."""

    def read() -> dict[str, Any] | None:
        manifest = read_manifest(folder)
        return manifest if manifest and hashes.is_intact(manifest) else None

    return multihost.broadcast_from_main("label maps of the round before", read)


def class_shares(manifest: Mapping[str, Any], num_classes: int) -> Float[np.ndarray, " classes"]:
    """Returns the share of each class among the pixels with a label, in 0..1."""
    counts = np.zeros(image_io.IGNORE + 1, np.int64)
    for entry in manifest["images"].values():
        for value, count in entry["histogram"].items():
            counts[int(value)] += count
    return _normalize(counts[:num_classes])


def changed_pixels(
    folder: epath.Path, previous: epath.Path, names: list[str], dataset: Dataset
) -> dict[str, tuple[int, int]]:
    """Returns the number of changed pixels and of compared pixels, by image.

    Compares the pixels with a label in both rounds, of images with a readable earlier label map; of
    many images MAX_COMPARED at most.

    Args:
        folder: folder of the label maps.
        previous: folder of the label maps of the previous round.
        names: ids of the images.
        dataset: provides the classes.
    """
    step = -(-len(names) // MAX_COMPARED)
    table = image_io.id_table(len(dataset.classes))

    def compare(name: str) -> tuple[int, int]:
        new = image_io.read_mask(folder / f"{name}.png", table)
        try:
            old = image_io.read_mask(previous / f"{name}.png", table)
        except UserError:
            return 0, 0  # Removed to save space, or damaged: nothing but this number needs it.
        if new.shape != old.shape:
            return 0, 0
        labeled = (new != image_io.IGNORE) & (old != image_io.IGNORE)
        return int((labeled & (new != old)).sum()), int(labeled.sum())

    with futures.ThreadPoolExecutor() as pool:
        local = list(pool.map(compare, multihost.local_shard(names[::step])))
    counts = multihost.all_gather_shards("changed labels", local)
    return {name: (n, total) for name, (n, total) in zip(names[::step], counts, strict=True)}


def _labeled_counts(dataset: Dataset) -> Int[np.ndarray, " classes"]:
    """Returns the number of pixels of each class in the labelled masks."""
    num_classes = len(dataset.classes)

    def count(mask: str) -> np.ndarray:
        labels = image_io.read_mask(mask, dataset.table, dataset.mask_format).ravel()
        return np.bincount(labels, minlength=256)[:num_classes]

    with futures.ThreadPoolExecutor() as pool:
        masks = multihost.local_shard([e.mask for e in dataset.labeled if e.mask])
        counts = sum(pool.map(count, masks), np.zeros(num_classes, np.int64))
    return multihost.all_reduce_sum("classes of the labelled masks", counts)


def _normalize(counts: Int[np.ndarray, " classes"]) -> Float[np.ndarray, " classes"]:
    return counts / max(counts.sum(), 1)


def _mean_confidence(manifest: Mapping[str, Any]) -> float:
    """Returns the mean confidence over the pixels of all images."""
    entries = manifest["images"].values()
    pixels = [entry["size"][0] * entry["size"][1] for entry in entries]
    return float(np.average([entry["mean_confidence"] for entry in entries], weights=pixels))


def _ignored_share(manifest: Mapping[str, Any]) -> float:
    """Returns the share of the pixels without a label, in 0..1."""
    entries = manifest["images"].values()
    ignored = sum(entry["histogram"].get(str(image_io.IGNORE), 0) for entry in entries)
    return ignored / sum(sum(entry["histogram"].values()) for entry in entries)


def _collapse_warnings(
    classes: tuple[str, ...],
    share: Float[np.ndarray, " classes"],
    labeled: Float[np.ndarray, " classes"],
    previous: Float[np.ndarray, " classes"] | None,
) -> list[str]:
    """Returns a sentence for each class that is vanishing; the shares are in 0..1."""
    warnings = []
    for i, name in enumerate(classes):
        if labeled[i] > 0 and share[i] == 0:
            warnings.append(
                f"{name} has vanished from the pseudo-labels; it is {100 * labeled[i]:.2f} % of "
                "the labelled pixels: students will unlearn it, label more of it."
            )
        elif share[i] < COLLAPSED_AGAINST_LABELS * labeled[i]:
            warnings.append(
                f"{name} is {100 * share[i]:.2f} % of the pseudo-labels and {100 * labeled[i]:.2f} "
                "% of the labelled pixels: it is collapsing, label more of it."
            )
        elif previous is not None and share[i] < COLLAPSED_AGAINST_PREVIOUS * previous[i]:
            warnings.append(
                f"{name} fell from {100 * previous[i]:.2f} % of the pseudo-labels to "
                f"{100 * share[i]:.2f} % in one round: it is collapsing, label more of it."
            )
    return warnings
