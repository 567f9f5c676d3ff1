"""Checks which UserError was raised by its code, so that its sentence may be reworded."""

import contextlib
from collections.abc import Iterator

import pytest

from semiseg_jax.runtime.errors import UserError


@contextlib.contextmanager
def raises_code(code: str, *parts: str) -> Iterator[pytest.ExceptionInfo[UserError]]:
    """Expects a UserError of this code, whose sentence contains each of `parts`.

    Args:
        code: the error's `code`.
        parts: what the sentence must name in this case, such as a file, a key or a number.
    """
    with pytest.raises(UserError) as error:
        yield error
    sentence = str(error.value)
    assert error.value.code == code, sentence
    missing = [part for part in parts if part not in sentence]
    assert not missing, f"{missing} not in: {sentence}"
