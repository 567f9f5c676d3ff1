"""Warnings of labels that train nothing, or leave out nothing."""

import pytest

from semiseg_jax.methods import label_health
from semiseg_jax.methods.cct import CrossConsistency
from semiseg_jax.methods.fixmatch import FixMatch

CLASSES = ("sky", "road", "pole")
METHOD = FixMatch(threshold=0.95)


def line(step, kept, by_class=(0.5, 0.5, 0.0)):
    """A line of metrics of 100 pixels of each class, of which these shares are kept."""
    means = {"loss": 1.0, "kept": kept}
    for i, share in enumerate(by_class):
        means[f"kept_pixels/{i}"], means[f"labeled_pixels/{i}"] = 100 * share, 100.0
    return {"step": step} | label_health.by_class(means, CLASSES)


def warnings(lines, steps=100, method=METHOD):
    return label_health.summarize(lines, steps, CLASSES, method).warnings


def test_counts_become_shares_by_name():
    means = {"loss": 2.0, "kept": 0.5}
    means |= {"kept_pixels/0": 10.0, "kept_pixels/1": 0.0, "kept_pixels/2": 0.0}
    means |= {"labeled_pixels/0": 20.0, "labeled_pixels/1": 5.0, "labeled_pixels/2": 0.0}
    assert label_health.by_class(means, CLASSES) == {
        "loss": 2.0,
        "kept": 0.5,
        "kept/sky": 0.5,
        "kept/road": 0.0,
        "kept_of/sky": 1.0,
        "kept_of/road": 0.0,
        "kept_of/pole": 0.0,
    }


def test_labels_that_keep_some_pixels_are_healthy():
    lines = [line(step, 0.4) for step in range(10, 101, 10)]
    health = label_health.summarize(lines, 100, CLASSES, METHOD)
    assert health.warnings == ()
    assert health.kept == pytest.approx(0.4)
    assert health.kept_by_class == pytest.approx((0.5, 0.5, 0.0))


def test_a_stretch_with_nothing_kept_is_named_once_it_is_over():
    empty = [line(step, 0.0, (0, 0, 0)) for step in range(5, 26, 5)]
    assert warnings(empty[:-1]) == ()
    (sentence,) = warnings(empty)
    assert "From step 1 to 25" in sentence and "labels alone" in sentence
    healthy = [line(step, 0.4) for step in range(30, 101, 5)]
    assert warnings(empty + healthy) == (sentence,)


def test_few_empty_lines_of_a_stretch_are_no_warning():
    lines = [line(step, 0.0 if step < 10 else 0.3) for step in range(5, 26, 5)]
    assert warnings(lines) == ()


def test_a_threshold_that_leaves_out_nothing_is_named_after_the_beginning():
    lines = [line(step, 0.999, (1, 1, 1)) for step in (5, 10, 15)]
    assert warnings(lines[:1], steps=200) == ()
    (sentence,) = warnings(lines)
    assert "From the start 99.9%" in sentence and "raise it" in sentence


def test_one_class_with_all_kept_pixels_is_named():
    (sentence,) = warnings([line(step, 0.3, (0.9, 0.0, 0.01)) for step in (5, 10)])
    assert "98.9%" in sentence and "sky" in sentence


def test_methods_without_a_threshold_have_no_warning():
    lines = [line(step, 1.0, (1, 1, 1)) for step in (5, 10)]
    method = CrossConsistency(30.0, 0.1, 100, 0, 1, 1, 1, 1, 1, 1, 1)
    assert warnings(lines, method=method) == ()
    assert warnings(lines, method=FixMatch(threshold=0.0)) == ()
    assert label_health.summarize([], 100, CLASSES, METHOD) is None
