"""Losses of unlabelled pixels, and the sums in which the methods join them with the labelled loss.

Each loss of pixels returns `(sum, count)`, as in `semiseg_jax.losses`, so that the caller divides
once, over the global batch. No gradient reaches the teacher.

Sources: French et al. 2019, section 3.2, `train_seg_semisup_mask_mt.py`; ClassMix (WACV 2021),
equation 1, `utils/loss.py`; FixMatch (NeurIPS 2020); UniMatch (CVPR 2023), equation 8,
`unimatch.py`; UniMatch V2 (TPAMI 2025), `unimatch_v2.py`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from semiseg_jax import losses
from semiseg_jax.methods.confidence import PixelSet, TeacherLabels, confident_pixels


def hard_cross_entropy(
    logits: Float[Array, "n h w classes"],
    labels: TeacherLabels,
    threshold: float = 0.0,
    divide_by: PixelSet = "valid",
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Cross-entropy with the labels of the confident pixels, as (sum in nats, count).

    FixMatch, UniMatch and UniMatch V2: `threshold` .95, and the count is that of all valid pixels,
    confident or not, so that few confident pixels mean a small loss. ClassMix: no threshold, the
    result times `confidence.confident_share`, and the published code divides by all pixels.

    Args:
        logits: the student's, of any float dtype; reduced in float32.
        labels: the teacher's, mixed as the student's images are.
        threshold: least confidence of a pixel with a loss.
        divide_by: the pixels that the count counts.
    """
    terms = losses.pixel_terms(logits, labels.label)
    kept = confident_pixels(labels, threshold)
    total, _ = losses.masked_sum(terms.cross_entropy, kept)
    return total, _count(labels.valid, divide_by, total)


def squared_difference(
    logits: Float[Array, "n h w classes"],
    teacher_logits: Float[Array, "n h w classes"],
    valid: Bool[Array, "n h w"],
    divide_by: PixelSet = "valid",
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Squared difference of the probabilities, summed over the classes, as (sum, count).

    French et al. multiply the mean by `confidence.confident_share`, and divide by all pixels. (A
    mean over the classes instead of the sum would be the same loss at another weight.)

    Args:
        logits: the student's, of any float dtype; the softmax is float32.
        teacher_logits: the teacher's, mixed as the student's images are; without gradient.
        valid: false at padding.
        divide_by: the pixels that the count counts.
    """
    student, teacher = _softmax(logits), _softmax(jax.lax.stop_gradient(teacher_logits))
    distance = jnp.sum((student - teacher) ** 2, axis=-1)
    total, _ = losses.masked_sum(distance, valid)
    return total, _count(valid, divide_by, total)


def fixmatch_loss(labeled: Float[Array, ""], strong: Float[Array, ""]) -> Float[Array, ""]:
    """(L_x + L_s) / 2, as UniMatch's code has FixMatch for segmentation (`fixmatch.py`)."""
    return (labeled + strong) / 2


def unimatch_loss(
    labeled: Float[Array, ""],
    strong_1: Float[Array, ""],
    strong_2: Float[Array, ""],
    dropped: Float[Array, ""],
) -> Float[Array, ""]:
    """(L_x + L_s1 / 4 + L_s2 / 4 + L_fp / 2) / 2 (UniMatch, equation 8; `unimatch.py`).

    Args:
        labeled: mean loss of the labelled pixels.
        strong_1, strong_2: mean losses of the two strong views.
        dropped: mean loss of the weak view with dropped feature channels.
    """
    return (labeled + 0.25 * strong_1 + 0.25 * strong_2 + 0.5 * dropped) / 2


def unimatch_v2_loss(
    labeled: Float[Array, ""], strong_1: Float[Array, ""], strong_2: Float[Array, ""]
) -> Float[Array, ""]:
    """(L_x + (L_s1 + L_s2) / 2) / 2 (UniMatch V2, `unimatch_v2.py`).

    Args:
        labeled: mean loss of the labelled pixels.
        strong_1, strong_2: mean losses of the two strong views, with complementary dropout.
    """
    return (labeled + (strong_1 + strong_2) / 2) / 2


def _softmax(logits: Float[Array, "n h w classes"]) -> Float[Array, "n h w classes"]:
    return jax.nn.softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)), axis=-1)


def _count(
    valid: Bool[Array, "n h w"], pixels: PixelSet, total: Float[Array, ""]
) -> Float[Array, ""]:
    """How many pixels a mean is taken over, in the dtype of the total."""
    if pixels == "all":
        return jnp.asarray(valid.size, total.dtype)
    return jnp.sum(valid, dtype=total.dtype)
