"""Two-dimensional convolution, in a fast form for the platform that the program is compiled for.

On TPU and GPU every convolution is `lax.conv_general_dilated`. XLA's CPU compiler is fast at dense
k x k kernels, dilated or not, and slow at depthwise and 1x1 kernels, which have their own forms on
the CPU. Measured on two cores (jax 0.10.2, float32; milliseconds, forward / both gradients):

    depthwise 3x3, 4x65x65x256      lax.conv 113 / 290      shifted products   2.5 / 7
    depthwise 5x5, 4x33x33x240      lax.conv  42 / 106      shifted products   1.3 / 3.8
    1x1, 4x33x33x728 to 728         lax.conv  33 / 108      matrix product      24 / 49
    3x3, 4x33x41x304 to 256         lax.conv  84 / 175      9 matrix products  130 / 190

The choice is made per lowering, not per process: `lax.platform_dependent` retains only the branch
of the target platform, so a program that a CPU host lowers for a TPU pod contains the TPU's form.
The switch is inside both rules of a custom VJP, because differentiating through the switch would
differentiate every branch and make each branch return all branches' residuals.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.export import is_symbolic_dim
from jaxtyping import Array, Float

# In pixels: an int, or a jax.export expression if the size of the images is symbolic.
Dim = Any
Pads = tuple[tuple[Dim, Dim], tuple[Dim, Dim]]
Padding = str | Pads  # "same", "torch" or explicit

_LAYOUT = ("NHWC", "HWIO", "NHWC")


class _Geometry(NamedTuple):
    """The static arguments of a convolution besides its shapes; hashable, as `jax.jit` requires."""

    stride: int
    dilation: int
    pads: Pads
    groups: int


def conv2d(
    x: Float[Array, "b h w cin"],
    kernel: Float[Array, "kh kw cin_per_group cout"],
    *,
    stride: int = 1,
    dilation: int = 1,
    padding: Padding = "same",
    groups: int = 1,
) -> Float[Array, "b ho wo cout"]:
    """Cross-correlates images with a kernel, as `lax.conv_general_dilated` does.

    Differentiable once, in reverse mode. A batch sharded over devices is not moved: only the
    kernel's gradient is summed across devices.

    Args:
        x: images; the result has their dtype. float32 and float64 are computed in their own
            precision; narrower types are accumulated in float32, and the result is rounded once.
        kernel: cast to the images' dtype; its gradient has the kernel's own dtype.
        stride: rows and columns between neighbouring outputs.
        dilation: rows and columns between neighbouring kernel elements.
        padding: "same" gives ceil(size / stride) outputs, with the odd pixel of padding at the
            bottom and right (TensorFlow's SAME: the position of a strided kernel then depends on
            the size of the images); "torch" pads dilation * (k - 1) // 2 on every side, for every
            size and stride; or ((top, bottom), (left, right)), in pixels.
        groups: 1, or cin for a depthwise convolution. Output channel c then reads input channel
            c // (cout // cin). The fast CPU form covers cout == cin.

    Raises:
        ValueError: the kernel does not fit the channels or the size of the images, or the padding
            is unknown.
    """
    if groups not in (1, x.shape[-1]):
        raise ValueError(f"groups must be 1 or the {x.shape[-1]} input channels, not {groups}")
    if kernel.shape[2] * groups != x.shape[-1]:
        raise ValueError(
            f"a kernel of shape {kernel.shape} with {groups} groups takes "
            f"{kernel.shape[2] * groups} input channels, the images have {x.shape[-1]}"
        )
    pads = _explicit_pads(x.shape[1:3], kernel.shape[:2], stride, dilation, padding)
    if any(is_symbolic_dim(n) for n in (*pads[0], *pads[1])):
        # "same" with a stride pads by the size's remainder, and lax.conv accepts only numbers.
        x, pads = _pad(x, pads), ((0, 0), (0, 0))
    geometry = _Geometry(stride, dilation, pads, groups)
    if any(n < 1 for n in _out_size(x.shape, kernel.shape, geometry)):
        raise ValueError(
            f"a kernel of {kernel.shape[:2]} with dilation {dilation} does not fit into images of "
            f"{x.shape[1:3]} padded by {pads}"
        )
    kernel, geometry = _without_idle_taps(x.shape, kernel.astype(x.dtype), geometry)
    if _is_depthwise(kernel, geometry) or _is_pointwise(kernel, geometry):
        return _jitted_switched_conv(x, kernel, geometry)
    return _lax_conv(x, kernel, geometry)


def _explicit_pads(
    size: Sequence[Dim], kernel_size: Sequence[int], stride: int, dilation: int, padding: Padding
) -> Pads:
    reach = [dilation * (k - 1) for k in kernel_size]
    if padding == "same":
        totals = [
            (-(-n // stride) - 1) * stride + r + 1 - n for n, r in zip(size, reach, strict=True)
        ]
        # Otherwise no total is negative, also for a symbolic size.
        if any(r + 1 < stride for r in reach):
            totals = [max(total, 0) for total in totals]
        top, left = (total // 2 for total in totals)
        return (top, totals[0] - top), (left, totals[1] - left)
    if padding == "torch":
        return (reach[0] // 2, reach[0] // 2), (reach[1] // 2, reach[1] // 2)
    if isinstance(padding, str):
        raise ValueError(
            f"padding must be 'same', 'torch' or ((top, bottom), (left, right)), not {padding!r}"
        )
    (top, bottom), (left, right) = padding
    return (int(top), int(bottom)), (int(left), int(right))


def _out_size(
    x_shape: Sequence[Dim], kernel_shape: Sequence[int], geometry: _Geometry
) -> tuple[Dim, Dim]:
    height, width = (
        (n + low + high - geometry.dilation * (k - 1) - 1) // geometry.stride + 1
        for n, k, (low, high) in zip(x_shape[1:3], kernel_shape[:2], geometry.pads, strict=True)
    )
    return height, width


def _without_idle_taps(
    x_shape: Sequence[Dim], kernel: Float[Array, "kh kw ci co"], geometry: _Geometry
) -> tuple[Float[Array, "kh2 kw2 ci co"], _Geometry]:
    """Drops the outer kernel rows and columns that read only padding.

    With rates 12 and 18 of atrous pyramid pooling, only the centre of the kernel reads a 9x11 map:
    the remaining 1x1 kernel takes a ninth of the work. The gradient of the dropped taps is zero,
    which is correct. No tap is dropped if the size of the images is symbolic.
    """
    if any(is_symbolic_dim(n) for n in x_shape[1:3]):
        return kernel, geometry
    ranges, pads = [], []
    outs = _out_size(x_shape, kernel.shape, geometry)
    stride, dilation = geometry.stride, geometry.dilation
    for n, out, k, (low, high) in zip(
        x_shape[1:3], outs, kernel.shape[:2], geometry.pads, strict=True
    ):
        used = [
            tap
            for tap in range(k)
            if any(0 <= o * stride + tap * dilation - low < n for o in range(out))
        ] or [0]
        first, last = used[0], used[-1]
        ranges.append(slice(first, last + 1))
        pads.append((low - first * dilation, high - (k - 1 - last) * dilation))
    return kernel[ranges[0], ranges[1]], geometry._replace(pads=(pads[0], pads[1]))


def _is_depthwise(kernel: Array, geometry: _Geometry) -> bool:
    return geometry.groups > 1 and kernel.shape[3] == geometry.groups


def _is_pointwise(kernel: Array, geometry: _Geometry) -> bool:
    return geometry.groups == 1 and kernel.shape[:2] == (1, 1)


# ---------------------------------------------------------------- the choice by platform


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _switched_conv(x: Array, kernel: Array, geometry: _Geometry) -> Array:
    cpu_form = _depthwise if _is_depthwise(kernel, geometry) else _pointwise
    return lax.platform_dependent(
        x,
        kernel,
        cpu=lambda x, kernel: cpu_form(x, kernel, geometry),
        default=lambda x, kernel: _lax_conv(x, kernel, geometry),
    )


def _switched_conv_fwd(
    x: Array, kernel: Array, geometry: _Geometry
) -> tuple[Array, tuple[Array, Array]]:
    return _switched_conv(x, kernel, geometry), (x, kernel)


def _switched_conv_bwd(
    geometry: _Geometry, residuals: tuple[Array, Array], g: Array
) -> tuple[Array, Array]:
    x, kernel = residuals
    depthwise = _is_depthwise(kernel, geometry)
    cpu_form = _depthwise_gradients if depthwise else _pointwise_gradients
    return lax.platform_dependent(
        x,
        kernel,
        g,
        cpu=lambda x, kernel, g: cpu_form(x, kernel, g, geometry),
        default=lambda x, kernel, g: _lax_gradients(x, kernel, g, geometry),
    )


_switched_conv.defvjp(_switched_conv_fwd, _switched_conv_bwd)

# With jit, layers of equal shapes are traced once, and a call outside of jit runs one program
# instead of compiling the switch and each of its operations separately.
_jitted_switched_conv = jax.jit(_switched_conv, static_argnums=2)


# ---------------------------------------------------------------- every platform except the CPU


def _lax_conv(x: Array, kernel: Array, geometry: _Geometry) -> Array:
    return lax.conv_general_dilated(
        x,
        kernel,
        (geometry.stride, geometry.stride),
        geometry.pads,
        rhs_dilation=(geometry.dilation, geometry.dilation),
        dimension_numbers=_LAYOUT,
        feature_group_count=geometry.groups,
    )


def _lax_gradients(x: Array, kernel: Array, g: Array, geometry: _Geometry) -> tuple[Array, Array]:
    # Transposed, not differentiated: jax.vjp would add an unused forward pass to the program.
    (gx,) = jax.linear_transpose(lambda x: _lax_conv(x, kernel, geometry), x)(g)
    (gk,) = jax.linear_transpose(lambda kernel: _lax_conv(x, kernel, geometry), kernel)(g)
    return gx, gk


# ---------------------------------------------------------------- CPU: shared parts


def _wide(x: Array) -> Array:
    """Casts to the dtype of accumulation, at least float32."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _pad(x: Float[Array, "b h w c"], pads: Pads, interior: int = 0) -> Float[Array, "b h2 w2 c"]:
    """Adds zeros around the images (negative: crops) and `interior` zeros between their pixels."""
    config = [(0, 0, 0), *((low, high, interior) for low, high in pads), (0, 0, 0)]
    return lax.pad(x, jnp.zeros((), x.dtype), config)


def _tap(
    padded: Float[Array, "b h w c"], top: int, left: int, size: Sequence[Dim], stride: int
) -> Float[Array, "b ho wo c"]:
    """Returns the pixels that one kernel tap reads: `size` of them, from (top, left)."""
    b, _, _, c = padded.shape
    bottom, right = top + (size[0] - 1) * stride + 1, left + (size[1] - 1) * stride + 1
    return lax.slice(padded, (0, top, left, 0), (b, bottom, right, c), (1, stride, stride, 1))


def _input_gradient_pads(x: Array, kernel: Array, g: Array, geometry: _Geometry) -> Pads:
    """Padding of g, after dilating it by the stride, for which the flipped kernel gives gx."""
    pads = []
    for n, out, k, (low, _) in zip(
        x.shape[1:3], g.shape[1:3], kernel.shape[:2], geometry.pads, strict=True
    ):
        reach = geometry.dilation * (k - 1)
        pads.append((reach - low, n + low - ((out - 1) * geometry.stride + 1)))
    return pads[0], pads[1]


# ---------------------------------------------------------------- CPU: 1x1


def _pointwise(x: Array, kernel: Array, geometry: _Geometry) -> Array:
    """A matrix product over the pixels: up to 2 times (gradients 4 times) as fast as lax.conv."""
    size = _out_size(x.shape, kernel.shape, geometry)
    pixels = _tap(_pad(x, geometry.pads), 0, 0, size, geometry.stride)
    y = lax.dot_general(_wide(pixels), _wide(kernel[0, 0]), (((3,), (0,)), ((), ())))
    return y.astype(x.dtype)


def _pointwise_gradients(
    x: Array, kernel: Array, g: Array, geometry: _Geometry
) -> tuple[Array, Array]:
    pixels = _tap(_pad(x, geometry.pads), 0, 0, g.shape[1:3], geometry.stride)
    g = _wide(g)
    gx = lax.dot_general(g, _wide(kernel[0, 0]), (((3,), (1,)), ((), ()))).astype(x.dtype)
    gx = _pad(gx, _input_gradient_pads(x, kernel, g, geometry), geometry.stride - 1)
    over_pixels = (((0, 1, 2), (0, 1, 2)), ((), ()))
    # The compiler writes a transposed copy of the left operand to memory: put the smaller there.
    if x.shape[-1] <= g.shape[-1]:
        gk = lax.dot_general(_wide(pixels), g, over_pixels)
    else:
        gk = lax.dot_general(g, _wide(pixels), over_pixels).T
    return gx, gk[None, None].astype(kernel.dtype)


# ---------------------------------------------------------------- CPU: depthwise


def _depthwise(x: Array, kernel: Array, geometry: _Geometry) -> Array:
    size = _out_size(x.shape, kernel.shape, geometry)
    y = _shifted_sum(
        _pad(x, geometry.pads), kernel, size, stride=geometry.stride, dilation=geometry.dilation
    )
    return y.astype(x.dtype)


def _shifted_sum(
    padded: Float[Array, "b h w c"],
    kernel: Float[Array, "kh kw 1 c"],
    size: Sequence[Dim],
    *,
    stride: int,
    dilation: int,
) -> Float[Array, "b ho wo c"]:
    """Sums the taps: kh * kw multiply-adds per output, in one loop over contiguous channels.

    The padding is a separate operation: fused into the loop as a bounds check per tap, it was 1.5
    times slower. XLA fuses the following operations (an affine norm, a ReLU) into the loop.
    """
    kh, kw = kernel.shape[:2]
    padded, kernel = _wide(padded), _wide(kernel)
    terms = [
        _tap(padded, i * dilation, j * dilation, size, stride) * kernel[i, j, 0]
        for i in range(kh)
        for j in range(kw)
    ]
    return functools.reduce(jnp.add, terms)


def _depthwise_gradients(
    x: Array, kernel: Array, g: Array, geometry: _Geometry
) -> tuple[Array, Array]:
    """The gradient of x is a depthwise convolution of g, that of the kernel a sum of products."""
    kh, kw = kernel.shape[:2]
    stride, dilation = geometry.stride, geometry.dilation
    (top, bottom), sides = _input_gradient_pads(x, kernel, g, geometry)
    # The kernel's gradient sums rows in groups; rows of zeros fill the last group.
    group, extra = _row_groups(x.shape[1] if stride == 1 else g.shape[1])

    dilated_g = _pad(g, ((top, bottom + (extra if stride == 1 else 0)), sides), stride - 1)
    gx = _shifted_sum(dilated_g, kernel[::-1, ::-1], x.shape[1:3], stride=1, dilation=dilation)
    if stride == 1:
        # Shifting g over x or x over g gives the same sums in opposite order; g is padded already.
        x = _pad(x, ((0, extra), (0, 0)))
        gk = _shifted_dots(dilated_g, x, (kh, kw), group, stride=1, dilation=dilation)[::-1, ::-1]
    else:
        (top, bottom), sides = geometry.pads
        padded = _pad(x, ((top, bottom + extra * stride), sides))
        g = _pad(g, ((0, extra), (0, 0)))
        gk = _shifted_dots(padded, g, (kh, kw), group, stride=stride, dilation=dilation)
    return gx.astype(x.dtype), gk.astype(kernel.dtype)


def _row_groups(rows: int) -> tuple[int, int]:
    """Returns (rows to sum in one step, rows of zeros to append).

    At least one row of zeros is appended, because padding makes XLA write its operand to memory.
    Without it XLA fuses the neighbouring layers (a norm's gradient, for example) into the sums,
    which become too long to be unrolled: 41 ms instead of 15. Groups of 5 to 8 rows were equally
    fast.
    """
    extra = {group: group - rows % group for group in (8, 7, 6, 5)}
    group = min(extra, key=lambda group: extra[group])
    return group, extra[group]


def _shifted_dots(
    padded: Float[Array, "b h w c"],
    other: Float[Array, "b ho wo c"],
    kernel_size: tuple[int, int],
    group: int,
    *,
    stride: int,
    dilation: int,
) -> Float[Array, "kh kw 1 c"]:
    """For every tap and channel, the sum over images and pixels of shifted `padded` times `other`.

    One reduction with an operand per tap reads both arrays once; separate sums would read them once
    per tap. A reduction over all rows would run channel by channel, in scalar code, because the
    compiler vectorises the innermost loop, which is that of the sum. It unrolls a sum of few terms,
    and the loop over channels is then innermost: it unrolled 72 products (8 rows, 9 taps), but not
    144; 8 rows took 5 ms, all rows at once 16. The second sum is cheap.

    The sum over the images is a separate, last operation, so that a batch sharded over devices
    needs one all-reduce: for a reduction with several results XLA gathers arrays instead of
    reducing them.
    """
    kh, kw = kernel_size
    b, ho, wo, c = other.shape
    padded, other = _wide(padded), _wide(other)
    products = [
        _tap(padded, i * dilation, j * dilation, (ho, wo), stride) * other
        for i in range(kh)
        for j in range(kw)
    ]
    grouped = [product.reshape(b, ho // group, group, wo, c) for product in products]
    sums: list[Array] = []
    for first in range(0, len(grouped), 9):
        sums += _joint_sum(grouped[first : first + 9], axis=2)
    per_image = jnp.stack([s.sum((1, 2)) for s in sums])
    return per_image.sum(1).reshape(kh, kw, 1, c)


def _joint_sum(terms: Sequence[Array], axis: int) -> Sequence[Array]:
    """Sums arrays of one shape over one axis, in one pass over their common operands."""
    zeros = [jnp.zeros((), term.dtype) for term in terms]

    def add(left: Sequence[Array], right: Sequence[Array]) -> tuple[Array, ...]:
        return tuple(a + b for a, b in zip(left, right, strict=True))

    return lax.reduce(list(terms), zeros, add, (axis,))
