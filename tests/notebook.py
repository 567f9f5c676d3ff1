"""Executes docs/library.ipynb; python -m tests.notebook, or make notebook, stores its outputs."""

from collections.abc import Mapping
from pathlib import Path

import nbclient
import nbformat

NOTEBOOK = Path(__file__).parents[1] / "docs" / "library.ipynb"


def execute(folder: Path, replaced: Mapping[str, str] | None = None) -> nbformat.NotebookNode:
    """Returns the notebook with the outputs of a kernel of its own.

    Args:
        folder: that the kernel works in.
        replaced: what is replaced in the code, each by its value; each occurs once.
    """
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for old, new in (replaced or {}).items():
        (cell,) = (c for c in notebook.cells if c.cell_type == "code" and old in c.source)
        cell.source = cell.source.replace(old, new)
    nbclient.NotebookClient(
        notebook,
        timeout=900,
        resources={"metadata": {"path": str(folder)}},
        # Clock times would make each execution another file.
        record_timing=False,
        coalesce_streams=True,
    ).execute()
    return notebook


if __name__ == "__main__":
    nbformat.write(execute(NOTEBOOK.parent), NOTEBOOK)
