"""Converts annotations of other tools to masks, and masks to annotations.

    python -m semiseg_jax.data.convert --input=DIR --output=DIR [--from=FORMAT]
    python -m semiseg_jax.data.convert --input=DIR --output=DIR --to=coco|labelme --images=DIR

The first command reads the folder that a tool exported and writes a folder that can be trained on.
The second writes predictions, pseudo-labels or other masks as polygons. docs/own_data.md describes
both.
"""

import os
import shlex
import sys
from pathlib import Path

from absl import app, flags

from semiseg_jax.runtime import cli, interrupts

_INPUT = cli.define_path_flag(
    "input", None, "The folder that a tool exported, or its annotation file; with --to, of masks."
)
_OUTPUT = cli.define_path_flag("output", None, "The folder to create.")
_FROM = flags.DEFINE_enum(
    "from",
    None,
    ["coco", "labelme", "yolo", "cvat", "colors"],
    "The format of the annotations; found out unless given.",
)
_TO = flags.DEFINE_enum(
    "to", None, ["coco", "labelme"], "Write the masks in --input as annotations of this format."
)
_IMAGES = cli.define_path_flag(
    "images", None, "The folder of the images, if it is not below --input."
)
_LINK = flags.DEFINE_boolean("link", False, "Link the images instead of copying them.")
_BACKGROUND = flags.DEFINE_string(
    "background",
    "background",
    "The class of pixels of no object; ignore: they have no label (255). With --to: the class that "
    "is written as no object.",
)
_CLASSES = flags.DEFINE_list(
    "classes", None, "Names of all classes in the order of their ids, such as sky,road,car."
)
_EMPTY = flags.DEFINE_enum(
    "empty",
    None,
    ["unlabeled", "background"],
    "What images are whose annotations are empty: unlabeled by default, with YOLO background.",
)
_OVERLAP = flags.DEFINE_enum(
    "overlap", "later", ["later", "smaller"], "Which of objects that overlap are on top."
)
_CROWD = flags.DEFINE_enum(
    "crowd", "class", ["class", "ignore"], "What objects with iscrowd become."
)
_BOXES = flags.DEFINE_enum(
    "boxes",
    "ignore",
    ["ignore", "draw"],
    "What objects of YOLO and COCO become of which only the box is known.",
)
_LINE_WIDTH = flags.DEFINE_float(
    "line_width",
    0.0,
    "Width of lines and diameter of points in pixels; by default they are not drawn.",
    lower_bound=0.0,
    upper_bound=1000.0,
)
_MIN_AREA = flags.DEFINE_integer(
    "min_area", 0, "With --to: the fewest pixels of an object.", lower_bound=0
)
_MAX_IMAGE_PIXELS = flags.DEFINE_integer(
    "max_image_pixels",
    None,
    "Largest number of pixels of an image (default 268,435,456).",
    lower_bound=1,
)


def main(argv: list[str]) -> None:
    """Converts what the command line names, and prints what was done and what comes next."""
    cli.start_command(argv)
    for flag in (_INPUT, _OUTPUT):
        if not flag.value:
            sys.exit(f"Error: --{flag.name} is missing: give it; --help lists the flags.")
    # Imported here, so that --help and a mistyped flag do not wait for JAX.
    from semiseg_jax.data import image_header
    from semiseg_jax.runtime.errors import UserError

    image_header.set_max_pixels(_MAX_IMAGE_PIXELS.value or image_header.DEFAULT_MAX_PIXELS)
    try:
        _check_flags()
        with interrupts.exit_on_signals():
            if _TO.value:
                _write_annotations()
            else:
                _write_masks()
    except UserError as error:
        sys.exit(f"Error: {error}")


def _check_flags() -> None:
    """Raises a UserError for flags that contradict each other."""
    from semiseg_jax.runtime.errors import UserError

    if _FROM.value and _TO.value:
        raise UserError(
            "--from reads annotations and --to writes them, and masks lie between: convert to "
            "masks first, then these with --to.",
            code="from-and-to",
        )
    if _EMPTY.value == "background" and _BACKGROUND.value == "ignore":
        raise UserError(
            "--empty=background makes images without objects background, and --background=ignore "
            "says that there is none: leave one of them out.",
            code="empty-without-background",
        )


def _paths() -> tuple[Path, Path]:
    """Returns --input and --output; the latter has a name also if it is given as "."."""
    return Path(_INPUT.value), Path(os.path.abspath(_OUTPUT.value))


def _write_masks() -> None:
    """Writes annotations as a folder of images and masks."""
    from semiseg_jax.data.annotations import detect, mask_folder, summary
    from semiseg_jax.data.annotations.drawing import DrawOptions
    from semiseg_jax.data.annotations.image_files import ImageFiles

    source, output = _paths()
    root = Path(_IMAGES.value) if _IMAGES.value else source if source.is_dir() else source.parent
    if not _IMAGES.value and source.is_file() and root.name.lower() in ("annotations", "labels"):
        root = root.parent
    if source.exists():
        mask_folder.check_new(output, root)
    format_, annotations = detect.read(source, _FROM.value or "")
    options = mask_folder.Options(
        draw=DrawOptions(_OVERLAP.value, _CROWD.value, _BOXES.value, _LINE_WIDTH.value),
        background=_BACKGROUND.value,
        empty=_EMPTY.value or "",
        classes=tuple(_CLASSES.value or ()),
        link=_LINK.value,
    )
    conversion = mask_folder.write(annotations, ImageFiles(root), output, options)
    summary.print_conversion(format_, conversion, options.draw.overlap)
    config = shlex.quote(os.path.join(_OUTPUT.value, mask_folder.config_name(output.name)))
    summary.print_line(f"Written: {_OUTPUT.value}. Next, look at what a run would see, and train:")
    summary.print_line(
        f"  python -m semiseg_jax.data.preview --config={config} --output=preview.png"
    )
    summary.print_line(f"  python -m semiseg_jax.main --config={config}")


def _write_annotations() -> None:
    """Writes masks as annotations."""
    from semiseg_jax.data.annotations import export, summary

    source, output = _paths()
    done = export.write(
        source,
        str(_TO.value),
        output,
        images=Path(_IMAGES.value) if _IMAGES.value else None,
        background=_BACKGROUND.value,
        names=_CLASSES.value or (),
        link=_LINK.value,
        min_area=_MIN_AREA.value,
    )
    summary.print_export(done, _MIN_AREA.value)
    summary.print_line(f"Written: {_OUTPUT.value}. When they are corrected, this reads them back:")
    back = "" if done.left_out else " --background=ignore"
    name = shlex.quote(_OUTPUT.value)
    summary.print_line(
        f"  python -m semiseg_jax.data.convert --input={name} --output=corrected{back}"
    )


if __name__ == "__main__":
    app.run(main, flags_parser=cli.parse_flags)
