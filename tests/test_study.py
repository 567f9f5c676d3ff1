"""The runs of a table: what they share, what they cost, and that they go on."""

import json

import numpy as np
import pytest
from etils import epath
from safetensors.numpy import load_file

from semiseg_jax import evaluate, history, identity, interruption, lock, paper, rounds, study
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
        row = {"step": 1, "split": "val", "seed": 0, "miou": 0.5, "iou": [], "protocol": protocol}
        rows.extend({"stage": kind, "round": n, **row} for kind, n in stages)
        (workdir / "results.json").write_text(json.dumps({"rows": rows, "curve": []}))

    monkeypatch.setattr(rounds, "run", run)
    with pytest.raises(interruption.Interrupted):
        study.Study(config, "figure_6", [0], tmp_path).run()
    study.Study(config, "figure_6", [0], tmp_path).run()
    # The control of one student is made before there are two, and not asked for again.
    assert called == [("full", 1), ("full", 2), ("full", 2)]


def failing(monkeypatch, errors):
    """Runs of these names end with these errors, the others with nothing done."""
    called = []

    def run(config, workdir, asked):
        called.append(workdir.parent.name)
        if error := errors.get(called[-1]):
            raise error

    monkeypatch.setattr(study.Study, "_teach", lambda *arguments: None)
    monkeypatch.setattr(rounds, "run", run)
    return called


def test_a_run_that_fails_does_not_keep_the_others_from_running(config, tmp_path, monkeypatch):
    called = failing(monkeypatch, {"sda": UserError("The loss is not finite.")})
    with pytest.raises(UserError, match=r"^sda, seed 0 failed: The loss is not finite\.$"):
        study.Study(config, "2", [0], tmp_path).run()
    assert set(called) == {row.run for row in paper.TABLES["2"].rows}


def test_what_makes_every_run_fail_ends_the_study(config, tmp_path, monkeypatch):
    same = UserError("There is no data.")
    called = failing(monkeypatch, dict.fromkeys(paper.RUNS, same))
    with pytest.raises(UserError, match=r"^There is no data\.$"):
        study.Study(config, "2", [0], tmp_path).run()
    assert called == ["full", "sda"]


def test_all_runs_of_the_same_labels_have_the_same_teacher(config):
    made = study.Study(config, "1", [0], "unused")
    keys = {name: study.of_teacher(made.piece(name, 0).config) for name in paper.RUNS}
    same = [name for name in paper.RUNS if keys[name] == keys["full"]]
    assert set(paper.RUNS) - set(same) == {"all_labels", "all_labels_extra"}
    assert keys["all_labels"] == keys["all_labels_extra"]
    other = study.Study(config, "1", [1], "unused").piece("full", 1)
    assert study.of_teacher(other.config) != keys["full"]


def test_the_plan_counts_images_and_what_is_shared(config, tmp_path, capsys):
    study.Study(config, "2", [0], tmp_path, only=("full", "sda")).print_plan()
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    # 2 steps of 2 images, of 2 + 2 in a student; 8 unlabelled images, one scale, mirrored too;
    # N to evaluate, each time.
    evaluated = len(sources.plan(config)[0].evaluation)
    n = str(evaluated)
    expected = [
        ["full", "0", "teacher", "4", "0", n],
        ["full", "0", "student", "1", "8", "16", n],
        ["full", "0", "control", "1", "4", "0", n],
        ["sda", "0", "teacher", "0", "0", n, "shared"],
        ["sda", "0", "student", "1", "8", "0", n],
        ["left", "to", "do", "24", "16", str(5 * evaluated)],
    ]
    assert [line for line in lines if line in expected] == expected


def test_the_plan_knows_what_lies_in_the_workdir(config, tmp_path, capsys):
    teacher = tmp_path / "sda" / "seed_0" / "round_0" / "teacher"
    (teacher / "pseudo_labels").mkdir(parents=True)
    (teacher / rounds.DONE).touch()
    manifest = {"images": {str(number): {} for number in range(6)}}
    (teacher / "pseudo_labels" / "manifest.json").write_text(json.dumps(manifest))
    study.Study(config, "2", [0], tmp_path, only=("sda_dsbn",)).print_plan()
    lines = [line.split()[:6] for line in capsys.readouterr().out.splitlines()]
    # Another run's teacher is there, with labels of 6 of the 8 images; mirrored too.
    assert ["sda_dsbn", "0", "teacher", "0", "0"] in [line[:5] for line in lines]
    assert ["sda_dsbn", "0", "student", "1", "8", "4"] in lines


def test_a_stage_that_another_protocol_evaluated_is_not_planned_to_be_trained(
    config, tmp_path, capsys
):
    for stage in ("round_0/teacher", "round_1/student"):
        folder = tmp_path / "full" / "seed_0" / stage
        folder.mkdir(parents=True)
        (folder / rounds.DONE).touch()
    study.Study(config, "2", [0], tmp_path, only=("full",)).print_plan()
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    n = str(len(sources.plan(config)[0].evaluation))
    assert ["full", "0", "teacher", "0", "0", n, "trained"] in lines
    assert ["full", "0", "student", "1", "0", "0", n, "trained"] in lines
    assert ["full", "0", "control", "1", "4", "0", n] in lines


def test_the_plan_lists_the_rows_that_the_table_will_have(config, tmp_path, capsys):
    config.rounds.count = 1
    study.Study(config, "1", [0], tmp_path).print_plan()
    said = capsys.readouterr().out
    assert "the method, one round" in said and "1 rounds" not in said
    assert "all students' steps longer" not in said
    config.rounds.count = 2
    study.Study(config, "1", [0], tmp_path).print_plan()
    said = capsys.readouterr().out
    assert "the method, 2 rounds" in said and "all students' steps longer" in said


def test_evaluations_that_make_curves_are_planned(config, tmp_path, capsys):
    config.train.steps = 30
    evaluated = len(sources.plan(config)[0].evaluation)
    made = study.Study(config, "figure_5", [0], tmp_path, only=("sce",))
    made.print_plan()
    (line,) = [line.split() for line in capsys.readouterr().out.splitlines() if "student 1" in line]
    # At 3, 6, … 27, and at the end.
    assert line[-1] == str(10 * evaluated)
    (piece,) = made.pieces
    assert piece.config_of(1).eval.every == 3
    # The teacher, made by the run of the whole method, is evaluated at its end alone.
    assert made.piece("full", 0).config_of(1).eval.every == 0


def test_runs_without_images_for_them_are_left_out(config, tmp_path, capsys):
    made = study.Study(config, "figure_4", [0, 1], tmp_path)
    unlabeled, labeled = (
        len(part) for part in (lambda d: (d.unlabeled, d.labeled))(sources.plan(config)[0])
    )
    left = [n for n in (1, 2, 4, 8, 16) if n * labeled > unlabeled]
    assert left
    names = [piece.name for piece in made.pieces]
    assert names == 2 * ["full", *(f"ratio_{n}" for n in (1, 2, 4, 8, 16) if n not in left)]
    said = capsys.readouterr().out
    assert all(f"ratio_{n} is left out: data.unlabeled_ratio={n} asks" in said for n in left)


def test_a_workdir_of_another_config_is_refused(config, tmp_path):
    piece = study.Study(config, "2", [0], tmp_path).piece("sda", 0)
    piece.workdir.mkdir(parents=True)
    identity.keep_config(piece.workdir, piece.config_of(1))
    study.Study(config, "2", [0], tmp_path)
    config.train.steps = 3
    with pytest.raises(UserError, match=r"another config \(train.steps: 2 there, 3 here\)"):
        study.Study(config, "2", [0], tmp_path, only=("full",))


def test_a_table_has_the_seeds_of_before(config, tmp_path):
    (tmp_path / "sda" / "seed_3").mkdir(parents=True)
    (tmp_path / "sda" / "seed_-2").mkdir(parents=True)
    (tmp_path / "sda" / "seed_3.old").mkdir(parents=True)
    made = study.Study(config, "2", [1], tmp_path)
    assert [p.seed for p in made._shown if p.name == "sda"] == [-2, 1, 3]
    assert {p.seed for p in made.pieces} == {1}


def test_a_run_with_frozen_statistics_takes_the_teacher_of_the_others(config, tmp_path, capsys):
    study.Study(config, "2", [0], tmp_path, only=("sda_frozen",)).run()
    assert "taken from" in capsys.readouterr().out
    full = tmp_path / "full" / "seed_0"
    assert json.loads((full / "config.json").read_text())["model"]["norm"] == "dsbn"
    rows = [
        json.loads((w / "results.json").read_text())["rows"]
        for w in (full, tmp_path / "sda_frozen" / "seed_0")
    ]
    # The first made the teacher alone.
    assert [len(r) for r in rows] == [1, 2]
    assert rows[0][0]["iou"] == rows[1][0]["iou"]


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


def test_a_teacher_passes_from_workdir_to_workdir_while_no_other_run_is_in_them(
    config, tmp_path, monkeypatch
):
    made = study.Study(config, "2", [0], tmp_path, only=("full", "sda"))
    full, sda = made.piece("full", 0), made.piece("sda", 0)
    monkeypatch.setattr(
        study.Piece, "is_trained", lambda piece, kind, round_: piece.workdir == full.workdir
    )
    seen = []

    class Job:
        def __init__(self, config, workdir, asked):
            with pytest.raises(UserError, match="is in use"), lock.held(workdir):
                pass
            self._workdir = workdir

        def finished(self, kind, round_):
            seen.append(("lends", self._workdir))
            return "teacher"

        def adopt(self, teacher):
            seen.append((teacher, self._workdir))

    monkeypatch.setattr(rounds, "Job", Job)
    made._teach(sda, interruption.never)
    assert seen == [("lends", full.workdir), ("teacher", sda.workdir)]


@pytest.mark.parametrize(
    ("table", "key", "value"),
    [
        ("1", "loss.unlabeled", "ce"),
        ("2", "model.norm", "shared"),
        ("augmentation", "sda.magnitude", "released"),
    ],
)
def test_a_config_that_makes_the_labels_of_rows_untrue_is_refused(
    config, tmp_path, table, key, value
):
    config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError, match=rf"^{key} is {value}: the rows of --table={table} change"):
        study.Study(config, table, [0], tmp_path)
    if key == "sda.magnitude":
        study.Study(config, "1", [0], tmp_path)  # No row changes it: it is the recipe of all.


def test_no_student_is_made_that_no_row_shows(config, tmp_path):
    config.rounds.count = 3

    def stages(table, name="full"):
        return study.Study(config, table, [0], tmp_path).piece(name, 0).stages

    one = [("teacher", 0), ("student", 1), ("control", 1)]
    three = [("teacher", 0), *(("student", n) for n in (1, 2, 3)), ("control", 1), ("control", 3)]
    assert stages("2") == one and stages("1") == three
    # Another table has given the run two of the three already.
    piece = study.Study(config, "1", [0], tmp_path).piece("full", 0)
    piece.workdir.mkdir(parents=True)
    identity.keep_config(piece.workdir, piece.config_of(2))
    assert [place for place in stages("2") if place[0] == "student"] == [
        ("student", 1),
        ("student", 2),
    ]
    assert stages("1") == three


def test_where_nothing_is_done_no_table_is_written(config, tmp_path):
    (tmp_path / "table_2.md").write_text("of another protocol")
    with pytest.raises(UserError, match=r"has no result of this table by this config's protocol"):
        study.Study(config, "2", [0], tmp_path).print_table()
    assert [path.name for path in tmp_path.glob("table_*")] == ["table_2.md"]
    assert (tmp_path / "table_2.md").read_text() == "of another protocol"
    with pytest.raises(UserError, match="nowhere has no result"):
        study.Study(config, "2", [0], tmp_path / "nowhere").print_table()
    assert not (tmp_path / "nowhere").exists()


def test_results_without_their_data_are_said_to_be_left_out(config, tmp_path, capsys):
    protocol = evaluate.protocol(config, sources.load(config), 1)
    row = {"stage": "teacher", "round": 0, "step": 2, "seed": 0, "miou": 0.5, "iou": []}
    for seed in (0, 1):
        folder = tmp_path / "full" / f"seed_{seed}"
        folder.mkdir(parents=True)
        content = {"rows": [{**row, "protocol": protocol}]}
        (folder / "results.json").write_text(json.dumps(content))
    identity.keep_data(epath.Path(folder), sources.load(config))
    study.Study(config, "2", [0, 1], tmp_path).print_table()
    said = capsys.readouterr().out
    assert f"full, seed 0 is left out: {tmp_path}/full/seed_0 has no data.json" in said
    assert "full, seed 1 is left out" not in said


def test_what_is_wrong_with_the_data_is_said_of_no_single_run(config, tmp_path, capsys):
    config.data.root = str(tmp_path / "nowhere")
    with pytest.raises(UserError, match="nowhere"):
        study.Study(config, "figure_4", [0], tmp_path).print_plan()
    assert "left out" not in capsys.readouterr().out
