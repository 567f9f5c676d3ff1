"""Warnings about image and mask files that are read, but perhaps not as their author meant.

A set of files has one warning of each kind, with the number of files and the first of them.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from concurrent import futures

from etils import epath

from semiseg_jax.data import image_io
from semiseg_jax.data.dataset import Example
from semiseg_jax.runtime import multihost
from semiseg_jax.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class _Header:
    """The header of a file.

    Attributes:
        size: (height, width) of the upright image in pixels.
        orientation: the EXIF orientation, 1..8; 1 if there is none.
        has_further_frames: whether the file holds pages or frames that are not read.
        polarity_is_unsure: whether 0 is declared to be white, and the file does not tell whether
            its writer inverted the values for it.
    """

    size: tuple[int, int]
    orientation: int
    has_further_frames: bool
    polarity_is_unsure: bool


# The kinds of warnings, in their order.
_KINDS = ("orientation", "frames", "polarity")


def find(examples: Sequence[Example]) -> list[str]:
    """Returns the warnings about the files of examples; reads only the headers of the files.

    Each process reads its shard of the examples, and all processes must call the function. Files
    that cannot be read are left to the functions that decode them.
    """
    indices = multihost.local_shard(range(len(examples)))
    with futures.ThreadPoolExecutor() as pool:
        local = zip(indices, pool.map(lambda i: _check_files(examples[i]), indices), strict=True)
        unusual = [(index, files) for index, files in local if files]
    gathered = itertools.chain(*multihost.all_gather("headers read", unusual))
    in_order = [files for _, files in sorted(gathered, key=lambda item: item[0])]
    by_kind = {kind: [f[kind] for f in in_order if kind in f] for kind in _KINDS}
    return [_sentence(kind, files) for kind, files in by_kind.items() if files]


def _check_files(example: Example) -> dict[str, str]:
    """Returns the files of an example that need a warning, by its kind; one file of each kind."""
    image = _read_header(example.image)
    mask = _read_header(example.mask) if example.mask is not None else None
    file_by_kind = {}
    if image is not None and mask is not None and _orientation_is_unsure(image, mask):
        file_by_kind["orientation"] = example.image
    for header, path in ((image, example.image), (mask, example.mask)):
        if header is not None and header.has_further_frames:
            file_by_kind["frames"] = str(path)
    if mask is not None and mask.polarity_is_unsure:
        file_by_kind["polarity"] = str(example.mask)
    return file_by_kind


def _orientation_is_unsure(image: _Header, mask: _Header) -> bool:
    """Returns whether the sizes do not tell if the mask lies over the image as stored or turned.

    If only one of them carries an orientation, that one is turned upright and the other is not.
    A program that ignores EXIF then has drawn the mask over the image as it is stored. Sides that
    are swapped show this in the sizes, unless they are equal.
    """
    if (image.orientation == 1) == (mask.orientation == 1):
        return False
    height, width = image.size
    turned = max(image.orientation, mask.orientation)
    return image.size == mask.size and (turned < 5 or height == width)


def _read_header(path: epath.PathLike) -> _Header | None:
    try:
        with image_io.open_header(path) as file:
            return _Header(
                size=file.size,
                orientation=file.orientation,
                polarity_is_unsure=file.shows_zero_as_white and not file.is_by_tifffile,
                # Last, because it may leave the file at another page.
                has_further_frames=file.has_further_frames,
            )
    except UserError:
        return None


def _sentence(kind: str, files: Sequence[str]) -> str:
    """Returns the warning about the files of a kind."""
    is_one, first = len(files) == 1, files[0]
    match kind:
        case "orientation":
            subject = (
                f"{first} carries" if is_one else f"{len(files):,} images ({first} first) carry"
            )
            return (
                f"{subject} an EXIF orientation and the mask none, or the other way round: a file "
                "with an orientation is turned upright, the other is read as it is stored. If the "
                "masks were drawn over the unturned images, remove the orientation from the images."
            )
        case "frames":
            subject = f"{first} holds" if is_one else f"{len(files):,} files ({first} first) hold"
            return (
                f"{subject} several pages or frames, of which only the first is read: split them "
                "into files if the others are wanted."
            )
        case _:
            subject = (
                f"{first} is a TIFF"
                if is_one
                else f"{len(files):,} masks ({first} first) are TIFFs"
            )
            return (
                f"{subject} in which 0 is declared to be white, so that some programs invert the "
                "values: check in the preview that the classes are not swapped, or save "
                "masks as PNG."
            )
