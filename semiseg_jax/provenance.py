"""What a result or a file was made from: the hash of the config, and the version of the code."""

import functools
import hashlib
import subprocess
from pathlib import Path
from typing import Any

from semiseg_jax import __version__


def config_hash(config: Any) -> str:
    """16 hex digits that name a whole config, paths included."""
    return hashlib.sha256(config.to_json_best_effort(sort_keys=True).encode()).hexdigest()[:16]


@functools.cache
def code_version() -> str:
    """Such as "0.1.0+6ade258": the version, and the commit where this is a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short=12", "HEAD"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return __version__
    return f"{__version__}+{commit.stdout.strip()}"
