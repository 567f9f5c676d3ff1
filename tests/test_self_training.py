"""Algorithm 1 from data to result rows, and what survives an interruption."""

import contextlib
import dataclasses
import gc
import hashlib
import io
import itertools
import json
import math
import pathlib
import shutil
import weakref
from unittest import mock

import jax
import numpy as np
import pytest
from etils import epath
from flax import traverse_util
from PIL import Image
from safetensors.numpy import load_file

from semiseg_jax import (
    checkpoints,
    compiled_model,
    config_check,
    evaluate,
    mesh,
    self_training,
    train,
)
from semiseg_jax import workdir as workdir_lib
from semiseg_jax.data import image_io, load
from semiseg_jax.models import deeplab, published_weights
from semiseg_jax.reporting import page
from semiseg_jax.results import Results
from semiseg_jax.run_observer import RunObserver
from semiseg_jax.runtime import metric_writer, multihost, preemption
from semiseg_jax.runtime.logger import capture_lines
from semiseg_jax.train_state import inference_variables, variable_shapes
from tests import conftest, workdirs
from tests.errors import raises_code


@pytest.fixture(scope="module", autouse=True)
def two_devices():
    """Enough to be a mesh, few enough to compile fast; the report has tests of its own."""
    make = mesh.make_mesh
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "write", lambda workdir: [])
        patch.setattr(mesh, "make_mesh", lambda: make(jax.devices()[:2]))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder data set that no test changes, and a place for a cache."""
    folder = tmp_path_factory.mktemp("rounds")
    conftest.write_folder_data(folder / "data")
    return folder


def two_rounds(folder):
    config = conftest.in_pairs(conftest.tiny_folder_config(folder / "data", folder / "cache"))
    config.rounds.count = 2
    config.rounds.control = True
    config.pseudo.flip = True
    config.model.head = "v3plus"
    return config


@pytest.fixture
def config(folder):
    return two_rounds(folder)


@dataclasses.dataclass(frozen=True)
class Run:
    """A run of `two_rounds` that nothing interrupted; no test changes it."""

    workdir: pathlib.Path
    results: Results
    printed: str
    events: list[str]


class Recorder(RunObserver):
    """Writes down what a run tells."""

    def __init__(self):
        self.events = []

    def on_run(self, config, dataset, mesh, schedule):
        self.events.append("run of " + ", ".join(stage.name for stage in schedule))

    def on_labels(self, student):
        self.events.append(f"labels for {student.name}")

    def on_images(self, done, total):
        if done == total:
            self.events.append(f"{total} images")

    def on_stage(self, stage):
        self.events.append(stage.name)

    def on_step(self, step):
        self.events.append(f"step {step}")

    @contextlib.contextmanager
    def evaluating(self):
        yield
        self.events.append("evaluation")

    def on_end(self, stage):
        self.events.append(f"end of {stage.name}")


@pytest.fixture(scope="module")
def whole(folder, two_devices):
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        recorder = Recorder()
        results = self_training.run(two_rounds(folder), folder / "whole", recorder)
    return Run(folder / "whole", results, printed.getvalue(), recorder.events)


def test_an_observer_is_told_each_part_in_order(whole):
    def stage(name, count):
        return [name, *(f"step {n}" for n in range(1, count + 1)), "evaluation", f"end of {name}"]

    assert whole.events == [
        "run of teacher, student 1, student 2, control 2",
        *stage("teacher", 4),
        *["labels for student 1", "8 images"],
        *stage("student 1", 4),
        *["labels for student 2", "8 images"],
        *stage("student 2", 4),
        *stage("control 2", 8),
    ]


def after(times):
    """Asks the run to stop from the given call of `should_stop` on."""
    counted = itertools.count(1)
    return lambda: next(counted) >= times


class Killed(BaseException):
    """An end at any moment; the kill -9 of a process is in test_main_slow.py."""


def kill_at(monkeypatch, stage, step):
    """The process ends in a stage as a step has been dispatched."""
    on_step = train._StepLogger.on_step

    def dies(self, at, *args):
        if (self._stage.name, at) == (stage, step):
            raise Killed
        on_step(self, at, *args)

    monkeypatch.setattr(train._StepLogger, "on_step", dies)


def check_rows(rows):
    """A row a stage, in order."""
    assert [(r["stage"], r["round"], r["step"]) for r in rows] == [
        ("teacher", 0, 4),
        ("student", 1, 4),
        ("student", 2, 4),
        ("control", 2, 8),
    ]
    for row in rows:
        assert len(row["iou"]) == 3 and 0 <= row["miou"] <= 1
        # 5 images of 36 x 48 pixels less two ignored rows of their width
        assert row["pixels"] == 3 * (36 - 2) * 48 + 2 * (48 - 2) * 36
        assert row["protocol"]["seed"] == row["seed"] == 0


def check_pseudo_labels(folder):
    """Every unlabelled image, in its size, as palette indices; and the manifest."""
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["teacher"] == "round_1/student, step 4"
    assert len(manifest["images"]) == 8
    for name, entry in manifest["images"].items():
        image = Image.open(folder / f"{name}.png")
        values, counts = np.unique(np.asarray(image), return_counts=True)
        assert image.mode == "P"
        histogram = {str(v): int(n) for v, n in zip(values, counts, strict=True)}
        assert entry["histogram"] == histogram
        assert 1 / 3 <= entry["mean_confidence"] <= 1
        assert entry["size"] == [image.height, image.width]


def check_printed(printed):
    """What a person sees."""
    for line in ("[1/6] teacher: 4 steps", "[4/6] pseudo-labels for student 2: 8/8 images"):
        assert line in printed
    assert "[5/6] student 2: 4 steps" in printed
    assert "[6/6] control 2: 8 steps" in printed
    assert "gain over the teacher" in printed
    assert "tiny, output stride 16" in printed and "input imagenet, half-pixel" in printed


def test_all_of_algorithm_1(whole):
    assert workdirs.rows(whole.workdir) == [row.to_json() for row in whole.results.rows]
    check_rows(workdirs.rows(whole.workdir))
    check_pseudo_labels(whole.workdir / "round_1" / "student" / "pseudo_labels")
    assert not (whole.workdir / "round_2" / "student" / "pseudo_labels").exists()
    check_printed(whole.printed)


def test_the_same_command_again_does_nothing(config, whole):
    stages = [p for p in whole.workdir.glob("round_*/**/*") if p.is_file()]
    before = {p: p.stat().st_mtime_ns for p in stages}
    self_training.run(config, whole.workdir)
    assert {p: p.stat().st_mtime_ns for p in stages} == before


def test_a_kill_in_every_kind_of_stage_changes_no_bit(config, whole, tmp_path, monkeypatch):
    for stage, step in (("teacher", 3), ("student 1", 1), ("student 2", 4), ("control 2", 7)):
        with monkeypatch.context() as patch:
            kill_at(patch, stage, step)
            with pytest.raises(Killed):
                self_training.run(config, tmp_path)
    self_training.run(config, tmp_path)
    workdirs.same(whole.workdir, tmp_path)
    for stage in ("round_0/teacher", "round_1/student", "round_2/student", "round_2/control"):
        folders = [epath.Path(w) / stage for w in (whole.workdir, tmp_path)]
        steps = [
            [line["step"] for line in metric_writer.read_metrics(folder)] for folder in folders
        ]
        assert steps[0] == steps[1] == sorted(set(steps[0]))


def test_stops_inside_stages_labelling_and_evaluation_change_no_bit(config, whole, tmp_path):
    for patience in (1, 2, 6, 9, 10):
        with pytest.raises(preemption.Preempted), preemption.stop_when(after(patience)):
            self_training.run(config, tmp_path)
    self_training.run(config, tmp_path)
    workdirs.same(whole.workdir, tmp_path)


def test_another_config_is_refused_with_the_difference(config, tmp_path):
    workdir_lib.check_config(tmp_path, config)
    workdir_lib.write_config(tmp_path, config)
    workdir_lib.check_config(tmp_path, config)
    config.data.palette = ((0, 0, 0), (1, 2, 3), (4, 5, 6))  # no result depends on it
    workdir_lib.check_config(tmp_path, config)
    config.train.steps = 5
    with raises_code("workdir-of-another-config", "train.steps: 4 there, 5 here"):
        workdir_lib.check_config(tmp_path, config)


def test_what_no_result_follows_from_may_change(config, tmp_path):
    workdir_lib.write_config(tmp_path, config)
    # Labelling ran out of memory, or the run goes on on more devices.
    config.pseudo.batch *= 2
    config.pseudo.keep_confidence = True
    workdir_lib.check_config(tmp_path, config)


def test_another_padding_is_another_config_because_labelling_has_it_too(config, tmp_path):
    workdir_lib.write_config(tmp_path, config)
    config.eval.batch, config.eval.flip = 4, True
    workdir_lib.check_config(tmp_path, config)
    config.eval.pad_to = 64
    with raises_code("workdir-of-another-config", "eval.pad_to: 128 there, 64 here"):
        workdir_lib.check_config(tmp_path, config)


def test_a_run_that_cannot_start_leaves_the_workdir_to_its_corrected_config(config, tmp_path):
    config.data.labels = 99.0
    with raises_code("subset-size-invalid", "data.labels=99"):
        self_training.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_balanced_weights_of_a_class_without_labels_are_refused_before_training(config, tmp_path):
    config.data.classes = (*config.data.classes, "unicorn")
    config.loss.class_weights = "balanced"
    with raises_code("class-without-labeled-pixels", "none: unicorn", "loss.absent_classes"):
        self_training.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_config_that_no_command_has_checked_is_refused(config, tmp_path, monkeypatch):
    config.train.steps = 0
    with raises_code("config-value-invalid", "train.steps is 0"):
        self_training.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    # A path with the home folder is that of the command line.
    config.train.steps, config.data.root = 4, "~/nowhere"
    monkeypatch.setenv("HOME", str(tmp_path))
    with raises_code("data-folder-missing", f"{tmp_path}/nowhere"):
        self_training.run(config, tmp_path / "run")
    assert config.data.root == "~/nowhere"


def test_batches_that_do_not_divide_are_refused_before_anything_is_trained(config, tmp_path):
    config.train.batch_labeled = 3
    with raises_code("batch-not-divisible", "train.batch_labeled is 3", "2 devices"):
        self_training.run(config, tmp_path / "run")


def test_a_step_that_does_not_fit_is_told_before_anything_is_trained(config, tmp_path, monkeypatch):
    compiled = []

    def compile_(lowered):
        compiled.append(lowered)
        if len(compiled) == 2:  # the student's, which has the teacher's images and as many more
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Used 20.50G of 15.75G hbm.\nMore")
        return mock.Mock(spec=jax.stages.Compiled)

    monkeypatch.setattr(mesh, "platform", lambda mesh: "tpu")  # the CPU is not asked
    monkeypatch.setattr(jax.stages.Lowered, "compile", compile_)
    reason = "(RESOURCE_EXHAUSTED: Used 20.50G of 15.75G hbm)"
    with raises_code("step-exceeds-memory", "student", reason):
        self_training.run(config, tmp_path)
    assert not list(tmp_path.rglob("round_*")) and not (tmp_path / "config.json").exists()


def test_pseudo_labels_of_another_teacher_are_refused(config, whole, tmp_path):
    shutil.copytree(whole.workdir, tmp_path / "run")
    manifest = tmp_path / "run" / "round_0" / "teacher" / "pseudo_labels" / "manifest.json"
    content = json.loads(manifest.read_text())
    content["teacher_hash"] = "0" * 16
    manifest.write_text(json.dumps(content))
    (tmp_path / "run" / "round_1" / "student" / "DONE").unlink()
    with raises_code("pseudo-labels-of-another-run", f"teacher_hash={'0' * 16!r}"):
        self_training.run(config, tmp_path / "run")


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_images(
    config, tmp_path, monkeypatch
):
    # Which the check of the config would refuse.
    monkeypatch.setattr(config_check, "check", lambda config: None)
    config.optim.teacher.learning_rate = 1e30
    config.train.checkpoint_every = 1
    with raises_code("loss-not-finite", "teacher", "(images 0"):
        self_training.run(config, tmp_path / "run")
    kept = [p.name for p in (tmp_path / "run/round_0/teacher/checkpoints").iterdir()]
    assert kept == ["1"]
    (batch,) = (tmp_path / "run/round_0/teacher").glob("not_finite_step_*.npz")
    assert np.load(batch)["image"].shape == (2, 32, 40, 3)
    assert len(np.load(batch)["ids"]) == 2
    assert not (tmp_path / "run/round_0/teacher/DONE").exists()


def test_without_unlabelled_images_there_is_one_sentence(config, tmp_path):
    config.data.labels = 0.0
    with raises_code("unlabeled-images-missing"):
        self_training.run(config, tmp_path / "run")


def test_a_teacher_starts_from_weights_and_the_model_says_how_it_sees(
    config, tmp_path, monkeypatch, capsys
):
    shapes = variable_shapes(deeplab.build(config.model, 3))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda s: rng.uniform(0.1, 1, s.shape).astype(s.dtype), shapes)
    path = tmp_path / "weights.safetensors"
    checkpoints.save_weights(path, inference_variables(variables), {})
    config.rounds.count = 0
    config.model.pretrained = str(path)
    # Ends where training would start.
    monkeypatch.setattr(train, "run", workdirs.train_nothing)
    self_training.run(config, tmp_path / "run")
    kept = load_file(tmp_path / "run" / "model" / "weights.safetensors")
    for name, value in load_file(path).items():
        np.testing.assert_array_equal(kept[name], value, err_msg=name)
    description = json.loads((tmp_path / "run" / "model" / "model.json").read_text())
    assert description["model"]["input_normalization"] == "imagenet"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert description["pretrained"]["sha256"] == digest
    recorded = json.loads((tmp_path / "run" / "pretrained.json").read_text())
    assert recorded == {"tiny": description["pretrained"]}
    assert "weights of layout semiseg_jax" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["teacher", "student"])
def test_weights_that_do_not_fit_leave_the_workdir_to_others(config, tmp_path, kind):
    """Names are those of the network, so that a look at them does not tell; a shape is not."""
    shapes = variable_shapes(deeplab.build(config.model, 3))
    weights = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), inference_variables(shapes))
    stem = weights["params"]["backbone"]["stem"]["conv"]
    stem["kernel"] = stem["kernel"][..., :3]
    path = tmp_path / "weights.safetensors"
    checkpoints.save_weights(path, weights, {})
    if kind == "teacher":
        config.model.pretrained = str(path)
    else:
        config.rounds.student_pretrained = str(path)
        config.rounds.student_model, config.model.backbone = config.model.backbone, "resnet18"
    with raises_code("weights-do-not-fit", "shapes or types differ"):
        self_training.run(config, tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.slow
def test_a_workdir_takes_more_rounds_and_another_protocol(config, tmp_path):
    config.rounds.count = 0
    config.eval.every = 2
    self_training.run(config, tmp_path)
    first = json.loads((tmp_path / "results.json").read_text())
    assert [r["step"] for r in first["curve"]] == [2]
    config.rounds.count = 1
    self_training.run(config, tmp_path)
    config.rounds.count = 2
    config.eval.flip = True
    self_training.run(config, tmp_path)
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert rows[0] == first["rows"][0]
    by = {flip: [r for r in rows if r["protocol"]["flip"] is flip] for flip in (False, True)}
    assert [(r["stage"], r["round"]) for r in by[False]] == [
        ("teacher", 0),
        ("student", 1),
        ("control", 1),
    ]
    # The control of one student is evaluated again like all else.
    assert [(r["stage"], r["round"]) for r in by[True]] == [
        ("teacher", 0),
        ("student", 1),
        ("student", 2),
        ("control", 1),
        ("control", 2),
    ]
    config.rounds.count = 1
    with raises_code("workdir-of-another-config", "rounds.count: 2 there, 1 here"):
        self_training.run(config, tmp_path)


@pytest.mark.slow
def test_a_teacher_from_another_run_gives_the_same_students(config, tmp_path):
    """Trained here or imported, from a network with another kind of norm too."""
    config.pseudo.keep_confidence = True
    config.rounds.count, config.rounds.control = 1, False
    own = self_training.run(config, tmp_path / "own").rows
    config.model.norm = "shared"
    self_training.run(config, tmp_path / "other")
    config.model.norm = "dsbn"
    config.rounds.teacher_from = str(tmp_path / "other")
    with capture_lines() as lines:
        imported = self_training.run(config, tmp_path / "imported").rows
    assert any("[1/3] teacher: taken from" in line for line in lines)
    assert not any("teacher: step" in line for line in lines)
    assert [r.miou for r in imported] == [r.miou for r in own]
    weights = [workdirs.contents(tmp_path / name) for name in ("own", "imported")]
    for content in weights:
        # Their config_hash is that of another config.
        del content["results.json"], content["round_0/teacher/pseudo_labels/manifest.json"]
    assert weights[0] == weights[1]
    confidences = [
        {p.name: p.read_bytes() for p in (tmp_path / w).rglob("pseudo_confidence/**/*.png")}
        for w in ("own", "imported")
    ]
    assert len(confidences[0]) == 8 and confidences[0] == confidences[1]


def test_a_teacher_of_another_config_is_not_imported(config, tmp_path):
    config.rounds.teacher_from = str(tmp_path / "nowhere")
    with raises_code("teacher-unfinished", "nowhere"):
        self_training.run(config, tmp_path / "run")
    other = config.copy_and_resolve_references()
    other.train.teacher_steps = 9
    workdir_lib.write_config(tmp_path / "nowhere", other)
    (tmp_path / "nowhere/round_0/teacher").mkdir(parents=True)
    (tmp_path / "nowhere/round_0/teacher/DONE").touch()
    with raises_code("teacher-of-another-config", "train.teacher_steps: 9 there, 4 here"):
        self_training.run(config, tmp_path / "run")


def test_a_run_that_is_over_goes_with_its_network(config, tmp_path):
    """A study has many of them in one process."""
    job = self_training.SelfTraining(config, epath.Path(tmp_path))
    network = job._model("teacher")
    assert job._model("student") is network
    assert network.program("teacher", 4) is network.program("teacher", 4)
    gone = [weakref.ref(job), weakref.ref(network)]
    del job, network
    gc.collect()
    assert [ref() for ref in gone] == [None, None]


def test_students_of_all_rounds_share_a_step_that_runs_do_not_share(config, monkeypatch, tmp_path):
    """As that of a user's method which cannot be hashed."""
    monkeypatch.setattr(compiled_model, "_is_hashable", lambda method: False)
    job = self_training.SelfTraining(config, epath.Path(tmp_path))
    network = job._model("student")
    assert network.program("student", 4) is network.program("student", 4)


def test_other_training_images_are_refused(config, tmp_path):
    data = load.load_dataset(config)
    workdir_lib.write_data(tmp_path, data)
    workdir_lib.check_data(tmp_path, data)
    fewer = dataclasses.replace(data, unlabeled=data.unlabeled[1:])
    with raises_code("data-changed", "4 labelled and 8 unlabelled", "4 and 7 of"):
        workdir_lib.check_data(tmp_path, fewer)


def test_other_initial_weights_under_the_same_name_are_refused(tmp_path):
    weights = {"tiny": {"name": "a.npz", "sha256": "0" * 64}}
    workdir_lib.check_pretrained(tmp_path, weights)  # as in a workdir of older code
    workdir_lib.write_pretrained(tmp_path, {})
    assert not (tmp_path / "pretrained.json").exists()
    workdir_lib.write_pretrained(tmp_path, weights)
    workdir_lib.check_pretrained(tmp_path, weights)
    workdir_lib.check_pretrained(tmp_path, {})
    other = {"tiny": weights["tiny"] | {"sha256": "1" * 64}}
    with raises_code("pretrained-changed", "weights of tiny (a.npz)", "1" * 64):
        workdir_lib.check_pretrained(tmp_path, other)


def test_hosts_with_different_initial_weights_are_refused(config, monkeypatch):
    weights = {"name": "imagenet", "sha256": "0" * 64}
    monkeypatch.setattr(published_weights, "describe", lambda model_config: weights)
    assert self_training.find_initial_weights(config) == {"tiny": weights}
    other = {"tiny": weights | {"sha256": "1" * 64}}
    monkeypatch.setattr(multihost, "all_gather", lambda name, value: [value, other])
    with raises_code("pretrained-differs-between-hosts", "weights of tiny (imagenet)"):
        self_training.find_initial_weights(config)


def test_images_of_the_same_names_and_other_sizes_are_refused(config, tmp_path):
    data = load.load_dataset(config)
    images = (*data.labeled, *data.unlabeled)
    assert data.pixels == sum(math.prod(image_io.image_size(e.image)) for e in images)
    workdir_lib.write_data(tmp_path, data)
    larger = dataclasses.replace(data, pixels=4 * data.pixels)
    with raises_code("data-changed", "of other sizes"):
        workdir_lib.check_data(tmp_path, larger)
    # Workdirs from before it was counted go on.
    known = json.loads((tmp_path / "data.json").read_text())
    del known["pixels"]
    (tmp_path / "data.json").write_text(json.dumps(known))
    workdir_lib.check_data(tmp_path, larger)


def selecting(config, select):
    """The best of the weights after steps 1 to 4 of each of two stages."""
    config.eval.select = select
    config.eval.every = 1
    config.train.checkpoint_every = 2
    config.rounds.count = 1
    config.rounds.control = False
    return config


@pytest.mark.slow
def test_the_best_weights_count_and_the_same_ones_after_a_kill(config, tmp_path, monkeypatch):
    selecting(config, "reported")
    results = self_training.run(config, tmp_path / "whole")
    assert {r.protocol.selection for r in results.rows} == {"best on the reported set"}
    for row in results.rows:
        inside = [r.miou for r in results.curve if r.stage == row.stage]
        assert row.miou >= max(inside)
        assert row.miou == max(inside) or row.miou not in inside
    manifest = tmp_path / "whole/round_0/teacher/pseudo_labels/manifest.json"
    step = results.rows[0].weights_step
    assert json.loads(manifest.read_text())["teacher"] == f"round_0/teacher, step {step}"
    with monkeypatch.context() as patch:
        kill_at(patch, "teacher", 4)
        with pytest.raises(Killed):
            self_training.run(config, tmp_path / "killed")
    self_training.run(config, tmp_path / "killed")
    workdirs.same(tmp_path / "whole", tmp_path / "killed")

    # The same command again reports the same, of the chosen weights; without them, nothing.
    assert self_training.run(config, tmp_path / "whole").rows == results.rows
    (tmp_path / "whole/round_0/teacher/best.safetensors").unlink()
    with raises_code("best-weights-missing", "best.safetensors"):
        self_training.run(config, tmp_path / "whole")

    # What was chosen by evaluating follows from how that is done.
    config.eval.flip = True
    with raises_code("workdir-of-another-config", "eval.flip: False there"):
        self_training.run(config, tmp_path / "killed")


@pytest.mark.slow
def test_weights_chosen_on_labelled_images_that_are_held_out(config, tmp_path, monkeypatch):
    selecting(config, "holdout")
    config.rounds.count = 0
    config.data.holdout = 2.0
    scores = iter([0.1, 0.4, 0.4, 0.3])
    seen = []

    def scored(best, step, miou, variables, update=checkpoints.BestWeights.update):
        seen.append({k: np.asarray(v) for k, v in flat(variables).items()})
        update(best, step, next(scores), variables)

    monkeypatch.setattr(checkpoints.BestWeights, "update", scored)
    before = load.load_dataset(without_selection(config))
    now = load.load_dataset(config)
    rows = self_training.run(config, tmp_path).rows
    assert len(now.selection) == 2 and len(now.labeled) == len(before.labeled) - 2
    assert not {e.id for e in now.selection} & {e.id for e in (*now.labeled, *now.unlabeled)}
    assert now.evaluation == before.evaluation and now.split_hash != before.split_hash
    assert rows[0].protocol.selection == "best on a hold-out of the labelled set"
    # The second of four, and not the third, which is as good.
    kept = load_file(tmp_path / "model" / "weights.safetensors")
    for name, value in kept.items():
        np.testing.assert_array_equal(value, seen[1][name])
    assert any((kept[name] != seen[2][name]).any() for name in kept)


@pytest.mark.parametrize(
    "select, right, reported, held_out, weights_step",
    [
        ("last", (10, 30, 20, 40), 4, None, 4),
        # A restart evaluates again what it chooses by: the row may be of other weights.
        ("reported", (10, 30, 30, 20, 40), 5, None, 4),
        # The best are not the last: they are seen once more, for the pictures of the stage's end.
        ("reported", (10, 40, 40, 20, 30, 40), 6, None, 2),
        # The held-out score is the same after every step: the first of them are the best.
        ("holdout", (10, 30, 20, 40), 4, 5, 1),
    ],
)
def test_one_evaluation_serves_the_choice_and_the_row(
    config, tmp_path, monkeypatch, select, right, reported, held_out, weights_step
):
    selecting(config, select)
    config.rounds.count = 0
    config.data.holdout = 2.0 if held_out else 0.0
    of_reported = iter(right)
    built, seen = [], []

    def train_with_a_restart_behind_step_2(stage, program, init_variables, evaluate, mesh, **_):
        state = program.create_state(init_variables(), mesh)
        for step in (1, 2, 2, 3):
            evaluate(step, state)
        return state

    class Counting(evaluate.Evaluator):
        def __init__(self, model, dataset, *args):
            super().__init__(model, dataset, *args)
            self.images = len(dataset.evaluation)
            built.append(self.images)

        def __call__(self, *_):
            seen.append(self.images)
            count = next(of_reported) if self.images == 5 else 10
            return evaluate.Score(np.diag([count, 50, 50]) + np.diag([50 - count, 0], 1))

    monkeypatch.setattr(evaluate, "Evaluator", Counting)
    monkeypatch.setattr(train, "run", train_with_a_restart_behind_step_2)
    rows = self_training.run(config, tmp_path).rows
    assert built == ([5, 2] if held_out else [5])
    assert [seen.count(5), seen.count(2)] == [reported, held_out or 0]
    assert [(row.step, row.weights_step) for row in rows] == [(4, weights_step)]
    # Of 50 pixels of the first class 40 are found, and the others taken for the second.
    np.testing.assert_allclose(rows[0].miou, np.mean([40 / 50, 50 / 60, 1]))


def without_selection(config):
    config = config.copy_and_resolve_references()
    config.eval.select, config.data.holdout = "last", 0.0
    return config


def flat(variables):
    return traverse_util.flatten_dict(inference_variables(variables), sep="/")


def test_a_workdir_in_use_is_refused_and_left_as_it_was(config, tmp_path):
    with workdir_lib.locked(tmp_path / "run"):
        with raises_code("workdir-in-use", str(tmp_path / "run")):
            self_training.run(config, tmp_path / "run")
        assert [p.name for p in (tmp_path / "run").iterdir()] == [workdir_lib.LOCK_FILE]


def test_a_run_that_cannot_start_leaves_no_folder(config, tmp_path):
    config.data.root = str(tmp_path / "nowhere")
    with raises_code("data-folder-missing", "nowhere"):
        self_training.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
