"""Split lists as the community writes them, and seeded draws of the labelled images."""

import dataclasses
import hashlib
import re
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from etils import epath

from semiseg_jax.runtime.errors import UserError, read_error

# `order` reads masks in chunks of this size.
MASKS_PER_CHUNK = 64


@dataclasses.dataclass(frozen=True)
class Entry:
    """A line of a split list.

    Attributes:
        image: path or bare id of the image.
        mask: path of the mask; None if the line names no mask.
        without_mask: whether the line has the word None in the mask column.
    """

    image: str
    mask: str | None
    without_mask: bool = False


def read_list(path: epath.PathLike) -> tuple[Entry, ...]:
    """Reads the entries of a split list, in order.

    A line has one column (image or bare id) or two (image, mask), separated by a TAB or by
    blanks; names that contain blanks require the TAB. The word None in the second column means
    no mask. CR, a byte order mark, blank lines, surrounding blanks, a leading "/" or "./",
    backslashes and a missing last newline are accepted.

    Raises:
        UserError: the list is missing, not readable, not UTF-8 or empty, or a line has more than
            two columns.
    """
    path = epath.Path(path)
    if not path.exists() or path.is_dir():
        raise UserError(
            f"The split list {path} is missing: give a file that exists.",
            code="split-list-missing",
        )
    entries = []
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise read_error(f"The split list {path}", error, "make it readable") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"The split list {path} is not UTF-8: save it as UTF-8.",
            code="split-list-encoding",
        ) from error
    for number, line in enumerate(re.split(r"\r\n|\r|\n", text), 1):
        line = line.strip()
        columns = re.split(r"\s*\t\s*", line) if "\t" in line else line.split()
        columns = [re.sub(r"^(\./|/)+", "", c.replace("\\", "/")) for c in columns]
        if not columns:
            continue
        if len(columns) > 2:
            raise UserError(
                f"{path}, line {number}, has {len(columns)} columns: write an image and, after a "
                "TAB or a blank, a mask or None; with blanks in a name only a TAB separates.",
                code="split-list-columns",
            )
        mask = columns[1] if len(columns) == 2 else None
        entries.append(Entry(columns[0], None, True) if mask == "None" else Entry(columns[0], mask))
    if not entries:
        raise UserError(
            f"The split list {path} is empty: give one with at least one image.",
            code="split-list-empty",
        )
    return tuple(entries)


def draw(
    count: int,
    labels: float,
    seed: int,
    classes_of: Callable[[Sequence[int]], Iterable[frozenset[int]]] | None = None,
    num_classes: int = 0,
) -> tuple[int, ...]:
    """Draws the labelled images among `count` training images.

    A smaller draw is a subset of a larger draw with the same seed.

    Args:
        count: number of training images.
        labels: number of labelled images above 1, fraction in (0, 1], or 0 for all.
        seed: seed of the order of the draws.
        classes_of, num_classes: as in `order`, so that every class is drawn early.

    Returns:
        Indices of the labelled images, ascending.

    Raises:
        UserError: `labels` is negative or exceeds `count`.
    """
    num_labeled = number(count, labels, "data.labels") if labels else count
    if num_labeled == count:
        return tuple(range(count))
    return tuple(sorted(order(count, seed, classes_of, num_classes)[:num_labeled]))


def number(count: int, amount: float, key: str) -> int:
    """Returns a number of images that is given as a number above 1 or a fraction in (0, 1].

    Args:
        count: number of all images.
        amount: the number or fraction.
        key: the config key of `amount`, for the error message.

    Raises:
        UserError: the result is 0 or exceeds `count`.
    """
    images = round(amount * count) if amount <= 1 else round(amount)
    if not 0 < images <= count:
        raise UserError(
            f"{key}={amount:g} asks for {images} of {count} training images: give a count from 2 "
            f"to {count}, a share in (0, 1], or 0 for {'all' if key == 'data.labels' else 'none'}.",
            code="subset-size-invalid",
        )
    return images


def order(
    count: int,
    seed: int,
    classes_of: Callable[[Sequence[int]], Iterable[frozenset[int]]] | None = None,
    num_classes: int = 0,
) -> list[int]:
    """Returns the order in which images are drawn: a seeded permutation with every class early.

    Let m be the length of the shortest prefix of the permutation that contains all classes. A
    draw of m or more images is a plain random draw. Within the prefix, images are reordered
    greedily: the image that adds the most missing classes is first. So smaller draws contain many
    classes, and every draw is a subset of each larger draw.

    Args:
        count: number of images.
        seed: seed of the permutation.
        classes_of: returns the classes in the images of given indices; called in the order of the
            permutation until all classes are found. None: the plain permutation.
        num_classes: number of classes; if no image contains some class, all images are read.
    """
    permutation = np.random.Generator(np.random.PCG64(seed)).permutation(count).tolist()
    if classes_of is None:
        return permutation
    classes: dict[int, frozenset[int]] = {}
    seen: set[int] = set()
    prefix_length = 0
    for start in range(0, count, MASKS_PER_CHUNK):
        chunk = permutation[start : start + MASKS_PER_CHUNK]
        for offset, (index, present) in enumerate(zip(chunk, classes_of(chunk), strict=True)):
            if not present <= seen:
                seen |= present
                prefix_length = start + offset + 1
            classes[index] = present
        if len(seen) == num_classes:
            break
    rest, missing, first = permutation[:prefix_length], set(seen), []
    while missing:
        # Among equally good images, `max` returns the earliest in the permutation.
        best = max(rest, key=lambda index: len(classes[index] & missing))
        rest.remove(best)
        first.append(best)
        missing -= classes[best]
    return first + rest + permutation[prefix_length:]


def split_hash(sets: Sequence[Iterable[str]]) -> str:
    """Returns a hash of 16 hex digits of the ids in each set, independent of their order."""
    digest = hashlib.sha256()
    for ids in sets:
        digest.update("\n".join(sorted(ids)).encode() + b"\0")
    return digest.hexdigest()[:16]
