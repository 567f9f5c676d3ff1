"""JSON of other forms than a reader expects, made from JSON of the right form."""

import copy
import functools
import json

# In place of any value: other types, and values that a reader may index, divide by or print.
REPLACEMENTS = (
    *(None, True, 0, -1, 3, 0.5, 10**30, 1e308, float("nan"), float("-inf")),
    *("", "x", "7", "$\\foo$", "../../x", "/x", "a\0b", "\ud800", [], {}, [[]], [3], {"x": 3}),
)
# In place of the whole file; the last two are no JSON.
TEXTS = ("null", "3", "[]", "{}", '"x"', "[" * 100_000, "", '{"')


def mutants(content, branches=3):
    """Yields texts that differ from the JSON of `content` in one place, or altogether.

    Args:
        content: as json.loads returns it.
        branches: how many values of each list and object are changed.
    """
    yield from TEXTS
    for path in _paths(content, branches):
        for value in REPLACEMENTS:
            yield json.dumps(_changed(content, path, functools.partial(_set, value=value)))
        yield json.dumps(_changed(content, path, lambda parent, key: parent.pop(key)))
        yield json.dumps(_changed(content, path, _twice))


def _paths(content, branches, path=()):
    if path:
        yield path
    if isinstance(content, dict):
        keys = list(content)[: branches if path else None]
    else:
        keys = range(len(content))[:branches] if isinstance(content, list) else ()
    for key in keys:
        yield from _paths(content[key], branches, (*path, key))


def _changed(content, path, change):
    changed = parent = copy.deepcopy(content)
    for key in path[:-1]:
        parent = parent[key]
    change(parent, path[-1])
    return changed


def _set(parent, key, *, value):
    parent[key] = value


def _twice(parent, key):
    """A list has a value once more, an object an unknown key."""
    if isinstance(parent, list):
        parent.append(parent[key])
    else:
        parent[f"{key}_"] = parent[key]
