"""Strong data augmentation (SDA): N operations drawn from a pool of 17.

Yuan et al., "A Simple Baseline for Semi-supervised Semantic Segmentation with Strong Data
Augmentation", ICCV 2021, section 2.1 and figure 2. The paper names the operations but not their
magnitudes; this project chose the ranges. `magnitude="released"` reproduces the magnitudes of the
authors' released code, most of which are constants.

An operation changes only the image, never the label. Every function here is a pure function of its
arguments: results are equal in eager mode, in graphs and with any number of threads. An image costs
one call from TensorFlow into Python, in which NumPy and OpenCV augment it.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

from semiseg_jax.data import sda_magnitudes, sda_ops, sda_tables, stateless_random
from semiseg_jax.data.sda_magnitudes import (
    Arrays,
    MagnitudeSampler,
    channels,
    constant,
    grid,
    hue_saturation,
    permutation,
    quality,
    seeded,
    uniform,
)
from semiseg_jax.data.sda_tables import Image, Table
from semiseg_jax.data.stateless_random import Seed
from semiseg_jax.runtime import python_calls
from semiseg_jax.runtime.quiet_tensorflow import tf

TensorLike: TypeAlias = Any  # any argument of tf.convert_to_tensor
Magnitude = dict[str, tf.Tensor]

_MAGNITUDES = ("uniform", "released")


@dataclasses.dataclass(frozen=True)
class Operation:
    """An operation of the pool: its kernel and the distributions of its magnitude.

    Attributes:
        name: name in `OPS` and in `config.sda.ops`.
        kernel: (image, **magnitude) -> image, NumPy arrays; deterministic.
        uniform: the distribution over this project's range.
        released: the distribution in the authors' code.
        defaults: values of the magnitude's optional entries.
        table: magnitude -> the look-up table by which the kernel computes, or None if this
            magnitude takes more. Only for point operations, of which a run is one look-up.
    """

    name: str
    kernel: Callable[..., Image]
    uniform: MagnitudeSampler
    released: MagnitudeSampler
    defaults: dict[str, bool] = dataclasses.field(default_factory=dict)
    table: Callable[..., Table | None] | None = None

    @tf.autograph.experimental.do_not_convert
    def apply(self, image: TensorLike, **magnitude: TensorLike) -> tf.Tensor:
        """Applies the operation to an image.

        Args:
            image: uint8 [H, W, 3], RGB, 0..255, H and W at least 1.
            **magnitude: the entries that `sample` returns, as tensors, arrays or numbers. Random
                operations take a `seed`, int [2], and are deterministic given the seed.

        Returns:
            uint8 [H, W, 3], rounded half up and clipped to 0..255.

        Raises:
            ValueError: the image has another type or rank.
        """
        image = _checked(self.name, image)
        if tf.executing_eagerly():
            return tf.constant(self.kernel(image, **self.arguments(magnitude)))

        def apply_arrays(image: Image, *values: np.ndarray) -> Image:
            return self.kernel(image, **self.arguments(dict(zip(magnitude, values, strict=True))))

        inputs = [image, *magnitude.values()]
        return python_calls.call(apply_arrays, inputs, tf.uint8, image.shape)

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
        draw = self.sampler(magnitude).draw
        if tf.executing_eagerly():
            return _tensors(draw(np.asarray(seed, np.int64)))
        example = draw((0, 0))
        values = python_calls.call(
            lambda seed: list(draw(seed).values()),
            [tf.cast(seed, tf.int64)],
            [tf.as_dtype(value.dtype) for value in example.values()],
            [value.shape for value in example.values()],
        )
        return dict(zip(example, values, strict=True))

    def at_fraction(
        self, fraction: float, seed: TensorLike, magnitude: str = "uniform"
    ) -> Magnitude:
        """Returns the magnitude at a fraction of its range: the keyword arguments of `apply`.

        Args:
            fraction: 0 for the low end, 1 for the high end.
            seed: int [2], for values that differ between pixels; most operations ignore it.
            magnitude: as in `sample`.
        """
        entries = _tensors(self.sampler(magnitude).at_fraction(fraction))
        takes_seed = "seed" in inspect.signature(self.kernel).parameters
        return entries | ({"seed": tf.cast(seed, tf.int64)} if takes_seed else {})

    def arguments(self, magnitude: dict[str, Any]) -> Arrays:
        """Returns the keyword arguments of `kernel` for a magnitude of arrays or numbers."""
        entries = self.defaults | magnitude
        return {key: sda_magnitudes.typed(key, value) for key, value in entries.items()}

    def sampler(self, magnitude: str) -> MagnitudeSampler:
        """Returns the distribution "uniform" or "released"; raises a ValueError for others."""
        _check_magnitude(magnitude)
        return self.uniform if magnitude == "uniform" else self.released


def _tensors(magnitude: Arrays) -> Magnitude:
    return {key: tf.constant(value) for key, value in magnitude.items()}


@dataclasses.dataclass(frozen=True)
class _Settings:
    """What of the config decides the operations."""

    operations: tuple[Operation, ...]
    num_ops: int
    replace: bool
    magnitude: str


@tf.autograph.experimental.do_not_convert
def strong_augment(image: TensorLike, seed: TensorLike, config: Any) -> tf.Tensor:
    """Applies N random operations with random magnitudes.

    With replacement, N operations are drawn independently and applied in the order of the draws
    (figure 2). Without replacement, N distinct operations are applied in the order of `ops`, as
    in the released code.

    Args:
        image: uint8 [H, W, 3], RGB, H and W at least 1.
        seed: int [2]; the result is a pure function of it, the image and the config.
        config: `config.sda` or the whole config; read are `num_ops` >= 0, `replace`, `magnitude`
            ("uniform" or "released") and `ops` (the names of the enabled operations).

    Returns:
        uint8 [H, W, 3]; the image itself if `num_ops` is 0.

    Raises:
        ValueError: an invalid config, or an image of another type or rank.
    """
    settings = _settings(config)
    image = _checked("strong_augment", image)
    if settings.num_ops == 0:
        return tf.convert_to_tensor(image)
    if tf.executing_eagerly():
        return tf.constant(_augment(image, np.asarray(seed, np.int64), settings))
    augment = functools.partial(_augment, settings=settings)
    return python_calls.call(augment, [image, tf.cast(seed, tf.int64)], tf.uint8, image.shape)


def _augment(image: Image, seed: Seed, settings: _Settings) -> Image:
    """Applies the drawn operations; consecutive point operations by one table."""
    table: Table | None = None
    for operation, magnitude in _draw_operations(seed, settings):
        arguments = operation.arguments(magnitude)
        following = operation.table(**arguments) if operation.table else None
        if following is not None:
            table = following if table is None else sda_tables.compose(table, following)
            continue
        if table is not None:
            image, table = sda_tables.look_up(image, table), None
        image = operation.kernel(image, **arguments)
    return image if table is None else sda_tables.look_up(image, table)


def sample_ops(seed: TensorLike, config: Any) -> list[tuple[str, Magnitude]]:
    """Returns the operations that `strong_augment` applies with this seed.

    Args:
        seed: int [2], not symbolic.
        config: as in `strong_augment`.

    Returns:
        (name, magnitude) of each operation, in the order of application.
    """
    return [
        (operation.name, _tensors(magnitude))
        for operation, magnitude in _draw_operations(np.asarray(seed, np.int64), _settings(config))
    ]


def _draw_operations(seed: Seed, settings: _Settings) -> list[tuple[Operation, Arrays]]:
    """Draws the operations, in the order of application, and their magnitudes."""
    operations = settings.operations
    pick_seed, magnitude_seed = stateless_random.split(seed, 2)
    if settings.replace and settings.num_ops:
        last = len(operations) - 1
        picks = stateless_random.integers(pick_seed, (settings.num_ops,), 0, last)
    else:
        order = stateless_random.shuffled(pick_seed, len(operations))
        picks = np.sort(order[: settings.num_ops])
    picked = [operations[pick] for pick in picks]
    seeds = [stateless_random.fold_in(magnitude_seed, i) for i in range(len(picked))]
    samplers = [operation.sampler(settings.magnitude) for operation in picked]
    magnitudes = [sampler.draw(seed) for sampler, seed in zip(samplers, seeds, strict=True)]
    return list(zip(picked, magnitudes, strict=True))


def _settings(config: Any) -> _Settings:
    """Returns the settings of a config; raises a ValueError if they are invalid."""
    sda = getattr(config, "sda", config)
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
    operations = tuple(OPS[name] for name in sda.ops)
    return _Settings(operations, sda.num_ops, sda.replace, sda.magnitude)


def _check_magnitude(magnitude: str) -> None:
    if magnitude not in _MAGNITUDES:
        raise ValueError(f"sda.magnitude is one of {', '.join(_MAGNITUDES)}, not {magnitude!r}.")


def _checked(name: str, image: TensorLike) -> Any:
    """Returns an image as a NumPy array, or as a tensor while a graph is built."""
    eager = tf.executing_eagerly()
    image = np.ascontiguousarray(image) if eager else tf.convert_to_tensor(image)
    if image.dtype != tf.uint8 or tf.TensorShape(image.shape).rank not in (3, None):
        dtype = tf.as_dtype(image.dtype).name
        raise ValueError(f"{name} takes a uint8 image [H, W, 3], not {dtype} {image.shape}.")
    return image


# --- The pool, in the order of application when drawn without replacement ------------------------


def _point_operation(
    name: str, table: Callable[..., Table], uniform: MagnitudeSampler, released: MagnitudeSampler
) -> Operation:
    """Returns the operation that looks each value up in the table of the magnitude."""

    def look_up(image: Image, **magnitude: np.ndarray) -> Image:
        return sda_tables.look_up(image, table(**magnitude))

    return Operation(name, look_up, uniform, released, table=table)


def _invert_table(channels: np.ndarray, swap_red_blue: np.ndarray) -> Table | None:
    return None if swap_red_blue else sda_tables.invert(channels)


_PER_CHANNEL = (3,)
_solarize = uniform("t", 64, 192)
_salt_pepper = seeded(uniform("p", 0, 0.1))
_shuffle = permutation()
_multiply = uniform("m", 0.25, 2.5, _PER_CHANNEL)

OPS: dict[str, Operation] = {
    operation.name: operation
    for operation in (
        _point_operation(
            "contrast_gamma",
            sda_tables.contrast_gamma,
            uniform=uniform("g", 0.5, 1.5, _PER_CHANNEL),
            released=constant(g=[1.013] * 3),
        ),
        _point_operation(
            "contrast_linear",
            sda_tables.contrast_linear,
            uniform=uniform("a", 0.5, 2, _PER_CHANNEL),
            released=constant(a=[1.269] * 3),
        ),
        _point_operation(
            "brightness",
            sda_tables.brightness,
            uniform=uniform("v", -20, 50),
            released=constant(v=16),
        ),
        _point_operation(
            "brightness_channel",
            sda_tables.brightness,
            uniform=uniform("v", -20, 50, _PER_CHANNEL),
            released=constant(v=[16] * 3),
        ),
        Operation(
            "equalize",
            sda_ops.equalize,
            uniform=constant(),
            released=constant(lightness=True),
            defaults={"lightness": False},
        ),
        Operation(
            "hsv",
            sda_ops.hue_saturation,
            uniform=hue_saturation(-20, 20),
            released=constant(hue=0.0, saturation=0.0),
        ),
        Operation(
            "invert_channel",
            sda_ops.invert,
            uniform=channels(),
            released=constant(channels=[False] * 3, swap_red_blue=True),
            defaults={"swap_red_blue": False},
            table=_invert_table,
        ),
        Operation(
            "blur",
            sda_ops.gaussian_blur,
            uniform=uniform("sigma", 0.5, 2),
            released=constant(sigma=1.756),
        ),
        Operation(
            "noise_gau",
            sda_ops.gaussian_noise,
            uniform=seeded(uniform("s", 7.65, 20.4)),
            released=seeded(constant(s=14.2)),
        ),
        Operation(
            "noise_pos",
            sda_ops.poisson_noise,
            uniform=seeded(uniform("lam", 10, 15)),
            released=seeded(constant(lam=12.6)),
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
            uniform=seeded(uniform("p", 0.05, 0.5)),
            released=seeded(uniform("p", 0.2, 0.5)),
        ),
        Operation(
            "coarse_dropout",
            sda_ops.coarse_dropout,
            uniform=seeded(grid(0.05, 0.2, 4, 16)),
            released=seeded(grid(0.2, 0.2, 2, 5)),
        ),
        _point_operation(
            "multiply",
            sda_tables.multiply,
            uniform=_multiply,
            released=_multiply,
        ),
        Operation(
            "salt_pepper",
            sda_ops.salt_pepper,
            uniform=_salt_pepper,
            released=_salt_pepper,
        ),
        _point_operation(
            "solarize",
            sda_tables.solarize,
            uniform=_solarize,
            released=_solarize,
        ),
        Operation(
            "jpeg_compression",
            sda_ops.jpeg_compression,
            uniform=quality(7, 60),
            released=quality(7, 17),
        ),
    )
}
