"""Rules on the values that people write: config keys, flags, and the fields of model.json.

A rule has words for the error message. Files that only programs write have forms without words, see
`json_forms`.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

# A predicate on the value, and the values it accepts in words, as the error message gives them.
# A predicate may raise an exception for a value of another type; `accepts` returns False then.
Rule = tuple[Callable[[Any], bool], str]


def accepts(rule: Rule, value: Any) -> bool:
    """Returns whether a rule accepts a value of any type."""
    try:
        return rule[0](value)
    except (ArithmeticError, LookupError, TypeError, ValueError, AttributeError, RecursionError):
        return False  # A value of another type, such as "3" >= 1.


def one_of(*choices: str) -> Rule:
    """Accepts the given strings."""
    return lambda v: isinstance(v, str) and v in choices, f"one of {', '.join(choices)}"


def key_of(entries: Mapping[str, Any], *others: str) -> Rule:
    """Accepts the keys of a dict, also those that are added to it later, and other strings."""
    return (
        lambda v: isinstance(v, str) and (v in entries or v in others),
        f"one of {', '.join((*others, *entries))}",
    )


def keys_of(entries: Mapping[str, Any]) -> Rule:
    """Accepts tuples of distinct keys of a dict, also of those that are added to it later."""
    return (
        lambda v: isinstance(v, tuple) and len(set(v)) == len(v) and set(v) <= entries.keys(),
        f"a tuple of distinct names out of {', '.join(entries)}",
    )


def all_of(*choices: str) -> Rule:
    """Accepts tuples of distinct strings out of the given ones."""
    return (
        lambda v: isinstance(v, tuple) and len(set(v)) == len(v) and set(v) <= set(choices),
        f"a tuple of distinct names out of {', '.join(choices)}",
    )


def is_integer(value: Any, low: int, high: int) -> bool:
    """Returns whether a value is an int, not a bool, with low <= value <= high."""
    return type(value) is int and low <= value <= high


def is_number(value: Any, low: float, high: float) -> bool:
    """Returns whether a value is a finite int or float, not a bool, with low <= value <= high."""
    return type(value) in (int, float) and low <= value <= high and math.isfinite(value)


def is_finite(value: Any) -> bool:
    """Returns False for an infinite or NaN float, also inside a tuple; True for other values."""
    if isinstance(value, tuple):
        return all(map(is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def integer(low: int, high: int) -> Rule:
    """Accepts the integers from `low` to `high`."""
    return lambda v: is_integer(v, low, high), f"at least {low} and at most {high}, an integer"


def number(low: float, high: float) -> Rule:
    """Accepts the finite numbers from `low` to `high`."""
    return lambda v: is_number(v, low, high), f"at least {low} and at most {high:g}"


def below(low: float, high: float) -> Rule:
    """Accepts the numbers from `low` to `high`, but not `high` itself."""
    return (
        lambda v: is_number(v, low, high) and v != high,
        f"at least {low} and below {high}",
    )


def above(low: float, high: float) -> Rule:
    """Accepts the numbers from `low` to `high`, but not `low` itself."""
    return (
        lambda v: is_number(v, low, high) and v != low,
        f"at most {high:g} and above {low}",
    )


def or_none(rule: Rule) -> Rule:
    """Accepts None, and what the rule accepts."""
    return lambda v: v is None or accepts(rule, v), f"{rule[1]}, or leave it out"


def or_empty(rule: Rule, reason: str) -> Rule:
    """Accepts (), and what the rule accepts; `reason` says in the error message what () is for."""
    return lambda v: v == () or accepts(rule, v), f"{rule[1]}, or () {reason}"


def tuple_of(rule: Rule, words: str, shortest: int = 0, longest: int = 256) -> Rule:
    """Accepts tuples whose elements a rule accepts.

    Args:
        rule: of each element.
        words: what the error message says.
        shortest, longest: numbers of elements that are accepted.
    """

    def is_valid(value: Any) -> bool:
        return (
            isinstance(value, tuple)
            and shortest <= len(value) <= longest
            and all(accepts(rule, element) for element in value)
        )

    return is_valid, words


def pair(rule: Rule, words: str) -> Rule:
    """Accepts tuples of two elements that a rule accepts."""
    return tuple_of(rule, words, shortest=2, longest=2)


def is_text(value: Any) -> bool:
    """Returns whether a value is a string that may be a path."""
    # No operating system has paths with NUL.
    return isinstance(value, str) and "\0" not in value


TEXT: Rule = (is_text, "a string without NUL")
BOOL: Rule = (lambda v: type(v) is bool, "True or False")


def to_tuples(value: Any) -> Any:
    """Returns a JSON value with tuples instead of lists, as the rules expect them."""
    if isinstance(value, list | tuple):
        return tuple(map(to_tuples, value))
    if isinstance(value, dict):
        return {key: to_tuples(element) for key, element in value.items()}
    return value


def find(content: Any, key: str, absent: Any = None) -> Any:
    """Returns the value at a dotted key of nested dicts, `absent` if there is none."""
    for name in key.split("."):
        if not isinstance(content, dict) or name not in content:
            return absent
        content = content[name]
    return content


def violations(content: Any, rules: Mapping[str, Rule]) -> list[str]:
    """Returns a text such as "batch is 'x', not an integer" for each key that breaks its rule.

    Args:
        content: a JSON value, lists as tuples.
        rules: by dotted key.
    """
    absent = object()
    texts = []
    for key, rule in rules.items():
        value = find(content, key, absent)
        if value is absent:
            texts.append(f"it has no {key}")
        elif not accepts(rule, value):
            texts.append(f"{key} is {shortened(value)}, which is not {rule[1]}")
    return texts


def shortened(value: Any) -> str:
    """Returns the repr of a value, at most 80 characters."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to print integers of more than 4300 digits.
        return "a number of more than 4300 digits"
    return text if len(text) <= 80 else f"{text[:77]}..."
