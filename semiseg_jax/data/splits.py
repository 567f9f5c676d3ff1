"""Which images are labelled: lists as the community writes them, and seeded draws.

    python -m semiseg_jax.data.splits --labeled=F --unlabeled=F --val=F [--root=DIR]
    python -m semiseg_jax.data.splits --config=configs/folder.py

looks for what would corrupt an experiment: in such lists, with --root also in the files that they
name; or in the data of a config (see `doctor`). Exit status 1 where it found something.
"""

import dataclasses
import hashlib
import re
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from etils import epath

from semiseg_jax.errors import UserError, unread

# Masks read at a time while looking for images of each class.
CHUNK = 64


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

    One column (image or bare id) or two (image, mask), separated by a TAB or by blanks; names
    that hold blanks need the TAB. CR, a byte order mark, blank lines, blanks around, a leading
    "/" or "./", backslashes and a missing last newline do not matter; `None` in the second column
    is no mask.

    Raises:
        UserError: the list is missing, empty, or has a line of more than two columns.
    """
    path = epath.Path(path)
    if not path.exists() or path.is_dir():
        raise UserError(f"The split list {path} is missing: give a file that exists.")
    entries = []
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise unread(f"The split list {path}", error, "make it readable") from error
    except UnicodeDecodeError as error:
        raise UserError(f"The split list {path} is not UTF-8: save it as UTF-8.") from error
    for number, line in enumerate(re.split(r"\r\n|\r|\n", text), 1):
        line = line.strip()
        columns = re.split(r"\s*\t\s*", line) if "\t" in line else line.split()
        columns = [re.sub(r"^(\./|/)+", "", c.replace("\\", "/")) for c in columns]
        if not columns:
            continue
        if len(columns) > 2:
            raise UserError(
                f"{path}, line {number}, has {len(columns)} columns: write an image and, after a "
                "TAB or a blank, a mask or None; with blanks in a name only a TAB separates."
            )
        mask = columns[1] if len(columns) == 2 else None
        entries.append(Entry(columns[0], None, True) if mask == "None" else Entry(columns[0], mask))
    if not entries:
        raise UserError(f"The split list {path} is empty: give one with at least one image.")
    return tuple(entries)


def draw(
    count: int,
    labels: float,
    seed: int,
    classes_of: Callable[[Sequence[int]], Iterable[frozenset[int]]] | None = None,
    num_classes: int = 0,
) -> tuple[int, ...]:
    """Indices of the labelled among `count` training images, ascending; draws of a seed nest.

    Args:
        count: training images.
        labels: a number of them above 1, a share in (0, 1], or 0 for all.
        seed: of the order they are taken in.
        classes_of, num_classes: as in `order`, which sees to it that each class is drawn.

    Raises:
        UserError: more labels than images, or a negative number.
    """
    wanted = number(count, labels, "data.labels") if labels else count
    if wanted == count:
        return tuple(range(count))
    return tuple(sorted(order(count, seed, classes_of, num_classes)[:wanted]))


def number(count: int, wanted: float, key: str) -> int:
    """How many of `count` images a number above 1, or a share in (0, 1], asks for.

    Raises:
        UserError: naming the key, for none of them or more than there are.
    """
    images = round(wanted * count) if wanted <= 1 else round(wanted)
    if not 0 < images <= count:
        raise UserError(
            f"{key}={wanted:g} asks for {images} of {count} training images: give a count from 2 "
            f"to {count}, a share in (0, 1], or 0 for {'all' if key == 'data.labels' else 'none'}."
        )
    return images


def order(
    count: int,
    seed: int,
    classes_of: Callable[[Sequence[int]], Iterable[frozenset[int]]] | None = None,
    num_classes: int = 0,
) -> list[int]:
    """The order in which images are drawn: a seeded permutation, with every class early.

    Let m be the shortest beginning of the permutation with all classes. Whoever draws m images or
    more gets a plain random draw. Within that beginning the images that bring the most classes
    which are still missing come first, so that smaller draws have as many classes as they can,
    and all draws nest.

    Args:
        count: images.
        seed: of the permutation.
        classes_of: the classes in the images of given indices; asked in the permutation's order
            until all are seen. None: the permutation alone.
        num_classes: classes there are; one that no image has makes all images be looked at.
    """
    permutation = np.random.Generator(np.random.PCG64(seed)).permutation(count).tolist()
    if classes_of is None:
        return permutation
    classes: dict[int, frozenset[int]] = {}
    seen: set[int] = set()
    beginning = 0
    for start in range(0, count, CHUNK):
        chunk = permutation[start : start + CHUNK]
        for place, (index, present) in enumerate(zip(chunk, classes_of(chunk), strict=True)):
            if not present <= seen:
                seen |= present
                beginning = start + place + 1
            classes[index] = present
        if len(seen) == num_classes:
            break
    rest, missing, first = permutation[:beginning], set(seen), []
    while missing:
        # Of several that bring as many, `max` takes the earliest of the permutation.
        best = max(rest, key=lambda index: len(classes[index] & missing))
        rest.remove(best)
        first.append(best)
        missing -= classes[best]
    return first + rest + permutation[beginning:]


def split_hash(parts: Sequence[Iterable[str]]) -> str:
    """16 hex digits that name a split: the sorted ids of each part."""
    digest = hashlib.sha256()
    for ids in parts:
        digest.update("\n".join(sorted(ids)).encode() + b"\0")
    return digest.hexdigest()[:16]


if __name__ == "__main__":
    # Here, because it reads lists with this module.
    from semiseg_jax.data.doctor import run

    run()
