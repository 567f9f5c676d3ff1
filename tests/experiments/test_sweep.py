"""The trials of a table: what they share, what they cost, and how they resume."""

import json

import numpy as np
import pytest
from etils import epath
from safetensors.numpy import load_file

from semiseg_jax import self_training
from semiseg_jax import stages as stages_lib
from semiseg_jax import workdir as workdir_lib
from semiseg_jax.data import load
from semiseg_jax.eval_protocol import EvalProtocol
from semiseg_jax.experiments import paper_tables
from semiseg_jax.experiments import sweep as sweep_lib
from semiseg_jax.runtime import metric_writer, preemption
from semiseg_jax.runtime.errors import UserError
from tests.conftest import FEW_OPERATIONS
from tests.errors import raises_code
from tests.rows import result_json

pytestmark = pytest.mark.usefixtures("one_device", "without_report")


@pytest.fixture
def config(config_of_pairs):
    config_of_pairs.train.steps = config_of_pairs.train.teacher_steps = 2
    config_of_pairs.sda.ops = FEW_OPERATIONS
    return config_of_pairs


@pytest.mark.slow
def test_trials_share_the_teacher_and_its_labels_and_write_a_table(config, tmp_path, capsys):
    sweep = sweep_lib.Sweep(config, "2", [0], tmp_path, only=("full", "sda"))
    sweep.run()
    full, sda = tmp_path / "full" / "seed_0", tmp_path / "sda" / "seed_0"
    labels = "round_0/teacher/pseudo_labels"
    names = {p.name for p in (full / labels).glob("*.png")}
    assert names == {p.name for p in (sda / labels).glob("*.png")}
    assert all((full / labels / n).read_bytes() == (sda / labels / n).read_bytes() for n in names)
    assert "8/8 images" in capsys.readouterr().out  # labelled once, by the first trial

    # The teacher's curves and result are the same, although the other network has one norm.
    curves = [
        metric_writer.read_metrics(epath.Path(run) / "round_0/teacher") for run in (full, sda)
    ]
    assert curves[0] == curves[1] != []
    rows = [json.loads((run / "results.json").read_text())["rows"] for run in (full, sda)]
    assert rows[0][0]["miou"] == rows[1][0]["miou"]
    assert rows[0][0]["iou"] == rows[1][0]["iou"]
    deployed = [load_file(run / "model" / "weights.safetensors") for run in (full, sda)]
    assert deployed[0].keys() == deployed[1].keys()

    text = (tmp_path / "table_2.md").read_text()
    assert "| DSBN |" not in text  # `only` left that run out
    line = next(line for line in text.splitlines() if line.startswith("| one norm, trained |"))
    assert f"{100 * rows[1][1]['miou']:.2f}" in line

    # The same call changes nothing.
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("checkpoints/*")}
    sweep_lib.Sweep(config, "2", [0], tmp_path, only=("full", "sda")).run()
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("checkpoints/*")} == before

    # With another protocol it evaluates again and trains nothing; the first results stay.
    config.eval.flip = True
    sweep_lib.Sweep(config, "2", [0], tmp_path, only=("full", "sda")).run()
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("checkpoints/*")} == before
    again = json.loads((sda / "results.json").read_text())["rows"]
    assert (
        again[: len(rows[1])] == rows[1]
        and [r["protocol"]["flip"] for r in again[2:]] == [True] * 2
    )
    mirrored = (tmp_path / "table_2.md").read_text()
    assert "mirrored too" in mirrored and "not mirrored" not in mirrored
    assert f"{100 * again[3]['miou']:.2f}" in mirrored

    # The result rows alone are enough for the table of each protocol.
    config.eval.flip = False
    for run in (full, sda):
        for name in ("results.json", "data.json"):
            copy = tmp_path / "archive" / run.relative_to(tmp_path) / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes((run / name).read_bytes())
    sweep_lib.Sweep(config, "2", [0], tmp_path / "archive").print_table()
    assert (tmp_path / "archive" / "table_2.md").read_text() == text


def test_an_interrupted_study_resumes(config, tmp_path, monkeypatch):
    config.rounds.count = 2
    called, rows = [], []

    def run(config, workdir):
        count = config.rounds.count
        called.append((workdir.parent.name, count))
        if called == [("full", 1), ("full", 2)]:
            raise preemption.Preempted
        stages = [("teacher", 0), *(("student", n + 1) for n in range(count)), ("control", count)]
        for kind, round_ in stages:
            folder = workdir / f"round_{round_}" / kind
            folder.mkdir(parents=True, exist_ok=True)
            (folder / stages_lib.DONE).touch()
        protocol = EvalProtocol.of_run(config, load.load_dataset(config), 1).to_json()
        rows.extend(result_json(protocol, stage=kind, round=n) for kind, n in stages)
        (workdir / "results.json").write_text(json.dumps({"rows": rows, "curve": []}))

    monkeypatch.setattr(self_training, "run", run)
    with pytest.raises(preemption.Preempted):
        sweep_lib.Sweep(config, "figure_6", [0], tmp_path).run()
    sweep_lib.Sweep(config, "figure_6", [0], tmp_path).run()
    # The control of one student is trained before the second student, and only once.
    assert called == [("full", 1), ("full", 2), ("full", 2)]


def failing(monkeypatch, errors):
    """Makes runs with these names raise these errors, and the others do nothing."""
    called = []

    def run(config, workdir):
        called.append(workdir.parent.name)
        if error := errors.get(called[-1]):
            raise error

    monkeypatch.setattr(sweep_lib.Sweep, "_shared_teacher", lambda *arguments: "")
    monkeypatch.setattr(self_training, "run", run)
    return called


def test_after_a_failed_trial_the_others_run(config, tmp_path, monkeypatch):
    called = failing(monkeypatch, {"sda": UserError("The loss is not finite.")})
    with raises_code("trials-failed", "sda, seed 0", "The loss is not finite."):
        sweep_lib.Sweep(config, "2", [0], tmp_path).run()
    assert set(called) == {row.run for row in paper_tables.TABLES["2"].rows}


@pytest.mark.parametrize("in_every_process", [False, True])
def test_an_error_of_one_of_several_processes_ends_the_study(
    config, tmp_path, monkeypatch, in_every_process
):
    """The others wait for it inside the trial."""
    error = UserError("An image is broken.", in_every_process=in_every_process)
    called = failing(monkeypatch, {"full": error})
    sweep = sweep_lib.Sweep(config, "2", [0], tmp_path)
    monkeypatch.setattr(sweep_lib.multihost, "process_count", lambda: 2)
    with pytest.raises(UserError, match="An image is broken"):
        sweep.run()
    assert (len(called) > 1) == in_every_process


def test_the_same_error_twice_ends_the_study(config, tmp_path, monkeypatch):
    same = UserError("There is no data.")
    called = failing(monkeypatch, dict.fromkeys(paper_tables.RUNS, same))
    with pytest.raises(UserError, match=r"^There is no data\.$"):
        sweep_lib.Sweep(config, "2", [0], tmp_path).run()
    assert called == ["full", "sda"]


def test_runs_with_the_same_labels_share_a_teacher(config):
    sweep = sweep_lib.Sweep(config, "1", [0], "unused")
    keys = {
        name: sweep_lib.teacher_config(sweep.trial(name, 0).config) for name in paper_tables.RUNS
    }
    same = [name for name in paper_tables.RUNS if keys[name] == keys["full"]]
    assert set(paper_tables.RUNS) - set(same) == {"all_labels", "all_labels_extra"}
    assert keys["all_labels"] == keys["all_labels_extra"]
    other = sweep_lib.Sweep(config, "1", [1], "unused").trial("full", 1)
    assert sweep_lib.teacher_config(other.config) != keys["full"]


def test_the_plan_counts_images_and_shared_work(config, tmp_path, capsys):
    sweep_lib.Sweep(config, "2", [0], tmp_path, only=("full", "sda")).print_plan()
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    # 2 steps of 2 images, of 2 + 2 in a student; 8 unlabelled images, one scale, mirrored too;
    # N to evaluate, each time.
    evaluated = len(load.plan_dataset(config)[0].evaluation)
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


def test_the_plan_reads_the_workdir(config, tmp_path, capsys):
    teacher = tmp_path / "sda" / "seed_0" / "round_0" / "teacher"
    (teacher / "pseudo_labels").mkdir(parents=True)
    (teacher / stages_lib.DONE).touch()
    entry = {"sha256": "0", "size": [2, 3], "mean_confidence": 0.5, "histogram": {"1": 6}}
    manifest = {"images": {str(number): entry for number in range(6)}}
    (teacher / "pseudo_labels" / "manifest.json").write_text(json.dumps(manifest))
    sweep_lib.Sweep(config, "2", [0], tmp_path, only=("sda_dsbn",)).print_plan()
    lines = [line.split()[:6] for line in capsys.readouterr().out.splitlines()]
    # Another run's teacher is there, with labels of 6 of the 8 images; mirrored too.
    assert ["sda_dsbn", "0", "teacher", "0", "0"] in [line[:5] for line in lines]
    assert ["sda_dsbn", "0", "student", "1", "8", "4"] in lines


def test_the_plan_does_not_train_a_stage_that_another_protocol_evaluated(config, tmp_path, capsys):
    for stage in ("round_0/teacher", "round_1/student"):
        folder = tmp_path / "full" / "seed_0" / stage
        folder.mkdir(parents=True)
        (folder / stages_lib.DONE).touch()
    sweep_lib.Sweep(config, "2", [0], tmp_path, only=("full",)).print_plan()
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    n = str(len(load.plan_dataset(config)[0].evaluation))
    assert ["full", "0", "teacher", "0", "0", n, "trained"] in lines
    assert ["full", "0", "student", "1", "0", "0", n, "trained"] in lines
    assert ["full", "0", "control", "1", "4", "0", n] in lines


def test_the_plan_lists_the_rows_of_the_table(config, tmp_path, capsys):
    config.rounds.count = 1
    sweep_lib.Sweep(config, "1", [0], tmp_path).print_plan()
    output = capsys.readouterr().out
    assert "the method, one round" in output and "1 rounds" not in output
    assert "all students' steps longer" not in output
    config.rounds.count = 2
    sweep_lib.Sweep(config, "1", [0], tmp_path).print_plan()
    output = capsys.readouterr().out
    assert "the method, 2 rounds" in output and "all students' steps longer" in output


def test_the_plan_counts_the_evaluations_of_curves(config, tmp_path, capsys):
    config.train.steps = 30
    evaluated = len(load.plan_dataset(config)[0].evaluation)
    sweep = sweep_lib.Sweep(config, "figure_5", [0], tmp_path, only=("sce",))
    sweep.print_plan()
    (line,) = [line.split() for line in capsys.readouterr().out.splitlines() if "student 1" in line]
    # At 3, 6, … 27, and at the end.
    assert line[-1] == str(10 * evaluated)
    (trial,) = sweep.trials
    assert trial.config_with(1).eval.every == 3
    # The run of the whole method trains the teacher, and evaluates it at its end alone.
    assert sweep.trial("full", 0).config_with(1).eval.every == 0


def test_runs_that_lack_images_are_left_out(config, tmp_path, capsys):
    sweep = sweep_lib.Sweep(config, "figure_4", [0, 1], tmp_path)
    unlabeled, labeled = (
        len(part) for part in (lambda d: (d.unlabeled, d.labeled))(load.plan_dataset(config)[0])
    )
    left = [n for n in (1, 2, 4, 8, 16) if n * labeled > unlabeled]
    assert left
    names = [trial.name for trial in sweep.trials]
    assert names == 2 * ["full", *(f"ratio_{n}" for n in (1, 2, 4, 8, 16) if n not in left)]
    output = capsys.readouterr().out
    assert all(f"ratio_{n} is left out: data.unlabeled_ratio={n} asks" in output for n in left)


def test_a_workdir_of_another_config_is_refused(config, tmp_path):
    trial = sweep_lib.Sweep(config, "2", [0], tmp_path).trial("sda", 0)
    trial.workdir.mkdir(parents=True)
    workdir_lib.write_config(trial.workdir, trial.config_with(1))
    sweep_lib.Sweep(config, "2", [0], tmp_path)
    config.train.steps = 3
    with raises_code("workdir-of-another-config", "train.steps: 2 there, 3 here"):
        sweep_lib.Sweep(config, "2", [0], tmp_path, only=("full",))


def test_a_table_has_the_seeds_of_earlier_calls(config, tmp_path):
    (tmp_path / "sda" / "seed_3").mkdir(parents=True)
    (tmp_path / "sda" / "seed_-2").mkdir(parents=True)
    (tmp_path / "sda" / "seed_3.old").mkdir(parents=True)
    sweep = sweep_lib.Sweep(config, "2", [1], tmp_path)
    assert [p.seed for p in sweep._table_trials if p.name == "sda"] == [-2, 1, 3]
    assert {p.seed for p in sweep.trials} == {1}


@pytest.mark.slow
def test_a_run_with_frozen_statistics_adopts_the_teacher_of_the_others(config, tmp_path, capsys):
    sweep_lib.Sweep(config, "2", [0], tmp_path, only=("sda_frozen",)).run()
    assert "taken from" in capsys.readouterr().out
    full = tmp_path / "full" / "seed_0"
    assert json.loads((full / "config.json").read_text())["model"]["norm"] == "dsbn"
    rows = [
        json.loads((w / "results.json").read_text())["rows"]
        for w in (full, tmp_path / "sda_frozen" / "seed_0")
    ]
    # The first run trained only its teacher.
    assert [len(r) for r in rows] == [1, 2]
    assert rows[0][0]["iou"] == rows[1][0]["iou"]


@pytest.mark.parametrize("texts", [["0", "x"], ["1", "1"], []])
def test_seeds_are_distinct_integers(texts):
    with raises_code("seeds-invalid"):
        sweep_lib.parse_seeds(texts)


def test_a_run_of_another_table_is_refused(config, tmp_path):
    with raises_code("table-run-unknown", "--runs=scl", "full, sda"):
        sweep_lib.Sweep(config, "2", [0], tmp_path, only=("scl",))


def test_a_table_needs_a_student(config, tmp_path):
    config.rounds.count = 0
    with raises_code("table-without-students"):
        sweep_lib.Sweep(config, "1", [0], tmp_path)


def test_every_change_of_a_run_is_a_config_key_of_the_right_type(config):
    for name in paper_tables.RUNS:
        trial = sweep_lib.Sweep(config, "1", [0], "unused").trial(name, 0)
        flat = trial.config.to_dict()
        for key, value in paper_tables.RUNS[name].changes.items():
            section, leaf = key.split(".")
            assert flat[section][leaf] == value
            assert np.ndim(flat[section][leaf]) == np.ndim(value)


@pytest.mark.parametrize(
    ("table", "key", "value"),
    [
        ("1", "loss.unlabeled", "ce"),
        ("2", "model.norm", "shared"),
        ("augmentation", "sda.magnitude", "released"),
    ],
)
def test_a_config_that_changes_a_key_of_the_rows_is_refused(config, tmp_path, table, key, value):
    config.update_from_flattened_dict({key: value})
    with raises_code("table-key-changed", f"{key} is {value}", f"--table={table}"):
        sweep_lib.Sweep(config, table, [0], tmp_path)
    if key == "sda.magnitude":
        sweep_lib.Sweep(config, "1", [0], tmp_path)  # No row of table 1 changes it.


def test_students_that_no_row_reports_are_not_trained(config, tmp_path):
    config.rounds.count = 3

    def stages(table, name="full"):
        trial = sweep_lib.Sweep(config, table, [0], tmp_path).trial(name, 0)
        return [(stage.kind, stage.round) for stage in trial.stages]

    one = [("teacher", 0), ("student", 1), ("control", 1)]
    three = [("teacher", 0), *(("student", n) for n in (1, 2, 3)), ("control", 1), ("control", 3)]
    assert stages("2") == one and stages("1") == three
    # Another table has already trained two students in this workdir.
    trial = sweep_lib.Sweep(config, "1", [0], tmp_path).trial("full", 0)
    trial.workdir.mkdir(parents=True)
    workdir_lib.write_config(trial.workdir, trial.config_with(2))
    assert [place for place in stages("2") if place[0] == "student"] == [
        ("student", 1),
        ("student", 2),
    ]
    assert stages("1") == three


def test_without_results_no_table_is_written(config, tmp_path):
    (tmp_path / "table_2.md").write_text("of another protocol")
    with raises_code("table-without-results"):
        sweep_lib.Sweep(config, "2", [0], tmp_path).print_table()
    assert [path.name for path in tmp_path.glob("table_*")] == ["table_2.md"]
    assert (tmp_path / "table_2.md").read_text() == "of another protocol"
    with raises_code("table-without-results", "nowhere"):
        sweep_lib.Sweep(config, "2", [0], tmp_path / "nowhere").print_table()
    assert not (tmp_path / "nowhere").exists()


def test_results_without_data_json_are_left_out(config, tmp_path, capsys):
    protocol = EvalProtocol.of_run(config, load.load_dataset(config), 1).to_json()
    for seed in (0, 1):
        folder = tmp_path / "full" / f"seed_{seed}"
        folder.mkdir(parents=True)
        content = {"rows": [result_json(protocol)]}
        (folder / "results.json").write_text(json.dumps(content))
    workdir_lib.write_data(epath.Path(folder), load.load_dataset(config))
    sweep_lib.Sweep(config, "2", [0, 1], tmp_path).print_table()
    output = capsys.readouterr().out
    assert f"full, seed 0 is left out: {tmp_path}/full/seed_0 has no data.json" in output
    assert "full, seed 1 is left out" not in output


def test_an_error_of_the_data_is_not_reported_per_run(config, tmp_path, capsys):
    config.data.root = str(tmp_path / "nowhere")
    with raises_code("data-folder-missing", "nowhere"):
        sweep_lib.Sweep(config, "figure_4", [0], tmp_path).print_plan()
    assert "left out" not in capsys.readouterr().out
