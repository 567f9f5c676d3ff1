"""Examples and data sets, and the functions that list the files of a folder."""

import collections
import dataclasses
import os
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
from etils import epath
from jaxtyping import Int16

from semiseg_jax.data import split_lists
from semiseg_jax.data.data_record import DataRecord
from semiseg_jax.data.folder_walk import walk_files
from semiseg_jax.data.mask_format import VALUES, MaskFormat
from semiseg_jax.runtime.errors import UserError
from semiseg_jax.runtime.logger import logger

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm")

# The most bytes in a file name without its ending. File systems allow 255, and a run writes files
# under temporary names, which are longer (see `fileio.write_bytes`).
MAX_NAME_BYTES = 235

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
        mask_format: how the pixels of mask files hold these values.
        labeled, unlabeled, evaluation: the three sets of examples; unlabelled examples have no
            mask, even if the data set provides one.
        evaluated_on: name of the evaluation set, such as "val"; "holdout" if it was held out from
            the training images.
        evaluation_is_held_out: the evaluation images were held out from the training images
            (`data.holdout`), because the user named none.
        selection: labelled images held out to select the weights of a stage; usually empty.
        pixels: number of pixels of the labelled and the unlabelled images, before any
            downscaling; 0 until `load.check` has counted them.
        labeled_pixels: of these, the pixels of each class in the masks of `labeled`; empty until
            `load.check` has counted them.
        left_out: unlabelled images that are lost or not decodable and therefore not in
            `unlabeled`: the reason by id. They still belong to the split.
        record: the content of all files; None until `load.check` has read them.
        root: the folder that the paths in `record` are relative to.

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
    labeled_pixels: tuple[int, ...] = ()
    left_out: Mapping[str, str] = dataclasses.field(default_factory=dict)
    record: DataRecord | None = None
    root: str = ""
    evaluation_is_held_out: bool = False
    mask_format: MaskFormat = VALUES

    @property
    def unlabeled_ids(self) -> list[str]:
        """The ids of the unlabelled images of the split, those in `left_out` included."""
        return [*(e.id for e in self.unlabeled), *self.left_out]

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
        sets = [[e.id for e in self.labeled], self.unlabeled_ids, [e.id for e in self.evaluation]]
        sets += [[e.id for e in self.selection]] if self.selection else []
        return split_lists.split_hash(sets)

    @property
    def evaluation_hash(self) -> str:
        """A hash of the ids of the evaluated images (see `split_lists.split_hash`)."""
        return split_lists.split_hash([[e.id for e in self.evaluation]])


@dataclasses.dataclass(frozen=True)
class Layout:
    """The files of a data set before it is split.

    Attributes:
        name, classes, palette, table, mask_format: as in `Dataset`.
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
    mask_format: MaskFormat = VALUES


def files_below(
    folder: epath.Path, skip_folder: Callable[[epath.Path], bool] = lambda folder: False
) -> list[epath.Path]:
    """Returns every file below a folder as `walk_files` does, but skips hidden files and folders.

    Args:
        folder: the folder to walk.
        skip_folder: returns whether to skip a nested folder.

    Raises:
        UserError: a folder is not readable.
    """
    files = walk_files(folder, lambda path: path.name.startswith(".") or skip_folder(path))
    return [path for path in files if not path.name.startswith(".")]


def pairs(
    folder: epath.Path,
    mask_folder: epath.Path | None,
    image_suffix: str = "",
    mask_suffix: str = ".png",
    skip_folder: Callable[[epath.Path], bool] = lambda folder: False,
) -> tuple[Example, ...]:
    """Returns an example for each image below a folder, with the mask of the same name if any.

    Suffixes are compared without case, names without regard to how Unicode composes an accent.
    Logs the number of files that have neither suffix, and of masks without an image.

    Args:
        folder: the folder of the images, nested or flat.
        mask_folder: the folder of the masks, with the same tree; it may equal `folder` or be
            missing. None: no masks.
        image_suffix: the suffix of image names, such as "_photo.jpg"; "" for any image file.
        mask_suffix: the suffix of mask names that replaces it, such as "_mask.png".
        skip_folder: returns whether to skip a nested folder of images or masks.

    Raises:
        UserError: the image folder is missing, or two images differ only in their suffix.
    """
    if not folder.is_dir():
        raise UserError(
            f"The image folder {folder} is missing: make it, or name another with data.root, "
            "data.image_dir or eval.split.",
            code="image-folder-missing",
        )
    files = files_below(folder, skip_folder)
    has_masks = mask_folder is not None and mask_folder.is_dir()
    files_beside_masks = files_below(mask_folder, skip_folder) if has_masks else []
    mask_files = [f for f in files_beside_masks if is_image(f.name, mask_suffix)]
    masks = MaskFinder(mask_folder, mask_files, mask_suffix)
    if mask_folder and folder in mask_folder.parents:
        # What lies in the folder of the masks is no image, whatever its suffix.
        files = [file for file in files if mask_folder not in file.parents]
    mask_paths = set(map(os.fspath, mask_files))
    # Images and masks may share a folder: a mask is not an image.
    files = [file for file in files if os.fspath(file) not in mask_paths]
    images = [file for file in files if is_image(file.name, image_suffix)]
    examples: dict[str, Example] = {}
    for image in images:
        name = image.relative_to(folder).as_posix()
        id_ = name[: -len(image_suffix)] if image_suffix else os.path.splitext(name)[0]
        if id_ in examples:
            raise UserError(
                f"{examples[id_].image} and {image} have the same name: rename one of them, or say "
                "with data.image_suffix how the names of images end.",
                code="image-names-collide",
            )
        examples[id_] = Example(id_, os.fspath(image), masks(id_))
    known = {*images, *mask_files}
    accepted = image_suffix or ", ".join(IMAGE_SUFFIXES)
    _report_left_out(folder, [f for f in files if f not in known], f"images end in {accepted}")
    if mask_folder and mask_folder != folder:
        others = [f for f in files_beside_masks if f not in known]
        _report_left_out(mask_folder, others, f"masks end in {mask_suffix} (data.mask_suffix)")
    if has_masks:
        used = {example.mask for example in examples.values()}
        _report_unused_masks(mask_folder, [m for m in map(os.fspath, mask_files) if m not in used])
    return tuple(examples.values())


class MaskFinder:
    """Finds the mask of an image by the image's id."""

    def __init__(self, folder: epath.Path | None, masks: Sequence[epath.Path], suffix: str):
        """Indexes `masks`, the files below `folder` that end in `suffix`."""
        self._folder, self._suffix = folder, suffix
        self._by_id: dict[str, str] = {}
        # Of two masks that differ in the case of their suffix, the later one is kept.
        for mask in sorted(masks, key=lambda mask: mask.name.endswith(suffix)):
            assert folder is not None
            name = mask.relative_to(folder).as_posix()
            self._by_id[name[: -len(suffix)]] = os.fspath(mask)
        self._by_normal_id = {normal_name(id_): mask for id_, mask in self._by_id.items()}
        self._folders = {os.path.dirname(id_) for id_ in self._by_id}

    def __call__(self, id_: str) -> str | None:
        """Returns the path of the mask of an image; None if it has none."""
        mask = self._by_id.get(id_) or self._by_normal_id.get(normal_name(id_))
        if mask is None and self._folder and os.path.dirname(id_) not in self._folders:
            # Two folders of images may share the masks of one: the walk visits a link to it once.
            path = os.fspath(self._folder / f"{id_}{self._suffix}")
            return path if os.path.isfile(path) else None
        return mask


def normal_name(name: str) -> str:
    """Returns a file name in one Unicode form: "é" may be one character or two, by system."""
    return unicodedata.normalize("NFC", name)


def _report_left_out(folder: epath.Path, files: Sequence[epath.Path], accepted: str) -> None:
    """Logs the number of files of each ending that are left out; `accepted` says which are not."""
    if not files:
        return
    endings = collections.Counter(f.suffix.lower() or "without an ending" for f in files)
    listing = ", ".join(f"{count} {ending}" for ending, count in endings.most_common(8))
    logger.warning(
        f"{len(files)} files below {folder} are left out ({listing}), such as {files[0]}: "
        f"{accepted}."
    )


def _report_unused_masks(folder: epath.Path | None, masks: Sequence[str]) -> None:
    """Logs the number of masks without an image; such a mask is usually misnamed."""
    if masks:
        logger.info(
            f"{len(masks)} masks below {folder} have no image of their name, such as {masks[0]}."
        )


def is_image(name: str, suffix: str = "") -> bool:
    """Returns whether a file name ends in `suffix` or, without one, in any image suffix.

    Case does not matter.
    """
    if not suffix:
        return name.lower().endswith(IMAGE_SUFFIXES)
    return name[-len(suffix) :].lower() == suffix.lower()


def check_name(example: Example) -> None:
    """Checks that files can be named after an image.

    Raises:
        UserError: the image's name is not UTF-8, or too long.
    """
    try:
        name = example.id.rpartition("/")[2].encode()
        example.id.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"The name of {example.image} is not UTF-8: rename the file or its folder.",
            code="image-name-not-utf8",
        ) from error
    if len(name) > MAX_NAME_BYTES:
        raise UserError(
            f"The name of {example.image} has {len(name)} bytes without its ending: shorten it to "
            f"{MAX_NAME_BYTES}, because files of the run are named after it.",
            code="image-name-too-long",
        )


def safe_id(path: str) -> str:
    """Returns an id from any path, without its suffix and without "..".

    Output files are named after ids, so an id must not lead out of the output folder.
    """
    components = os.path.splitext(path)[0].replace("\\", "/").split("/")
    return "/".join(name for name in components if name not in ("", ".", ".."))
