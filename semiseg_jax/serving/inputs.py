"""The images of a prediction run and the names of its output files."""

import collections
import os
from collections.abc import Sequence

from etils import epath

from semiseg_jax.data.dataset import IMAGE_SUFFIXES, Example, files_below, is_image
from semiseg_jax.runtime.errors import UserError
from semiseg_jax.serving.output_folder import RECORD, read_record


class Images:
    """The images to predict and the names of their output files.

    Attributes:
        examples: the images; `id` is the name of the output file without its suffix.
        others: number of skipped files, whose names have no image suffix.
        predictions: the skipped folders, which hold the output of earlier predictions.
    """

    def __init__(self, source: epath.PathLike, output: epath.PathLike):
        """Lists the images to predict.

        Args:
            source: a folder, nested or flat, or an image file.
            output: the folder of the predictions.

        Raises:
            UserError: there is no image, or the output folder holds images.
        """
        source, output = epath.Path(source), epath.Path(output)
        if not source.exists():
            raise UserError(
                f"--input: {source} is missing: give a folder of images, or an image.",
                code="input-missing",
            )
        folder = source if source.is_dir() else source.parent
        if _is_same_path(folder, output):
            raise UserError(
                f"--output is the folder of the images, {folder}: give another one.",
                code="output-is-input",
            )
        if read_record(folder) is not None:
            raise UserError(
                f"{folder} holds predictions, by its {RECORD}: give a folder of images.",
                code="input-holds-predictions",
            )
        self.predictions: list[epath.Path] = []

        def skip_predictions(folder: epath.Path) -> bool:
            if read_record(folder) is None:
                return False
            self.predictions.append(folder)
            return True

        if source.is_dir():
            files = list(files_below(folder, skip_predictions))
            images = [f for f in files if is_image(f.name)]
        else:
            files = images = [source]
        if not images:
            raise UserError(
                f"{source} holds no image: its files should end in {', '.join(IMAGE_SUFFIXES)}.",
                code="input-empty",
            )
        if _is_below(output, folder) and (below := [f for f in images if _is_below(f, output)]):
            raise UserError(
                f"--output is {output}, where {below[0]} is an image of --input: give another "
                "--output.",
                code="output-holds-images",
            )
        names = output_names([f.relative_to(folder).as_posix() for f in images])
        self.others = len(files) - len(images)
        self.examples = tuple(
            Example(name, os.fspath(f), None) for name, f in zip(names, images, strict=True)
        )


def _is_same_path(first: epath.Path, second: epath.Path) -> bool:
    return os.path.realpath(first) == os.path.realpath(second)


def _is_below(path: epath.Path, folder: epath.Path) -> bool:
    return os.path.realpath(path).startswith(os.path.join(os.path.realpath(folder), ""))


def output_names(paths: Sequence[str]) -> list[str]:
    """Returns the paths without their suffixes; a path keeps its suffix if names would collide."""
    names = [os.path.splitext(path)[0] for path in paths]
    while True:
        counts = collections.Counter(names)
        unique = [
            path if counts[name] > 1 else name for path, name in zip(paths, names, strict=True)
        ]
        if unique == names:
            return names
        names = unique
