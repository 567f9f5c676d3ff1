"""--minutes: fits the steps and the rounds of a config to a duration on this machine."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from etils import epath

from semiseg_jax import fitted_settings, stages
from semiseg_jax.data import size_settings
from semiseg_jax.planning import measurement, run_time, work
from semiseg_jax.planning.announcer import Announcer
from semiseg_jax.planning.run_time import PartTime, Speed
from semiseg_jax.planning.workload import Workload
from semiseg_jax.runtime import multihost
from semiseg_jax.runtime.errors import UserError
from semiseg_jax.runtime.logger import logger

# The share of the given time that is planned for. What was measured in seconds varies by more than
# that over an hour, and a run is rather a little short than too long.
SHARE = 0.95
# Fewest steps that a stage is fitted to; see docs/scaling.md for the measurement.
MIN_STEPS = 100
# A config is lengthened at most so many times: its learning rates are for its own number of steps.
MAX_FACTOR = 4


@dataclasses.dataclass(frozen=True)
class Fit:
    """Settings that fit a duration.

    Attributes:
        settings: values by key, such as "train.steps"; the keys that change.
        config: the config with them.
        times: the predicted seconds of each part.
    """

    settings: dict[str, Any]
    config: Any
    times: tuple[PartTime, ...]

    @property
    def seconds(self) -> float:
        """Predicted seconds of the run."""
        return sum(time.seconds for time in self.times)


def fit(config: Any, load: Workload, speed: Speed, minutes: float, elapsed: float = 0.0) -> Fit:
    """Returns the longest stages, and then the most rounds, that fit into a duration.

    Teacher and students are shortened or lengthened by one factor, to at most MAX_FACTOR times and
    at least MIN_STEPS steps, or the config's own where they are fewer. Only if these do not fit
    are there fewer rounds, one at least. A teacher of another run stays as it is.

    Args:
        config: the whole config.
        load: numbers and sizes of the images.
        speed: of the programs of the config.
        minutes: the duration of the command in minutes.
        elapsed: seconds that the command has taken already.

    Raises:
        UserError: the shortest run takes longer.
    """
    budget = SHARE * 60 * minutes - elapsed
    longest = max(
        (stages.stage_steps(config.train, kind, 1) for kind in _fitted(config)), default=1
    )
    most = config.rounds.count
    for rounds in range(most, min(most, 1) - 1, -1):
        shortest = _fit(config, load, speed, rounds, min(MIN_STEPS, longest), longest)
        if shortest.seconds <= budget:
            break
    else:
        needed = math.ceil((shortest.seconds + elapsed) / 60 / SHARE)
        least = f"{needed} minutes are" if needed != 1 else "1 minute is"
        raise UserError(
            f"--minutes={minutes:g} is too short for this config, whose shortest useful run "
            f"takes {run_time.describe(shortest.times, shortest.seconds + elapsed)}: "
            f"{least} the least to give.",
            code="minutes-too-few",
        )

    def fits(steps: int) -> bool:
        return _fit(config, load, speed, rounds, steps, longest).seconds <= budget

    steps = _largest(fits, min(MIN_STEPS, longest), MAX_FACTOR * longest)
    return _fit(config, load, speed, rounds, steps, longest)


def _fitted(config: Any) -> tuple[str, ...]:
    """Returns the kinds of stage whose steps are fitted."""
    kinds = stages.trained_kinds(config)
    return tuple(kind for kind in kinds if kind == "student" or not config.rounds.teacher_from)


def _largest(fits: Callable[[int], bool], low: int, high: int) -> int:
    """Returns the largest number from `low`, which fits, to `high` that fits."""
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low


def _fit(config: Any, load: Workload, speed: Speed, rounds: int, steps: int, longest: int) -> Fit:
    """Returns the config whose longest stage has so many steps.

    Args:
        config: as given.
        load, speed: as for `fit`.
        rounds: number of students.
        steps: of the stage that has `longest` steps in the config.
        longest: see `steps`.
    """
    keys = {"teacher": "train.teacher_steps", "student": "train.steps"}
    settings: dict[str, Any] = {"rounds.count": rounds}
    fitted = {}
    for kind in _fitted(config):
        own = stages.stage_steps(config.train, kind, 1)
        fitted[kind] = _round_down(max(own * steps // longest, min(own, MIN_STEPS)), own)
        settings[keys[kind]] = fitted[kind]
    if "student" not in fitted:
        # Nothing trains for these steps, and an open `teacher_steps` follows them.
        settings.pop("train.steps", None)
    last = max(fitted.values(), default=longest)
    for key in ("train.checkpoint_every", "train.log_every", "eval.every"):
        section, name = key.split(".")
        settings[key] = min(config[section][name], last)
    changed = config.copy_and_resolve_references()
    changed.update_from_flattened_dict(settings)
    schedule = stages.schedule(changed, "")
    times = run_time.forecast(work.parts(changed, load, schedule), speed)
    new = {key: value for key, value in settings.items() if value != _value(config, key)}
    return Fit(new, changed, times)


def _round_down(steps: int, own: int) -> int:
    """Returns steps as a multiple of ten, unless they are few, or the config's own."""
    return steps if steps == own or steps < 200 else steps // 10 * 10


def _value(config: Any, key: str) -> Any:
    section, name = key.split(".")
    return config[section][name]


def describe(fitted: Fit, minutes: float, elapsed: float) -> str:
    """Returns the line that says what was chosen, and how long it takes."""
    config, train = fitted.config, fitted.config.train
    chosen = []
    if not config.rounds.teacher_from:
        chosen.append(f"teacher {train.teacher_steps:,} steps")
    if count := config.rounds.count:
        rounds = "one round" if count == 1 else f"{count} rounds"
        chosen.append(f"{rounds} of {train.steps:,} steps")
        if config.rounds.control:
            chosen.append(f"control {count * train.steps:,} steps")
    lengthened = ""
    if fitted.seconds + elapsed < 0.8 * SHARE * 60 * minutes:
        lengthened = f" ({MAX_FACTOR} times the config's steps, which is the most that is fitted)"
    whole = run_time.describe(fitted.times, fitted.seconds + elapsed)
    duration = f"{minutes:g} minute{'' if minutes == 1 else 's'}"
    return f"{duration}: {', '.join(chosen)}{lengthened}; {whole}"


def choose_settings(
    config: Any,
    workdir: epath.PathLike,
    minutes: float | None,
    announcer: Announcer,
) -> Any:
    """Returns the config of a run of so many minutes; measures this machine at its first start.

    The workdir gets the chosen settings, so that later starts have the same, with `minutes` or
    without. All processes must call the function.

    Args:
        config: what was given, with what an earlier start chose.
        workdir: of the run.
        minutes: the duration of the run; None for the config's own steps.
        announcer: is given the measured speed.

    Raises:
        UserError: the workdir was begun with another duration or with none, `minutes` is not a
            duration, too short, or not the same in all processes, or the data or the config are
            refused as by a run.
    """
    _check_same_minutes(minutes)
    if minutes is None:
        return config
    if not (math.isfinite(minutes) and minutes > 0):
        raise UserError(
            f"--minutes={minutes:g} is no duration: give a number above 0, such as 60.",
            code="minutes-not-a-duration",
        )
    if _is_begun(epath.Path(workdir), minutes):
        return config
    measured = measurement.measure(config)
    announcer.speed = measured.speed

    def choose() -> tuple[dict[str, Any], str]:
        elapsed = announcer.elapsed()
        fitted = fit(config, measured.load, measured.speed, minutes, elapsed)
        return fitted.settings, describe(fitted, minutes, elapsed)

    settings, line = multihost.broadcast_from_main("settings for the minutes", choose)
    config = fitted_settings.record(workdir, config, settings, f"Fitted to {line}.", minutes)
    logger.info(line)
    return config


def _check_same_minutes(minutes: float | None) -> None:
    """Refuses processes that were started with different --minutes, which would wait forever."""
    given = multihost.all_gather("minutes of each process", minutes)
    texts = ["none" if each is None else f"{each:g}" for each in given]
    if len(set(texts)) > 1:
        raise UserError(
            f"The processes of this run were given different --minutes ({', '.join(texts)}): "
            "start all of them with the same command.",
            code="minutes-differ-between-processes",
        )


def _is_begun(workdir: epath.Path, minutes: float) -> bool:
    """Returns whether the run of a workdir was fitted to `minutes`; refuses any other run."""

    def check() -> bool:
        before = fitted_settings.read_minutes(workdir)
        if before is None and not (workdir / "config.json").exists():
            return False
        if before != minutes:
            begun = f"with --minutes={before:g}" if before is not None else "without --minutes"
            if not (workdir / fitted_settings.FITTED).exists():
                begun += f", or its {fitted_settings.FITTED} was removed"
            go_on = f"--minutes={before:g}" if before is not None else "no --minutes"
            raise UserError(
                f"The workdir {workdir} was begun {begun}: give {go_on} to go on with it, or "
                "another --workdir.",
                code="minutes-differ",
            )
        return True

    return multihost.broadcast_from_main("minutes of the workdir", check)


def print_run_time(config: Any) -> None:
    """Measures this machine, and prints how long the run of a config takes on it.

    Raises:
        UserError: the data or the config are refused as by a run.
    """
    config = size_settings.resolve(config)
    measured = measurement.measure(config)
    parts = work.parts(config, measured.load, stages.schedule(config, ""))
    times = run_time.forecast(parts, measured.speed)
    logger.info(f"This run takes {run_time.describe(times)}.")
