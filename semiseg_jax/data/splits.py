"""Which images are labelled: lists as the community writes them, and seeded draws."""

import dataclasses
import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
from etils import epath

from semiseg_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Entry:
    """A line of a split list.

    Attributes:
        image: its path or bare id.
        mask: its mask's path, or None.
        without_mask: the line says None for the mask, rather than nothing.
    """

    image: str
    mask: str | None
    without_mask: bool = False


def read_list(path: epath.PathLike) -> tuple[Entry, ...]:
    """The entries of a split list, in order.

    One column (image or bare id) or two (image, mask), separated by TAB or spaces; CR, a byte
    order mark, blank lines, a leading "/" and a missing last newline do not matter; `None` in
    the second column is no mask.

    Raises:
        UserError: the list is missing, empty, or has a line of more than two columns.
    """
    path = epath.Path(path)
    if not path.exists() or path.is_dir():
        raise UserError(f"The split list {path} is missing: give a file that exists.")
    entries = []
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"The split list {path} is not UTF-8: save it as UTF-8.") from error
    for number, line in enumerate(text.splitlines(), 1):
        columns = line.split("\t") if "\t" in line else line.split()
        columns = [c.strip().removeprefix("/") for c in columns if c.strip()]
        if not columns:
            continue
        if len(columns) > 2:
            raise UserError(
                f"{path}, line {number}, has {len(columns)} columns: write an image and, after a "
                "TAB or a space, a mask or None."
            )
        mask = columns[1] if len(columns) == 2 else None
        entries.append(Entry(columns[0], None, True) if mask == "None" else Entry(columns[0], mask))
    if not entries:
        raise UserError(f"The split list {path} is empty: give one with at least one image.")
    return tuple(entries)


def draw(count: int, labels: float, seed: int) -> tuple[int, ...]:
    """Indices of the labelled among `count` training images, ascending; draws of a seed nest.

    Args:
        count: training images.
        labels: a number of them above 1, a share in (0, 1], or 0 for all.
        seed: of the order they are taken in.

    Raises:
        UserError: more labels than images, or a negative number.
    """
    wanted = count if labels == 0 else round(labels * count) if labels <= 1 else round(labels)
    if not 0 < wanted <= count:
        raise UserError(
            f"data.labels={labels:g} asks for {wanted} of {count} training images: give a count "
            f"from 2 to {count}, a share in (0, 1], or 0 for all."
        )
    order = np.random.Generator(np.random.PCG64(seed)).permutation(count)
    return tuple(sorted(order[:wanted].tolist()))


def split_hash(parts: Sequence[Iterable[str]]) -> str:
    """16 hex digits that name a split: the sorted ids of each part."""
    digest = hashlib.sha256()
    for ids in parts:
        digest.update("\n".join(sorted(ids)).encode() + b"\0")
    return digest.hexdigest()[:16]
