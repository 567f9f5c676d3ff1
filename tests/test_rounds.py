"""Algorithm 1 from data to result rows, and what survives an interruption."""

import dataclasses
import gc
import itertools
import json
import math
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
    evaluate,
    history,
    identity,
    interruption,
    lock,
    mesh,
    report,
    rounds,
    selection,
    state,
    train,
)
from semiseg_jax.data import labels, sources
from semiseg_jax.errors import UserError
from semiseg_jax.models import deeplab
from semiseg_jax.state import for_inference, variable_shapes
from tests import workdirs


@pytest.fixture(autouse=True)
def two_devices(monkeypatch):
    """Enough to be a mesh, few enough to compile fast; the report has tests of its own."""
    make = mesh.make_mesh
    monkeypatch.setattr(report, "write", lambda workdir: [])
    monkeypatch.setattr(mesh, "make_mesh", lambda: make(jax.devices()[:2]))


@pytest.fixture
def config(config_of_pairs):
    config_of_pairs.rounds.count = 2
    config_of_pairs.rounds.control = True
    config_of_pairs.pseudo.flip = True
    return config_of_pairs


def after(times):
    """Asks to stop from the given time on that somebody wants to know."""
    counted = itertools.count(1)
    return lambda: next(counted) >= times


class Killed(BaseException):
    """An end at any moment; the kill -9 of a process is in test_main_slow.py."""


def kill_at(monkeypatch, stage, step):
    """The process ends in a stage as a step has been dispatched."""
    dispatched = train._Log.dispatched

    def dies(self, at, *args):
        if (self._stage.name, at) == (stage, step):
            raise Killed
        dispatched(self, at, *args)

    monkeypatch.setattr(train._Log, "dispatched", dies)


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


def test_all_of_algorithm_1_and_again_after_kills(config, tmp_path, monkeypatch, capsys):
    whole = tmp_path / "whole"
    results = rounds.run(config, whole)
    assert workdirs.rows(whole) == results.rows
    check_rows(results.rows)
    check_pseudo_labels(whole / "round_1" / "student" / "pseudo_labels")
    assert not (whole / "round_2" / "student" / "pseudo_labels").exists()
    check_printed(capsys.readouterr().out)

    # The same command again does nothing, and says the same
    stages = [p for p in whole.glob("round_*/**/*") if p.is_file()]
    before = {p: p.stat().st_mtime_ns for p in stages}
    rounds.run(config, whole)
    assert {p: p.stat().st_mtime_ns for p in stages} == before

    # Killed in every kind of stage, then started again each time
    killed = tmp_path / "killed"
    for stage, step in (("teacher", 3), ("student 1", 1), ("student 2", 4), ("control 2", 7)):
        with monkeypatch.context() as patch:
            kill_at(patch, stage, step)
            with pytest.raises(Killed):
                rounds.run(config, killed)
    rounds.run(config, killed)
    workdirs.same(whole, killed)
    for stage in ("round_0/teacher", "round_1/student", "round_2/student", "round_2/control"):
        folders = [epath.Path(w) / stage for w in (whole, killed)]
        steps = [[line["step"] for line in history.read(folder)] for folder in folders]
        assert steps[0] == steps[1] == sorted(set(steps[0]))

    # Asked to stop at several moments, inside stages, labelling and evaluation
    stopped = tmp_path / "stopped"
    for patience in (1, 2, 6, 9, 10):
        with pytest.raises(interruption.Interrupted):
            rounds.run(config, stopped, asked=after(patience))
    rounds.run(config, stopped)
    workdirs.same(whole, stopped)


def test_another_config_is_refused_with_the_difference(config, tmp_path):
    identity.refuse_other_config(tmp_path, config)
    identity.keep_config(tmp_path, config)
    identity.refuse_other_config(tmp_path, config)
    config.data.palette = ((0, 0, 0), (1, 2, 3), (4, 5, 6))  # no result depends on it
    identity.refuse_other_config(tmp_path, config)
    config.train.steps = 5
    with pytest.raises(UserError, match=r"train\.steps: 4 there, 5 here"):
        identity.refuse_other_config(tmp_path, config)


def test_what_no_result_follows_from_may_change(config, tmp_path):
    identity.keep_config(tmp_path, config)
    # Labelling ran out of memory, or the run goes on on more devices.
    config.pseudo.batch *= 2
    config.pseudo.keep_confidence = True
    identity.refuse_other_config(tmp_path, config)


def test_another_padding_is_another_config_because_labelling_has_it_too(config, tmp_path):
    identity.keep_config(tmp_path, config)
    config.eval.batch, config.eval.flip = 4, True
    identity.refuse_other_config(tmp_path, config)
    config.eval.pad_to = 64
    with pytest.raises(UserError, match=r"another config \(eval\.pad_to: 128 there, 64 here\)"):
        identity.refuse_other_config(tmp_path, config)


def test_a_run_that_cannot_start_leaves_the_workdir_to_its_corrected_config(config, tmp_path):
    config.data.labels = 99.0
    with pytest.raises(UserError, match="asks for 99"):
        rounds.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_batches_that_do_not_divide_are_refused_before_anything_is_trained(config, tmp_path):
    config.train.batch_labeled = 3
    wanted = r"train\.batch_labeled is 3, which does not divide over 2 devices"
    with pytest.raises(UserError, match=wanted):
        rounds.run(config, tmp_path / "run")


def test_a_step_that_does_not_fit_is_told_before_anything_is_trained(config, tmp_path, monkeypatch):
    compiled = []

    def compile_(lowered):
        compiled.append(lowered)
        if len(compiled) == 2:  # the student's, which has the teacher's images and as many more
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Used 20.50G of 15.75G hbm.\nMore")
        return mock.Mock(spec=jax.stages.Compiled)

    monkeypatch.setattr(mesh, "platform", lambda mesh: "tpu")  # the CPU is not asked
    monkeypatch.setattr(jax.stages.Lowered, "compile", compile_)
    wanted = r"The student's step does not fit .* \(RESOURCE_EXHAUSTED: Used 20.50G of 15.75G hbm\)"
    with pytest.raises(UserError, match=wanted):
        rounds.run(config, tmp_path)
    assert not list(tmp_path.rglob("round_*")) and not (tmp_path / "config.json").exists()


def test_pseudo_labels_of_another_teacher_are_refused(config, tmp_path):
    config.rounds.count = 1
    config.rounds.control = False
    rounds.run(config, tmp_path / "run")
    manifest = tmp_path / "run" / "round_0" / "teacher" / "pseudo_labels" / "manifest.json"
    content = json.loads(manifest.read_text())
    content["teacher_hash"] = "0" * 16
    manifest.write_text(json.dumps(content))
    (tmp_path / "run" / "round_1" / "student" / "DONE").unlink()
    with pytest.raises(UserError, match="were made with teacher_hash='0000000000000000'"):
        rounds.run(config, tmp_path / "run")


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_images(config, tmp_path):
    config.optim.teacher.learning_rate = 1e30
    config.train.checkpoint_every = 1
    with pytest.raises(UserError, match=r"loss of teacher is not finite at step \d \(images \d{3}"):
        rounds.run(config, tmp_path / "run")
    kept = [p.name for p in (tmp_path / "run/round_0/teacher/checkpoints").iterdir()]
    assert kept == ["1"]
    (batch,) = (tmp_path / "run/round_0/teacher").glob("not_finite_step_*.npz")
    assert np.load(batch)["image"].shape == (2, 32, 40, 3)
    assert len(np.load(batch)["ids"]) == 2
    assert not (tmp_path / "run/round_0/teacher/DONE").exists()


def test_without_unlabelled_images_there_is_one_sentence(config, tmp_path):
    config.data.labels = 0.0
    with pytest.raises(UserError, match="There is no unlabelled image"):
        rounds.run(config, tmp_path / "run")


def test_a_teacher_starts_from_weights_and_the_model_says_how_it_sees(
    config, tmp_path, monkeypatch, capsys
):
    shapes = variable_shapes(deeplab.build(config.model, 3))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda s: rng.uniform(0.1, 1, s.shape).astype(s.dtype), shapes)
    path = tmp_path / "weights.safetensors"
    checkpoints.save_weights(path, for_inference(variables), {})
    config.rounds.count = 0
    config.model.pretrained = str(path)
    # Ends where training would start.
    monkeypatch.setattr(train, "run", lambda stage, program, start, **_: start())
    rounds.run(config, tmp_path / "run")
    kept = load_file(tmp_path / "run" / "model" / "weights.safetensors")
    for name, value in load_file(path).items():
        np.testing.assert_array_equal(kept[name], value, err_msg=name)
    description = json.loads((tmp_path / "run" / "model" / "model.json").read_text())
    assert description["model"]["input_normalization"] == "imagenet"
    assert "weights of layout semiseg_jax" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["teacher", "student"])
def test_weights_that_do_not_fit_leave_the_workdir_to_others(config, tmp_path, kind):
    """Names are those of the network, so that a look at them does not tell; a shape is not."""
    shapes = variable_shapes(deeplab.build(config.model, 3))
    weights = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), for_inference(shapes))
    stem = weights["params"]["backbone"]["stem"]["conv"]
    stem["kernel"] = stem["kernel"][..., :3]
    path = tmp_path / "weights.safetensors"
    checkpoints.save_weights(path, weights, {})
    if kind == "teacher":
        config.model.pretrained = str(path)
    else:
        config.rounds.student_pretrained = str(path)
        config.rounds.student_model, config.model.backbone = config.model.backbone, "resnet18"
    with pytest.raises(UserError, match="does not fit the network: shapes or types differ"):
        rounds.run(config, tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_workdir_takes_more_rounds_and_another_protocol(config, tmp_path):
    config.rounds.count = 0
    config.eval.every = 2
    rounds.run(config, tmp_path)
    first = json.loads((tmp_path / "results.json").read_text())
    assert [r["step"] for r in first["curve"]] == [2]
    config.rounds.count = 1
    rounds.run(config, tmp_path)
    config.rounds.count = 2
    config.eval.flip = True
    rounds.run(config, tmp_path)
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
    with pytest.raises(UserError, match=r"rounds\.count: 2 there, 1 here"):
        rounds.run(config, tmp_path)


def test_an_adopted_teacher_brings_the_confidence_of_its_labels(config, tmp_path):
    config.pseudo.keep_confidence = True
    lender, taker = (
        rounds.Job(config, epath.Path(tmp_path / name), interruption.never)
        for name in ("one", "two")
    )
    network = lender._network("tiny")
    variables = state.init_variables(network.model, 0, lender._mesh)
    teacher = rounds.Trained(lender._stage("teacher", 0), variables, network)
    lender.label(teacher)
    taker.adopt(teacher)
    kept, brought = (
        {p.name: p.read_bytes() for p in (tmp_path / w).rglob("pseudo_confidence/**/*.png")}
        for w in ("one", "two")
    )
    assert len(kept) == 8 and brought == kept


def test_a_run_that_is_over_goes_with_its_network(config, tmp_path):
    """A study has many of them in one process."""
    job = rounds.Job(config, epath.Path(tmp_path), interruption.never)
    network = job._network("tiny")
    assert job._network("tiny") is network
    assert network.program("teacher", 4) is network.program("teacher", 4)
    gone = [weakref.ref(job), weakref.ref(network)]
    del job, network
    gc.collect()
    assert [ref() for ref in gone] == [None, None]


def test_other_training_images_are_refused(config, tmp_path):
    data = sources.load(config)
    identity.keep_data(tmp_path, data)
    identity.refuse_other_data(tmp_path, data)
    fewer = dataclasses.replace(data, unlabeled=data.unlabeled[1:])
    with pytest.raises(UserError, match=r"4 labelled and 8 unlabelled .* then, 4 and 7 of .* now"):
        identity.refuse_other_data(tmp_path, fewer)


def test_images_of_the_same_names_and_other_sizes_are_refused(config, tmp_path):
    data = sources.load(config)
    images = (*data.labeled, *data.unlabeled)
    assert data.pixels == sum(math.prod(labels.image_size(e.image)) for e in images)
    identity.keep_data(tmp_path, data)
    larger = dataclasses.replace(data, pixels=4 * data.pixels)
    with pytest.raises(UserError, match=r"8 of .* now, of other sizes\): restore it"):
        identity.refuse_other_data(tmp_path, larger)
    # Workdirs from before it was counted go on.
    known = json.loads((tmp_path / "data.json").read_text())
    del known["pixels"]
    (tmp_path / "data.json").write_text(json.dumps(known))
    identity.refuse_other_data(tmp_path, larger)


def selecting(config, select):
    """The best of the weights after steps 1 to 4 of each of two stages."""
    config.eval.select = select
    config.eval.every = 1
    config.train.checkpoint_every = 2
    config.rounds.count = 1
    config.rounds.control = False
    return config


def test_the_best_weights_count_and_the_same_ones_after_a_kill(config, tmp_path, monkeypatch):
    selecting(config, "reported")
    results = rounds.run(config, tmp_path / "whole")
    assert {r["protocol"]["selection"] for r in results.rows} == {"best on the reported set"}
    for row in results.rows:
        inside = [r["miou"] for r in results.curve if r["stage"] == row["stage"]]
        assert row["miou"] >= max(inside)
        assert row["miou"] == max(inside) or row["miou"] not in inside
    manifest = tmp_path / "whole/round_0/teacher/pseudo_labels/manifest.json"
    step = results.rows[0]["weights_step"]
    assert json.loads(manifest.read_text())["teacher"] == f"round_0/teacher, step {step}"
    with monkeypatch.context() as patch:
        kill_at(patch, "teacher", 4)
        with pytest.raises(Killed):
            rounds.run(config, tmp_path / "killed")
    rounds.run(config, tmp_path / "killed")
    workdirs.same(tmp_path / "whole", tmp_path / "killed")

    # The same command again reports the same, of the chosen weights; without them, nothing.
    assert rounds.run(config, tmp_path / "whole").rows == results.rows
    (tmp_path / "whole/round_0/teacher/best.safetensors").unlink()
    with pytest.raises(UserError, match=r"best.safetensors, the best weights so far, is missing"):
        rounds.run(config, tmp_path / "whole")

    # What was chosen by evaluating follows from how that is done.
    config.eval.flip = True
    with pytest.raises(UserError, match=r"another config .eval.flip: False there"):
        rounds.run(config, tmp_path / "killed")


def test_weights_chosen_on_labelled_images_that_are_held_out(config, tmp_path, monkeypatch):
    selecting(config, "holdout")
    config.rounds.count = 0
    config.data.holdout = 2.0
    scores = iter([0.1, 0.4, 0.4, 0.3])
    seen = []

    def scored(best, step, miou, variables, offer=selection.Best.offer):
        seen.append({k: np.asarray(v) for k, v in flat(variables).items()})
        offer(best, step, next(scores), variables)

    monkeypatch.setattr(selection.Best, "offer", scored)
    before = sources.load(without_selection(config))
    now = sources.load(config)
    rows = rounds.run(config, tmp_path).rows
    assert len(now.selection) == 2 and len(now.labeled) == len(before.labeled) - 2
    assert not {e.id for e in now.selection} & {e.id for e in (*now.labeled, *now.unlabeled)}
    assert now.evaluation == before.evaluation and now.split_hash != before.split_hash
    assert rows[0]["protocol"]["selection"] == "best on a hold-out of the labelled set"
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

    def train_with_a_restart_behind_step_2(stage, program, start, score, **_):
        variables = start()
        for step in (1, 2, 2, 3):
            score(step, variables)
        return variables

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
    rows = rounds.run(config, tmp_path).rows
    assert built == ([5, 2] if held_out else [5])
    assert [seen.count(5), seen.count(2)] == [reported, held_out or 0]
    assert [(row["step"], row["weights_step"]) for row in rows] == [(4, weights_step)]
    # Of 50 pixels of the first class 40 are found, and the others taken for the second.
    np.testing.assert_allclose(rows[0]["miou"], np.mean([40 / 50, 50 / 60, 1]))


def without_selection(config):
    config = config.copy_and_resolve_references()
    config.eval.select, config.data.holdout = "last", 0.0
    return config


def flat(variables):
    return traverse_util.flatten_dict(for_inference(variables), sep="/")


@pytest.mark.parametrize("begin", [rounds.run, rounds.teach])
def test_a_workdir_in_use_is_refused_and_left_as_it_was(config, tmp_path, begin):
    with lock.held(tmp_path / "run"):
        with pytest.raises(UserError, match=r"run is in use by process \d+ on .+: wait until it"):
            begin(config, tmp_path / "run")
        assert [p.name for p in (tmp_path / "run").iterdir()] == [lock.FILE]


@pytest.mark.parametrize("begin", [rounds.run, rounds.teach])
def test_a_run_that_cannot_start_leaves_no_folder(config, tmp_path, begin):
    config.data.root = str(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is missing"):
        begin(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
