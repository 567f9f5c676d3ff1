"""The runs of a table: what they share, what they cost, and that they go on."""

import json

import numpy as np
import pytest
from etils import epath
from safetensors.numpy import load_file

from semiseg_jax import evaluate, history, interruption, paper, rounds, study
from semiseg_jax.data import sources
from semiseg_jax.errors import UserError

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture
def config(config_of_pairs):
    config_of_pairs.train.steps = config_of_pairs.train.teacher_steps = 2
    return config_of_pairs


def test_runs_share_the_teacher_and_its_labels_and_a_table_comes_out(config, tmp_path, capsys):
    made = study.Study(config, "2", [0], tmp_path, only=("full", "sda"))
    made.run()
    full, sda = tmp_path / "full" / "seed_0", tmp_path / "sda" / "seed_0"
    labels = "round_0/teacher/pseudo_labels"
    names = {p.name for p in (full / labels).glob("*.png")}
    assert names == {p.name for p in (sda / labels).glob("*.png")}
    assert all((full / labels / n).read_bytes() == (sda / labels / n).read_bytes() for n in names)
    assert "8/8 images" in capsys.readouterr().out  # once labelled, by the first run

    # One teacher: its curves and its row are the same, though the other network has one norm.
    curves = [history.read(epath.Path(run) / "round_0/teacher") for run in (full, sda)]
    assert curves[0] == curves[1] != []
    rows = [json.loads((run / "results.json").read_text())["rows"] for run in (full, sda)]
    assert rows[0][0]["miou"] == rows[1][0]["miou"]
    assert rows[0][0]["iou"] == rows[1][0]["iou"]
    deployed = [load_file(run / "model" / "weights.safetensors") for run in (full, sda)]
    assert deployed[0].keys() == deployed[1].keys()

    text = (tmp_path / "table_2.md").read_text()
    assert "| DSBN |" not in text  # that run was left out
    line = next(line for line in text.splitlines() if line.startswith("| one norm, trained |"))
    assert f"{100 * rows[1][1]['miou']:.2f}" in line

    # The same command has nothing left to do.
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("checkpoints/*")}
    study.Study(config, "2", [0], tmp_path, only=("full", "sda")).run()
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("checkpoints/*")} == before

    # By another protocol it evaluates again, and trains nothing; the first rows are kept.
    config.eval.flip = True
    study.Study(config, "2", [0], tmp_path, only=("full", "sda")).run()
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("checkpoints/*")} == before
    again = json.loads((sda / "results.json").read_text())["rows"]
    assert (
        again[: len(rows[1])] == rows[1]
        and [r["protocol"]["flip"] for r in again[2:]] == [True] * 2
    )
    mirrored = (tmp_path / "table_2.md").read_text()
    assert "mirrored too" in mirrored and "not mirrored" not in mirrored
    assert f"{100 * again[3]['miou']:.2f}" in mirrored

    # The table can be had from the rows alone, of each protocol its own.
    config.eval.flip = False
    for run in (full, sda):
        for name in ("results.json", "data.json"):
            kept = tmp_path / "kept" / run.relative_to(tmp_path) / name
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_bytes((run / name).read_bytes())
    study.Study(config, "2", [0], tmp_path / "kept").print_table()
    assert (tmp_path / "kept" / "table_2.md").read_text() == text


def test_an_interrupted_study_goes_on_where_it_stopped(config, tmp_path, monkeypatch):
    config.rounds.count = 2
    called, rows = [], []

    def run(config, workdir, asked):
        count = config.rounds.count
        called.append((workdir.parent.name, count))
        if called == [("full", 1), ("full", 2)]:
            raise interruption.Interrupted
        stages = [("teacher", 0), *(("student", n + 1) for n in range(count)), ("control", count)]
        for kind, round_ in stages:
            folder = workdir / f"round_{round_}" / kind
            folder.mkdir(parents=True, exist_ok=True)
            (folder / rounds.DONE).touch()
        protocol = evaluate.protocol(config, sources.load(config), 1)
        rows.extend({"stage": kind, "round": n, "protocol": protocol} for kind, n in stages)
        (workdir / "results.json").write_text(json.dumps({"rows": rows, "curve": []}))

    monkeypatch.setattr(rounds, "run", run)
    with pytest.raises(interruption.Interrupted):
        study.Study(config, "figure_6", [0], tmp_path).run()
    study.Study(config, "figure_6", [0], tmp_path).run()
    # The control of one student is made before there are two, and not asked for again.
    assert called == [("full", 1), ("full", 2), ("full", 2)]


def test_all_runs_of_the_same_labels_have_the_same_teacher(config):
    made = study.Study(config, "1", [0], "unused")
    keys = {name: study.of_teacher(made.piece(name, 0).config) for name in paper.RUNS}
    same = [name for name in paper.RUNS if keys[name] == keys["full"]]
    assert set(paper.RUNS) - set(same) == {"all_labels"}
    other = study.Study(config, "1", [1], "unused").piece("full", 1)
    assert study.of_teacher(other.config) != keys["full"]


def test_the_plan_counts_images_and_what_is_shared(config, tmp_path, capsys):
    study.Study(config, "2", [0], tmp_path, only=("full", "sda")).print_plan()
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    # 2 steps of 2 images, of 2 + 2 in a student; 8 unlabelled images, one scale, mirrored too.
    expected = [
        ["full", "0", "teacher", "4", "0"],
        ["full", "0", "student", "1", "8", "16"],
        ["full", "0", "control", "1", "4", "0"],
        ["sda", "0", "teacher", "0", "0", "shared"],
        ["sda", "0", "student", "1", "8", "0"],
        ["left", "to", "do", "24", "16"],
    ]
    assert [line for line in lines if line in expected] == expected


@pytest.mark.parametrize("texts", [["0", "x"], ["1", "1"], []])
def test_seeds_are_distinct_integers(texts):
    with pytest.raises(UserError, match="distinct integers"):
        study.seeds(texts)


def test_a_run_that_the_table_lacks_is_refused(config, tmp_path):
    with pytest.raises(UserError, match=r"--runs=scl is no run of this table: it has full, sda"):
        study.Study(config, "2", [0], tmp_path, only=("scl",))


def test_without_students_there_is_no_table(config, tmp_path):
    config.rounds.count = 0
    with pytest.raises(UserError, match=r"rounds\.count is 0"):
        study.Study(config, "1", [0], tmp_path)


def test_every_change_of_a_run_is_a_config_key_of_the_right_type(config):
    for name in paper.RUNS:
        piece = study.Study(config, "1", [0], "unused").piece(name, 0)
        flat = piece.config.to_dict()
        for key, value in paper.RUNS[name].changes.items():
            section, leaf = key.split(".")
            assert flat[section][leaf] == value
            assert np.ndim(flat[section][leaf]) == np.ndim(value)
