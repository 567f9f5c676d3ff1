"""The tables and sentences at the end of a conversion."""

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from semiseg_jax.data.annotations.export import Export
from semiseg_jax.data.annotations.mask_folder import Conversion


def print_conversion(format_: str, done: Conversion, overlap: str) -> None:
    """Prints what became of annotations.

    Args:
        format_: the format of the annotations.
        done: what `mask_folder.write` did.
        overlap: `DrawOptions.overlap`.
    """
    print_line(f"Format: {format_}")
    _print_table("Images", list(done.images.items()))
    _print_objects(done)
    print_line(
        f"{done.counts.contested} pixels are in objects of several classes: {overlap} objects are "
        f"on top (--overlap). {done.counts.uncovered} pixels "
        f"({100 * done.counts.uncovered / max(done.counts.pixels, 1):.1f} %) are in no object "
        "(--background)."
    )
    print_line(
        f"{done.empty} images have empty annotations: {done.empty_are} (--empty). {done.unnamed} "
        "images are in no annotation: unlabeled."
    )
    for count, sentence in (
        (done.areas_missing, "images have objects, and none with an area: unlabeled."),
        (done.left_out, "images for evaluation have no mask: left out."),
        (done.turned, "images were annotated as stored: their masks are turned upright (EXIF)."),
    ):
        if count:
            print_line(f"{count} {sentence}")
    _print_named("annotated images are missing", done.missing)
    _print_named(
        "images have an EXIF orientation, and their sizes do not tell whether they were annotated "
        "upright, as is assumed: look at them",
        done.orientation_unclear,
    )
    for note in done.notes:
        print_line(f"Note: {note}")


def _print_objects(done: Conversion) -> None:
    """Prints the objects by class and the share of the pixels, and what is not drawn."""
    total = max(int(done.pixels.sum()), 1)
    rows = [
        (name, f"{done.counts.objects.get(name, 0)} ({100 * done.pixels[i] / total:.2f} %)")
        for i, name in enumerate(done.classes)
    ]
    ignored = f"{100 * done.pixels[-1] / total:.2f} %"
    _print_table("Objects (share of the pixels)", [*rows, ("no label (255)", ignored)])
    if done.counts.skipped:
        _print_table(
            "Not drawn as they are",
            [
                (reason, f"{count}, first in {done.counts.examples[reason]}")
                for reason, count in done.counts.skipped.items()
            ],
        )


def print_export(done: Export, min_area: int) -> None:
    """Prints what became of masks.

    Args:
        done: what `export.write` did.
        min_area: the fewest pixels of an object.
    """
    _print_table("Objects", list(done.objects.items()))
    print_line(f"{done.images} images, {done.with_holes} of the objects have holes.")
    _print_named("masks have no image", done.missing)
    if done.enlarged:
        print_line(f"{done.enlarged} masks are of downscaled images: enlarged to the images' size.")
    if done.too_small:
        print_line(f"{done.too_small} objects have fewer than {min_area} pixels: left out.")
    print_line(f"No objects: pixels of {done.left_out or 'no label (255)'}.")
    if done.left_out and done.has_ignored:
        print_line("Pixels of no label (255) are objects called __ignore__.")


def _print_named(what: str, names: Sequence[str]) -> None:
    if names:
        more = ", …" if len(names) > 3 else ""
        print_line(f"{len(names)} {what}: {', '.join(names[:3])}{more}")


def _print_table(title: str, rows: Sequence[tuple[str, object]]) -> None:
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    for name, value in rows:
        table.add_row(escape(name), escape(str(value)))
    _console().print(table)


def print_line(text: str) -> None:
    """Prints a line; where nobody reads any more, the process ends without a traceback."""
    _console().print(text, markup=False)


def _console() -> Console:
    return Console(highlight=False, soft_wrap=True, emoji=False)
