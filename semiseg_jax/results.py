"""results.json: a row for every reported evaluation, and the table made from the rows."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from etils import epath
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from semiseg_jax import metrics
from semiseg_jax.eval_protocol import EvalProtocol
from semiseg_jax.runtime import hashes, json_forms, multihost
from semiseg_jax.runtime.errors import UserError, read_error
from semiseg_jax.runtime.fileio import parse_json, read_text, write_bytes
from semiseg_jax.runtime.logger import logger
from semiseg_jax.stages import KINDS, stage_name

if TYPE_CHECKING:
    # It imports TensorFlow, which the user of a trained model does not need.
    import semiseg_jax.evaluate

# The form of each field of a row in results.json.
_FORMS: Mapping[str, json_forms.Form] = {
    "stage": lambda value: value in KINDS,
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
    "student_miou": json_forms.optional(json_forms.is_number),
    "unlabeled_miou": json_forms.optional(json_forms.is_number),
    "unlabeled_pixel_accuracy": json_forms.optional(json_forms.is_number),
    "labels": json_forms.optional(
        json_forms.record(
            {
                "kept": json_forms.is_number,
                "kept_by_class": json_forms.list_of(json_forms.optional(json_forms.is_number)),
                "warnings": json_forms.list_of(json_forms.is_text),
            }
        )
    ),
}


# Fields that a row may lack, with their values then.
_OPTIONAL = {
    "weights_step": None,
    "student_miou": None,
    "labels": None,
    "unlabeled_miou": None,
    "unlabeled_pixel_accuracy": None,
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
        student_miou: mIoU of the network that is trained, in 0..1, where `miou` is that of its
            average; None otherwise.
        labels: of a stage whose method labels inside the step, the fields of
            `label_health.LabelHealth`; None otherwise.
        unlabeled_miou, unlabeled_pixel_accuracy: in 0..1, on the unlabelled images that
            `eval.unlabeled_masks` has masks of; None without.
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
    student_miou: float | None = None
    labels: Mapping[str, Any] | None = None
    unlabeled_miou: float | None = None
    unlabeled_pixel_accuracy: float | None = None

    @classmethod
    def of_score(
        cls,
        stage: str,
        round_: int,
        step: int,
        score: "semiseg_jax.evaluate.Score",
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
        values = json_forms.checked(content, _FORMS, _OPTIONAL, "a row")
        protocol = EvalProtocol.from_json(content["protocol"])
        return cls(**values | {"iou": tuple(content["iou"]), "protocol": protocol})

    def to_json(self) -> dict[str, Any]:
        """What results.json holds of it; without what is None."""
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


# Beside results.json: {hash of a row: hash of the weights that the row is of}. A row whose hash is
# not there was changed after it was written. Workdirs of older code have no such file.
ROW_HASHES = "row_hashes.json"
_ROW_HASHES_FORM = json_forms.mapping_of(json_forms.is_text)


def read(path: epath.Path) -> dict[str, list[ResultRow]]:
    """The content of a results.json (see `Results`) without changed rows; empty if there is none.

    A row that was changed after it was written is left out with a warning.

    Raises:
        UserError: the file, or ROW_HASHES beside it, is damaged.
    """
    rows_by_name = _read_rows(path, read_row_hashes(path))
    return {name: [row for row in rows if row] for name, rows in rows_by_name.items()}


def read_row_hashes(path: epath.Path) -> dict[str, str] | None:
    """The content of ROW_HASHES beside a results.json; None in workdirs of older code.

    Raises:
        UserError: the file is damaged.
    """
    path = path.parent / ROW_HASHES
    if not path.exists():
        return None
    try:
        content = parse_json(read_text(path))
        if not _ROW_HASHES_FORM(content):
            raise ValueError("it does not give the hashes of rows")
        return content
    except OSError as error:
        raise read_error(path, error, "make it readable") from error
    except ValueError as error:
        raise UserError(
            f"{path} cannot be read ({error}): restore it, or remove it and results.json beside "
            "it, and start again to evaluate every stage anew.",
            code="row-hashes-damaged",
        ) from error


def _read_rows(
    path: epath.Path, hashes_of_rows: Mapping[str, str] | None
) -> dict[str, list[ResultRow | None]]:
    """The rows of a results.json, with None instead of each changed row; warns of each."""
    if not path.exists():
        return {"rows": [], "curve": []}
    try:
        rows_by_name = parse(parse_json(read_text(path)))
    except OSError as error:
        raise read_error(path, error, "make it readable") from error
    except ValueError as error:
        raise UserError(
            f"{path} cannot be read ({error}): remove it, and start again to evaluate every stage "
            "anew.",
            code="results-damaged",
        ) from error

    def checked(row: ResultRow, name: str) -> ResultRow | None:
        if hashes_of_rows is None or _row_hash(row) in hashes_of_rows:
            return row
        # The weights inside a stage that has ended may be gone.
        then = (
            "the run's own command evaluates again."
            if name == "rows"
            else "a curve of a stage that has ended goes on without this point."
        )
        logger.info(
            f"Warning: {path}: the row of {row.stage_name}, step {row.step}, was changed after it "
            f"was written: it is not used; {then}"
        )
        return None

    return {name: [checked(row, name) for row in rows] for name, rows in rows_by_name.items()}


def _row_hash(row: ResultRow) -> str:
    return hashes.hash_json(row.to_json())


def parse(content: Any) -> dict[str, list[ResultRow]]:
    """The rows of the JSON of a results.json; an empty curve where it has rows alone.

    Raises:
        ValueError: it has another form.
    """
    if not isinstance(content, dict) or "rows" not in content:
        raise ValueError("it has no rows")
    if unknown := content.keys() - {"rows", "curve"}:
        # The name of a list with a damaged character; the list itself must not get lost.
        raise ValueError(f"{min(unknown)!r} is no list of rows")
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
    evaluations inside stages, rows of the same form. ROW_HASHES beside it ties each row to its
    weights. A row that was changed in the file is dropped. The end of its stage is evaluated again;
    a curve goes on without it.

    Raises:
        UserError: the file is damaged.
    """

    def __init__(self, path: epath.PathLike):
        self._path = epath.Path(path)

        def read_files() -> list[Any]:
            hashes_of_rows = read_row_hashes(self._path)
            return [_to_json(_read_rows(self._path, hashes_of_rows)), hashes_of_rows]

        content, hashes_of_rows = multihost.broadcast_from_main("results", read_files)
        # A changed row is None; the row of the repeated evaluation replaces it.
        self._content: dict[str, list[ResultRow | None]] = {
            name: [row and ResultRow.from_json(row) for row in rows]
            for name, rows in content.items()
        }
        # In a workdir of older code the weights of a row are unknown: "".
        self._weights_by_row = hashes_of_rows or {_row_hash(row): "" for row in self._all_rows()}

    def _all_rows(self) -> list[ResultRow]:
        return [*self.rows, *self.curve]

    @property
    def rows(self) -> list[ResultRow]:
        """The ends of stages, in the order in which they were first written."""
        return [row for row in self._content["rows"] if row]

    @property
    def curve(self) -> list[ResultRow]:
        """The evaluations inside stages."""
        return [row for row in self._content["curve"] if row]

    def is_of(self, row: ResultRow, weights_hash: str | None, may_be_unknown: bool = True) -> bool:
        """Whether a row is of the weights with this hash; None for any weights.

        Args:
            row: one of `rows` or `curve`.
            weights_hash: of the weights.
            may_be_unknown: accept a row of older code, whose weights are not known.
        """
        known = self._weights_by_row[_row_hash(row)]
        return weights_hash is None or known == weights_hash or (may_be_unknown and not known)

    def add(self, row: ResultRow, final: bool, weights_hash: str = "") -> None:
        """Adds a row, or replaces the one that it `replaces`, and writes the file.

        Args:
            row: the result.
            final: it is of the end of a stage.
            weights_hash: `variables_hash` of the evaluated weights; empty if unknown.
        """
        # With the row that is replaced: results.json is written later, and may stay as it is.
        known = {_row_hash(old) for old in self._all_rows()}
        weights_by_row = {k: v for k, v in self._weights_by_row.items() if k in known}
        self._weights_by_row = weights_by_row | {_row_hash(row): weights_hash}
        rows = self._content["rows" if final else "curve"]
        positions = [i for i, old in enumerate(rows) if old and row.replaces(old)]
        positions += [i for i, old in enumerate(rows) if old is None and final]
        if positions:
            rows[positions[0]] = row
        else:
            rows.append(row)
        if multihost.is_main():
            _write_json(self._path.parent / ROW_HASHES, self._weights_by_row)
        self._write()

    def _write(self) -> None:
        """Writes results.json, without the changed rows that no evaluation has replaced yet."""
        if multihost.is_main():
            _write_json(self._path, _to_json({"rows": self.rows, "curve": self.curve}))

    def remove(self, is_outdated: Callable[[ResultRow], bool]) -> None:
        """Removes the rows that are outdated, and writes the file if there were any.

        Args:
            is_outdated: returns whether to remove a row.
        """
        outdated = [row for row in (*self.rows, *self.curve) if is_outdated(row)]
        if not outdated:
            return
        for name, rows in self._content.items():
            self._content[name] = [row for row in rows if row not in outdated]
        self._write()


def _write_json(path: epath.Path, content: Any) -> None:
    write_bytes(path, (json.dumps(content, indent=1) + "\n").encode())


def _to_json(content: Mapping[str, Sequence[ResultRow | None]]) -> dict[str, list[Any]]:
    return {name: [row and row.to_json() for row in rows] for name, rows in content.items()}


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
    table = Table(box=box.SIMPLE_HEAD, title=escape(f"Results on {rows[0].split}, in %"))
    table.add_column("", no_wrap=True)
    for row in rows:
        table.add_column(row.stage_name, justify="right", no_wrap=True)
    table.add_row("mIoU", *(f"{row.miou_percent:.2f}" for row in rows), style="bold")
    if teacher:
        gains = (f"{100 * (row.miou - teacher.miou):+z.2f}" for row in rows)
        table.add_row("gain over the teacher", *gains, end_section=True)
    for i, name in enumerate(classes):
        values = [row.iou[i] for row in rows]
        table.add_row(escape(name), *("-" if v is None else f"{100 * v:.1f}" for v in values))
    console.print(table)
