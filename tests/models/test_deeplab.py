import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import default
from semiseg_jax.models import deeplab
from semiseg_jax.state import copy_weak_to_strong, for_inference
from tests.conftest import tiny_config


def random_images(count, height=33, width=41):
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def tiny():
    model = deeplab.build(tiny_config().model, 5)
    variables = jax.jit(lambda k: model.init(k, random_images(2), domain="both"))(jax.random.key(0))
    rng = np.random.default_rng(1)
    # As after training: the domains differ, and no bias is 0.
    variables = jax.tree.map(
        lambda v: v + rng.uniform(-0.2, 0.2, v.shape).astype(np.float32), variables
    )
    return model, variables


def test_both_is_two_separate_passes(tiny):
    model, variables = tiny
    x = random_images(8)
    mutable = ["batch_stats_weak", "batch_stats_strong"]

    def run(domain, x, **kwargs):
        return jax.jit(
            lambda v, x: model.apply(v, x, domain=domain, train=True, mutable=mutable, **kwargs)
        )(variables, x)

    is_weak = np.tile([True, True, False, False], 2)
    y, changed = run("both", x, groups=2)
    for domain, mask in (("weak", is_weak), ("strong", ~is_weak)):
        y_alone, changed_alone = run(domain, x[mask])
        np.testing.assert_allclose(y[mask], y_alone, atol=1e-5)
        stats = f"batch_stats_{domain}"
        for ours, alone in zip(
            *map(jax.tree.leaves, (changed[stats], changed_alone[stats])), strict=True
        ):
            np.testing.assert_allclose(ours, alone, atol=1e-5)


def test_inference_works_without_the_strong_norm(tiny):
    model, variables = tiny
    thin = for_inference(variables)
    assert "batch_stats_strong" not in thin
    assert not any("strong" in str(path) for path, _ in jax.tree_util.tree_leaves_with_path(thin))
    x = random_images(1)
    apply = jax.jit(lambda v: model.apply(v, x))
    np.testing.assert_array_equal(apply(thin), apply(variables))


def test_a_first_student_answers_alike_in_both_domains(tiny):
    model, variables = tiny
    x = random_images(1)
    run = jax.jit(lambda v, d: model.apply(v, x, domain=d), static_argnums=1)
    assert not np.allclose(run(variables, "weak"), run(variables, "strong"))
    student = copy_weak_to_strong(variables)
    np.testing.assert_array_equal(run(student, "strong"), run(variables, "weak"))


@pytest.mark.parametrize("size", [(32, 40), (33, 41), (17, 50)])
def test_logits_have_the_size_of_the_input(tiny, size):
    model, variables = tiny
    logits = jax.eval_shape(model.apply, variables, random_images(1, *size))
    assert logits.shape == (1, *size, 5)


def test_uint8_is_normalised_and_float_is_not(tiny):
    model, variables = tiny
    x = random_images(1)
    mean, std = (
        np.array(v, np.float32) for v in ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
    )
    apply = jax.jit(model.apply)
    np.testing.assert_allclose(
        apply(variables, x), apply(variables, (jnp.asarray(x, jnp.float32) - mean) / std), atol=1e-5
    )


@pytest.mark.parametrize(("backbone", "stride", "last"), [("resnet18", 16, 8), ("resnet18", 8, 16)])
def test_output_stride(backbone, stride, last):
    config = tiny_config(model__backbone=backbone, model__output_stride=stride)
    model = deeplab.build(config.model, 5)
    shapes = {}

    def watch(next_method, args, kwargs, context):
        result = next_method(*args, **kwargs)
        if context.module.name == "backbone" and isinstance(result, dict):
            shapes.update({k: v.shape for k, v in result.items()})
        return result

    import flax.linen as nn

    with nn.intercept_methods(watch):
        jax.eval_shape(lambda: model.init(jax.random.key(0), random_images(2, 128, 128), "both"))
    assert shapes["low"][1:3] == (32, 32)
    assert shapes["high"][1:3] == (last, last)


def test_resnet18_has_the_published_number_of_parameters():
    """11,689,512 with its classifier of 512 x 1000 + 1000; ours has a second affine per norm."""
    config = tiny_config(model__backbone="resnet18", model__norm="shared")
    model = deeplab.build(config.model, 5)
    made = jax.eval_shape(lambda: model.init(jax.random.key(0), random_images(2), "both"))
    backbone = sum(v.size for v in jax.tree.leaves(made["params"]["backbone"]))
    assert backbone == 11_689_512 - 513_000


def test_bfloat16_compute_keeps_parameters_and_statistics_in_float32():
    model = deeplab.build(tiny_config(model__compute_dtype="bfloat16").model, 5)
    made = jax.eval_shape(lambda: model.init(jax.random.key(0), random_images(2), "both"))
    assert {v.dtype for v in jax.tree.leaves(made)} == {jnp.dtype("float32")}
    assert jax.eval_shape(model.apply, made, random_images(1)).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("stride", "crop", "expected"),
    [
        (16, (769, 769), ()),  # features of 49x49
        (16, (128, 160), (12, 18)),  # 8x10
        (16, (289, 400), ()),  # 19x25, of which rate 18 still meets the first and last rows
        (16, (288, 400), (18,)),
        (8, (145, 200), (12, 18)),  # 19x25, and rates doubled
    ],
)
def test_rates_that_a_crop_cannot_train(stride, crop, expected):
    model = default.get_config().model
    model.output_stride = stride
    assert deeplab.untrained_rates(model, crop) == expected
