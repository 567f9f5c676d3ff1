"""Which stage's weights a run writes to model/, and the sentence that says so and why.

`rounds.keep` is "last", the last student as in the paper, or "best_on_holdout". A hold-out is a
part of the labelled images that data.holdout set aside: the evaluation set if the user named none,
or the images that eval.select = "holdout" selects weights by. An evaluation set that the user named
never chooses, because its score would then be no estimate for other images.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Literal

from semiseg_jax import stages
from semiseg_jax.comparison import bootstrap
from semiseg_jax.comparison.image_counts import ImageCounts
from semiseg_jax.data.dataset import Dataset, Example
from semiseg_jax.runtime import json_forms

# The values of rounds.keep.
LAST, BEST_ON_HOLDOUT = KEEP = ("last", "best_on_holdout")

# What a report reads of the entry "kept" of model.json.
FORM = json_forms.record({"rounds": json_forms.is_count, "sentence": json_forms.is_text})


@dataclasses.dataclass(frozen=True)
class Score:
    """The mIoU of a stage on a set of images.

    Attributes:
        miou: in 0..1.
        counts: of the same images; None if they are not stored.
    """

    miou: float
    counts: ImageCounts | None = None


@dataclasses.dataclass(frozen=True)
class ScoredStage:
    """A finished stage with its scores; None for a score that is not known.

    Attributes:
        kind, round: of the stage.
        evaluated: on the evaluation set.
        held_out: on the hold-out (`holdout_images`).
    """

    kind: str
    round: int
    evaluated: Score | None
    held_out: Score | None = None


@dataclasses.dataclass(frozen=True)
class KeptStage:
    """The stage whose weights are in model/; the entry "kept" of model.json.

    Attributes:
        stage, round: its kind and round.
        rounds: number of students when it was chosen.
        rule: `rounds.keep`.
        chosen_by: number of held-out images that chose it; 0 if none did.
        sentence: says how the last student compares with teacher and control, which stage is kept,
            and why; "" in a run without students.
    """

    stage: str
    round: int
    rounds: int
    rule: str
    chosen_by: int
    sentence: str


def holdout_images(dataset: Dataset) -> tuple[Example, ...]:
    """Returns the held-out images that may choose a stage; none without a hold-out."""
    if dataset.selection:
        return dataset.selection
    return dataset.evaluation if dataset.evaluation_is_held_out else ()


def decide(scored: Sequence[ScoredStage], rule: str, dataset: Dataset) -> KeptStage:
    """Returns the stage to keep, with its sentence.

    Args:
        scored: the finished stages in the order of the run; at least one.
        rule: `rounds.keep`.
        dataset: the images.
    """
    kept, last = choose(scored, rule), _last(scored)
    chosen_by = len(holdout_images(dataset)) if rule == BEST_ON_HOLDOUT else 0
    sentence = _explain(kept, scored, rule, dataset) if last.kind == "student" else ""
    return KeptStage(kept.kind, kept.round, last.round, rule, chosen_by, sentence)


def choose(scored: Sequence[ScoredStage], rule: str) -> ScoredStage:
    """Returns the stage to keep.

    Args:
        scored: the finished stages in the order of the run; at least one.
        rule: `rounds.keep`.

    Returns:
        The last student, or the teacher of a run without students. With "best_on_holdout", the
        stage with the highest mIoU on the hold-out if that is higher than the last student's; of
        several such stages, the first. A stage without a score on the hold-out is not chosen, and
        the last student is kept if it has none itself.
    """
    last = _last(scored)
    if rule == LAST or _miou(last, "held_out") == -math.inf:
        return last
    return _best([last, *scored], "held_out")


# The attribute of a ScoredStage that has its score on a set of images.
_Images = Literal["evaluated", "held_out"]


def _last(scored: Sequence[ScoredStage]) -> ScoredStage:
    """Returns the last student; the teacher if there is none."""
    return [stage for stage in scored if stage.kind != "control"][-1]


def _best(scored: Sequence[ScoredStage], images: _Images) -> ScoredStage:
    """Returns the stage with the highest mIoU; the first of equal ones."""
    return max(scored, key=lambda stage: _miou(stage, images))


def _miou(stage: ScoredStage, images: _Images) -> float:
    """Returns the mIoU, in 0..1; minus infinity if it is not known."""
    score: Score | None = getattr(stage, images)
    return score.miou if score and math.isfinite(score.miou) else -math.inf


def _explain(kept: ScoredStage, scored: Sequence[ScoredStage], rule: str, dataset: Dataset) -> str:
    """Returns the sentence of a run with students."""
    last = _last(scored)
    if len(scored) == 1:
        return f"model/ has {_name(kept, last.round)}, the only stage of the run."
    compare = functools.partial(_compare, last_round=last.round)
    # What there would be without unlabelled images; without teacher and control, what was before.
    others = [stage for stage in scored if stage.kind != "student"]
    baseline = _best(others or [stage for stage in scored if stage is not last], "evaluated")
    kind = "held-out" if dataset.evaluation_is_held_out else "evaluation"
    where = f"on the {_number(dataset.evaluation, kind)}"
    comparison = compare(last, baseline, "evaluated", dataset, where)
    name = _name(kept, last.round)
    if rule == LAST:
        reason = f"model/ has {name} (rounds.keep = last)"
    elif dataset.selection:
        others = [stage for stage in scored if stage is not kept]
        other = last if kept is not last else _best(others, "held_out")
        by = _number(dataset.selection, "held-out")
        choice = compare(kept, other, "held_out", dataset, "there")
        reason = f"model/ has {name}, chosen by the {by}" + (f"; {choice}" if choice else "")
    elif not dataset.evaluation_is_held_out:
        reason = (
            f"model/ has {name}, because no labelled images are held out to choose by; beside an "
            "evaluation set of your own, data.holdout does so only with eval.select = holdout"
        )
    elif kept is last or kept is baseline:
        reason = f"model/ has {name}"
    else:
        reason = f"model/ has {name}; {compare(kept, last, 'evaluated', dataset, 'there')}"
    sentence = f"{comparison}: {reason}." if comparison else f"{reason}."
    return sentence[0].upper() + sentence[1:] if comparison else sentence


def _compare(
    first: ScoredStage,
    second: ScoredStage,
    images: _Images,
    dataset: Dataset,
    where: str,
    last_round: int,
) -> str:
    """Returns a clause that compares two stages; "" if the score of one is not known.

    Args:
        first, second: the stages; the better one becomes the subject.
        images: which of their scores is compared.
        dataset: the images.
        where: names the images at the end of the clause, such as "on the 4 held-out images".
        last_round: of the last student.
    """
    better, worse = sorted((first, second), key=lambda s: _miou(s, images), reverse=True)
    difference = _miou(better, images) - _miou(worse, images)
    if not math.isfinite(difference):
        return ""
    points = f"{_format_points(difference)} better than" if difference else "as good as"
    subject, other = _name(better, last_round), _name(worse, last_round)
    interval = _interval(better, worse, images, dataset, last_round)
    return f"{subject} is {points} {other} {where} ({interval})"


def _interval(
    better: ScoredStage, worse: ScoredStage, images: _Images, dataset: Dataset, last_round: int
) -> str:
    """Returns the interval of the difference in words, or why there is none."""
    examples = dataset.evaluation if images == "evaluated" else holdout_images(dataset)
    ids = [example.id for example in examples]
    arrays = []
    for stage in (better, worse):
        counts = getattr(stage, images).counts
        if counts is None:
            name = _name(stage, last_round)
            return f"no interval, because the pixel counts of each image are missing for {name}"
        arrays.append(counts.to_array(ids, len(dataset.classes)))
    interval = bootstrap.difference_interval(*arrays)
    if interval is None:
        return "no interval, because it takes at least two images"
    low, high = (f"{100 * end:+z.1f}" for end in interval)
    return f"95 % interval over images: {low} to {high}"


def _format_points(difference: float) -> str:
    """Returns a difference in mIoU, in 0..1, as points with one or two digits."""
    points = 100 * difference
    if points < 0.005:
        return "less than 0.01 points of mIoU"
    return f"{points:.1f} points of mIoU" if points >= 0.05 else f"{points:.2f} points of mIoU"


def _number(examples: Sequence[Example], kind: str) -> str:
    """Returns a number of images in words, such as "4 held-out images"."""
    return f"{len(examples)} {kind} image{'' if len(examples) == 1 else 's'}"


def _name(stage: ScoredStage, last_round: int) -> str:
    """Returns the name of a stage inside a sentence."""
    if stage.kind == "student" or (stage.kind == "control" and stage.round != last_round):
        return stages.stage_name(stage.kind, stage.round)
    return f"the {stage.kind}"
