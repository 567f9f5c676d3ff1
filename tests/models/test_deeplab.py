import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal

from configs import default
from semiseg_jax.models import deeplab, layers
from semiseg_jax.state import copy_weak_to_strong, for_inference, variable_shapes, with_norms_of
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


@pytest.mark.parametrize("kind", ["shared", "frozen", "dsbn_shared_affine", "dsbn"])
def test_a_teachers_weights_go_over_to_a_network_with_another_kind_of_norm(tiny, kind):
    model, variables = tiny
    config = tiny_config(model__norm=kind).model
    other = deeplab.build(config, model.num_classes)
    taken = with_norms_of(variables, variable_shapes(other))
    shapes = jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), variable_shapes(other))
    assert jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), taken) == shapes
    x = random_images(1)
    answers = [
        jax.jit(m.apply)(v, x) for m, v in ((model, for_inference(variables)), (other, taken))
    ]
    np.testing.assert_array_equal(*answers)


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


def test_v2_is_the_sum_of_dilated_classifiers():
    """Against SciPy's correlation with kernels whose dilation is written out as zeros."""
    config = tiny_config(model__head="v2", model__aspp_rates=(1, 3)).model
    model = deeplab.build(config, 2)
    images = np.zeros((2, 40, 56, 3), np.uint8)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images, "both"))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda s: rng.uniform(-0.5, 1, s.shape).astype(s.dtype), shapes)
    variables |= {k: jax.tree.map(np.abs, v) for k, v in variables.items() if "stats" in k}
    found = {}

    def watch(next_method, args, kwargs, context):
        result = next_method(*args, **kwargs)
        if context.module.name == "backbone" and isinstance(result, dict):
            found["features"] = result["high"]
        return result

    def run(variables):
        with nn.intercept_methods(watch):
            logits = model.apply(variables, images + np.arange(56, dtype=np.uint8)[:, None])
        return logits, found["features"]

    logits, features = (np.asarray(v, np.float64) for v in jax.jit(run)(variables))
    assert np.abs(features).max() > 0
    expected = np.zeros((*features.shape[:3], 2))
    for number, rate in ((1, 1), (2, 3)):
        layer = variables["params"][f"classifier{number}"]
        wide = np.zeros((2 * rate + 1, 2 * rate + 1, *layer["kernel"].shape[2:]))
        wide[::rate, ::rate] = layer["kernel"]
        expected += layer["bias"]
        for image, inputs, output in np.ndindex(len(features), *wide.shape[2:]):
            expected[image, ..., output] += scipy.signal.correlate2d(
                features[image, ..., inputs], wide[..., inputs, output], mode="same"
            )
    expected = layers.resize(jnp.asarray(expected, jnp.float32), (40, 56))
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


def test_rematerialisation_keeps_less_for_the_backward_pass():
    """What is kept is what the backward pass closes over; test_steps compares the values."""
    kept = {}
    for remat in (False, True):
        model = deeplab.build(tiny_config(model__remat=remat).model, 5)
        variables = variable_shapes(model)
        statistics = {k: v for k, v in variables.items() if k != "params"}

        def pull_back(params, statistics, model=model):
            _, pull, _ = jax.vjp(
                lambda params: model.apply(
                    {"params": params, **statistics},
                    random_images(4),
                    domain="both",
                    train=True,
                    mutable=list(statistics),
                ),
                params,
                has_aux=True,
            )
            return pull

        residuals = jax.eval_shape(pull_back, variables["params"], statistics)
        kept[remat] = sum(leaf.size for leaf in jax.tree.leaves(residuals))
    weights = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    assert weights < kept[True] < 0.6 * kept[False]


def test_table_of_parts():
    config = tiny_config(model__head_features=16, model__multi_grid=(1, 2)).model
    config.backbone = "resnet18"
    variables = variable_shapes(deeplab.build(config, 5))
    rows = {part: (count, note) for part, count, note in deeplab.parts(config, variables)}
    assert next(iter(rows)) == "backbone"
    assert rows["backbone"] == (11_176_512, "resnet18, output stride 16, multi-grid 1, 2")
    assert rows["classifier"] == (16 * 5 + 5, "")
    assert rows["aspp"][1] == "rates 1, 2"
    total = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    assert rows["strong norm"][0] + rows["deployed"][0] == total
    thin = for_inference({"params": variables["params"], "batch_stats_weak": {}})
    assert rows["deployed"][0] == sum(leaf.size for leaf in jax.tree.leaves(thin["params"]))
    assert rows["deployed"][1] == "input imagenet, half-pixel centres, float32"


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
        (8, (145, 200), (24, 36)),  # 19x25, and rates doubled
    ],
)
def test_rates_that_a_crop_cannot_train(stride, crop, expected):
    model = default.get_config().model
    model.output_stride = stride
    assert deeplab.untrained_rates(model, crop) == expected
