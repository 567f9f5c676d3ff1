"""Plots of the report: curves and matrices as SVG, scatter plots and maps as PNG.

Each plot is small and complete, so that a phone shows it at full screen width.
"""

import dataclasses
import functools
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64, UInt8
from PIL import Image

from semiseg_jax.data import fonts, visualize
from semiseg_jax.data.image_io import IGNORE
from semiseg_jax.runtime.plain_matplotlib import default_style, figure, font_manager

# Colours that colour-blind people can tell apart (Okabe and Ito).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
# Size of a plot in inches; at 96 pixels per inch slightly wider than a phone.
_WIDTH, _HEIGHT = 4.3, 2.7
# Font size in points.
_TEXT = 8
# Pixels between the pictures of a contact sheet.
_GAP = 6
# A confusion matrix of more classes has no room for numbers in its cells.
_MAX_NUMBERED_CLASSES = 24
# Colours of pixels by which of two label maps is correct; pixels without a label are white.
# Colour-blind people can distinguish blue and vermilion.
DIFFERENCES = {
    "both": (232, 234, 237),
    "later": (0, 114, 178),
    "earlier": (213, 94, 0),
    "neither": (90, 90, 90),
}


@dataclasses.dataclass(frozen=True)
class Curve:
    """Values of a stage over the steps of the run.

    Attributes:
        name: name of the stage.
        colour: colour of the line.
        dashed: whether the line is dashed; True for the control.
        points: (step, value) pairs by step.
    """

    name: str
    colour: str
    dashed: bool
    points: Sequence[tuple[float, float]]


def stage_colour(number: int) -> str:
    """Returns the colour of the stage with that number."""
    return COLOURS[number % len(COLOURS)]


@default_style()
def plot_curves(title: str, lines: Sequence[Curve], dots: bool = False) -> bytes:
    """Plots lines over the steps of the run as SVG.

    Args:
        title: name of the quantity, with its unit.
        lines: curves; one without points is left out.
        dots: whether to mark the points.
    """
    # Margins are fixed: an automatic layout would draw everything twice, at the end of each stage.
    # The left one has room for a learning rate such as 0.00425.
    canvas = figure.Figure(figsize=(_WIDTH, _HEIGHT))
    axes = canvas.add_axes((0.15, 0.26, 0.83, 0.65))
    for line in lines:
        if line.points:
            axes.plot(
                *zip(*line.points, strict=True),
                color=line.colour,
                linestyle="--" if line.dashed else "-",
                marker="o" if dots or len(line.points) == 1 else None,
                markersize=4,
                linewidth=1.4,
                label=line.name,
            )
    axes.set_title(title, fontsize=_TEXT + 1, loc="left")
    axes.set_xlabel("steps since the start of the run", fontsize=_TEXT)
    axes.tick_params(labelsize=_TEXT)
    axes.ticklabel_format(axis="y", scilimits=(-5, 6))
    axes.grid(alpha=0.3)
    layout: Any = {"loc": "lower center", "columnspacing": 1.2, "handlelength": 1.6}
    canvas.legend(ncols=4, fontsize=_TEXT, frameon=False, **layout)
    return _svg(canvas)


@default_style()
def plot_confusion(matrix: Int64[np.ndarray, "classes classes"], classes: Sequence[str]) -> bytes:
    """Plots a confusion matrix as SVG, in percent of the pixels of each row; rows are labels."""
    percent = 100 * row_shares(matrix)
    side = max(0.34 * len(classes) + 1.4, _WIDTH)
    canvas = figure.Figure(figsize=(side, side), layout="constrained")
    axes = canvas.add_subplot()
    axes.imshow(percent, cmap="cividis", vmin=0, vmax=100)
    ticks = range(len(classes))
    texts, font_files = zip(*(fonts.choose(name, _has_glyph) for name in classes), strict=True)
    # A "$" in a name starts no formula.
    axes.set_xticks(ticks, texts, rotation=90, fontsize=_TEXT, parse_math=False)
    axes.set_yticks(ticks, texts, fontsize=_TEXT, parse_math=False)
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        for label, file in zip(labels, font_files, strict=True):
            if file is not None:
                label.set_fontproperties(font_manager.FontProperties(fname=file, size=_TEXT))
    axes.set_xlabel("predicted", fontsize=_TEXT)
    axes.set_ylabel("label", fontsize=_TEXT)
    if len(classes) <= _MAX_NUMBERED_CLASSES:
        for row, column in np.ndindex(*percent.shape):
            if np.isfinite(value := percent[row, column]):
                colour = "black" if value > 55 else "white"
                centred: Any = {"ha": "center", "va": "center"}
                text = f"{value:.0f}"
                axes.text(column, row, text, color=colour, fontsize=_TEXT - 1, **centred)
    return _svg(canvas)


@functools.lru_cache(maxsize=1024)
def _has_glyph(character: str) -> bool:
    """Returns whether Matplotlib's default font has a glyph for a character."""
    return ord(character) in _default_charmap()


@functools.cache
def _default_charmap() -> frozenset[int]:
    path = font_manager.findfont(font_manager.FontProperties())
    return frozenset(font_manager.get_font(path).get_charmap())


def row_shares(
    matrix: Int64[np.ndarray, "classes classes"],
) -> Float64[np.ndarray, "classes classes"]:
    """Returns each cell's share of its row, in 0..1; NaN in rows without a pixel."""
    totals = matrix.sum(axis=1, keepdims=True).astype(float)
    return np.divide(matrix, totals, out=np.full(matrix.shape, np.nan), where=totals > 0)


# Titles of the panels by key of norms.json.
_PANELS = {
    "mean": "running mean",
    "var": "running variance",
    "scale": "scale",
    "bias": "shift",
}


@default_style()
def plot_norms(layer: str, values: Mapping[str, Mapping[str, Sequence[float]]]) -> bytes:
    """Plots the weak against the strong norm of a layer as PNG, with a dot per channel.

    Source: the statistics of figure 1 of the paper, which shows them as distributions.

    Args:
        layer: name of the layer.
        values: {"mean", "var", "scale", "bias": {"weak", "strong": values by channel}}.
    """
    shown = [key for key in _PANELS if len(values[key]) == 2]
    rows = -(-len(shown) // 2)
    height = 0.4 + 1.9 * rows
    canvas = figure.Figure(figsize=(_WIDTH, height))
    edges = {"left": 0.12, "right": 0.98, "bottom": 0.4 / height, "top": 1 - 0.5 / height}
    canvas.subplots_adjust(**edges, wspace=0.34, hspace=0.5)
    canvas.suptitle(layer, fontsize=_TEXT + 1, y=1 - 0.06 / height, va="top")
    for number, key in enumerate(shown):
        axes = canvas.add_subplot(rows, 2, number + 1)
        weak, strong = values[key]["weak"], values[key]["strong"]
        ends = [min(*weak, *strong), max(*weak, *strong)]
        axes.plot(ends, ends, color="0.6", linewidth=1)
        axes.plot(weak, strong, "o", color=COLOURS[0], markersize=2.5, alpha=0.6)
        axes.set_title(_PANELS[key], fontsize=_TEXT)
        axes.set_xlabel("weak", fontsize=_TEXT - 1, labelpad=1)
        axes.set_ylabel("strong", fontsize=_TEXT - 1, labelpad=1)
        axes.tick_params(labelsize=_TEXT - 1)
        axes.locator_params(nbins=4)
    content = io.BytesIO()
    canvas.savefig(content, format="png", dpi=130, metadata={"Software": None})
    return content.getvalue()


def side_by_side(plots: Sequence[bytes]) -> bytes:
    """Joins pictures into one PNG, from left to right."""
    images = [Image.open(io.BytesIO(content)) for content in plots]
    size = (sum(image.width for image in images), max(image.height for image in images))
    row = Image.new("RGB", size, visualize.PAPER)
    for number, image in enumerate(images):
        row.paste(image, (sum(before.width for before in images[:number]), 0))
    return _png(row)


def plot_differences(
    truth: UInt8[np.ndarray, "h w"],
    earlier: UInt8[np.ndarray, "h w"],
    later: UInt8[np.ndarray, "h w"],
) -> bytes:
    """Returns a PNG in the colours of DIFFERENCES, white where there is no label."""
    # 0: both are correct, 1: only the earlier one, 2: only the later one, 3: neither.
    code = 3 - 2 * (earlier == truth) - (later == truth)
    index = np.array([0, 2, 1, 3], np.uint8)[code]  # in the order of DIFFERENCES
    index[truth == IGNORE] = len(DIFFERENCES)
    return _palette_png(index, [*DIFFERENCES.values(), (255, 255, 255)])


def plot_changes(before: UInt8[np.ndarray, "h w"], now: UInt8[np.ndarray, "h w"]) -> bytes:
    """Returns a PNG with changed pixels in blue, others in grey."""
    colours = [DIFFERENCES["both"], DIFFERENCES["later"]]
    return _palette_png((before != now).astype(np.uint8), colours)


def contact_sheet(
    titles: Sequence[str],
    rows: Sequence[Sequence[UInt8[np.ndarray, "_ _ 3"]]],
    classes: Iterable[tuple[str, Sequence[int]]],
) -> bytes:
    """Arranges pictures in rows, with titles above the columns and a legend of classes below.

    Args:
        titles: titles of the columns.
        rows: pictures, all of one size within a row.
        classes: (name, colour) of each class.

    Returns:
        A PNG.
    """
    column_width = max(row[0].shape[1] for row in rows) + _GAP
    legend = visualize.legend(classes, column_width * len(titles) - _GAP)
    headings = [visualize.words(title, visualize.TEXT) for title in titles]
    top = headings[0].height
    heights = [row[0].shape[0] + _GAP for row in rows]
    size = (legend.width, top + sum(heights) + legend.height)
    image = Image.new("RGB", size, visualize.PAPER)
    for column, heading in enumerate(headings):
        image.paste(heading, (column * column_width, 0))
    for number, row in enumerate(rows):
        y = top + sum(heights[:number])
        for column, picture in enumerate(row):
            image.paste(Image.fromarray(picture), (column * column_width, y))
    image.paste(legend, (0, top + sum(heights)))
    return _png(image)


def _palette_png(
    indices: UInt8[np.ndarray, "h w"], colours: Sequence[tuple[int, int, int]]
) -> bytes:
    image = Image.fromarray(indices)
    image.putpalette(np.array(colours, np.uint8).ravel().tolist())
    return _png(image)


def _png(image: Image.Image) -> bytes:
    content = io.BytesIO()
    image.save(content, "PNG", optimize=True)
    return content.getvalue()


def _svg(canvas: Any) -> bytes:
    content = io.BytesIO()
    canvas.savefig(content, format="svg", metadata={"Date": None, "Creator": None})
    return content.getvalue()
