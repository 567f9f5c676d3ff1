import functools

import jax
import numpy as np
import pytest

from semiseg_jax import checkpoints, settings
from semiseg_jax.errors import UserError
from semiseg_jax.models import deeplab, pretrained
from semiseg_jax.state import for_inference, variable_shapes
from tests.conftest import tiny_config

ORIGINAL = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
LAYERS = {"stem": ("_conv_stem", "_bn0"), "head": ("_conv_head", "_bn1")}
BLOCK_LAYERS = {
    "expand": ("_expand_conv", "_bn0"),
    "depthwise": ("_depthwise_conv", "_bn1"),
    "project": ("_project_conv", "_bn2"),
}


@functools.cache
def shapes(model):
    return variable_shapes(model)


def drawn(model, seed):
    """Random variables of the right shapes, without compiling an initialiser."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: rng.uniform(0.1, 1, s.shape).astype(s.dtype), shapes(model))


def leaves(variables):
    paths = jax.tree_util.tree_leaves_with_path(variables)
    return {jax.tree_util.keystr(k, simple=True, separator="/"): v for k, v in paths}


def original_name(variable):
    """Name of a backbone's variable in the original file; None for one that has none."""
    if "strong" in variable or "/backbone/" not in variable:
        return None
    _, _, *layer, kind, leaf = variable.replace("/weak", "").split("/")
    if len(layer) == 1:
        conv, norm = LAYERS[layer[0]]
    else:
        conv, norm = (
            f"_blocks.{layer[0].removeprefix('block_')}.{n}" for n in BLOCK_LAYERS[layer[1]]
        )
    return f"{conv}.weight" if kind == "conv" else f"{norm}.{ORIGINAL[leaf]}"


def to_original(variables):
    """The backbone as the original file has it: OIHW, depthwise [c, 1, k, k]."""
    named = {original_name(k): v for k, v in leaves(variables).items()}
    del named[None]
    return {k: v.transpose(3, 2, 0, 1) if v.ndim == 4 else v for k, v in named.items()}


@pytest.fixture(scope="module")
def lite():
    config = tiny_config(model__backbone="efficientnet_lite0")
    return deeplab.build(config.model, 5)


@pytest.fixture(scope="module")
def tiny():
    return deeplab.build(tiny_config().model, 5)


def test_all_of_a_backbone_is_loaded_into_both_norms(lite, tmp_path):
    source, target = drawn(lite, 0), drawn(lite, 1)
    extra = {"_conv_head.weight": np.zeros((1280, 320, 1, 1), np.float32)}
    np.savez(tmp_path / "lite.npz", **to_original(source), **extra)
    loaded, report = pretrained.load(tmp_path / "lite.npz", target)
    expected, before = leaves(source), leaves(target)
    for name, value in leaves(loaded).items():
        if "/backbone/" in name:
            assert name in report.loaded
            weak = name.replace("strong", "weak")
            np.testing.assert_array_equal(value, expected[weak], err_msg=name)
        else:
            assert name in report.unmatched
            np.testing.assert_array_equal(value, before[name], err_msg=name)
    assert report.left == ("_conv_head.weight",)
    assert report.conventions.input_normalization == "lite"
    assert "into backbone" in str(report) and "_conv_head.weight" in str(report)
    assert "in aspp, classifier, decoder1, decoder2, low" in str(report)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "_blocks.3._expand_conv.weight",
            None,
            r"the file lacks backbone/block_3/expand/conv/kernel \[1, 1, 24, 144\]",
        ),
        (
            "_blocks.16._bn1.bias",
            np.zeros(7, np.float32),
            r"the network has no place for _blocks\.16\._bn1\.bias \[7\]",
        ),
        (
            "_bn0.bias",
            np.zeros(16, np.float32),
            r"_bn0\.bias gives float32\[16\] for backbone/stem/norm/bias \[32\]",
        ),
        ("_bn0.bias", np.zeros(32, np.int8), r"_bn0\.bias gives int8\[32\]"),
    ],
)
def test_what_does_not_fit_is_named(lite, tmp_path, name, value, message):
    weights = to_original(drawn(lite, 0)) | {name: value}
    np.savez(tmp_path / "lite.npz", **{k: v for k, v in weights.items() if v is not None})
    with pytest.raises(UserError, match=rf"lite\.npz .* does not fit the network: .*{message}"):
        pretrained.load(tmp_path / "lite.npz", drawn(lite, 1))


def test_weights_of_another_network_are_refused(tiny, lite, tmp_path):
    np.savez(tmp_path / "lite.npz", **to_original(drawn(lite, 0)))
    with pytest.raises(
        UserError, match=r"lacks .* and \d+ more; the network has no place for .*_conv_stem"
    ):
        pretrained.load(tmp_path / "lite.npz", drawn(tiny, 1))


def save(path, variables, **model):
    checkpoints.save_weights(path, for_inference(variables), {"model": model})
    return path


def test_own_weights_predict_as_before(tiny, tmp_path):
    source = drawn(tiny, 0)
    path = save(tmp_path / "weights.safetensors", source, input_normalization="half")
    loaded, report = pretrained.load(path, drawn(tiny, 1))
    assert report.left == report.unmatched == ()
    assert report.conventions == pretrained.inspect(path)
    assert report.conventions.input_normalization == "half"
    images = np.random.default_rng(2).integers(0, 256, (2, 33, 41, 3)).astype(np.uint8)
    run = jax.jit(lambda v, d: tiny.apply(v, images, domain=d), static_argnums=1)
    expected = run(source, "weak")
    np.testing.assert_array_equal(run(loaded, "weak"), expected)
    np.testing.assert_array_equal(run(loaded, "strong"), expected)


def test_a_classifier_of_other_classes_is_left(tiny, tmp_path):
    path = save(tmp_path / "weights.safetensors", drawn(tiny, 0))
    other = drawn(deeplab.build(tiny_config().model, 7), 1)
    loaded, report = pretrained.load(path, other)
    classifier = ("params/classifier/bias", "params/classifier/kernel")
    assert sorted(report.left) == sorted(report.unmatched) == list(classifier)
    np.testing.assert_array_equal(
        loaded["params"]["classifier"]["kernel"], other["params"]["classifier"]["kernel"]
    )


def test_arrays_stay_where_they_were(tiny, tmp_path):
    path = save(tmp_path / "weights.safetensors", drawn(tiny, 0))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    loaded, _ = pretrained.load(path, jax.device_put(drawn(tiny, 1), everywhere))
    assert {leaf.sharding for leaf in jax.tree.leaves(loaded)} == {everywhere}


@pytest.mark.parametrize("name", ["none.npz", "none.safetensors"])
def test_a_missing_file_is_one_sentence(name, tmp_path):
    with pytest.raises(UserError, match=rf"{name} is missing"):
        pretrained.inspect(tmp_path / name)


@pytest.mark.parametrize("name", ["damaged.npz", "damaged.safetensors"])
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 and no more", b"\xff" * 40])
def test_a_damaged_file_is_one_sentence(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name} cannot be read"):
        pretrained.inspect(tmp_path / name)


def test_files_that_would_run_code_are_refused(tmp_path):
    np.savez(tmp_path / "pickled.npz", a=np.array([{}], dtype=object))
    with pytest.raises(UserError, match="allow_pickle=False"):
        pretrained.inspect(tmp_path / "pickled.npz")


def test_unknown_layouts_and_endings_are_one_sentence(tmp_path):
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    with pytest.raises(UserError, match=r"not known \(its names: a\): known are semiseg_jax, eff"):
        pretrained.inspect(tmp_path / "other.npz")
    with pytest.raises(UserError, match=r"weights\.pth is neither \.npz nor \.safetensors"):
        pretrained.inspect(tmp_path / "weights.pth")


def test_input_normalisation_follows_weights_then_backbone(tiny, tmp_path):
    path = save(tmp_path / "weights.safetensors", drawn(tiny, 0), input_normalization="half")
    unsaid = save(tmp_path / "unsaid.safetensors", drawn(tiny, 0))
    for expected, changes in [
        ("imagenet", {}),
        ("lite", {"model__backbone": "efficientnet_lite0"}),
        ("half", {"model__pretrained": str(path)}),
        ("imagenet", {"model__pretrained": str(unsaid)}),
        ("lite", {"model__pretrained": str(path), "model__input_normalization": "lite"}),
    ]:
        config = tiny_config(**changes).model
        mean, std = deeplab.INPUT_NORMALIZATIONS[expected]
        built = deeplab.build(config, 5)
        assert (built.mean, built.std) == (mean, std)
        np.testing.assert_array_equal(deeplab.input_mean(config), np.round(mean))


def test_settings_refuse_weights_that_a_run_could_not_load(tmp_path):
    settings.check(tiny_config())
    with pytest.raises(UserError, match=r"none\.npz is missing"):
        settings.check(tiny_config(model__pretrained=str(tmp_path / "none.npz")))
    student = {"rounds__student_pretrained": str(tmp_path / "none.npz")}
    with pytest.raises(UserError, match=r"rounds\.student_pretrained is given, but"):
        settings.check(tiny_config(**student))
    with pytest.raises(UserError, match=r"none\.npz is missing"):
        settings.check(tiny_config(**student, rounds__student_model="resnet18"))
