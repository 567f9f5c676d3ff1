"""The runs of one of the paper's tables, over several seeds, and what they cost."""

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
from rich.console import Console
from rich.table import Column
from rich.table import Table as Printed

from semiseg_jax import (
    distributed,
    evaluate,
    identity,
    interruption,
    lock,
    paper,
    results,
    rounds,
    tables,
)
from semiseg_jax.data import labels, sources, streams
from semiseg_jax.errors import UserError
from semiseg_jax.pseudo_labels import MANIFEST, PSEUDO_LABELS

# What a teacher does not depend on: all that is read behind it, and its kind of norm, of which it
# uses the weak one. (`frozen` is another matter: runs that change the norm to it take the teacher
# that all others have, see `Study._teach`.)
BEHIND_THE_TEACHER = (
    *("data.weak_stream", "data.strong_stream", "data.unlabeled", "data.train_extra", "sda."),
    *("loss.", "pseudo.", "eval.", "rounds.", "optim.student.", "train.steps"),
    *("train.batch_unlabeled", "model.norm"),
)


def seeds(texts: Sequence[str]) -> list[int]:
    """Distinct integers from the command line.

    Raises:
        UserError: one is not an integer, or stands there twice.
    """
    try:
        numbers = [int(text) for text in texts]
    except ValueError:
        numbers = []
    if not numbers or len(set(numbers)) < len(numbers):
        raise UserError(
            f"--seeds={','.join(texts)} are not distinct integers: give some, as 0,1,2."
        )
    return numbers


@dataclasses.dataclass(frozen=True)
class Piece:
    """A run of one seed: its name in `paper.RUNS`, config, workdir, and how many students."""

    name: str
    seed: int
    config: Any
    workdir: epath.Path
    students: int

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.name}, seed {self.seed}"

    @property
    def counts(self) -> list[int]:
        """The values of rounds.count that it goes through, each with its control."""
        several = self.config.rounds.control and self.students > 1
        return [1, self.students] if several else [self.students]

    @property
    def stages(self) -> list[tuple[str, int]]:
        """(kind, round) of every stage."""
        students = [("student", i + 1) for i in range(self.counts[-1])]
        controls = [("control", n) for n in self.counts if self.config.rounds.control]
        return [("teacher", 0), *students, *controls]

    def config_of(self, count: int) -> Any:
        """The config with `count` students."""
        config = copy.deepcopy(self.config)
        config.rounds.count = count
        # Curves are of the first student.
        if paper.RUNS[self.name].curve and config.eval.select == "last":
            config.eval.every = max(config.train.steps // 10, 1)
        return config

    @property
    def inside(self) -> int:
        """Evaluations inside the first student."""
        every = self.config_of(1).eval.every
        return (self.config.train.steps - 1) // every if every else 0

    def refuse_other_config(self) -> None:
        """Refuses a workdir that was made by another config; see `identity`."""
        name = f"{self.name} {self.seed} belongs to this config"
        config = self.config_of(self.counts[-1])
        distributed.agree(name, lambda: identity.refuse_other_config(self.workdir, config))

    def is_trained(self, kind: str, round_: int) -> bool:
        """Whether a stage is finished, by whatever protocol it was evaluated."""
        marker = self.workdir / f"round_{round_}" / kind / rounds.DONE
        return distributed.agree(f"{self.name} looked for", marker.exists)

    def is_done(self, kind: str, round_: int) -> bool:
        """Whether a stage is finished, and has a result by the protocol that is asked for."""
        if not self.is_trained(kind, round_):
            return False
        return distributed.agree(
            f"{self.name} has a result",
            lambda: any((r["stage"], r["round"]) == (kind, round_) for r in self.results()["rows"]),
        )

    def labels_made(self) -> int:
        """Images that its teacher has labelled; 0 until it has labelled all that it was to."""
        path = self.workdir / "round_0" / "teacher" / PSEUDO_LABELS / MANIFEST

        def count() -> int:
            # Of a damaged one none: labelling looks at what is there, and says what is damaged.
            return len((labels.read_json(path, "images") or {"images": ()})["images"])

        return distributed.agree(f"labels of {self.name} counted", count)

    def results(self) -> dict[str, list[Any]]:
        """results.json, of it what the protocol that is asked for gave; empty where there is none.

        The others stay where they are: a table of another protocol is another table.
        """
        kept = results.read(self.workdir / "results.json")
        return {
            name: [r for r in rows if evaluate.answers(r["protocol"], self.config.eval)]
            for name, rows in kept.items()
        }


class Study:
    """One of the paper's tables on one config.

    Raises:
        UserError: the config trains no student, or has no such run.
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
            raise UserError("rounds.count is 0: the paper's tables need at least one student.")
        paper.refuse_another_method(config, table)
        self.table = paper.TABLES[table]
        self._name = table
        self._config = config
        self._seeds = list(seeds)
        self._workdir = epath.Path(workdir)
        self._console = Console(highlight=False, soft_wrap=True, quiet=not distributed.is_main())
        names = list(dict.fromkeys(row.run for row in self.table.rows))
        if unknown := [name for name in only if name not in names]:
            raise UserError(
                f"--runs={unknown[0]} is no run of this table: it has {', '.join(names)}."
            )
        self._names = [name for name in names if name in only or not only]
        # Of all seeds that there are: those that are run now and those of before.
        self._shown = [self.piece(name, seed) for name in names for seed in self._seeds_of(name)]
        for piece in self._shown:
            piece.refuse_other_config()

    def _seeds_of(self, name: str) -> list[int]:
        """The seeds to run, and those that have a folder."""

        def there() -> list[int]:
            folder = self._workdir / name
            names = [path.name for path in folder.iterdir()] if folder.exists() else []
            return [int(n.removeprefix("seed_")) for n in names if re.fullmatch(r"seed_-?\d+", n)]

        return sorted({*self._seeds, *distributed.agree(f"seeds of {name}", there)})

    @functools.cached_property
    def pieces(self) -> list[Piece]:
        """What is to be made, seed by seed: few seeds of all rows are worth more than many of few.

        Without the optional runs for which there are no images, which is said.
        """
        kept = []
        if any(paper.RUNS[name].optional for name in self._names):
            sources.plan(self._config)  # What is wrong with the data is wrong with all runs.
        for name in self._names:
            try:
                if paper.RUNS[name].optional:
                    unlabeled = sources.plan(self.piece(name, self._seeds[0]).config)[0].unlabeled
                    if not unlabeled:
                        raise UserError("There is no unlabelled image for it.")
                kept.append(name)
            except UserError as error:
                self._console.print(f"{name} is left out: {error}", markup=False)
        return [self.piece(name, seed) for seed in self._seeds for name in kept]

    def piece(self, name: str, seed: int) -> Piece:
        """A run of `paper.RUNS` on this study's config."""
        run = paper.RUNS[name]
        config = self._config.copy_and_resolve_references()
        with config.unlocked():
            config.update_from_flattened_dict(dict(run.changes))
            config.seed = seed
            config.rounds.control = run.control
            # Evaluations inside a stage make curves, and choose weights; all else needs none.
            if config.eval.select == "last":
                config.eval.every = 0
        workdir = self._workdir / name / f"seed_{seed}"
        return Piece(name, seed, config, workdir, self._students(name, workdir))

    def _students(self, name: str, workdir: epath.Path) -> int:
        """How many students a run has: where no row shows a later one, the first is enough."""
        count = {"none": 0, "one": 1, "all": self._config.rounds.count}[paper.RUNS[name].students]
        shown = any(row.run == name and row.round != "first" for row in self.table.rows)
        if count <= 1 or shown:
            return count
        # Of a run that another table has given more, no stage may be taken away.
        kept = distributed.agree(
            f"rounds of {name}", lambda: identity.known(workdir, "config.json")
        )
        return min(count, kept["rounds"]["count"]) if kept and kept["rounds"]["count"] else 1

    def run(self, asked: interruption.Asked = interruption.never) -> None:
        """Makes what is missing; the table is written again after every run.

        A run that fails does not keep the others from their results: one that diverges is a result
        of its own.

        Raises:
            UserError: runs failed, see `rounds.run`; at once where two fail in the same way.
            Interrupted: that was asked for; the same call goes on.
        """
        failed: dict[str, str] = {}
        for number, piece in enumerate(self.pieces, 1):
            if not all(piece.is_done(*stage) for stage in piece.stages):
                self._console.rule(f"{number}/{len(self.pieces)}: {piece.title}")
                try:
                    self._make(piece, asked)
                except UserError as error:
                    if str(error) in failed.values():
                        raise
                    failed[piece.title] = str(error)
                    self._console.print(f"{piece.title} failed: {error}", markup=False)
                # Programs of this run's shapes are of no use to the next.
                jax.clear_caches()
            if distributed.is_main():
                self.write()
        self._write_and_print()
        if failed:
            raise UserError(" ".join(f"{title} failed: {error}" for title, error in failed.items()))

    def print_table(self) -> None:
        """Writes and prints the table of what is done.

        Raises:
            UserError: nothing is, by the protocol that is asked for.
        """
        if not self._write_and_print():
            raise UserError(
                f"{self._workdir} has no result of this table by this config's protocol: correct "
                "--workdir, --table or --config, or run it without --tables-only first."
            )

    def _write_and_print(self) -> bool:
        """Whether there was something to print."""
        text = distributed.agree("table", self.write)
        if text is not None:
            self._console.print(text, markup=False)
        return text is not None

    def _make(self, piece: Piece, asked: interruption.Asked) -> None:
        if not piece.is_trained("teacher", 0):
            self._teach(piece, asked)
        for count in piece.counts:
            if not all(piece.is_trained(kind, n) for kind, n in piece.stages if n <= count):
                rounds.run(piece.config_of(count), piece.workdir, asked)
        if not all(piece.is_done(*stage) for stage in piece.stages):
            rounds.run(piece.config_of(piece.counts[-1]), piece.workdir, asked)

    def _teach(self, piece: Piece, asked: interruption.Asked) -> None:
        """Takes the teacher of a run from another that has the same one.

        The first of `paper.RUNS` that has it makes it, whichever run is the first to need it: so it
        has the norm that the config says, and is evaluated at its end alone.
        """
        same = self._same_teacher(piece)
        first = same[0]
        if piece.name == first.name:
            return  # It makes its own.
        teacher: rounds.Trained | None
        if not first.is_trained("teacher", 0):
            first.refuse_other_config()
            teacher = rounds.teach(first.config_of(first.counts[0]), first.workdir, asked)
        else:
            trained = [p for p in same if p.is_trained("teacher", 0)]
            donor = max(trained, key=Piece.labels_made)
            donor.refuse_other_config()
            with lock.held(donor.workdir):  # It may be evaluated anew.
                lender = rounds.Job(donor.config_of(donor.counts[0]), donor.workdir, asked)
                teacher = lender.finished("teacher", 0)
        if teacher:
            with lock.held(piece.workdir):
                rounds.Job(piece.config_of(piece.counts[0]), piece.workdir, asked).adopt(teacher)

    def _same_teacher(self, piece: Piece) -> list[Piece]:
        """The runs that have a run's teacher, whatever their table, and itself among them."""
        wanted = of_teacher(piece.config)
        others = [self.piece(name, piece.seed) for name in paper.RUNS]
        return [other for other in others if of_teacher(other.config) == wanted]

    def write(self) -> str | None:
        """Writes the table of what is done, as Markdown, CSV and a picture; the Markdown.

        None where nothing is: a table of before, perhaps of another protocol, stays.
        """
        config = self._config
        found = []
        for piece in self._shown:
            data, kept = identity.known(piece.workdir, "data.json"), piece.results()
            if data is not None:
                found.append(tables.Source(piece.name, piece.seed, kept, data))
            elif kept["rows"]:
                self._console.print(
                    f"{piece.title} is left out: {piece.workdir} has no data.json", markup=False
                )
        lines = tables.lines(self.table, found, config.rounds.count)
        if not lines:
            return None
        about = tables.About(self._name, f"{config.model.head} {config.model.backbone}")
        return tables.write(self._workdir, self.table, lines, about)

    def print_plan(self) -> None:
        """Rows, runs, what each costs and what is done."""
        whole = functools.partial(Column, overflow="fold")  # Names are copied into --runs.
        rows = Printed("row", whole("run"), box=box.SIMPLE_HEAD, title=self.table.title)
        students = self._config.rounds.count
        left_out = {*self._names} - {piece.name for piece in self.pieces}
        for row in tables.shown(self.table, students):
            if row.run not in left_out:
                rows.add_row(row.title(students), row.run)
        counts = ("images to train on", "views to label", "images to evaluate")
        printed = Printed(
            *(whole("run", min_width=max(map(len, self._names))), "seed", "stage"),
            *(Column(name, justify="right") for name in counts),
            "",
            box=box.SIMPLE_HEAD,
        )
        totals = np.zeros(3, np.int64)
        made = _Made()
        for piece in self.pieces:
            dataset = sources.plan(piece.config)[0]
            for kind, round_ in piece.stages:
                cost, state = self._planned(piece, kind, round_, dataset, made)
                totals += 0 if state == "done" else cost
                name = streams.stage_name(kind, round_)
                printed.add_row(piece.name, str(piece.seed), name, *map("{:,}".format, cost), state)
        printed.add_section()
        printed.add_row("left to do", "", "", *map("{:,}".format, totals), "")
        self._console.print(rows)
        self._console.print(printed)
        self._console.print(
            "A view is an image at scale 1, seen once; the commands print images a second.",
        )

    def _planned(
        self, piece: Piece, kind: str, round_: int, dataset: sources.Dataset, made: "_Made"
    ) -> tuple[tuple[int, int, int], str]:
        """What a stage costs, and "done", "trained", "shared" or ""; `made` gets what it makes."""
        train, views = _cost(piece, kind, round_, len(dataset.unlabeled))
        looks = 1 + (piece.inside if (kind, round_) == ("student", 1) else 0)
        state = "done" if piece.is_done(kind, round_) else ""
        if not state and piece.is_trained(kind, round_):
            train, views, looks, state = 0, 0, 1, "trained"  # Evaluated by another protocol.
        if (kind, round_) not in (("teacher", 0), ("student", 1)):
            return (train, views, looks * len(dataset.evaluation)), state
        key = of_teacher(piece.config)
        if key not in made.teachers:
            same = [p for p in self._same_teacher(piece) if p.is_trained("teacher", 0)]
            made.teachers.append(key)
            made.labels.append(max(map(Piece.labels_made, same), default=0))
            made.trained.append(bool(same))
        number = made.teachers.index(key)
        if kind == "teacher":
            if made.trained[number] and not state:
                train, state = 0, "shared"
            made.trained[number] = True
        elif views:
            images = len(dataset.unlabeled)
            views = round(views * max(images - made.labels[number], 0) / images)
            made.labels[number] = max(made.labels[number], images)
        return (train, views, looks * len(dataset.evaluation)), state


@dataclasses.dataclass
class _Made:
    """What a plan has made so far: by teacher, whether it is trained, and how many images labelled.

    Attributes:
        teachers: what each follows from (see `of_teacher`).
        trained: whether there is one.
        labels: images that the most of its runs have label maps of.
    """

    teachers: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    trained: list[bool] = dataclasses.field(default_factory=list)
    labels: list[int] = dataclasses.field(default_factory=list)


def of_teacher(config: Any) -> dict[str, Any]:
    """All that a teacher follows from."""
    flat = traverse_util.flatten_dict(config.to_dict(), sep=".")
    kept = flat.keys() - identity.FREE
    return {
        key: flat[key]
        for key in kept
        if key.startswith("model.norm_") or not key.startswith(BEHIND_THE_TEACHER)
    }


def _cost(piece: Piece, kind: str, round_: int, unlabeled: int) -> tuple[int, int]:
    """Images to train on in a stage, and views to label before it."""
    config = piece.config
    taken = streams.of_stage(config, kind)
    size = taken.size("weak") + taken.size("strong")
    steps = streams.stage_steps(config.train, kind, round_)
    if kind != "student" or "pseudo" not in (*taken.weak, *taken.strong):
        return steps * size, 0
    views = sum(scale**2 for scale in config.pseudo.scales) * (2 if config.pseudo.flip else 1)
    return steps * size, round(unlabeled * views)
