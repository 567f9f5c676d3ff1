"""docs/library.ipynb, executed in a kernel of its own, in a folder like the repository."""

import pytest

from tests import FAST_COMPILATION, notebook

pytestmark = pytest.mark.slow

ROOT = notebook.NOTEBOOK.parents[1]


def test_the_notebook_runs(tmp_path, monkeypatch):
    # The kernel writes the run beside docs/.
    for name in ("semiseg_jax", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "docs").mkdir()
    monkeypatch.setenv("SEMISEG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    # Those of the tests' process simulate devices, over which the batches would be divided.
    monkeypatch.setenv("XLA_FLAGS", FAST_COMPILATION)
    # Every call of the notebook, with less work in it.
    fewer = {
        "= 100, 50": "= 8, 4",
        "keep_confidence = True": "update({'keep_confidence': True, 'scales': (1.0,)})",
    }
    cells = notebook.execute(tmp_path / "docs", fewer).cells
    _, train, look, predict = [cell.outputs for cell in cells if cell.cell_type == "code"]
    assert "student 1" in train[-1]["data"]["text/plain"]
    # The lines of the run are visible while it works.
    assert "16 labelled, 104 unlabelled" in train[0]["text"]
    assert any("image/png" in output.get("data", {}) for output in look)
    shapes = "".join(predict[-1]["data"]["text/plain"].split())
    assert shapes.startswith("((96,160),(64,100),(96,160,")
    assert (tmp_path / "runs" / "library" / "report.html").exists()
