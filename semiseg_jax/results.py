"""results.json: a row for every reported evaluation, and the table made from the rows."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath
from rich import box
from rich.console import Console
from rich.table import Table

from semiseg_jax import metrics
from semiseg_jax.eval_protocol import EvalProtocol
from semiseg_jax.evaluate import Score
from semiseg_jax.runtime import json_forms, multihost
from semiseg_jax.runtime.errors import UserError, read_error
from semiseg_jax.runtime.fileio import parse_json, write_bytes
from semiseg_jax.stages import stage_name

# The form of each field of a row in results.json.
_FORMS: Mapping[str, json_forms.Form] = {
    "stage": lambda value: value in ("teacher", "student", "control"),
    "round": json_forms.is_count,
    "step": json_forms.is_count,
    "weights_step": json_forms.optional(json_forms.is_count),
    "split": json_forms.is_text,
    "miou": json_forms.is_number,
    "iou": json_forms.list_of(json_forms.optional(json_forms.is_number), range(1, 256)),
    "pixel_accuracy": json_forms.is_number,
    "mean_class_accuracy": json_forms.is_number,
    "pixels": json_forms.is_count,
    "seed": json_forms.is_integer,
    "protocol": json_forms.is_object,  # in detail by `EvalProtocol.from_json`
}


@dataclasses.dataclass(frozen=True)
class ResultRow:
    """The result of an evaluation.

    Attributes:
        stage: its kind: "teacher", "student" or "control".
        round: of the stage.
        step: where the stage stood.
        weights_step: the step of the evaluated weights: `step`, except at the end of a stage whose
            weights were selected (`eval.select`); None in rows of early versions.
        split: of the evaluated images.
        miou: in 0..1.
        iou: by class, in 0..1; None for a class that never occurs.
        pixel_accuracy, mean_class_accuracy: in 0..1.
        pixels: labelled pixels counted.
        seed: of the run.
        protocol: how the result was obtained.
    """

    stage: str
    round: int
    step: int
    weights_step: int | None
    split: str
    miou: float
    iou: tuple[float | None, ...]
    pixel_accuracy: float
    mean_class_accuracy: float
    pixels: int
    seed: int
    protocol: EvalProtocol

    @classmethod
    def of_score(
        cls,
        stage: str,
        round_: int,
        step: int,
        score: Score,
        protocol: EvalProtocol,
        weights_step: int | None = None,
    ) -> "ResultRow":
        """The row of a score; `weights_step` is `step` unless given."""
        return cls(
            stage=stage,
            round=round_,
            step=step,
            weights_step=step if weights_step is None else weights_step,
            split=protocol.split,
            miou=score.miou,
            iou=tuple(score.iou),
            pixel_accuracy=metrics.pixel_accuracy(score.confusion),
            mean_class_accuracy=metrics.mean_class_accuracy(score.confusion),
            pixels=score.pixels,
            seed=protocol.seed,
            protocol=protocol,
        )

    @classmethod
    def from_json(cls, content: Any) -> "ResultRow":
        """The row that `to_json` gave.

        Raises:
            ValueError: it is no object, a key is missing, or a value is of another form.
        """
        values = json_forms.checked(content, _FORMS, {"weights_step": None}, "a row")
        protocol = EvalProtocol.from_json(content["protocol"])
        return cls(**values | {"iou": tuple(content["iou"]), "protocol": protocol})

    def to_json(self) -> dict[str, Any]:
        """What results.json holds of it; without `weights_step` where that is None."""
        content = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        content |= {"iou": list(self.iou), "protocol": self.protocol.to_json()}
        return {k: v for k, v in content.items() if v is not None}

    @property
    def stage_key(self) -> tuple[str, int]:
        """Kind and round of the stage."""
        return self.stage, self.round

    @property
    def stage_name(self) -> str:
        """The name of the stage for people."""
        return stage_name(self.stage, self.round)

    @property
    def miou_percent(self) -> float:
        """The mIoU in percent."""
        return 100 * self.miou

    def replaces(self, other: "ResultRow") -> bool:
        """Whether this row is of the same stage, step and seed, by a comparable protocol."""
        key, other_key = ((r.stage, r.round, r.step, r.seed) for r in (self, other))
        return key == other_key and self.protocol.is_comparable(other.protocol)


def read(path: epath.Path) -> dict[str, list[ResultRow]]:
    """The content of a results.json (see `Results`); empty if there is none.

    Raises:
        UserError: the file is damaged.
    """
    if not path.exists():
        return {"rows": [], "curve": []}
    try:
        return parse(parse_json(path.read_text()))
    except OSError as error:
        raise read_error(path, error, "make it readable") from error
    except ValueError as error:
        raise UserError(
            f"{path} cannot be read ({error}): remove it, and start again to evaluate every stage "
            "anew.",
            code="results-damaged",
        ) from error


def parse(content: Any) -> dict[str, list[ResultRow]]:
    """The rows of the JSON of a results.json; an empty curve where it has rows alone.

    Raises:
        ValueError: it has another form.
    """
    if not isinstance(content, dict) or "rows" not in content:
        raise ValueError("it has no rows")
    rows_by_name: dict[str, list[ResultRow]] = {}
    for name in ("rows", "curve"):
        rows = content.get(name, [])
        if not isinstance(rows, list):
            raise ValueError(f"its {name} are no result rows")
        try:
            rows_by_name[name] = [ResultRow.from_json(row) for row in rows]
        except (ValueError, TypeError) as error:
            raise ValueError(f"its {name} are no result rows") from error
    return rows_by_name


class Results:
    """The rows of a workdir, kept on disk; without clock times, so that reruns are identical.

    The file is {"rows": [...], "curve": [...]}: `rows` has the end of each stage, `curve` the
    evaluations inside stages, rows of the same form.

    Raises:
        UserError: the file is damaged.
    """

    def __init__(self, path: epath.PathLike):
        self._path = epath.Path(path)
        content = multihost.broadcast_from_main("results", lambda: _to_json(read(self._path)))
        self._content = parse(content)

    @property
    def rows(self) -> list[ResultRow]:
        """The ends of stages, in the order in which they were first written."""
        return self._content["rows"]

    @property
    def curve(self) -> list[ResultRow]:
        """The evaluations inside stages."""
        return self._content["curve"]

    def add(self, row: ResultRow, final: bool) -> None:
        """Adds a row, or replaces the one that it `replaces`, and writes the file.

        Args:
            row: the result.
            final: it is of the end of a stage.
        """
        rows = self._content["rows" if final else "curve"]
        replaced = [i for i, old in enumerate(rows) if row.replaces(old)]
        if replaced:
            rows[replaced[0]] = row
        else:
            rows.append(row)
        if multihost.is_main():
            text = json.dumps(_to_json(self._content), indent=1) + "\n"
            write_bytes(self._path, text.encode())


def _to_json(content: Mapping[str, Sequence[ResultRow]]) -> dict[str, list[dict[str, Any]]]:
    return {name: [row.to_json() for row in rows] for name, rows in content.items()}


def print_table(rows: Sequence[ResultRow], classes: Sequence[str], console: Console) -> None:
    """Prints a column for each stage: mIoU, its gain over the teacher, IoU by class; in percent.

    Raises:
        ValueError: the rows have different protocols.
    """
    if not rows:
        return
    if not all(row.protocol.is_comparable(rows[0].protocol) for row in rows):
        raise ValueError("rows of different protocols do not belong into one table")
    teacher = next((row for row in rows if row.stage == "teacher"), None)
    table = Table(box=box.SIMPLE_HEAD, title=f"Results on {rows[0].split}, in %")
    table.add_column("", no_wrap=True)
    for row in rows:
        table.add_column(row.stage_name, justify="right", no_wrap=True)
    table.add_row("mIoU", *(f"{row.miou_percent:.2f}" for row in rows), style="bold")
    if teacher:
        gains = (f"{100 * (row.miou - teacher.miou):+z.2f}" for row in rows)
        table.add_row("gain over the teacher", *gains, end_section=True)
    for i, name in enumerate(classes):
        values = [row.iou[i] for row in rows]
        table.add_row(name, *("-" if v is None else f"{100 * v:.1f}" for v in values))
    console.print(table)
