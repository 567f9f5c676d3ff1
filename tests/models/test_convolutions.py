"""conv2d against `lax.conv_general_dilated`: values, gradients, and the program of a platform."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax

from semiseg_jax.models.convolutions import conv2d

# Odd and even sizes, sizes smaller than most of the dilated kernels, and a single pixel.
SIZES = [(9, 11), (8, 6), (3, 4), (1, 1), (16, 5)]
PADDINGS = ["same", "torch", ((2, 0), (1, 3))]


def reference(x, kernel, *, stride=1, dilation=1, padding="same", groups=1):
    """The plain convolution; lax computes the padding, not the code under test."""
    if padding == "same":
        pads = "SAME"
    elif padding == "torch":
        pads = [(dilation * (k - 1) // 2,) * 2 for k in kernel.shape[:2]]
    else:
        pads = padding
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        pads,
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def random_case(seed, size, kernel_size, *, cin=6, cout=5, groups=1, dtype=np.float32):
    rng = np.random.default_rng(seed)
    shape = (*kernel_size, 1, cin) if groups == cin else (*kernel_size, cin, cout)
    x = rng.normal(size=(2, *size, cin))
    return jnp.asarray(x, dtype), jnp.asarray(rng.normal(size=shape), dtype)


def value_and_gradients(conv, x, kernel, **options):
    """Returns (y, gx, gk) for an output gradient that differs from pixel to pixel."""
    y, vjp = jax.vjp(lambda x, kernel: conv(x, kernel, **options), x, kernel)
    g = jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape).astype(y.dtype)
    return y, *vjp(g)


def compare(cases, tolerance=1e-5):
    """Runs conv2d and the reference on all cases, in one program each; names a differing case."""

    def run(conv):
        def all_cases(arrays):
            return [
                value_and_gradients(conv, x, kernel, **options)
                for (x, kernel), (_, _, options) in zip(arrays, cases, strict=True)
            ]

        # Unoptimised machine code computes the same values and compiles in half the time.
        unoptimized = {"xla_backend_optimization_level": 0}
        arrays = [(x, kernel) for x, kernel, _ in cases]
        return jax.jit(all_cases, compiler_options=unoptimized)(arrays)

    for (x, kernel, options), results, expected in zip(
        cases, run(conv2d), run(reference), strict=True
    ):
        for name, a, b in zip(("y", "gx", "gk"), results, expected, strict=True):
            case = f"{name} of {x.shape} * {kernel.shape}, {options}"
            assert a.shape == b.shape and a.dtype == b.dtype, case
            error = np.abs(a - b).max() / max(np.abs(b).max(), 1e-6)
            assert error < tolerance, f"{case}: off by {error:.1e} of the largest value"


def grid(kernel_size, groups):
    """Returns cases of all strides and dilations, alternating sizes and paddings, none empty."""
    cases = []
    alternatives = itertools.cycle(itertools.product(PADDINGS, SIZES))
    # Each kernel starts at another one, so that together they cover most combinations.
    alternatives = itertools.islice(alternatives, sum(kernel_size) + groups, None)
    for stride, dilation in itertools.product((1, 2, 3), (1, 2, 4)):
        for padding, size in alternatives:
            options = {"stride": stride, "dilation": dilation, "groups": groups, "padding": padding}
            x, kernel = random_case(len(cases), size, kernel_size, groups=groups)
            if 0 not in jax.eval_shape(functools.partial(reference, **options), x, kernel).shape:
                cases.append((x, kernel, options))
                break
    return cases


@pytest.mark.parametrize("groups", [1, 6], ids=["dense", "depthwise"])
@pytest.mark.parametrize("kernel_size", [(1, 1), (3, 3), (5, 5), (7, 7), (2, 5)], ids=str)
def test_equals_lax_conv(kernel_size, groups):
    compare(grid(kernel_size, groups))


@pytest.mark.parametrize("groups", [1, 6], ids=["dense", "depthwise"])
def test_equals_lax_conv_when_taps_read_only_padding(groups):
    # At rates 12 and 18 only the kernel's centre reads a 9x11 map, at rate 10 one row of three.
    cases = [
        (*random_case(0, (9, 11), (3, 3), groups=groups), {"dilation": rate, "groups": groups})
        for rate in (6, 10, 12, 18)
    ]
    # A stride that steps over the image, padding on one side, and a kernel that reads only padding.
    for size, options in [
        ((3, 3), {"dilation": 4, "stride": 3, "padding": "torch"}),
        ((4, 4), {"dilation": 3, "padding": ((6, 0), (0, 6))}),
        ((1, 1), {"dilation": 2, "padding": ((1, 3), (1, 3))}),
    ]:
        cases.append((*random_case(1, size, (3, 3), groups=groups), {**options, "groups": groups}))
    compare(cases)


def test_depthwise_rows_beyond_one_group():
    # The kernel's gradient sums rows in groups: 7, 7, 5, 8 and 6 rows for these heights.
    cases = [
        (*random_case(rows, (rows, 2), (3, 3), groups=6), {"stride": stride, "groups": 6})
        for rows, stride in [(12, 1), (13, 1), (14, 1), (15, 1), (16, 1), (23, 2), (32, 2)]
    ]
    compare(cases)


def test_channel_multiplier():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 7, 6, 4)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(3, 3, 1, 8)), jnp.float32)
    compare([(x, kernel, {"groups": 4, "stride": 2})])


@pytest.mark.parametrize("kernel_size, groups", [((3, 3), 6), ((1, 1), 1), ((3, 3), 1)])
def test_float64_stays_float64(kernel_size, groups):
    with jax.enable_x64(True):
        x, kernel = random_case(0, (9, 8), kernel_size, groups=groups, dtype=np.float64)
        cases = [(x, kernel, {"stride": stride, "groups": groups}) for stride in (1, 2)]
        assert x.dtype == np.float64
        compare(cases, tolerance=1e-14)


@pytest.mark.parametrize("kernel_size, groups", [((5, 5), 64), ((1, 1), 1)])
def test_bfloat16_is_rounded_once(kernel_size, groups):
    x, kernel = random_case(
        0, (13, 12), kernel_size, cin=64, cout=8, groups=groups, dtype=jnp.bfloat16
    )
    results = jax.jit(lambda x, k: value_and_gradients(conv2d, x, k, groups=groups))(x, kernel)
    exact, vjp = jax.vjp(
        lambda x, k: reference(x, k, groups=groups),
        x.astype(jnp.float32),
        kernel.astype(jnp.float32),
    )
    # The gradient of the output is rounded to bfloat16 for conv2d, and therefore also here.
    g = jnp.cos(jnp.arange(exact.size, dtype=jnp.float32)).reshape(exact.shape)
    expected = (exact, *vjp(g.astype(jnp.bfloat16).astype(jnp.float32)))
    for a, b in zip(results, expected, strict=True):
        assert a.dtype == jnp.bfloat16
        # Half a unit in the last of 8 digits, and the rounding of float32 sums in another order.
        error = np.abs(np.asarray(a, np.float32) - b)
        assert (error <= 2.0**-8 * np.abs(b) + 1e-5 * np.abs(b).max()).all()


def test_the_result_has_the_images_dtype_and_a_gradient_its_operands():
    x, kernel = random_case(0, (5, 6), (3, 3), groups=6)
    x = x.astype(jnp.bfloat16)
    y, gx, gk = value_and_gradients(conv2d, x, kernel, groups=6)
    assert (y.dtype, gx.dtype, gk.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)


def test_under_checkpoint_and_scan():
    x, kernel = random_case(0, (6, 7), (3, 3), groups=6)

    def loss(x, kernel, wrap):
        layer = wrap(lambda x: jnp.tanh(conv2d(x, kernel, groups=6)))
        return (lax.scan(lambda x, _: (layer(x), None), x, length=2)[0] ** 2).sum()

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=2)
    plain = gradients(x, kernel, lambda f: f)
    again = gradients(x, kernel, jax.checkpoint)
    for a, b in zip(plain, again, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"groups": 2}, "groups must be 1 or the 6 input channels, not 2"),
        ({"groups": 6}, "takes 36 input channels, the images have 6"),
        ({"padding": "valid"}, "padding must be 'same', 'torch' or .* not 'valid'"),
        ({"padding": ((0, 0), (0, 0)), "dilation": 4}, "does not fit into images of"),
    ],
)
def test_errors_name_bad_arguments(arguments, message):
    x, kernel = random_case(0, (5, 6), (3, 3))
    with pytest.raises(ValueError, match=message):
        conv2d(x, kernel, **arguments)


# ---------------------------------------------------------------- the compiled program


def three_layers(x, depthwise, pointwise, dense):
    x = conv2d(x, depthwise, groups=x.shape[-1])
    x = conv2d(x, pointwise, stride=2)
    return conv2d(x, dense, dilation=2)


def two_layers(x, depthwise, pointwise):
    return conv2d(conv2d(x, depthwise, groups=x.shape[-1], stride=2), pointwise)


def gradients_of(layers):
    return lambda *arrays: jax.grad(
        lambda *arrays: (layers(*arrays) ** 2).sum(), argnums=tuple(range(len(arrays)))
    )(*arrays)


def arrays_for(layers):
    rng = np.random.default_rng(0)
    shapes = [(8, 12, 13, 16), (3, 3, 1, 16), (1, 1, 16, 24), (3, 3, 24, 8)]
    return [
        jnp.asarray(rng.normal(size=shape), jnp.float32)
        for shape in shapes[: 4 if layers is three_layers else 3]
    ]


def operations(text, *names):
    """Counts the calls of HLO operations in a compiled program."""
    return {name: len(re.findall(rf"\b{name}(?:-start)?\(", text)) for name in names}


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "gradients"])
def test_cpu_program_has_no_branch_and_no_convolution(backward):
    f = gradients_of(two_layers) if backward else two_layers
    text = jax.jit(f).lower(*arrays_for(two_layers)).compile().as_text()
    assert operations(text, "conditional", "convolution") == {"conditional": 0, "convolution": 0}
    assert operations(text, "dot")["dot"] == (3 if backward else 1)


@pytest.mark.parametrize("stride", [1, 2])
def test_neighbours_are_not_fused_into_the_kernels_gradient(stride):
    # The compiler could then not unroll and vectorise it: three times slower.
    x, kernel = jnp.ones((2, 32, 32, 16)), jnp.ones((3, 3, 1, 16))

    def loss(x, kernel):
        return jnp.tanh(conv2d(jnp.maximum(2 * x + 1, 0), kernel, groups=16, stride=stride)).sum()

    lowered = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(x, kernel)
    # As users compile it; other tests switch the fusion emitters off to compile faster.
    text = lowered.compile(compiler_options={"xla_cpu_use_fusion_emitters": True}).as_text()
    several_results = r"= \((?:f32\S+, ){2,}.*\breduce\("
    (sums,) = [text for text in text.split("\n\n") if re.search(several_results, text)]
    counts = operations(sums, "multiply", "add", "maximum", "tanh", "select")
    assert counts == {"multiply": 9, "add": 0, "maximum": 0, "tanh": 0, "select": 0}


def test_idle_taps_leave_a_matrix_product():
    x, kernel = jnp.ones((1, 9, 11, 6)), jnp.ones((3, 3, 6, 5))
    text = jax.jit(lambda x, k: conv2d(x, k, dilation=12)).lower(x, kernel).compile().as_text()
    assert operations(text, "convolution", "dot") == {"convolution": 0, "dot": 1}


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "gradients"])
def test_accelerators_get_plain_convolutions(platform, backward):
    f = gradients_of(three_layers) if backward else three_layers
    module = export.export(jax.jit(f), platforms=[platform])(
        *arrays_for(three_layers)
    ).mlir_module()
    # Per layer: one forward, one for the gradient of the input, one for that of the kernel.
    assert module.count("stablehlo.convolution") == (9 if backward else 3)
    for operation in ("dot_general", "slice", "pad "):
        assert f"stablehlo.{operation}" not in module
    assert module.count("stablehlo.reduce(") == 0


def test_one_program_for_cpu_and_tpu():
    arrays = arrays_for(two_layers)
    exported = export.export(jax.jit(gradients_of(two_layers)), platforms=["cpu", "tpu"])(*arrays)
    assert "stablehlo.convolution" in exported.mlir_module()
    assert "stablehlo.dot_general" in exported.mlir_module()
    for a, b in zip(exported.call(*arrays), gradients_of(two_layers)(*arrays), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3)
    text = jax.jit(exported.call).lower(*arrays).compile().as_text()
    assert operations(text, "conditional", "convolution") == {"conditional": 0, "convolution": 0}


def test_a_program_with_symbolic_sizes_equals_the_programs_of_each_size():
    cases = [  # kernel size, groups, options
        (3, 1, {"stride": 2, "padding": "same"}),
        (5, 6, {"stride": 2, "padding": "same"}),
        (3, 6, {"dilation": 4, "padding": "torch"}),
        (1, 1, {"stride": 2, "padding": "torch"}),
    ]
    rng = np.random.default_rng(0)
    kernels = [jnp.asarray(rng.normal(size=(k, k, 6 // g, 6)), jnp.float32) for k, g, _ in cases]

    def all_cases(x):
        return [conv2d(x, k, groups=g, **o) for k, (_, g, o) in zip(kernels, cases, strict=True)]

    shape = export.symbolic_shape("n, h, w, 6")
    exported = export.export(jax.jit(all_cases), platforms=["cpu", "tpu"])(
        jax.ShapeDtypeStruct(shape, jnp.float32)
    )
    for size in ((2, 8, 13), (1, 1, 2)):
        x = rng.normal(size=(*size, 6)).astype(np.float32)
        for a, b in zip(exported.call(x), all_cases(jnp.asarray(x)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- on eight devices


COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "all-to-all",
    "collective-permute",
    "reduce-scatter",
    "collective-broadcast",
)


def test_a_sharded_batch_is_not_moved():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split, replicated = jax.NamedSharding(mesh, jax.P("data")), jax.NamedSharding(mesh, jax.P())
    shardings = [split, replicated, replicated, replicated]
    none = dict.fromkeys(COLLECTIVES, 0)
    # The order of sums over images depends on the number of devices: compare in float64.
    with jax.enable_x64(True):
        arrays = [a.astype(jnp.float64) for a in arrays_for(three_layers)]
        placed = jax.device_put(arrays, shardings)
        for f, out in ((three_layers, split), (gradients_of(three_layers), tuple(shardings))):
            jitted = jax.jit(f, in_shardings=shardings, out_shardings=out)
            compiled = jitted.lower(*arrays).compile()
            counts = operations(compiled.as_text(), *COLLECTIVES)
            # Only the gradients of kernels are summed over devices, with at most one sum for each.
            sums = counts.pop("all-reduce")
            assert sums == 0 if f is three_layers else 1 <= sums <= 3
            assert {"all-reduce": 0, **counts} == none
            alone = jax.jit(f)(*arrays)
            for a, b in zip(
                jax.tree.leaves(compiled(*placed)), jax.tree.leaves(alone), strict=True
            ):
                np.testing.assert_allclose(a, b, rtol=0, atol=1e-13 * np.abs(b).max())
