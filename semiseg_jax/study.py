"""The runs of one of the paper's tables, over several seeds, and what they cost."""

import copy
import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import jax
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
    paper,
    results,
    rounds,
    tables,
)
from semiseg_jax.data import sources, streams
from semiseg_jax.errors import UserError

# What a teacher does not depend on: all that is read behind it, and its kind of norm, of which it
# uses the weak one. (`frozen` is another matter for a teacher that starts from weights: rows with
# it take the teacher that all others have.)
BEHIND_THE_TEACHER = (
    *("data.weak_stream", "data.strong_stream", "data.unlabeled", "sda.", "loss.", "pseudo."),
    *("eval.", "rounds.", "optim.student.", "train.steps", "train.batch_unlabeled", "model.norm"),
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
    """A run of one seed: its name in `paper.RUNS`, config and workdir."""

    name: str
    seed: int
    config: Any
    workdir: epath.Path

    @property
    def counts(self) -> list[int]:
        """The values of rounds.count that it goes through, each with its control."""
        students = paper.RUNS[self.name].students
        count = {"none": 0, "one": 1, "all": self.config.rounds.count}[students]
        return [1, count] if self.config.rounds.control and count > 1 else [count]

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
        return config

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
        chosen = [name for name in names if name in only or not only]
        # Seed by seed: a table with few seeds is worth more than a few rows with many.
        self.pieces = [self.piece(name, seed) for seed in self._seeds for name in chosen]
        self._shown = [self.piece(name, seed) for seed in self._seeds for name in names]

    def piece(self, name: str, seed: int) -> Piece:
        """A run of `paper.RUNS` on this study's config."""
        run = paper.RUNS[name]
        config = self._config.copy_and_resolve_references()
        with config.unlocked():
            config.update_from_flattened_dict(dict(run.changes))
            config.seed = seed
            config.rounds.control = run.control
            # Weights that are chosen by evaluating follow from how often that is done.
            if run.curve and config.eval.select == "last":
                config.eval.every = max(config.train.steps // 10, 1)
        return Piece(name, seed, config, self._workdir / name / f"seed_{seed}")

    def run(self, asked: interruption.Asked = interruption.never) -> None:
        """Makes what is missing; the table is written again after every run.

        Raises:
            UserError: see `rounds.run`.
            Interrupted: that was asked for; the same call goes on.
        """
        for number, piece in enumerate(self.pieces, 1):
            if not all(piece.is_done(*stage) for stage in piece.stages):
                self._console.rule(f"{number}/{len(self.pieces)}: {piece.name}, seed {piece.seed}")
                self._make(piece, asked)
                # Programs of this run's shapes are of no use to the next.
                jax.clear_caches()
            if distributed.is_main():
                self.write()
        self.print_table()

    def print_table(self) -> None:
        """Writes and prints the table of what is done."""
        if distributed.is_main():
            self._console.print(self.write(), markup=False)

    def _make(self, piece: Piece, asked: interruption.Asked) -> None:
        donor = self._donor(piece)
        if donor and not piece.is_trained("teacher", 0):
            lender = rounds.Job(donor.config_of(donor.counts[0]), donor.workdir, asked)
            if teacher := lender.finished("teacher", 0):
                taker = rounds.Job(piece.config_of(piece.counts[0]), piece.workdir, asked)
                taker.adopt(teacher)
        for count in piece.counts:
            if not all(piece.is_done(kind, n) for kind, n in piece.stages if n <= count):
                rounds.run(piece.config_of(count), piece.workdir, asked)

    def _donor(self, piece: Piece) -> Piece | None:
        """A run of this workdir, whatever its table, that has made the same teacher."""
        wanted = of_teacher(piece.config)
        for name in paper.RUNS:
            other = self.piece(name, piece.seed)
            if (
                name != piece.name
                and other.is_trained("teacher", 0)
                and of_teacher(other.config) == wanted
            ):
                return other
        return None

    def write(self) -> str:
        """Writes the table of what is done, as Markdown, CSV and a picture; the Markdown."""
        config = self._config
        found = [
            tables.Source(p.name, p.seed, p.results(), json.loads(data.read_text()))
            for p in self._shown
            if (data := p.workdir / "data.json").exists()
        ]
        lines = tables.lines(self.table, found, config.rounds.count)
        about = tables.About(self._name, config.data.name, config.model.backbone)
        return tables.write(self._workdir, self.table, lines, about)

    def print_plan(self) -> None:
        """Rows, runs, what each costs and what is done."""
        printed = Printed(
            *("run", "seed", "stage"),
            *(Column(name, justify="right") for name in ("images to train on", "views to label")),
            "",
            title=self.table.title,
            box=box.SIMPLE_HEAD,
        )
        totals = [0, 0]
        shared: list[dict[str, Any]] = []
        for piece in self.pieces:
            unlabeled = len(sources.plan(piece.config)[0].unlabeled)
            key = of_teacher(piece.config)
            for kind, round_ in piece.stages:
                train, label = _cost(piece, kind, round_, unlabeled)
                done = piece.is_done(kind, round_)
                state = "done" if done else ""
                if kind == "teacher" and not done and key in shared:
                    train, state = 0, "shared"
                if round_ == 1 and kind == "student" and key in shared:
                    label = 0
                totals = totals if done else [totals[0] + train, totals[1] + label]
                name = streams.stage_name(kind, round_)
                printed.add_row(
                    piece.name, str(piece.seed), name, f"{train:,}", f"{label:,}", state
                )
            shared.append(key)
        printed.add_section()
        printed.add_row("left to do", "", "", *(f"{total:,}" for total in totals), "")
        self._console.print(printed)
        self._console.print(
            "A view is an image at scale 1, seen once; the commands print images a second.",
        )


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
