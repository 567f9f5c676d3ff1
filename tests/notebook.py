"""Executes docs/library.ipynb; python -m tests.notebook, or make notebook, stores its outputs."""

from pathlib import Path

import nbclient
import nbformat

NOTEBOOK = Path(__file__).parents[1] / "docs" / "library.ipynb"


def execute(folder: Path) -> nbformat.NotebookNode:
    """Returns the notebook with the outputs of a kernel of its own, which works in a folder."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
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
