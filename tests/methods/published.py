"""The fixtures: what the authors' code computes from `arrays.py`; see `make_fixtures.py`."""

import functools
import json
import pathlib

import numpy as np

FOLDER = pathlib.Path(__file__).parent / "fixtures"


@functools.cache
def fixture(name):
    """The numbers of a repository."""
    return json.loads((FOLDER / f"{name}.json").read_text())


def sample(array):
    """The values that a fixture has of an array [n, h, w] or [n, h, w, c]: every 41st."""
    return np.ravel(array)[::41]
