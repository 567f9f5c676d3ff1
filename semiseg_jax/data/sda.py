"""Strong data augmentation (SDA): N operations drawn from a pool of 17.

Yuan et al., "A Simple Baseline for Semi-supervised Semantic Segmentation with Strong Data
Augmentation", ICCV 2021, section 3.2 and figure 2. The paper names the operations, not their
magnitudes; the ranges here are this project's. `magnitude="released"` draws what the authors'
released code effectively does instead: constants for most operations.

An operation sees the image alone, so that labels stay as they are. Everything is a pure function
of its arguments, made of TensorFlow's stateless operations: the same in eager mode, in graphs, and
under any number of threads.
"""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, TypeAlias

import tensorflow as tf

from semiseg_jax.data import sda_ops

TensorLike: TypeAlias = Any  # what tf.convert_to_tensor takes
Magnitude = dict[str, tf.Tensor]

_MAGNITUDES = ("uniform", "released")


@dataclasses.dataclass(frozen=True)
class Law:
    """How a magnitude is drawn.

    Attributes:
        draw: seed int64 [2] -> magnitude.
        at: 0..1 -> the magnitude that share of the way through the range, the same in every channel
            and without a seed of its own: what to show of an operation.
    """

    draw: Callable[[tf.Tensor], Magnitude]
    at: Callable[[float], Magnitude]


@dataclasses.dataclass(frozen=True)
class Operation:
    """One operation of the pool: how its magnitude is drawn, and what it does to an image.

    Attributes:
        name: its name in `OPS` and in `config.sda.ops`.
        kernel: (image, **magnitude) -> image, deterministic.
        uniform: draws from the range of this project.
        released: draws as the authors' code does.
        defaults: the entries of a magnitude that may be left out, and their values.
    """

    name: str
    kernel: Callable[..., tf.Tensor]
    uniform: Law
    released: Law
    defaults: dict[str, bool] = dataclasses.field(default_factory=dict)

    @tf.autograph.experimental.do_not_convert
    def apply(self, image: TensorLike, **magnitude: TensorLike) -> tf.Tensor:
        """The image after this operation.

        Args:
            image: uint8 [H, W, 3], RGB, 0..255, any H and W from 1.
            **magnitude: the entries that `sample` returns, as tensors, arrays or numbers. Random
                operations take a `seed`, int [2], and are deterministic in it.

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
            magnitude: "uniform" draws from the ranges of this project; "released" does as the
                authors' code.

        Returns:
            A dict of tensors: float32, int32 or bool of shape [], [2] or [3] (one per channel),
            and for random operations `seed`, int64 [2].
        """
        return self._law(magnitude).draw(tf.cast(seed, tf.int64))

    def at(self, share: float, seed: TensorLike, magnitude: str = "uniform") -> Magnitude:
        """The magnitude some way through its range: the keyword arguments of `apply`.

        Args:
            share: 0 for the low end, 1 for the high one.
            seed: int [2], for what differs from pixel to pixel; not used by most operations.
            magnitude: as `sample` takes it.
        """
        entries = self._law(magnitude).at(share)
        takes_seed = "seed" in inspect.signature(self.kernel).parameters
        return entries | ({"seed": tf.cast(seed, tf.int64)} if takes_seed else {})

    def _law(self, magnitude: str) -> Law:
        _check_magnitude(magnitude)
        return self.uniform if magnitude == "uniform" else self.released


# There is no Python control flow on tensors here; converting it all the same doubles the time that
# building the graph takes.
@tf.autograph.experimental.do_not_convert
def strong_augment(image: TensorLike, seed: TensorLike, config: Any) -> tf.Tensor:
    """Applies N random operations with random magnitudes.

    With replacement, N operations are drawn one by one and applied in the order drawn (figure 2);
    without, N distinct ones are applied in the order of `ops` (as in the released code).

    Args:
        image: uint8 [H, W, 3], RGB.
        seed: int [2]; the result is a pure function of it, the image and the config.
        config: `config.sda`, or the whole config: `num_ops` >= 0, `replace`, `magnitude`
            ("uniform" or "released"), `ops` (the names switched on).

    Returns:
        uint8 [H, W, 3]; the image itself if `num_ops` is 0.
    """
    sda = getattr(config, "sda", config)
    operations = _switched_on(sda)
    image = tf.convert_to_tensor(image)
    if sda.num_ops == 0:
        return image
    picks, magnitude_seed = _choose(operations, seed, sda)

    def apply_next(position: tf.Tensor, image: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        seed = _fold_in(magnitude_seed, position)
        return position + 1, _apply_one(operations, picks[position], image, seed, sda.magnitude)

    # A loop in the graph rather than in Python: the operations are traced and optimised once,
    # not once a position.
    _, image = tf.while_loop(
        lambda position, _: position < sda.num_ops,
        apply_next,
        (tf.constant(0), image),
        parallel_iterations=1,
    )
    return image


def drawn(seed: TensorLike, config: Any) -> list[tuple[str, Magnitude]]:
    """What `strong_augment` applies with this seed: names and magnitudes, in order.

    Args:
        seed: int [2], not symbolic.
        config: as `strong_augment` takes it.
    """
    sda = getattr(config, "sda", config)
    operations = _switched_on(sda)
    if sda.num_ops == 0:
        return []
    picks, magnitude_seed = _choose(operations, seed, sda)
    chosen = [operations[pick] for pick in picks.numpy()]
    return [
        (operation.name, operation.sample(_fold_in(magnitude_seed, position), sda.magnitude))
        for position, operation in enumerate(chosen)
    ]


def _choose(operations: list[Operation], seed: TensorLike, sda: Any) -> tuple[tf.Tensor, tf.Tensor]:
    """Places in `operations` of those to apply, int32 [num_ops]; and the seed of magnitudes."""
    choice_seed, magnitude_seed = _split(tf.cast(seed, tf.int64), 2)
    if sda.replace:
        picks = _integers(choice_seed, [sda.num_ops], 0, len(operations) - 1)
    else:
        shuffled = tf.random.experimental.stateless_shuffle(
            tf.range(len(operations)), choice_seed, alg="philox"
        )
        picks = tf.sort(shuffled[: sda.num_ops])
    return picks, magnitude_seed


def _switched_on(sda: Any) -> list[Operation]:
    """The operations that the config names; raises where the config cannot be obeyed."""
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


def _apply_one(
    operations: list[Operation], pick: tf.Tensor, image: tf.Tensor, seed: tf.Tensor, magnitude: str
) -> tf.Tensor:
    """Draws the picked operation's magnitude and applies it."""

    def branch(operation: Operation) -> Callable[[], tf.Tensor]:
        return lambda: operation.apply(image, **operation.sample(seed, magnitude))

    return tf.switch_case(pick, [branch(operation) for operation in operations])


# --- Draws. Seeds are int64 [2]; every draw has a seed of its own --------------------------------


def _tensor(key: str, value: TensorLike) -> tf.Tensor:
    """An entry of a magnitude as a tensor of the type that the kernels expect."""
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
    """Uniform in low..high, both included; int32."""
    return tf.random.stateless_uniform(shape, seed, low, high + 1, tf.int32, alg="philox")


def _uniform(key: str, low: float, high: float, shape: tuple[int, ...] = ()) -> Law:
    """Draws one entry uniformly; shape (3,) is an independent draw for each channel."""
    return Law(
        draw=lambda seed: {key: _floats(seed, list(shape), low, high)},
        at=lambda share: {key: tf.fill(shape, _way(share, low, high))},
    )


def _constant(**entries: Any) -> Law:
    """The entries as they are."""
    return Law(
        draw=lambda seed: {key: _tensor(key, value) for key, value in entries.items()},
        at=lambda share: {key: _tensor(key, value) for key, value in entries.items()},
    )


def _way(share: float, low: float, high: float) -> tf.Tensor:
    return tf.constant(low + share * (high - low), tf.float32)


def _whole_way(share: float, low: int, high: int) -> tf.Tensor:
    return tf.constant(round(low + share * (high - low)), tf.int32)


def _seeded(law: Law) -> Law:
    """Adds the seed from which the kernel draws what differs from pixel to pixel."""

    def draw(seed: tf.Tensor) -> Magnitude:
        draw_seed, pixel_seed = _split(seed, 2)
        return law.draw(draw_seed) | {"seed": pixel_seed}

    return Law(draw, law.at)


def _channels() -> Law:
    """Each channel by a fair coin; if that chose none, one of them with equal odds."""

    def draw(seed: tf.Tensor) -> Magnitude:
        coins_seed, one_seed = _split(seed, 2)
        coins = _floats(coins_seed, [3], 0, 1) < 0.5
        one = tf.range(3) == _integers(one_seed, [], 0, 2)
        return {
            "channels": coins | (one & ~tf.reduce_any(coins)),
            "swap_red_blue": tf.constant(False),
        }

    return Law(
        draw,
        at=lambda share: {
            "channels": tf.range(3) <= _whole_way(share, 0, 2),
            "swap_red_blue": tf.constant(False),
        },
    )


def _grid(low: float, high: float, fewest: int, most: int) -> Law:
    """Probability in low..high, and cells down and across, each drawn by itself."""

    def draw(seed: tf.Tensor) -> Magnitude:
        p_seed, cells_seed = _split(seed, 2)
        return {
            "p": _floats(p_seed, [], low, high),
            "cells": _integers(cells_seed, [2], fewest, most),
        }

    return Law(
        draw,
        at=lambda share: {
            "p": _way(share, low, high),
            "cells": tf.fill([2], _whole_way(share, fewest, most)),
        },
    )


def _hue_saturation(low: float, high: float) -> Law:
    def draw(seed: tf.Tensor) -> Magnitude:
        hue, saturation = tf.unstack(_floats(seed, [2], low, high))
        return {"hue": hue, "saturation": saturation}

    return Law(draw, at=lambda share: dict.fromkeys(("hue", "saturation"), _way(share, low, high)))


def _permutation() -> Law:
    shuffle = tf.random.experimental.stateless_shuffle
    # Of the six, the exchange of green and blue, the turn by one, and the exchange of red and blue.
    shown = ((0, 2, 1), (1, 2, 0), (2, 1, 0))
    return Law(
        draw=lambda seed: {"permutation": shuffle(tf.range(3), seed, alg="philox")},
        at=lambda share: {"permutation": tf.constant(shown[round(2 * share)])},
    )


def _quality(low: int, high: int) -> Law:
    return Law(
        draw=lambda seed: {"quality": _integers(seed, [], low, high)},
        at=lambda share: {"quality": _whole_way(share, low, high)},
    )


# --- The pool, in the order that drawing without replacement applies -----------------------------

_EACH = (3,)
_solarize = _uniform("t", 64, 192)
_salt_pepper = _seeded(_uniform("p", 0, 0.1))
_shuffle = _permutation()
_multiply = _uniform("m", 0.25, 2.5, _EACH)

OPS: dict[str, Operation] = {
    operation.name: operation
    for operation in (
        Operation(
            "contrast_gamma",
            sda_ops.contrast_gamma,
            uniform=_uniform("g", 0.5, 1.5, _EACH),
            released=_constant(g=[1.013] * 3),
        ),
        Operation(
            "contrast_linear",
            sda_ops.contrast_linear,
            uniform=_uniform("a", 0.5, 2, _EACH),
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
            uniform=_uniform("v", -20, 50, _EACH),
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
