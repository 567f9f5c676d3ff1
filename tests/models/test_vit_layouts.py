"""The layouts in which people have vision transformers, one network in all of them."""

import functools
import re

import jax
import numpy as np
import pytest
import safetensors.numpy

from semiseg_jax import config_check
from semiseg_jax.models import deeplab, pretrained, weight_files
from tests.conftest import tiny_config
from tests.errors import raises_code
from tests.models import reference_weights, torch_writer
from tests.models.test_pretrained import leaves
from tests.models.test_vit import build, reference_state, zeros

BLOCK = {
    "norm1": "norm1",
    "attn.proj": "attention.output.dense",
    "ls1.gamma": "layer_scale1.lambda1",
    "norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "ls2.gamma": "layer_scale2.lambda1",
}
OUTSIDE = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
}


@functools.cache
def tiny_zeros():
    """Variables of the tiny network; no test changes them."""
    return zeros(build("tiny_dinov2"))


def original(state):
    """timm's DINOv2 in the original layout: with the token for masked patches."""
    return state | {"mask_token": np.ones((1, 32), np.float32)}


def transformers(state):
    """The original DINOv2 in the layout of transformers."""
    result = {"embeddings.mask_token": np.ones((1, 32), np.float32)}
    for name, tensor in state.items():
        if name in OUTSIDE:
            result[OUTSIDE[name]] = tensor
            continue
        number, inner = re.fullmatch(r"blocks\.(\d+)\.(.+)", name).groups()
        prefix = f"encoder.layer.{number}."
        if inner.startswith("attn.qkv."):
            for i, part in enumerate(("query", "key", "value")):
                leaf = inner.removeprefix("attn.qkv.")
                result[f"{prefix}attention.attention.{part}.{leaf}"] = np.split(tensor, 3)[i]
            continue
        ((old, new),) = [(old, new) for old, new in BLOCK.items() if inner.startswith(old)]
        result[prefix + inner.replace(old, new)] = tensor
    return result


def original_dinov3(state):
    """timm's DINOv3 in the original layout: with biases, of which the keys' are masked."""
    names = {"reg_token": "storage_tokens"}
    result = {"mask_token": np.ones((1, 32), np.float32)}
    result["rope_embed.periods"] = np.ones(4, np.float32)
    for name, tensor in state.items():
        new = re.sub(r"gamma_(\d)$", r"ls\1.gamma", names.get(name, name))
        result[new] = tensor
        if new.endswith("attn.qkv.weight"):
            bias = np.zeros(96, np.float32)
            bias[32:64] = 7
            result[new.replace("weight", "bias")] = bias
            result[new.replace("weight", "bias_mask")] = np.full(96, np.nan, np.float32)
    return result


def transformers_dinov3(state):
    """timm's DINOv3 in the layout of transformers: queries, keys and values apart."""
    result = {"embeddings.mask_token": np.ones((1, 1, 32), np.float32)}
    patterns = (
        (r"^cls_token$", "embeddings.cls_token"),
        (r"^reg_token$", "embeddings.register_tokens"),
        (r"^patch_embed\.proj\.", "embeddings.patch_embeddings."),
        (r"^blocks\.", "layer."),
        (r"gamma_(\d)$", r"layer_scale\1.lambda1"),
        (r"attn\.proj", "attention.o_proj"),
        (r"mlp\.fc1", "mlp.up_proj"),
        (r"mlp\.fc2", "mlp.down_proj"),
    )
    for name, tensor in state.items():
        for pattern, replacement in patterns:
            name = re.sub(pattern, replacement, name)
        if "attn.qkv" not in name:
            result[name] = tensor
            continue
        prefix = name.replace("attn.qkv.weight", "attention")
        for i, part in enumerate("qkv"):
            result[f"{prefix}.{part}_proj.weight"] = np.split(tensor, 3)[i]
        for part in "qv":
            result[f"{prefix}.{part}_proj.bias"] = np.zeros(32, np.float32)
    return result


def test_every_layout_of_dinov3_gives_the_same_bits(tmp_path):
    """NaN in the bias mask and the fixed key bias are ignored."""
    state = reference_state("timm_tiny_dinov3")
    before = zeros(build("tiny_dinov3"))
    loaded = {}
    for layout in (dict, original_dinov3, transformers_dinov3):
        path = write(tmp_path / f"{layout.__name__}.safetensors", layout(state))
        variables, report = pretrained.load(path, before)
        loaded[layout.__name__] = leaves(variables)
        assert len(report.loaded) == len([n for n in leaves(before) if "/backbone/" in n])
        assert pretrained.inspect(path).settings()["norm_epsilon.backbone"] == 1e-5
        assert "DINOv3 License" in str(report)
    for name, variables in loaded.items():
        for key, value in variables.items():
            np.testing.assert_array_equal(value, loaded["dict"][key], err_msg=f"{name} {key}")
    tokens = loaded["dict"]["params/backbone/storage_tokens"]
    np.testing.assert_array_equal(tokens, state["reg_token"])


@pytest.mark.parametrize(
    ("name", "normalization"),
    [
        ("dinov3_vitl16_pretrain_sat493m-eadcf0ff.pth", "dinov3_satellite"),
        ("models--facebook--dinov3-vitl16-pretrain-SAT493M/main/model.pth", "dinov3_satellite"),
        ("dinov3_vitl16_pretrain_lvd1689m-8aa4cbdd.pth", "imagenet"),
        ("beside-sat493m/dinov3_vitl16_pretrain_lvd1689m-8aa4cbdd.pth", "imagenet"),
    ],
)
def test_mean_and_deviation_of_satellite_weights_follow_their_name(tmp_path, name, normalization):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, original_dinov3(reference_state("timm_tiny_dinov3")))
    config = tiny_config(model__backbone="tiny_dinov3", model__head="dpt")
    config.model.pretrained = str(path)
    assert deeplab.resolve(config.model).input_normalization == normalization
    assert not deeplab.pretrained_mismatches(config.model)
    config.model.input_normalization = "half"
    assert len(deeplab.pretrained_mismatches(config.model)) == 1


def test_satellite_weights_of_dinov2_do_not_exist(tmp_path):
    path = write(tmp_path / "sat493m.pth", reference_state("timm_tiny_dinov2"))
    assert pretrained.inspect(path).input_normalization == "imagenet"


def write(path, state):
    state = {name: np.ascontiguousarray(tensor) for name, tensor in state.items()}
    if path.suffix == ".pth":
        path.write_bytes(torch_writer.state_file(state))
    else:
        safetensors.numpy.save_file(state, path)
    return path


def test_every_layout_and_format_gives_the_same_bits(tmp_path):
    """Each backbone tensor equals the file's, and the report counts them."""
    state = reference_state("timm_tiny_dinov2")
    rng = np.random.default_rng(1)
    before = jax.tree.map(lambda z: rng.uniform(0.1, 1, z.shape).astype(z.dtype), tiny_zeros())
    loaded = {}
    for layout in (dict, original, transformers):
        for suffix in (".safetensors", ".pth"):
            path = write(tmp_path / f"{layout.__name__}{suffix}", layout(state))
            variables, report = pretrained.load(path, before)
            loaded[path.name] = leaves(variables)
            assert set(report.unused) <= {"mask_token", "embeddings.mask_token"}
            assert len(report.loaded) == len([n for n in leaves(before) if "/backbone/" in n])
            assert f"{len(report.loaded)} tensors into backbone" in str(report)
    first = loaded["dict.safetensors"]
    for name, variables in loaded.items():
        for key, value in variables.items():
            np.testing.assert_array_equal(value, first[key], err_msg=f"{name} {key}")
    kernel = first["params/backbone/block_1/attention/key/kernel"]
    np.testing.assert_array_equal(kernel, state["blocks.1.attn.qkv.weight"][32:64].T)
    np.testing.assert_array_equal(first["params/backbone/pos_embed"], state["pos_embed"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"patch_embed.proj.weight": (32, 3, 16, 16)}, "width 32, depth 4, patch 16"),
        ({"patch_embed.proj.weight": (48, 3, 14, 14)}, "width 48"),
        ({"blocks.4.norm1.weight": (32,)}, "depth 5"),
        ({"register_tokens": (1, 4, 32)}, "4 registers"),
        ({"reg_token": (1, 4, 32)}, "4 registers"),
        ({"pos_embed": (1, 257, 32)}, "positions 16x16"),
        ({"blocks.0.mlp.w3.weight": (32, 64)}, "gated MLP"),
    ],
)
def test_another_network_is_refused_by_name(change, words, tmp_path):
    state = reference_state("timm_tiny_dinov2")
    state |= {name: np.zeros(shape, np.float32) for name, shape in change.items()}
    path = write(tmp_path / "other.safetensors", state)
    with raises_code("weights-network-unsupported", "other.safetensors", words, "dinov2_vits14"):
        pretrained.load(path, tiny_zeros())


def test_a_supported_network_of_another_size_is_refused_before_the_run(tmp_path):
    path = write(tmp_path / "tiny.safetensors", reference_state("timm_tiny_dinov2"))
    config = tiny_config(
        model__backbone="dinov2_vits14", model__head="dpt", model__pretrained=str(path)
    )
    with raises_code("pretrained-of-another-model", "tiny_dinov2", "model.backbone"):
        config_check.check(config)


def test_a_file_whose_names_all_miss_is_an_error(tmp_path):
    state = {f"student.{k}": v for k, v in reference_state("timm_tiny_dinov2").items()}
    with raises_code("weights-layout-unknown", "student.blocks.0.attn.proj.bias"):
        pretrained.inspect(write(tmp_path / "student.safetensors", state))


def test_a_missing_tensor_is_named(tmp_path):
    state = reference_state("timm_tiny_dinov2")
    del state["blocks.2.attn.qkv.bias"]
    path = write(tmp_path / "part.safetensors", state)
    with raises_code("weights-do-not-fit", "backbone/block_2/attention/query/bias [32]"):
        pretrained.load(path, tiny_zeros())


def checkpoint(*states):
    """A checkpoint of UniMatch V2: `model` and `model_ema`, optimiser, and scores of NumPy."""
    writer, buffers, entries = torch_writer, {}, {}
    for entry, state in zip(("model", "model_ema"), states, strict=True):
        items = {}
        for name, tensor in state.items():
            key = str(len(buffers))
            strides = tuple(s // 4 for s in tensor.strides)
            storage = writer.storage_ops(key, tensor.size)
            items[f"module.{name}"] = writer.tensor_ops(storage, tensor.shape, strides)
            buffers[key] = tensor.tobytes()
        entries[entry] = writer.state_pickle(items)[2:-1]
    entries["optimizer"] = writer.ops({"state": {}, "param_groups": [{"lr": 5e-6}]})
    text = writer.call_ops("_codecs encode", writer.ops("\x00\x00\x00\x00\x00\x40\x55@"))
    dtype = writer.call_ops("numpy dtype", *map(writer.ops, ("f8", False, True)))
    dtype += writer.ops((3, "<", None, None, None, -1, -1, 0)) + b"b"
    entries["previous_best"] = writer.call_ops("numpy.core.multiarray scalar", dtype, text)
    pairs = b"".join(writer.ops(key) + value for key, value in entries.items())
    return writer.zip_file(b"\x80\x02}(" + pairs + b"u.", buffers)


def test_a_checkpoint_of_unimatch_v2_is_a_whole_network(tmp_path):
    """Its student, or its averaged teacher by key; test_vit.py compares the logits."""
    state = reference_state("unimatch_tiny_dinov2")
    average = {name: np.ascontiguousarray(tensor / 2) for name, tensor in state.items()}
    path = tmp_path / "best.pth"
    path.write_bytes(checkpoint(state, average))
    conventions = pretrained.inspect(path)
    assert (conventions.backbone, conventions.head) == ("tiny_dinov2", "dpt")
    assert conventions.align_corners is True
    variables, report = pretrained.load(path, tiny_zeros())
    assert report.initial == ()
    kernel = variables["params"]["dpt"]["enlarge1"]["kernel"]
    np.testing.assert_array_equal(
        kernel[1, 2], state["head.resize_layers.0.weight"][:, :, 1, 2], strict=True
    )
    of_average, _ = pretrained.load(path / "model_ema", tiny_zeros())
    halves = leaves(of_average)
    for name, value in leaves(variables).items():
        np.testing.assert_array_equal(halves[name], value / 2, err_msg=name)
    assert weight_files.parts(path / "model_ema") == weight_files.parts(path)
    with raises_code("weights-damaged", "no state dict teacher", "model_ema"):
        weight_files.read(path / "teacher")


def test_a_checkpoint_for_other_classes_starts_a_network(tmp_path):
    state = reference_state("unimatch_tiny_dinov2")
    path = write(tmp_path / "best.safetensors", state)
    config = tiny_config(model__backbone="tiny_dinov2", model__head="dpt")
    config.model.pretrained = str(path)
    config_check.check(config)
    classifier = {"kernel": np.ones((1, 1, 8, 3), np.float32), "bias": np.ones(3, np.float32)}
    variables, report = pretrained.load(
        path, {"params": tiny_zeros()["params"] | {"classifier": classifier}}
    )
    assert set(report.initial) == {"params/classifier/kernel", "params/classifier/bias"}
    assert variables["params"]["classifier"]["bias"].shape == (3,)


def test_a_seeded_tensor_is_what_the_file_holds():
    """The reference's weights do not depend on the layout that they are written in."""
    name = "blocks.0.ls1.gamma"
    tensor = reference_state("timm_tiny_dinov2")[name]
    np.testing.assert_array_equal(tensor, reference_weights.drawn(name, (32,)))
