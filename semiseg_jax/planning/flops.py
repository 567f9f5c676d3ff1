"""Floating-point operations of a program's convolutions and matrix products, counted exactly.

A product and its addition are two operations. Products with padding, and with the zeros that the
gradient of a strided convolution spreads its operand by, are none: so a convolution and each of
its two gradients count the same, whatever stride, dilation, padding and groups. XLA's own cost
analysis has the same rule, and adds what is elementwise.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn


def count(jaxpr: ClosedJaxpr | Jaxpr) -> int:
    """Operations of all convolutions and matrix products, with what calls and loops repeat.

    Where the program has forms for several platforms (see `models.convolutions`), the one that is
    no platform's own is counted: on the CPU some convolutions are written as shifted sums.

    Args:
        jaxpr: for the global batch, as `jax.jit(…).trace(…).jaxpr` gives it.

    Raises:
        ValueError: a loop that holds any of them does not say how often it runs.
    """
    inner = jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
    return sum(_of_equation(equation) for equation in inner.eqns)


def _of_equation(equation: JaxprEqn) -> int:
    match equation.primitive.name:
        case "conv_general_dilated":
            return _convolution(equation)
        case "dot_general":
            return _matrix_product(equation)
        case "cond":
            return _branch(equation)
        case "scan":
            return equation.params["length"] * count(equation.params["jaxpr"])
        case "while":
            operations = count(equation.params["body_jaxpr"])
            if operations:
                raise ValueError("A while loop with convolutions or matrix products has no length.")
            return 0
        case _:
            return sum(map(count, _programs(equation.params)))


def _programs(parameters: dict[str, Any]) -> Iterator[ClosedJaxpr | Jaxpr]:
    """The programs that an operation calls, each once."""
    for value in parameters.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, ClosedJaxpr | Jaxpr):
                yield item


def _branch(equation: JaxprEqn) -> int:
    """Of a choice by platform the default; of any other the dearest."""
    branches = equation.params["branches"]
    platforms = equation.params.get("branches_platforms")
    if platforms and None in platforms:
        return count(branches[platforms.index(None)])
    return max(map(count, branches))


def _matrix_product(equation: JaxprEqn) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = _shape(equation.invars[0])
    products = math.prod(_shape(equation.outvars[0])) * math.prod(left[d] for d in contracted)
    return 2 * products


def _convolution(equation: JaxprEqn) -> int:
    parameters = equation.params
    left, kernel = map(_shape, equation.invars)
    out = _shape(equation.outvars[0])
    of_left, of_kernel, of_out = parameters["dimension_numbers"]
    # Each spec: batch (or output channels), channels, then the two axes of the image.
    met = [
        _met(
            left[of_left[axis]],
            kernel[of_kernel[axis]],
            out[of_out[axis]],
            parameters["window_strides"][axis - 2],
            parameters["padding"][axis - 2][0],
            parameters["lhs_dilation"][axis - 2],
            parameters["rhs_dilation"][axis - 2],
        )
        for axis in range(2, len(of_left))
    ]
    # The kernel's channels are those of one group; an output's batch is that of one batch group.
    rest = out[of_out[0]] * out[of_out[1]] * kernel[of_kernel[1]]
    return 2 * math.prod(met) * rest


def _shape(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape


def _met(
    size: int, taps: int, outputs: int, stride: int, low: int, spread: int, dilation: int
) -> int:
    """How many (output, tap) pairs along an axis meet a pixel, and neither padding nor a hole."""
    place = np.arange(outputs)[:, None] * stride + np.arange(taps) * dilation - low
    inside = (place >= 0) & (place <= (size - 1) * spread) & (place % spread == 0)
    return int(inside.sum())
