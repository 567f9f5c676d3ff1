"""docs/library.ipynb as it is stored; test_notebook_slow.py executes it."""

import ast
import importlib
import json
import re
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[1] / "docs" / "library.ipynb"
MAX_LINES = 30
MAX_BYTES = 150_000


def cells(kind):
    content = json.loads(NOTEBOOK.read_text())
    return [cell for cell in content["cells"] if cell["cell_type"] == kind]


def code():
    return ["".join(cell["source"]) for cell in cells("code")]


def test_the_notebook_is_short():
    lines = [line for source in code() for line in source.splitlines() if line.strip()]
    assert 0 < len(lines) <= MAX_LINES
    assert all(len(line) <= 100 for line in lines)


def test_the_notebook_uses_public_names():
    nodes = [node for source in code() for node in ast.walk(ast.parse(source))]
    names = [node.attr for node in nodes if isinstance(node, ast.Attribute)]
    imports = [node for node in nodes if isinstance(node, ast.ImportFrom)]
    names += [alias.name for node in imports for alias in node.names]
    assert names and [name for name in names if name.startswith("_")] == []
    for node in imports:
        module = importlib.import_module(node.module)
        for alias in node.names:
            # A submodule is an attribute of its package once it is imported.
            if not hasattr(module, alias.name):
                importlib.import_module(f"{node.module}.{alias.name}")


def test_the_notebook_is_stored_with_its_pictures_and_without_errors():
    assert NOTEBOOK.stat().st_size <= MAX_BYTES
    outputs = [output for cell in cells("code") for output in cell["outputs"]]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"] == []
    # The cells were executed once each, from the first to the last.
    counts = [cell["execution_count"] for cell in cells("code")]
    assert counts == [*range(1, len(counts) + 1)]


@pytest.mark.parametrize("pattern", [r"\]\(([^)#]+)", r"`((?:configs|semiseg_jax)/[\w/.]+)`"])
def test_what_the_text_refers_to_is_there(pattern):
    text = "\n".join("".join(cell["source"]) for cell in cells("markdown"))
    targets = re.findall(pattern, text)
    assert targets
    for target in targets:
        assert any((folder / target).exists() for folder in (NOTEBOOK.parent, NOTEBOOK.parents[1]))
