"""Strong data augmentation (SDA): N operations drawn from a pool of 17.

Yuan et al., "A Simple Baseline for Semi-supervised Semantic Segmentation with Strong Data
Augmentation", ICCV 2021, section 2.1 and figure 2. The paper names the operations but not their
magnitudes; this project chose the ranges. `magnitude="released"` reproduces the magnitudes of the
authors' released code, most of which are constants.

An operation changes only the image, never the label. Every function here is a pure function of
its arguments and uses TensorFlow's stateless random operations. Results are therefore equal in
eager mode, in graphs and with any number of threads.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeAlias

from semiseg_jax.data import sda_ops
from semiseg_jax.runtime.quiet_tensorflow import tf

TensorLike: TypeAlias = Any  # any argument of tf.convert_to_tensor
Magnitude = dict[str, tf.Tensor]

_MAGNITUDES = ("uniform", "released")


@dataclasses.dataclass(frozen=True)
class MagnitudeSampler:
    """The distribution of a magnitude.

    Attributes:
        draw: seed int64 [2] -> random magnitude.
        at_fraction: 0..1 -> the magnitude at this fraction of the range, equal in all channels and
            without the entry `seed`; used to display an operation.
    """

    draw: Callable[[tf.Tensor], Magnitude]
    at_fraction: Callable[[float], Magnitude]


@dataclasses.dataclass(frozen=True)
class Operation:
    """An operation of the pool: its kernel and the distributions of its magnitude.

    Attributes:
        name: name in `OPS` and in `config.sda.ops`.
        kernel: (image, **magnitude) -> image, deterministic.
        uniform: the distribution over this project's range.
        released: the distribution in the authors' code.
        defaults: values of the magnitude's optional entries.
    """

    name: str
    kernel: Callable[..., tf.Tensor]
    uniform: MagnitudeSampler
    released: MagnitudeSampler
    defaults: dict[str, bool] = dataclasses.field(default_factory=dict)

    @tf.autograph.experimental.do_not_convert
    def apply(self, image: TensorLike, **magnitude: TensorLike) -> tf.Tensor:
        """Applies the operation to an image.

        Args:
            image: uint8 [H, W, 3], RGB, 0..255, H and W at least 1.
            **magnitude: the entries that `sample` returns, as tensors, arrays or numbers. Random
                operations take a `seed`, int [2], and are deterministic given the seed.

        Returns:
            uint8 [H, W, 3], rounded half up and clipped to 0..255.
        """
        image = tf.convert_to_tensor(image)
        if image.dtype != tf.uint8 or image.shape.rank not in (3, None):
            raise ValueError(
                f"{self.name} takes a uint8 image [H, W, 3], not {image.dtype.name} {image.shape}."
            )
        tensors = {key: _tensor(key, value) for key, value in (self.defaults | magnitude).items()}
        return tf.ensure_shape(self.kernel(image, **tensors), image.shape)

    @tf.autograph.experimental.do_not_convert
    def sample(self, seed: TensorLike, magnitude: str = "uniform") -> Magnitude:
        """Draws a magnitude: the keyword arguments of `apply`.

        Args:
            seed: int [2].
            magnitude: "uniform" for the ranges of this project, "released" for the values of the
                authors' code.

        Returns:
            A dict of tensors: float32, int32 or bool of shape [], [2] or [3] (one per channel),
            and for random operations `seed`, int64 [2].
        """
        return self._sampler(magnitude).draw(tf.cast(seed, tf.int64))

    def at_fraction(
        self, fraction: float, seed: TensorLike, magnitude: str = "uniform"
    ) -> Magnitude:
        """Returns the magnitude at a fraction of its range: the keyword arguments of `apply`.

        Args:
            fraction: 0 for the low end, 1 for the high end.
            seed: int [2], for values that differ between pixels; most operations ignore it.
            magnitude: as in `sample`.
        """
        entries = self._sampler(magnitude).at_fraction(fraction)
        takes_seed = "seed" in inspect.signature(self.kernel).parameters
        return entries | ({"seed": tf.cast(seed, tf.int64)} if takes_seed else {})

    def _sampler(self, magnitude: str) -> MagnitudeSampler:
        _check_magnitude(magnitude)
        return self.uniform if magnitude == "uniform" else self.released


@dataclasses.dataclass(frozen=True)
class _Settings:
    """What of the config decides the operations."""

    num_ops: int
    replace: bool
    magnitude: str
    ops: tuple[str, ...]


def strong_augment(image: TensorLike, seed: TensorLike, config: Any) -> tf.Tensor:
    """Applies N random operations with random magnitudes.

    With replacement, N operations are drawn independently and applied in the order of the draws
    (figure 2). Without replacement, N distinct operations are applied in the order of `ops`, as
    in the released code.

    Args:
        image: uint8 [H, W, 3], RGB.
        seed: int [2]; the result is a pure function of it, the image and the config.
        config: `config.sda` or the whole config; read are `num_ops` >= 0, `replace`, `magnitude`
            ("uniform" or "released") and `ops` (the names of the enabled operations).

    Returns:
        uint8 [H, W, 3]; the image itself if `num_ops` is 0.
    """
    sda = getattr(config, "sda", config)
    _enabled_operations(sda)
    image = tf.convert_to_tensor(image)
    if sda.num_ops == 0:
        return image
    settings = _Settings(sda.num_ops, sda.replace, sda.magnitude, tuple(sda.ops))
    seed = tf.cast(seed, tf.int64)
    if tf.executing_eagerly():
        return _apply_operations(image, seed, settings)
    augmented = _traced_operations(settings)(image, seed)
    augmented.set_shape(image.shape)
    return augmented


@functools.lru_cache(maxsize=8)
def _traced_operations(settings: _Settings) -> Callable[[tf.Tensor, tf.Tensor], tf.Tensor]:
    """The operations as a graph, traced once for all stages of a process."""
    return tf.function(
        functools.partial(_apply_operations, settings=settings),
        input_signature=[tf.TensorSpec([None, None, 3], tf.uint8), tf.TensorSpec([2], tf.int64)],
        autograph=False,
    )


# The function has no Python control flow on tensors. Autograph would convert it in vain, which
# doubles the time to build the graph.
@tf.autograph.experimental.do_not_convert
def _apply_operations(image: tf.Tensor, seed: tf.Tensor, settings: _Settings) -> tf.Tensor:
    operations = _enabled_operations(settings)
    picks, magnitude_seed = _draw_picks(operations, seed, settings)

    def apply_next(position: tf.Tensor, image: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        seed = _fold_in(magnitude_seed, position)

        def branch(operation: Operation) -> Callable[[], tf.Tensor]:
            return lambda: operation.apply(image, **operation.sample(seed, settings.magnitude))

        branches = [branch(operation) for operation in operations]
        return position + 1, tf.switch_case(picks[position], branches)

    # The loop is in the graph, so that the operations are traced and optimised once and not once
    # per position.
    _, image = tf.while_loop(
        lambda position, _: position < settings.num_ops,
        apply_next,
        (tf.constant(0), image),
        parallel_iterations=1,
    )
    return image


def sample_ops(seed: TensorLike, config: Any) -> list[tuple[str, Magnitude]]:
    """Returns the operations that `strong_augment` applies with this seed.

    Args:
        seed: int [2], not symbolic.
        config: as in `strong_augment`.

    Returns:
        (name, magnitude) of each operation, in the order of application.
    """
    sda = getattr(config, "sda", config)
    operations = _enabled_operations(sda)
    if sda.num_ops == 0:
        return []
    picks, magnitude_seed = _draw_picks(operations, seed, sda)
    picked = [operations[pick] for pick in picks.numpy()]
    return [
        (operation.name, operation.sample(_fold_in(magnitude_seed, position), sda.magnitude))
        for position, operation in enumerate(picked)
    ]


def _draw_picks(
    operations: list[Operation], seed: TensorLike, sda: Any
) -> tuple[tf.Tensor, tf.Tensor]:
    """Draws indices into `operations`, int32 [num_ops]; returns also the seed of magnitudes."""
    pick_seed, magnitude_seed = _split(tf.cast(seed, tf.int64), 2)
    if sda.replace:
        picks = _integers(pick_seed, [sda.num_ops], 0, len(operations) - 1)
    else:
        shuffled = tf.random.experimental.stateless_shuffle(
            tf.range(len(operations)), pick_seed, alg="philox"
        )
        picks = tf.sort(shuffled[: sda.num_ops])
    return picks, magnitude_seed


def _enabled_operations(sda: Any) -> list[Operation]:
    """Returns the operations that the config names; raises a ValueError for an invalid config."""
    _check_magnitude(sda.magnitude)
    unknown = [name for name in sda.ops if name not in OPS]
    if unknown:
        raise ValueError(
            f"sda.ops names no operation of the pool: {', '.join(unknown)}; "
            f"there are {', '.join(OPS)}."
        )
    available = len(sda.ops)
    if sda.num_ops < 0 or (sda.num_ops > 0 and not available):
        raise ValueError(
            f"sda.num_ops is {sda.num_ops} with {available} operations in sda.ops: "
            "it must be at least 0, and 0 where none is switched on."
        )
    if not sda.replace and sda.num_ops > available:
        raise ValueError(
            f"sda.num_ops is {sda.num_ops} without replacement from {available} operations: "
            "lower it, or set sda.replace."
        )
    return [OPS[name] for name in sda.ops]


def _check_magnitude(magnitude: str) -> None:
    if magnitude not in _MAGNITUDES:
        raise ValueError(f"sda.magnitude is one of {', '.join(_MAGNITUDES)}, not {magnitude!r}.")


# --- Distributions. Seeds are int64 [2]; every draw has its own seed -----------------------------


def _tensor(key: str, value: TensorLike) -> tf.Tensor:
    """Returns an entry of a magnitude as a tensor of the type that the kernels expect."""
    return tf.cast(value, _TYPES.get(key, tf.float32))


_TYPES = {
    "seed": tf.int64,
    "cells": tf.int32,
    "permutation": tf.int32,
    "quality": tf.int32,
    "channels": tf.bool,
    "swap_red_blue": tf.bool,
    "lightness": tf.bool,
}


def _split(seed: tf.Tensor, count: int) -> list[tf.Tensor]:
    return tf.unstack(tf.random.experimental.stateless_split(seed, count, alg="philox"))


def _fold_in(seed: tf.Tensor, number: tf.Tensor | int) -> tf.Tensor:
    number = tf.cast(number, tf.int64)
    return tf.random.experimental.stateless_fold_in(seed, number, alg="philox")


def _floats(seed: tf.Tensor, shape: list[int], low: float, high: float) -> tf.Tensor:
    return tf.random.stateless_uniform(shape, seed, low, high, alg="philox")


def _integers(seed: tf.Tensor, shape: list[int], low: int, high: int) -> tf.Tensor:
    """Draws int32 values uniformly from low..high, both included."""
    return tf.random.stateless_uniform(shape, seed, low, high + 1, tf.int32, alg="philox")


def _uniform(key: str, low: float, high: float, shape: tuple[int, ...] = ()) -> MagnitudeSampler:
    """Samples one entry uniformly; shape (3,) is an independent draw for each channel."""
    return MagnitudeSampler(
        draw=lambda seed: {key: _floats(seed, list(shape), low, high)},
        at_fraction=lambda fraction: {key: tf.fill(shape, _interpolate(fraction, low, high))},
    )


def _constant(**entries: Any) -> MagnitudeSampler:
    """Returns the given entries for every seed."""
    return MagnitudeSampler(
        draw=lambda seed: {key: _tensor(key, value) for key, value in entries.items()},
        at_fraction=lambda fraction: {key: _tensor(key, value) for key, value in entries.items()},
    )


def _interpolate(fraction: float, low: float, high: float) -> tf.Tensor:
    return tf.constant(low + fraction * (high - low), tf.float32)


def _interpolate_integer(fraction: float, low: int, high: int) -> tf.Tensor:
    return tf.constant(round(low + fraction * (high - low)), tf.int32)


def _seeded(sampler: MagnitudeSampler) -> MagnitudeSampler:
    """Adds the seed from which the kernel draws the values that differ between pixels."""

    def draw(seed: tf.Tensor) -> Magnitude:
        draw_seed, pixel_seed = _split(seed, 2)
        return sampler.draw(draw_seed) | {"seed": pixel_seed}

    return MagnitudeSampler(draw, sampler.at_fraction)


def _channels() -> MagnitudeSampler:
    """Selects each channel with probability 1/2; if none is selected, one uniformly."""

    def draw(seed: tf.Tensor) -> Magnitude:
        coins_seed, fallback_seed = _split(seed, 2)
        coins = _floats(coins_seed, [3], 0, 1) < 0.5
        fallback = tf.range(3) == _integers(fallback_seed, [], 0, 2)
        return {
            "channels": coins | (fallback & ~tf.reduce_any(coins)),
            "swap_red_blue": tf.constant(False),
        }

    return MagnitudeSampler(
        draw,
        at_fraction=lambda fraction: {
            "channels": tf.range(3) <= _interpolate_integer(fraction, 0, 2),
            "swap_red_blue": tf.constant(False),
        },
    )


def _grid(low: float, high: float, fewest: int, most: int) -> MagnitudeSampler:
    """Samples a probability in low..high and, independently, the cells down and across."""

    def draw(seed: tf.Tensor) -> Magnitude:
        p_seed, cells_seed = _split(seed, 2)
        return {
            "p": _floats(p_seed, [], low, high),
            "cells": _integers(cells_seed, [2], fewest, most),
        }

    return MagnitudeSampler(
        draw,
        at_fraction=lambda fraction: {
            "p": _interpolate(fraction, low, high),
            "cells": tf.fill([2], _interpolate_integer(fraction, fewest, most)),
        },
    )


def _hue_saturation(low: float, high: float) -> MagnitudeSampler:
    """Samples the shifts of hue and saturation independently."""

    def draw(seed: tf.Tensor) -> Magnitude:
        hue, saturation = tf.unstack(_floats(seed, [2], low, high))
        return {"hue": hue, "saturation": saturation}

    def at_fraction(fraction: float) -> Magnitude:
        shift = _interpolate(fraction, low, high)
        return {"hue": shift, "saturation": shift}

    return MagnitudeSampler(draw, at_fraction)


def _permutation() -> MagnitudeSampler:
    """Samples one of the six permutations of the channels."""
    shuffle = tf.random.experimental.stateless_shuffle
    # Displayed are: green and blue exchanged, the cyclic shift by one, red and blue exchanged.
    displayed = ((0, 2, 1), (1, 2, 0), (2, 1, 0))
    return MagnitudeSampler(
        draw=lambda seed: {"permutation": shuffle(tf.range(3), seed, alg="philox")},
        at_fraction=lambda fraction: {"permutation": tf.constant(displayed[round(2 * fraction)])},
    )


def _quality(low: int, high: int) -> MagnitudeSampler:
    """Samples a JPEG quality from low..high, both included."""
    return MagnitudeSampler(
        draw=lambda seed: {"quality": _integers(seed, [], low, high)},
        at_fraction=lambda fraction: {"quality": _interpolate_integer(fraction, low, high)},
    )


# --- The pool, in the order of application when drawn without replacement ------------------------

_PER_CHANNEL = (3,)
_solarize = _uniform("t", 64, 192)
_salt_pepper = _seeded(_uniform("p", 0, 0.1))
_shuffle = _permutation()
_multiply = _uniform("m", 0.25, 2.5, _PER_CHANNEL)

OPS: dict[str, Operation] = {
    operation.name: operation
    for operation in (
        Operation(
            "contrast_gamma",
            sda_ops.contrast_gamma,
            uniform=_uniform("g", 0.5, 1.5, _PER_CHANNEL),
            released=_constant(g=[1.013] * 3),
        ),
        Operation(
            "contrast_linear",
            sda_ops.contrast_linear,
            uniform=_uniform("a", 0.5, 2, _PER_CHANNEL),
            released=_constant(a=[1.269] * 3),
        ),
        Operation(
            "brightness",
            sda_ops.brightness,
            uniform=_uniform("v", -20, 50),
            released=_constant(v=16),
        ),
        Operation(
            "brightness_channel",
            sda_ops.brightness,
            uniform=_uniform("v", -20, 50, _PER_CHANNEL),
            released=_constant(v=[16] * 3),
        ),
        Operation(
            "equalize",
            sda_ops.equalize,
            uniform=_constant(),
            released=_constant(lightness=True),
            defaults={"lightness": False},
        ),
        Operation(
            "hsv",
            sda_ops.hue_saturation,
            uniform=_hue_saturation(-20, 20),
            released=_constant(hue=0.0, saturation=0.0),
        ),
        Operation(
            "invert_channel",
            sda_ops.invert,
            uniform=_channels(),
            released=_constant(channels=[False] * 3, swap_red_blue=True),
            defaults={"swap_red_blue": False},
        ),
        Operation(
            "blur",
            sda_ops.gaussian_blur,
            uniform=_uniform("sigma", 0.5, 2),
            released=_constant(sigma=1.756),
        ),
        Operation(
            "noise_gau",
            sda_ops.gaussian_noise,
            uniform=_seeded(_uniform("s", 7.65, 20.4)),
            released=_seeded(_constant(s=14.2)),
        ),
        Operation(
            "noise_pos",
            sda_ops.poisson_noise,
            uniform=_seeded(_uniform("lam", 10, 15)),
            released=_seeded(_constant(lam=12.6)),
        ),
        Operation(
            "channel_shuffle",
            sda_ops.permute_channels,
            uniform=_shuffle,
            released=_shuffle,
        ),
        Operation(
            "dropout",
            sda_ops.dropout,
            uniform=_seeded(_uniform("p", 0.05, 0.5)),
            released=_seeded(_uniform("p", 0.2, 0.5)),
        ),
        Operation(
            "coarse_dropout",
            sda_ops.coarse_dropout,
            uniform=_seeded(_grid(0.05, 0.2, 4, 16)),
            released=_seeded(_grid(0.2, 0.2, 2, 5)),
        ),
        Operation(
            "multiply",
            sda_ops.multiply,
            uniform=_multiply,
            released=_multiply,
        ),
        Operation(
            "salt_pepper",
            sda_ops.salt_pepper,
            uniform=_salt_pepper,
            released=_salt_pepper,
        ),
        Operation(
            "solarize",
            sda_ops.solarize,
            uniform=_solarize,
            released=_solarize,
        ),
        Operation(
            "jpeg_compression",
            sda_ops.jpeg_compression,
            uniform=_quality(7, 60),
            released=_quality(7, 17),
        ),
    )
}
