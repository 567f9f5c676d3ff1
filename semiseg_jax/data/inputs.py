"""The images that somebody wants to have predicted, and the names that go with them."""

import collections
import os
from collections.abc import Sequence

from etils import epath

from semiseg_jax.data.examples import IMAGE_SUFFIXES, Example, files_below, is_image
from semiseg_jax.errors import UserError

# In a folder of predictions: whose they are. What has it is no folder of images.
RECORD = "predictions.json"


class Images:
    """The images to predict, and the names of what is written for them.

    Attributes:
        examples: of which the id is the NAME in the output folder.
        others: files that are left alone, because their names do not end as images' do.
    """

    def __init__(self, source: epath.PathLike, output: epath.PathLike):
        """Looks into a folder, nested or not, or takes one image file.

        Raises:
            UserError: there is no image, or something else would be written over.
        """
        source, output = epath.Path(source), epath.Path(output)
        if not source.exists():
            raise UserError(f"--input: {source} is missing: give a folder of images, or an image.")
        folder = source if source.is_dir() else source.parent
        if _same(folder, output):
            raise UserError(f"--output is the folder of the images, {folder}: give another one.")
        if (folder / RECORD).exists():
            raise UserError(
                f"{folder} holds predictions, by its {RECORD}: give a folder of images."
            )
        if source.is_dir():
            # Whatever was predicted before, into this output or another.
            files = list(files_below(folder, lambda f: _same(f, output) or (f / RECORD).exists()))
            found = [f for f in files if is_image(f.name)]
        else:
            files = found = [source]
        if not found:
            raise UserError(
                f"{source} holds no image: its files should end in {', '.join(IMAGE_SUFFIXES)}."
            )
        names = output_names([f.relative_to(folder).as_posix() for f in found])
        self.others = len(files) - len(found)
        self.examples = tuple(
            Example(name, os.fspath(f), None) for name, f in zip(names, found, strict=True)
        )
        # Masks that somebody drew may have these very names.
        if output.exists() and not (output / RECORD).exists():
            for example in self.examples:
                if (output / f"{example.id}.png").exists():
                    raise UserError(
                        f"{output / example.id}.png is there already, and is no prediction: "
                        f"{output} has no {RECORD}; give another --output."
                    )


def _same(one: epath.Path, other: epath.Path) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)


def output_names(paths: Sequence[str]) -> list[str]:
    """The paths without their endings; those that would be the same then keep them."""
    names = [os.path.splitext(path)[0] for path in paths]
    while True:
        counts = collections.Counter(names)
        kept = [path if counts[name] > 1 else name for path, name in zip(paths, names, strict=True)]
        if kept == names:
            return names
        names = kept
