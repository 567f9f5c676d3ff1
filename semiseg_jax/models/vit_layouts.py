"""The layouts of weight files of vision transformers: DINOv2, DINOv3, and networks of UniMatch V2.

The original files and timm's have nearly the same names; those of transformers are first brought to
them. Queries, keys and values, which the former fuse, are taken apart.
"""

import re
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from semiseg_jax.models.vit import SPECS, ViTSpec
from semiseg_jax.models.weight_files import File
from semiseg_jax.models.weight_layout import (
    Conventions,
    Part,
    UnsupportedNetworkError,
    WeightLayout,
)

DINOV3_LICENSE = "DINOv3 License: read its terms before you use or pass on what it becomes part of"
_QKV = ("query", "key", "value")

# Names of transformers, and the original ones in their place. The patterns are applied in order.
_TRANSFORMERS_NAMES = (
    (r"^(dinov2|model)\.", ""),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.register_tokens$", "storage_tokens"),
    (r"^embeddings\.(cls_token|mask_token)$", r"\1"),
    (r"^embeddings\.patch_embeddings\.(projection\.)?", "patch_embed.proj."),
    (r"^(encoder\.)?layer\.", "blocks."),
    (r"\.attention\.(attention\.)?(query|key|value)(_proj)?\.", r".attn.\2."),
    (r"\.attention\.([qkv])_proj\.", r".attn.\1_proj."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"\.mlp\.up_proj\.", ".mlp.fc1."),
    (r"\.mlp\.down_proj\.", ".mlp.fc2."),
    (r"^layernorm\.", "norm."),
    *((rf"\.attn\.{name[0]}_proj\.", f".attn.{name}.") for name in _QKV),
)

_TOKENS = {
    "cls_token": "cls_token",
    "pos_embed": "pos_embed",
    "storage_tokens": "storage_tokens",
    "reg_token": "storage_tokens",  # timm
    "register_tokens": "storage_tokens",  # DINOv2 with registers
}
_BLOCK_LAYERS = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attn.proj": "attention/proj",
    "mlp.fc1": "fc1",
    "mlp.fc2": "fc2",
} | {f"attn.{name}": f"attention/{name}" for name in _QKV}
# In timm's DINOv3 the factors are no module.
_SCALES = {"ls1.gamma": "scale1", "ls2.gamma": "scale2", "gamma_1": "scale1", "gamma_2": "scale2"}
# What pretraining alone reads, what is fixed (the periods of rotary positions), and classifiers.
_NOT_OURS = re.compile(
    r"mask_token$|rope_embed\.periods$|attn\.qkv\.bias_mask$|(head|classifier|fc_norm)\."
)


def _fused_parts(tensors: Mapping[str, np.ndarray], prefix: str = "") -> Iterator[Part]:
    """Takes queries, keys and values of original names apart.

    The key bias of DINOv3 is fixed at 0, whatever the file holds, and our network has none; timm
    leaves out the others too where they are 0.

    Args:
        tensors: by original name, or another name, which stays.
        prefix: of the names in the file.
    """
    is_dinov3 = "pos_embed" not in tensors
    for name, tensor in tensors.items():
        layer, fused, leaf = name.partition(".attn.qkv.")
        if not fused or leaf == "bias_mask":
            yield prefix + name, name, tensor
            continue
        # A length that is no multiple of 3 belongs to no network: the shapes will differ.
        for part, values in zip(_QKV, np.array_split(tensor, 3), strict=True):
            if not (is_dinov3 and leaf == "bias" and part == "key"):
                yield prefix + name, f"{layer}.attn.{part}.{leaf}", values
        if is_dinov3 and leaf == "weight" and f"{layer}.attn.qkv.bias" not in tensors:
            for part in ("query", "value"):
                zeros = np.zeros(tensor.shape[0] // 3, tensor.dtype)
                yield prefix + name, f"{layer}.attn.{part}.bias", zeros


def _original_parts(file: File) -> Iterable[Part]:
    return _fused_parts(file.tensors)


def _transformers_parts(file: File) -> Iterable[Part]:
    for name, tensor in file.tensors.items():
        original = name
        for pattern, replacement in _TRANSFORMERS_NAMES:
            original = re.sub(pattern, replacement, original)
        yield name, original, tensor


def _translate_vit(name: str, tensor: np.ndarray) -> tuple[str, np.ndarray] | None:
    """Translates an original name."""
    if _NOT_OURS.match(name) or _NOT_OURS.search(name):
        return None
    if name in _TOKENS:
        return f"backbone/{_TOKENS[name]}", tensor
    block = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    if block and block[2] in _SCALES:
        return f"backbone/block_{block[1]}/{_SCALES[block[2]]}/gamma", tensor
    layer, _, leaf = name.rpartition(".")
    if leaf == "weight" and tensor.ndim == 1:
        leaf = "scale"
    elif leaf == "weight":
        leaf, tensor = "kernel", _to_kernel(tensor)
    path = {"patch_embed.proj": "patch_embed", "norm": "norm"}.get(layer)
    if block:
        inner = block[2].rpartition(".")[0]
        path = f"block_{block[1]}/{_BLOCK_LAYERS.get(inner, inner)}"
    return f"backbone/{path or layer}/{leaf}", tensor


def _to_kernel(tensor: np.ndarray) -> np.ndarray:
    """[out, in] becomes [in, out], [out, in, k, k] becomes [k, k, in, out]."""
    return tensor.T if tensor.ndim == 2 else tensor.transpose(2, 3, 1, 0)


def _find_backbone(parts: Iterable[Part]) -> str:
    """Returns the name of the backbone with the widths and numbers of a file's tensors.

    Raises:
        UnsupportedNetworkError: there is none.
    """
    tensors = {name: tensor for _, name, tensor in parts}
    blocks = {int(m[1]) for name in tensors if (m := re.match(r"blocks\.(\d+)\.", name))}
    width, _, patch, _ = tensors["patch_embed.proj.weight"].shape
    grid = storage = 0
    for name, token in _TOKENS.items():
        if name in tensors and token == "pos_embed":
            grid = round((tensors[name].shape[1] - 1) ** 0.5)
        elif name in tensors and token == "storage_tokens":
            storage = tensors[name].shape[1]
    gated = any(re.search(r"\.mlp\.(gate_proj|w3|w12|weights_in)\.", name) for name in tensors)
    held = (width, len(blocks), patch, grid, storage, gated)
    for name, spec in SPECS.items():
        if held == (*_numbers(spec), False):
            return name
    known = "; ".join(
        f"{name}: {_in_words(*_numbers(spec), False)}"
        for name, spec in SPECS.items()
        if not name.startswith("tiny")
    )
    raise UnsupportedNetworkError(
        f"a vision transformer that is not supported ({_in_words(*held)}); supported are {known}"
    )


def _numbers(spec: ViTSpec) -> tuple[int, int, int, int, int]:
    return spec.width, spec.depth, spec.patch, spec.grid, spec.storage


def _in_words(width: int, depth: int, patch: int, grid: int, storage: int, gated: bool) -> str:
    positions = f"positions {grid}x{grid}" if grid else "rotary positions"
    registers = f"{storage} registers" if storage else "no registers"
    return f"width {width}, depth {depth}, patch {patch}, {positions}, {registers}" + (
        ", gated MLP" if gated else ""
    )


def _vit_conventions(layout: str, parts: Iterable[Part], head: bool = False) -> Conventions:
    name = _find_backbone(parts)
    return Conventions(
        layout,
        input_normalization="imagenet",
        align_corners=True if head else None,
        epsilon_backbone=SPECS[name].epsilon,
        backbone=name,
        head="dpt" if head else None,
        license=None if SPECS[name].grid else DINOV3_LICENSE,
        scope="" if head else "backbone/",
    )


def _is_original(file: File) -> bool:
    names = {"cls_token", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight"}
    return names <= file.tensors.keys()


def _is_transformers(file: File) -> bool:
    names = {name.rpartition("embeddings.")[2] for name in file.tensors}
    return {"cls_token", "mask_token"} <= names and any(
        re.search(r"layer\.0\.layer_scale1\.lambda1$", name) for name in file.tensors
    )


# --- UniMatch V2 ---------------------------------------------------------------------------------

_DPT_LAYERS = {
    "scratch.output_conv.0": "dpt/output",
    "scratch.output_conv.2": "classifier",
    "resize_layers.0": "dpt/enlarge1",
    "resize_layers.1": "dpt/enlarge2",
    "resize_layers.3": "dpt/shrink4",
}
for _i in range(1, 5):
    _DPT_LAYERS |= {
        f"projects.{_i - 1}": f"dpt/project{_i}",
        f"scratch.layer{_i}_rn": f"dpt/level{_i}",
        f"scratch.refinenet{_i}.out_conv": f"dpt/fusion{_i}/project",
    }
    for _unit, _conv in ((1, 1), (1, 2), (2, 1), (2, 2)):
        _layer = f"scratch.refinenet{_i}.resConfUnit{_unit}.conv{_conv}"
        _DPT_LAYERS[_layer] = f"dpt/fusion{_i}/unit{_unit}/conv{_conv}"
# Never used: nothing is added at the coarsest level.
_UNUSED_UNIT = "head.scratch.refinenet4.resConfUnit1."


def _unimatch_prefix(file: File) -> str:
    """Returns the prefix of all names, "module." of a network that was trained on several GPUs."""
    return "module." if all(name.startswith("module.") for name in file.tensors) else ""


def _is_dinov2_dpt(file: File) -> bool:
    prefix = _unimatch_prefix(file)
    names = ("backbone.cls_token", "head.scratch.output_conv.2.weight", "head.projects.0.weight")
    return {prefix + name for name in names} <= file.tensors.keys()


def _dinov2_dpt_parts(file: File) -> Iterable[Part]:
    prefix = _unimatch_prefix(file)
    backbone = prefix + "backbone."
    inside = {
        name.removeprefix(backbone): tensor
        for name, tensor in file.tensors.items()
        if name.startswith(backbone)
    }
    yield from _fused_parts(inside, backbone)
    for name, tensor in file.tensors.items():
        if not name.startswith(backbone):
            yield name, name.removeprefix(prefix), tensor


def _translate_dinov2_dpt(name: str, tensor: np.ndarray) -> tuple[str, np.ndarray] | None:
    if not name.startswith("head."):
        return _translate_vit(name, tensor)
    if name.startswith(_UNUSED_UNIT):
        return None
    layer, _, leaf = name.removeprefix("head.").rpartition(".")
    if leaf == "weight":
        leaf = "kernel"
        # Kernels of transposed convolutions are [in, out, k, k].
        transposed = layer in ("resize_layers.0", "resize_layers.1")
        tensor = tensor.transpose(2, 3, 0, 1) if transposed else tensor.transpose(2, 3, 1, 0)
    return f"{_DPT_LAYERS.get(layer, layer)}/{leaf}", tensor


LAYOUTS: dict[str, WeightLayout] = {
    "dino": WeightLayout(
        _is_original,
        lambda file: _vit_conventions("dino", _original_parts(file)),
        _translate_vit,
        parts=_original_parts,
    ),
    "dino_transformers": WeightLayout(
        _is_transformers,
        lambda file: _vit_conventions("dino_transformers", _transformers_parts(file)),
        _translate_vit,
        parts=_transformers_parts,
    ),
    "dinov2_dpt": WeightLayout(
        _is_dinov2_dpt,
        lambda file: _vit_conventions("dinov2_dpt", _dinov2_dpt_parts(file), head=True),
        _translate_dinov2_dpt,
        parts=_dinov2_dpt_parts,
    ),
}
