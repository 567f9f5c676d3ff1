"""Slow tests are left out after the time that .ci/run gives them, and no others."""

import time
import types

import pytest

from tests import conftest


def begins(monkeypatch, deadline, marker):
    """Whether a test with the marker begins at a deadline so many seconds from now."""
    monkeypatch.setenv("SEMISEG_TEST_DEADLINE", str(time.time() + deadline))
    item = types.SimpleNamespace(get_closest_marker=lambda name: name == marker)
    try:
        conftest.pytest_runtest_setup(item)
    except pytest.skip.Exception:
        return False
    return True


def test_slow_tests_begin_before_the_deadline_alone(monkeypatch):
    assert begins(monkeypatch, 60, "slow") and not begins(monkeypatch, -60, "slow")
    assert begins(monkeypatch, -60, "")


def test_without_a_deadline_all_begin(monkeypatch):
    monkeypatch.delenv("SEMISEG_TEST_DEADLINE", raising=False)
    conftest.pytest_runtest_setup(types.SimpleNamespace(get_closest_marker=lambda name: True))
