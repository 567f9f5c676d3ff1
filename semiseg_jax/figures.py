"""The drawings of the report: curves and matrices as SVG, scatter plots and maps as PNG.

Each is small and stands alone, so that a phone shows it as wide as its screen.
"""

import dataclasses
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int64, UInt8
from matplotlib import figure
from PIL import Image

from semiseg_jax.data import pictures
from semiseg_jax.data.labels import IGNORE
from semiseg_jax.tables import COLOURS

# Inches; at 96 pixels an inch somewhat wider than a phone.
_WIDTH, _HEIGHT = 4.3, 2.7
_TEXT = 8
# Pixels between the pictures of a sheet.
_GAP = 6
# More classes than these leave no room for the figures in a matrix.
_MOST_NUMBERED = 24
# Which of two label maps is right at a pixel; one without a label is white. Blue and vermilion are
# told apart by colour-blind eyes.
DIFFERENCES = {
    "both right": (232, 234, 237),
    "only the later one right": (0, 114, 178),
    "only the earlier one right": (213, 94, 0),
    "both wrong": (90, 90, 90),
}


@dataclasses.dataclass(frozen=True)
class Curve:
    """A stage's values over the steps of the run.

    Attributes:
        name: of the stage.
        colour: of its line.
        dashed: for the control.
        points: (step, value), in order.
    """

    name: str
    colour: str
    dashed: bool
    points: Sequence[tuple[float, float]]


def colour_of(number: int) -> str:
    """Of the stage of that number."""
    return COLOURS[number % len(COLOURS)]


def curves(title: str, lines: Sequence[Curve], dots: bool = False) -> bytes:
    """An SVG of lines over the steps of the run.

    Args:
        title: says what is drawn, with its unit.
        lines: those without a point are left out.
        dots: mark the points, of which there are few.
    """
    # Margins are fixed: finding them would draw everything twice, at the end of each stage.
    drawn = figure.Figure(figsize=(_WIDTH, _HEIGHT))
    axes = drawn.add_axes((0.12, 0.26, 0.86, 0.65))
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
    axes.set_xlabel("steps since the run began", fontsize=_TEXT)
    axes.tick_params(labelsize=_TEXT)
    axes.ticklabel_format(axis="y", scilimits=(-5, 6))
    axes.grid(alpha=0.3)
    place: Any = {"loc": "lower center", "columnspacing": 1.2, "handlelength": 1.6}
    drawn.legend(ncols=4, fontsize=_TEXT, frameon=False, **place)
    return _svg(drawn)


def confusion(matrix: Int64[np.ndarray, "classes classes"], classes: Sequence[str]) -> bytes:
    """An SVG of a confusion matrix: percent of each row's pixels; rows the labels."""
    share = 100 * shares_of_rows(matrix)
    side = max(0.34 * len(classes) + 1.4, _WIDTH)
    drawn = figure.Figure(figsize=(side, side), layout="constrained")
    axes = drawn.add_subplot()
    axes.imshow(share, cmap="cividis", vmin=0, vmax=100)
    names = range(len(classes))
    axes.set_xticks(names, classes, rotation=90, fontsize=_TEXT)
    axes.set_yticks(names, classes, fontsize=_TEXT)
    axes.set_xlabel("predicted", fontsize=_TEXT)
    axes.set_ylabel("label", fontsize=_TEXT)
    if len(classes) <= _MOST_NUMBERED:
        for row, column in np.ndindex(*share.shape):
            if np.isfinite(value := share[row, column]):
                ink = "black" if value > 55 else "white"
                middle: Any = {"ha": "center", "va": "center"}
                text = f"{value:.0f}"
                axes.text(column, row, text, color=ink, fontsize=_TEXT - 1, **middle)
    return _svg(drawn)


def shares_of_rows(matrix: Int64[np.ndarray, "classes classes"]) -> np.ndarray:
    """Each cell's share of its row, in 0..1; NaN in rows without a pixel."""
    totals = matrix.sum(axis=1, keepdims=True).astype(float)
    return np.divide(matrix, totals, out=np.full(matrix.shape, np.nan), where=totals > 0)


_PANELS = {
    "mean": "running mean",
    "var": "running variance",
    "scale": "scale",
    "bias": "shift",
}


def norms(layer: str, values: Mapping[str, Mapping[str, Sequence[float]]]) -> bytes:
    """A PNG of the weak against the strong norm of a layer, a dot for each channel.

    Source: ICCV 2021, figure 1.

    Args:
        layer: its name.
        values: {"mean", "var", "scale", "bias": {"weak", "strong": by channel}}.
    """
    shown = [key for key in _PANELS if len(values[key]) == 2]
    rows = -(-len(shown) // 2)
    height = 0.4 + 1.9 * rows
    drawn = figure.Figure(figsize=(_WIDTH, height))
    edges = {"left": 0.12, "right": 0.98, "bottom": 0.4 / height, "top": 1 - 0.5 / height}
    drawn.subplots_adjust(**edges, wspace=0.34, hspace=0.5)
    drawn.suptitle(layer, fontsize=_TEXT + 1, y=1 - 0.06 / height, va="top")
    for number, key in enumerate(shown):
        axes = drawn.add_subplot(rows, 2, number + 1)
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
    drawn.savefig(content, format="png", dpi=130, metadata={"Software": None})
    return content.getvalue()


def side_by_side(drawn: Sequence[bytes]) -> bytes:
    """A PNG of several, from left to right."""
    images = [Image.open(io.BytesIO(content)) for content in drawn]
    size = (sum(image.width for image in images), max(image.height for image in images))
    row = Image.new("RGB", size, pictures.PAPER)
    for number, image in enumerate(images):
        row.paste(image, (sum(before.width for before in images[:number]), 0))
    return _png(row)


def differences(
    truth: UInt8[np.ndarray, "h w"],
    earlier: UInt8[np.ndarray, "h w"],
    later: UInt8[np.ndarray, "h w"],
) -> bytes:
    """A PNG in the colours of DIFFERENCES, white where there is no label."""
    code = 3 - 2 * (earlier == truth) - (later == truth)
    # Of (earlier right, later right): both 0, earlier alone 1, later alone 2, neither 3.
    place = np.array([0, 2, 1, 3], np.uint8)[code]
    place[truth == IGNORE] = len(DIFFERENCES)
    return _palette_png(place, [*DIFFERENCES.values(), (255, 255, 255)])


def changes(before: UInt8[np.ndarray, "h w"], now: UInt8[np.ndarray, "h w"]) -> bytes:
    """A PNG of the pixels whose label changed, in blue on grey."""
    colours = list(DIFFERENCES.values())
    return _palette_png((before != now).astype(np.uint8), colours[:2])


def sheet(
    titles: Sequence[str],
    rows: Sequence[Sequence[UInt8[np.ndarray, "_ _ 3"]]],
    classes: Iterable[tuple[str, Sequence[int]]],
) -> bytes:
    """A PNG of pictures in rows, below the titles of their columns and above the classes' legend.

    Args:
        titles: of the columns.
        rows: pictures of one size in a row.
        classes: (name, colour) of each.
    """
    wide = max(row[0].shape[1] for row in rows) + _GAP
    below = pictures.legend(classes, wide * len(titles) - _GAP)
    headings = [pictures.words(title, pictures.TEXT) for title in titles]
    top = headings[0].height
    heights = [row[0].shape[0] + _GAP for row in rows]
    size = (below.width, top + sum(heights) + below.height)
    image = Image.new("RGB", size, pictures.PAPER)
    for column, heading in enumerate(headings):
        image.paste(heading, (column * wide, 0))
    for number, row in enumerate(rows):
        for column, picture in enumerate(row):
            image.paste(Image.fromarray(picture), (column * wide, top + sum(heights[:number])))
    image.paste(below, (0, top + sum(heights)))
    return _png(image)


def _palette_png(
    places: UInt8[np.ndarray, "h w"], colours: Sequence[tuple[int, int, int]]
) -> bytes:
    image = Image.fromarray(places)
    image.putpalette(np.array(colours, np.uint8).ravel().tolist())
    return _png(image)


def _png(image: Image.Image) -> bytes:
    content = io.BytesIO()
    image.save(content, "PNG", optimize=True)
    return content.getvalue()


def _svg(drawn: Any) -> bytes:
    content = io.BytesIO()
    drawn.savefig(content, format="svg", metadata={"Date": None, "Creator": None})
    return content.getvalue()
