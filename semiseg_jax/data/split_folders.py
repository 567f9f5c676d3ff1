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
# The name may be followed by a word or a year, as in train2017 and val_set.
_FOLDER_NAME = re.compile(rf"({'|'.join(_SPLIT_OF_NAME)})[\W_]*(?:set|split)?[\W_]*(?:\d{{4}})?")


def split_of(folder_name: str) -> str:
    """Returns the split that a folder of this name holds: train, val, test, or the name itself."""
    name = folder_name.lower()
    match = _FOLDER_NAME.fullmatch(name)
    return _SPLIT_OF_NAME[match[1]] if match else name


def is_evaluation(folder_name: str, eval_split: str) -> bool:
    """Returns whether a folder of this name holds val or test images, or those of `eval_split`."""
    return split_of(folder_name) in ("val", "test", split_of(eval_split))


def find(parent: epath.Path, split: str) -> epath.Path | None:
    """Returns the folder of a split in a folder; None if there is none.

    A folder whose name equals `split` takes precedence over one of another name of the split.

    Raises:
        UserError: several folders have a name of the split, and none equals it.
    """
    if (parent / split).is_dir():
        return parent / split
    if not parent.is_dir():
        return None
    folders = [f for f in inside(parent) if split_of(f.name) == split_of(split) and f.is_dir()]
    if len(folders) > 1:
        raise UserError(
            f"{folders[0]} and {folders[1]} may both hold the {split} images: rename the one that "
            f"does to {split}, or move the other.",
            code="split-folders-ambiguous",
        )
    return folders[0] if folders else None
