"""The distributions of the magnitudes of strong data augmentation.

A magnitude is a dict of NumPy arrays: the keyword arguments of an operation's kernel besides the
image. Every draw has a seed of its own and is a pure function of it; see
`semiseg_jax.data.stateless_random`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from semiseg_jax.data import stateless_random
from semiseg_jax.data.stateless_random import Seed

Arrays = dict[str, np.ndarray]

# The types of all entries but float32.
_TYPES: dict[str, type[np.generic]] = {
    "seed": np.int64,
    "cells": np.int32,
    "permutation": np.int32,
    "quality": np.int32,
    "channels": np.bool_,
    "swap_red_blue": np.bool_,
    "lightness": np.bool_,
}


@dataclasses.dataclass(frozen=True)
class MagnitudeSampler:
    """The distribution of a magnitude.

    Attributes:
        draw: seed, two integers of 64 bits -> random magnitude.
        at_fraction: 0..1 -> the magnitude at this fraction of the range, equal in all channels and
            without the entry `seed`; used to display an operation.
    """

    draw: Callable[[Seed], Arrays]
    at_fraction: Callable[[float], Arrays]


def typed(key: str, value: Any) -> np.ndarray:
    """Returns an entry of a magnitude as an array of the type that the kernels expect."""
    return np.asarray(value, _TYPES.get(key, np.float32))


def uniform(key: str, low: float, high: float, shape: tuple[int, ...] = ()) -> MagnitudeSampler:
    """Samples one entry uniformly; shape (3,) is an independent draw for each channel."""
    return MagnitudeSampler(
        draw=lambda seed: {key: stateless_random.uniform(seed, shape, low, high)},
        at_fraction=lambda fraction: {key: np.full(shape, _interpolate(fraction, low, high))},
    )


def constant(**entries: Any) -> MagnitudeSampler:
    """Returns the given entries for every seed."""
    arrays = {key: typed(key, value) for key, value in entries.items()}
    return MagnitudeSampler(draw=lambda seed: arrays, at_fraction=lambda fraction: arrays)


def seeded(sampler: MagnitudeSampler) -> MagnitudeSampler:
    """Adds the seed from which the kernel draws the values that differ between pixels."""

    def draw(seed: Seed) -> Arrays:
        draw_seed, pixel_seed = stateless_random.split(seed, 2)
        return sampler.draw(draw_seed) | {"seed": typed("seed", pixel_seed)}

    return MagnitudeSampler(draw, sampler.at_fraction)


def channels() -> MagnitudeSampler:
    """Selects each channel with probability 1/2; if none is selected, one uniformly."""

    def draw(seed: Seed) -> Arrays:
        coins_seed, fallback_seed = stateless_random.split(seed, 2)
        coins = stateless_random.uniform(coins_seed, (3,)) < 0.5
        if not coins.any():
            coins[stateless_random.integers(fallback_seed, (), 0, 2)] = True
        return {"channels": coins, "swap_red_blue": np.asarray(False)}

    return MagnitudeSampler(
        draw,
        at_fraction=lambda fraction: {
            "channels": np.arange(3) <= _interpolate_integer(fraction, 0, 2),
            "swap_red_blue": np.asarray(False),
        },
    )


def grid(low: float, high: float, fewest: int, most: int) -> MagnitudeSampler:
    """Samples a probability in low..high and, independently, the cells down and across."""

    def draw(seed: Seed) -> Arrays:
        p_seed, cells_seed = stateless_random.split(seed, 2)
        return {
            "p": stateless_random.uniform(p_seed, (), low, high),
            "cells": stateless_random.integers(cells_seed, (2,), fewest, most),
        }

    return MagnitudeSampler(
        draw,
        at_fraction=lambda fraction: {
            "p": _interpolate(fraction, low, high),
            "cells": np.full(2, _interpolate_integer(fraction, fewest, most)),
        },
    )


def hue_saturation(low: float, high: float) -> MagnitudeSampler:
    """Samples the shifts of hue and saturation independently."""

    def draw(seed: Seed) -> Arrays:
        hue, saturation = stateless_random.uniform(seed, (2,), low, high)
        return {"hue": np.asarray(hue), "saturation": np.asarray(saturation)}

    def at_fraction(fraction: float) -> Arrays:
        shift = _interpolate(fraction, low, high)
        return {"hue": shift, "saturation": shift}

    return MagnitudeSampler(draw, at_fraction)


def permutation() -> MagnitudeSampler:
    """Samples one of the six permutations of the channels."""
    # Displayed are: green and blue exchanged, the cyclic shift by one, red and blue exchanged.
    displayed = ((0, 2, 1), (1, 2, 0), (2, 1, 0))
    return MagnitudeSampler(
        draw=lambda seed: {"permutation": stateless_random.shuffled(seed, 3)},
        at_fraction=lambda fraction: {
            "permutation": typed("permutation", displayed[round(2 * fraction)])
        },
    )


def quality(low: int, high: int) -> MagnitudeSampler:
    """Samples a JPEG quality from low..high, both included."""
    return MagnitudeSampler(
        draw=lambda seed: {"quality": stateless_random.integers(seed, (), low, high)},
        at_fraction=lambda fraction: {"quality": _interpolate_integer(fraction, low, high)},
    )


def _interpolate(fraction: float, low: float, high: float) -> np.ndarray:
    return np.asarray(low + fraction * (high - low), np.float32)


def _interpolate_integer(fraction: float, low: int, high: int) -> np.ndarray:
    return np.asarray(round(low + fraction * (high - low)), np.int32)
