"""The time of a run on this machine, from hand-made speeds and clocks."""

import jax
import numpy as np
import pytest

from semiseg_jax import mesh as mesh_lib
from semiseg_jax import stages
from semiseg_jax.data.dataset import Dataset
from semiseg_jax.planning import chips, run_time, work
from semiseg_jax.planning import workload as workload_lib
from semiseg_jax.planning.announcer import Announcer
from semiseg_jax.planning.chips import Topology
from semiseg_jax.planning.meter import MEASURED_CALLS, WARM_UP_CALLS, Meter
from semiseg_jax.planning.run_time import PartTime, ProgramCost, Speed
from semiseg_jax.planning.work import ProgramId
from semiseg_jax.planning.workload import Workload
from semiseg_jax.runtime.logger import capture_lines
from tests.conftest import tiny_config

TEACHER, STUDENT = ProgramId("teacher step", "tiny"), ProgramId("student step", "tiny")
LABELLING, EVALUATION = ProgramId("labelling", "tiny"), ProgramId("evaluation", "tiny")
# A batch of labelling is five programs, and costs as much as 20 teacher steps.
COSTS = {
    TEACHER: ProgramCost(100, 8, (32, 40)),
    STUDENT: ProgramCost(200, 16, (32, 40)),
    LABELLING: ProgramCost(2000, 8, (10, 10), 5),
    EVALUATION: ProgramCost(400, 8, (10, 10)),
}
# Three batches of 8 and one of images of half the size; four batches of evaluation.
LOAD = Workload(5, 10, 20, 30, {(10, 10): 17, (10, 5): 3}, {(10, 10): 30})


def config_of(**changes):
    config = tiny_config(rounds__count=2, rounds__control=True, eval__every=40)
    config.train.update({"steps": 100, "teacher_steps": 50})
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return config


def parts_of(config, load=LOAD):
    return work.parts(config, load, stages.schedule(config, "run"))


def test_the_parts_of_a_run_in_order():
    names = [part.name for part in parts_of(config_of())]
    assert names == [
        "teacher", "labels for student 1", "student 1", "labels for student 2", "student 2",
        "control 2",
    ]  # fmt: skip


def test_a_schedule_of_one_stage():
    (teacher,) = parts_of(config_of(rounds__count=0))
    assert (teacher.steps, teacher.step) == (50, TEACHER)


def test_a_teacher_of_another_run_is_evaluated_alone():
    first, *_ = parts_of(config_of(rounds__teacher_from="elsewhere", eval__select="reported"))
    assert first.steps == 0 and first.step is None
    assert [passes.count for passes in first.passes] == [1]


def test_another_backbone_of_students_labels_from_the_second_round_on():
    parts = parts_of(config_of(rounds__student_model="resnet18"))
    labelers = [p.passes[0].program.backbone for p in parts if p.kind == work.LABELS]
    assert labelers == ["tiny", "resnet18"]
    assert parts[-1].step == TEACHER and parts[2].step == ("student step", "resnet18")


def test_seconds_of_each_part_from_measured_programs():
    seconds = {TEACHER: 1.0, STUDENT: 2.0, LABELLING: 20.0, EVALUATION: 3.0}
    speed = Speed(COSTS, seconds, start=100.0, part=7.0)
    times = [time.seconds for time in run_time.forecast(parts_of(config_of()), speed)]
    start, again = 100 * run_time.INFERENCE_START_RATIO, 100 * run_time.RESTART_RATIO
    labels = (3 + 1 / 2) * 20
    assert times == pytest.approx(
        [
            7 + 100 + 50 + start + 2 * 4 * 3,  # one evaluation inside, one at the end
            7 + 2 * 5 * start + labels,  # two sizes at five scales
            7 + 100 + 200 + 3 * 4 * 3,
            7 + labels,
            7 + again + 200 + 3 * 4 * 3,
            7 + 100 + 200 + 5 * 4 * 3,
        ]
    )


def test_programs_that_have_not_run_follow_from_the_most_alike():
    first = Speed(COSTS, {TEACHER: 1.0})
    assert first.call_seconds(STUDENT) == 2.0
    assert first.call_seconds(LABELLING) == pytest.approx(20 * run_time.INFERENCE_RATIO)
    second = first.with_measured({EVALUATION: 3.0})
    assert second.call_seconds(LABELLING) == 15.0
    assert second.call_seconds(STUDENT) == 2.0
    resumed = Speed(COSTS, {LABELLING: 6.0})
    assert resumed.call_seconds(TEACHER) == pytest.approx(0.3 / run_time.INFERENCE_RATIO)


def test_the_same_backbone_is_the_most_alike():
    other = ProgramId("student step", "resnet18")
    costs = COSTS | {other: ProgramCost(1000, 16, (32, 40))}
    speed = Speed(costs, {other: 40.0, STUDENT: 3.0})
    assert speed.call_seconds(TEACHER) == 1.5


def test_a_part_that_has_begun_needs_no_start():
    speed = Speed(COSTS, {TEACHER: 1.0, EVALUATION: 0.0}, start=100.0, part=0.0)
    parts = parts_of(config_of(rounds__count=0))
    (whole,) = run_time.forecast(parts, speed)
    (begun,) = run_time.forecast(parts, speed, has_begun=True)
    assert whole.seconds - begun.seconds == pytest.approx(100 * (1 - run_time.RESTART_RATIO))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "10 s"),
        (42, "40 s"),
        (89, "90 s"),
        (91, "2 min"),
        (14.4 * 60, "14 min"),
        (59.4 * 60, "59 min"),
        (59.6 * 60, "1 h"),
        (71 * 60, "1 h 10 min"),
        (9 * 3600 + 59 * 60, "10 h"),
        (30.4 * 3600, "30 h"),
        (60 * 3600, "2.5 days"),
    ],
)
def test_a_duration_has_the_digits_of_a_prediction(seconds, text):
    assert run_time.format_duration(seconds) == text


def test_the_parts_of_a_kind_are_added_up():
    times = [PartTime(part, 60.0 * n) for n, part in enumerate(parts_of(config_of()), start=10)]
    assert run_time.describe(times) == (
        "about 1 h 15 min on this machine: teacher 10 min, pseudo-labels 24 min, "
        "2 students 26 min, control 15 min"
    )


# ---- the arithmetic of the programs


def test_costs_are_those_of_the_traced_programs():
    config = tiny_config()
    config.pseudo.scales = (1.0, 2.0)
    topology = Topology("here", tuple(jax.devices()[:1]), 1, None)
    load = Workload(3, 4, 8, 5, {(32, 48): 8}, {(32, 48): 5})
    costs = run_time.count_costs(config, load, parts_of(config, load), topology)
    assert costs.keys() == {TEACHER, STUDENT, LABELLING, EVALUATION}
    # Five times the pixels of evaluation, each also mirrored.
    assert costs[LABELLING].flops == pytest.approx(2 * 5 * costs[EVALUATION].flops)
    assert costs[LABELLING].scales == 2 and costs[TEACHER].images == 8
    assert costs[STUDENT].flops == 2 * costs[TEACHER].flops
    # A forward pass and two gradients of 8 crops, each as expensive.
    pixels = 32 * 40 / (32 * 48)
    assert costs[TEACHER].flops == pytest.approx(3 * pixels * costs[EVALUATION].flops, rel=0.25)


# ---- the meter


class Clock:
    """A clock that the test sets."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_the_first_steps_are_not_measured():
    clock = Clock()
    meter = Meter(clock)
    clock.now = 90.0  # compiled in
    measured = []
    for step in range(1, WARM_UP_CALLS + MEASURED_CALLS + 3):
        measured.append(meter.update(step))
        clock.now += 5.0 if step < WARM_UP_CALLS else 0.5
    enough = WARM_UP_CALLS + MEASURED_CALLS - 1
    assert measured[:enough] == [None] * enough and measured[enough:] == pytest.approx([0.5] * 3)
    assert meter.start_seconds == 90.0


def test_slow_steps_are_measured_for_some_seconds_alone():
    clock = Clock()
    meter = Meter(clock)
    measured = []
    for step in range(1, 5):
        clock.now += 15.0
        measured.append(meter.update(step))
    assert measured == [None, None, None, 15.0]


def test_an_evaluation_between_steps_is_taken_out():
    clock = Clock()
    meter = Meter(clock)
    for step in (1, 2):
        clock.now += 1.0
        assert meter.update(step) is None
    clock.now += 100.0
    meter.pause(100.0)
    clock.now += 1.0
    assert meter.update(3) is None
    clock.now += 1.0
    assert meter.update(4, is_last=True) == 1.0


def test_a_program_that_is_compiled_for_another_size_does_not_count():
    clock = Clock()
    meter = Meter(clock, takes_median=True)
    for done, seconds in ((8, 70.0), (16, 2.0), (24, 2.0), (32, 40.0)):
        clock.now += seconds
        measured = meter.update(done)
    clock.now += 1.6
    assert measured == pytest.approx((2 / 8 + 40 / 8) / 2)
    assert meter.update(40, is_last=True) == pytest.approx(2 / 8)


# ---- the announcements


class FakeRun:
    """Walks through the parts of a run with a clock, as self_training does."""

    def __init__(self, config, monkeypatch, tmp_path, speed, workload=LOAD):
        self.clock = Clock()
        self.announcer = Announcer(0.0, self.clock)
        self.announcer.speed = Speed(COSTS, {}, part=0.0)
        self.stages = stages.schedule(config, tmp_path)
        self.speed = speed
        monkeypatch.setattr(workload_lib, "from_dataset", lambda config, dataset: workload)
        self.config = config

    def start(self):
        nothing = Dataset("none", (), (), np.zeros(256, np.int16), (), (), ())
        self.announcer.on_run(self.config, nothing, mesh_lib.make_mesh(), self.stages)

    def stage(self, number, first=0):
        stage = self.stages[number]
        self.announcer.on_stage(stage)
        seconds = self.speed[f"{'student' if stage.kind == 'student' else 'teacher'} step"]
        self.clock.now += self.speed["start"]
        for step in range(first + 1, stage.steps + 1):
            self.clock.now += seconds
            self.announcer.on_step(step)
        with self.announcer.evaluating():
            self.clock.now += 4 * self.speed["evaluation"]
        self.announcer.on_end(stage)

    def labels(self, number):
        self.announcer.on_labels(self.stages[number])
        for done in (8, 16, 20):
            self.clock.now += self.speed["labelling"]
            self.announcer.on_images(done, 20)


RATES = {"teacher step": 1.0, "student step": 2.0, "labelling": 12.0, "evaluation": 2.4, "start": 0}


def run_of(monkeypatch, tmp_path, rates=RATES, **changes):
    config = config_of(eval__every=0, **changes)
    return FakeRun(config, monkeypatch, tmp_path, rates)


def test_the_first_announcement_comes_after_a_few_steps(monkeypatch, tmp_path):
    run = run_of(monkeypatch, tmp_path)
    run.start()
    with capture_lines() as lines:
        run.announcer.on_stage(run.stages[0])
        for step in range(1, 13):
            run.clock.now += 1.0
            assert not lines
            run.announcer.on_step(step)
    # Teacher 50 s and 8 s of evaluation; 35 s of labels and 208 s for each of two students.
    assert lines == [
        "This run takes about 13 min on this machine: teacher 60 s, pseudo-labels 70 s, "
        "2 students 7 min, control 3 min."
    ]


def test_a_forecast_that_holds_is_announced_once(monkeypatch, tmp_path):
    run = run_of(monkeypatch, tmp_path)
    run.start()
    with capture_lines() as lines:
        run.stage(0)
        run.labels(1)
        run.stage(1)
        run.labels(2)
        run.stage(2)
        run.stage(3)
    assert len(lines) == 1


def test_a_slower_student_is_announced(monkeypatch, tmp_path):
    run = run_of(monkeypatch, tmp_path, RATES | {"student step": 4.0})
    run.start()
    with capture_lines() as lines:
        run.stage(0)
        run.labels(1)
        run.stage(1)
        run.labels(2)
        run.stage(2)
        run.stage(3)
    assert len(lines) == 2 and lines[1].startswith("The rest of this run takes about 18 min")
    assert "teacher" not in lines[1]


def test_a_resumed_run_is_told_what_remains(monkeypatch, tmp_path):
    run = run_of(monkeypatch, tmp_path)
    (run.stages[0].folder).mkdir(parents=True)
    run.start()
    run.announcer.on_end(run.stages[0])
    run.announcer.on_labels(run.stages[1])
    with capture_lines() as lines:
        run.stage(1, first=50)
    # 38 steps of the student are left, then labels, a student and the control of 200 steps.
    (line,) = lines
    assert line.startswith("The rest of this run takes about ")
    assert "teacher" not in line and "2 students 5 min" in line and "pseudo-labels 40 s" in line


def test_a_run_of_few_steps_is_told_at_the_end_of_its_first_stage(monkeypatch, tmp_path):
    run = run_of(monkeypatch, tmp_path, train__teacher_steps=4)
    run.start()
    with capture_lines() as lines:
        run.stage(0)
    assert len(lines) == 1


def test_a_cost_that_cannot_be_counted_does_not_end_the_run(monkeypatch, tmp_path):
    run = run_of(monkeypatch, tmp_path)
    run.announcer.speed = None

    def fail(*arguments):
        raise ValueError("no length")

    monkeypatch.setattr(run_time, "count_costs", fail)
    with run.announcer.running(), capture_lines() as lines:
        run.start()
        run.stage(0)
    assert not lines


def test_only_the_first_process_measures(monkeypatch, tmp_path):
    from semiseg_jax.runtime import multihost

    monkeypatch.setattr(multihost, "process_index", lambda: 1)
    run = run_of(monkeypatch, tmp_path)
    run.start()
    with capture_lines() as lines:
        run.stage(0)
    assert not lines


def test_the_devices_of_this_machine_have_no_published_rates():
    topology = chips.this_machine(mesh_lib.make_mesh())
    assert len(topology.devices) == len(jax.devices()) and topology.chip is None
