"""Losses of unlabelled pixels, and the sums in which the methods join them with the labelled loss.

Each loss of pixels returns `(sum, count)`, as in `semiseg_jax.losses`, so that the caller divides
once, over the global batch. No gradient reaches the teacher.

Sources: French et al. 2019, section 3.2, `train_seg_semisup_mask_mt.py`; ClassMix (WACV 2021),
equation 1, `utils/loss.py`; FixMatch (NeurIPS 2020); UniMatch (CVPR 2023), equation 8,
`unimatch.py`; UniMatch V2 (TPAMI 2025), `unimatch_v2.py`; CCT (CVPR 2020), equations 2 and 3,
`utils/losses.py`; PseudoSeg (ICLR 2021), equation 2, `train_wss.py`.
"""

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from semiseg_jax import losses
from semiseg_jax.methods.confidence import (
    PixelSet,
    TeacherLabels,
    confident_pixels,
    pixel_count,
)
from semiseg_jax.methods.precision import at_least_float32


def hard_cross_entropy(
    logits: Float[Array, "n h w classes"],
    labels: TeacherLabels,
    threshold: ArrayLike = 0.0,
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
    return total, pixel_count(labels.valid, divide_by, total.dtype)


def squared_difference(
    logits: Float[Array, "n h w classes"],
    teacher_logits: Float[Array, "n h w classes"],
    valid: Bool[Array, "n h w"],
    divide_by: PixelSet = "valid",
    over_classes: Literal["sum", "mean"] = "sum",
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Squared difference of the probabilities, as (sum over pixels, count).

    French et al. sum over the classes, multiply the result by `confidence.confident_share`, and
    divide by all pixels. CCT takes the mean over the classes (`auxiliary_consistency`), which is
    the same loss at another weight.

    Args:
        logits: the student's, of any float dtype; the softmax is float32.
        teacher_logits: the teacher's, mixed as the student's images are; without gradient.
        valid: false at padding.
        divide_by: the pixels that the count counts.
        over_classes: how the classes of a pixel are joined.
    """
    student, teacher = (
        jax.nn.softmax(at_least_float32(x), axis=-1)
        for x in (logits, jax.lax.stop_gradient(teacher_logits))
    )
    reduce = jnp.sum if over_classes == "sum" else jnp.mean
    total, _ = losses.masked_sum(reduce((student - teacher) ** 2, axis=-1), valid)
    return total, pixel_count(valid, divide_by, total.dtype)


def auxiliary_consistency(
    auxiliary_logits: Sequence[Float[Array, "n h w classes"]],
    main_logits: Float[Array, "n h w classes"],
    valid: Bool[Array, "n h w"],
    divide_by: PixelSet = "valid",
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The consistency loss of CCT: the mean over the auxiliary decoders, as (sum, count).

    Each is the squared difference from the main decoder's probabilities, with the mean over the
    classes. The published weight is 30 times a ramp. The main decoder gets no gradient, the encoder
    gets that of the auxiliary decoders.

    Args:
        auxiliary_logits: one array for each auxiliary decoder, of perturbed features.
        main_logits: of the features as they are, at the same size.
        valid: false at padding.
        divide_by: the pixels that the count counts; published: all.
    """
    totals, counts = zip(
        *(
            squared_difference(logits, main_logits, valid, divide_by, over_classes="mean")
            for logits in auxiliary_logits
        ),
        strict=True,
    )
    return jnp.mean(jnp.stack(totals)), counts[0]


def soft_cross_entropy(
    logits: Float[Array, "n h w classes"],
    probabilities: Float[Array, "n h w classes"],
    valid: Bool[Array, "n h w"],
    divide_by: PixelSet = "valid",
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Cross-entropy with soft labels, as (sum in nats, count); PseudoSeg's loss, weight 1.

    Args:
        logits: of the strong view, of any float dtype; reduced in float32.
        probabilities: such as those of `fusion.calibrated_fusion`; without gradient.
        valid: pixels that are neither padding nor cut out.
        divide_by: the pixels that the count counts.
    """
    log_probabilities = jax.nn.log_softmax(at_least_float32(logits), axis=-1)
    cross_entropy = -jnp.sum(jax.lax.stop_gradient(probabilities) * log_probabilities, axis=-1)
    total, _ = losses.masked_sum(cross_entropy, valid)
    return total, pixel_count(valid, divide_by, total.dtype)


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
