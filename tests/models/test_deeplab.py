import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal

from configs import default
from semiseg_jax.models import deeplab, layers
from semiseg_jax.train_state import (
    copy_weak_to_strong,
    inference_variables,
    match_norm_kind,
    variable_shapes,
)
from tests.conftest import tiny_config


def random_images(count, height=33, width=41):
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def tiny():
    model = deeplab.build(tiny_config().model, 5)
    variables = jax.jit(lambda k: model.init(k, random_images(2), domain="both"))(jax.random.key(0))
    rng = np.random.default_rng(1)
    # As in a trained network: the domains differ, and no bias is 0.
    variables = jax.tree.map(
        lambda v: v + rng.uniform(-0.2, 0.2, v.shape).astype(np.float32), variables
    )
    return model, variables


def test_both_domains_equal_two_separate_passes(tiny):
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
        for joint, alone in zip(
            *map(jax.tree.leaves, (changed[stats], changed_alone[stats])), strict=True
        ):
            np.testing.assert_allclose(joint, alone, atol=1e-5)


def test_inference_works_without_the_strong_norm(tiny):
    model, variables = tiny
    weak = inference_variables(variables)
    assert "batch_stats_strong" not in weak
    assert not any("strong" in str(path) for path, _ in jax.tree_util.tree_leaves_with_path(weak))
    x = random_images(1)
    apply = jax.jit(lambda v: model.apply(v, x))
    np.testing.assert_array_equal(apply(weak), apply(variables))


def test_a_first_student_gives_equal_logits_in_both_domains(tiny):
    model, variables = tiny
    x = random_images(1)
    run = jax.jit(lambda v, d: model.apply(v, x, domain=d), static_argnums=1)
    assert not np.allclose(run(variables, "weak"), run(variables, "strong"))
    student = copy_weak_to_strong(variables)
    np.testing.assert_array_equal(run(student, "strong"), run(variables, "weak"))


@pytest.mark.parametrize("kind", ["shared", "frozen", "dsbn_shared_affine", "dsbn"])
def test_weights_convert_to_a_network_with_another_kind_of_norm(tiny, kind):
    model, variables = tiny
    config = tiny_config(model__norm=kind).model
    other = deeplab.build(config, model.num_classes)
    converted = match_norm_kind(variables, variable_shapes(other))
    shapes = jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), variable_shapes(other))
    assert jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), converted) == shapes
    x = random_images(1)
    logits = [
        jax.jit(m.apply)(v, x)
        for m, v in ((model, inference_variables(variables)), (other, converted))
    ]
    np.testing.assert_array_equal(*logits)


@pytest.fixture(scope="module", params=["v3plus", "v2"])
def with_dropout(request):
    """A network whose training is random, for each kind of head."""
    config = tiny_config(model__head=request.param, model__dropout=0.3).model
    model = deeplab.build(config, 5)
    rng = np.random.default_rng(2)
    variables = jax.tree.map(
        lambda leaf: rng.uniform(0.1, 1, leaf.shape).astype(leaf.dtype), variable_shapes(model)
    )
    return model, variables


@pytest.mark.parametrize(
    ("domain", "groups", "train"),
    [
        ("strong", 1, False),
        ("both", 2, True),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("weak", 1, False), ("weak", 1, True), ("strong", 1, True))
        ),
    ],
)
def test_decode_of_encode_is_the_call_to_the_bit(with_dropout, domain, groups, train):
    """Logits, updated statistics and gradients, with the same dropout."""
    model, variables = with_dropout
    statistics = {name: tree for name, tree in variables.items() if name != "params"}
    images = random_images(4)
    options = {"domain": domain, "groups": groups, "train": train}
    options |= {"mutable": list(statistics), "rngs": {"dropout": jax.random.key(3)}}

    def whole(variables):
        logits, updated = model.apply(variables, images, **options)
        return logits, updated

    def in_two_parts(variables):
        features, after_encode = model.apply(variables, images, method="encode", **options)
        variables = variables | after_encode
        return model.apply(variables, features, method="decode", **options)

    def run(logits_of, params):
        def loss(params):
            logits, updated = logits_of({"params": params, **statistics})
            return jnp.sum(jnp.square(logits)), (logits, updated)

        return jax.grad(loss, has_aux=True)(params)

    expected = jax.jit(functools.partial(run, whole))(variables["params"])
    result = jax.jit(functools.partial(run, in_two_parts))(variables["params"])
    jax.tree.map(np.testing.assert_array_equal, result, expected)
    gradients, _ = result
    other = {"weak": "strong", "strong": "weak", "both": "none"}[domain]
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        assert (other in jax.tree_util.keystr(path)) or np.any(gradient), path


def test_features_are_a_pytree_between_encode_and_decode(with_dropout):
    """A caller can change every feature map, and decode another number of images."""
    model, variables = with_dropout
    encode = jax.jit(functools.partial(model.apply, method="encode"))
    decode = jax.jit(functools.partial(model.apply, method="decode"))
    features = encode(variables, random_images(2))
    assert features.size == (33, 41)
    assert features.low.shape[:3] == (2, 9, 11) and features.high.shape[:3] == (2, 3, 3)
    half = jax.tree.map(lambda leaf: leaf / 2, features)
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), features, half)
    logits = decode(variables, both)
    assert logits.shape == (4, 33, 41, 5)
    np.testing.assert_allclose(logits[:2], decode(variables, features), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(logits[2:], decode(variables, half), rtol=1e-5, atol=1e-5)
    assert not np.allclose(logits[:2], logits[2:])


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
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), random_images(2), "both"))
    backbone = sum(v.size for v in jax.tree.leaves(variables["params"]["backbone"]))
    assert backbone == 11_689_512 - 513_000


def test_v2_adds_up_dilated_classifiers():
    """Compares with SciPy's correlation, with zeros between the taps of dilated kernels."""
    config = tiny_config(model__head="v2", model__aspp_rates=(1, 3)).model
    model = deeplab.build(config, 2)
    images = np.zeros((2, 40, 56, 3), np.uint8)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images, "both"))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda s: rng.uniform(-0.5, 1, s.shape).astype(s.dtype), shapes)
    variables |= {k: jax.tree.map(np.abs, v) for k, v in variables.items() if "stats" in k}
    captured = {}

    def watch(next_method, args, kwargs, context):
        result = next_method(*args, **kwargs)
        if context.module.name == "backbone" and isinstance(result, dict):
            captured["features"] = result["high"]
        return result

    def run(variables):
        with nn.intercept_methods(watch):
            logits = model.apply(variables, images + np.arange(56, dtype=np.uint8)[:, None])
        return logits, captured["features"]

    logits, features = (np.asarray(v, np.float64) for v in jax.jit(run)(variables))
    assert np.abs(features).max() > 0
    expected = np.zeros((*features.shape[:3], 2))
    for number, rate in ((1, 1), (2, 3)):
        layer = variables["params"][f"classifier{number}"]
        dilated = np.zeros((2 * rate + 1, 2 * rate + 1, *layer["kernel"].shape[2:]))
        dilated[::rate, ::rate] = layer["kernel"]
        expected += layer["bias"]
        for image, inputs, output in np.ndindex(len(features), *dilated.shape[2:]):
            expected[image, ..., output] += scipy.signal.correlate2d(
                features[image, ..., inputs], dilated[..., inputs, output], mode="same"
            )
    expected = layers.resize(jnp.asarray(expected, jnp.float32), (40, 56))
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


def test_rematerialisation_saves_less_for_the_backward_pass():
    """Compares the sizes of the residuals; test_steps compares the gradients."""
    residual_sizes = {}
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
        residual_sizes[remat] = sum(leaf.size for leaf in jax.tree.leaves(residuals))
    weights = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    assert weights < residual_sizes[True] < 0.6 * residual_sizes[False]


def test_parameter_table():
    config = tiny_config(model__head_features=16, model__multi_grid=(1, 2)).model
    config.backbone = "resnet18"
    variables = variable_shapes(deeplab.build(config, 5))
    rows = {part: (count, note) for part, count, note in deeplab.parameter_table(config, variables)}
    assert next(iter(rows)) == "backbone"
    assert rows["backbone"] == (11_176_512, "resnet18, output stride 16, multi-grid 1, 2")
    assert rows["classifier"] == (16 * 5 + 5, "")
    assert rows["aspp"][1] == "rates 1, 2"
    total = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    assert rows["strong norm"][0] + rows["deployed"][0] == total
    deployed = inference_variables({"params": variables["params"], "batch_stats_weak": {}})
    assert rows["deployed"][0] == sum(leaf.size for leaf in jax.tree.leaves(deployed["params"]))
    assert rows["deployed"][1] == "input imagenet, half-pixel centres, float32"


def test_variables_are_float32_with_bfloat16_compute():
    model = deeplab.build(tiny_config(model__compute_dtype="bfloat16").model, 5)
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), random_images(2), "both"))
    assert {v.dtype for v in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    assert jax.eval_shape(model.apply, variables, random_images(1)).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("stride", "crop", "expected"),
    [
        (16, (769, 769), ()),  # features of 49x49
        (16, (128, 160), (12, 18)),  # 8x10
        (16, (289, 400), ()),  # 19x25, whose first and last rows rate 18 still reads
        (16, (288, 400), (18,)),
        (8, (145, 200), (24, 36)),  # 19x25, with doubled rates
    ],
)
def test_rates_with_taps_that_a_crop_cannot_train(stride, crop, expected):
    model = default.get_config().model
    model.output_stride = stride
    assert deeplab.dead_aspp_rates(model, crop) == expected


@pytest.mark.parametrize("stride", [8, 16, 32])
def test_features_tell_their_stride(stride):
    changes = {"model__backbone": "resnet10_slim", "model__output_stride": stride}
    model = deeplab.build(tiny_config(**changes).model, 3)
    images = jnp.zeros((1, 64, 96, 3), jnp.uint8)
    features, _ = jax.eval_shape(
        lambda: model.init_with_output(jax.random.key(0), images, method="encode")
    )
    assert features.high.shape[1:3] == (64 // stride, 96 // stride)
    assert features.stride == stride
