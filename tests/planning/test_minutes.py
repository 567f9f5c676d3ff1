"""Fitting a config to a duration: properties of the fit, and starts of one workdir."""

import dataclasses
import itertools
import json
import math

import pytest

from semiseg_jax import fitted_settings, workdir
from semiseg_jax.planning import measurement, minutes, run_time
from semiseg_jax.planning.announcer import Announcer
from semiseg_jax.planning.measurement import Measurement
from semiseg_jax.planning.run_time import Speed
from semiseg_jax.planning.work import ProgramId
from semiseg_jax.runtime import multihost
from semiseg_jax.runtime.logger import capture_lines
from tests.conftest import tiny_config
from tests.errors import raises_code
from tests.planning.test_run_time import COSTS, EVALUATION, LOAD, STUDENT, TEACHER

SPEED = Speed(COSTS, {TEACHER: 1.0, STUDENT: 1.8, EVALUATION: 1.5}, start=20.0)


def config_of(rounds=2, control=True, every=0, select="last", student_model=""):
    config = tiny_config(
        rounds__count=rounds,
        rounds__control=control,
        rounds__student_model=student_model,
        eval__every=every,
        eval__select=select,
        data__holdout=2.0,
        train__checkpoint_every=700,
        train__log_every=50,
    )
    config.train.update({"steps": 2000, "teacher_steps": 3000})
    return config


CONFIGS = [
    {"rounds": rounds, "control": control, "every": every, "select": select}
    for rounds, control, (every, select) in itertools.product(
        (0, 1, 3), (False, True), ((0, "last"), (500, "reported"))
    )
]


@pytest.mark.parametrize("changes", CONFIGS, ids=str)
def test_a_fit_takes_almost_the_given_time_and_never_more(changes):
    config = config_of(**changes)
    before = 0
    for given in (70, 100, 200):
        fitted = minutes.fit(config, LOAD, SPEED, given, elapsed=30.0)
        steps = fitted.config.train.teacher_steps * (1 + fitted.config.rounds.count)
        most = minutes.MAX_FACTOR * config.train.teacher_steps
        taken = fitted.seconds + 30
        assert taken <= 60 * given
        assert taken > 0.9 * 60 * given or fitted.config.train.teacher_steps == most
        assert steps >= before  # More time is never less training.
        before = steps
        if changes["rounds"]:
            ratio = fitted.config.train.teacher_steps / fitted.config.train.steps
            assert ratio == pytest.approx(1.5, rel=0.06)


def test_the_network_of_students_is_reckoned_with():
    costs = COSTS | {ProgramId(k.kind, "resnet18"): c for k, c in COSTS.items()}
    slow = Speed(costs, {TEACHER: 1.0, ProgramId("student step", "resnet18"): 18.0, EVALUATION: 1})
    ours = minutes.fit(config_of(student_model="resnet18"), LOAD, slow, 120).config.train
    assert ours.steps < 0.5 * minutes.fit(config_of(), LOAD, SPEED, 120).config.train.steps


def test_the_config_stays_as_it_is_where_it_fits_exactly():
    config = config_of()
    whole = minutes.fit(config, LOAD, SPEED, 10_000)
    assert whole.settings == {"train.teacher_steps": 12_000, "train.steps": 8000}
    assert config.train.steps == 2000


def test_rounds_are_dropped_only_where_the_fewest_steps_do_not_fit():
    config = config_of(rounds=3)
    fits = {n: minutes.fit(config, LOAD, SPEED, n) for n in range(12, 44, 4)}
    rounds = [fitted.config.rounds.count for fitted in fits.values()]
    assert (rounds == sorted(rounds) and set(rounds) == {1, 2, 3}) or rounds[0] < 3
    for fitted in fits.values():
        train = fitted.config.train
        assert min(train.steps, train.teacher_steps) >= minutes.MIN_STEPS


def test_too_few_minutes_name_the_fewest():
    config = config_of()
    with raises_code("minutes-too-few", "--minutes=0.5", "least to give") as raised:
        minutes.fit(config, LOAD, SPEED, 0.5)
    fewest = int(str(raised.value).rsplit(": ", 1)[1].split()[0])
    fitted = minutes.fit(config, LOAD, SPEED, fewest)
    assert fitted.config.rounds.count == 1 and fitted.config.train.steps >= 100
    with raises_code("minutes-too-few"):
        minutes.fit(config, LOAD, SPEED, fewest - 1)


def test_short_configs_keep_their_own_few_steps():
    config = config_of()
    config.train.update({"steps": 8, "teacher_steps": 12})
    with raises_code("minutes-too-few"):
        minutes.fit(config, LOAD, SPEED, 1)
    train = minutes.fit(config, LOAD, SPEED, 8).config.train
    assert (train.steps, train.teacher_steps) >= (8, 12)


def test_intervals_are_no_longer_than_the_stages():
    config = config_of(rounds=1, every=2000, select="reported")
    fitted = minutes.fit(config, LOAD, SPEED, 25).config
    longest = fitted.train.teacher_steps
    assert longest < 700
    assert fitted.eval.every == fitted.train.checkpoint_every == longest
    assert fitted.train.log_every == 50


def test_a_teacher_of_another_run_keeps_its_steps():
    config = config_of()
    config.rounds.teacher_from = "elsewhere"
    fitted = minutes.fit(config, LOAD, SPEED, 60)
    assert "train.teacher_steps" not in fitted.settings
    assert fitted.config.train.steps < 2000


def test_the_line_says_what_was_chosen():
    config = config_of()
    fitted = minutes.fit(config, LOAD, SPEED, 60)
    train = fitted.config.train
    line = minutes.describe(fitted, 60, 0.0)
    assert line.startswith(
        f"60 minutes: teacher {train.teacher_steps:,} steps, 2 rounds of {train.steps:,} steps, "
        f"control {2 * train.steps:,} steps; about 5"
    )
    whole = minutes.fit(config, LOAD, SPEED, 10_000)
    assert "4 times the config's steps" in minutes.describe(whole, 10_000, 0.0)


# ---- one workdir, several starts


@pytest.fixture
def measured(monkeypatch):
    """Measures nothing; returns the list of configs that were to be measured."""
    configs = []

    def measure(config):
        configs.append(config)
        return Measurement(LOAD, SPEED)

    monkeypatch.setattr(measurement, "measure", measure)
    return configs


def choose(folder, given, config=None):
    config = fitted_settings.restore(folder, config or config_of())
    announcer = Announcer()
    with capture_lines() as lines:
        chosen = minutes.choose_settings(config, folder, given, announcer)
    return chosen, lines, announcer


def test_a_restart_goes_on_with_the_same(tmp_path, measured):
    first, lines_of_first, announcer = choose(tmp_path, 60.0)
    assert len(measured) == 1 and lines_of_first[-1].startswith("60 minutes: teacher")
    assert announcer.speed == SPEED and first.train.steps < 2000
    workdir.write_config(tmp_path, first)
    for given in (60.0, None):
        again, lines, _ = choose(tmp_path, given)
        assert again.to_dict() == first.to_dict() and not lines
        workdir.check_config(tmp_path, again)
    assert len(measured) == 1
    content = json.loads((tmp_path / "fitted.json").read_text())
    assert content["minutes"] == 60
    reasons = {setting["reason"] for setting in content["settings"].values()}
    assert reasons == {f"Fitted to {line}." for line in lines_of_first}


def test_minutes_whose_fit_changes_nothing_are_recorded_too(tmp_path, measured, monkeypatch):
    monkeypatch.setattr(minutes, "MAX_FACTOR", 1)
    first, _, _ = choose(tmp_path, 9000.0)
    assert first.train.steps == 2000
    assert fitted_settings.read_minutes(tmp_path) == 9000


def test_other_settings_that_are_chosen_later_keep_the_minutes(tmp_path, measured):
    first, _, _ = choose(tmp_path, 60.0)
    fitted_settings.record(tmp_path, first, {"data.scale": (0.5, 1.5)}, "For a reason.")
    again, _, _ = choose(tmp_path, 60.0)
    assert again.data.scale == (0.5, 1.5) and again.train.steps == first.train.steps


def test_other_minutes_are_refused(tmp_path, measured):
    choose(tmp_path, 60.0)
    with raises_code("minutes-differ", str(tmp_path), "with --minutes=60"):
        choose(tmp_path, 30.0)


def test_a_workdir_begun_without_minutes_is_refused(tmp_path, measured):
    workdir.write_config(tmp_path, config_of())
    with raises_code(
        "minutes-differ", "without --minutes, or its fitted.json was removed: give no"
    ):
        choose(tmp_path, 30.0)
    fitted_settings.record(tmp_path, config_of(), {"data.scale": (0.5, 1.5)}, "For a reason.")
    with raises_code("minutes-differ", "without --minutes: give no --minutes"):
        choose(tmp_path, 30.0)
    assert not measured


def test_nothing_is_measured_for_students_without_unlabelled_images(folder_config, monkeypatch):
    monkeypatch.setattr(run_time, "count_costs", None)
    folder_config.data.labels = 0.0
    with raises_code("unlabeled-images-missing"):
        measurement.measure(folder_config)


@pytest.fixture
def as_process(monkeypatch):
    """Lets the test be process 0 of two, then process 1, which learns what process 0 said."""
    said = {}

    def gather(name, value):
        said.setdefault(name, value)
        return [said[name], value]

    def become(index):
        monkeypatch.setattr(multihost, "is_main", lambda: index == 0)

    monkeypatch.setattr(multihost, "all_gather", gather)
    return become


def test_all_processes_have_the_fit_of_process_0(tmp_path, monkeypatch, as_process):
    def choose_at(slowness):
        seconds = {program: slowness * s for program, s in SPEED.seconds.items()}
        speed = dataclasses.replace(SPEED, seconds=seconds)
        monkeypatch.setattr(measurement, "measure", lambda config: Measurement(LOAD, speed))
        return choose(tmp_path, 60.0)

    as_process(0)
    first, lines, _ = choose_at(1.0)
    assert first.train.steps < 2000
    as_process(1)
    # A fit to its own speed would be another one.
    other, other_lines, _ = choose_at(2.0)
    assert other.to_dict() == first.to_dict() and other_lines == lines


@pytest.mark.parametrize("other", [30.0, None])
def test_processes_with_different_minutes_are_refused(tmp_path, measured, as_process, other):
    as_process(0)
    choose(tmp_path, 60.0)
    as_process(1)
    with raises_code("minutes-differ-between-processes", "(60, "):
        choose(tmp_path, other)


@pytest.mark.parametrize("given", [0.0, -3.0, math.nan, math.inf])
def test_numbers_that_are_no_duration(tmp_path, measured, given):
    with raises_code("minutes-not-a-duration", f"--minutes={given:g}"):
        choose(tmp_path, given)
    assert not any(tmp_path.iterdir())


def test_without_minutes_nothing_is_chosen(tmp_path, measured):
    config, lines, _ = choose(tmp_path, None)
    assert config.to_dict() == config_of().to_dict() and not lines and not measured
    assert not any(tmp_path.iterdir())
