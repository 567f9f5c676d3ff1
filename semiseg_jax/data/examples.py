"""What a source hands over: examples, and the files below folders that they come from."""

import dataclasses
import os
from collections.abc import Callable, Iterator

import numpy as np
from etils import epath
from jaxtyping import Int16

from semiseg_jax.data import splits
from semiseg_jax.errors import UserError, unread

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm")

# Takes a line for the person who started the run.
Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Example:
    """One image: id, file, and its mask or None. Unlabelled images never carry a mask path."""

    id: str
    image: str
    mask: str | None


@dataclasses.dataclass(frozen=True)
class Dataset:
    """What a run reads.

    Attributes:
        name: of the source, with what sets its images apart (such as being downscaled).
        classes: names in id order.
        palette: (R, G, B) of each class.
        table: from mask value to class id (see `labels.id_table`).
        labeled, unlabeled, evaluation: the three sets of examples.
        evaluated_on: what the evaluation set is, such as "val"; "holdout" where it was set aside
            from the training images.
        selection: labelled images held out to choose a stage's weights by; mostly none.
        pixels: of the labelled and the unlabelled images, before any downscaling; 0 while they are
            not checked.
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

    @property
    def split_hash(self) -> str:
        """Names the sets by their ids (see `splits.split_hash`)."""
        parts = [self.labeled, self.unlabeled, self.evaluation]
        parts += [self.selection] if self.selection else []
        return splits.split_hash([[e.id for e in part] for part in parts])


@dataclasses.dataclass(frozen=True)
class Layout:
    """A data set before it is split: where its files are, and its own lists of them.

    Attributes:
        name, classes, palette, table: as in `Dataset`.
        root: what the paths of split lists are relative to.
        train: images to draw labelled ones from; those that are not drawn are unlabelled.
        evaluation: images of `eval.split`.
        further: images that are unlabelled whatever is drawn; their masks, if any, are not used.
        masks_of_lists: a list's second column names the mask to read. Otherwise it says no more
            than that there is one, and the source's own mask of that image is read.
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
    """What a folder holds, in order of name.

    Raises:
        UserError: it may not be read.
    """
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise unread(
            f"The folder {folder}", error, "make it readable, or take it out of what is read"
        ) from error


def files_below(
    folder: epath.Path, left_out: Callable[[epath.Path], bool] = lambda folder: False
) -> Iterator[epath.Path]:
    """Every file below a folder, nested or not, in order of path; hidden ones left out.

    Args:
        folder: to look into.
        left_out: whether not to look into a folder below it.

    Raises:
        UserError: a folder may not be read.
    """
    for path in inside(folder):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            if not left_out(path):
                yield from files_below(path, left_out)
        else:
            yield path


def pairs(
    folder: epath.Path,
    mask_folder: epath.Path | None,
    image_suffix: str = "",
    mask_suffix: str = ".png",
) -> tuple[Example, ...]:
    """The images below a folder, with the masks of the same name where there are any.

    Args:
        folder: of the images, nested or not.
        mask_folder: the same tree with masks; it may be `folder`, or missing. None: no mask is
            looked for.
        image_suffix: how the names of images end, such as "_photo.jpg"; "" for any image file.
        mask_suffix: what a mask has in place of that ending, such as "_mask.png".

    Raises:
        UserError: the image folder is missing, or two images differ by their ending alone.
    """
    if not folder.is_dir():
        raise UserError(
            f"The image folder {folder} is missing: make it, or name another with data.root, "
            "data.image_dir or eval.split."
        )
    masks = {}
    if mask_folder is not None and mask_folder.is_dir():
        files = (m for m in files_below(mask_folder) if m.name.endswith(mask_suffix))
        masks = {m.relative_to(mask_folder).as_posix(): os.fspath(m) for m in files}
    taken = set(masks.values())
    found: dict[str, Example] = {}
    for image in files_below(folder):
        # With images and masks in one folder, the mask of one is not another image.
        if not is_image(image.name, image_suffix) or os.fspath(image) in taken:
            continue
        name = image.relative_to(folder).as_posix()
        id_ = name.removesuffix(image_suffix) if image_suffix else os.path.splitext(name)[0]
        if id_ in found:
            raise UserError(
                f"{found[id_].image} and {image} have the same name: rename one of them, or say "
                "with data.image_suffix how the names of images end."
            )
        found[id_] = Example(id_, os.fspath(image), masks.get(f"{id_}{mask_suffix}"))
    return tuple(found.values())


def is_image(name: str, suffix: str = "") -> bool:
    """Whether a file's name ends as asked, or as any image's does."""
    return name.endswith(suffix) if suffix else name.lower().endswith(IMAGE_SUFFIXES)


def safe_id(path: str) -> str:
    """An id, which names files below folders of ours, from a path that may lead anywhere."""
    parts = os.path.splitext(path)[0].replace("\\", "/").split("/")
    return "/".join(part for part in parts if part not in ("", ".", ".."))
