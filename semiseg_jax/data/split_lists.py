"""Split lists as the community writes them, and seeded draws of the labelled images."""

import csv
import dataclasses
import hashlib
import os
import re
import unicodedata
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
        image: path or bare id of the image, without a leading "/".
        mask: path of the mask, without a leading "/"; None if the line names no mask.
        without_mask: whether the line has the word None in the mask column.
        absolute_image, absolute_mask: the path of the image and of the mask as an absolute path;
            "" if the line has another kind of path.
    """

    image: str
    mask: str | None
    without_mask: bool = False
    absolute_image: str = dataclasses.field(default="", compare=False)
    absolute_mask: str = dataclasses.field(default="", compare=False)


def read_list(path: epath.PathLike) -> tuple[Entry, ...]:
    """Reads the entries of a split list, in order.

    A line has one column (image or bare id) or two (image, mask), separated by a TAB, a comma, a
    semicolon or blanks; names that contain blanks require another separator. The word None in the
    second column means no mask. CR, a byte order mark, blank lines, surrounding blanks, a leading
    "/" or "./", backslashes, a missing last newline, quoted names and a first line with the titles
    of comma-separated columns are accepted.

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
    # A TAB at the end stays: it says that the name before it may contain blanks.
    lines = [line.lstrip().rstrip(" ") for line in re.split(r"\r\n|\r|\n", text)]
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line]
    if _has_titles([line for _, line in numbered]):
        numbered = numbered[1:]
    for number, line in numbered:
        columns = [column.replace("\\", "/") for column in _columns(line)]
        if len(columns) > 2:
            raise UserError(
                f"{path}, line {number}, has {len(columns)} columns: write an image and, after a "
                "TAB or a blank, a mask or None; after a name that contains blanks, a TAB.",
                code="split-list-columns",
            )
        absolute = [_as_absolute(column) for column in columns] + [""]
        columns = [re.sub(r"^(\./|/)+", "", column) for column in columns]
        mask = columns[1] if len(columns) == 2 else None
        if mask == "None":
            entries.append(Entry(columns[0], None, True, absolute[0]))
        else:
            entries.append(Entry(columns[0], mask, False, *absolute[:2]))
    if not entries:
        raise UserError(
            f"The split list {path} is empty: give one with at least one image.",
            code="split-list-empty",
        )
    return tuple(entries)


# The ending of a file, as opposed to a dot in a name.
_ENDING = re.compile(r"\.(png|jpe?g|jfif|gif|webp|bmp|tiff?|p[bgnp]m)$", re.IGNORECASE)


def _columns(line: str) -> list[str]:
    """Returns the columns of a line.

    A name may contain commas. So a comma or a semicolon separates only after the ending of a file,
    and before another file or the word None, which may also follow a bare id.
    """
    if "\t" in line:
        first, *others = re.split(r"\s*\t\s*", line)
        return [first, *others] if any(others) else [first]
    for separator in ",;":
        first, *others = _parts(line, separator)
        if others and (
            others[0] == "None"
            or (_ENDING.search(first) and (not others[0] or _ENDING.search(others[0])))
        ):
            # An empty column at the end names no mask.
            return [first, *others] if any(others) else [first]
    return line.split()


def _parts(line: str, separator: str) -> list[str]:
    """Returns the parts of a line between separators, without their quotes."""
    if '"' in line:
        return [part.strip() for part in next(csv.reader([line], delimiter=separator))]
    return [part.strip() for part in line.split(separator)]


def _has_titles(lines: Sequence[str]) -> bool:
    """Returns whether the first line holds the titles of two comma-separated columns, not files."""
    if len(lines) < 2 or "\t" in lines[0]:
        return False
    for separator in ",;":
        titles, files = _parts(lines[0], separator), _parts(lines[1], separator)
        if len(titles) == len(files) == 2 and _columns(lines[1])[0] == files[0]:
            return "None" not in titles and not any(map(_ENDING.search, titles))
    return False


def _as_absolute(path: str) -> str:
    """Returns a path that is absolute here or on Windows, or in the home folder; "" for others."""
    is_absolute = re.match(r"/|~/|[A-Za-z]:/", path)
    return os.path.expanduser(path) if is_absolute else ""


def locate(root: epath.Path, path: str, absolute: str = "") -> epath.Path:
    """Returns the file of an image or a mask that a list names; it may be missing.

    An absolute path is taken as such if its file exists. Many lists begin paths below the root
    with "/", so a file below the root is next. If there is none, an absolute path is still taken
    as such if its folder exists; the file is then missing.

    Args:
        root: the folder that the paths in the list are relative to.
        path: `Entry.image` or `Entry.mask`.
        absolute: `Entry.absolute_image` or `Entry.absolute_mask`.
    """
    below_root = _existing_form(root, path)
    if not absolute:
        return below_root
    as_written = _existing_form(epath.Path("/"), absolute)
    if as_written.exists():
        return as_written
    folder = as_written.parent
    is_here = folder.is_dir() and folder != folder.parent
    return as_written if is_here and not below_root.exists() else below_root


def _existing_form(root: epath.Path, path: str) -> epath.Path:
    """Returns a path below a root in the Unicode form that exists; as it is if none does."""
    if path.isascii():
        return root / path
    forms = [path, *(unicodedata.normalize(form, path) for form in ("NFC", "NFD"))]
    return next((root / form for form in forms if (root / form).exists()), root / path)


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
    if 0 < images <= count:
        return images
    # One image must remain to train on.
    most = count - 1 if key == "data.holdout" else count
    counts = f"a count from 2 to {most}, " if most > 2 else "the count 2, " if most == 2 else ""
    raise UserError(
        f"{key}={amount:g} asks for {images} of {count} training images: give {counts}a share of "
        f"at least {1 / count:.2g}, or 0 for {'all' if key == 'data.labels' else 'none'}.",
        code="subset-size-invalid",
    )


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
