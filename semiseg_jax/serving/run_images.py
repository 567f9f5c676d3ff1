"""The images of a finished run, on which a file of fixed form is calibrated and evaluated."""

import re
from pathlib import Path

from etils import epath
from ml_collections import ConfigDict

from semiseg_jax import workdir as workdir_lib
from semiseg_jax.data import load
from semiseg_jax.data.dataset import Dataset, Example
from semiseg_jax.runtime import rules
from semiseg_jax.runtime.errors import UserError
from semiseg_jax.serving.export_parity import spread
from semiseg_jax.serving.model_bundle import ModelBundle
from semiseg_jax.shape_buckets import Size

# Number of images for calibration: the ranges of features hardly change with more.
_CALIBRATION_IMAGES = 100


def read_config(workdir: Path) -> ConfigDict:
    """Returns the config of a run, with the values of keys that older code did not write.

    Raises:
        UserError: the folder has no config.json, or it is damaged.
    """
    recorded = workdir_lib.read_fingerprint(epath.Path(workdir), "config.json")
    if recorded is None:
        raise UserError(
            f"{workdir} has no config.json of a run, which names the images that "
            "--format=tflite is calibrated and evaluated on: give the --workdir of the run itself, "
            "not a copy of its model/.",
            code="export-run-config-missing",
        )
    content = rules.to_tuples(recorded)
    for key, value in workdir_lib.ADDED_KEYS.items():
        section, _, name = key.partition(".")
        # The data and their evaluation split are read, and no other section.
        if section in ("data", "eval") and "." not in name:
            content[section].setdefault(name, value)
    return ConfigDict(content)


def load_dataset(config: ConfigDict) -> Dataset:
    """Returns the data set of a run, whose images are not downscaled.

    Raises:
        UserError: a folder or list of it is missing.
    """
    dataset, _ = load.plan_dataset(config)
    return dataset


def calibration_examples(dataset: Dataset) -> list[Example]:
    """Returns training images, evenly spread; none of them is evaluated."""
    return spread((*dataset.labeled, *dataset.unlabeled), _CALIBRATION_IMAGES)


def parse_size(text: str) -> Size:
    """Returns (height, width) of a text such as "96x160".

    Raises:
        UserError: the text is no size.
    """
    match = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text)
    if match is None:
        raise UserError(
            f"--size is {text}: give height and width in pixels, such as 96x160.",
            code="export-size-malformed",
        )
    return int(match[1]), int(match[2])


def default_size(bundle: ModelBundle, config: ConfigDict) -> Size:
    """Returns the size of the evaluation images if it is one, else that of the crops."""
    sizes = list(bundle.exact_sizes)
    height, width = sizes[0] if len(sizes) == 1 else config.data.crop
    return height * bundle.downscale, width * bundle.downscale
