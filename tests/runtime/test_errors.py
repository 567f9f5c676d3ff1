import ast
import copy
import pathlib
import pickle
import re
from collections import Counter

import semiseg_jax
from semiseg_jax.runtime.errors import UserError, read_error, write_error
from tests.errors import raises_code

PACKAGE = pathlib.Path(semiseg_jax.__file__).parent


def user_error_codes():
    """Returns (place, node of the argument `code` or None) of every UserError in the package."""
    codes = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("UserError"):
                code = {keyword.arg: keyword.value for keyword in node.keywords}.get("code")
                codes.append((f"{path.relative_to(PACKAGE)}:{node.lineno}", code))
            elif isinstance(node, ast.Raise) and node.exc is not None:
                assert ast.unparse(node.exc) != "UserError", f"{path}:{node.lineno} has no sentence"
    return codes


def test_every_user_error_has_a_code_of_its_own():
    codes = user_error_codes()
    assert len(codes) > 100
    assert [place for place, code in codes if code is None] == []
    # Process 0 passes its error to the other processes, which raise it with the same code.
    forwarded = [place for place, code in codes if not isinstance(code, ast.Constant)]
    assert len(forwarded) == 1 and forwarded[0].startswith("runtime/multihost.py")
    literals = [code.value for _, code in codes if isinstance(code, ast.Constant)]
    assert [code for code in literals if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)+", code)] == []
    assert [code for code, count in Counter(literals).items() if count > 1] == []


def test_the_code_is_not_part_of_the_sentence():
    error = UserError("a.png is missing.", code="image-missing")
    for same in (error, copy.copy(error), pickle.loads(pickle.dumps(error))):
        assert str(same) == "a.png is missing." and same.code == "image-missing"
    assert UserError("Without a code.").code == ""


def test_files_that_cannot_be_read_or_written():
    with raises_code("path-unreadable", "a.json", "Permission denied", "make it readable"):
        raise read_error("a.json", PermissionError(13, "Permission denied"), "make it readable")
    with raises_code("path-unwritable", "a.json", "No space left on device"):
        raise write_error("a.json", OSError(28, "No space left on device"))
