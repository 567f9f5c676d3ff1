"""Draws training views: python -m semiseg_jax.data.preview --config=… --output=F.png

F.png is a contact sheet of the views of both streams in the first steps of a student, with their
labels, geometry and operations; for methods that label inside the step also the views of unlabelled
images. F_operations.png shows each operation of strong augmentation at
the low end, the middle and the high end of its range, on one of these images.
"""

import dataclasses
import io
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags
from etils import epath
from jaxtyping import Int64, UInt8
from PIL import Image, ImageDraw

from semiseg_jax import stages
from semiseg_jax.data import (
    batch_layout,
    image_io,
    input_pipeline,
    load,
    sda,
    size_settings,
    weak_augment,
)
from semiseg_jax.data.visualize import (
    PAPER,
    SECONDARY_COLOUR,
    TEXT,
    Picture,
    legend,
    overlay,
    shorten,
    words,
)
from semiseg_jax.runtime import cli, fileio
from semiseg_jax.runtime.errors import UserError

# Approximate widths of a picture on either sheet, in pixels.
_CELL_WIDTH, _OPERATION_CELL_WIDTH = 300, 230
# Spaces between pictures, between cards, and around the sheet, in pixels.
_GAP, _CARD_GAP, _MARGIN = 4, 22, 28
# Colours of the frame around the crop, and of the space beside a picture in its cell.
_FRAME_COLOUR, _CELL_COLOUR = (255, 60, 130), (236, 238, 241)
# Font sizes and the width of the legend, in pixels.
_TITLE, _HEADING = 30, 24
_LEGEND_WIDTH = 1500

Operations = list[tuple[str, sda.Magnitude]]


@dataclasses.dataclass(frozen=True)
class View:
    """An image of a training batch and the random draws that produced it.

    Attributes:
        example: the example of the view.
        image, label: the arrays of the training batch; [crop].
        without_sda: the same view before strong augmentation.
        source: the whole image.
        geometry: the drawn scale, crop and mirror.
        operations: names and magnitudes of strong augmentation, in the order of application.
    """

    example: load.Example
    image: Picture
    label: UInt8[np.ndarray, "h w"]
    without_sda: Picture
    source: UInt8[np.ndarray, "sh sw 3"]
    geometry: weak_augment.Geometry
    operations: Operations


@dataclasses.dataclass(frozen=True)
class UnlabeledViews:
    """The views of an unlabelled image, as a method gets them that labels inside the step.

    Attributes:
        id: of the image.
        images: its views; [crop].
        names: what each of them is.
    """

    id: str
    images: Sequence[Picture]
    names: Sequence[str]


# --- Views ---------------------------------------------------------------------------------------


def first_views(
    config: Any,
    dataset: load.Dataset,
    pseudo: Sequence[load.Example],
    stage_streams: batch_layout.BatchSpec,
    seed: Int64[np.ndarray, "2"],
    pad_value: UInt8[np.ndarray, "3"],
    count: int,
) -> dict[str, list[View]]:
    """Returns the first views of a stage in each stream, from step 0 on.

    Args:
        config, dataset, pseudo, stage_streams, seed, pad_value: arguments of
            `input_pipeline.train_batches`.
        count: number of views of each stream.

    Returns:
        Views by stream, "weak" and "strong"; an empty list if the stage does not use the stream.
    """
    config_without_sda = config.copy_and_resolve_references()
    config_without_sda.sda.num_ops = 0
    examples = {"labeled": {e.id: e for e in dataset.labeled}, "pseudo": {e.id: e for e in pseudo}}
    counts = {name: count if stage_streams.size(name) else 0 for name in ("weak", "strong")}
    views: dict[str, list[View]] = {name: [] for name in counts}
    is_strong = batch_layout.lay_out_batch(stage_streams, groups=1).strong
    num_steps = max(-(-counts[name] // max(stage_streams.size(name), 1)) for name in counts)
    batches, batches_without_sda = (
        input_pipeline.train_batches(
            c, dataset, pseudo, stage_streams, seed, range(num_steps), pad_value
        )
        for c in (config, config_without_sda)
    )
    for batch, without_sda in zip(batches, batches_without_sda, strict=True):
        for i, strong in enumerate(is_strong):
            stream = views["strong" if strong else "weak"]
            if len(stream) == count:
                continue
            kind = "pseudo" if batch.is_pseudo[i] else "labeled"
            example = examples[kind][batch.ids[i]]
            source = image_io.read_image(example.image)
            geometry, operations = input_pipeline.sample_view(
                batch.seed[i], bool(strong), source.shape[:2], config
            )
            stream.append(
                View(
                    example=example,
                    image=batch.image[i],
                    label=batch.label[i],
                    without_sda=without_sda.image[i],
                    source=source,
                    geometry=geometry,
                    operations=operations,
                )
            )
    return views


def first_unlabeled_views(
    config: Any,
    dataset: load.Dataset,
    spec: batch_layout.BatchSpec,
    seed: Int64[np.ndarray, "2"],
    pad_value: UInt8[np.ndarray, "3"],
    count: int,
) -> list[UnlabeledViews]:
    """Returns the views of the first unlabelled images of a stage, from step 0 on.

    Args:
        config, dataset, spec, seed, pad_value: arguments of `input_pipeline.train_batches`.
        count: number of images.
    """
    assert spec.views is not None
    names = ["weak view"] * spec.views.weak
    names += [f"strong view {i + 1}" for i in range(spec.views.strong)]
    found: list[UnlabeledViews] = []
    steps = range(-(-count // spec.batch_unlabeled))
    for batch in input_pipeline.train_batches(config, dataset, (), spec, seed, steps, pad_value):
        assert batch.views is not None
        found += [
            UnlabeledViews(name, list(images), names)
            for name, images in zip(batch.unlabeled_ids, batch.views, strict=True)
        ]
    return found[:count]


def describe_geometry(view: View) -> str:
    """Returns a caption with the scale, mirroring and padding of a view."""
    geometry = view.geometry
    scale = float(geometry.scaled[0] / view.source.shape[0])
    padded = tuple(geometry.valid.numpy()) != view.label.shape
    phrases = [f"scale {scale:.2f}", "mirrored" if geometry.mirrored else "", "padded" * padded]
    return ", ".join(phrase for phrase in phrases if phrase)


def describe_magnitude(magnitude: sda.Magnitude) -> str:
    """Returns a caption with the displayable entries of a magnitude, such as "sigma 1.42"."""
    phrases = []
    for key, value in magnitude.items():
        array = np.asarray(value)
        if key == "seed" or (array.dtype == bool and not array.any()):
            continue
        if array.dtype == bool and array.ndim:
            phrases.append(" ".join(name for name, on in zip("RGB", array, strict=True) if on))
        elif array.dtype == bool:
            phrases.append(key.replace("_", " "))
        elif key == "permutation":
            phrases.append("RGB from " + "".join("RGB"[i] for i in array))
        elif key == "cells":
            phrases.append(f"{array[0]}x{array[1]} cells")
        else:
            numbers = np.unique(array) if (array == array.flat[0]).all() else array
            digits = 0 if array.dtype.kind == "i" or np.abs(array).max() >= 10 else 2
            phrases.append(f"{key} " + " ".join(f"{n:.{digits}f}" for n in np.atleast_1d(numbers)))
    return ", ".join(phrases)


def draw_crop_frame(view: View) -> Picture:
    """Returns the whole image with a frame around the crop of the view."""
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
    ImageDraw.Draw(image).rectangle(box, outline=_FRAME_COLOUR, width=thickness)
    return np.asarray(image)


# --- Sheets --------------------------------------------------------------------------------------


def contact_sheet(
    sections: Sequence[tuple[str, str, Sequence[View | UnlabeledViews]]],
    dataset: load.Dataset,
    title: str,
) -> Image.Image:
    """Draws sections of views (heading, explanation, views) below the legend of the classes."""
    classes = zip(dataset.classes, dataset.palette, strict=True)
    blocks = [words(title, _TITLE), legend(classes, _LEGEND_WIDTH)]
    for heading, explanation, views in sections:
        blocks += [words(heading, _HEADING), words(explanation, TEXT, SECONDARY_COLOUR)]
        cards = [
            _view_card(view, dataset.palette) if isinstance(view, View) else _views_card(view)
            for view in views
        ]
        blocks.append(_grid(cards, 2))
    return _stack(blocks)


def operations_sheet(image: Picture, config: Any, title: str) -> Image.Image:
    """Draws every operation at the low end, the middle and the high end of its range."""
    cards = [_card([_resize_to_width(image, _OPERATION_CELL_WIDTH)], ["the image"], [[]])]
    for number, (name, operation) in enumerate(sda.OPS.items()):
        note = "" if name in config.sda.ops else "  (switched off in this config)"
        pictures, captions = [], []
        for fraction in (0.0, 0.5, 1.0):
            magnitude = operation.at_fraction(fraction, (number, 0), config.sda.magnitude)
            augmented = operation.apply(image, **magnitude).numpy()
            pictures.append(_resize_to_width(augmented, _OPERATION_CELL_WIDTH))
            captions.append([describe_magnitude(magnitude)])
        if not any(map(any, captions)):  # Without a magnitude, all three pictures are equal.
            pictures, captions = pictures[:1], captions[:1]
        cards.append(_card(pictures, [name + note], captions))
    explanation = (
        "Low end, middle and high end of the range; where channels are drawn independently, all "
        "have the same here."
    )
    return _stack(
        [words(title, _TITLE), words(explanation, TEXT, SECONDARY_COLOUR), _grid(cards, 3)]
    )


def _view_card(view: View, palette: Sequence[Sequence[int]]) -> Image.Image:
    """Draws the whole image, the view before and after SDA, and its labels, with captions."""
    view_picture = _resize_to_width(view.image, _CELL_WIDTH)
    pictures = [_fit_into(draw_crop_frame(view), view_picture.size), view_picture]
    captions = [[describe_geometry(view)]]
    if view.operations:
        pictures.insert(1, _resize_to_width(view.without_sda, _CELL_WIDTH))
        captions.append([f"{name} {describe_magnitude(m)}" for name, m in view.operations])
    if view.example.mask is not None:
        label_picture = overlay(view.image, view.label, palette)
        pictures.append(_resize_to_width(label_picture, _CELL_WIDTH))
    return _card(pictures, [view.example.id], captions)


def _views_card(views: UnlabeledViews) -> Image.Image:
    """Draws the views of an unlabelled image side by side."""
    pictures = [_resize_to_width(image, _CELL_WIDTH) for image in views.images]
    return _card(pictures, [views.id], [[name] for name in views.names])


def _resize_to_width(image: Picture, width: int) -> Image.Image:
    """Resizes an image to about `width`; enlarges only by a whole factor."""
    picture = Image.fromarray(image)
    if picture.width > 1.5 * width:
        size = _scale_size(picture.size, width / picture.width)
        return picture.resize(size, Image.Resampling.LANCZOS)
    factor = max(round(width / picture.width), 1)
    return picture.resize(_scale_size(picture.size, factor), Image.Resampling.NEAREST)


def _fit_into(image: Picture, size: tuple[int, int]) -> Image.Image:
    """Resizes an image to fit into (width, height) and centres it in a cell of that size."""
    picture = Image.fromarray(image)
    factor = min(size[0] / picture.width, size[1] / picture.height)
    picture = picture.resize(_scale_size(picture.size, factor), Image.Resampling.LANCZOS)
    cell = Image.new("RGB", size, _CELL_COLOUR)
    cell.paste(picture, ((size[0] - picture.width) // 2, (size[1] - picture.height) // 2))
    return cell


def _scale_size(size: tuple[int, int], factor: float) -> tuple[int, int]:
    return max(round(size[0] * factor), 1), max(round(size[1] * factor), 1)


def _card(
    pictures: Sequence[Image.Image], heading: Sequence[str], captions: Sequence[Sequence[str]]
) -> Image.Image:
    """Draws pictures side by side, below the lines of a heading, each above its caption's lines.

    The last caption may extend below further pictures.
    """
    width = sum(p.width for p in pictures) + _GAP * (len(pictures) - 1)
    line_height = round(1.35 * TEXT)
    top = line_height * len(heading) + 2
    bottom = top + max(p.height for p in pictures)
    caption_height = line_height * max((len(c) for c in captions), default=0) + 4
    card = Image.new("RGB", (width, bottom + caption_height), PAPER)
    for row, text in enumerate(heading):
        card.paste(words(shorten(text, TEXT, width), TEXT), (0, row * line_height))
    x = 0
    for i, picture in enumerate(pictures):
        card.paste(picture, (x, top))
        is_last_caption = i == len(captions) - 1
        max_width = width - x if is_last_caption else picture.width
        for row, text in enumerate(captions[i] if i < len(captions) else ()):
            line = words(shorten(text, TEXT, max_width), TEXT, SECONDARY_COLOUR)
            card.paste(line, (x, bottom + 3 + row * line_height))
        x += picture.width + _GAP
    return card


def _grid(cards: Sequence[Image.Image], columns: int) -> Image.Image:
    """Draws cards in rows of equally wide cells."""
    rows = [cards[i : i + columns] for i in range(0, len(cards), columns)]
    cell_width = max(card.width for card in cards) + _CARD_GAP
    heights = [max(card.height for card in row) + _CARD_GAP // 2 for row in rows]
    width = cell_width * min(columns, len(cards)) - _CARD_GAP
    grid = Image.new("RGB", (width, sum(heights)), PAPER)
    for number, row in enumerate(rows):
        for column, card in enumerate(row):
            grid.paste(card, (column * cell_width, sum(heights[:number])))
    return grid


def _stack(blocks: Sequence[Image.Image]) -> Image.Image:
    """Draws blocks below each other, with margins."""
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
    """Draws the contact sheet and the sheet of operations.

    Args:
        config: the whole config, checked.
        title: name of the config on the sheets.
        count: number of views of each stream.
        pseudo_labels: folder of a run's pseudo-labels; None to show unlabelled images.

    Raises:
        UserError: as `load_dataset` and `train_batches`, or a pseudo-label is missing.
    """
    config = size_settings.resolve(config)
    dataset = load.load_dataset(config)
    stage = "student" if config.rounds.count and dataset.unlabeled else "teacher"
    stage_streams = stages.batch_spec(config, stage)
    seed = stages.stage_seed(config.seed, int(stage == "student"), stage)
    pseudo: Sequence[load.Example] = dataset.unlabeled
    if pseudo_labels:
        pseudo = _pseudo_examples(dataset, pseudo_labels)
    pad_value = _pad_value(config, stage)
    views = first_views(config, dataset, pseudo, stage_streams, seed, pad_value, count)
    name = stages.stage_name(stage, 1)
    sections: list[tuple[str, str, Sequence[View | UnlabeledViews]]] = list(_sections(views, name))
    if stage_streams.views:
        unlabeled = first_unlabeled_views(config, dataset, stage_streams, seed, pad_value, count)
        heading = f"The unlabelled images of {name}, labelled inside the step"
        sections.append((heading, _EXPLANATIONS["unlabeled"], unlabeled))
    elif not any(view.example.mask for view in views["strong"]):
        # Labelled images in the strong stream show that SDA does not move the labels.
        labeled_strong = dataclasses.replace(stage_streams, weak=(), strong=("labeled",))
        strong = first_views(config, dataset, (), labeled_strong, seed, pad_value, count)["strong"]
        heading = "Labelled images as the strong stream would show them"
        sections.append((heading, _EXPLANATIONS["strong"], strong))
    image = (views["strong"] or views["weak"])[0].without_sda
    return (
        contact_sheet(sections, dataset, f"{title}: what {name} sees, from step 0 on"),
        operations_sheet(image, config, f"{title}: the operations of strong augmentation"),
    )


def _pseudo_examples(dataset: load.Dataset, folder: str) -> tuple[load.Example, ...]:
    """Returns the unlabelled examples with a run's pseudo-labels, which must all exist."""
    examples = input_pipeline.pseudo_examples(dataset, epath.Path(folder))
    missing = [e.id for e in examples if e.mask and not epath.Path(e.mask).exists()]
    if missing:
        raise UserError(
            f"--pseudo_labels={folder} has no label map of {len(missing)} of {len(examples)} "
            f"unlabelled images, {missing[0]} first: give the folder of a run that has labelled "
            "all of them.",
            code="pseudo-labels-incomplete",
        )
    return examples


_EXPLANATIONS = {
    "weak": "The image and its crop, the view, and its labels.",
    "unlabeled": "The views of an image: one crop, and other colours in each strong view. Methods "
    "that mix images do so after this.",
    "strong": "The image and its crop, the view before the operations, after them, and its labels.",
}


def _sections(
    views_by_stream: dict[str, list[View]], name: str
) -> Iterator[tuple[str, str, Sequence[View]]]:
    """Yields (heading, explanation, views) of each stream in use."""
    for stream, views in views_by_stream.items():
        if not views:
            continue
        explanation = _EXPLANATIONS[stream]
        if not all(view.example.mask for view in views):
            explanation += (
                " Pseudo-labels come with a run; --pseudo_labels=WORKDIR/round_0/teacher/"
                "pseudo_labels shows them."
            )
        yield f"The {stream} stream of {name}", explanation, views


def _pad_value(config: Any, stage: str) -> UInt8[np.ndarray, "3"]:
    """Returns the RGB padding of a stage's images, which its network normalises to 0."""
    from semiseg_jax.models import deeplab

    backbone = stages.stage_backbone(config, stage)
    return deeplab.input_mean(deeplab.config_for(config, backbone))


def main(argv: list[str]) -> None:
    """Writes the sheets of the config on the command line."""
    config_path = cli.start_command_with_config(argv)
    from semiseg_jax import config_check

    values = flags.FLAGS
    if not values.output or not values.output.lower().endswith(".png"):
        sys.exit("Error: Say where the sheet goes, such as --output=preview.png.")
    try:
        config_check.check(values.config)
        title = config_check.run_name(config_path)
        sheets = make_sheets(values.config, title, values.images, values.pseudo_labels)
        output = Path(values.output)
        paths = (output, output.with_stem(f"{output.stem}_operations"))
        for path, sheet in zip(paths, sheets, strict=True):
            buffer = io.BytesIO()
            sheet.save(buffer, "PNG")
            fileio.write_bytes(path, buffer.getvalue())
            print(path)
    except UserError as error:
        sys.exit(f"Error: {error}")


if __name__ == "__main__":
    cli.define_config_flag("Whose data to show")
    cli.define_path_flag("output", None, "The contact sheet, F.png; F_operations.png too.")
    flags.DEFINE_integer("images", 6, "How many views of each stream to show.", lower_bound=1)
    cli.define_path_flag(
        "pseudo_labels",
        None,
        "A run's pseudo-labels, such as runs/X/round_0/teacher/pseudo_labels.",
    )
    app.run(main, flags_parser=cli.parse_flags_and_config)
