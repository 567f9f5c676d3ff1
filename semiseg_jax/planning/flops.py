"""Counts the floating-point operations of convolutions and matrix products exactly.

A multiplication and its addition count as two operations. Products with padding, and with the zeros
that the gradient of a strided convolution inserts into its operand, are not counted: a convolution
and each of its two gradients have the same count for any stride, dilation, padding and groups.
XLA's cost analysis follows the same rule and adds elementwise operations.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn


def count(jaxpr: ClosedJaxpr | Jaxpr) -> int:
    """Returns the operations of all convolutions and matrix products, including calls and loops.

    Where a program has platform-dependent branches (see `models.convolutions`), the default branch
    is counted: on the CPU some convolutions are written as shifted sums.

    Args:
        jaxpr: of the global batch, from `jax.jit(…).trace(…).jaxpr`.

    Raises:
        ValueError: a while loop of unknown length contains such an operation.
    """
    inner = jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
    return sum(_count_equation(equation) for equation in inner.eqns)


def _count_equation(equation: JaxprEqn) -> int:
    match equation.primitive.name:
        case "conv_general_dilated":
            return _count_convolution(equation)
        case "dot_general":
            return _count_matrix_product(equation)
        case "cond":
            return _count_branch(equation)
        case "scan":
            return equation.params["length"] * count(equation.params["jaxpr"])
        case "while":
            operations = count(equation.params["body_jaxpr"])
            if operations:
                raise ValueError("A while loop with convolutions or matrix products has no length.")
            return 0
        case _:
            return sum(map(count, _called_jaxprs(equation.params)))


def _called_jaxprs(parameters: dict[str, Any]) -> Iterator[ClosedJaxpr | Jaxpr]:
    """Yields the programs among the parameters of an operation."""
    for value in parameters.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, ClosedJaxpr | Jaxpr):
                yield item


def _count_branch(equation: JaxprEqn) -> int:
    """Counts the default branch of a choice by platform, the most expensive of any other."""
    branches = equation.params["branches"]
    platforms = equation.params.get("branches_platforms")
    if platforms and None in platforms:
        return count(branches[platforms.index(None)])
    return max(map(count, branches))


def _count_matrix_product(equation: JaxprEqn) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = _shape(equation.invars[0])
    products = math.prod(_shape(equation.outvars[0])) * math.prod(left[d] for d in contracted)
    return 2 * products


def _count_convolution(equation: JaxprEqn) -> int:
    parameters = equation.params
    left, kernel = map(_shape, equation.invars)
    out = _shape(equation.outvars[0])
    # Each spec lists the batch (or output channels), the channels, then the two image axes.
    left_spec, kernel_spec, out_spec = parameters["dimension_numbers"]
    pairs_by_axis = [
        _count_pixel_taps(
            left[left_spec[axis]],
            kernel[kernel_spec[axis]],
            out[out_spec[axis]],
            parameters["window_strides"][axis - 2],
            parameters["padding"][axis - 2][0],
            parameters["lhs_dilation"][axis - 2],
            parameters["rhs_dilation"][axis - 2],
        )
        for axis in range(2, len(left_spec))
    ]
    # The kernel has the input channels of one group; the output has the batch of one batch group.
    rest = out[out_spec[0]] * out[out_spec[1]] * kernel[kernel_spec[1]]
    return 2 * math.prod(pairs_by_axis) * rest


def _shape(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape


def _count_pixel_taps(
    size: int,
    taps: int,
    outputs: int,
    stride: int,
    low_padding: int,
    input_dilation: int,
    dilation: int,
) -> int:
    """Returns how many (output, tap) pairs along an axis read a pixel, not padding or a gap."""
    position = np.arange(outputs)[:, None] * stride + np.arange(taps) * dilation - low_padding
    is_pixel = (
        (position >= 0)
        & (position <= (size - 1) * input_dilation)
        & (position % input_dilation == 0)
    )
    return int(is_pixel.sum())
