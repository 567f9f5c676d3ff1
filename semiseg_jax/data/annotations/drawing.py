"""Draws the objects of an image as a label map, and counts what was drawn and what was not."""

import collections
import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from semiseg_jax.data import image_header
from semiseg_jax.data.annotations.classes import Classes, normal
from semiseg_jax.data.annotations.record import (
    BACKGROUND_LABEL,
    AnnotatedImage,
    AnnotatedObject,
    Size,
)
from semiseg_jax.data.annotations.regions import Patch, Stroke
from semiseg_jax.losses import IGNORE
from semiseg_jax.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class DrawOptions:
    """How objects are drawn.

    Attributes:
        overlap: of objects that overlap, "later" ones are on top, or "smaller" ones.
        crowd: objects with iscrowd are drawn as their "class", or their pixels are "ignore".
        boxes: objects of which only the box is known: its pixels are "ignore" where no other
            object is, or it is drawn ("draw").
        line_width: width of lines and diameter of points, in pixels; 0 to leave them out.
    """

    overlap: str = "later"
    crowd: str = "class"
    boxes: str = "ignore"
    line_width: float = 0.0


@dataclasses.dataclass
class DrawCounts:
    """What was drawn.

    Attributes:
        objects: drawn objects by label.
        skipped: objects that are not drawn, or not as they are, by the reason.
        examples: of each reason the first image.
        contested: pixels of objects of two classes or more.
        uncovered: pixels of no object.
        pixels: all pixels of the images that were drawn.
    """

    objects: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    skipped: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    examples: dict[str, str] = dataclasses.field(default_factory=dict)
    contested: int = 0
    uncovered: int = 0
    pixels: int = 0

    def skip(self, reason: str, image: AnnotatedImage) -> None:
        """Counts an object that is not drawn."""
        self.skipped[reason] += 1
        self.examples.setdefault(reason, image.name)

    def add(self, other: "DrawCounts") -> None:
        """Adds the counts of another image."""
        self.objects += other.objects
        self.skipped += other.skipped
        self.examples = {**other.examples, **self.examples}
        self.contested += other.contested
        self.uncovered += other.uncovered
        self.pixels += other.pixels


# Reasons, as the table at the end of a conversion names them.
_BOX_DRAWN = "box alone: drawn (--boxes)"
_BOX = "box alone: its pixels are 255 where no other object is (--boxes)"
_CROWD_DRAWN = "iscrowd: drawn as its class (--crowd)"
_CROWD = "iscrowd: its pixels are 255 where no other object is (--crowd)"
_LINE_DRAWN = "line or point: drawn (--line_width)"
_LINE = "line or point: not drawn (--line_width)"
_DEGENERATE = "too few vertices: not drawn"
_OTHER = "no area, such as a tag or a cuboid: not drawn"
_OUTSIDE = "outside of the image: not drawn"
_EMPTY = "no pixel centre inside: not drawn"
_PARTLY_OUTSIDE = "partly outside of the image: cut off"
_NOT_DRAWN = (_LINE, _DEGENERATE, _OTHER, _OUTSIDE, _EMPTY)


def draw(
    image: AnnotatedImage, size: Size, classes: Classes, options: DrawOptions
) -> tuple[UInt8[np.ndarray, "h w"] | None, DrawCounts]:
    """Draws the objects of an image.

    Args:
        image: with objects.
        size: (height, width) of the label map in pixels: that of the image as it was annotated.
        classes: the mask value of each label.
        options: how objects are drawn.

    Returns:
        The class ids and IGNORE, and the counts; None for the label map if objects are there and
        none of them has an area, so that nothing is known of their pixels.
    """
    counts = DrawCounts()
    patches = []
    ignored = []
    for object_ in image.objects:
        patch = _patch(object_, image, size, options, counts)
        if patch is None:
            continue
        reason = _ignored_because(object_, options)
        if reason:
            counts.skip(reason, image)
            ignored.append(patch)
            continue
        patches.append((object_, patch))
    if image.objects and not patches and not ignored:
        return None, counts
    if options.overlap == "smaller":
        patches.sort(key=lambda drawn: -int(drawn[1].pixels.sum()))
    label_map = np.full(size, classes.background, np.uint8)
    covered, claimed, contested = (np.zeros(size, bool) for _ in range(3))
    for object_, patch in patches:
        label = normal(object_.label)
        value, window = classes.ids[label], patch.window
        is_hole = label == BACKGROUND_LABEL  # It is cut out of an object, and contests nothing.
        if not is_hole:
            is_other = claimed[window] & (label_map[window] != value)
            contested[window] |= patch.pixels & is_other
        claimed[window][patch.pixels] = not is_hole
        label_map[window][patch.pixels] = value
        covered[window] |= patch.pixels
        counts.objects[label] += 1
    for patch in ignored:
        label_map[patch.window][patch.pixels & ~covered[patch.window]] = IGNORE
    for patch in ignored:
        covered[patch.window] |= patch.pixels
    counts.contested, counts.pixels = int(contested.sum()), covered.size
    counts.uncovered = counts.pixels - int(covered.sum())
    return label_map, counts


def _patch(
    object_: AnnotatedObject,
    image: AnnotatedImage,
    size: Size,
    options: DrawOptions,
    counts: DrawCounts,
) -> Patch | None:
    """Returns the pixels of an object; None, and counts why, if it has none."""
    region = object_.region
    if region is None or (object_.kind == "line" and not options.line_width):
        reason = {"line": _LINE, "other": _OTHER}.get(object_.kind, _DEGENERATE)
        counts.skip(reason, image)
        return None
    if isinstance(region, Stroke):
        region = dataclasses.replace(region, width=options.line_width)
        counts.skip(_LINE_DRAWN, image)
    patch = region.draw(size)
    left, top, right, bottom = region.bounds(size)
    if not patch.pixels.any():
        is_outside = right <= 0 or bottom <= 0 or left >= size[1] or top >= size[0]
        counts.skip(_OUTSIDE if is_outside else _EMPTY, image)
        return None
    # Vertices on the border are often a fraction of a pixel outside.
    if min(left, top) < -1 or right > size[1] + 1 or bottom > size[0] + 1:
        counts.skip(_PARTLY_OUTSIDE, image)
    if object_.kind == "box" and options.boxes == "draw":
        counts.skip(_BOX_DRAWN, image)
    if object_.is_crowd and options.crowd == "class":
        counts.skip(_CROWD_DRAWN, image)
    return patch


def _ignored_because(object_: AnnotatedObject, options: DrawOptions) -> str:
    """Returns why the pixels of an object are IGNORE; "" if it is drawn."""
    if object_.kind == "box" and options.boxes == "ignore":
        return _BOX
    return _CROWD if object_.is_crowd and options.crowd == "ignore" else ""


def annotated_size(
    image: AnnotatedImage, path: object, upright: Size, orientation: int
) -> tuple[Size, bool]:
    """Returns the size that an image was annotated in, and whether the annotations are upright.

    Tools that ignore the EXIF orientation show a photograph as it is stored, and its polygons lie
    on that. The size that the annotation file records tells which it was; where both are the same,
    the image is taken to be upright.

    Args:
        image: with the recorded size.
        path: of the image, for the error.
        upright: (height, width) of the upright image.
        orientation: the EXIF orientation, 1 to 8.

    Raises:
        UserError: the recorded size is neither that of the upright image nor that of the stored.
    """
    if image.size is None or image.size == upright:
        return upright, True
    stored = upright[::-1] if orientation >= 5 else upright
    if image.size == stored:
        return stored, False
    raise UserError(
        f"{path} is {upright[1]}x{upright[0]}, and {image.source} was made for "
        f"{image.size[1]}x{image.size[0]}: restore the image that was annotated, or take it out of "
        "the annotations.",
        code="annotated-size-differs",
    )


def turn_upright(
    label_map: UInt8[np.ndarray, "h w"], orientation: int
) -> UInt8[np.ndarray, "h2 w2"]:
    """Returns a label map of the stored image turned as the upright image."""
    return np.asarray(image_header.turn_upright(Image.fromarray(label_map), orientation))


def all_ignored(images: Sequence[AnnotatedImage], options: DrawOptions) -> bool:
    """Returns whether the options leave no object that is drawn as its class."""
    areas = [o for image in images for o in image.objects if o.kind in ("area", "box")]
    return bool(areas) and all(_ignored_because(o, options) for o in areas)
