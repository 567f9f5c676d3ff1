"""Mixing of unlabelled images: CutMix boxes, ClassMix masks, partners, and the mix itself.

A mask is true where the mixed image has the pixel of the one image, and false where it has the
pixel of the other. Images, labels, confidences and validity are mixed by one mask.

Sources: French et al., "Semi-supervised semantic segmentation needs strong, varied perturbations",
BMVC 2020 (2019 as a preprint), `mask_gen.py`; UniMatch (CVPR 2023), `dataset/transform.py`;
UniMatch V2 (TPAMI 2025), `unimatch_v2.py`; ClassMix (WACV 2021), `trainSSL.py`.
"""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer, Key, Shaped

from semiseg_jax.losses import IGNORE
from semiseg_jax.methods import masks
from semiseg_jax.methods.image_keys import image_keys
from semiseg_jax.runtime.errors import UserError

# How many aspect ratios `unimatch_boxes` weighs against each other for one box.
_ASPECT_CANDIDATES = 64


def check_group_size(images: int, devices: int, accumulate: int = 1, group_size: int = 2) -> None:
    """Raises an error where a device does not hold whole groups of images to mix.

    Without it an image would be mixed with itself, or images would move between devices.

    Args:
        images: unlabelled images of the global batch, `train.batch_unlabeled`.
        devices: number of devices.
        accumulate: micro-batches, `train.accumulate`.
        group_size: see `partners`.

    Raises:
        UserError: names the key, and the nearest batch that works.
    """
    multiple = devices * accumulate * group_size
    if images % multiple or not images:
        nearest = max(1, (2 * images + multiple) // (2 * multiple)) * multiple
        turns = f", {accumulate} times each" if accumulate > 1 else ""
        raise UserError(
            f"train.batch_unlabeled is {images}, but images are mixed in groups of {group_size} on "
            f"one device, and there are {devices} devices{turns}: set it to {nearest}, or to "
            f"another multiple of {multiple}.",
            code="batch-not-in-mixing-groups",
        )


def partners(
    images: Any, group_size: int = 2, order: Literal["reversed", "next"] = "reversed"
) -> Any:
    """Returns the partner of each image: another image of its group, in the place of the image.

    Groups are consecutive images of the global batch. In groups of 2, the default, the partner is
    the neighbour: 2k of 2k + 1, and the reverse, in either order. Where each device holds whole
    groups (`check_group_size`), no image leaves its device.

    The published orders: UniMatch V2 reverses the batch of each GPU, "reversed" with that batch as
    group (an image in the middle of an odd group would be mixed with itself); ClassMix takes the
    next image, the first after the last, "next".

    Args:
        images: tree of arrays [n, ...].
        group_size: images of a group, at least 2; n is a multiple of it.
        order: which image of the group.

    Raises:
        ValueError: an image would be its own partner, or the last group would not be whole.
    """
    if group_size < 2 or (order == "reversed" and group_size % 2):
        raise ValueError(f"An image of a group of {group_size} would be mixed with itself.")

    def move(leaf: Shaped[Array, "n *rest"]) -> Shaped[Array, "n *rest"]:
        groups = leaf.reshape(-1, group_size, *leaf.shape[1:])
        moved = groups[:, ::-1] if order == "reversed" else jnp.roll(groups, -1, axis=1)
        return moved.reshape(leaf.shape)

    return jax.tree.map(move, images)


def split_pairs(images: Any) -> tuple[Any, Any]:
    """Splits a batch into its even and its odd images, n / 2 each.

    French et al. draw two batches and mix them image by image, so that 20 images make 10.

    Args:
        images: tree of arrays [n, ...], n even.
    """

    def take(leaf: Shaped[Array, "n *rest"], place: int) -> Shaped[Array, "half *rest"]:
        # Not leaf[place::2], which would move images between devices.
        return leaf.reshape(-1, 2, *leaf.shape[1:])[:, place]

    return (
        jax.tree.map(lambda leaf: take(leaf, 0), images),
        jax.tree.map(lambda leaf: take(leaf, 1), images),
    )


def mix(mask: Bool[Array, "n h w"], inside: Any, outside: Any) -> Any:
    """Composes images of two batches: `inside` where the mask is true, `outside` elsewhere.

    CutMix: inside the box the partner, outside it the image itself. ClassMix: inside the mask the
    image itself, outside it the partner.

    Args:
        mask: from `masks.box_masks` or `pixels_of_classes`.
        inside: tree of arrays [n, h, w] or [n, h, w, c].
        outside: the same tree.
    """

    def select(a: Shaped[Array, "n h w *c"], b: Shaped[Array, "n h w *c"]) -> Array:
        return jnp.where(mask.reshape(*mask.shape, *(1,) * (a.ndim - 3)), a, b)

    return jax.tree.map(select, inside, outside)


# ---- boxes


def cutmix_boxes(
    key: Key[Array, ""],
    n: int,
    height: int,
    width: int,
    law: Literal["unimatch", "half_area"] = "unimatch",
    **knobs: Any,
) -> Bool[Array, "n h w"]:
    """CutMix masks by a published law: true inside the box of an image.

    Args:
        key: of the step and the purpose; each image draws by its position in the batch.
        n: images.
        height, width: of the images, in pixels.
        law: "unimatch", as in `unimatch_boxes`, which FixMatch and both versions of UniMatch have;
            "half_area", as in `half_area_boxes`, the one of French et al.
        knobs: keyword arguments of the law.

    Raises:
        UserError: as `unimatch_boxes`.
    """
    draw: Any = unimatch_boxes if law == "unimatch" else half_area_boxes
    return masks.box_masks(draw(image_keys(key, n), (height, width), **knobs), (height, width))


def half_area_boxes(
    keys: Key[Array, " n"], size: tuple[int, int], area: float = 0.5
) -> Int[Array, "n 4"]:
    """CutMix boxes of French et al.: one box of a fixed area and a random aspect ratio per image.

    Args:
        keys: one for each image, from `image_keys`.
        size: (height, width) of the images.
        area: of the box, as a share of the image.

    Returns:
        Boxes as `masks.box_masks` takes them.
    """
    draws = jax.vmap(lambda key: jax.random.uniform(key, (3,), jnp.float32))(keys)
    return half_area_boxes_at(draws, size, area)


def half_area_boxes_at(
    draws: Float[Array, "n 3"], size: tuple[int, int], area: float = 0.5
) -> Int[Array, "n 4"]:
    """The boxes of `half_area_boxes` for uniform draws in 0..1: aspect, vertical and horizontal.

    The height is area ** draw of the image's height, the width the rest; both are rounded, and so
    is the position (`BoxMaskGenerator.generate_params`). The box lies inside the image.
    """
    heights = jnp.exp(draws[:, 0] * math.log(area))
    shares = jnp.stack([heights, area / heights], axis=1)
    image = jnp.array(size, draws.dtype)
    extents = jnp.round(shares * image)
    corners = jnp.round((image - extents) * draws[:, 1:])
    return jnp.concatenate([corners, corners + extents], axis=1).astype(jnp.int32)


def unimatch_boxes(
    keys: Key[Array, " n"],
    size: tuple[int, int],
    probability: float = 0.5,
    area: tuple[float, float] = (0.02, 0.4),
    aspect: tuple[float, float] = (0.3, 1 / 0.3),
) -> Int[Array, "n 4"]:
    """CutMix boxes of UniMatch: an empty box or one of random area, aspect ratio and position.

    The published code draws the area once, and aspect ratio and corner anew until the box lies
    inside the image (`obtain_cutmix_box`). The accepted boxes have a law that needs no loop: the
    density of an aspect ratio is proportional to the number of corners from which its box fits, and
    the corner is uniform among those. Here one of 64 aspect ratios, one in each 64th of the
    range, is drawn by that number. Extents are rounded down, as published.

    Args:
        keys: one for each image, from `image_keys`.
        size: (height, width) of the images; published for squares.
        probability: of a box that is not empty.
        area: least and largest area, as shares of the image; uniform.
        aspect: least and largest height / width of the box, in pixels; uniform before the choice.

    Returns:
        Boxes as `masks.box_masks` takes them.

    Raises:
        UserError: a box of the largest area fits at no aspect ratio.
    """
    _check_boxes_fit(size, area[1], aspect)
    height, width = size

    def draw(key: Array) -> Int[Array, "4"]:
        keys = jax.random.split(key, 6)
        uniform = [jax.random.uniform(k, (), jnp.float32) for k in keys[:3]]
        pixels = (area[0] + (area[1] - area[0]) * uniform[0]) * (height * width)
        offsets = (jnp.arange(_ASPECT_CANDIDATES) + uniform[1]) / _ASPECT_CANDIDATES
        aspects = aspect[0] + (aspect[1] - aspect[0]) * offsets
        tall, wide = _box_extents(pixels, aspects)
        fitting = _corners(tall, height) * _corners(wide, width)
        chosen = jax.random.categorical(keys[3], jnp.log(fitting.astype(jnp.float32)))
        # A sum rather than an index, which would be a gather over the batch.
        is_chosen = jnp.arange(_ASPECT_CANDIDATES) == chosen
        tall, wide = (jnp.sum(jnp.where(is_chosen, extents, 0)) for extents in (tall, wide))
        top = jax.random.randint(keys[4], (), 0, _corners(tall, height), jnp.int32)
        left = jax.random.randint(keys[5], (), 0, _corners(wide, width), jnp.int32)
        box = jnp.stack([top, left, top + tall, left + wide]).astype(jnp.int32)
        return jnp.where(uniform[2] < probability, box, 0)

    return jax.vmap(draw)(keys)


def _box_extents(pixels: Any, aspect: Any) -> tuple[Any, Any]:
    """Height and width, rounded down, of boxes of an area in pixels and a height / width."""
    return (
        jnp.floor(jnp.sqrt(pixels * aspect)).astype(jnp.int32),
        jnp.floor(jnp.sqrt(pixels / aspect)).astype(jnp.int32),
    )


def _corners(extent: Any, length: int) -> Any:
    """How many of the positions 0 .. length - 1 leave room for an extent, in pixels."""
    return jnp.clip(length - extent + 1, 0, length)


def _check_boxes_fit(size: tuple[int, int], area: float, aspect: tuple[float, float]) -> None:
    """Raises an error where the published rejection loop would never end."""
    pixels = area * size[0] * size[1]
    aspects = np.linspace(*aspect, _ASPECT_CANDIDATES + 1)
    fits = (np.sqrt(pixels * aspects) < size[0] + 1) & (np.sqrt(pixels / aspects) < size[1] + 1)
    # Two neighbours, so that a candidate between them fits too.
    if not np.any(fits[1:] & fits[:-1]):
        raise UserError(
            f"A CutMix box of {area:.0%} of a crop of {size[0]}x{size[1]} with a height of "
            f"{aspect[0]:.2g} to {aspect[1]:.2g} times its width does not fit into the crop: make "
            "data.crop less elongated.",
            code="cutmix-box-does-not-fit",
        )


# ---- ClassMix


def class_masks(
    key: Key[Array, ""],
    labels: Integer[Array, "n h w"],
    num_classes: int,
    ignore: int = IGNORE,
) -> Bool[Array, "n h w"]:
    """ClassMix masks: true at the pixels of half of the classes that an image shows.

    Of k classes floor(k / 2) are drawn without replacement; an image of one class gives none.

    Args:
        key: of the step and the purpose; each image draws by its position in the batch.
        labels: the teacher's, or `ignore` at padding, which is in no mask and no choice.
        num_classes: C.
        ignore: label of the pixels to skip.
    """
    shown = masks.classes_in_labels(labels, num_classes, ignore)
    return pixels_of_classes(labels, half_of_classes(image_keys(key, len(labels)), shown))


def half_of_classes(
    keys: Key[Array, " n"], shown: Bool[Array, "n classes"]
) -> Bool[Array, "n classes"]:
    """Draws floor(k / 2) of the k classes that each image shows.

    Args:
        keys: one for each image.
        shown: which classes an image shows.
    """

    def draw(key: Array, shown: Bool[Array, " classes"]) -> Bool[Array, " classes"]:
        # A random order of all classes orders those that are shown at random too. A permutation
        # has no ties, unlike random numbers, so that the count is exact.
        order = jax.random.permutation(key, shown.shape[0])
        before = jnp.sum(shown & (order < order[:, None]), axis=1)
        return shown & (before < jnp.sum(shown) // 2)

    return jax.vmap(draw)(keys, shown)


def pixels_of_classes(
    labels: Integer[Array, "n h w"], classes: Bool[Array, "n classes"]
) -> Bool[Array, "n h w"]:
    """The pixels whose label is one of an image's classes.

    Args:
        labels: class ids, or others, which are in no mask.
        classes: of each image.
    """
    ids = jnp.arange(classes.shape[1])
    return jnp.any((labels[..., None] == ids) & classes[:, None, None], axis=-1)
