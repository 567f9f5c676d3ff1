"""Hashes by which files of a workdir are recognised, and damaged or exchanged ones found.

They protect against accidents: damaged disks, interrupted copies, files of another run. They are
no signatures: who wants to forge a file can compute its hash.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

# The key under which `sealed` stores the hash of the rest.
SEAL = "hash"


def hash_arrays(arrays: Mapping[str, Any]) -> str:
    """Returns a hash of names and bytes, 16 hex digits; the order of the mapping does not matter.

    Args:
        arrays: arrays by name; those on devices are copied to the host one at a time.
    """
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()[:16]


def hash_json(content: Any) -> str:
    """Returns a hash of a value that JSON can hold, 16 hex digits; the order of keys is free."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a JSON object with a hash of its content as one more entry."""
    return {**content, SEAL: hash_json(content)}


def is_intact(content: Mapping[str, Any]) -> bool:
    """Returns whether the hash of a JSON object is that of its content, or it has none."""
    rest = {key: value for key, value in content.items() if key != SEAL}
    return SEAL not in content or content[SEAL] == hash_json(rest)
