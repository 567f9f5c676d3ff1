"""Which stage is kept, over all situations, and what is said of it."""

import itertools
import math
import re

import numpy as np
import pytest

from semiseg_jax.comparison import kept_stage
from semiseg_jax.comparison.image_counts import ImageCounts
from semiseg_jax.comparison.kept_stage import KEEP, Score, ScoredStage
from semiseg_jax.data import image_io
from semiseg_jax.data.dataset import Dataset, Example

RUNS = (
    [("teacher", 0)],
    [("teacher", 0), ("student", 1)],
    [("teacher", 0), ("student", 1), ("student", 2), ("control", 2)],
    [("teacher", 0), ("student", 1), ("student", 2), ("control", 1), ("control", 2)],
)
MIOUS = (None, 0.5, 0.6, float("nan"))


def examples(prefix, count):
    return tuple(Example(f"{prefix}{i}", f"{prefix}{i}.png", "mask.png") for i in range(count))


def dataset(evaluation=4, selection=0, held_out=False):
    """A data set of two classes: the numbers of its evaluation and selection images."""
    return Dataset(
        name="d",
        classes=("a", "b"),
        palette=((0, 0, 0), (1, 1, 1)),
        table=image_io.id_table(2),
        labeled=(),
        unlabeled=(),
        evaluation=examples("e", evaluation),
        selection=examples("s", selection),
        evaluation_is_held_out=held_out,
    )


def score(right, prefix="e", images=4):
    """A score on images of 100 pixels of class a; in image i, right + i of them are found."""
    lines = {
        f"{prefix}{i}": np.array([[0, right + i, 100, right + i], [1, 0, 0, 100 - right - i]])
        for i in range(images)
    }
    counts = ImageCounts("w", lines)
    return Score(float(np.mean(counts.iou(2))), counts)


def stages(evaluated, held_out=None):
    """A run of two students with these scores: of teacher, students 1 and 2, and control."""
    held_out = held_out or [None] * 4
    return [
        ScoredStage(kind, round_, evaluated[i], held_out[i])
        for i, (kind, round_) in enumerate(RUNS[2])
    ]


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("rule", KEEP)
def test_the_choice_over_all_scores(run, rule):
    for mious in itertools.product(MIOUS, repeat=len(run)):
        scored = [
            # What is evaluated does not choose, however good.
            ScoredStage(*stage, Score(1.0 if stage[0] == "control" else 0.1), v and Score(v))
            for stage, v in zip(run, mious, strict=True)
        ]
        kept = kept_stage.choose(scored, rule)
        last = max((s for s in scored if s.kind != "control"), key=lambda s: s.round)
        known = [s for s in scored if s.held_out and not math.isnan(s.held_out.miou)]
        if rule == "last" or last not in known:
            assert kept is last
            continue
        best = max(s.held_out.miou for s in known)
        assert kept.held_out.miou == best
        if last.held_out.miou == best:
            assert kept is last
        else:
            assert kept is next(s for s in known if s.held_out.miou == best)


def test_a_held_out_evaluation_set_chooses_the_control():
    scores = [score(10), score(30), score(40), score(50)]
    kept = kept_stage.decide(stages(scores, scores), "best_on_holdout", dataset(held_out=True))
    assert (kept.stage, kept.round, kept.rounds, kept.chosen_by) == ("control", 2, 2, 4)
    # IoU of class a: 51.5 % and 41.5 %; of class b, which is only predicted, 0.
    assert kept.sentence == (
        "The control is 5.0 points of mIoU better than student 2 on the 4 held-out images (95 % "
        "interval over images: +5.0 to +5.0): model/ has the control."
    )


def test_the_rule_last_keeps_the_last_student_and_says_so():
    scores = [score(60), score(30), score(40), score(50)]
    kept = kept_stage.decide(stages(scores, scores), "last", dataset(held_out=True))
    assert (kept.stage, kept.round, kept.chosen_by) == ("student", 2, 0)
    assert kept.sentence == (
        "The teacher is 10.0 points of mIoU better than student 2 on the 4 held-out images (95 % "
        "interval over images: +10.0 to +10.0): model/ has student 2 (rounds.keep = last)."
    )


def test_a_student_that_is_best_is_a_plain_result():
    scores = [score(10), score(20), score(55), score(50)]
    kept = kept_stage.decide(stages(scores, scores), "best_on_holdout", dataset(held_out=True))
    assert kept.sentence == (
        "Student 2 is 2.5 points of mIoU better than the control on the 4 held-out images (95 % "
        "interval over images: +2.5 to +2.5): model/ has student 2."
    )


def test_an_earlier_student_that_is_best_is_kept_and_compared():
    scores = [score(10), score(60), score(55), score(50)]
    kept = kept_stage.decide(stages(scores, scores), "best_on_holdout", dataset(held_out=True))
    assert (kept.stage, kept.round) == ("student", 1)
    assert kept.sentence == (
        "Student 2 is 2.5 points of mIoU better than the control on the 4 held-out images (95 % "
        "interval over images: +2.5 to +2.5): model/ has student 1; student 1 is 2.5 points of "
        "mIoU better than student 2 there (95 % interval over images: +2.5 to +2.5)."
    )


@pytest.mark.parametrize("control, subject", [(50, "The control is 5"), (20, "Student 2 is 10")])
def test_an_evaluation_set_of_the_user_never_chooses(control, subject):
    scores = [score(10), score(30), score(40), score(control)]
    kept = kept_stage.decide(stages(scores), "best_on_holdout", dataset())
    assert (kept.stage, kept.round, kept.chosen_by) == ("student", 2, 0)
    assert kept.sentence.startswith(subject) and "on the 4 evaluation images" in kept.sentence
    assert kept.sentence.endswith(
        ": model/ has student 2, because no labelled images are held out to choose by; beside an "
        "evaluation set of your own, data.holdout does so only with eval.select = holdout."
    )


def test_images_that_select_weights_choose_whatever_the_evaluation_set_says():
    evaluated = [score(10), score(30), score(40), score(50)]
    held_out = [score(n, "s", 2) for n in (10, 40, 30, 20)]
    scored = stages(evaluated, held_out)
    kept = kept_stage.decide(scored, "best_on_holdout", dataset(selection=2))
    assert (kept.stage, kept.round, kept.chosen_by) == ("student", 1, 2)
    assert kept.sentence == (
        "The control is 5.0 points of mIoU better than student 2 on the 4 evaluation images (95 % "
        "interval over images: +5.0 to +5.0): model/ has student 1, chosen by the 2 held-out "
        "images; student 1 is 5.0 points of mIoU better than student 2 there (95 % interval over "
        "images: +5.0 to +5.0)."
    )
    kept = kept_stage.decide(scored, "last", dataset(selection=2))
    assert kept.sentence.endswith("+5.0 to +5.0): model/ has student 2 (rounds.keep = last).")


def test_the_kept_last_student_is_compared_with_the_next_best():
    evaluated = [score(10), score(30), score(40), score(20)]
    held_out = [score(n, "s", 1) for n in (10, 20, 40, 30)]
    kept = kept_stage.decide(stages(evaluated, held_out), "best_on_holdout", dataset(selection=1))
    assert kept.sentence.endswith(
        ": model/ has student 2, chosen by the 1 held-out image; student 2 is 5.0 points of mIoU "
        "better than the control there (no interval, because it takes at least two images)."
    )


def test_equal_scores_keep_the_last_student():
    scores = [score(40)] * 4
    kept = kept_stage.decide(stages(scores, scores), "best_on_holdout", dataset(held_out=True))
    assert kept.sentence == (
        "Student 2 is as good as the teacher on the 4 held-out images (95 % interval over images: "
        "+0.0 to +0.0): model/ has student 2."
    )


@pytest.mark.parametrize("which, name", [(2, "student 2"), (3, "the control")])
def test_without_counts_by_image_there_is_no_interval(which, name):
    """Stages of older code have none."""
    scores = [score(10), score(30), score(40), score(50)]
    scores[which] = Score(scores[which].miou)
    kept = kept_stage.decide(stages(scores, scores), "best_on_holdout", dataset(held_out=True))
    assert kept.stage == "control"
    missing = f"(no interval, because the pixel counts of each image are missing for {name})"
    assert missing in kept.sentence and "95 %" not in kept.sentence


def test_scores_that_are_missing_are_not_compared():
    kept = kept_stage.decide(stages([None] * 4), "last", dataset())
    assert kept.sentence == "model/ has student 2 (rounds.keep = last)."
    kept = kept_stage.decide(stages([score(10)] * 4), "best_on_holdout", dataset(selection=2))
    assert kept.sentence.endswith(": model/ has student 2, chosen by the 2 held-out images.")


def test_a_run_without_students_has_nothing_to_compare():
    teacher = [ScoredStage("teacher", 0, score(10), score(10))]
    for rule, held_out in itertools.product(KEEP, (False, True)):
        kept = kept_stage.decide(teacher, rule, dataset(held_out=held_out))
        assert (kept.stage, kept.round, kept.rounds, kept.sentence) == ("teacher", 0, 0, "")


def test_a_run_of_students_alone_has_a_sentence():
    """As recipes of one stage have them, without a teacher before it and without a control."""
    for rule, selection in itertools.product(KEEP, (0, 2)):
        held_out = score(20, "s", 2) if selection else None
        students = [ScoredStage("student", i, score(10 * i), held_out) for i in (1, 2)]
        given = dataset(selection=selection)
        kept = kept_stage.decide(students[:1], rule, given)
        assert kept.sentence == "model/ has student 1, the only stage of the run."
        kept = kept_stage.decide(students, rule, given)
        assert re.match(r"Student 2 is 5.0 points .* better than student 1", kept.sentence)


@pytest.mark.parametrize(
    "difference, points", [(0.123, "12.3"), (0.0006, "0.1"), (0.0004, "0.04"), (1e-5, "less than")]
)
def test_small_differences_are_not_shown_as_none(difference, points):
    scores = [Score(0.1), Score(0.1), Score(0.5), Score(0.5 + difference)]
    sentence = kept_stage.decide(stages(scores), "last", dataset()).sentence
    assert re.match(rf"The control is {points}.* points of mIoU better than student 2", sentence)
