"""JAX's operations in TensorFlow, for `jaxpr_program.rebuild`; all sizes are numbers.

Only operations that TFLite has as builtin operators are used. A convolution becomes TensorFlow's
convolution, which keeps the form that integer kernels exist for.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from semiseg_jax.runtime.quiet_tensorflow import tf
from semiseg_jax.serving.jaxpr_program import form_error, taken_axis

# Approximation of erfc(z) for z >= 0, by which TFLite, which has no erfc, computes GELU:
# t * exp(-z^2 + polynomial(t)) with t = 1 / (1 + z / 2); the error is below 1.2e-7 of the value
# (Press et al., Numerical Recipes, section 6.2, erfcc).
_ERFC = (
    *(-1.26551223, 1.00002368, 0.37409196, 0.09678418, -0.18628806),
    *(0.27886807, -1.13520398, 1.48851587, -0.82215223, 0.17087277),
)

_ELEMENTWISE: dict[str, Callable[..., Any]] = {
    "abs": tf.abs,
    "add": tf.add,
    "and": tf.logical_and,
    "clamp": lambda low, x, high: tf.minimum(tf.maximum(x, low), high),
    "cos": tf.cos,
    "div": tf.divide,
    "eq": tf.equal,
    "exp": tf.exp,
    "floor": tf.floor,
    "ge": tf.greater_equal,
    "gt": tf.greater,
    "le": tf.less_equal,
    "log": tf.math.log,
    "logistic": tf.sigmoid,
    "lt": tf.less,
    "max": tf.maximum,
    "min": tf.minimum,
    "mul": tf.multiply,
    "ne": tf.not_equal,
    "neg": tf.negative,
    "not": tf.logical_not,
    "or": tf.logical_or,
    "rsqrt": tf.math.rsqrt,
    "select_n": lambda which, first, second: tf.where(which, second, first),
    "sin": tf.sin,
    "sqrt": tf.sqrt,
    "square": lambda x: tf.multiply(x, x),
    "sub": tf.subtract,
    "tanh": tf.tanh,
}


class TensorFlowBuilder:
    """Adds the TensorFlow form of JAX's operations to a graph; see `jaxpr_program.Builder`."""

    format_name = "tflite"

    def __init__(self) -> None:
        self.elementwise: dict[str, Any] = {
            **_ELEMENTWISE,
            "convert_element_type": tf.cast,
            "erfc": _erfc,
            "integer_pow": _power,
            "shift_right_arithmetic": _shift_right,
        }
        self.operations: dict[str, Any] = {
            "argmax": _argmax,
            "concatenate": _concatenate,
            "conv_general_dilated": _conv,
            "dot_general": _dot,
            "gather": _gather,
            "iota": _iota,
            "pad": _pad,
            "reduce_max": _reduce_max,
            "reduce_sum": self._reduce_sum,
            "reshape": lambda eqn, x: tf.reshape(x, eqn.params["new_sizes"]),
            "slice": _slice,
            "split": lambda eqn, x: tf.split(x, eqn.params["sizes"], eqn.params["axis"]),
            "squeeze": lambda eqn, x: tf.reshape(x, eqn.outvars[0].aval.shape),
            "tile": lambda eqn, x: tf.tile(x, eqn.params["reps"]),
            "transpose": lambda eqn, x: tf.transpose(x, eqn.params["permutation"]),
        }
        # By the name of a tensor: what it is the exponential of; and the exponentials, and the
        # axis, that it is the sum of.
        self._exponents: dict[str, Any] = {}
        self._sums: dict[str, tuple[str, int]] = {}

    def emit_elementwise(self, eqn: Any, operands: Sequence[Any]) -> Any:
        """Adds an operation whose operands TensorFlow broadcasts."""
        name = eqn.primitive.name
        if name == "convert_element_type":
            return tf.cast(operands[0], eqn.params["new_dtype"])
        if name == "integer_pow":
            return _power(operands[0], eqn.params["y"])
        if name == "div" and (softmax := self._softmax(*operands)) is not None:
            return softmax
        if name == "div" and np.issubdtype(eqn.outvars[0].aval.dtype, np.integer):
            raise form_error("tflite", eqn)
        result = self.elementwise[name](*operands)
        if name == "exp":
            self._exponents[result.name] = operands[0]
        return result

    def emit(self, eqn: Any, operands: Sequence[Any]) -> Sequence[Any]:
        """Adds another operation."""
        results = self.operations[eqn.primitive.name](eqn, *operands)
        return results if isinstance(results, list) else [results]

    def unsqueeze(self, operand: Any, axes: Sequence[int]) -> Any:
        """Inserts axes of length 1."""
        shape = list(operand.shape)
        for axis in axes:
            shape.insert(axis, 1)
        result = tf.reshape(operand, shape)
        if operand.name in self._sums:
            self._sums[result.name] = self._sums[operand.name]
        return result

    def expand(self, operand: Any, shape: Sequence[int]) -> Any:
        """Broadcasts to a shape."""
        return tf.broadcast_to(operand, shape)

    def _reduce_sum(self, eqn: Any, x: Any) -> Any:
        axes = eqn.params["axes"]
        result = tf.reduce_sum(x, axes)
        if getattr(x, "name", None) in self._exponents and axes == (len(x.shape) - 1,):
            self._sums[result.name] = x.name, axes[0]
        return result

    def _softmax(self, dividend: Any, divisor: Any) -> Any:
        """Returns the softmax that a quotient is, or None.

        TFLite has an integer kernel for the softmax, and none for a quotient.
        """
        sums = self._sums.get(getattr(divisor, "name", ""))
        if sums is None or sums[0] != getattr(dividend, "name", ""):
            return None
        return tf.nn.softmax(self._exponents[dividend.name], sums[1])


def _erfc(x: Any) -> Any:
    z = tf.abs(x)
    t = 1 / (1 + 0.5 * z)
    polynomial = tf.fill([1] * len(x.shape), np.float32(_ERFC[-1]))
    for coefficient in _ERFC[-2::-1]:
        polynomial = polynomial * t + coefficient
    positive = t * tf.exp(polynomial - z * z)
    return tf.where(x >= 0, positive, 2 - positive)


def _power(x: Any, exponent: int) -> Any:
    return math.prod([x] * (exponent - 1), start=x) if exponent > 0 else tf.pow(x, exponent)


def _shift_right(x: Any, bits: Any) -> Any:
    """Divides by a power of 2 and rounds down."""
    return tf.math.floordiv(x, np.left_shift(np.ones((), np.int32), bits))


def _argmax(eqn: Any, x: Any) -> Any:
    (axis,) = eqn.params["axes"]
    return tf.cast(tf.argmax(x, axis, tf.int32), eqn.params["index_dtype"])


def _concatenate(eqn: Any, *parts: Any) -> Any:
    return tf.concat(parts, eqn.params["dimension"])


def _conv(eqn: Any, x: Any, kernel: Any) -> Any:
    params, groups = eqn.params, eqn.params["feature_group_count"]
    numbers = params["dimension_numbers"]
    layout = numbers.lhs_spec == numbers.out_spec == (0, 3, 1, 2) and numbers.rhs_spec == (
        3,
        2,
        0,
        1,
    )
    is_depthwise = groups > 1 and groups == x.shape[-1]
    if (
        not layout
        or {*params["lhs_dilation"], params["batch_group_count"]} != {1}
        or not (groups == 1 or is_depthwise)
    ):
        raise form_error("tflite", eqn)
    strides, dilations = params["window_strides"], params["rhs_dilation"]
    padding = "SAME"
    if tuple(params["padding"]) != _same_padding(
        tuple(x.shape[1:3]), kernel.shape[:2], strides, dilations
    ):
        padding = "VALID"
        if any(n for pair in params["padding"] for n in pair):
            x = tf.pad(x, [(0, 0), *params["padding"], (0, 0)])
    if is_depthwise:
        kernel = tf.reshape(kernel, [*kernel.shape[:2], groups, -1])
        return tf.nn.depthwise_conv2d(x, kernel, [1, *strides, 1], padding, dilations=dilations)
    return tf.nn.conv2d(x, kernel, strides, padding, dilations=dilations)


def _same_padding(
    size: Sequence[int], kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> tuple[tuple[int, int], ...]:
    """Returns the padding that TensorFlow calls SAME."""
    pads = []
    for n, k, stride, dilation in zip(size, kernel, strides, dilations, strict=True):
        total = max((-(-n // stride) - 1) * stride + dilation * (k - 1) + 1 - n, 0)
        pads.append((total // 2, total - total // 2))
    return tuple(pads)


def _dot(eqn: Any, left: Any, right: Any) -> Any:
    """A matrix product of the batch, the free and the contracted axes."""
    (contracted, batch) = eqn.params["dimension_numbers"]
    shapes = [atom.aval.shape for atom in eqn.invars]
    if isinstance(left, np.ndarray) and not batch[0]:
        # Known operands stand on the right: as the weights of a fully connected operator.
        product = _matrix_product(right, left, shapes[::-1], contracted[::-1], ((), ()))
        free = len(shapes[1]) - len(contracted[1])
        rank = len(product.shape)
        return tf.transpose(product, [*range(free, rank), *range(free)])
    return _matrix_product(left, right, shapes, contracted, batch)


def _matrix_product(
    left: Any,
    right: Any,
    shapes: Sequence[Sequence[int]],
    contracted: Sequence[Sequence[int]],
    batch: Sequence[Sequence[int]],
) -> Any:
    free = [
        [a for a in range(len(shapes[side])) if a not in (*contracted[side], *batch[side])]
        for side in (0, 1)
    ]
    sizes = [[shapes[side][axis] for axis in free[side]] for side in (0, 1)]
    batch_sizes = [shapes[0][axis] for axis in batch[0]]
    inner = math.prod(shapes[0][axis] for axis in contracted[0])
    left = _transpose(left, [*batch[0], *free[0], *contracted[0]])
    right = _transpose(right, [*batch[1], *contracted[1], *free[1]])
    left = tf.reshape(left, [*batch_sizes, math.prod(sizes[0]), inner])
    right = tf.reshape(right, [*batch_sizes, inner, math.prod(sizes[1])])
    return tf.reshape(tf.matmul(left, right), [*batch_sizes, *sizes[0], *sizes[1]])


def _transpose(x: Any, permutation: Sequence[int]) -> Any:
    return x if list(permutation) == sorted(permutation) else tf.transpose(x, permutation)


def _gather(eqn: Any, x: Any, indices: Any) -> Any:
    axis = taken_axis("tflite", eqn)
    last = eqn.invars[0].aval.shape[axis] - 1
    index = tf.clip_by_value(tf.squeeze(indices, -1), 0, last)
    return tf.gather(x, index, axis=axis)


def _iota(eqn: Any) -> Any:
    shape, axis, dtype = (eqn.params[key] for key in ("shape", "dimension", "dtype"))
    positions = np.arange(shape[axis], dtype=dtype)
    return np.broadcast_to(
        np.expand_dims(positions, [a for a in range(len(shape)) if a != axis]), shape
    )


def _pad(eqn: Any, x: Any, value: Any) -> Any:
    low, high, interior = zip(*eqn.params["padding_config"], strict=True)
    if any(interior) or not isinstance(value, np.ndarray):
        raise form_error("tflite", eqn)
    if min(*low, *high) < 0:
        begin = [max(-n, 0) for n in low]
        end = [n - max(-h, 0) for n, h in zip(x.shape, high, strict=True)]
        x = tf.strided_slice(x, begin, end)
    pads = [(max(a, 0), max(b, 0)) for a, b in zip(low, high, strict=True)]
    if not any(n for pair in pads for n in pair):
        return x
    return tf.pad(x, pads, constant_values=value)


def _reduce_max(eqn: Any, x: Any) -> Any:
    return tf.reduce_max(x, eqn.params["axes"])


def _slice(eqn: Any, x: Any) -> Any:
    params = eqn.params
    return tf.strided_slice(x, params["start_indices"], params["limit_indices"], params["strides"])
