"""The folders of the splits of a data set, by the names that people give them."""

import re

from etils import epath

from semiseg_jax.data.folder_walk import inside
from semiseg_jax.runtime.errors import UserError

# Names of the folder of each split; case does not matter.
_NAMES = {
    "train": ("train", "training", "trn"),
    "val": ("val", "valid", "validation", "validate", "dev", "eval", "evaluation"),
    "test": ("test", "testing", "tst"),
}
_SPLIT_OF_NAME = {name: split for split, names in _NAMES.items() for name in names}
_IMAGES, _MASKS = "images?|imgs?", "masks?|labels?|annotations?"


def _folder_name(content: str) -> re.Pattern[str]:
    """Returns the pattern of the folder names of a split, such as 01_train, train2017, val_set.

    Args:
        content: pattern of the words for what is in the folder, as in train_images or images-val.
    """
    names = "|".join(_SPLIT_OF_NAME)
    return re.compile(
        rf"(?:\d{{1,2}}[\W_]+)?(?:(?:{content})[\W_]+)?({names})"
        rf"[\W_]*(?:set|split)?[\W_]*(?:\d{{4}})?(?:[\W_]*(?:{content}))?"
    )


_FOLDER_NAME = _folder_name(_IMAGES)
_MASK_FOLDER_NAME = _folder_name(f"{_IMAGES}|{_MASKS}")


def split_of(folder_name: str, holds_masks: bool = False) -> str:
    """Returns the split that a folder of this name holds: train, val, test, or the name itself.

    Args:
        folder_name: name of the folder.
        holds_masks: whether the folder is one of masks, so that its name may say so.
    """
    name = folder_name.lower()
    match = (_MASK_FOLDER_NAME if holds_masks else _FOLDER_NAME).fullmatch(name)
    return _SPLIT_OF_NAME[match[1]] if match else name


def is_evaluation(folder_name: str, eval_split: str) -> bool:
    """Returns whether a folder of this name holds val or test images, or those of `eval_split`."""
    return split_of(folder_name) in ("val", "test", split_of(eval_split))


def find(parent: epath.Path, split: str, holds_masks: bool = False) -> epath.Path | None:
    """Returns the folder of a split in a folder; None if there is none.

    A folder whose name equals `split` takes precedence over one of another name of the split.

    Args:
        parent: the folder of the folders.
        split: name of the split.
        holds_masks: whether the folders are those of masks.

    Raises:
        UserError: several folders have a name of the split, and none equals it.
    """
    if (parent / split).is_dir():
        return parent / split
    if not parent.is_dir():
        return None
    folders = [
        f for f in inside(parent) if split_of(f.name, holds_masks) == split_of(split) and f.is_dir()
    ]
    if len(folders) > 1:
        raise UserError(
            f"{folders[0]} and {folders[1]} may both hold the {split} images: rename the one that "
            f"does to {split}, or move the other.",
            code="split-folders-ambiguous",
        )
    return folders[0] if folders else None
