"""The order in which images are suggested, and the reasons in words.

The rule "combined", for each image:

    uncertainty  the mean of the image's ranks, 0 (most sure) to 1, in entropy, margin, and, where
                 they are known, the disagreement of views and that of rounds
    deficit      the rank, 0 to 1, of its predicted share of classes with few labelled pixels
    importance   (2 * uncertainty + deficit) / 3
    next image   that with the largest importance * distance to the nearest labelled or picked image

The other rules use one of these alone: entropy, margin, disagreement (of the views), diversity
(the distance) or random (of the seed).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from scipy import stats

from semiseg_jax.suggestions import diversity
from semiseg_jax.suggestions.uncertainty import Uncertainty

RULES = ("combined", "entropy", "margin", "disagreement", "diversity", "random")
# Classes that the sentence of an image names, at most, and the smallest share that is named.
_NAMED_CLASSES, _NAMED_SHARE = 3, 0.002


@dataclasses.dataclass(frozen=True)
class Suggestion:
    """An image to label.

    Attributes:
        id: of the image.
        reasons: numbers by name: the measures, the ranks, the distance.
        sentence: the same in words.
    """

    id: str
    reasons: Mapping[str, float | None]
    sentence: str


@dataclasses.dataclass(frozen=True)
class Pool:
    """The images to choose from, and the labelled ones.

    Attributes:
        ids: of the images to choose from.
        measures: of each of them.
        rounds: share of pixels in which the labels of the last two rounds differ, or None.
        features: of each image, standardised together with those of the labelled images.
        labeled_features: of the labelled images.
        labeled_pixels: pixels of each class in the labelled images.
        classes: names of the classes.
    """

    ids: Sequence[str]
    measures: Sequence[Uncertainty]
    rounds: Sequence[float | None]
    features: Float[np.ndarray, "n d"]
    labeled_features: Float[np.ndarray, "m d"]
    labeled_pixels: Int[np.ndarray, " classes"]
    classes: Sequence[str]


def deficits(labeled_pixels: Int[np.ndarray, " classes"]) -> Float[np.ndarray, " classes"]:
    """Returns how much each class lacks labels: 1 without a label, 0 from an even share on.

    An even share is one over the number of classes.
    """
    shares = labeled_pixels / max(int(labeled_pixels.sum()), 1)
    return np.maximum(0.0, 1 - shares * len(shares))


def ranks(values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Returns the rank of each value in 0..1; equal values share the mean of their ranks."""
    if len(values) < 2:
        return np.full(len(values), 0.5)
    return (stats.rankdata(values) - 1) / (len(values) - 1)


def suggest(pool: Pool, count: int, by: str, seed: int) -> list[Suggestion]:
    """Returns the images to label next, the first one first; all if there are at most `count`.

    Args:
        pool: the images.
        count: of images.
        by: one of RULES.
        seed: of the rule "random".
    """
    columns = _columns(pool)
    importance = _importance(columns, by)
    if by in ("combined", "diversity"):
        order, distances = diversity.spread(pool.features, pool.labeled_features, importance, count)
    else:
        if by == "random":
            importance = np.random.default_rng(seed).permutation(len(pool.ids)).astype(float)
        order = np.argsort(-importance, kind="stable")[:count]
        distances = columns["distance"][order]
    columns["importance"] = importance
    return [
        _explain(pool, columns, int(index), float(distance), by)
        for index, distance in zip(order, distances, strict=True)
    ]


def _columns(pool: Pool) -> dict[str, Float[np.ndarray, " n"]]:
    """Returns the measures of all images by name; those that are not known are left out."""
    shares = np.array([m.class_shares for m in pool.measures]).reshape(-1, len(pool.classes))
    columns: dict[str, list[Any]] = {
        "entropy": [m.entropy for m in pool.measures],
        "margin": [m.margin for m in pool.measures],
        "disagreement_of_views": [m.views for m in pool.measures],
        "disagreement_of_rounds": list(pool.rounds),
    }
    # One image without the measure, such as one that was added after the run, leaves it out.
    known: dict[str, Any] = {
        k: np.array(v, float) for k, v in columns.items() if v and None not in v
    }
    known["uncertainty"] = np.mean([ranks(column) for column in known.values()], axis=0)
    known["deficit"] = shares @ deficits(pool.labeled_pixels)
    known["distance"] = diversity.nearest_distances(pool.features, pool.labeled_features)
    return known


def _importance(columns: Mapping[str, Float[np.ndarray, " n"]], by: str) -> Any:
    if by == "combined":
        return (2 * columns["uncertainty"] + ranks(columns["deficit"])) / 3
    if by == "disagreement":
        # A single view agrees with itself.
        return columns.get("disagreement_of_views", np.zeros_like(columns["entropy"]))
    return columns[by] if by in columns else np.ones_like(columns["entropy"])


def _explain(
    pool: Pool, columns: Mapping[str, Any], index: int, distance: float, by: str
) -> Suggestion:
    reasons: dict[str, float | None] = {
        name: _rounded(float(column[index])) for name, column in columns.items()
    }
    reasons["distance_when_picked"] = _rounded(distance)
    above = 100 * ranks(columns["uncertainty"])[index]
    words = [f"mean entropy {reasons['entropy']:.3f}, less sure than {above:.0f} % of the images"]
    if "disagreement_of_views" in columns:
        words.append(
            f"scales and mirror images disagree with their mean in "
            f"{100 * columns['disagreement_of_views'][index]:.1f} % of the pixels"
        )
    if "disagreement_of_rounds" in columns:
        words.append(
            "the last two rounds label "
            f"{100 * columns['disagreement_of_rounds'][index]:.1f} % of the pixels differently"
        )
    if np.isfinite(distance):
        words.append(
            f"distance {distance:.2f} to the nearest image that is labelled or listed before"
            if by in ("combined", "diversity")
            else f"distance {distance:.2f} to the nearest labelled image"
        )
    rare = _rare_classes(pool, index)
    if rare:
        words.append(f"shows {rare}, of which few pixels are labelled")
    if by == "random":
        words.insert(0, "drawn at random")
    sentence = "; ".join(words)
    return Suggestion(pool.ids[index], reasons, f"{sentence[0].upper()}{sentence[1:]}.")


def _rounded(value: float) -> float | None:
    return round(value, 6) if np.isfinite(value) else None


def _rare_classes(pool: Pool, index: int) -> str:
    """Returns the names of the predicted classes with the largest deficit, in words."""
    shares, lack = pool.measures[index].class_shares, deficits(pool.labeled_pixels)
    rare = [i for i in np.argsort(-shares * lack) if lack[i] > 0.5 and shares[i] >= _NAMED_SHARE]
    return ", ".join(pool.classes[i] for i in rare[:_NAMED_CLASSES])
