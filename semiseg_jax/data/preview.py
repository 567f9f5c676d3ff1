"""Pictures of what training sees: python -m semiseg_jax.data.preview --config=… --output=F.png

F.png is a contact sheet of the views that a student's first steps take from either stream, with
their labels, and what was drawn for each. F_operations.png shows each operation of strong
augmentation at the low end, the middle and the high end of its range, on one of these images.
"""

import dataclasses
import io
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags
from etils import epath
from jaxtyping import Int64, UInt8
from PIL import Image, ImageDraw

from semiseg_jax import command_line
from semiseg_jax.data import labels, pipeline, sda, sources, streams, weak
from semiseg_jax.data.pictures import PALE, PAPER, TEXT, Picture, legend, overlay, shortened, words
from semiseg_jax.errors import UserError

# In pixels of the sheet: about how wide one picture is, and the space between things.
_CELL, _OPERATION_CELL = 300, 230
_GAP, _CARD_GAP, _MARGIN = 4, 22, 28
_LINE, _EMPTY = (255, 60, 130), (236, 238, 241)
_TITLE, _HEADING = 30, 24
_LEGEND_WIDTH = 1500

Operations = list[tuple[str, sda.Magnitude]]


@dataclasses.dataclass(frozen=True)
class View:
    """One image of a training batch, and how it came about.

    Attributes:
        example: whose view it is.
        image, label: as training gets them; [crop].
        without_sda: the same view before strong augmentation.
        source: the whole image.
        geometry: scale, crop and mirror that were drawn.
        operations: names and magnitudes of strong augmentation in the order applied.
    """

    example: sources.Example
    image: Picture
    label: UInt8[np.ndarray, "h w"]
    without_sda: Picture
    source: UInt8[np.ndarray, "sh sw 3"]
    geometry: weak.Geometry
    operations: Operations


# --- What is shown -------------------------------------------------------------------------------


def views(
    config: Any,
    dataset: sources.Dataset,
    pseudo: Sequence[sources.Example],
    taken: streams.Streams,
    seed: Int64[np.ndarray, "2"],
    colour: UInt8[np.ndarray, "3"],
    count: int,
) -> dict[str, list[View]]:
    """The first views that a stage takes from its streams, from step 0 on.

    Args:
        config, dataset, pseudo, taken, seed, colour: as `pipeline.train_batches` takes them.
        count: of each stream.

    Returns:
        Views by stream, "weak" and "strong"; none where the stage takes no such stream.
    """
    plain = config.copy_and_resolve_references()
    plain.sda.num_ops = 0
    known = {"labeled": {e.id: e for e in dataset.labeled}, "pseudo": {e.id: e for e in pseudo}}
    wanted = {name: count if taken.size(name) else 0 for name in ("weak", "strong")}
    found: dict[str, list[View]] = {name: [] for name in wanted}
    is_strong = streams.slots(taken, groups=1).strong
    # As many steps as fill the larger stream.
    steps = range(max(-(-wanted[name] // max(taken.size(name), 1)) for name in wanted))
    batches, plain_batches = (
        pipeline.train_batches(c, dataset, pseudo, taken, seed, steps, colour)
        for c in (config, plain)
    )
    for batch, before in zip(batches, plain_batches, strict=True):
        for place, strong in enumerate(is_strong):
            stream = found["strong" if strong else "weak"]
            if len(stream) == count:
                continue
            kind = "pseudo" if batch.is_pseudo[place] else "labeled"
            example = known[kind][batch.ids[place]]
            source = labels.read_image(example.image)
            draws = pipeline.view_draws(batch.seed[place], bool(strong), source.shape[:2], config)
            stream.append(
                View(
                    example,
                    batch.image[place],
                    batch.label[place],
                    before.image[place],
                    source,
                    *draws,
                )
            )
    return found


def describe_geometry(view: View) -> str:
    """Scale, crop and mirror of a view, for people."""
    geometry = view.geometry
    scale = float(geometry.scaled[0] / view.source.shape[0])
    padded = tuple(geometry.valid.numpy()) != view.label.shape
    parts = [f"scale {scale:.2f}", "mirrored" if geometry.mirrored else "", "padded" * padded]
    return ", ".join(part for part in parts if part)


def describe_magnitude(magnitude: sda.Magnitude) -> str:
    """The entries of a magnitude that a person can judge, such as "sigma 1.42"."""
    parts = []
    for key, value in magnitude.items():
        array = np.asarray(value)
        if key == "seed" or (array.dtype == bool and not array.any()):
            continue
        if array.dtype == bool and array.ndim:
            parts.append(" ".join(name for name, on in zip("RGB", array, strict=True) if on))
        elif array.dtype == bool:
            parts.append(key.replace("_", " "))
        elif key == "permutation":
            parts.append("RGB from " + "".join("RGB"[i] for i in array))
        elif key == "cells":
            parts.append(f"{array[0]}x{array[1]} cells")
        else:
            numbers = np.unique(array) if (array == array.flat[0]).all() else array
            digits = 0 if array.dtype.kind == "i" or np.abs(array).max() >= 10 else 2
            parts.append(f"{key} " + " ".join(f"{n:.{digits}f}" for n in np.atleast_1d(numbers)))
    return ", ".join(parts)


def outline(view: View) -> Picture:
    """The whole image with a frame around what the view shows of it."""
    height, width = view.source.shape[:2]
    geometry = view.geometry
    ratio = np.array([height, width]) / geometry.scaled.numpy()
    top, left = geometry.corner.numpy() * ratio
    bottom, right = (geometry.corner.numpy() + geometry.valid.numpy()) * ratio
    if geometry.mirrored:
        left, right = width - right, width - left
    image = Image.fromarray(view.source)
    thickness = max(round(max(height, width) / 120), 1)
    box = (int(left), int(top), max(round(right) - 1, int(left)), max(round(bottom) - 1, int(top)))
    ImageDraw.Draw(image).rectangle(box, outline=_LINE, width=thickness)
    return np.asarray(image)


# --- Sheets --------------------------------------------------------------------------------------


def contact_sheet(
    sections: Sequence[tuple[str, str, Sequence[View]]], dataset: sources.Dataset, title: str
) -> Image.Image:
    """A sheet of views in sections (heading, explanation, views), below the classes' legend."""
    classes = zip(dataset.classes, dataset.palette, strict=True)
    blocks = [words(title, _TITLE), legend(classes, _LEGEND_WIDTH)]
    for heading, explanation, shown in sections:
        blocks += [words(heading, _HEADING), words(explanation, TEXT, PALE)]
        cards = [_view_card(view, dataset.palette) for view in shown]
        blocks.append(_grid(cards, 2))
    return _stack(blocks)


def operations_sheet(image: Picture, config: Any, title: str) -> Image.Image:
    """A sheet of every operation at the low end, the middle and the high end of its range."""
    as_is = _card([_fitted(image, _OPERATION_CELL)], ["the image"], [[]])
    cards = [as_is]
    for number, (name, operation) in enumerate(sda.OPS.items()):
        off = "" if name in config.sda.ops else "  (switched off in this config)"
        pictures, captions = [], []
        for share in (0.0, 0.5, 1.0):
            magnitude = operation.at(share, (number, 0), config.sda.magnitude)
            changed = operation.apply(image, **magnitude).numpy()
            pictures.append(_fitted(changed, _OPERATION_CELL))
            captions.append([describe_magnitude(magnitude)])
        if not any(map(any, captions)):  # It has no magnitude: one picture says all.
            pictures, captions = pictures[:1], captions[:1]
        cards.append(_card(pictures, [name + off], captions))
    explanation = (
        "Low end, middle and high end of the range; where channels are drawn independently, all "
        "have the same here."
    )
    return _stack([words(title, _TITLE), words(explanation, TEXT, PALE), _grid(cards, 3)])


def _view_card(view: View, palette: Sequence[Sequence[int]]) -> Image.Image:
    """The whole image, the view, and the view with its labels, where it has any; and captions."""
    seen = _fitted(view.image, _CELL)
    pictures = [_inside(outline(view), seen.size), seen]
    if view.operations:
        pictures.insert(1, _fitted(view.without_sda, _CELL))
    if view.example.mask is not None:
        pictures.append(_fitted(overlay(view.image, view.label, palette), _CELL))
    drawn = [f"{name} {describe_magnitude(magnitude)}" for name, magnitude in view.operations]
    lines = [[describe_geometry(view)], drawn] if view.operations else [[describe_geometry(view)]]
    return _card(pictures, [view.example.id], lines)


def _fitted(image: Picture, width: int) -> Image.Image:
    """The picture about `width` wide, enlarged by whole pixels."""
    picture = Image.fromarray(image)
    if picture.width > 1.5 * width:
        size = _scaled(picture.size, width / picture.width)
        return picture.resize(size, Image.Resampling.LANCZOS)
    factor = max(round(width / picture.width), 1)
    return picture.resize(_scaled(picture.size, factor), Image.Resampling.NEAREST)


def _inside(image: Picture, size: tuple[int, int]) -> Image.Image:
    """The whole picture, as large as fits (width, height) of `size`, in its middle."""
    picture = Image.fromarray(image)
    factor = min(size[0] / picture.width, size[1] / picture.height)
    picture = picture.resize(_scaled(picture.size, factor), Image.Resampling.LANCZOS)
    cell = Image.new("RGB", size, _EMPTY)
    cell.paste(picture, ((size[0] - picture.width) // 2, (size[1] - picture.height) // 2))
    return cell


def _scaled(size: tuple[int, int], factor: float) -> tuple[int, int]:
    return max(round(size[0] * factor), 1), max(round(size[1] * factor), 1)


def _card(
    pictures: Sequence[Image.Image], heading: Sequence[str], columns: Sequence[Sequence[str]]
) -> Image.Image:
    """Pictures side by side, lines above, and below each of them a column of lines."""
    width = sum(p.width for p in pictures) + _GAP * (len(pictures) - 1)
    line = round(1.35 * TEXT)
    above = line * len(heading) + 2
    below = line * max((len(c) for c in columns), default=0) + 4
    height = above + max(p.height for p in pictures)
    card = Image.new("RGB", (width, height + below), PAPER)
    for row, text in enumerate(heading):
        card.paste(words(shortened(text, TEXT, width), TEXT), (0, row * line))
    x = 0
    for place, picture in enumerate(pictures):
        card.paste(picture, (x, above))
        last = place == len(columns) - 1
        room = width - x if last else picture.width
        for row, text in enumerate(columns[place] if place < len(columns) else ()):
            caption = words(shortened(text, TEXT, room), TEXT, PALE)
            card.paste(caption, (x, height + 3 + row * line))
        x += picture.width + _GAP
    return card


def _grid(cards: Sequence[Image.Image], columns: int) -> Image.Image:
    """Cards in rows, in cells as wide as the widest of them."""
    rows = [cards[i : i + columns] for i in range(0, len(cards), columns)]
    cell = max(card.width for card in cards) + _CARD_GAP
    heights = [max(card.height for card in row) + _CARD_GAP // 2 for row in rows]
    grid = Image.new("RGB", (cell * min(columns, len(cards)) - _CARD_GAP, sum(heights)), PAPER)
    for number, row in enumerate(rows):
        for column, card in enumerate(row):
            grid.paste(card, (column * cell, sum(heights[:number])))
    return grid


def _stack(blocks: Sequence[Image.Image]) -> Image.Image:
    """Blocks one below the other, with margins."""
    width = max(block.width for block in blocks) + 2 * _MARGIN
    height = sum(block.height + 8 for block in blocks) + 2 * _MARGIN
    sheet = Image.new("RGB", (width, height), PAPER)
    y = _MARGIN
    for block in blocks:
        sheet.paste(block, (_MARGIN, y))
        y += block.height + 8
    return sheet


# --- The command ---------------------------------------------------------------------------------


def make_sheets(
    config: Any, title: str, count: int, pseudo_labels: str | None = None
) -> tuple[Image.Image, Image.Image]:
    """The contact sheet and the sheet of operations.

    Args:
        config: the whole config, checked.
        title: names it on the sheets.
        count: views of each stream.
        pseudo_labels: the folder of a run's pseudo-labels, if there are any yet.

    Raises:
        UserError: as `sources.load` and `pipeline.train_batches`, or there are no such labels.
    """
    dataset = sources.load(config)
    stage = "student" if config.rounds.count and dataset.unlabeled else "teacher"
    taken = streams.of_stage(config, stage)
    seed = streams.stage_seed(config.seed, int(stage == "student"), stage)
    pseudo: Sequence[sources.Example] = dataset.unlabeled
    if pseudo_labels:
        pseudo = _pseudo_examples(dataset, pseudo_labels)
    colour = _padding_colour(config, stage)
    shown = views(config, dataset, pseudo, taken, seed, colour, count)
    name = f"{stage} 1" if stage == "student" else stage
    sections = list(_sections(shown, name))
    if not any(view.example.mask for view in shown["strong"]):
        # Labels that are known, to see that they stay where they are.
        also = dataclasses.replace(taken, weak=(), strong=("labeled",))
        strong = views(config, dataset, (), also, seed, colour, count)["strong"]
        heading = "Labelled images as the strong stream would show them"
        sections.append((heading, _EXPLANATIONS["strong"], strong))
    some = (shown["strong"] or shown["weak"])[0].without_sda
    return (
        contact_sheet(sections, dataset, f"{title}: what {name} sees, from step 0 on"),
        operations_sheet(some, config, f"{title}: the operations of strong augmentation"),
    )


def _pseudo_examples(dataset: sources.Dataset, folder: str) -> tuple[sources.Example, ...]:
    """The unlabelled images with a run's label maps."""
    found = pipeline.pseudo_examples(dataset, epath.Path(folder))
    lost = [e.id for e in found if e.mask and not epath.Path(e.mask).exists()]
    if lost:
        raise UserError(
            f"--pseudo_labels={folder} has no label map of {len(lost)} of {len(found)} unlabelled "
            f"images, {lost[0]} first: give the folder of a run that has labelled all of them."
        )
    return found


_EXPLANATIONS = {
    "weak": "The image and its crop, the view, and its labels.",
    "strong": "The image and its crop, the view before the operations, after them, and its labels.",
}


def _sections(shown: dict[str, list[View]], name: str) -> Iterator[tuple[str, str, Sequence[View]]]:
    for stream, found in shown.items():
        if not found:
            continue
        explanation = _EXPLANATIONS[stream]
        if not all(view.example.mask for view in found):
            explanation += (
                " Pseudo-labels come with a run; --pseudo_labels=WORKDIR/round_0/teacher/"
                "pseudo_labels shows them."
            )
        yield f"The {stream} stream of {name}", explanation, found


def _padding_colour(config: Any, stage: str) -> UInt8[np.ndarray, "3"]:
    """The padding of a stage's images: what its network normalises to 0."""
    from semiseg_jax.models import deeplab

    other = config.rounds.student_model if stage == "student" else ""
    model_config = deeplab.config_for(config, other or config.model.backbone)
    return deeplab.input_mean(model_config)


def _png(sheet: Image.Image) -> bytes:
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


def main(argv: list[str]) -> None:
    """Writes the sheets of the config of the command line."""
    config_path = command_line.config_path(argv)
    from semiseg_jax import settings

    values = flags.FLAGS
    if not values.output or not values.output.lower().endswith(".png"):
        sys.exit("Error: Say where the sheet goes, such as --output=preview.png.")
    try:
        settings.check(values.config)
        title = settings.run_name(config_path)
        sheets = make_sheets(values.config, title, values.images, values.pseudo_labels)
        output = Path(values.output)
        for path, sheet in zip(_paths(output), sheets, strict=True):
            labels.write_bytes(path, _png(sheet))
            print(path)
    except UserError as error:
        sys.exit(f"Error: {error}")


def _paths(output: Path) -> Iterable[Path]:
    return output, output.with_stem(f"{output.stem}_operations")


if __name__ == "__main__":
    command_line.define_config("Whose data to show")
    flags.DEFINE_string("output", None, "The contact sheet, F.png; F_operations.png comes with it.")
    flags.DEFINE_integer("images", 6, "How many views of each stream to show.", lower_bound=1)
    flags.DEFINE_string(
        "pseudo_labels",
        None,
        "A run's pseudo-labels, such as runs/X/round_0/teacher/pseudo_labels.",
    )
    app.run(main, flags_parser=command_line.parse)
