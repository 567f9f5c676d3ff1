"""No file outside of methods/ names a method: the engine does not know which one runs."""

import re
from pathlib import Path

from semiseg_jax.methods import registry
from semiseg_jax.methods.method import OnlineMethod

PACKAGE = Path(registry.__file__).parents[1]
ONLINE = [name for name, cls in registry.METHODS.items() if issubclass(cls, OnlineMethod)]


def test_the_engine_names_no_method():
    # As keys are written; papers are cited by their names.
    names = re.compile(rf"\b({'|'.join(ONLINE)})\b")
    found = {
        f"{path.relative_to(PACKAGE)}: {match.group()}"
        for path in PACKAGE.rglob("*.py")
        if path.parent.name != "methods"
        for match in names.finditer(path.read_text())
    }
    assert not found
