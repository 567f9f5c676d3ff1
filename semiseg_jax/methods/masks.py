"""Masks of boxes and of predicted objects, the classes of label maps, and their resizing."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer, Shaped

from semiseg_jax.losses import IGNORE


def predicted_objects(
    logits: Float[Array, "n h w classes"],
    background: int | Integer[Array, "..."] = 0,
    valid: Bool[Array, "n h w"] | None = None,
) -> Bool[Array, "n h w"]:
    """Returns where the prediction is an object: any class but the background.

    Source: yassouali/CCT, models/decoders.py, where class 0 is the background. For data without a
    background class this project takes the class with the most labelled pixels
    (`most_frequent_class`), such as road: a fixed class, so that the same things are objects in
    each image and each step. The authors ran VOC alone.

    Args:
        logits: of the main decoder. No gradient passes through the result.
        background: a class, or one for each image.
        valid: pixels that are not padding; padding is no object.
    """
    background = jnp.asarray(background, jnp.int32).reshape(-1, 1, 1)
    objects = jnp.argmax(logits, axis=-1) != background
    return objects if valid is None else objects & valid


def most_frequent_class(labels: Integer[Array, "..."], num_classes: int) -> Int[Array, ""]:
    """Returns the class with the most pixels, int32; labels that are no class do not count.

    Of equally frequent classes it is the first.
    """
    classes = jnp.arange(num_classes)
    counts = jnp.sum(labels.reshape(-1, 1) == classes, axis=0, dtype=jnp.float32)
    return jnp.argmax(counts).astype(jnp.int32)


def box_masks(boxes: Int[Array, "n 4"], size: Sequence[int]) -> Bool[Array, "n h w"]:
    """Masks that are true inside the boxes.

    Args:
        boxes: (top, left, bottom, right) in pixels; bottom and right are outside.
        size: (height, width) of the masks.
    """
    rows, columns = jnp.arange(size[0]), jnp.arange(size[1])
    top, left, bottom, right = (boxes[:, i, None] for i in range(4))
    in_rows = (rows >= top) & (rows < bottom)
    in_columns = (columns >= left) & (columns < right)
    return in_rows[:, :, None] & in_columns[:, None, :]


def classes_in_labels(
    labels: Integer[Array, "n h w"], num_classes: int, ignore: int = IGNORE
) -> Bool[Array, "n classes"]:
    """Returns which classes each label map shows.

    Args:
        labels: class ids, or `ignore`.
        num_classes: C.
        ignore: label of the pixels to skip; it may be below C.
    """
    is_class = labels[..., None] == jnp.arange(num_classes)
    return jnp.any(is_class & (labels != ignore)[..., None], axis=(1, 2))


def resize_nearest(masks: Shaped[Array, "n h w"], size: Sequence[int]) -> Shaped[Array, "n oh ow"]:
    """Resizes masks or label maps by nearest neighbour: output i reads floor(i * in / out).

    The rule, and its float32 arithmetic, is that of PyTorch's `interpolate(mode="nearest")` and of
    TensorFlow's `resize_nearest_neighbor`, which the published codes call.

    Args:
        masks: of any dtype.
        size: (height, width) of the result, in pixels.
    """
    for axis, size_out in enumerate(size, start=1):
        size_in = masks.shape[axis]
        if size_in == size_out:
            continue
        scale = np.float32(size_in) / np.float32(size_out)
        index = np.floor(np.arange(size_out, dtype=np.float32) * scale).astype(np.int32)
        masks = jnp.take(masks, np.minimum(index, size_in - 1), axis=axis)
    return masks
