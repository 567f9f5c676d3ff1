"""The built-in data set, which needs no download: street scenes drawn from a seed.

A scene is a small world in metres (x to the right, y up, z into the picture). A pinhole camera
projects it, and it is painted from far to near, image and labels together. The task is not
trivial: light, weather, season, viewpoint, materials and shapes vary between scenes far more than
a few labelled images can show, and colour alone separates few classes (grey roads, facades and
skies; green cars and trees; brick walls and brick pavements; poles and trunks).
"""

import colorsys
import dataclasses
import math
import os
import pathlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypeVar

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image, ImageDraw, ImageFilter

from semiseg_jax.data.image_io import IGNORE, encode_mask
from semiseg_jax.runtime.errors import UserError

# Increment after every change that alters the scene of the same arguments. The cache folders of
# drawn data sets depend on it.
VERSION = 2

CLASSES = (
    "sky", "building", "road", "pavement", "tree", "pole", "sign", "car", "person", "fence",
    "grass",
)  # fmt: skip
PALETTE = (
    (70, 130, 180), (70, 70, 70), (128, 64, 128), (244, 35, 232), (107, 142, 35),
    (153, 153, 153), (220, 220, 0), (0, 0, 142), (220, 20, 60), (190, 120, 90), (152, 251, 152),
)  # fmt: skip
SKY, BUILDING, ROAD, PAVEMENT, TREE, POLE, SIGN, CAR, PERSON, FENCE, GRASS = range(len(CLASSES))

Colour = tuple[float, float, float]  # RGB, 0..255
Point = tuple[float, float]  # x and y in pixels of the finished image
GroundPoint = tuple[float, float]  # x and z in metres
PaintTask = tuple[float, Callable[[], None]]  # the distance in metres, and a paint function
T = TypeVar("T")

FAR = 110.0  # metres; a painted backdrop replaces everything beyond

# Light: weight, sun and ambient (multipliers of a surface's own colour), sky colour at the zenith
# and at the horizon, haze per metre (from, to), whether lamps and windows are lit.
MOODS = (
    (6, (0.70, 0.66, 0.58), (0.44, 0.48, 0.55), (70, 120, 200), (180, 205, 230), (0.001, 0.006), 0),
    (2, (0.85, 0.60, 0.30), (0.42, 0.38, 0.42), (110, 120, 170), (250, 200, 140), (0.002, 0.01), 0),
    (4, (0.10, 0.10, 0.10), (0.66, 0.68, 0.71), (150, 155, 163), (205, 207, 208), (0.002, 0.01), 0),
    (2, (0.05, 0.05, 0.05), (0.70, 0.72, 0.72), (190, 194, 196), (205, 208, 208), (0.01, 0.035), 0),
    (2, (0.10, 0.08, 0.10), (0.36, 0.35, 0.48), (55, 60, 105), (205, 135, 115), (0.002, 0.01), 1),
    (1, (0.04, 0.04, 0.06), (0.25, 0.24, 0.28), (14, 17, 34), (52, 48, 56), (0.001, 0.006), 1),
)  # fmt: skip
ASPHALTS = (
    (95, 95, 98), (70, 70, 74), (125, 123, 120), (150, 147, 140), (105, 92, 84), (82, 84, 92),
    (120, 88, 76), (176, 172, 166),
)  # fmt: skip
PAVINGS = (
    (160, 157, 150), (130, 130, 130), (185, 178, 165), (150, 95, 78), (170, 120, 95),
    (105, 105, 110), (196, 184, 140), (96, 92, 88),
)  # fmt: skip
LAWNS = (
    (85, 115, 55), (105, 125, 65), (60, 90, 50), (95, 135, 60), (75, 105, 60), (120, 130, 70),
    (140, 130, 80), (120, 100, 75), (215, 218, 222),
)  # fmt: skip
FACADES = (
    (165, 90, 70), (140, 75, 60), (190, 185, 175), (150, 150, 152), (110, 112, 116), (95, 85, 80),
    (225, 222, 216), (200, 165, 110), (120, 140, 160), (215, 205, 180), (170, 130, 125),
    (130, 150, 125),
)  # fmt: skip
FOLIAGE = (
    (62, 96, 42), (85, 120, 55), (45, 75, 45), (110, 130, 60), (175, 150, 55), (165, 90, 45),
    (120, 70, 45), (205, 165, 175), (90, 105, 80),
)  # fmt: skip
POLES = (
    (120, 122, 125), (70, 72, 75), (165, 168, 170), (95, 80, 65), (60, 75, 65), (190, 190, 188),
)  # fmt: skip
SIGNS = (
    (200, 40, 40), (40, 80, 180), (235, 235, 230), (225, 190, 40), (40, 130, 80), (230, 120, 40),
)  # fmt: skip
FENCES = ((130, 100, 70), (230, 228, 222), (60, 62, 65), (150, 152, 155), (95, 110, 80))
SKINS = ((225, 180, 150), (195, 145, 110), (140, 95, 70), (90, 62, 50))
GLASS = ((28, 32, 38), (60, 72, 82), (95, 110, 122), (140, 160, 180))
WHITE, DARK, METAL = (225, 222, 210), (26, 26, 28), (150, 152, 155)
# Length, width, height in metres, and the start and end of the roof as fractions of the length.
VEHICLES = (
    (3.9, 1.75, 1.50, 0.10, 0.62), (4.6, 1.80, 1.42, 0.24, 0.62), (4.7, 1.85, 1.50, 0.06, 0.64),
    (4.6, 1.90, 1.80, 0.05, 0.70), (5.3, 2.00, 2.30, 0.02, 0.84), (8.5, 2.45, 3.10, 0.01, 0.97),
)  # fmt: skip
# Strength of each class's texture, per pixel and in patches.
GRAIN = np.array([0.004, 0.03, 0.02, 0.025, 0.08, 0.03, 0.03, 0.02, 0.05, 0.05, 0.08], np.float32)
PATCH = np.array([0.00, 0.12, 0.10, 0.12, 0.30, 0.08, 0.05, 0.06, 0.10, 0.12, 0.22], np.float32)


def _byte(value: float) -> int:
    return 0 if value < 0 else 255 if value > 255 else int(value)


class Canvas:
    """An image and its labels, painted by the same strokes so that they always agree.

    Both are supersampled by `SCALE` per side. Coordinates are pixels of the finished image; (0, 0)
    is the outer corner of the first pixel. A stroke with colour None changes only labels (a fence
    with gaps); a stroke with label None changes only colours (details, shadows, glows).
    """

    SCALE = 3  # Odd, so that SCALE**2 samples have a median; see `finish`.

    def __init__(self, height: int, width: int):
        self.height, self.width = height, width
        size = (width * self.SCALE, height * self.SCALE)
        self._image = Image.new("RGB", size)
        self._labels = Image.new("L", size, IGNORE)
        self._image_draw = ImageDraw.Draw(self._image, "RGBA")  # This mode blends with alpha.
        self._label_draw = ImageDraw.Draw(self._labels)

    def _stroke(
        self, shape: str, points: Sequence[Point], colour: Colour | None, label: int | None,
        alpha: float = 1.0, **options: int,
    ) -> None:  # fmt: skip
        # The origin of Pillow's coordinates is the centre of the first pixel.
        scale = self.SCALE
        samples = [(x * scale - 0.5, y * scale - 0.5) for x, y in points]
        margin = options.get("width", 0)
        if max(samples)[0] < -margin or min(samples)[0] > self._image.width + margin:
            return  # Much of a street is outside the picture.
        if colour is not None:
            r, g, b = colour
            ink = (_byte(r), _byte(g), _byte(b), int(255 * alpha))
            getattr(self._image_draw, shape)(samples, fill=ink, **options)
        if label is not None:
            getattr(self._label_draw, shape)(samples, fill=label, **options)

    def polygon(
        self, points: Sequence[Point], colour: Colour | None, label: int | None, alpha: float = 1.0
    ) -> None:
        """Fills a polygon."""
        self._stroke("polygon", points, colour, label, alpha)

    def ellipse(
        self, centre: Point, radii: Point, colour: Colour | None, label: int | None,
        alpha: float = 1.0,
    ) -> None:  # fmt: skip
        """Fills an upright ellipse."""
        (x, y), (rx, ry) = centre, radii
        self._stroke("ellipse", [(x - rx, y - ry), (x + rx, y + ry)], colour, label, alpha)

    def line(
        self, points: Sequence[Point], width: float, colour: Colour | None, label: int | None
    ) -> None:
        """Draws a line `width` pixels wide, but at least one sample wide."""
        self._stroke("line", points, colour, label, width=max(1, round(width * self.SCALE)))

    def paste(
        self, top: int, colours: UInt8[np.ndarray, "rows columns 3"],
        labels: UInt8[np.ndarray, "rows columns"],
    ) -> None:  # fmt: skip
        """Replaces whole rows of samples, from sample row `top` on."""
        self._image.paste(Image.fromarray(colours), (0, top))
        self._labels.paste(Image.fromarray(labels), (0, top))

    def finish(
        self,
    ) -> tuple[Image.Image, UInt8[np.ndarray, "height width"], Float32[np.ndarray, "height width"]]:
        """Returns the reduced image, its labels, and the fraction of each pixel with its label.

        The label is the median of a pixel's samples. A class on more than half of the samples is
        the median, so the median is never a class between two others. Without such a class the
        label is IGNORE.
        """
        scale = self.SCALE
        blocks = np.asarray(self._labels).reshape(self.height, scale, self.width, scale)
        samples = blocks.transpose(1, 3, 0, 2).reshape(scale * scale, self.height, self.width)
        labels = np.sort(samples, axis=0)[scale * scale // 2]
        cover = np.asarray(np.mean(samples == labels, axis=0, dtype=np.float32))
        labels[cover < 0.5] = IGNORE
        return self._image.reduce(scale), labels, cover


class Dice:
    """The random choices of a scene, from one generator."""

    def __init__(self, generator: np.random.Generator):
        self.generator = generator
        self.normal = generator.normal

    def chance(self, probability: float) -> bool:
        """Returns True with this probability."""
        return self.generator.random() < probability

    def between(self, low: float, high: float) -> float:
        """Draws a float uniformly from low..high."""
        return low + (high - low) * self.generator.random()

    def pick(self, options: Sequence[T]) -> T:
        """Draws one of the options uniformly."""
        return options[int(self.generator.integers(len(options)))]

    def vary(self, colour: Colour, spread: float = 0.12) -> Colour:
        """Changes the brightness of a colour and, less, its hue."""
        tone, r, g, b = self.generator.normal(0, spread, 4).tolist()
        red, green, blue = colour
        tone += 1
        return red * (tone + 0.35 * r), green * (tone + 0.35 * g), blue * (tone + 0.35 * b)

    def paint_colour(self) -> Colour:
        """Draws a colour of paint or cloth; greys are the most frequent."""
        hue, saturation, value = self.generator.random(3).tolist()
        r, g, b = colorsys.hsv_to_rgb(hue, 0.9 * saturation**2, 0.12 + 0.85 * value)
        return 255 * r, 255 * g, 255 * b

    def noise(self, height: int, width: int, cells: int) -> Float32[np.ndarray, "height width"]:
        """Returns smooth noise in 0..1 with blobs of about the longer side / `cells` pixels."""
        longer = max(height, width)
        grid = (2 + cells * height // longer, 2 + cells * width // longer)
        small = Image.fromarray(self.generator.integers(0, 256, grid, dtype=np.uint8))
        large = small.resize((width, height), Image.Resampling.BICUBIC)
        return np.asarray(large, np.float32) / 255


@dataclasses.dataclass(frozen=True)
class Light:
    """The light of a scene, which turns the colour of a surface into its colour in the image."""

    faces: Mapping[str, Colour]  # multipliers, by the direction that a surface faces
    zenith: Colour
    haze: Colour  # the colour of infinite distance and of the sky at the horizon
    density: float  # of the haze, per metre
    sun: float  # x of the direction to the sun; negative to the left
    night: bool


@dataclasses.dataclass(frozen=True)
class Side:
    """One side of the street; widths in metres, from the middle of the road outwards."""

    kerb: float  # half the road's width
    verge: float  # a strip of grass between road and pavement
    pavement: float
    kind: str  # "city", "suburb" or "park"

    @property
    def front(self) -> float:
        """Distance of the plots from the middle of the road in metres."""
        return self.kerb + self.verge + self.pavement


@dataclasses.dataclass(frozen=True)
class Scene:
    """The world, the camera and the canvas."""

    dice: Dice
    canvas: Canvas
    light: Light
    sides: Mapping[int, Side]  # -1 left, 1 right
    crossing: tuple[float, float]  # z of the side street, from .. to; infinite without one
    centre: float  # pixels: x of the vanishing point
    horizon: float  # pixels from the top
    focal: float  # pixels
    eye: tuple[float, float]  # metres: x and height of the camera
    bend: float  # curvature of the street: at z, x is shifted by bend * z**2 metres
    leaves: tuple[Colour, ...]  # colours of the season; empty if trees are bare

    def project(self, x: float, y: float, z: float) -> Point:
        """Projects a point of the world to pixels."""
        column = self.centre + self.focal * ((x - self.eye[0]) / z + self.bend * z)
        return column, self.horizon + self.focal * (self.eye[1] - y) / z

    def shade(self, colour: Colour, z: float, facing: str = "front") -> Colour:
        """Returns the colour of a lit surface behind z metres of haze."""
        through = math.exp(-self.light.density * z)
        (r, g, b), (far_r, far_g, far_b) = colour, self.light.haze
        by_r, by_g, by_b = self.light.faces[facing]
        return (
            far_r + through * (r * by_r - far_r),
            far_g + through * (g * by_g - far_g),
            far_b + through * (b * by_b - far_b),
        )

    def visible_flank(self, x: float, z: float) -> str:
        """Returns the direction, "left" or "right", that the visible flank at (x, z) faces."""
        return "left" if x + self.bend * z * z > self.eye[0] else "right"

    def pixels_per_metre(self, z: float) -> float:
        """Returns the length of a metre in pixels at this distance."""
        return self.focal / z

    def fill_surface(
        self, corners: Sequence[tuple[float, float, float]], colour: Colour | None,
        label: int | None, facing: str = "front",
    ) -> None:  # fmt: skip
        """Paints a flat surface of the world, lit according to the direction that it faces."""
        ink = colour and self.shade(colour, corners[0][2], facing)
        self.canvas.polygon([self.project(*corner) for corner in corners], ink, label)

    def fill_wall(
        self, start: GroundPoint, end: GroundPoint, low: float, high: float, colour: Colour | None,
        label: int | None, facing: str = "front",
    ) -> None:  # fmt: skip
        """Paints an upright surface above the line between two points on the ground."""
        (x0, z0), (x1, z1) = start, end
        corners = [(x0, low, z0), (x1, low, z1), (x1, high, z1), (x0, high, z0)]
        self.fill_surface(corners, colour, label, facing)

    def figure_frame(
        self, x: float, z: float, height: float
    ) -> tuple[float, Callable[[float, float], Point]]:
        """Returns the height in pixels of a figure `height` metres tall, and its projection.

        The projection maps coordinates relative to the figure's foot, (beside, above) in units of
        its height, to pixels.
        """
        unit, (column, foot) = height * self.pixels_per_metre(z), self.project(x, 0, z)
        return unit, lambda beside, above: (column + beside * unit, foot - above * unit)

    def paint_shadow(self, x: float, z: float, radius: float) -> None:
        """Darkens the ground around the foot of an object."""
        wide = radius * self.pixels_per_metre(z)
        flat = max(0.3, wide * self.eye[1] / z)
        self.canvas.ellipse(self.project(x, 0, z), (wide, flat), (10, 10, 15), None, alpha=0.35)


def _random_light(dice: Dice) -> Light:
    weights = np.array([mood[0] for mood in MOODS], float)
    mood = MOODS[int(dice.generator.choice(len(MOODS), p=weights / weights.sum()))]
    _, sun, ambient, zenith, haze, density, night = mood
    azimuth, height = dice.between(0, 2 * math.pi), dice.between(0.35, 0.9)
    ahead, right = math.cos(azimuth), math.sin(azimuth)
    towards = {"front": -ahead, "left": -right, "right": right, "up": height, "shade": 0.0}

    def face(cosine: float) -> Colour:
        red, green, blue = np.array(ambient) + np.array(sun) * max(0.0, cosine)
        return float(red), float(green), float(blue)

    return Light(
        faces={name: face(cosine) for name, cosine in towards.items()},
        zenith=dice.vary(zenith),
        haze=dice.vary(haze, 0.06),
        density=dice.between(*density),
        sun=right,
        night=bool(night),
    )


def _random_scene(dice: Dice, height: int, width: int) -> Scene:
    """Draws the weather, the street and the viewpoint."""
    kerb = dice.between(2.8, 6.5)
    sides = {}
    for side in (-1, 1):
        verge = dice.between(0.8, 3.0) if dice.chance(0.3) else 0.0
        kind = dice.pick(("city", "city", "suburb", "suburb", "park"))
        sides[side] = Side(kerb, verge, dice.between(1.4, 5.0), kind)
    start = dice.between(12, 45) if dice.chance(0.45) else math.inf
    # The viewpoint is mostly a driver's in a lane, sometimes a pedestrian's on the pavement.
    reach = 0.7 * kerb if dice.chance(0.75) else kerb + 2.0
    return Scene(
        dice=dice,
        canvas=Canvas(height, width),
        light=_random_light(dice),
        sides=sides,
        crossing=(start, start + dice.between(6, 12)),
        centre=width * dice.between(0.25, 0.75),
        horizon=height * dice.between(0.28, 0.58),
        focal=math.sqrt(height * width) * dice.between(0.8, 1.3),
        eye=(dice.between(-reach, reach), dice.between(1.2, 2.7)),
        bend=0.0012 * dice.normal(),
        leaves=() if dice.chance(0.15) else (dice.pick(FOLIAGE), dice.pick(FOLIAGE)),
    )


def _paint_sky(scene: Scene) -> None:
    """Paints a gradient with clouds."""
    dice, canvas, light = scene.dice, scene.canvas, scene.light
    height, width = canvas.height, canvas.width
    rise = np.clip(1 - (np.arange(height, dtype=np.float32) + 0.5) / scene.horizon, 0, 1)
    rise = rise[:, None, None] ** dice.between(0.5, 1.2)
    low, high = np.array(light.haze, np.float32), np.array(light.zenith, np.float32)
    clouds = 0.7 * dice.noise(height, width, 4) + 0.3 * dice.noise(height, width, 14)
    cover = np.clip((clouds - dice.between(0.3, 0.8)) * dice.between(1, 5), 0, 1)[..., None]
    colours = low + rise * (high - low)
    white = np.array(light.faces["up"], np.float32) * dice.between(140, 225)
    colours = colours + cover * dice.between(0.3, 1) * (white - colours)
    size = (width * canvas.SCALE, height * canvas.SCALE)
    picture = Image.fromarray(np.clip(colours, 0, 255).astype(np.uint8))
    large = np.asarray(picture.resize(size, Image.Resampling.BILINEAR))
    canvas.paste(0, large, np.full(large.shape[:2], SKY, np.uint8))


def _paint_backdrop(scene: Scene) -> None:
    """Paints distant roofs and woods at the end of the street."""
    dice, canvas = scene.dice, scene.canvas
    base = scene.project(0, 0, FAR)[1] + 1
    woods, tallest = dice.between(0, 1), dice.between(0.03, 0.2) * canvas.height
    x = -0.1 * canvas.width
    while x < canvas.width:
        step, top = dice.between(0.03, 0.14) * canvas.width, base - dice.between(0.2, 1) * tallest
        if dice.chance(woods):
            colour = dice.vary(dice.pick(scene.leaves or ((95, 85, 75),)))
            canvas.ellipse((x, base), (step, base - top), scene.shade(colour, FAR), TREE)
        else:
            colour = dice.vary(dice.pick(FACADES))
            block = [(x, base), (x, top), (x + step, top), (x + step, base)]
            canvas.polygon(block, scene.shade(colour, FAR), BUILDING)
        x += 0.8 * step


def _paint_ground(scene: Scene) -> None:
    """Paints road, kerbs, pavements and lawns in perspective, with textures and shadows.

    Every sample below the horizon is projected back to its point on the ground.
    """
    dice, canvas, light = scene.dice, scene.canvas, scene.light
    rows_all, columns_all = canvas.height * canvas.SCALE, canvas.width * canvas.SCALE
    top = min(int(scene.project(0, 0, FAR)[1] * canvas.SCALE), rows_all - 1)
    rows = (np.arange(top, rows_all, dtype=np.float32) + 0.5) / canvas.SCALE
    columns = (np.arange(columns_all, dtype=np.float32) + 0.5) / canvas.SCALE
    z = scene.focal * scene.eye[1] / np.maximum(rows - scene.horizon, 1e-3)[:, None]
    x = ((columns - scene.centre) / scene.focal - scene.bend * z) * z + scene.eye[0]

    materials, labels = _ground_materials(scene, x, z)
    bases = (dice.pick(ASPHALTS), dice.pick(PAVINGS), dice.pick(LAWNS), dice.pick(PAVINGS), WHITE)
    base_colours = np.array([dice.vary(base) for base in bases], np.float32)
    # Two tables of random tones, indexed by metres: stains and repairs, and stones or tufts.
    tone = np.ones_like(x)
    for wide, deep, strength in (
        (dice.between(0.8, 3), dice.between(1.5, 8), (0.25, 0.15, 0.3)),
        (dice.between(0.1, 0.5), dice.between(0.15, 0.6), (0.25, 0.35, 0.4)),
    ):
        tones = dice.generator.random((64, 64), dtype=np.float32) - 0.5
        cells = (x / wide).astype(np.int32) % 64 + 64 * ((z / deep).astype(np.int32) % 64)
        amounts = (dice.generator.random(3) * strength).astype(np.float32)[[0, 1, 2, 1, 0]]
        tone += amounts.take(materials) * tones.take(cells) / (1 + z / 12)
    # Shadows of buildings, whose heights vary along the street.
    sunny = 1 if light.sun > 0 else -1
    reach = abs(light.sun) * dice.generator.uniform(0, 12, 32).astype(np.float32)
    shaded = x * sunny > scene.sides[sunny].front - reach[(z / 9).astype(np.int32) % 32]
    faces = np.array([light.faces["up"], light.faces["shade"]], np.float32)
    lit_colours = (faces[:, None] * base_colours).reshape(-1, 3)
    transmission = np.exp(-light.density * z)[..., None]
    colours = lit_colours.take(materials + np.uint8(len(base_colours)) * shaded, axis=0)
    colours *= tone[..., None] * transmission
    colours += np.array(light.haze, np.float32) * (1 - transmission)
    canvas.paste(top, np.clip(colours, 0, 255).astype(np.uint8), labels)


def _ground_materials(
    scene: Scene, x: Float32[np.ndarray, "rows columns"], z: Float32[np.ndarray, "rows 1"]
) -> tuple[UInt8[np.ndarray, "rows columns"], UInt8[np.ndarray, "rows columns"]]:
    """Returns material and label of the ground at (x, z).

    Materials: 0 road, 1 paving, 2 lawn, 3 kerb, 4 markings.
    """
    dice, left, right = scene.dice, scene.sides[-1], scene.sides[1]
    kerb, away = right.kerb, np.abs(x)
    paved = np.where(x > 0, right.kind == "city", left.kind == "city")
    inside = away < np.where(x > 0, right.front, left.front)
    lawn = np.where(inside, away < kerb + np.where(x > 0, right.verge, left.verge), ~paved)
    materials = np.where(lawn, np.uint8(2), np.uint8(1))
    materials[away < kerb + 0.18] = 3
    crossing = (z > scene.crossing[0]) & (z < scene.crossing[1])
    road = (away < kerb) | crossing
    materials[road] = 0
    labels = np.array([ROAD, PAVEMENT, GRASS, PAVEMENT], np.uint8)[materials]

    # Markings have the label of the road that they are painted on.
    lanes, period = dice.pick((1, 2, 2, 3)), dice.between(4, 9)
    dashes = (z % period < dice.between(0.3, 1.1) * period) & ~crossing
    for lane in range(1, lanes):
        materials[(np.abs(x - kerb * (2 * lane / lanes - 1)) < 0.09) & dashes] = 4
    if dice.chance(0.3):
        materials[(np.abs(away - kerb + 0.4) < 0.08) & ~crossing] = 4
    if dice.chance(0.3):  # a zebra crossing
        start = min(scene.crossing[0] - 4, dice.between(6, 25))
        materials[(z > start) & (z < start + 3) & (away < kerb - 0.3) & (x % 1.1 < 0.55)] = 4
    return materials, labels


@dataclasses.dataclass(frozen=True)
class Facade:
    """The appearance of a building's walls; lengths in metres."""

    wall: Colour
    glass: Colour
    trim: Colour
    storeys: int
    bay: float  # distance between windows; 0 for a blank wall
    window: tuple[float, float]  # size as a fraction of a bay's width and a storey's height
    shop: bool

    STOREY = 3.1

    def paint(
        self, scene: Scene, base: Callable[[float], GroundPoint], length: float, facing: str
    ) -> None:
        """Paints a wall; `base` maps metres along the wall to points on the ground."""

        def rectangle(
            u: float, v: float, width: float, height: float, ink: Colour, label: int | None = None
        ) -> None:
            scene.fill_wall(base(u), base(u + width), v, v + height, ink, label, facing)

        top, metre = self.storeys * self.STOREY, scene.pixels_per_metre(base(0)[1])
        lit_glass = (560, 470, 260) if scene.light.night else self.glass
        rectangle(0, 0, length, top, self.wall, BUILDING)
        rectangle(0, top - 0.4, length, 0.4, self.trim)
        if self.shop:
            rectangle(0, self.STOREY - 0.7, length, 0.7, scene.dice.paint_colour())
            rectangle(0.06 * length, 0.3, 0.88 * length, self.STOREY - 1.1, lit_glass)
        # At a distance, windows and then their frames are thinner than a sample.
        bays = max(1, round(length / self.bay)) if self.bay and metre > 2 else 0
        wide, high = self.window[0] * length / max(1, bays), self.window[1] * self.STOREY
        for floor in range(int(self.shop), self.storeys):
            for bay in range(bays):
                u = (bay + 0.5) * length / bays - wide / 2
                v = (floor + 0.3) * self.STOREY
                if metre > 4:
                    rectangle(u, v - 0.15, wide, high + 0.25, self.trim)
                pane = lit_glass if scene.dice.chance(0.35) else self.glass
                rectangle(u, v, wide, high, pane)


def _random_facade(dice: Dice, storeys: int, shop: bool) -> Facade:
    wall = dice.vary(dice.pick(FACADES))
    return Facade(
        wall=wall,
        glass=dice.pick(GLASS),
        trim=dice.vary(dice.pick((WHITE, wall, (80, 75, 70)))),
        storeys=storeys,
        bay=dice.between(1.8, 4.2),
        window=(dice.between(0.3, 0.8), dice.between(0.35, 0.6)),
        shop=shop,
    )


def _paint_building(
    scene: Scene, side: int, x: float, z0: float, z1: float, facade: Facade, roof: float
) -> None:
    """Paints a block from z0 to z1 with its wall at x, or with a roof a house and its gable."""
    deep, eaves = side * (9.0 if roof else 14.0), facade.storeys * facade.STOREY
    facing, ridge, top = scene.visible_flank(x, z0), x + deep / 2, eaves + roof
    facade.paint(scene, lambda u: (x, z0 + u), z1 - z0, facing)
    if roof:
        tiles = scene.dice.vary((120, 75, 60), 0.3)
        slope = [(x, eaves, z0), (ridge, top, z0), (ridge, top, z1), (x, eaves, z1)]
        scene.fill_surface(slope, tiles, BUILDING, facing)
        gable = [(x, eaves, z0), (ridge, top, z0), (x + deep, eaves, z0)]
        scene.fill_surface(gable, facade.wall, BUILDING)
    end = facade if roof else dataclasses.replace(facade, bay=0.0, shop=False)
    end.paint(scene, lambda u: (x + side * u, z0), abs(deep), "front")


def _frontage_tasks(scene: Scene, side: int) -> list[PaintTask]:
    """Returns the paint tasks of the plots along one side of the street."""
    dice, street = scene.dice, scene.sides[side]
    tasks: list[PaintTask] = []
    z, tallest = dice.between(-8, 2), dice.between(2, 8)
    while z < FAR:
        near, far = max(z, 1.0), z + dice.between(7, 16)
        z = far + (0.0 if street.kind == "city" and dice.chance(0.85) else dice.between(1, 5))
        if far < 3 or (far > scene.crossing[0] - 1 and near < scene.crossing[1] + 1):
            continue
        # All objects of a plot are ordered by its far end, in the order of the tasks: objects
        # nearer to the road are painted later.
        if street.kind == "city":
            storeys = max(1, round(tallest * dice.between(0.6, 1.2)))
            front, facade = side * street.front, _random_facade(dice, storeys, dice.chance(0.4))
            tasks.append(
                (far, partial(_paint_building, scene, side, front, near, far, facade, 0.0))
            )
            continue
        suburb = street.kind == "suburb"
        if suburb and dice.chance(0.85):
            wall = side * (street.front + dice.between(2, 8))
            facade, roof = _random_facade(dice, dice.pick((1, 1, 2)), False), dice.between(1.5, 3.5)
            tasks.append(
                (far, partial(_paint_building, scene, side, wall, near + 1, far, facade, roof))
            )
        for _ in range(int(dice.generator.integers(3 if suburb else 5))):
            spot = side * (street.front + dice.between(1, 7 if suburb else 18))
            spot_z, height = dice.between(max(near, 3), far), dice.between(1.0, 8)
            tasks.append((far, partial(_paint_tree, scene, spot, spot_z, height)))
        if near < 60 and dice.chance(0.8):
            tasks.append(
                (far, partial(_paint_fence, scene, side * street.front, max(near, 1.5), far))
            )
    return tasks


def _paint_tree(scene: Scene, x: float, z: float, height: float) -> None:
    """Paints a trunk and, depending on the season, a crown; low trees are shrubs."""
    dice, canvas = scene.dice, scene.canvas
    unit, spot = scene.figure_frame(x, z, height)
    scene.paint_shadow(x, z, 0.22 * height)
    bark, shrub = scene.shade(dice.vary((95, 80, 65), 0.2), z), height < 2.2
    leaves = dice.vary(dice.pick(scene.leaves or FOLIAGE[:3]), 0.15)
    if not shrub:
        canvas.line([spot(0, 0), spot(0, 0.6)], dice.between(0.03, 0.05) * unit, bark, TREE)
    if not scene.leaves and not shrub:
        for _ in range(14):
            fork, tip = dice.between(0.25, 0.6), dice.between(0.6, 1)
            twig = [spot(0, fork), spot(0.2 * dice.normal(), tip)]
            canvas.line(twig, 0.012 * unit, bark, TREE)
    elif not shrub and dice.chance(0.2):  # a conifer
        for tier in range(4):
            low, wide = 0.12 + 0.2 * tier, 0.26 - 0.05 * tier
            ink = scene.shade(dice.vary(leaves), z, "shade" if tier % 2 else "front")
            canvas.polygon([spot(-wide, low), spot(0, low + 0.35), spot(wide, low)], ink, TREE)
    else:
        wide, high = dice.between(0.16, 0.34), 0.42 if shrub else 0.3
        for blob in range(6 + int(min(unit, 40) / 6)):
            # The first blobs are in the shade inside the crown.
            ink = scene.shade(dice.vary(leaves, 0.1), z, "shade" if blob < 4 else "up")
            size = dice.between(0.35, 0.6) * unit
            middle = spot(0.45 * dice.normal() * wide, 1 - high + 0.45 * dice.normal() * high)
            canvas.ellipse(middle, (size * wide, size * high), ink, TREE)


def _paint_fence(scene: Scene, x: float, z0: float, z1: float) -> None:
    """Paints boards, pickets or bars along the street; the gaps are labelled as fence too."""
    dice, facing = scene.dice, scene.visible_flank(x, z0)
    high, colour, style = dice.between(0.9, 1.9), dice.vary(dice.pick(FENCES)), dice.between(0, 1)
    solid = colour if style < 0.4 else None
    scene.fill_wall((x, z0), (x, z1), 0, high, solid, FENCE, facing)
    z, post = z0, 0.08 if style > 0.7 else 0.2
    while z < min(z1, 40.0):
        scene.fill_wall((x, z), (x, z + post), 0, high, dice.vary(colour, 0.08), FENCE, facing)
        z += max(0.45, 0.03 * z)  # Distant posts would overlap.
    for rail in (0.3 * high, 0.85 * high):
        scene.fill_wall((x, z0), (x, z1), rail, rail + 0.08, colour, FENCE, facing)


def _paint_pole(scene: Scene, side: int, x: float, z: float) -> None:
    """Paints a street lamp, a wooden mast, or a post with a sign or a traffic light."""
    dice, canvas = scene.dice, scene.canvas
    unit, ink = scene.pixels_per_metre(z), scene.shade(dice.vary(dice.pick(POLES)), z)
    kinds = (("lamp", 6.5, 0.24), ("mast", 8.0, 0.34), ("lights", 3.6, 0.22), ("sign", 2.8, 0.16))
    kind, high, thick = dice.pick((*kinds, kinds[-1], kinds[-1]))
    high, thick = high * dice.between(0.85, 1.2), thick * unit
    column, row = top = scene.project(x, high, z)
    canvas.line([scene.project(x, 0, z), top], thick, ink, POLE)
    if kind == "sign":
        _paint_sign(scene, top, dice.between(0.45, 0.8) * unit, z)
    elif kind == "mast":
        arm = 0.8 * unit
        canvas.line([(column - arm, row), (column + arm, row)], 0.5 * thick, ink, POLE)
        # Wires are too thin to annotate.
        canvas.line([top, scene.project(x, high, 3 * z)], 0.3, scene.shade(DARK, z), None)
    elif kind == "lights":
        scene.fill_wall((x - 0.25, z), (x + 0.25, z), high, high + 1.2, DARK, SIGN)
        green, amber, red = (0.25, (60, 230, 120)), (0.6, (255, 190, 40)), (0.95, (255, 50, 40))
        lamp, glow = dice.pick((green, amber, red))
        canvas.ellipse(scene.project(x, high + lamp, z), (0.14 * unit, 0.14 * unit), glow, SIGN)
    else:
        head = scene.project(x - side * dice.between(0.3, 2), high + 0.2, z)
        canvas.line([top, head], 0.7 * thick, ink, POLE)
        canvas.ellipse(head, (0.35 * unit, 0.14 * unit), ink, POLE)
        for halo in (1.6, 0.8, 0.3) if scene.light.night else ():
            canvas.ellipse(head, (halo * unit, halo * unit), (255, 225, 160), None, alpha=0.3)


def _paint_sign(scene: Scene, middle: Point, radius: float, z: float) -> None:
    """Paints a round, triangular, square or oblong sign with rim and symbol, or its grey back."""
    dice = scene.dice
    corners, wide = dice.pick(((12, 1.0), (3, 1.2), (4, 1.3), (4, 2.4)))
    inks = [dice.pick(SIGNS) for _ in range(3)] if dice.chance(0.85) else [METAL] * 3
    turn = math.pi / 4 if corners == 4 else -math.pi / 2
    for size, ink in zip((1.0, 0.68, 0.25), inks, strict=True):
        angles = [turn + 2 * math.pi * corner / corners for corner in range(corners)]
        offsets = [(size * radius * math.cos(a), size * radius * math.sin(a)) for a in angles]
        plate = [(middle[0] + wide * dx, middle[1] + dy) for dx, dy in offsets]
        scene.canvas.polygon(plate, scene.shade(ink, z), SIGN)


class Car:
    """A car, van or lorry; corners are in metres along (u), across (w) and above (v) its base.

    The near end is at z. With `across`, the flank faces the camera, as in a side street.
    """

    def __init__(self, scene: Scene, x: float, z: float, across: bool = False):
        dice, visible = scene.dice, scene.visible_flank(x, z)
        self.scene, self.x, self.z, self.across = scene, x, z, across
        self.length, self.width, self.height, start, end = dice.pick(VEHICLES)
        if dice.chance(0.5):  # The car drives in the other direction.
            start, end = 1 - end, 1 - start
        # Start and end of the windows along the car, at their foot and under the roof.
        self.foot = max(start - 0.12, 0.01) * self.length, min(end + 0.16, 0.99) * self.length
        self.roof = start * self.length, end * self.length
        self.belt = self.height * dice.between(0.52, 0.62)
        self.ink, self.glass = dice.paint_colour(), dice.pick(GLASS[:3])
        self.facings = ("front", visible) if across else (visible, "front")  # of flank and end
        self.flank = 0.0 if across or visible == "left" else self.width
        self.end = self.length if across and visible == "right" else 0.0

    def paint(self) -> None:
        """Paints shadow, cabin and body."""
        self.scene.paint_shadow(
            self.x, self.z + 0.3, 0.6 * (self.length if self.across else self.width)
        )
        self._paint_cabin()
        self._paint_body()

    def _paint_quad(
        self, corners: Sequence[tuple[float, float, float]], ink: Colour, face: str
    ) -> None:
        if self.across:
            left, near = self.x - self.length / 2, self.z
            spots = [(left + u, v, near + w) for u, w, v in corners]
        else:
            left, near = self.x - self.width / 2, self.z
            spots = [(left + w, v, near + u) for u, w, v in corners]
        self.scene.fill_surface(spots, ink, CAR, face)

    def _paint_deck(self, u: tuple[float, float], inset: float, v: float) -> None:
        w0, w1 = inset, self.width - inset
        self._paint_quad(
            [(u[0], w0, v), (u[1], w0, v), (u[1], w1, v), (u[0], w1, v)], self.ink, "up"
        )

    def _paint_cabin(self) -> None:
        (start, end), (foot0, foot1), lean = self.roof, self.foot, 0.13 * self.width
        side, screen = self.facings
        w0 = self.flank
        w1 = lean if w0 == 0 else self.width - lean  # w0 at the height of the roof
        u0, u1 = (foot0, start) if self.end == 0 else (foot1, end)
        self._paint_deck((0, self.length), 0, self.belt)
        for rim, ink in ((0.0, self.ink), (0.1, self.glass)):
            low, high = self.belt + 0.4 * rim, self.height - rim
            a, b, c, d = foot0 + 2 * rim, foot1 - 2 * rim, end - rim, start + rim
            self._paint_quad([(a, w0, low), (b, w0, low), (c, w1, high), (d, w1, high)], ink, side)
            a, b, c, d = rim, self.width - rim, self.width - rim - lean, rim + lean
            self._paint_quad(
                [(u0, a, low), (u0, b, low), (u1, c, high), (u1, d, high)], ink, screen
            )
        if self.scene.eye[1] > self.height:
            self._paint_deck(self.roof, lean, self.height)

    def _paint_body(self) -> None:
        scene, w, belt, length = self.scene, self.flank, self.belt, self.length
        side, end = self.facings
        flank = [(0, w, 0.24), (length, w, 0.24), (length, w, belt), (0, w, belt)]
        self._paint_quad(flank, self.ink, side)
        lamp: Colour = (190, 30, 30) if scene.dice.chance(0.6) else (235, 230, 210)
        if scene.light.night:
            lamp = (900, 120, 120) if lamp[2] < 100 else (1000, 1000, 850)
        # At a distance, lamps and wheels are smaller than a pixel.
        near = scene.pixels_per_metre(self.z) > 2.5
        plates = (
            (0.0, 1.0, 0.24, belt, self.ink), (0.04, 0.96, 0.05, 0.38, DARK),
            (0.05, 0.23, 0.72 * belt, 0.88 * belt, lamp),
            (0.77, 0.95, 0.72 * belt, 0.88 * belt, lamp),
            (0.36, 0.64, 0.5 * belt, 0.64 * belt, WHITE),
        )  # fmt: skip
        for left, right, low, high, ink in plates if near else plates[:2]:
            u, a, b = self.end, left * self.width, right * self.width
            self._paint_quad([(u, a, low), (u, b, low), (u, b, high), (u, a, high)], ink, end)
        for axle in (0.19 * length, 0.8 * length) if near else ():
            for radius, ink in ((0.34, DARK), (0.17, METAL)):
                turns = [(math.cos(k * math.pi / 5), math.sin(k * math.pi / 5)) for k in range(10)]
                rim = [(axle + radius * c, w, 0.34 + radius * s) for c, s in turns]
                self._paint_quad(rim, ink, side)


def _paint_person(scene: Scene, x: float, z: float) -> None:
    """Paints a standing or walking person, sometimes with a long coat or a bag."""
    dice, canvas = scene.dice, scene.canvas
    height = dice.between(1.6, 2.0) * (0.65 if dice.chance(0.12) else 1.0)
    unit, spot = scene.figure_frame(x, z, height)
    scene.paint_shadow(x, z, 0.3)
    coat, legs, bag = (scene.shade(dice.paint_colour(), z) for _ in range(3))
    skin, hair = scene.shade(dice.pick(SKINS), z), scene.shade(dice.vary((70, 55, 45), 0.4), z)
    stride, wide = dice.between(0.02, 0.13), dice.between(0.11, 0.16)
    hem = dice.between(0.23, 0.38) if dice.chance(0.35) else 0.45
    for step in (-stride, stride):
        canvas.line([spot(step, 0), spot(0, 0.48)], 0.1 * unit, legs, PERSON)
    torso = [spot(-wide, hem), spot(-0.8 * wide, 0.83), spot(0.8 * wide, 0.83), spot(wide, hem)]
    canvas.polygon(torso, coat, PERSON)
    for side in (-1, 1):
        hand = spot(side * (wide + dice.between(-0.04, 0.08)), 0.46)
        canvas.line([spot(side * 0.8 * wide, 0.81), hand], 0.06 * unit, coat, PERSON)
        if dice.chance(0.25):
            canvas.ellipse(hand, (0.07 * unit, 0.1 * unit), bag, PERSON)
    canvas.ellipse(spot(0, 0.92), (0.058 * unit, 0.08 * unit), skin, PERSON)
    canvas.ellipse(spot(0, 0.955), (0.062 * unit, 0.055 * unit), hair, PERSON)


def _paint_clutter(scene: Scene, x: float, z: float) -> None:
    """Paints a bin, a crate or a cabinet, which belong to no class and are labelled IGNORE."""
    wide, high = scene.dice.between(0.25, 0.7), scene.dice.between(0.5, 1.3)
    colour = scene.dice.paint_colour()
    scene.paint_shadow(x, z, 1.3 * wide)
    for low, facing in ((0.0, "front"), (0.8 * high, "shade")):
        scene.fill_wall((x - wide, z), (x + wide, z), low, high, colour, IGNORE, facing)


def _kerbside_tasks(scene: Scene, side: int) -> list[PaintTask]:
    """Returns the paint tasks of trees, poles, parked cars and people on one side of the road."""
    dice, street = scene.dice, scene.sides[side]
    strip, walk = street.kerb + (street.verge / 2 or 0.5), street.kerb + street.verge
    tasks: list[PaintTask] = []

    def along(first: tuple[float, float], steps: tuple[float, float]) -> list[float]:
        """Draws distances along the street, outside of the side street."""
        spots, z = [], dice.between(*first)
        while z < 0.7 * FAR:
            if not scene.crossing[0] - 2 < z < scene.crossing[1] + 1:
                spots.append(z)
            z += dice.between(*steps)
        return spots

    if dice.chance(0.5):
        height = dice.between(4, 10)
        for z in along((5, 15), (6, 16)):
            size = height * dice.between(0.8, 1.2)
            tasks.append((z, partial(_paint_tree, scene, side * strip, z, size)))
    for z in along((5, 12), (4, 18)):
        spot = side * (strip + dice.between(-0.2, 0.5))
        tasks.append((z, partial(_paint_pole, scene, side, spot, z)))
    if street.kerb > 4.5 and dice.chance(0.8):  # On a narrower road they would block the lanes.
        for z in along((4, 16), (5.5, dice.pick((7.0, 12.0, 30.0)))):
            tasks.append((z, Car(scene, side * (street.kerb - 1.15), z).paint))
    for z in along((3.5, 9), (1, dice.pick((5.0, 12.0, 30.0)))):
        spot = side * dice.between(walk + 0.2, street.front - 0.2)
        if scene.pixels_per_metre(z) > 2.5:  # Distant people would be specks.
            tasks.append((z, partial(_paint_person, scene, spot, z)))
    for z in along((5, 25), (8, 50)) if dice.chance(0.4) else ():
        tasks.append((z, partial(_paint_clutter, scene, side * (street.front - 0.7), z)))
    return tasks


def _traffic_tasks(scene: Scene) -> list[PaintTask]:
    """Returns the paint tasks of cars in the lanes and the side street, and of crossing people."""
    dice, kerb, crossing = scene.dice, scene.sides[1].kerb, scene.crossing
    tasks: list[PaintTask] = []
    for lane in (-0.35, 0.35):
        z = dice.between(6, 40)
        while z < 0.8 * FAR:
            if not crossing[0] - 6 < z < crossing[1]:
                tasks.append((z, Car(scene, (lane + dice.between(-0.07, 0.07)) * kerb, z).paint))
            z += dice.between(8, 60)
    if math.isfinite(crossing[0]) and dice.chance(0.6):
        z = sum(crossing) / 2 - 1
        x = dice.pick((-1, 1)) * dice.between(3, 12)
        tasks.append((z, Car(scene, x, z, across=True).paint))
    for _ in range(int(dice.generator.integers(4)) if dice.chance(0.4) else 0):
        z = dice.between(6, 25)
        tasks.append((z, partial(_paint_person, scene, dice.between(-1, 1) * kerb, z)))
    return tasks


def _paint_camera_car(scene: Scene) -> None:
    """Paints the bonnet of the camera's car and the dark edges of a rectified picture."""
    dice, canvas = scene.dice, scene.canvas
    height, width = canvas.height, canvas.width
    if dice.chance(0.35):
        middle, rise = (dice.between(0.3, 0.7) * width, float(height)), dice.between(0.03, 0.09)
        canvas.ellipse(
            middle, (0.75 * width, rise * height), scene.shade(dice.paint_colour(), 0), IGNORE
        )
        gloss = (0.5 * width, 0.5 * rise * height)
        canvas.ellipse(middle, gloss, (255, 255, 255), None, alpha=0.15)
    if dice.chance(0.15):
        edge = dice.between(0.008, 0.02) * width
        for x in (0.0, width - edge):
            corners = [(x, 0.0), (x + edge, 0.0), (x + edge, float(height)), (x, float(height))]
            canvas.polygon(corners, (8, 8, 8), IGNORE)


def _photograph(
    scene: Scene,
) -> tuple[UInt8[np.ndarray, "height width 3"], UInt8[np.ndarray, "height width"]]:
    """Simulates surface texture, exposure, lens, sensor, and gaps between annotations."""
    dice, normal, light = scene.dice, scene.dice.generator.standard_normal, scene.light
    picture, labels, cover = scene.canvas.finish()
    height, width = labels.shape
    # Along outlines, some pixels that no label covers fully become IGNORE.
    labels[cover < np.minimum(dice.noise(height, width, 8) + 0.1, 1)] = IGNORE
    kinds = np.where(labels == IGNORE, ROAD, labels)
    strength = dice.generator.uniform(0.3, 1.3, (2, len(CLASSES))).astype(np.float32)
    strength *= math.exp(-20 * light.density)  # Haze reduces texture.
    patches = dice.noise(height, width, 45) + dice.noise(height, width, 12) - 1
    texture = 1 + (PATCH * strength[1])[kinds] * patches
    texture += (GRAIN * strength[0])[kinds] * normal(labels.shape, np.float32)
    image = np.asarray(picture, np.float32) * texture[..., None]
    # The exposure is half-way towards a medium grey, with random errors and a colour cast.
    gain = math.sqrt(115 / max(float(image.mean()), 20.0)) * math.exp(0.15 * dice.normal())
    image *= (gain * np.exp(0.06 * normal(3))).astype(np.float32)
    image = 255 * np.clip(image / 255, 0, 1) ** dice.between(0.75, 1.25)
    blur = dice.between(0.0, 0.7) * max(1.0, math.sqrt(height * width) / 250)
    soft = Image.fromarray(image.astype(np.uint8)).filter(ImageFilter.GaussianBlur(blur))
    noise = dice.between(1, 8 if light.night else 5) * normal((height, width, 3), np.float32)
    return np.clip(np.asarray(soft, np.float32) + noise + 0.5, 0, 255).astype(np.uint8), labels


def draw(
    seed: int, index: int, height: int = 96, width: int = 160
) -> tuple[UInt8[np.ndarray, "height width 3"], UInt8[np.ndarray, "height width"]]:
    """Draws a scene; the result is a pure function of the arguments and of `VERSION`.

    Args:
        seed: seed of the data set, at least 0.
        index: index of the scene, at least 0.
        height: height of the image in pixels, at least 32.
        width: width of the image in pixels, at least 32.

    Returns:
        The RGB image, and its labels: ids of `CLASSES`, or `IGNORE`.
    """
    dice = Dice(np.random.default_rng(np.random.SeedSequence((seed, index))))
    scene = _random_scene(dice, height, width)
    _paint_sky(scene)
    _paint_backdrop(scene)
    _paint_ground(scene)
    tasks = [*_frontage_tasks(scene, -1), *_frontage_tasks(scene, 1)]
    tasks += [*_kerbside_tasks(scene, -1), *_kerbside_tasks(scene, 1), *_traffic_tasks(scene)]
    for _, paint in sorted(tasks, key=lambda task: -task[0]):
        paint()
    _paint_camera_car(scene)
    return _photograph(scene)


def write(
    root: str | os.PathLike[str], seed: int, counts: Mapping[str, int], height: int, width: int
) -> None:
    """Draws a data set into the local folder `root`; does nothing if the folder exists.

    The layout is `images/SPLIT/NNNNN.png`, `masks/SPLIT/NNNNN.png` (palette PNGs whose indices are
    the class ids) and `splits/SPLIT.txt`, a line per scene that names both files. The scenes of a
    split depend only on the seed and the split's name: splits share no scene, and other splits
    and counts do not change them. The folder appears atomically; an interrupted call leaves
    nothing.

    Args:
        root: the folder to create.
        seed: seed of the data set, at least 0.
        counts: number of scenes by split.
        height: height of the images in pixels, at least 32.
        width: width of the images in pixels, at least 32.

    Raises:
        UserError: the disk is full or not writable.
    """
    root = pathlib.Path(root)
    try:
        if not root.exists():
            _write_atomically(root, seed, counts, height, width)
    except OSError as error:
        raise UserError(
            f"{root} cannot be written ({error.strerror or error}): free space or give another "
            "data.cache_dir, and start again.",
            code="cache-unwritable",
        ) from error


def _write_atomically(
    root: pathlib.Path, seed: int, counts: Mapping[str, int], height: int, width: int
) -> None:
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root.parent, prefix=f".{root.name}.") as temporary:
        # A nested folder, because other users have no access to the temporary folder itself.
        folder = pathlib.Path(temporary) / root.name
        (folder / "splits").mkdir(parents=True)
        for split, count in counts.items():
            names = _write_split(folder, split, count, seed, height, width)
            lines = "".join(f"images/{name} masks/{name}\n" for name in names)
            (folder / "splits" / f"{split}.txt").write_text(lines)
        try:
            folder.rename(root)
        except OSError:
            # If the folder exists, another process has written the same scenes first.
            if not root.exists():
                raise


def _write_split(
    folder: pathlib.Path, split: str, count: int, seed: int, height: int, width: int
) -> list[str]:
    """Draws a split and returns the names of its files below `images` and `masks`."""
    # The bits above the 32 bits of the number encode the split's name, so splits never overlap.
    first_index = int.from_bytes(split.encode(), "big") << 32
    names = [f"{split}/{number:05d}.png" for number in range(count)]
    for kind in ("images", "masks"):
        (folder / kind / split).mkdir(parents=True)
    for number, name in enumerate(names):
        image, labels = draw(seed, first_index + number, height, width)
        Image.fromarray(image).save(folder / "images" / name, compress_level=1)
        (folder / "masks" / name).write_bytes(encode_mask(labels, PALETTE))
    return names
