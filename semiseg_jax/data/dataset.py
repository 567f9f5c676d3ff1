"""Examples and data sets, and the functions that list the files of a folder."""

import dataclasses
import os
from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np
from etils import epath
from jaxtyping import Int16

from semiseg_jax.data import split_lists
from semiseg_jax.runtime.errors import UserError, read_error

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm")

# Prints a line for the user.

# "true": a mask of the data set, in its own mask values. "pseudo": a label map that a teacher
# predicted, whose values are class ids.
LabelKind = Literal["true", "pseudo"]


@dataclasses.dataclass(frozen=True)
class Example:
    """An image and its label.

    Attributes:
        id: a unique relative name; the files that a run writes for the image are named after it.
        image: path of the image file.
        mask: path of the label map; None if the image is unlabelled.
        label_kind: whether the mask is a true label or a pseudo-label; None exactly if there is
            no mask. A mask whose kind is not given is a true label.
    """

    id: str
    image: str
    mask: str | None
    label_kind: LabelKind | None = None

    def __post_init__(self) -> None:
        if self.mask is None:
            object.__setattr__(self, "label_kind", None)
        elif self.label_kind is None:
            object.__setattr__(self, "label_kind", "true")


@dataclasses.dataclass(frozen=True)
class Dataset:
    """The examples of a run and the classes of their masks.

    Attributes:
        name: name of the source; a suffix marks variants of its images, such as downscaled ones.
        classes: class names in id order.
        palette: (R, G, B) of each class.
        table: from mask value to class id (see `image_io.id_table`).
        labeled, unlabeled, evaluation: the three sets of examples; unlabelled examples have no
            mask, even if the data set provides one.
        evaluated_on: name of the evaluation set, such as "val"; "holdout" if it was held out from
            the training images.
        selection: labelled images held out to select the weights of a stage; usually empty.
        pixels: number of pixels of the labelled and the unlabelled images, before any
            downscaling; 0 until `load.check` has counted them.

    Raises:
        UserError: the id of an image is no path inside a folder.
    """

    name: str
    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    table: Int16[np.ndarray, "256"]
    labeled: tuple[Example, ...]
    unlabeled: tuple[Example, ...]
    evaluation: tuple[Example, ...]
    evaluated_on: str = "val"
    selection: tuple[Example, ...] = ()
    pixels: int = 0

    def __post_init__(self) -> None:
        examples = (*self.labeled, *self.unlabeled, *self.evaluation, *self.selection)
        for example in examples:
            # A run names files after ids, which must not lie outside of their folder.
            if any(part in ("", ".", "..") for part in example.id.split("/")):
                raise UserError(
                    f"{example.image} has the name {example.id!r}, which leads out of a folder of "
                    "label maps: name it by a path below data.root.",
                    code="image-id-unsafe",
                )

    @property
    def split_hash(self) -> str:
        """A hash of the ids of all sets (see `split_lists.split_hash`)."""
        sets = [self.labeled, self.unlabeled, self.evaluation]
        sets += [self.selection] if self.selection else []
        return split_lists.split_hash([[e.id for e in examples] for examples in sets])


@dataclasses.dataclass(frozen=True)
class Layout:
    """The files of a data set before it is split.

    Attributes:
        name, classes, palette, table: as in `Dataset`.
        root: the folder that the paths in split lists are relative to.
        train: the images that labelled images are drawn from; the rest becomes unlabelled.
        evaluation: the images of `eval.split`.
        further: images that are always unlabelled; their masks, if any, are not used.
        masks_of_lists: the second column of a split list names the mask to read. If False, it
            only states that the image has a mask, and the source's own mask is read.
    """

    name: str
    root: epath.Path
    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    table: Int16[np.ndarray, "256"]
    train: tuple[Example, ...]
    evaluation: tuple[Example, ...]
    further: tuple[Example, ...] = ()
    masks_of_lists: bool = True


def inside(folder: epath.Path) -> list[epath.Path]:
    """Returns the paths in a folder, sorted by name.

    Raises:
        UserError: the folder is not readable.
    """
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise read_error(
            f"The folder {folder}", error, "make it readable, or take it out of what is read"
        ) from error


def files_below(
    folder: epath.Path, skip_folder: Callable[[epath.Path], bool] = lambda folder: False
) -> Iterator[epath.Path]:
    """Yields every file below a folder at any depth, sorted by path; skips hidden files.

    Args:
        folder: the folder to walk.
        skip_folder: returns whether to skip a nested folder.

    Raises:
        UserError: a folder is not readable.
    """
    for path in inside(folder):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            if not skip_folder(path):
                yield from files_below(path, skip_folder)
        else:
            yield path


def pairs(
    folder: epath.Path,
    mask_folder: epath.Path | None,
    image_suffix: str = "",
    mask_suffix: str = ".png",
) -> tuple[Example, ...]:
    """Returns an example for each image below a folder, with the mask of the same name if any.

    Args:
        folder: the folder of the images, nested or flat.
        mask_folder: the folder of the masks, with the same tree; it may equal `folder` or be
            missing. None: no masks.
        image_suffix: the suffix of image names, such as "_photo.jpg"; "" for any image file.
        mask_suffix: the suffix of mask names that replaces it, such as "_mask.png".

    Raises:
        UserError: the image folder is missing, or two images differ only in their suffix.
    """
    if not folder.is_dir():
        raise UserError(
            f"The image folder {folder} is missing: make it, or name another with data.root, "
            "data.image_dir or eval.split.",
            code="image-folder-missing",
        )
    masks = {}
    if mask_folder is not None and mask_folder.is_dir():
        files = (m for m in files_below(mask_folder) if m.name.endswith(mask_suffix))
        masks = {m.relative_to(mask_folder).as_posix(): os.fspath(m) for m in files}
    mask_paths = set(masks.values())
    examples: dict[str, Example] = {}
    for image in files_below(folder):
        # Images and masks may share a folder: a mask is not an image.
        if not is_image(image.name, image_suffix) or os.fspath(image) in mask_paths:
            continue
        name = image.relative_to(folder).as_posix()
        id_ = name.removesuffix(image_suffix) if image_suffix else os.path.splitext(name)[0]
        if id_ in examples:
            raise UserError(
                f"{examples[id_].image} and {image} have the same name: rename one of them, or say "
                "with data.image_suffix how the names of images end.",
                code="image-names-collide",
            )
        examples[id_] = Example(id_, os.fspath(image), masks.get(f"{id_}{mask_suffix}"))
    return tuple(examples.values())


def is_image(name: str, suffix: str = "") -> bool:
    """Returns whether a file name ends in `suffix` or, without one, in any image suffix."""
    return name.endswith(suffix) if suffix else name.lower().endswith(IMAGE_SUFFIXES)


def safe_id(path: str) -> str:
    """Returns an id from any path, without its suffix and without "..".

    Output files are named after ids, so an id must not lead out of the output folder.
    """
    components = os.path.splitext(path)[0].replace("\\", "/").split("/")
    return "/".join(name for name in components if name not in ("", ".", ".."))
