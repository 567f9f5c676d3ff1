"""The classes of annotations: names in id order, and the mask value of each label."""

import dataclasses
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

from semiseg_jax.data.annotations.record import BACKGROUND_LABEL, IGNORE_LABEL
from semiseg_jax.losses import IGNORE
from semiseg_jax.runtime.errors import UserError

# `--background=ignore`: pixels of no object have no label.
NO_BACKGROUND = "ignore"


@dataclasses.dataclass(frozen=True)
class Classes:
    """The classes of a data set.

    Attributes:
        names: in id order.
        background: the mask value of pixels of no object: a class id, or IGNORE.
        ids: the mask value of each label, of the labels that mean no class too.
    """

    names: tuple[str, ...]
    background: int
    ids: Mapping[str, int]


def resolve(
    labels: Sequence[str], used: Iterable[str], background: str, order: Sequence[str] = ()
) -> Classes:
    """Returns the classes of labels, which are matched by name.

    Args:
        labels: the labels in the order of their ids.
        used: the labels of objects, some of which may not be in `labels`.
        background: the class of pixels of no object; NO_BACKGROUND if they have none.
        order: names of all classes in id order, if they are given; the background may be missing.

    Raises:
        UserError: there is no class or there are too many, or an object has a label that `order`
            has not.
    """
    background = BACKGROUND_LABEL if background == NO_BACKGROUND else normal(background)
    has_background = background != BACKGROUND_LABEL
    special = {BACKGROUND_LABEL, IGNORE_LABEL}
    known = dict.fromkeys(n for n in map(normal, labels) if n not in special)
    used_names = sorted({normal(label) for label in used} - special)
    names = [n for n in dict.fromkeys([*known, *used_names]) if n != background]
    if has_background:
        names.insert(0, background)
    if order:
        given = list(dict.fromkeys(map(normal, order)))
        unknown = sorted({*used_names} - {*given, background})
        if unknown:
            raise UserError(
                f"Objects have the label {unknown[0]}, which --classes does not name: name every "
                "class, in the order of the ids.",
                code="label-not-in-classes",
            )
        names = given if background in given or not has_background else [background, *given]
    if not 2 <= len(names) <= IGNORE:
        raise UserError(
            f"The annotations have {len(names)} classes, background included, and masks hold from "
            f"2 to {IGNORE}: give --classes, or export fewer labels.",
            code="annotation-class-count",
        )
    ids = {name: i for i, name in enumerate(names)}
    value = ids[background] if has_background else IGNORE
    return Classes(tuple(names), value, {**ids, BACKGROUND_LABEL: value, IGNORE_LABEL: IGNORE})


def normal(label: str) -> str:
    """Returns a label as one line of UTF-8 can hold it, in one Unicode form."""
    encodable = label.encode("utf-8", "replace").decode()
    return unicodedata.normalize("NFC", " ".join(encodable.split()))


def differ_in_case(names: Sequence[str]) -> list[tuple[str, str]]:
    """Returns the pairs of names that differ in upper and lower case alone."""
    first: dict[str, str] = {}
    pairs = []
    for name in names:
        other = first.setdefault(name.casefold(), name)
        if other != name:
            pairs.append((other, name))
    return pairs
