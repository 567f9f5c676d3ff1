"""The cache of compiled programs."""

import jax
import pytest

from semiseg_jax.runtime import xla

SETTINGS = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    """Without what the tests themselves set, and with it again afterwards."""
    before = {name: jax.config.values[name] for name in SETTINGS}
    for name in SETTINGS:
        monkeypatch.delenv(name.upper(), raising=False)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_programs_are_kept_in_the_folder(tmp_path):
    xla.enable_compilation_cache(tmp_path / "compiled")
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "compiled")
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 0.5


def test_the_folder_and_the_shortest_time_that_the_user_gave_jax_stay(tmp_path, monkeypatch):
    own, seconds = str(tmp_path / "own"), 7.0
    for name, value in zip(SETTINGS, (own, seconds), strict=True):
        # As JAX does when it is imported.
        monkeypatch.setenv(name.upper(), str(value))
        jax.config.update(name, value)
    xla.enable_compilation_cache(tmp_path / "compiled")
    assert jax.config.jax_compilation_cache_dir == own
    assert jax.config.jax_persistent_cache_min_compile_time_secs == seconds
    assert not (tmp_path / "compiled").exists()
