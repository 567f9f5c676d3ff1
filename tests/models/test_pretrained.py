import functools
import json
import re

import jax
import numpy as np
import pytest
import tensorflow as tf

from semiseg_jax import checkpoints, config_check
from semiseg_jax.models import deeplab, pretrained
from semiseg_jax.train_state import inference_variables, variable_shapes
from tests.conftest import tiny_config
from tests.errors import raises_code
from tests.models.torch_writer import state_file, stream_file, zip_file

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


def random_variables(model, seed):
    """Draws variables by their shapes, without compiling an initialiser."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: rng.uniform(0.1, 1, s.shape).astype(s.dtype), shapes(model))


def leaves(variables):
    paths = jax.tree_util.tree_leaves_with_path(variables)
    return {jax.tree_util.keystr(k, simple=True, separator="/"): v for k, v in paths}


def original_name(variable):
    """Returns a variable's name in the original file of the backbone; None if it has none."""
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
    """Returns the backbone's variables in the original layout: OIHW, depthwise [c, 1, k, k]."""
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


def test_a_backbone_is_loaded_into_both_norms(lite, tmp_path):
    source, target = random_variables(lite, 0), random_variables(lite, 1)
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
            assert name in report.initial
            np.testing.assert_array_equal(value, before[name], err_msg=name)
    assert report.unused == ("_conv_head.weight",)
    assert report.conventions.input_normalization == "lite"
    assert "into backbone" in str(report) and "_conv_head.weight" in str(report)
    initial = f"newly initialised  {len(report.initial)} tensors in aspp, classifier, decoder1, "
    assert f"{initial}decoder2, low" in str(report)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "_blocks.3._expand_conv.weight",
            None,
            "lacks backbone/block_3/expand/conv/kernel [1, 1, 24, 144]",
        ),
        (
            "_blocks.16._bn1.bias",
            np.zeros(7, np.float32),
            "no place for _blocks.16._bn1.bias [7]",
        ),
        (
            "_bn0.bias",
            np.zeros(16, np.float32),
            "_bn0.bias gives float32[16] for backbone/stem/norm/bias [32]",
        ),
        ("_bn0.bias", np.zeros(32, np.int8), "_bn0.bias gives int8[32]"),
    ],
)
def test_the_error_names_tensors_that_do_not_fit(lite, tmp_path, name, value, message):
    weights = to_original(random_variables(lite, 0)) | {name: value}
    np.savez(tmp_path / "lite.npz", **{k: v for k, v in weights.items() if v is not None})
    with raises_code("weights-do-not-fit", "lite.npz", message):
        pretrained.load(tmp_path / "lite.npz", random_variables(lite, 1))


def test_weights_of_another_network_are_an_error(tiny, lite, tmp_path):
    np.savez(tmp_path / "lite.npz", **to_original(random_variables(lite, 0)))
    with raises_code("weights-do-not-fit", "lacks", "more;", "no place for", "_conv_stem"):
        pretrained.load(tmp_path / "lite.npz", random_variables(tiny, 1))


def save(path, variables, **model):
    checkpoints.save_weights(path, inference_variables(variables), {"model": model})
    return path


def test_own_weights_give_the_same_logits(tiny, tmp_path):
    source = random_variables(tiny, 0)
    path = save(tmp_path / "weights.safetensors", source, input_normalization="half")
    loaded, report = pretrained.load(path, random_variables(tiny, 1))
    assert report.unused == report.initial == ()
    assert report.conventions == pretrained.inspect(path)
    assert report.conventions.input_normalization == "half"
    images = np.random.default_rng(2).integers(0, 256, (2, 33, 41, 3)).astype(np.uint8)
    run = jax.jit(lambda v, d: tiny.apply(v, images, domain=d), static_argnums=1)
    expected = run(source, "weak")
    np.testing.assert_array_equal(run(loaded, "weak"), expected)
    np.testing.assert_array_equal(run(loaded, "strong"), expected)


def test_a_classifier_of_other_classes_is_not_loaded(tiny, tmp_path):
    path = save(tmp_path / "weights.safetensors", random_variables(tiny, 0))
    other = random_variables(deeplab.build(tiny_config().model, 7), 1)
    loaded, report = pretrained.load(path, other)
    classifier = ("params/classifier/bias", "params/classifier/kernel")
    assert sorted(report.unused) == sorted(report.initial) == list(classifier)
    np.testing.assert_array_equal(
        loaded["params"]["classifier"]["kernel"], other["params"]["classifier"]["kernel"]
    )


def test_loaded_arrays_have_the_previous_sharding(tiny, tmp_path):
    path = save(tmp_path / "weights.safetensors", random_variables(tiny, 0))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    loaded, _ = pretrained.load(path, jax.device_put(random_variables(tiny, 1), replicated))
    assert {leaf.sharding for leaf in jax.tree.leaves(loaded)} == {replicated}


@pytest.mark.parametrize("name", ["none.npz", "none.safetensors"])
def test_a_missing_file_is_a_user_error(name, tmp_path):
    with raises_code("weights-missing", name):
        pretrained.inspect(tmp_path / name)


@pytest.mark.parametrize("name", ["damaged.npz", "damaged.safetensors"])
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 and no more", b"\xff" * 40])
def test_a_damaged_file_is_a_user_error(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with raises_code("weights-damaged", name):
        pretrained.inspect(tmp_path / name)


def test_pickled_arrays_are_an_error(tmp_path):
    np.savez(tmp_path / "pickled.npz", a=np.array([{}], dtype=object))
    with raises_code("weights-damaged", "allow_pickle=False"):
        pretrained.inspect(tmp_path / "pickled.npz")


def test_unknown_layouts_and_suffixes_are_user_errors(tmp_path):
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    with raises_code("weights-layout-unknown", "its names: a", "semiseg_jax, eff"):
        pretrained.inspect(tmp_path / "other.npz")
    with raises_code("weights-format-unknown", "weights.h5"):
        pretrained.inspect(tmp_path / "weights.h5")


@pytest.mark.parametrize("write", [zip_file, stream_file])
def test_both_formats_of_pytorch_are_loaded(lite, tmp_path, write):
    source = to_original(random_variables(lite, 0))
    (tmp_path / "lite.pth").write_bytes(state_file(source, write))
    np.savez(tmp_path / "lite.npz", **source)
    assert pretrained.inspect(tmp_path / "lite.pth").backbone == "efficientnet_lite0"
    target = random_variables(lite, 1)
    loaded, report = pretrained.load(tmp_path / "lite.pth", target)
    expected, expected_report = pretrained.load(tmp_path / "lite.npz", target)
    jax.tree.map(np.testing.assert_array_equal, loaded, expected)
    assert report == expected_report


def test_safetensors_of_a_type_that_numpy_lacks_are_a_user_error(tmp_path):
    entry = {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}
    header = json.dumps({"conv1.weight": entry}).encode()
    content = len(header).to_bytes(8, "little") + header + bytes(4)
    (tmp_path / "weights.safetensors").write_bytes(content)
    with raises_code("weights-dtype-unsupported", "weights.safetensors", "BF16"):
        pretrained.inspect(tmp_path / "weights.safetensors")


SLIM_LEAVES = {
    "scale": "BatchNorm/gamma",
    "bias": "BatchNorm/beta",
    "mean": "BatchNorm/moving_mean",
    "var": "BatchNorm/moving_variance",
}
SLIM_LAYERS = {
    "backbone/stem1": "xception_65/entry_flow/conv1_1",
    "backbone/stem2": "xception_65/entry_flow/conv1_2",
    "aspp/point": "aspp0",
    "aspp/image_pooling": "image_pooling",
    "aspp/project": "concat_projection",
    "low": "decoder/feature_projection0",
}


def slim_name(variable):
    """Returns a variable's name in TensorFlow's DeepLab; None for the strong norm."""
    if "strong" in variable:
        return None
    _, *layer, kind, leaf = variable.replace("/weak", "").split("/")
    layer = "/".join(layer)
    if (layer, kind) == ("", "classifier"):
        return f"logits/semantic/{'weights' if leaf == 'kernel' else 'biases'}"
    leaf = SLIM_LEAVES.get(leaf, "depthwise_weights" if "depthwise" in layer else "weights")
    if layer in SLIM_LAYERS:
        return f"{SLIM_LAYERS[layer]}/{leaf}"
    if match := re.fullmatch(r"(?:aspp/atrous(\d)|decoder(\d))/(\w+)", layer):
        atrous, decoder, kind = match.groups()
        if atrous:
            return f"aspp{atrous}_{kind}/{leaf}"
        return f"decoder/decoder_conv{int(decoder) - 1}_{kind}/{leaf}"
    flow, block, module = re.fullmatch(r"backbone/(\w+?)_block(\d+)/(.+)", layer).groups()
    unit = f"block1/unit_{block}" if flow == "middle" else f"block{block}/unit_1"
    module = re.sub(r"separable(\d)/", r"separable_conv\1_", module)
    return f"xception_65/{flow}_flow/{unit}/xception_module/{module}/{leaf}"


def save_tensorflow(prefix, tensors):
    names = sorted(tensors)
    tf.raw_ops.SaveV2(
        prefix=str(prefix),
        tensor_names=names,
        shape_and_slices=[""] * len(names),
        tensors=[tf.constant(tensors[name]) for name in names],
    )


@pytest.fixture(scope="module")
def xception():
    config = tiny_config(model__backbone="xception65", model__aspp_rates=(6, 12, 18))
    return deeplab.build(config.model, 5)


def test_a_checkpoint_of_tensorflows_deeplab_is_loaded_with_its_head(xception, tmp_path):
    source = random_variables(xception, 0)
    tensors = {slim_name(k): v for k, v in leaves(source).items()}
    del tensors[None]
    for name in tensors:
        if "depthwise_weights" in name:
            tensors[name] = tensors[name].transpose(0, 1, 3, 2)
    # The pooled features come first in that layout; this head has 8 channels.
    tensors["concat_projection/weights"] = np.roll(tensors["concat_projection/weights"], 8, 2)
    extra = {"global_step": np.int64(3), "aspp0/weights/Momentum": np.zeros(3, np.float32)}
    save_tensorflow(tmp_path / "model.ckpt", tensors | extra)
    loaded, report = pretrained.load(tmp_path / "model.ckpt", random_variables(xception, 1))
    assert report.unused == report.initial == ()
    expected = leaves(source)
    for name, value in leaves(loaded).items():
        np.testing.assert_array_equal(value, expected[name.replace("strong", "weak")], err_msg=name)
    assert report.conventions == pretrained.inspect(tmp_path / "model.ckpt.index")
    assert (report.conventions.align_corners, report.conventions.head) == (True, "v3plus")


def test_names_of_tensorflows_deeplab():
    """A sample of the names in the public release, by hand."""
    names = {
        "params/backbone/entry_block2/separable3/pointwise/norm/weak/scale": (
            "xception_65/entry_flow/block2/unit_1/xception_module/"
            "separable_conv3_pointwise/BatchNorm/gamma"
        ),
        "params/backbone/middle_block16/separable1/depthwise/conv/kernel": (
            "xception_65/middle_flow/block1/unit_16/xception_module/"
            "separable_conv1_depthwise/depthwise_weights"
        ),
        "params/backbone/exit_block1/shortcut/conv/kernel": (
            "xception_65/exit_flow/block1/unit_1/xception_module/shortcut/weights"
        ),
        "batch_stats_weak/aspp/atrous2/depthwise/norm/var": (
            "aspp2_depthwise/BatchNorm/moving_variance"
        ),
        "params/decoder2/pointwise/conv/kernel": "decoder/decoder_conv1_pointwise/weights",
    }
    assert {k: slim_name(k) for k in names} == names


def test_the_classifier_of_a_tensorflow_backbone_is_not_loaded(xception, tmp_path):
    tensors = {
        slim_name(k): v
        for k, v in leaves(random_variables(xception, 0)).items()
        if "/backbone/" in k
    }
    del tensors[None]
    tensors = {
        k: v.transpose(0, 1, 3, 2) if "depthwise_weights" in k else v for k, v in tensors.items()
    }
    classifier = {"xception_65/logits/weights": np.zeros((1, 1, 2048, 3), np.float32)}
    save_tensorflow(tmp_path / "model.ckpt", tensors | classifier)
    _, report = pretrained.load(tmp_path / "model.ckpt", random_variables(xception, 1))
    assert report.unused == tuple(classifier)
    assert {name.split("/")[1] for name in report.loaded} == {"backbone"}
    assert report.conventions.align_corners is None


def test_a_damaged_tensorflow_checkpoint_is_a_user_error(tmp_path):
    (tmp_path / "model.ckpt.index").write_bytes(b"no table")
    with raises_code("weights-damaged", "model.ckpt"):
        pretrained.inspect(tmp_path / "model.ckpt")


def test_open_keys_are_resolved_by_weights_then_by_backbone(tiny, tmp_path):
    path = save(
        tmp_path / "weights.safetensors", random_variables(tiny, 0), input_normalization="half"
    )
    undescribed = save(tmp_path / "undescribed.safetensors", random_variables(tiny, 0))
    for expected, changes in [
        ("imagenet", {}),
        ("lite", {"model__backbone": "efficientnet_lite0"}),
        ("half", {"model__backbone": "xception65"}),
        ("half", {"model__pretrained": str(path)}),
        ("imagenet", {"model__pretrained": str(undescribed)}),
        ("lite", {"model__pretrained": str(path), "model__input_normalization": "lite"}),
    ]:
        config = tiny_config(**changes).model
        mean, std = deeplab.INPUT_NORMALIZATIONS[expected]
        model = deeplab.build(config, 5)
        assert (model.mean, model.std) == (mean, std)
        np.testing.assert_array_equal(deeplab.input_mean(config), np.round(mean))


def test_a_network_for_smps_weights_has_smps_conventions_or_a_warning(tmp_path):
    names = ("encoder.layer4.0.conv1.weight", "decoder.aspp.0.convs.0.0.weight")
    np.savez(tmp_path / "smp.npz", **dict.fromkeys(names, np.zeros(3)))
    changes = {
        "model__pretrained": str(tmp_path / "smp.npz"),
        "model__backbone": "resnet18",
        "model__head": "v3plus_smp",
        "model__aspp_rates": (),
    }
    config = tiny_config(**changes).model
    resolved = deeplab.resolve(config)
    assert (resolved.align_corners, resolved.first_dilation) == (True, "stage")
    assert resolved.norm_epsilon.to_dict() == {"backbone": 1e-5, "head": 1e-5}
    assert resolved.aspp_rates == (12, 24, 36)
    assert deeplab.pretrained_mismatches(config) == []
    config = tiny_config(**changes, model__align_corners=False, model__first_dilation="previous")
    sentences = " ".join(deeplab.pretrained_mismatches(config.model))
    assert "model.align_corners is False, where the weights were trained with True" in sentences
    assert (
        "model.first_dilation is previous, where the weights were trained with stage" in sentences
    )
    # The resolved config does not depend on the file: a run's model.json contains it.
    (tmp_path / "smp.npz").unlink()
    assert deeplab.build(resolved, 5).align_corners


def test_the_error_names_the_backbone_of_the_weights(tiny, tmp_path):
    shapes = {"conv1.0.weight": (64, 3, 3, 3), "conv1.6.weight": (128, 64, 3, 3)}
    shapes |= {f"layer3.{i}.conv1.weight": (256, 1024, 1, 1) for i in range(23)}
    shapes |= {"layer1.0.conv3.weight": (256, 64, 1, 1), "layer4.0.conv1.weight": (512, 1024, 1, 1)}
    np.savez(tmp_path / "w.npz", **{k: np.zeros(v, np.float32) for k, v in shapes.items()})
    with raises_code("weights-do-not-fit", "layout resnet_deep_stem", "model.backbone=resnet101s"):
        pretrained.load(tmp_path / "w.npz", random_variables(tiny, 1))


def test_the_config_check_rejects_weights_that_a_run_cannot_load(tmp_path):
    config_check.check(tiny_config())
    with raises_code("weights-missing", "none.npz"):
        config_check.check(tiny_config(model__pretrained=str(tmp_path / "none.npz")))
    student = {"rounds__student_pretrained": str(tmp_path / "none.npz")}
    with raises_code("student-pretrained-unused"):
        config_check.check(tiny_config(**student))
    with raises_code("weights-missing", "none.npz"):
        config_check.check(tiny_config(**student, rounds__student_model="resnet18"))


def test_the_config_check_rejects_weights_of_another_backbone_or_head(tmp_path):
    names = ("encoder.layer4.0.conv1.weight", "decoder.aspp.0.convs.0.0.weight")
    blocks = (f"encoder.layer3.{i}.conv1.weight" for i in range(2))
    path = tmp_path / "smp.npz"
    np.savez(path, **dict.fromkeys((*names, *blocks), np.zeros(3)))
    changes = {"model__pretrained": str(path), "model__head": "v3plus_smp"}
    config_check.check(tiny_config(**changes, model__backbone="resnet18"))
    with raises_code("pretrained-of-another-model", "of resnet18", "model.backbone is resnet50"):
        config_check.check(tiny_config(**changes, model__backbone="resnet50"))
    changes["model__head"] = "v2"
    with raises_code("pretrained-of-another-model", "of v3plus_smp", "model.head is v2"):
        config_check.check(tiny_config(**changes, model__backbone="resnet18"))
