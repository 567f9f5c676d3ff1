"""Tables of several seeds: means, gains paired by seed, and what may stand together."""

import csv
import io

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
}
ABOUT = About("1", "d", "xception65")


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
    text = tables.markdown(table, tables.lines(table, [full(0, 0.3, 0.4, 0.4), ceiling], 1), ABOUT)
    one, other = text.split("d: 3 labelled")[1:]
    assert "| student | 40.00" in one
    assert "| all labels | 60.00" not in one
    assert "| all labels | 60.00" in other


def test_the_csv_has_a_line_for_every_seed():
    found = tables.lines(TABLE, [full(0, 0.3, 0.42, 0.4), full(1, 0.32, 0.46, 0.41)], students=1)
    rows = list(csv.DictReader(io.StringIO(tables.as_csv(found, ABOUT))))
    got = [(r["label"], r["seed"], float(r["miou"]), r["control"]) for r in rows]
    assert [(label, seed) for label, seed, *_ in got] == [
        ("teacher", "0"),
        ("teacher", "1"),
        ("student", "0"),
        ("student", "1"),
    ]
    np.testing.assert_allclose([miou for *_, miou, _ in got], [30, 32, 42, 46])
    assert [float(control) for *_, control in got[2:]] == pytest.approx([40, 41])


@pytest.mark.parametrize("x", ["row", "step"])
def test_pictures_show_something(x):
    curve = ((2, 0.1), (4, 0.3))
    table = Table("A figure", TABLE.rows[1:], x)
    sources = [full(0, 0.3, 0.42, 0.4, curve=curve), full(1, 0.3, 0.4, 0.4, curve=curve)]
    found = tables.lines(table, sources, students=1)
    assert found[0].curve[0] == [(2, 10), (4, 30), (10, 42)]
    image = np.asarray(Image.open(io.BytesIO(tables.picture(table, found))).convert("RGB"))
    assert len(np.unique(image.reshape(-1, 3), axis=0)) > 20


def test_the_papers_number_is_that_of_its_setting_else_of_the_reference():
    assert published("the method", "cityscapes", "resnet101", 744)[1] == 69.3
    setting, number = published("the method", "camvid", "xception65", 12)
    assert (setting, number) == ("cityscapes, xception65, 372 labels", 74.1)
    assert published("", "camvid", "xception65", 12)[1] is None


def test_every_table_names_runs_that_there_are():
    rows = [row for table in TABLES.values() for row in table.rows]
    assert {row.run for row in rows} == set(RUNS)
    assert {row.paper for row in rows} - {""} <= {k for v in PUBLISHED.values() for k in v}
