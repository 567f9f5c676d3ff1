"""The layouts of weight files: detected by tensor names and shapes, translated name by name.

An entry of `LAYOUTS` detects the files of a layout, gives the conventions of their networks, and
translates their tensors to our names. Our names are those of a network with one norm, such as
"backbone/stem/conv/kernel" and "backbone/stem/norm/mean". A name that a layout does not know is not
translated, so that the error about it quotes the original name.
"""

import functools
import re
from collections.abc import Mapping

import numpy as np

from semiseg_jax.models import convnext_layouts, vit_layouts
from semiseg_jax.models.weight_files import File
from semiseg_jax.models.weight_layout import (
    Conventions,
    WeightLayout,
    canonical_name,
    domain_of,
)

_TORCH_NORM = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}


def _from_torch(name: str, tensor: np.ndarray) -> tuple[str, np.ndarray] | None:
    """Translates a leaf: kernels OIHW become HWIO, [c, 1, k, k] becomes [k, k, 1, c]."""
    if tensor.ndim == 4:
        return ("kernel", tensor.transpose(2, 3, 1, 0)) if name == "weight" else None
    return (_TORCH_NORM[name], tensor) if name in _TORCH_NORM else None


_RESNET_STEM = {"conv1": "stem/conv", "bn1": "stem/norm"}
_RESNET_DEEP_STEM = {
    "conv1.0": "stem1/conv",
    "conv1.1": "stem1/norm",
    "conv1.3": "stem2/conv",
    "conv1.4": "stem2/norm",
    "conv1.6": "stem3/conv",
    "bn1": "stem3/norm",
}
_RESNET_KINDS = {"conv": "conv", "bn": "norm", "0": "conv", "1": "norm"}
# By (has bottlenecks, number of blocks in the third stage).
_RESNET_NAMES = {(False, 2): "resnet18", (True, 6): "resnet50", (True, 23): "resnet101"}


def _is_resnet(file: File) -> bool:
    return {"conv1.weight", "layer4.0.conv1.weight"} <= file.tensors.keys()


def _is_resnet_deep_stem(file: File) -> bool:
    return {"conv1.6.weight", "layer4.0.conv1.weight"} <= file.tensors.keys()


def _resnet_name(file: File, prefix: str = "") -> str | None:
    """Returns the name of the backbone with the file's blocks and stem; None if there is none."""
    blocks = {
        match[1]
        for name in file.tensors
        if (match := re.match(rf"{re.escape(prefix)}layer3\.(\d+)\.", name))
    }
    bottlenecks = f"{prefix}layer1.0.conv3.weight" in file.tensors
    name = _RESNET_NAMES.get((bottlenecks, len(blocks)))
    deep = file.tensors.get(f"{prefix}conv1.0.weight")
    if name is None or deep is None:
        return name
    letter = {32: "c", 64: "s"}.get(deep.shape[0])
    return letter and name + letter


def _resnet_conventions(layout: str, file: File) -> Conventions:
    return Conventions(
        layout,
        input_normalization="imagenet",
        first_dilation="previous",
        epsilon_backbone=1e-5,
        backbone=_resnet_name(file),
    )


def _translate_resnet(
    name: str, tensor: np.ndarray, stem: Mapping[str, str] = _RESNET_STEM
) -> tuple[str, np.ndarray] | None:
    layer, _, leaf = name.rpartition(".")
    converted = _from_torch(leaf, tensor)
    block = re.fullmatch(r"layer(\d)\.(\d+)\.(?:(conv|bn)(\d)|downsample\.([01]))", layer)
    if block:
        stage, number, kind, index, down = block.groups()
        module = f"conv{index}" if index else "shortcut"
        path = f"stage{stage}_block{int(number) + 1}/{module}/{_RESNET_KINDS[kind or down]}"
    else:
        path = stem.get(layer, "")
    if converted is None or (not path and layer == "fc"):
        return None
    return f"backbone/{path or layer}/{converted[0]}", converted[1]


_TIMM_XCEPTION_LAYERS = {"conv_dw": "depthwise/conv", "bn_dw": "depthwise/norm"} | {
    "conv_pw": "pointwise/conv",
    "bn_pw": "pointwise/norm",
}
_XCEPTION_BLOCKS = (
    *(f"entry_block{i + 1}" for i in range(3)),
    *(f"middle_block{i + 1}" for i in range(16)),
    *(f"exit_block{i + 1}" for i in range(2)),
)


def _is_timm_xception(file: File) -> bool:
    return {"stem.0.conv.weight", "blocks.20.stack.conv1.conv_dw.weight"} <= file.tensors.keys()


def _translate_timm_xception(name: str, tensor: np.ndarray) -> tuple[str, np.ndarray] | None:
    layer, _, leaf = name.rpartition(".")
    converted = _from_torch(leaf, tensor)
    if converted is None or layer == "head.fc":
        return None
    path = layer
    if match := re.fullmatch(r"stem\.([01])\.(conv|bn)", layer):
        path = f"stem{int(match[1]) + 1}/{_RESNET_KINDS[match[2]]}"
    elif match := re.fullmatch(r"blocks\.(\d+)\.(.+)", layer):
        block = dict(enumerate(_XCEPTION_BLOCKS)).get(int(match[1]), f"block{match[1]}")
        path = f"{block}/{match[2]}"
        if inner := re.fullmatch(r"stack\.conv(\d)\.(\w+)", match[2]):
            path = f"{block}/separable{inner[1]}/{_TIMM_XCEPTION_LAYERS.get(inner[2], inner[2])}"
        elif inner := re.fullmatch(r"shortcut\.(conv|bn)", match[2]):
            path = f"{block}/shortcut/{_RESNET_KINDS[inner[1]]}"
    return f"backbone/{path}/{converted[0]}", converted[1]


_SLIM_LEAVES = {
    "weights": "conv/kernel",
    "depthwise_weights": "conv/kernel",
    "BatchNorm/gamma": "norm/scale",
    "BatchNorm/beta": "norm/bias",
    "BatchNorm/moving_mean": "norm/mean",
    "BatchNorm/moving_variance": "norm/var",
}
_SLIM_HEAD = {
    "aspp0": "aspp/point",
    "image_pooling": "aspp/image_pooling",
    "concat_projection": "aspp/project",
    "decoder/feature_projection0": "low",
} | {
    f"{slim}_{kind}": f"{ours}/{kind}"
    for slim, ours in (
        *((f"aspp{i}", f"aspp/atrous{i}") for i in (1, 2, 3)),
        *((f"decoder/decoder_conv{i}", f"decoder{i + 1}") for i in (0, 1)),
    )
    for kind in ("depthwise", "pointwise")
}


def _is_slim_xception(file: File) -> bool:
    return "xception_65/entry_flow/conv1_1/weights" in file.tensors


def _slim_conventions(file: File) -> Conventions:
    has_head = "concat_projection/weights" in file.tensors
    return Conventions(
        "tf_slim_xception65",
        input_normalization="half",
        # DeepLab's code resizes with aligned corners; the backbone alone does not resize.
        align_corners=True if has_head else None,
        first_dilation="previous",
        epsilon_backbone=1e-3,
        epsilon_head=1e-5 if has_head else None,
        backbone="xception65",
        head="v3plus" if has_head else None,
        scope="" if has_head else "backbone/",
    )


def _translate_slim_xception(name: str, tensor: np.ndarray) -> tuple[str, np.ndarray] | None:
    if match := re.fullmatch(r"logits/semantic/(weights|biases)", name):
        return f"classifier/{'kernel' if match[1] == 'weights' else 'bias'}", tensor
    split = re.fullmatch(r"(.+?)/(BatchNorm/\w+|\w+)", name)
    if not split or split[2] not in _SLIM_LEAVES or name.startswith("xception_65/logits"):
        return None
    layer, leaf = split[1], _SLIM_LEAVES[split[2]]
    if split[2] == "depthwise_weights":
        tensor = tensor.transpose(0, 1, 3, 2)
    if layer == "concat_projection" and leaf == "conv/kernel":
        # The pooled features come first in the input of that layer, and last in ours.
        tensor = np.roll(tensor, -(tensor.shape[2] // 5), axis=2)
    if not layer.startswith("xception_65/"):
        return f"{_SLIM_HEAD.get(layer, layer)}/{leaf}", tensor
    path = layer.removeprefix("xception_65/")
    if match := re.fullmatch(r"entry_flow/conv1_([12])", path):
        path = f"stem{match[1]}"
    elif match := re.fullmatch(r"(\w+)_flow/block(\d+)/unit_(\d+)/xception_module/(\w+)", path):
        flow, block, unit, module = match.groups()
        module = re.sub(r"separable_conv(\d)_", r"separable\1/", module)
        path = f"{flow}_block{unit if flow == 'middle' else block}/{module}"
    return f"backbone/{path}/{leaf}", tensor


_SMP_LAYERS = {
    "decoder.aspp.0.convs.0.0": "aspp/point/conv",
    "decoder.aspp.0.convs.0.1": "aspp/point/norm",
    "decoder.aspp.0.convs.4.1": "aspp/image_pooling/conv",
    "decoder.aspp.0.convs.4.2": "aspp/image_pooling/norm",
    "decoder.aspp.0.project.0": "aspp/project/conv",
    "decoder.aspp.0.project.1": "aspp/project/norm",
    "decoder.aspp.1.0": "decoder1/depthwise",
    "decoder.aspp.1.1": "decoder1/pointwise/conv",
    "decoder.aspp.2": "decoder1/pointwise/norm",
    "decoder.block1.0": "low/conv",
    "decoder.block1.1": "low/norm",
    "decoder.block2.0.0": "decoder2/depthwise",
    "decoder.block2.0.1": "decoder2/pointwise/conv",
    "decoder.block2.1": "decoder2/pointwise/norm",
    "segmentation_head.0": "classifier",
} | {
    f"decoder.aspp.0.convs.{i}.{smp}": f"aspp/atrous{i}/{ours}"
    for i in (1, 2, 3)
    for smp, ours in (("0.0", "depthwise"), ("0.1", "pointwise/conv"), ("1", "pointwise/norm"))
}


def _is_smp(file: File) -> bool:
    names = {"encoder.layer4.0.conv1.weight", "decoder.aspp.0.convs.0.0.weight"}
    return names <= file.tensors.keys()


def _smp_conventions(file: File) -> Conventions:
    return Conventions(
        "smp",
        input_normalization="imagenet",
        align_corners=True,
        first_dilation="stage",
        epsilon_backbone=1e-5,
        epsilon_head=1e-5,
        backbone=_resnet_name(file, "encoder."),
        head="v3plus_smp",
        scope="",
    )


def _translate_smp(name: str, tensor: np.ndarray) -> tuple[str, np.ndarray] | None:
    if name.startswith("encoder."):
        return _translate_resnet(name.removeprefix("encoder."), tensor)
    layer, _, leaf = name.rpartition(".")
    converted = _from_torch(leaf, tensor)
    if converted is None or layer.startswith("classification_head"):
        return None
    return f"{_SMP_LAYERS.get(layer, layer)}/{converted[0]}", converted[1]


_EFFICIENTNET_LAYERS = {
    "_conv_stem": "stem/conv",
    "_bn0": "stem/norm",
    "_conv_head": "head/conv",
    "_bn1": "head/norm",
}
_EFFICIENTNET_BLOCK_LAYERS = {
    "_expand_conv": "expand/conv",
    "_bn0": "expand/norm",
    "_depthwise_conv": "depthwise/conv",
    "_bn1": "depthwise/norm",
    "_project_conv": "project/conv",
    "_bn2": "project/norm",
}


def _is_efficientnet_lite(file: File) -> bool:
    # The full EfficientNets have the same names, and squeeze-and-excitation (`_se_`) as well.
    names = file.tensors.keys()
    return {"_conv_stem.weight", "_blocks.0._depthwise_conv.weight"} <= names and not any(
        "._se_" in name for name in names
    )


# By (number of blocks, channels of the last block).
_EFFICIENTNET_LITE_NAMES = {
    (16, 320): "efficientnet_lite0",
    (21, 320): "efficientnet_lite1",
    (21, 352): "efficientnet_lite2",
}


def _efficientnet_lite_conventions(file: File) -> Conventions:
    projections = {
        int(match[1]): tensor
        for name, tensor in file.tensors.items()
        if (match := re.fullmatch(r"_blocks\.(\d+)\._project_conv\.weight", name))
    }
    last = projections.get(len(projections) - 1)
    width = last.shape[0] if last is not None and last.ndim else 0
    return Conventions(
        "efficientnet_lite",
        input_normalization="lite",
        first_dilation="previous",
        epsilon_backbone=1e-3,
        backbone=_EFFICIENTNET_LITE_NAMES.get((len(projections), width)),
    )


def _translate_efficientnet_lite(name: str, tensor: np.ndarray) -> tuple[str, np.ndarray] | None:
    layer, _, leaf = name.rpartition(".")
    converted = _from_torch(leaf, tensor)
    block = re.fullmatch(r"_blocks\.(\d+)\.(\w+)", layer)
    if block:
        path = _EFFICIENTNET_BLOCK_LAYERS.get(block[2])
        path = path and f"block_{block[1]}/{path}"
    else:
        path = _EFFICIENTNET_LAYERS.get(layer)
    if converted is None or path is None:
        return None
    return f"backbone/{path}/{converted[0]}", converted[1]


def _is_own(file: File) -> bool:
    return any(name.startswith("params/") for name in file.tensors)


def _own_conventions(file: File) -> Conventions:
    model = file.description.get("model", {})
    epsilon = model.get("norm_epsilon", {})  # May be of any type; `pretrained` catches the error.
    return Conventions(
        "semiseg_jax",
        input_normalization=model.get("input_normalization"),
        align_corners=model.get("align_corners"),
        first_dilation=model.get("first_dilation"),
        epsilon_backbone=epsilon.get("backbone"),
        epsilon_head=epsilon.get("head"),
        backbone=model.get("backbone"),
        head=model.get("head"),
        scope="",
    )


def _translate_own(name: str, tensor: np.ndarray) -> tuple[str, np.ndarray] | None:
    path = tuple(name.split("/"))
    return None if domain_of(path) == "strong" else (canonical_name(path), tensor)


LAYOUTS: dict[str, WeightLayout] = {
    "semiseg_jax": WeightLayout(_is_own, _own_conventions, _translate_own),
    "efficientnet_lite": WeightLayout(
        _is_efficientnet_lite,
        _efficientnet_lite_conventions,
        _translate_efficientnet_lite,
        optional=("backbone/head/",),
    ),
    "resnet": WeightLayout(
        _is_resnet, functools.partial(_resnet_conventions, "resnet"), _translate_resnet
    ),
    "resnet_deep_stem": WeightLayout(
        _is_resnet_deep_stem,
        functools.partial(_resnet_conventions, "resnet_deep_stem"),
        functools.partial(_translate_resnet, stem=_RESNET_DEEP_STEM),
    ),
    "timm_xception65": WeightLayout(
        _is_timm_xception,
        lambda _: Conventions(
            "timm_xception65",
            input_normalization="half",
            first_dilation="previous",
            epsilon_backbone=1e-3,
            backbone="xception65",
        ),
        _translate_timm_xception,
    ),
    "tf_slim_xception65": WeightLayout(
        _is_slim_xception, _slim_conventions, _translate_slim_xception
    ),
    "smp": WeightLayout(_is_smp, _smp_conventions, _translate_smp),
    **vit_layouts.LAYOUTS,
    **convnext_layouts.LAYOUTS,
}
