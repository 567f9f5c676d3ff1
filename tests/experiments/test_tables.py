"""Tables over seeds: means, paired gains, separate protocols; and the paper's numbers."""

import csv
import dataclasses
import io
import json

import numpy as np
import pytest
from PIL import Image

from semiseg_jax.experiments import tables
from semiseg_jax.experiments.paper_tables import (
    LABELED,
    NETWORKS,
    PUBLISHED,
    RUNS,
    TABLES,
    Row,
    Setting,
    Table,
    published_miou,
)
from semiseg_jax.experiments.tables import TableMeta, TrialResult
from tests.rows import PROTOCOL, result_row

META = TableMeta("1", "v3plus xception65")


def trial(run, seed, results, curve=(), **protocol):
    """The results of a run: {(stage, round): mIoU in 0..1}, and (step, mIoU) of student 1."""

    def row(stage, round_, step, miou):
        place = {"stage": stage, "round": round_, "step": step}
        return result_row(PROTOCOL | protocol, miou=miou, **place)

    rows = [row(*key, 10, miou) for key, miou in results.items()]
    evaluations = [row("student", 1, step, miou) for step, miou in curve]
    content = {"rows": rows, "curve": evaluations}
    return TrialResult(run, seed, content, {"labeled": 3, "unlabeled": 9})


def full(seed, teacher, student, control, **changes):
    """The results of a run of the whole method with one student."""
    results = {("teacher", 0): teacher, ("student", 1): student, ("control", 1): control}
    return trial("full", seed, results, **changes)


TABLE = Table("A table", (Row("teacher", "full", "teacher"), Row("student", "full")))


def test_mean_deviation_and_paired_gain():
    trials = [full(0, 0.3, 0.42, 0.4), full(1, 0.32, 0.46, 0.41)]
    teacher, student = tables.build_rows(TABLE, trials, students=1)
    # 30 and 32: mean 31, deviation sqrt(2); gains 2 and 5: mean 3.5, error sqrt(4.5) / sqrt(2).
    assert teacher.mean == "31.00 ± 1.41"
    assert teacher.gain == ""
    assert student.mean == "44.00 ± 2.83"
    assert student.gain == "+3.50 ± 1.50"


def test_one_seed_has_no_deviation():
    (_, student) = tables.build_rows(TABLE, [full(0, 0.3, 0.42, 0.4)], students=1)
    assert (student.mean, student.gain) == ("42.00", "+2.00")


def test_a_row_of_the_last_round_needs_its_student():
    table = Table("A table", (Row("the method", "full", round="last"),))
    trials = [full(0, 0.3, 0.42, 0.4)]
    assert tables.build_rows(table, trials, students=2) == []
    trials = [trial("full", 0, {("student", 1): 0.4, ("student", 2): 0.5, ("control", 2): 0.3})]
    (row,) = tables.build_rows(table, trials, students=2)
    assert (row.mean, row.gain) == ("50.00", "+20.00")


def test_a_row_of_each_round_becomes_a_row_per_round():
    table = Table("A figure", (Row("student", "full", round="each"),))
    trials = [trial("full", 0, {("student", 1): 0.4, ("student", 2): 0.5})]
    labels = [row.label for row in tables.build_rows(table, trials, 2)]
    assert labels == ["student 1", "student 2"]


def test_results_of_another_protocol_have_a_table_of_their_own():
    table = Table("A table", (*TABLE.rows, Row("all labels", "all_labels", "teacher")))
    ceiling = trial("all_labels", 0, {("teacher", 0): 0.6}, split_hash="b")
    rows = tables.build_rows(table, [full(0, 0.3, 0.4, 0.4), ceiling], 1)
    text = tables.to_markdown(table, rows, META)
    one, other = text.split("d: 3 labelled")[1:]
    assert "| student | 40.00" in one
    assert "| all labels | 60.00" not in one
    assert "| all labels | 60.00" in other


def test_the_csv_has_a_line_for_every_seed():
    trials = [full(0, 0.3, 0.42, 0.4), full(1, 0.32, 0.46, 0.41)]
    content = tables.to_csv(TABLE, tables.build_rows(TABLE, trials, students=1), META)
    rows = list(csv.DictReader(io.StringIO(content)))
    got = [(r["label"], r["seed"], float(r["miou"]), r["control"]) for r in rows]
    assert [(label, seed) for label, seed, *_ in got] == [
        ("teacher", "0"),
        ("teacher", "1"),
        ("student", "0"),
        ("student", "1"),
    ]
    np.testing.assert_allclose([miou for *_, miou, _ in got], [30, 32, 42, 46])
    assert [float(control) for *_, control in got[2:]] == pytest.approx([40, 41])


def test_the_csv_has_the_protocol_of_each_seed_and_the_number_of_the_paper():
    table = Table("A table", (Row("teacher", "full", "teacher", paper="labels alone"),))
    trials = [full(n, 0.3, 0.4, 0.4, config_hash=f"of {n}") for n in (0, 1)]
    content = tables.to_csv(table, tables.build_rows(table, trials, 1), META)
    rows = list(csv.DictReader(io.StringIO(content)))
    assert [json.loads(r["protocol"])["config_hash"] for r in rows] == ["of 0", "of 1"]
    assert [r["paper"] for r in rows] == ["68.9"] * 2


def test_the_csv_of_a_figure_over_steps_has_every_evaluation():
    table = Table("A figure", TABLE.rows[1:], "step")
    trials = [full(0, 0.3, 0.42, 0.4, curve=((2, 0.1), (4, 0.3)))]
    content = tables.to_csv(table, tables.build_rows(table, trials, 1), META)
    rows = list(csv.DictReader(io.StringIO(content)))
    assert [(r["step"], float(r["miou"])) for r in rows] == [("2", 10), ("4", 30), ("10", 42)]


@pytest.mark.parametrize("x", ["row", "step", "round", "ratio"])
def test_plots_are_not_empty(x):
    curve = ((2, 0.1), (4, 0.3))
    table = Table("A figure", (*TABLE.rows, Row("control", "full", "control")), x)
    trials = [full(0, 0.3, 0.42, 0.4, curve=curve), full(1, 0.3, 0.4, 0.4, curve=curve)]
    rows = tables.build_rows(table, trials, students=1)
    assert rows[1].curve[0] == [(2, 10), (4, 30), (10, 42)]
    image = np.asarray(Image.open(io.BytesIO(tables.plot_png(table, rows))).convert("RGB"))
    assert len(np.unique(image.reshape(-1, 3), axis=0)) > 20


def test_seeds_of_different_protocols_are_not_averaged():
    rows = tables.build_rows(TABLE, [full(0, 0.3, 0.4, 0.4), full(1, 0.5, 0.6, 0.6, flip=True)], 1)
    assert [(row.mean, row.gain) for row in rows if row.label == "student"] == [
        ("40.00", "+0.00"),
        ("60.00", "+0.00"),
    ]
    assert len(tables.group_by_protocol(TABLE, rows)) == 2
    # The plot has a panel for each protocol: the second makes it taller.
    one, two = (
        Image.open(io.BytesIO(tables.plot_png(TABLE, shown))).height for shown in (rows[:1], rows)
    )
    assert two > 1.5 * one


def test_a_step_is_paired_with_the_row_that_it_adds_to():
    table = Table("A table", (Row("+ SCL", "full", adds_to="sda_dsbn"),))
    below = [trial("sda_dsbn", seed, {("student", 1): 0.4}) for seed in (0, 1)]
    rows = tables.build_rows(table, [full(0, 0.3, 0.42, 0.4), full(1, 0.3, 0.46, 0.4), *below], 1)
    # Steps 2 and 6: mean 4, error sqrt(8) / sqrt(2).
    assert rows[0].step == "+4.00 ± 2.00"
    assert "| + SCL | 44.00 ± 2.83 | +4.00 ± 2.00 | +4.00 ± 2.00 | 0, 1 |" in tables.to_markdown(
        table, rows, META
    )


@pytest.mark.parametrize(("split", "step"), [("a", "+2.00"), ("b", "")])
def test_a_step_over_results_without_an_evaluation_hash(split, step):
    table = Table("A table", (Row("one", "sda"), Row("two", "sda_dsbn", adds_to="sda")))
    old = trial("sda", 0, {("student", 1): 0.4}, evaluation_hash=None)
    new = trial("sda_dsbn", 0, {("student", 1): 0.42}, split_hash=split)
    assert tables.build_rows(table, [old, new], students=1)[-1].step == step


def test_the_last_round_has_no_row_if_it_is_the_first():
    table = Table("A table", (Row("one", "full"), Row("all {rounds}", "full", round="last")))
    results = {("student", 1): 0.4, ("student", 2): 0.5}
    labels = {
        n: [row.label for row in tables.build_rows(table, [trial("full", 0, results)], n)]
        for n in (1, 2)
    }
    assert labels == {1: ["one"], 2: ["one", "all 2 rounds"]}


def test_rows_may_differ_in_unlabelled_images_if_the_table_compares_them():
    table = Table("A figure", (Row("1 : 1", "ratio_1"), Row("all", "full")), "ratio", True)
    fewer = trial("ratio_1", 0, {("student", 1): 0.35}, split_hash="b")
    fewer = dataclasses.replace(fewer, data={"labeled": 3, "unlabeled": 3})
    trials = [fewer, full(0, 0.3, 0.42, 0.4)]
    text = tables.to_markdown(table, tables.build_rows(table, trials, 1), META)
    assert text.count("d: val") == 1
    # The gain is over the control of the same labels.
    assert "| 1 : 1 | 3 + 3 | 35.00 | -5.00 |" in text and "| all | 3 + 9 | 42.00 | +2.00 |" in text
    others = dataclasses.replace(table, images_vary=False)
    assert tables.to_markdown(others, tables.build_rows(others, trials, 1), META).count("d: 3") == 2


def test_a_gain_is_over_a_control_with_the_same_labels():
    table = Table("A table", (Row("all", "all_labels_extra"),))
    more = trial("all_labels_extra", 0, {("student", 1): 0.7, ("control", 1): 0.6})
    more = dataclasses.replace(more, data={"labeled": 12, "unlabeled": 5})
    (row,) = tables.build_rows(table, [full(0, 0.3, 0.42, 0.4), more], 1)
    assert row.gain == "+10.00"


V3PLUS, V2, RESNET = "v3plus xception65", "v2 resnet101", "v3plus resnet101"


def published_column(table, data, network, labeled):
    """{label: percent} of a table's rows that the paper has a result for."""
    rows = TABLES[table].rows
    results = {r.label: published_miou(TABLES[table], r, data, network, labeled) for r in rows}
    return {label: result[1] for label, result in results.items() if result is not None}


def test_rows_name_existing_runs_and_published_results():
    rows = [row for table in TABLES.values() for row in table.rows]
    assert {row.run for row in rows} == set(RUNS)
    assert {row.adds_to for row in rows} - {""} <= set(RUNS)
    names = {row.name for table in PUBLISHED.values() for row in table.rows}
    assert {row.paper for row in rows} == names


def test_the_published_tables_have_the_rows_of_the_paper():
    assert {name: len(table.rows) for name, table in PUBLISHED.items()} == {
        "1": 6,
        "2": 4,
        "3": 9,
        "4": 10,
        "5": 8,
        "6": 7,
    }
    for table in PUBLISHED.values():
        for row in table.rows:
            assert row.miou.keys() <= LABELED[table.data].keys()
            assert all(50 < miou < 90 for miou in row.miou.values())
            assert not row.name or row.model in NETWORKS


@pytest.mark.parametrize(
    ("table", "row", "numbers", "supervised"),
    [
        ("1", 0, [68.9, 73.4, 76.9, 78.7], None),
        ("1", 3, [72.3, 76.9, 78.7, 80.0], None),
        ("1", 5, [74.1, 77.8, 78.7, 80.5], None),
        ("2", 2, [71.6], None),
        ("3", 1, [68.6], None),
        ("3", 5, [79.2], None),
        ("3", 8, [72.5], None),
        ("4", 1, [59.3, 61.9], 65.8),
        ("4", 2, [60.3, 63.87], 67.7),
        ("4", 5, [67.4, 70.7, 72.9], 74.8),
        ("4", 7, [67.6, 69.3, 70.7], 70.1),
        ("5", 0, [64.1], None),
        ("5", 5, [79.3], None),
        ("5", 7, [79.2], None),
        ("6", 4, [64.5], None),
        ("6", 6, [70.1], None),
    ],
)
def test_published_numbers(table, row, numbers, supervised):
    published = PUBLISHED[table].rows[row]
    assert list(published.miou.values()) == numbers
    assert published.supervised == supervised


def test_a_result_that_several_tables_repeat_has_one_number():
    numbers = {}
    for table in PUBLISHED.values():
        for row in table.rows:
            for share, miou in row.miou.items() if row.name else ():
                key = (table.data, NETWORKS[row.model], share, row.name)
                numbers.setdefault(key, set()).add(miou)
    assert [key for key, values in numbers.items() if len(values) > 1] == []


def test_published_columns_of_the_papers_own_settings():
    first = {
        "labels alone (teacher)": 68.9,
        "self-training": 71.2,
        "+ SDA": 71.3,
        "+ DSBN": 72.3,
        "+ SCL (the method, one round)": 72.8,
        "+ rounds: the method, {rounds}": 74.1,
    }
    column = published_column("1", "cityscapes", V3PLUS, 372)
    assert {label: column[label] for label in first} == first
    assert published_column("1", "cityscapes", V3PLUS, 2975)["+ SDA"] == 79.7
    assert list(published_column("2", "cityscapes", V3PLUS, 372).values()) == [
        *(68.9, 71.3, 71.6, 72.3)
    ]
    assert list(published_column("3", "cityscapes", V3PLUS, 372).values()) == [
        *(68.9, 68.9, 68.6, 69.5, 70.6, 71.4, 72.5)
    ]
    third = published_column("3", "cityscapes", V3PLUS, 2975)
    assert third["true labels, SDA and DSBN"] == 79.2
    assert published_column("4", "cityscapes", V2, 744) == {
        "labels alone (teacher)": 66.7,
        "the method, {rounds}": 69.3,
    }
    assert published_column("5", "pascal_voc", RESNET, 1464) == {"the method, {rounds}": 75.0}
    sixth = published_column("6", "cityscapes", V2, 372)
    assert (sixth["self-training"], sixth["+ DSBN"]) == (62.1, 63.8)


def test_published_columns_on_other_data_are_of_the_tables_reference():
    teacher, all_labels = TABLES["1"].rows[0], TABLES["1"].rows[8]
    assert published_miou(TABLES["1"], teacher, "camvid", V2, 12) == (
        Setting("cityscapes", V3PLUS, 372),
        68.9,
    )
    assert published_miou(TABLES["1"], all_labels, "camvid", V2, 367) == (
        Setting("cityscapes", V3PLUS, 2975),
        78.7,
    )
    assert published_column("6", "camvid", V3PLUS, 12)["+ SDA"] == 62.2
    assert published_column("5", "camvid", V3PLUS, 12) == {"the method, {rounds}": 79.3}


@pytest.mark.parametrize(("network", "labeled"), [(V3PLUS, 100), (RESNET, 744)])
def test_another_share_of_labels_or_network_is_no_reference(network, labeled):
    assert published_column("1", "cityscapes", network, labeled) == {}


def test_the_number_of_the_paper_is_printed_beside_ours():
    trials = [full(0, 0.3, 0.42, 0.4), trial("sda", 0, {("student", 1): 0.41})]
    text = tables.to_markdown(TABLES["2"], tables.build_rows(TABLES["2"], trials, 1), META)
    assert "| | mIoU | gain | paper | seeds |" in text
    assert "| one norm, trained | 41.00 | +1.00 | 71.3 | 0 |" in text
    assert "; paper: the paper's mIoU on cityscapes, v3plus xception65, 372 labels." in text


def test_the_number_of_pairs_is_printed_if_seeds_lack_a_control():
    students = [full(0, 0.3, 0.42, 0.4), full(1, 0.3, 0.44, 0.4)]
    third = trial("full", 2, {("student", 1): 0.46})
    (_, student) = tables.build_rows(TABLE, [*students, third], students=1)
    # Gains of 2 and 4, and of the third seed none.
    assert student.gain == "+3.00 ± 1.00 (2 of 3)"


def test_a_step_needs_a_row_with_the_same_images():
    table = Table("A table", (Row("student", "full"), Row("+ more", "sda", adds_to="full")))
    below = [trial("full", seed, {("student", 1): 0.4}) for seed in (0, 1)]
    above = [trial("sda", seed, {("student", 1): 0.5}, split_hash="b") for seed in (0, 1)]
    assert tables.build_rows(table, [*below, *above], students=1)[-1].step == ""
    same = [trial("sda", seed, {("student", 1): 0.5}) for seed in (0, 1)]
    assert tables.build_rows(table, [*below, *same], students=1)[-1].step == "+10.00 ± 0.00"


def test_empty_columns_are_left_out():
    rows = tables.build_rows(TABLE, [trial("full", 0, {("student", 1): 0.4})], students=1)
    text = tables.to_markdown(TABLE, rows, META)
    assert "| gain " not in text and "| step " not in text and "paired" not in text
    rows = tables.build_rows(TABLE, [full(0, 0.3, 0.42, 0.4)], students=1)
    text = tables.to_markdown(TABLE, rows, META)
    assert "| gain " in text and "| step " not in text and "standard error, paired by seed" in text


def test_only_students_have_unlabelled_images():
    table = Table("A figure", TABLE.rows, x="ratio", images_vary=True)
    rows = tables.build_rows(table, [full(0, 0.3, 0.42, 0.4)], students=1)
    assert [row.images for row in rows] == ["3", "3 + 9"]
    text = tables.to_markdown(table, rows, META)
    assert "| teacher | 3 | 30.00 |" in text and "| student | 3 + 9 | 42.00 |" in text
