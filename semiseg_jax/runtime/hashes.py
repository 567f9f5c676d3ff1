"""Hashes that identify content, and that detect damaged or exchanged files of a workdir.

They protect against accidents: damaged disks, interrupted copies, files of another run. They are
no signatures: whoever forges a file can compute its hash.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from semiseg_jax.runtime import fileio
from semiseg_jax.runtime.errors import read_error

# Bytes of a file that are hashed at a time.
_BLOCK = 1 << 20
# The key under which `sealed` stores the hash of the rest.
SEAL = "hash"


def hash_bytes(content: bytes, digits: int = 16) -> str:
    """Returns the first hex digits of the SHA-256 of some bytes."""
    return hashlib.sha256(content).hexdigest()[:digits]


def hash_files(*files: epath.PathLike) -> str:
    """Returns the SHA-256 of the files, one after the other, in 64 hex digits.

    Raises:
        UserError: a file is not readable.
    """
    digest = hashlib.sha256()
    for file in files:
        try:
            fileio.require_regular(file)
            with epath.Path(file).open("rb") as content:
                while block := content.read(_BLOCK):
                    digest.update(block)
        except OSError as error:
            raise read_error(file, error, "make it readable") from error
    return digest.hexdigest()


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
    return hash_bytes(json.dumps(content, sort_keys=True).encode())


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a JSON object with a hash of its content as one more entry."""
    return {**content, SEAL: hash_json(content)}


def is_intact(content: Mapping[str, Any]) -> bool:
    """Returns whether the hash of a JSON object is that of its content, or it has none."""
    rest = {key: value for key, value in content.items() if key != SEAL}
    return SEAL not in content or content[SEAL] == hash_json(rest)
