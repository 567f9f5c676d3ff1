import io
import json

import numpy as np
import pytest
from etils import epath
from rich.console import Console

from semiseg_jax import results, stages
from semiseg_jax.eval_protocol import EvalProtocol
from semiseg_jax.evaluate import Score
from semiseg_jax.runtime.logger import capture_lines
from tests.errors import raises_code
from tests.rows import PROTOCOL


def row(stage, round_, diagonal, protocol=PROTOCOL, step=10):
    """A row whose first two classes occur; the third never does."""
    confusion = np.array([[diagonal, 10 - diagonal, 0], [0, 10, 0], [0, 0, 0]])
    protocol = EvalProtocol.from_json(protocol)
    return results.ResultRow.of_score(stage, round_, step, Score(confusion), protocol)


def test_a_row_says_what_it_is():
    made = row("teacher", 0, 5).to_json()
    assert made["iou"] == [0.5, 10 / 15, None]
    np.testing.assert_allclose(made["miou"], (0.5 + 10 / 15) / 2)
    assert (made["pixels"], made["pixel_accuracy"], made["mean_class_accuracy"]) == (20, 0.75, 0.75)
    assert (made["step"], made["weights_step"]) == (10, 10)
    assert results.ResultRow.from_json(json.loads(json.dumps(made, allow_nan=False))) == row(
        "teacher", 0, 5
    )


def test_a_row_made_again_takes_the_place_of_the_old_one(tmp_path):
    path = tmp_path / "results.json"
    kept = results.Results(path)
    kept.add(row("teacher", 0, 1), final=True)
    kept.add(row("student", 1, 2), final=True)
    kept.add(row("teacher", 0, 3, step=5), final=False)
    again = results.Results(path)
    again.add(row("teacher", 0, 4), final=True)
    content = json.loads(path.read_text())
    assert [r["stage"] for r in content["rows"]] == ["teacher", "student"]
    assert content["rows"][0] == row("teacher", 0, 4).to_json()
    assert [r["step"] for r in content["curve"]] == [5]


def test_a_row_of_another_protocol_stands_beside_the_old_one(tmp_path):
    kept = results.Results(tmp_path / "results.json")
    kept.add(row("teacher", 0, 1), final=True)
    kept.add(row("teacher", 0, 3, PROTOCOL | {"split": "test"}), final=True)
    assert [r.split for r in kept.rows] == ["val", "test"]


@pytest.mark.parametrize(
    "content", ["[]", "{}", "3", '{"rows": 3}', '{"rows": [3]}', '{"rows": [{}]}', '{"curve": []}']
)
def test_results_of_another_form_are_refused_as_damaged_ones(content, tmp_path):
    (tmp_path / "results.json").write_text(content)
    with raises_code("results-damaged", "results.json"):
        results.Results(tmp_path / "results.json")


@pytest.mark.parametrize("key", ["stage", "round", "step", "seed", "protocol", "miou", "iou"])
def test_a_row_without_what_tables_read_is_refused(key, tmp_path):
    whole = row("teacher", 0, 1).to_json()
    (tmp_path / "results.json").write_text(
        json.dumps({"rows": [{k: v for k, v in whole.items() if k != key}]})
    )
    with raises_code("results-damaged", "results.json", "rows"):
        results.Results(tmp_path / "results.json")


def test_results_without_a_curve(tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"rows": [row("teacher", 0, 1).to_json()]}))
    kept = results.Results(path)
    assert [r.stage for r in kept.rows] == ["teacher"] and kept.curve == []
    kept.add(row("teacher", 0, 3, step=5), final=False)
    assert len(json.loads(path.read_text())["curve"]) == 1


def changed(value):
    """Another value of the same form."""
    if value in stages.KINDS:
        return next(kind for kind in stages.KINDS if kind != value)
    if isinstance(value, str):
        return f"{value}x"
    if isinstance(value, list):
        return [changed(value[0]), *value[1:]]
    if isinstance(value, dict):
        return value | {"seed": 1 + value["seed"]}
    return value + 1


@pytest.mark.parametrize("key", sorted(row("teacher", 0, 5).to_json()))
def test_a_changed_row_is_dropped_and_made_again_in_its_place(key, tmp_path):
    path = epath.Path(tmp_path / "results.json")
    kept = results.Results(path)
    kept.add(row("teacher", 0, 5), final=True)
    kept.add(row("student", 1, 8), final=True)
    whole = path.read_text()
    content = json.loads(whole)
    content["rows"][0][key] = changed(content["rows"][0][key])
    path.write_text(json.dumps(content))
    with capture_lines() as lines:
        assert [r.stage for r in results.read(path)["rows"]] == ["student"]
    assert len(lines) == 1 and "was changed after it was written" in lines[0]
    again = results.Results(path)
    assert [r.stage for r in again.rows] == ["student"]
    again.add(row("teacher", 0, 5), final=True)
    assert path.read_text() == whole


def test_rows_are_removed_beside_a_changed_one(tmp_path):
    path = epath.Path(tmp_path / "results.json")
    kept = results.Results(path)
    for stage, round_ in (("teacher", 0), ("student", 1), ("student", 2)):
        kept.add(row(stage, round_, 5), final=True)
    content = json.loads(path.read_text())
    content["rows"][0]["miou"] = 1.0
    path.write_text(json.dumps(content))
    results.Results(path).remove(lambda row: row.round == 1)
    assert [r.round for r in results.Results(path).rows] == [2]


def test_a_row_knows_the_weights_that_it_is_of(tmp_path):
    path = tmp_path / "results.json"
    kept = results.Results(path)
    kept.add(row("teacher", 0, 5), final=True, weights_hash="a")
    for reader in (kept, results.Results(path)):
        (of_teacher,) = reader.rows
        assert [reader.is_of(of_teacher, w) for w in ("a", "b", None)] == [True, False, True]
    # Rows of older code may be of any.
    (tmp_path / results.ROW_HASHES).unlink()
    older = results.Results(path)
    assert older.is_of(*older.rows, "b")
    assert not older.is_of(*older.rows, "b", may_be_unknown=False)
    older.add(row("student", 1, 8), final=True, weights_hash="c")
    assert results.Results(path).rows == older.rows


def test_outdated_rows_are_removed_beside_changed_ones(tmp_path):
    path = tmp_path / "results.json"
    kept = results.Results(path)
    for stage in (("teacher", 0, 5), ("student", 1, 6), ("control", 1, 7)):
        kept.add(row(*stage), final=True)
    content = json.loads(path.read_text())
    content["rows"][0]["miou"] += 0.25
    path.write_text(json.dumps(content))
    results.Results(path).remove(lambda row: row.stage == "student")
    assert [row.stage for row in results.Results(path).rows] == ["control"]


@pytest.mark.parametrize("name", ["results.json", results.ROW_HASHES])
def test_an_end_between_the_two_files_changes_no_row(name, tmp_path):
    """Of the newer version only ROW_HASHES may be there, which is written first."""
    path = tmp_path / "results.json"
    kept = results.Results(path)
    kept.add(row("teacher", 0, 4), final=True)
    before = path.read_bytes()
    kept.add(row("teacher", 0, 5), final=True)
    if name == results.ROW_HASHES:
        path.write_bytes(before)
    assert len(results.Results(path).rows) == 1


def test_damaged_hashes_of_rows_are_one_sentence(tmp_path):
    results.Results(tmp_path / "results.json").add(row("teacher", 0, 5), final=True)
    (tmp_path / results.ROW_HASHES).write_text("{")
    with raises_code("row-hashes-damaged", results.ROW_HASHES):
        results.Results(tmp_path / "results.json")


def test_the_name_of_a_list_is_not_lost(tmp_path):
    path = tmp_path / "results.json"
    results.Results(path).add(row("teacher", 0, 3, step=5), final=False)
    path.write_text(path.read_text().replace("curve", "curvd"))
    with raises_code("results-damaged", "curvd"):
        results.Results(path)


def test_the_table_has_gains():
    rows = [row("teacher", 0, 5), row("student", 1, 8), row("control", 1, 9)]
    printed = io.StringIO()
    results.print_table(rows, ("sky", "road", "moon"), Console(file=printed, width=100))
    lines = [line.split() for line in printed.getvalue().splitlines()]
    assert ["teacher", "student", "1", "control", "1"] in lines
    assert ["mIoU", "58.33", "81.67", "90.45"] in lines
    assert ["gain", "over", "the", "teacher", "+0.00", "+23.33", "+32.12"] in lines
    assert ["moon", "-", "-", "-"] in lines


def test_a_table_of_several_protocols_is_refused():
    rows = [row("teacher", 0, 5), row("student", 1, 8, PROTOCOL | {"scales": [2.0]})]
    with pytest.raises(ValueError, match="different protocols"):
        results.print_table(rows, ("sky", "road", "moon"), Console())
