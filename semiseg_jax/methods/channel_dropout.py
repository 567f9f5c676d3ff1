"""Dropout of whole feature channels: UniMatch's, and the complementary pair of UniMatch V2.

Sources: UniMatch (CVPR 2023), section 3.2, `model/semseg/deeplabv3plus.py`; UniMatch V2 (TPAMI
2025), section "Complementary dropout", `model/semseg/dpt.py`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, Shaped

from semiseg_jax.methods.image_keys import image_keys


def channel_dropout(keys: Key[Array, " n"], features: Any, rate: float = 0.5) -> Any:
    """Zeroes channels of each image with probability `rate`; multiplies the others by 1/(1 - rate).

    Each image and each level has its own mask. Differentiable in the features.

    Args:
        keys: one for each image, from `image_keys`.
        features: tree of levels, [n, ..., c] each; channels may differ.
        rate: probability, at least 0 and below 1.
    """
    levels, structure = jax.tree.flatten(features)
    dropped = []
    for level, feature in enumerate(levels):
        kept = _bernoulli(_fold(keys, level), feature.shape[-1], 1 - rate)
        dropped.append(_scale_channels(feature, kept / (1 - rate)))
    return jax.tree.unflatten(structure, dropped)


def complementary_dropout(
    key: Array, first: Any, second: Any, spared_share: float = 0.5
) -> tuple[Any, Any]:
    """Multiplies the features of two views of the same images by masks m and 2 - m.

    m is 0 or 2 for each channel with equal probability, so that each channel reaches exactly one
    of the two views. All levels of the same width share one mask, as in the published code, whose
    four levels are all of one width. The pairs that `spared_pairs` draws keep all channels.

    Args:
        key: of the step and the purpose.
        first: tree of levels of the first view, [n, ..., c] each.
        second: the same tree of the second view.
        spared_share: share of pairs that are not dropped from, rounded down to whole pairs of the
            batch; the published code draws them for each GPU.
    """
    pairs = jax.tree.leaves(first)[0].shape[0]
    spared = spared_pairs(jax.random.fold_in(key, 0), pairs, spared_share)
    keys = image_keys(jax.random.fold_in(key, 1), pairs)

    def mask(feature: Shaped[Array, "n *rest c"]) -> Float[Array, "n c"]:
        return complementary_masks(keys, spared, feature.shape[-1])

    return (
        jax.tree.map(lambda feature: _scale_channels(feature, mask(feature)), first),
        jax.tree.map(lambda feature: _scale_channels(feature, 2 - mask(feature)), second),
    )


def complementary_masks(
    keys: Key[Array, " n"], spared: Array, channels: int
) -> Float[Array, "n channels"]:
    """The mask m of the first view, float32: 0 or 2, or 1 for spared pairs; the other is 2 - m.

    Args:
        keys: one for each pair.
        spared: bool [n], from `spared_pairs`.
        channels: width of the level; each width has a mask of its own.
    """
    kept = _bernoulli(_fold(keys, channels), channels, 0.5)
    return jnp.where(spared[:, None], 1, 2 * kept)


def spared_pairs(key: Array, pairs: int, share: float = 0.5) -> Array:
    """Draws which pairs keep all channels, bool [pairs]: int(pairs * share), by permutation.

    Args:
        key: of the step and the purpose.
        pairs: images with two views, in the whole batch.
        share: in 0..1.
    """
    return jax.random.permutation(key, pairs) < int(pairs * share)


def _fold(keys: Key[Array, " n"], number: int) -> Key[Array, " n"]:
    return jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)


def _bernoulli(keys: Key[Array, " n"], channels: int, probability: float) -> Float[Array, "n c"]:
    """1 with a probability, else 0; float32."""
    # The draw is float32 under x64 too, so that both draw the same.
    draws = jax.vmap(lambda key: jax.random.uniform(key, (channels,), jnp.float32))(keys)
    return (draws < probability).astype(jnp.float32)


def _scale_channels(
    feature: Shaped[Array, "n *rest c"], factors: Float[Array, "n c"]
) -> Shaped[Array, "n *rest c"]:
    """Multiplies [n, ..., c] by [n, c], in the dtype of the features."""
    between = (1,) * (feature.ndim - 2)
    factors = factors.reshape(factors.shape[0], *between, factors.shape[1])
    return feature * factors.astype(feature.dtype)
