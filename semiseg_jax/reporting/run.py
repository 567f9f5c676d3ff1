"""A run as its workdir shows it: config, result rows, and how far each stage has come."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from semiseg_jax import history, record, results
from semiseg_jax.data import labels
from semiseg_jax.data.streams import stage_name
from semiseg_jax.errors import UserError
from semiseg_jax.evaluate import comparable
from semiseg_jax.reporting.markup import colour_code
from semiseg_jax.train import DONE


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage of a run, as far as it has come.

    Attributes:
        number: among all that the config asks for.
        kind, round: as in `train.Stage`.
        begins: steps of the run before it.
        folder: its own.
        done: it has ended.
        evaluation: what `record.keep_evaluation` wrote; None where it is missing.
    """

    number: int
    kind: str
    round: int
    begins: int
    folder: epath.Path
    done: bool
    evaluation: Any

    @property
    def name(self) -> str:
        """For people."""
        return stage_name(self.kind, self.round)

    @functools.cached_property
    def history(self) -> list[dict[str, Any]]:
        """Its scalars."""
        return history.read(self.folder)


@dataclasses.dataclass(frozen=True)
class Run:
    """What lies in a workdir.

    Attributes:
        workdir: of the run.
        config: config.json.
        about: run.json; None where it is missing.
        rows, curve: of results.json.
        stages: that the config asks for, done or not.
    """

    workdir: epath.Path
    config: dict[str, Any]
    about: Any
    rows: list[dict[str, Any]]
    curve: list[dict[str, Any]]
    stages: list[Stage]

    @property
    def scored(self) -> list[Stage]:
        """Teacher and students that have ended and say how each image fared, by one protocol."""
        found = [s for s in self.stages if s.done and s.evaluation and s.kind != "control"]
        return [
            s
            for s in found
            if s.evaluation["gallery"] == found[-1].evaluation["gallery"]
            and comparable(s.evaluation["protocol"], found[-1].evaluation["protocol"])
        ]

    @property
    def legend(self) -> list[tuple[str, str]]:
        """Name and colour of each class; empty where run.json is missing."""
        about = self.about or {"classes": [], "palette": []}
        pairs = zip(about["classes"], about["palette"], strict=True)
        return [(name, colour_code(colour)) for name, colour in pairs]

    def classes(self, count: int) -> list[tuple[str, str]]:
        """Name and colour of each of `count` classes; numbers where run.json is missing."""
        if self.about is None:
            colours = labels.generated_palette(count)
            return [(f"class {i}", colour_code(colour)) for i, colour in enumerate(colours)]
        return self.legend

    @property
    def palette(self) -> Sequence[Sequence[int]]:
        """Colour of each class, as red, green and blue in 0..255."""
        return self.about["palette"] if self.about else labels.generated_palette(labels.IGNORE)


def read(workdir: epath.PathLike) -> Run:
    """Reads a workdir.

    Raises:
        UserError: it is not that of a run.
    """
    workdir = epath.Path(workdir)
    config = labels.read_json(workdir / "config.json", "model", "rounds", "train")
    if config is None:
        raise UserError(
            f"{workdir} has no config.json: give the --workdir of a run that has begun."
        )
    scores = _results(workdir)
    about = labels.read_json(workdir / record.RUN, "classes", "palette", "images")
    stages = list(_stages(workdir, config))
    return Run(workdir, config, about, scores["rows"], scores["curve"], stages)


def _results(workdir: epath.Path) -> dict[str, list[dict[str, Any]]]:
    """Of results.json; none where it is missing or damaged, as the page says then."""
    try:
        return results.content(labels.read_json(workdir / "results.json"))
    except ValueError:
        return {"rows": [], "curve": []}


def _stages(workdir: epath.Path, config: Mapping[str, Any]) -> Iterator[Stage]:
    rounds, train = config["rounds"], config["train"]
    wanted = [("teacher", 0, 0)]
    for round_ in range(1, rounds["count"] + 1):
        wanted.append(("student", round_, train["teacher_steps"] + (round_ - 1) * train["steps"]))
    if rounds["control"] and rounds["count"]:
        wanted.append(("control", rounds["count"], train["teacher_steps"]))
    for number, (kind, round_, begins) in enumerate(wanted):
        folder = workdir / f"round_{round_}" / kind
        evaluation = labels.read_json(folder / record.EVALUATION, "gallery", "protocol")
        done = (folder / DONE).exists()
        yield Stage(number, kind, round_, begins, folder, done, evaluation)
