"""The forms of JSON files, which are checked where a file is read.

People edit and replace the files of a workdir. The reader of a file must reject valid JSON of
another form, because later code would fail at any place. A form is a function that returns whether
a value, as `json.loads` returns it, has the form (`rules` has predicates with words for the error
message, for values that people write):

    _FORM = record({"kept": list_of(is_name), "miou": optional(is_number)}, {"seed": is_integer})
    content = fileio.read_json(path, _FORM)
"""

import reprlib
from collections.abc import Callable, Mapping
from typing import Any

Form = Callable[[Any], bool]

# Larger numbers overflow in sums and in the axes of plots; no quantity of a run comes near.
_LARGEST = 1e100


def is_object(value: Any) -> bool:
    """Whether the value is a JSON object."""
    return isinstance(value, dict)


def is_flag(value: Any) -> bool:
    """Whether the value is true or false."""
    return isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether the value is a finite number; Python's JSON reader accepts NaN and Infinity too."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    # Integers may be too large for a float; comparisons of the two are exact.
    return -_LARGEST < value < _LARGEST


def is_integer(value: Any) -> bool:
    """Whether the value is a whole number of at most 63 bits."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def is_count(value: Any) -> bool:
    """Whether the value is a whole number of at least 0."""
    return is_integer(value) and value >= 0


def is_text(value: Any) -> bool:
    r"""Whether the value is text that can be encoded: JSON permits halves of pairs ("\ud800")."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def is_name(value: Any) -> bool:
    """Whether the value is a relative path that does not lead out of its folder."""
    if not is_text(value) or "\0" in value or len(value) > 4096:
        return False
    return all(part not in ("", ".", "..") for part in value.split("/"))


def optional(form: Form) -> Form:
    """The form of a value that may be null."""
    return lambda value: value is None or form(value)


def list_of(form: Form, lengths: range | None = None) -> Form:
    """The form of a list; `lengths` has the permitted numbers of its values."""

    def matches(value: Any) -> bool:
        is_list = isinstance(value, list) and (lengths is None or len(value) in lengths)
        return is_list and all(map(form, value))

    return matches


def mapping_of(form: Form, keys: Form = is_text) -> Form:
    """The form of an object with any number of keys, all of whose values have one form."""

    def matches(value: Any) -> bool:
        return isinstance(value, dict) and all(keys(k) and form(v) for k, v in value.items())

    return matches


def record(required: Mapping[str, Form], others: Mapping[str, Form] | None = None) -> Form:
    """The form of an object with named keys.

    Args:
        required: the form of each key that must be there.
        others: the form of each key that may be missing. Keys in neither are permitted.
    """
    forms = {**required, **(others or {})}

    def matches(value: Any) -> bool:
        if not isinstance(value, dict) or not value.keys() >= required.keys():
            return False
        return all(form(value[key]) for key, form in forms.items() if key in value)

    return matches


def both(first: Form, second: Form) -> Form:
    """The form of a value that has two forms; the second is checked only if the first holds."""
    return lambda value: first(value) and second(value)


def checked(
    content: Any, forms: Mapping[str, Form], defaults: Mapping[str, Any], name: str
) -> dict[str, Any]:
    """Returns the values of an object's keys, each of its form; other keys are left out.

    Args:
        content: the object.
        forms: the form of each key.
        defaults: the values of keys that may be missing.
        name: what the object is, for the message, such as "a row".

    Raises:
        ValueError: it is no object, a key is missing, or a value is of another form.
    """
    if not isinstance(content, dict):
        raise ValueError(f"{name} is {reprlib.repr(content)}")
    values = {**defaults, **{key: content[key] for key in forms if key in content}}
    if missing := forms.keys() - values.keys():
        raise ValueError(f"{name} has no {min(missing)}")
    for key, form in forms.items():
        if not form(values[key]):
            raise ValueError(f"{key} of {name} is {reprlib.repr(values[key])}")
    return values
