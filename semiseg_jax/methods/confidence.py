"""Labels that a teacher gives inside the training step, and their confidence.

Sources: per-pixel threshold, FixMatch (NeurIPS 2020) and UniMatch (CVPR 2023, `unimatch.py`); one
weight for the batch, French et al. 2019 (`train_seg_semisup_mask_mt.py`) and ClassMix (WACV 2021,
`trainSSL.py`).
"""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Bool, Float, Integer

from semiseg_jax import losses
from semiseg_jax.losses import IGNORE

# The pixels that a share or a mean is taken over: the valid ones, or all pixels of the batch,
# padding included, as in the published code of French et al. and ClassMix.
PixelSet = Literal["valid", "all"]


class TeacherLabels(NamedTuple):
    """Labels of a teacher, without gradient; a tree, so that `mixing.mix` mixes both arrays.

    Attributes:
        label: int32, arg max of the teacher's logits; IGNORE at padding.
        confidence: float32 (float64 for float64 logits), the largest softmax value.
    """

    label: Integer[Array, "n h w"]
    confidence: Float[Array, "n h w"]

    @property
    def valid(self) -> Bool[Array, "n h w"]:
        """The pixels that are not padding."""
        return self.label != IGNORE


def teacher_labels(
    logits: Float[Array, "n h w classes"], valid: Bool[Array, "n h w"]
) -> TeacherLabels:
    """Labels and confidences of a teacher's logits.

    The softmax is float32 for bfloat16 logits: in bfloat16, .968 and .97 are one number.

    Args:
        logits: of any float dtype.
        valid: false at padding.
    """
    logits = jax.lax.stop_gradient(logits)
    label = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    confidence = losses.pixel_terms(logits, label).confidence
    return TeacherLabels(jnp.where(valid, label, IGNORE), confidence)


def confident_pixels(labels: TeacherLabels, threshold: ArrayLike) -> Bool[Array, "n h w"]:
    """The valid pixels whose confidence is at least `threshold`; with 0 all valid pixels."""
    return labels.valid & (labels.confidence >= threshold)


def confident_pixels_by_class(
    labels: TeacherLabels, threshold: ArrayLike, num_classes: int
) -> tuple[Float[Array, " classes"], Float[Array, " classes"]]:
    """Counts the confident and all valid pixels of the batch by the class of their label.

    Args:
        labels: of the global batch.
        threshold: least confidence of a confident pixel.
        num_classes: C.

    Returns:
        (confident, valid) pixels of each class; 0 for a class that the teacher gives nowhere.
    """
    dtype = labels.confidence.dtype
    is_class = labels.label[..., None] == jnp.arange(num_classes)
    valid = is_class & labels.valid[..., None]
    confident = valid & confident_pixels(labels, threshold)[..., None]
    count = functools.partial(jnp.sum, axis=(0, 1, 2), dtype=dtype)
    return count(confident), count(valid)


def confident_share(
    labels: TeacherLabels, threshold: ArrayLike, divide_by: PixelSet = "valid"
) -> Float[Array, ""]:
    """The share of confident pixels in the batch, in 0..1; 0 for a batch without valid pixels.

    French et al. (threshold .97) and ClassMix (.968) multiply the unlabelled loss by this number.

    Args:
        labels: of the global batch, mixed as the student's images are.
        threshold: least confidence of a confident pixel.
        divide_by: the pixels that take part; in the published codes all do, padding included.
    """
    dtype = labels.confidence.dtype
    confident = labels.confidence >= threshold
    if divide_by == "valid":
        confident = confident & labels.valid
    return jnp.sum(confident, dtype=dtype) / jnp.maximum(
        pixel_count(labels.valid, divide_by, dtype), 1
    )


def pixel_count(
    valid: Bool[Array, "n h w"], divide_by: PixelSet, dtype: DTypeLike
) -> Float[Array, ""]:
    """How many pixels of the batch a share or a mean divides by.

    Args:
        valid: false at padding.
        divide_by: the valid pixels or all.
        dtype: of the result.
    """
    if divide_by == "all":
        return jnp.asarray(valid.size, dtype)
    return jnp.sum(valid, dtype=dtype)
