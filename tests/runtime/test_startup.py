"""The start of JAX without a command, and the lines of a run in a notebook."""

import jax
import pytest
from rich import console

from semiseg_jax.runtime import logger, malloc, startup, xla


@pytest.mark.parametrize("on_cpu", [True, False])
def test_jax_starts_with_the_settings_of_the_commands(on_cpu, tmp_path, monkeypatch):
    calls = []
    for module, name in ((malloc, "disable_malloc_trim"), (xla, "force_cpu")):
        monkeypatch.setattr(module, name, lambda name=name: calls.append(name))
    monkeypatch.setattr(xla, "enable_compilation_cache", lambda folder: calls.append(folder))
    monkeypatch.setattr(xla, "runs_on_cpu", lambda: on_cpu)
    startup.start_jax(str(tmp_path))
    assert calls[-1] == tmp_path / "compiled"
    assert calls[:-1] == (["disable_malloc_trim", "force_cpu"] if on_cpu else [])
    assert jax.devices()


def test_a_notebook_shows_the_lines_of_a_run_as_text(monkeypatch):
    monkeypatch.setattr(console, "_is_jupyter", lambda: True)
    assert console.Console().is_jupyter and not logger.RunConsole().is_jupyter
