"""The image files that annotations name: where they are, their split, and their new names."""

import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath

from etils import epath

from semiseg_jax.data import split_folders
from semiseg_jax.data.annotations.record import AnnotatedImage
from semiseg_jax.data.dataset import files_below, is_image, normal_name
from semiseg_jax.runtime.errors import UserError

SPLITS = ("train", "val", "test")

# Folders of pictures that are no photographs, such as LabelMe's own conversion writes.
_MASK_FOLDER = re.compile(
    r"masks?|segmentation(class|object).*|.*visuali[sz]ation.*", re.IGNORECASE
)
# Folders whose names say nothing of their images.
_PLAIN_FOLDER = re.compile(r"(jpeg)?images?|imgs?|data|obj_\w+_data", re.IGNORECASE)


class ImageFiles:
    """The image files below a folder.

    Attributes:
        root: the folder.
        files: the image files; those in folders of masks are left out.
    """

    def __init__(self, root: Path):
        """Lists the files.

        Raises:
            UserError: the folder is missing or not readable.
        """
        if not root.is_dir():
            raise UserError(
                f"--images: {root} is no folder: give the folder of the images.",
                code="images-folder-missing",
            )
        self.root = root
        below = files_below(
            epath.Path(root), lambda folder: bool(_MASK_FOLDER.fullmatch(folder.name))
        )
        self.files = [Path(file) for file in below if is_image(file.name)]
        self._by_name: dict[str, list[Path]] = {}
        for file in self.files:
            for key in {*_keys(file.name), *_keys(file.stem)}:
                self._by_name.setdefault(key, []).append(file)

    def find(self, image: AnnotatedImage) -> Path | None:
        """Returns the file of an annotated image; None if there is none.

        The end of its path decides, because folders are moved and are other ones on other
        machines. Of several files, the one with the longest common end is taken, then one in the
        split of the annotation file, then the nearest to that.

        Raises:
            UserError: two files fit equally well.
        """
        name = PurePosixPath(image.name)
        candidates = self._by_name.get(_keys(name.name)[0]) or self._by_name.get(
            _keys(name.name)[1], []
        )
        ranked = sorted(candidates, key=lambda file: self._rank(file, image), reverse=True)
        if len(ranked) > 1 and self._rank(ranked[0], image) == self._rank(ranked[1], image):
            raise UserError(
                f"{image.source} names {image.name}, which may be {ranked[0]} or {ranked[1]}: "
                "rename one, or take it out of the folder.",
                code="annotated-image-ambiguous",
            )
        return ranked[0] if ranked else None

    def path_of_inline(self, image: AnnotatedImage) -> Path:
        """Returns where an image would be that its annotation file holds: beside that file."""
        source = image.source.parent / PurePosixPath(image.name).name
        if source.name.startswith(".") or not is_image(source.name):
            source = image.source.with_suffix(".png")
        return source if source.is_relative_to(self.root) else self.root / source.name

    def split_of(self, file: Path) -> str:
        """Returns the split that a folder of an image says; "" if none does."""
        return split_of_folders(file.relative_to(self.root).parts[:-1])

    def _rank(self, file: Path, image: AnnotatedImage) -> tuple[int, bool, int]:
        wanted = PurePosixPath(image.name).parts[-2::-1]
        common = 0
        for one, other in zip(wanted, file.parts[-2::-1], strict=False):
            if normal_name(one) != normal_name(other):
                break
            common += 1
        split = split_of_source(image.source, self.root)
        near = len(os.path.commonpath([file.absolute(), image.source.absolute()]))
        return common, bool(split) and split == self.split_of(file), near


def _keys(name: str) -> tuple[str, str]:
    """Returns a name as it is, and without regard to case; both in one Unicode form."""
    return normal_name(name), f"/{normal_name(name).casefold()}"


def split_of_folders(folders: Sequence[str]) -> str:
    """Returns the split of the innermost folder that is one of a split; "" if none is."""
    splits = (split_folders.split_of(folder) for folder in reversed(folders))
    return next((split for split in splits if split in SPLITS), "")


def split_of_source(source: Path, root: Path) -> str:
    """Returns the split that the name of an annotation file or a folder of it says, else ""."""
    words = re.split(r"[\W_]+", source.stem)
    of_name = split_of_folders([re.sub(r"\d{4}$", "", word) for word in words])
    folders = source.relative_to(root).parts[:-1] if source.is_relative_to(root) else ()
    return of_name or split_of_folders(folders)


def split_of_image(image: AnnotatedImage, file: Path, files: ImageFiles) -> str:
    """Returns the split of an image: by its annotation, its folders, or its annotation file."""
    named = split_folders.split_of(image.split)
    if named in SPLITS:
        return named
    return files.split_of(file) or split_of_source(image.source, files.root)


def new_names(files: Iterable[Path], root: Path, splits: Mapping[Path, str]) -> dict[Path, str]:
    """Returns the path of each image in the new folder, relative to that of its split.

    Folders of splits and folders called images are taken out, as far as the names stay different
    without their endings. Nothing of an annotation file is in these paths.

    Args:
        files: the image files, below `root`.
        root: their folder.
        splits: the folder of the split of each file in the new folder; "" without splits.
    """
    whole = {file: _safe(file.relative_to(root)) for file in files}
    short = {file: _without_plain_folders(path) for file, path in whole.items()}
    names: dict[Path, str] = {}
    for choice in (short, whole, {file: _with_ending(path) for file, path in whole.items()}):
        remaining = [file for file in whole if file not in names]
        counts: dict[tuple[str, str], int] = {}
        keys = {file: (splits[file], _key(choice[file])) for file in remaining}
        taken = {(splits[file], _key(PurePosixPath(name))) for file, name in names.items()}
        for key in keys.values():
            counts[key] = counts.get(key, 0) + 1
        for file, key in keys.items():
            if counts[key] == 1 and key not in taken:
                names[file] = choice[file].as_posix()
    clashing = [file for file in whole if file not in names]
    if clashing:
        raise UserError(
            f"{clashing[0]} and another image would have the same name: rename one of them.",
            code="converted-names-collide",
        )
    return names


def _key(path: PurePosixPath) -> str:
    """Returns what must differ between two images; some file systems know no case."""
    return normal_name(path.with_suffix("").as_posix()).casefold()


def _safe(path: Path) -> PurePosixPath:
    """Returns a path whose name can stand in a split list."""
    text = path.as_posix().encode("utf-8", "replace").decode()
    return PurePosixPath(re.sub(r"[\x00-\x1f\x7f\\]", "_", text))


def _without_plain_folders(path: PurePosixPath) -> PurePosixPath:
    folders = [
        folder
        for folder in path.parts[:-1]
        if not _PLAIN_FOLDER.fullmatch(folder) and split_folders.split_of(folder) not in SPLITS
    ]
    return PurePosixPath(*folders, path.name)


def _with_ending(path: PurePosixPath) -> PurePosixPath:
    return path.with_name(f"{path.stem}_{path.suffix[1:]}{path.suffix}")


def roles(splits: Collection[str]) -> dict[str, str]:
    """Returns the folder of each split in the new folder: all "" if there is nothing to tell apart.

    Args:
        splits: the splits of all images; "" for images of none.
    """
    if len(set(splits)) < 2 or not {"train", ""} & set(splits):
        return dict.fromkeys(splits, "")
    # Images of no split beside others of a split are there to be trained on.
    return {split: split or "train" for split in splits}
