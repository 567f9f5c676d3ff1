"""Tables of several seeds: means, gains paired by seed, and what may stand together."""

import csv
import dataclasses
import io
import json

import numpy as np
import pytest
from PIL import Image

from semiseg_jax import tables
from semiseg_jax.paper import PUBLISHED, RUNS, TABLES, Row, Table, published
from semiseg_jax.tables import About, Source

PROTOCOL = {
    "data": "d",
    "split": "val",
    "scales": [1.0],
    "flip": False,
    "window": "whole",
    "pad_to": 1,
    "selection": "last",
    "split_hash": "a",
    "evaluation_hash": "e",
}
ABOUT = About("1", "v3plus xception65")


def source(run, seed, results, curve=(), **protocol):
    """A run whose results are {(stage, round): mIoU in 0..1}."""

    def row(stage, round_, step, miou):
        place = {"stage": stage, "round": round_, "step": step}
        return place | {"miou": miou, "protocol": PROTOCOL | protocol}

    rows = [row(*place, 10, miou) for place, miou in results.items()]
    inside = [row("student", 1, step, miou) for step, miou in curve]
    return Source(run, seed, {"rows": rows, "curve": inside}, {"labeled": 3, "unlabeled": 9})


def full(seed, teacher, student, control, **changes):
    results = {("teacher", 0): teacher, ("student", 1): student, ("control", 1): control}
    return source("full", seed, results, **changes)


TABLE = Table("A table", (Row("teacher", "full", "teacher"), Row("student", "full")))


def test_means_spreads_and_gains_are_those_of_the_paired_seeds():
    found = tables.lines(TABLE, [full(0, 0.3, 0.42, 0.4), full(1, 0.32, 0.46, 0.41)], students=1)
    teacher, student = found
    # 30 and 32: mean 31, deviation sqrt(2); gains 2 and 5: mean 3.5, error sqrt(4.5) / sqrt(2).
    assert teacher.mean == "31.00 ± 1.41"
    assert teacher.gain == ""
    assert student.mean == "44.00 ± 2.83"
    assert student.gain == "+3.50 ± 1.50"


def test_one_seed_has_no_spread():
    (_, student) = tables.lines(TABLE, [full(0, 0.3, 0.42, 0.4)], students=1)
    assert (student.mean, student.gain) == ("42.00", "+2.00")


def test_a_row_of_the_last_student_waits_for_it():
    table = Table("A table", (Row("the method", "full", round="last"),))
    sources = [full(0, 0.3, 0.42, 0.4)]
    assert tables.lines(table, sources, students=2) == []
    sources = [source("full", 0, {("student", 1): 0.4, ("student", 2): 0.5, ("control", 2): 0.3})]
    (line,) = tables.lines(table, sources, students=2)
    assert (line.mean, line.gain) == ("50.00", "+20.00")


def test_a_row_of_each_round_becomes_a_line_for_each():
    table = Table("A figure", (Row("student", "full", round="each"),))
    sources = [source("full", 0, {("student", 1): 0.4, ("student", 2): 0.5})]
    assert [line.label for line in tables.lines(table, sources, 2)] == ["student 1", "student 2"]


def test_results_of_another_protocol_stand_in_a_table_of_their_own():
    table = Table("A table", (*TABLE.rows, Row("all labels", "all_labels", "teacher")))
    ceiling = source("all_labels", 0, {("teacher", 0): 0.6}, split_hash="b")
    found = tables.lines(table, [full(0, 0.3, 0.4, 0.4), ceiling], 1)
    text = tables.markdown(table, found, ABOUT)
    one, other = text.split("d: 3 labelled")[1:]
    assert "| student | 40.00" in one
    assert "| all labels | 60.00" not in one
    assert "| all labels | 60.00" in other


def test_the_csv_has_a_line_for_every_seed():
    found = tables.lines(TABLE, [full(0, 0.3, 0.42, 0.4), full(1, 0.32, 0.46, 0.41)], students=1)
    rows = list(csv.DictReader(io.StringIO(tables.as_csv(TABLE, found, ABOUT))))
    got = [(r["label"], r["seed"], float(r["miou"]), r["control"]) for r in rows]
    assert [(label, seed) for label, seed, *_ in got] == [
        ("teacher", "0"),
        ("teacher", "1"),
        ("student", "0"),
        ("student", "1"),
    ]
    np.testing.assert_allclose([miou for *_, miou, _ in got], [30, 32, 42, 46])
    assert [float(control) for *_, control in got[2:]] == pytest.approx([40, 41])


def test_the_csv_has_the_protocol_of_each_seed_and_the_papers_number():
    table = Table("A table", (Row("teacher", "full", "teacher", paper="labels alone"),))
    sources = [full(n, 0.3, 0.4, 0.4, config_hash=f"of {n}") for n in (0, 1)]
    content = tables.as_csv(table, tables.lines(table, sources, 1), ABOUT)
    rows = list(csv.DictReader(io.StringIO(content)))
    assert [json.loads(r["protocol"])["config_hash"] for r in rows] == ["of 0", "of 1"]
    assert [r["paper"] for r in rows] == ["68.9"] * 2


def test_the_csv_of_a_figure_over_steps_has_every_evaluation():
    table = Table("A figure", TABLE.rows[1:], "step")
    sources = [full(0, 0.3, 0.42, 0.4, curve=((2, 0.1), (4, 0.3)))]
    content = tables.as_csv(table, tables.lines(table, sources, 1), ABOUT)
    rows = list(csv.DictReader(io.StringIO(content)))
    assert [(r["step"], float(r["miou"])) for r in rows] == [("2", 10), ("4", 30), ("10", 42)]


@pytest.mark.parametrize("x", ["row", "step", "round", "ratio"])
def test_pictures_show_something(x):
    curve = ((2, 0.1), (4, 0.3))
    table = Table("A figure", (*TABLE.rows, Row("control", "full", "control")), x)
    sources = [full(0, 0.3, 0.42, 0.4, curve=curve), full(1, 0.3, 0.4, 0.4, curve=curve)]
    found = tables.lines(table, sources, students=1)
    assert found[1].curve[0] == [(2, 10), (4, 30), (10, 42)]
    image = np.asarray(Image.open(io.BytesIO(tables.picture(table, found))).convert("RGB"))
    assert len(np.unique(image.reshape(-1, 3), axis=0)) > 20


def test_seeds_of_different_protocols_are_not_averaged():
    found = tables.lines(TABLE, [full(0, 0.3, 0.4, 0.4), full(1, 0.5, 0.6, 0.6, flip=True)], 1)
    assert [(line.mean, line.gain) for line in found if line.label == "student"] == [
        ("40.00", "+0.00"),
        ("60.00", "+0.00"),
    ]
    assert len(tables.groups(TABLE, found)) == 2
    # The picture has a panel for each: the second makes it taller.
    one, two = (
        Image.open(io.BytesIO(tables.picture(TABLE, part))).height for part in (found[:1], found)
    )
    assert two > 1.5 * one


def test_a_step_is_over_the_row_that_it_adds_to_paired_by_seed():
    table = Table("A table", (Row("+ SCL", "full", over="sda_dsbn"),))
    below = [source("sda_dsbn", seed, {("student", 1): 0.4}) for seed in (0, 1)]
    found = tables.lines(table, [full(0, 0.3, 0.42, 0.4), full(1, 0.3, 0.46, 0.4), *below], 1)
    # Steps 2 and 6: mean 4, error sqrt(8) / sqrt(2).
    assert found[0].step == "+4.00 ± 2.00"
    assert "| + SCL | 44.00 ± 2.83 | +4.00 ± 2.00 | +4.00 ± 2.00 | 0, 1 |" in tables.markdown(
        table, found, ABOUT
    )


@pytest.mark.parametrize(("split", "step"), [("a", "+2.00"), ("b", "")])
def test_a_step_over_rows_from_before_their_images_had_a_hash(split, step):
    table = Table("A table", (Row("one", "sda"), Row("two", "sda_dsbn", over="sda")))
    old = source("sda", 0, {("student", 1): 0.4}, evaluation_hash=None)
    new = source("sda_dsbn", 0, {("student", 1): 0.42}, split_hash=split)
    assert tables.lines(table, [old, new], students=1)[-1].step == step


def test_the_last_round_is_no_row_of_its_own_where_it_is_the_first():
    table = Table("A table", (Row("one", "full"), Row("all {rounds}", "full", round="last")))
    results = {("student", 1): 0.4, ("student", 2): 0.5}
    labels = {
        n: [line.label for line in tables.lines(table, [source("full", 0, results)], n)]
        for n in (1, 2)
    }
    assert labels == {1: ["one"], 2: ["one", "all 2 rounds"]}


def test_rows_that_differ_in_their_unlabelled_images_stand_together_where_that_is_compared():
    table = Table("A figure", (Row("1 : 1", "ratio_1"), Row("all", "full")), "ratio", True)
    fewer = source("ratio_1", 0, {("student", 1): 0.35}, split_hash="b")
    fewer = dataclasses.replace(fewer, data={"labeled": 3, "unlabeled": 3})
    sources = [fewer, full(0, 0.3, 0.42, 0.4)]
    text = tables.markdown(table, tables.lines(table, sources, 1), ABOUT)
    assert text.count("d: val") == 1
    # The gain is over the control of the same labels.
    assert "| 1 : 1 | 3 + 3 | 35.00 | -5.00 |" in text and "| all | 3 + 9 | 42.00 | +2.00 |" in text
    others = dataclasses.replace(table, images_vary=False)
    assert tables.markdown(others, tables.lines(others, sources, 1), ABOUT).count("d: 3") == 2


def test_a_gain_is_over_the_control_of_the_same_labels():
    table = Table("A table", (Row("all", "all_labels_extra"),))
    more = source("all_labels_extra", 0, {("student", 1): 0.7, ("control", 1): 0.6})
    more = dataclasses.replace(more, data={"labeled": 12, "unlabeled": 5})
    (line,) = tables.lines(table, [full(0, 0.3, 0.42, 0.4), more], 1)
    assert line.gain == "+10.00"


def test_the_papers_number_is_that_of_its_setting_else_of_the_reference():
    assert published("cityscapes", "v2 resnet101", 744)[1]["the method"] == 69.3
    setting, numbers = published("camvid", "v3plus xception65", 12)
    assert (setting, numbers["the method"]) == ("cityscapes, v3plus xception65, 372 labels", 74.1)
    # Another share of its own data, or another network, is no reference.
    assert published("cityscapes", "v3plus xception65", 2975)[1] == {}
    assert published("cityscapes", "v3plus resnet101", 744)[1] == {}


def test_every_table_names_runs_that_there_are():
    rows = [row for table in TABLES.values() for row in table.rows]
    assert {row.run for row in rows} == set(RUNS)
    assert {row.over for row in rows} - {""} <= set(RUNS)
    assert {row.paper for row in rows} - {""} <= {k for v in PUBLISHED.values() for k in v}


def test_fewer_pairs_than_seeds_are_counted():
    students = [full(0, 0.3, 0.42, 0.4), full(1, 0.3, 0.44, 0.4)]
    third = source("full", 2, {("student", 1): 0.46})
    (_, student) = tables.lines(TABLE, [*students, third], students=1)
    # Gains of 2 and 4, and of the third seed none.
    assert student.gain == "+3.00 ± 1.00 (2 of 3)"


def test_a_step_is_over_a_row_of_the_same_images():
    table = Table("A table", (Row("student", "full"), Row("+ more", "sda", over="full")))
    below = [source("full", seed, {("student", 1): 0.4}) for seed in (0, 1)]
    above = [source("sda", seed, {("student", 1): 0.5}, split_hash="b") for seed in (0, 1)]
    assert tables.lines(table, [*below, *above], students=1)[-1].step == ""
    same = [source("sda", seed, {("student", 1): 0.5}) for seed in (0, 1)]
    assert tables.lines(table, [*below, *same], students=1)[-1].step == "+10.00 ± 0.00"


def test_columns_that_no_line_fills_are_left_out():
    lines = tables.lines(TABLE, [source("full", 0, {("student", 1): 0.4})], students=1)
    text = tables.markdown(TABLE, lines, ABOUT)
    assert "| gain " not in text and "| step " not in text and "paired" not in text
    lines = tables.lines(TABLE, [full(0, 0.3, 0.42, 0.4)], students=1)
    text = tables.markdown(TABLE, lines, ABOUT)
    assert "| gain " in text and "| step " not in text and "standard error, paired by seed" in text


def test_labels_alone_have_no_unlabelled_images_beside_them():
    table = Table("A figure", TABLE.rows, x="ratio", images_vary=True)
    lines = tables.lines(table, [full(0, 0.3, 0.42, 0.4)], students=1)
    assert [line.images for line in lines] == ["3", "3 + 9"]
    text = tables.markdown(table, lines, ABOUT)
    assert "| teacher | 3 | 30.00 |" in text and "| student | 3 + 9 | 42.00 |" in text
