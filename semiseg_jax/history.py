"""The scalars of a stage as lines of JSON: what TensorBoard gets, without its event files.

An event file holds the steps that a restart did again twice, and only TensorBoard reads it. Here a
step occurs once: what lies behind the checkpoint that a stage goes on from is dropped.
"""

import json
import math
from typing import Any

from etils import epath

from semiseg_jax import distributed
from semiseg_jax.data.labels import write_bytes
from semiseg_jax.errors import unread

FILE = "metrics.jsonl"


class History:
    """The scalars of one stage, kept on disk; the whole file is written again for every line."""

    def __init__(self, folder: epath.Path, first: int):
        """Takes up a stage's history.

        Args:
            folder: of the stage.
            first: the step that the stage goes on from; 0 for its beginning.
        """
        self._path = folder / FILE
        self._lines = [line for line in read(folder) if line["step"] <= first]

    def add(self, step: int, scalars: dict[str, float]) -> None:
        """Adds the scalars of a step, and writes."""
        # JSON has no word for what is not a number.
        finite = {k: v for k, v in scalars.items() if math.isfinite(v)}
        self._lines.append({"step": step, **finite})
        content = "".join(json.dumps(line) + "\n" for line in self._lines)
        if distributed.is_main():
            # Training does not wait for the disk; a damaged history is none (see `read`).
            write_bytes(self._path, content.encode(), sync=False)


def copy(source: epath.Path, folder: epath.Path) -> None:
    """Takes the history of another stage, where it has one, as that of this one."""
    if distributed.is_main() and (source / FILE).exists():
        write_bytes(folder / FILE, (source / FILE).read_bytes())


def read(folder: epath.Path) -> list[dict[str, Any]]:
    """The lines of a stage, in the order of its steps; none of a missing or damaged history.

    Raises:
        UserError: it may not be read.
    """
    path = folder / FILE
    try:
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    except OSError as error:
        raise unread(path, error, "make it readable") from error
    except ValueError:
        return []
