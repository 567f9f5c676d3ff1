"""results.json: a row for every evaluation that is reported, and the table made from them."""

import json
from collections.abc import Sequence
from typing import Any

from etils import epath
from rich import box
from rich.console import Console
from rich.table import Table

from semiseg_jax import distributed, metrics
from semiseg_jax.data.labels import write_bytes
from semiseg_jax.data.streams import stage_name
from semiseg_jax.errors import UserError, unread
from semiseg_jax.evaluate import Score, comparable

Row = dict[str, Any]
# What tells one row from another, beside the protocol; a row made again takes the old one's place.
KEY = ("stage", "round", "step", "seed")


def read(path: epath.Path) -> dict[str, list[Row]]:
    """The content of a results.json (see `Results`); empty where there is none.

    Raises:
        UserError: the file is damaged.
    """
    if not path.exists():
        return {"rows": [], "curve": []}
    try:
        return content(json.loads(path.read_text()))
    except OSError as error:
        raise unread(path, error, "make it readable") from error
    except ValueError as error:
        raise UserError(
            f"{path} cannot be read ({error}): remove it, and start again to evaluate every stage "
            "anew."
        ) from error


def content(found: Any) -> dict[str, list[Row]]:
    """What a results.json holds; no curve where it has rows alone.

    Raises:
        ValueError: it is of another form.
    """
    if not isinstance(found, dict) or "rows" not in found:
        raise ValueError("it has no rows")
    kept = {"rows": found["rows"], "curve": found.get("curve", [])}
    for name, rows in kept.items():
        if not (isinstance(rows, list) and all(map(_is_row, rows))):
            raise ValueError(f"its {name} are no result rows")
    return kept


def _is_row(found: Any) -> bool:
    needed = {*KEY, "protocol", "miou", "iou"}  # What every table and figure reads.
    return (
        isinstance(found, dict) and found.keys() >= needed and isinstance(found["protocol"], dict)
    )


class Results:
    """The rows of a workdir, kept on disk; holds no clock times, so that reruns are identical.

    The file is {"rows": [...], "curve": [...]}: `rows` has the end of each stage, `curve` the
    evaluations inside stages, rows of the same form.

    Raises:
        UserError: the file is damaged.
    """

    def __init__(self, path: epath.PathLike):
        self._path = epath.Path(path)
        self._content: dict[str, list[Row]] = distributed.agree("results", lambda: read(self._path))

    @property
    def rows(self) -> list[Row]:
        """The ends of stages, in the order they were first written."""
        return self._content["rows"]

    @property
    def curve(self) -> list[Row]:
        """The evaluations inside stages."""
        return self._content["curve"]

    def add(self, row: Row, final: bool) -> None:
        """Adds a row, or puts it in the place of that of the same KEY and protocol, and writes."""
        rows = self._content["rows" if final else "curve"]
        same = [
            i
            for i, old in enumerate(rows)
            if all(old[k] == row[k] for k in KEY) and comparable(old["protocol"], row["protocol"])
        ]
        if same:
            rows[same[0]] = row
        else:
            rows.append(row)
        if distributed.is_main():
            write_bytes(self._path, (json.dumps(self._content, indent=1) + "\n").encode())


def make_row(
    stage: str,
    round_: int,
    step: int,
    seed: int,
    score: Score,
    protocol: Row,
    weights_step: int | None = None,
) -> Row:
    """A result row; mIoU and IoU in 0..1, null for a class that never occurs.

    `step` is where the stage stood, and `weights_step` which step's weights were evaluated: the
    same one, but at the end of a stage whose weights were chosen (`eval.select`).
    """
    return {
        "stage": stage,
        "round": round_,
        "step": step,
        "weights_step": step if weights_step is None else weights_step,
        "split": protocol["split"],
        "miou": score.miou,
        "iou": score.iou,
        "pixel_accuracy": metrics.pixel_accuracy(score.confusion),
        "mean_class_accuracy": metrics.mean_class_accuracy(score.confusion),
        "pixels": score.pixels,
        "seed": seed,
        "protocol": protocol,
    }


def print_table(rows: Sequence[Row], classes: Sequence[str], console: Console) -> None:
    """A column a stage: mIoU, its gain over the teacher, IoU by class; in percent.

    Raises:
        ValueError: the rows are of different protocols.
    """
    if not rows:
        return
    if not all(comparable(row["protocol"], rows[0]["protocol"]) for row in rows):
        raise ValueError("rows of different protocols do not belong into one table")
    split, teacher = rows[0]["split"], next((r for r in rows if r["stage"] == "teacher"), None)
    table = Table(box=box.SIMPLE_HEAD, title=f"Results on {split}, in %")
    table.add_column("", no_wrap=True)
    for row in rows:
        table.add_column(stage_name(row["stage"], row["round"]), justify="right", no_wrap=True)
    table.add_row("mIoU", *(f"{100 * row['miou']:.2f}" for row in rows), style="bold")
    if teacher:
        gains = (f"{100 * (row['miou'] - teacher['miou']):+z.2f}" for row in rows)
        table.add_row("gain over the teacher", *gains, end_section=True)
    for i, name in enumerate(classes):
        values = [row["iou"][i] for row in rows]
        table.add_row(name, *("-" if v is None else f"{100 * v:.1f}" for v in values))
    console.print(table)
