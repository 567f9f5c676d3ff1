"""Losses of pixels with labels and with pseudo-labels, and the label that losses skip."""

from semiseg_jax.losses.labeled_losses import (
    balanced_class_weights,
    ce_dice_loss,
    focal_loss,
    hard_pixels,
    kth_smallest_probability,
    ohem_cross_entropy,
    weighted_cross_entropy,
)
from semiseg_jax.losses.pixel_losses import (
    IGNORE,
    PixelTerms,
    cross_entropy,
    masked_sum,
    pixel_terms,
    reverse_cross_entropy_map,
    self_correction,
    self_correction_map,
    symmetric_cross_entropy,
    symmetric_cross_entropy_map,
)

__all__ = [
    "IGNORE",
    "PixelTerms",
    "balanced_class_weights",
    "ce_dice_loss",
    "cross_entropy",
    "focal_loss",
    "hard_pixels",
    "kth_smallest_probability",
    "masked_sum",
    "ohem_cross_entropy",
    "pixel_terms",
    "reverse_cross_entropy_map",
    "self_correction",
    "self_correction_map",
    "symmetric_cross_entropy",
    "symmetric_cross_entropy_map",
    "weighted_cross_entropy",
]
