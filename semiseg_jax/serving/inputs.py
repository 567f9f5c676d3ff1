"""The images of a prediction run and the names of its output files."""

import collections
import os
from collections.abc import Sequence

from etils import epath

from semiseg_jax.data.dataset import IMAGE_SUFFIXES, Example, files_below, is_image
from semiseg_jax.runtime.errors import UserError

# Prediction writes this file, which describes the model, into its output folder. A folder that
# contains the file is a folder of predictions and not of images.
RECORD = "predictions.json"


class Images:
    """The images to predict and the names of their output files.

    Attributes:
        examples: the images; `id` is the name of the output file without its suffix.
        others: number of skipped files, whose names have no image suffix.
        skipped_folders: folders below the source that hold predictions, and no images.
    """

    def __init__(self, source: epath.PathLike, output: epath.PathLike):
        """Lists the images to predict.

        Args:
            source: a folder, nested or flat, or an image file.
            output: the folder of the predictions.

        Raises:
            UserError: there is no image, or an output file would overwrite a file that is not a
                prediction.
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
        if (folder / RECORD).exists():
            raise UserError(
                f"{folder} holds predictions, by its {RECORD}: give a folder of images.",
                code="input-holds-predictions",
            )
        self.skipped_folders: list[epath.Path] = []

        def holds_predictions(path: epath.Path) -> bool:
            # Earlier predictions, in this output folder or in another, are not input.
            if _is_same_path(path, output):
                return True
            if (path / RECORD).exists():
                self.skipped_folders.append(path)
                return True
            return False

        if source.is_dir():
            files = files_below(folder, holds_predictions)
            images = [f for f in files if is_image(f.name)]
        else:
            files = images = [source]
        if not images:
            raise UserError(
                f"{source} holds no image: its files should end in {', '.join(IMAGE_SUFFIXES)}.",
                code="input-empty",
            )
        names = output_names([f.relative_to(folder).as_posix() for f in images])
        self.others = len(files) - len(images)
        self.examples = tuple(
            Example(name, os.fspath(f), None) for name, f in zip(names, images, strict=True)
        )
        # Hand-drawn masks may have the same names as the predictions.
        if output.exists() and not (output / RECORD).exists():
            for example in self.examples:
                if (output / f"{example.id}.png").exists():
                    raise UserError(
                        f"{output / example.id}.png is there already, and is no prediction: "
                        f"{output} has no {RECORD}; give another --output.",
                        code="output-holds-other-files",
                    )


def _is_same_path(first: epath.Path, second: epath.Path) -> bool:
    return os.path.realpath(first) == os.path.realpath(second)


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
