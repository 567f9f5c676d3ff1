"""Runs one of the paper's tables over several seeds, or plans what that costs."""

import copy
import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import traverse_util
from rich import box
from rich.table import Column
from rich.table import Table as ConsoleTable

from semiseg_jax import fitted_settings, pseudo_labels, results, self_training
from semiseg_jax import stages as stages_lib
from semiseg_jax import workdir as workdir_lib
from semiseg_jax.data import load, size_settings
from semiseg_jax.data.data_record import SETS
from semiseg_jax.experiments import paper_tables, tables
from semiseg_jax.runtime import multihost
from semiseg_jax.runtime.errors import UserError
from semiseg_jax.runtime.logger import RunConsole, capture_lines
from semiseg_jax.stages import Stage


def parse_seeds(texts: Sequence[str]) -> list[int]:
    """Returns the seeds of the command line as distinct integers.

    Raises:
        UserError: there is none, one is not an integer, or one is repeated.
    """
    try:
        numbers = [int(text) for text in texts]
    except ValueError:
        numbers = []
    if not numbers or len(set(numbers)) < len(numbers):
        raise UserError(
            f"--seeds={','.join(texts)} are not distinct integers: give some, as 0,1,2.",
            code="seeds-invalid",
        )
    return numbers


@dataclasses.dataclass(frozen=True)
class Trial:
    """A run of `paper_tables.RUNS` with one seed.

    Attributes:
        name: key of `paper_tables.RUNS`.
        seed: its seed.
        config: the study's config with the run's changes and the seed.
        workdir: its own workdir.
        students: number of students.
    """

    name: str
    seed: int
    config: Any
    workdir: epath.Path
    students: int

    @property
    def title(self) -> str:
        """The name that is printed."""
        return f"{self.name}, seed {self.seed}"

    @property
    def counts(self) -> list[int]:
        """The values of rounds.count to run in turn; each trains the control of that length."""
        several = self.config.rounds.control and self.students > 1
        return [1, self.students] if several else [self.students]

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages of all values of `counts`."""
        config = self.config_with(self.counts[-1])
        return stages_lib.schedule(config, self.workdir, earlier_controls=self.counts[:-1])

    @property
    def num_curve_evals(self) -> int:
        """The number of evaluations inside the first student, without the one at its end."""
        every = self.config_with(1).eval.every
        return (self.config.train.steps - 1) // every if every else 0

    def config_with(self, count: int, teacher_from: str = "") -> Any:
        """Returns the config with `count` students and the workdir to import the teacher from."""
        config = copy.deepcopy(self.config)
        config.rounds.count = count
        config.rounds.teacher_from = teacher_from
        if paper_tables.RUNS[self.name].curve and config.eval.select == "last":
            config.eval.every = max(config.train.steps // 10, 1)
        return config

    def check_config(self) -> None:
        """Checks that the workdir is new or belongs to this config.

        Raises:
            UserError: it belongs to another config, see `workdir.check_config`.
        """
        name = f"{self.name} {self.seed} belongs to this config"
        config = fitted_settings.restore(self.workdir, self.config_with(self.counts[-1]))
        multihost.broadcast_from_main(name, lambda: workdir_lib.check_config(self.workdir, config))

    def is_trained(self, stage: Stage) -> bool:
        """Returns whether a stage is trained, whichever protocol evaluated it."""
        return multihost.broadcast_from_main(f"{self.name} looked for", lambda: stage.is_done)

    @property
    def has_teacher(self) -> bool:
        """Whether the teacher is trained."""
        return self.is_trained(self.stages[0])

    def is_done(self, stage: Stage) -> bool:
        """Returns whether a stage is trained and has a result by the config's protocol."""
        if not self.is_trained(stage):
            return False
        key = stage.kind, stage.round
        return multihost.broadcast_from_main(
            f"{self.name} has a result",
            lambda: any(row.stage_key == key for row in self.results()["rows"]),
        )

    def has_changed_files(self) -> bool:
        """Returns whether an image or mask was changed since the workdir was last written.

        False in a workdir of older code, which has no record of the files. True if a file cannot be
        read: the run itself reports it.

        Raises:
            UserError: a file cannot be read, in a sweep of several processes.
        """
        recorded = workdir_lib.share_record(self.workdir)
        if recorded is None:
            return False
        try:
            with capture_lines():
                dataset = load.load_dataset(self.config, recorded)
        except UserError:
            if multihost.process_count() > 1:
                raise  # The process that reads the file has the error alone; the others wait.
            return True
        assert dataset.record is not None
        return recorded.first_change(dataset.record, SETS) is not None

    def num_labels(self) -> int:
        """Returns the number of images that its teacher has labelled.

        0 while labelling is not complete, or if the manifest is damaged: the run itself inspects a
        damaged one and reports it.
        """
        folder = self.workdir / "round_0" / "teacher" / pseudo_labels.PSEUDO_LABELS

        def count() -> int:
            return len((pseudo_labels.read_manifest(folder) or {"images": ()})["images"])

        return multihost.broadcast_from_main(f"labels of {self.name} counted", count)

    def results(self) -> dict[str, list[results.ResultRow]]:
        """Returns the rows of results.json by the config's protocol; no rows if there is no file.

        Rows of other protocols stay in the file, for tables of those protocols.
        """
        content = results.read(self.workdir / "results.json")
        return {
            name: [row for row in rows if row.protocol.matches_config(self.config.eval)]
            for name, rows in content.items()
        }


class Sweep:
    """One of the paper's tables on one config.

    Args:
        config: data, network and recipe of every row.
        table: key of `paper_tables.TABLES`.
        seeds: seeds to run.
        workdir: folder of the tables and of the trials' workdirs.
        only: keys of `paper_tables.RUNS` to run; empty for every run of the table.

    Raises:
        UserError: the config trains no student or changes what the rows change, a run of `only` is
            not in the table, or a trial's workdir belongs to another config.
    """

    def __init__(
        self,
        config: Any,
        table: str,
        seeds: Sequence[int],
        workdir: epath.PathLike,
        only: Sequence[str] = (),
    ):
        if config.rounds.count < 1:
            raise UserError(
                "rounds.count is 0: the paper's tables need at least one student.",
                code="table-without-students",
            )
        paper_tables.check_method_keys(config, table)
        # All trials have the settings that are chosen from the images of the study's own config.
        self._given_config = fitted_settings.restore(workdir, config)
        self._chosen = size_settings.choose(self._given_config)
        config = size_settings.with_values(self._given_config, self._chosen.values)
        self.table = paper_tables.TABLES[table]
        self._name = table
        self._config = config
        self._seeds = list(seeds)
        self._workdir = epath.Path(workdir)
        self._console = RunConsole(highlight=False, soft_wrap=True, quiet=not multihost.is_main())
        names = list(dict.fromkeys(row.run for row in self.table.rows))
        if unknown := [name for name in only if name not in names]:
            raise UserError(
                f"--runs={unknown[0]} is no run of this table: it has {', '.join(names)}.",
                code="table-run-unknown",
            )
        self._names = [name for name in names if name in only or not only]
        # The printed table has every run, with the seeds of this call and of earlier ones.
        self._table_trials = [self.trial(n, seed) for n in names for seed in self._all_seeds(n)]
        for trial in self._table_trials:
            trial.check_config()

    def _all_seeds(self, name: str) -> list[int]:
        """Returns the seeds of this call, and those that have a workdir, of a run."""

        def list_seeds() -> list[int]:
            folder = self._workdir / name
            names = [path.name for path in folder.iterdir()] if folder.exists() else []
            return [int(n.removeprefix("seed_")) for n in names if re.fullmatch(r"seed_-?\d+", n)]

        return sorted(
            {*self._seeds, *multihost.broadcast_from_main(f"seeds of {name}", list_seeds)}
        )

    @functools.cached_property
    def trials(self) -> list[Trial]:
        """The trials to run, seed by seed: all rows with few seeds are worth more than few rows.

        Prints which optional runs are left out because the data lack images for them.
        """
        names = []
        if any(paper_tables.RUNS[name].optional for name in self._names):
            with capture_lines():
                load.plan_dataset(self._config)  # An error of the data is an error of every run.
        for name in self._names:
            try:
                if paper_tables.RUNS[name].optional:
                    with capture_lines():
                        dataset, _ = load.plan_dataset(self.trial(name, self._seeds[0]).config)
                    if not dataset.unlabeled:
                        raise UserError(
                            "There is no unlabelled image for it.",
                            code="trial-without-unlabeled-images",
                        )
                names.append(name)
            except UserError as error:
                self._console.print(f"{name} is left out: {error}", markup=False)
        return [self.trial(name, seed) for seed in self._seeds for name in names]

    def trial(self, name: str, seed: int) -> Trial:
        """Returns a run of RUNS on this study's config."""
        run = paper_tables.RUNS[name]
        config = self._config.copy_and_resolve_references()
        with config.unlocked():
            config.update_from_flattened_dict(dict(run.changes))
            config.seed = seed
            config.rounds.control = run.control
            # Evaluations inside a stage only serve curves and the selection of weights.
            if config.eval.select == "last":
                config.eval.every = 0
        workdir = self._workdir / name / f"seed_{seed}"
        return Trial(name, seed, config, workdir, self._num_students(name, workdir))

    def _num_students(self, name: str, workdir: epath.Path) -> int:
        """Returns a run's number of students: one if no row of this table reports a later one."""
        count = {"none": 0, "one": 1, "all": self._config.rounds.count}[
            paper_tables.RUNS[name].students
        ]
        has_later_rows = any(row.run == name and row.round != "first" for row in self.table.rows)
        if count <= 1 or has_later_rows:
            return count
        # Another table may have trained more students in this workdir; their stages stay.
        stored = multihost.broadcast_from_main(
            f"rounds of {name}", lambda: workdir_lib.read_fingerprint(workdir, "config.json")
        )
        return min(count, stored["rounds"]["count"]) if stored and stored["rounds"]["count"] else 1

    def run(self) -> None:
        """Runs the trials that are not done, and writes the table after each.

        After a trial that fails the others still run: a diverging loss is a result too. A call
        after an interruption continues where the last one stopped.

        Raises:
            UserError: trials failed, see `self_training.run`; at once if two fail with one message,
                or if one of several processes fails alone.
            Preempted: the run was asked to stop.
        """
        chosen = self._chosen
        fitted_settings.record(self._workdir, self._given_config, chosen.values, chosen.sentence)
        failures: dict[str, str] = {}
        for number, trial in enumerate(self.trials, 1):
            is_done = all(trial.is_done(stage) for stage in trial.stages)
            if not is_done or trial.has_changed_files():
                self._console.rule(f"{number}/{len(self.trials)}: {trial.title}")
                try:
                    self._run_trial(trial)
                except UserError as error:
                    others_wait = multihost.process_count() > 1 and not error.in_every_process
                    if others_wait or str(error) in failures.values():
                        raise
                    failures[trial.title] = str(error)
                    self._console.print(f"{trial.title} failed: {error}", markup=False)
                # The next trial compiles programs of its own; these would only hold memory.
                jax.clear_caches()
            if multihost.is_main():
                self.write_table()
        self._write_and_print()
        if failures:
            raise UserError(
                " ".join(f"{title} failed: {error}" for title, error in failures.items()),
                code="trials-failed",
            )

    def print_table(self) -> None:
        """Writes and prints the table of the results that there are.

        Raises:
            UserError: there is no result by the config's protocol.
        """
        if not self._write_and_print():
            raise UserError(
                f"{self._workdir} has no result of this table by this config's protocol: correct "
                "--workdir, --table or --config, or run it without --tables-only first.",
                code="table-without-results",
            )

    def _write_and_print(self) -> bool:
        """Writes and prints the table; returns whether it has a row."""
        text = multihost.broadcast_from_main("table", self.write_table)
        if text is not None:
            self._console.print(text, markup=False)
        return text is not None

    def _run_trial(self, trial: Trial) -> None:
        """Trains and evaluates the stages of a trial that are missing."""
        teacher_from = "" if trial.has_teacher else self._shared_teacher(trial)
        for count in trial.counts:
            if not all(trial.is_trained(stage) for stage in trial.stages if stage.round <= count):
                self_training.run(trial.config_with(count, teacher_from), trial.workdir)
        is_done = all(trial.is_done(stage) for stage in trial.stages)
        if not is_done or trial.has_changed_files():
            self_training.run(trial.config_with(trial.counts[-1]), trial.workdir)

    def _shared_teacher(self, trial: Trial) -> str:
        """The workdir of another trial to import a trial's teacher from; "" if it trains its own.

        The first of RUNS that shares the teacher trains it, whichever trial needs it first. So its
        norm is that of the study's config, and it is evaluated at its end alone. Of several
        workdirs with the teacher, the one with the most label maps is taken.
        """
        sharing = self._trials_with_same_teacher(trial)
        first = sharing[0]
        if trial.name == first.name:
            return ""
        if not first.has_teacher:
            first.check_config()
            self_training.run(first.config_with(0), first.workdir)
        trained = [other for other in sharing if other.has_teacher]
        donor = max(trained, key=Trial.num_labels)
        donor.check_config()
        return str(donor.workdir)

    def _trials_with_same_teacher(self, trial: Trial) -> list[Trial]:
        """Returns the trials of RUNS that share a trial's teacher; the trial is one of them."""
        expected = teacher_config(trial.config)
        others = [self.trial(name, trial.seed) for name in paper_tables.RUNS]
        return [other for other in others if teacher_config(other.config) == expected]

    def write_table(self) -> str | None:
        """Writes the table of the results that there are, as Markdown, CSV and a plot.

        Returns:
            The Markdown. None if there is no result: then the files of an earlier table, perhaps of
            another protocol, stay.
        """
        config = self._config
        trial_results = []
        for trial in self._table_trials:
            data, content = (
                workdir_lib.read_fingerprint(trial.workdir, "data.json"),
                trial.results(),
            )
            if data is not None:
                trial_results.append(tables.TrialResult(trial.name, trial.seed, content, data))
            elif content["rows"]:
                self._console.print(
                    f"{trial.title} is left out: {trial.workdir} has no data.json", markup=False
                )
        rows = tables.build_rows(self.table, trial_results, config.rounds.count)
        if not rows:
            return None
        meta = tables.TableMeta(self._name, f"{config.model.head} {config.model.backbone}")
        return tables.write_table(self._workdir, self.table, rows, meta)

    def print_plan(self) -> None:
        """Prints the table's rows, and the cost and state of every stage of the trials."""
        folded = functools.partial(Column, overflow="fold")  # Users copy the names into --runs.
        rows = ConsoleTable("row", folded("run"), box=box.SIMPLE_HEAD, title=self.table.title)
        students = self._config.rounds.count
        left_out = {*self._names} - {trial.name for trial in self.trials}
        for row in tables.visible_rows(self.table, students):
            if row.run not in left_out:
                rows.add_row(row.title(students), row.run)
        units = ("images to train on", "views to label", "images to evaluate")
        costs = ConsoleTable(
            *(folded("run", min_width=max(map(len, self._names))), "seed", "stage"),
            *(Column(unit, justify="right") for unit in units),
            "",
            box=box.SIMPLE_HEAD,
        )
        totals = np.zeros(3, np.int64)
        teachers: list[PlanState] = []
        for trial in self.trials:
            with capture_lines():
                dataset, _ = load.plan_dataset(trial.config)
            for stage in trial.stages:
                cost, state = self._plan_stage(trial, stage, dataset, teachers)
                totals += 0 if state == "done" else cost
                costs.add_row(
                    trial.name, str(trial.seed), stage.name, *map("{:,}".format, cost), state
                )
        costs.add_section()
        costs.add_row("left to do", "", "", *map("{:,}".format, totals), "")
        self._console.print(rows)
        self._console.print(costs)
        self._console.print(
            "A view is an image at scale 1, seen once; the commands print images a second.",
        )

    def _plan_stage(
        self,
        trial: Trial,
        stage: Stage,
        dataset: load.Dataset,
        teachers: list["PlanState"],
    ) -> tuple[tuple[int, int, int], str]:
        """Returns the cost of a stage and its state, and updates `teachers`.

        Returns:
            Images to train on, views to label and images to evaluate; and "done", "trained" (it
            needs an evaluation), "shared" (another trial has trained its teacher) or "".
        """
        images, views = _training_cost(trial, stage, len(dataset.unlabeled))
        is_first_student = (stage.kind, stage.round) == ("student", 1)
        evaluations = 1 + (trial.num_curve_evals if is_first_student else 0)
        state = "done" if trial.is_done(stage) else ""
        if not state and trial.is_trained(stage):
            images, views, evaluations, state = 0, 0, 1, "trained"
        if stage.kind == "teacher" or is_first_student:
            teacher = self._planned_teacher(trial, teachers)
            if stage.kind == "teacher":
                if teacher.is_trained and not state:
                    images, state = 0, "shared"
                teacher.is_trained = True
            elif views:
                # The trial copies the label maps that the teacher has already made.
                unlabeled = len(dataset.unlabeled)
                views = round(views * max(unlabeled - teacher.num_labels, 0) / unlabeled)
                teacher.num_labels = max(teacher.num_labels, unlabeled)
        return (images, views, evaluations * len(dataset.evaluation)), state

    def _planned_teacher(self, trial: Trial, teachers: list["PlanState"]) -> "PlanState":
        """Returns the state of a trial's teacher; adds it from the workdirs if it is not listed."""
        config = teacher_config(trial.config)
        for teacher in teachers:
            if teacher.config == config:
                return teacher
        sharing = self._trials_with_same_teacher(trial)
        trained = [other for other in sharing if other.has_teacher]
        num_labels = max(map(Trial.num_labels, trained), default=0)
        teachers.append(PlanState(config, bool(trained), num_labels))
        return teachers[-1]


@dataclasses.dataclass
class PlanState:
    """The state of a teacher after the stages that are planned so far.

    Attributes:
        config: what the teacher depends on, see `teacher_config`.
        is_trained: whether a trial has trained it.
        num_labels: number of images that it has labelled in the trial with the most label maps.
    """

    config: dict[str, Any]
    is_trained: bool
    num_labels: int


def teacher_config(config: Any) -> dict[str, Any]:
    """Returns the config keys that a teacher depends on, flat, with their values."""
    return workdir_lib.teacher_keys(traverse_util.flatten_dict(config.to_dict(), sep="."))


def _training_cost(trial: Trial, stage: Stage, num_unlabeled: int) -> tuple[int, int]:
    """Returns the images to train on in a stage, and the views to label before it."""
    config = trial.config
    spec = stages_lib.batch_spec(config, stage.kind)
    images = stage.steps * spec.num_images
    if not stage.needs_pseudo_labels:
        return images, 0
    views = sum(scale**2 for scale in config.pseudo.scales) * (2 if config.pseudo.flip else 1)
    return images, round(num_unlabeled * views)
