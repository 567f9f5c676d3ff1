"""Whether labels that are made inside the step train the network: the shares of kept pixels.

A threshold that is never met is training on labels alone under another name, and shows in no loss.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from semiseg_jax.methods import discriminator_health
from semiseg_jax.methods.adversarial_method import AdversarialMethod
from semiseg_jax.methods.method import KEPT_PIXELS, LABELED_PIXELS, OnlineMethod

# Shares of the pixels: what counts as nothing, and as nearly everything.
NOTHING, EVERYTHING = 1e-3, 0.99
# The share of one class among the kept pixels that counts as nearly all of them.
ONE_CLASS = 0.95
# The stretch of a stage over which nothing may be kept, and its beginning, as shares of its steps.
STRETCH, BEGINNING = 0.25, 0.1


@dataclasses.dataclass(frozen=True)
class LabelHealth:
    """What the labels of a stage did, over all its steps.

    Attributes:
        kept: share of the unlabelled pixels that had a loss, the mean over the lines of metrics.
        kept_by_class: the same of the pixels with this label; None for a class without a label.
        warnings: a sentence for each way in which the labels trained nothing, or left out nothing.
    """

    kept: float
    kept_by_class: tuple[float | None, ...]
    warnings: tuple[str, ...]


def summarize(
    lines: Sequence[Mapping[str, float]],
    steps: int,
    classes: Sequence[str],
    method: OnlineMethod,
) -> LabelHealth | None:
    """Returns the health of the labels of a stage so far; None without lines.

    Args:
        lines: of metrics, each with "step", and from `by_class`.
        steps: of the stage.
        classes: names of the classes.
        method: of the stage.
    """
    lines = [line for line in lines if "kept" in line]
    if not lines:
        return None
    by_class = [[line[f"kept/{c}"] for line in lines if f"kept/{c}" in line] for c in classes]
    found = []
    if method.filters_by_confidence:
        found = _empty_stretches(lines, steps) + _bad_beginning(lines, steps, classes)
    if isinstance(method, AdversarialMethod):
        found += discriminator_health.warnings(lines, steps, method.first_step)
    return LabelHealth(
        kept=float(np.mean([line["kept"] for line in lines])),
        kept_by_class=tuple(float(np.mean(shares)) if shares else None for shares in by_class),
        warnings=tuple(found),
    )


def _empty_stretches(lines: Sequence[Mapping[str, float]], steps: int) -> list[str]:
    """A sentence for each finished stretch in which most lines have no kept pixels."""
    found = []
    for first in np.arange(0, 1, STRETCH) * steps:
        last = first + STRETCH * steps
        stretch = [line for line in lines if first < line["step"] <= last]
        empty = [line for line in stretch if line["kept"] < NOTHING]
        if lines[-1]["step"] >= last and 2 * len(empty) > len(stretch):
            found.append(
                f"From step {first + 1:.0f} to {last:.0f} the unlabelled loss had less than "
                f"{NOTHING:.1%} of the pixels most of the time: the student was trained on labels "
                "alone there; lower the threshold."
            )
    return found


def _bad_beginning(
    lines: Sequence[Mapping[str, float]], steps: int, classes: Sequence[str]
) -> list[str]:
    """Sentences on a beginning in which all pixels are kept, or those of one class alone."""
    end = max(BEGINNING * steps, lines[0]["step"])
    if lines[-1]["step"] < end:
        return []
    found = []
    beginning = [line for line in lines if line["step"] <= end]
    kept = float(np.mean([line["kept"] for line in beginning]))
    if kept > EVERYTHING:
        found.append(
            f"From the start {kept:.1%} of the unlabelled pixels have a loss: the threshold leaves "
            "out nothing; raise it."
        )
    for name in classes:
        share = float(np.mean([line.get(f"kept_of/{name}", 0.0) for line in beginning]))
        if len(classes) > 2 and share > ONE_CLASS:
            found.append(
                f"At the start {share:.1%} of the unlabelled pixels with a loss are {name}: the "
                "other classes are below the threshold; lower it."
            )
    return found


def by_class(means: Mapping[str, float], classes: Sequence[str]) -> dict[str, float]:
    """Returns a line of metrics with shares by the name of the class in place of counts of pixels.

    "kept/CLASS" is the share of the pixels with this label that had a loss, for the classes that
    occur; "kept_of/CLASS" the share of the class among the pixels that had one, if any had.

    Args:
        means: metrics by name, with "kept_pixels/0", … and "labeled_pixels/0", …
        classes: names of the classes.
    """
    names = {f"{count}/{i}" for count in (KEPT_PIXELS, LABELED_PIXELS) for i in range(len(classes))}
    kept, labeled = (
        np.array([means[f"{count}/{i}"] for i in range(len(classes))])
        for count in (KEPT_PIXELS, LABELED_PIXELS)
    )
    line = {name: value for name, value in means.items() if name not in names}
    for name, of_kept, of_labeled in zip(classes, kept, labeled, strict=True):
        if of_labeled:
            line[f"kept/{name}"] = float(of_kept / of_labeled)
        if kept.sum():
            line[f"kept_of/{name}"] = float(of_kept / kept.sum())
    return line
