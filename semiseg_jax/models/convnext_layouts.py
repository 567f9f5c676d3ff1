"""The layouts of weight files of ConvNeXt: timm's, the original, and DINOv3's in transformers.

DINOv3's own files have the original names. Classifiers and the norm before them are not used.
"""

import re

import numpy as np

from semiseg_jax.models.convnext import EPSILON, SPECS
from semiseg_jax.models.weight_files import File
from semiseg_jax.models.weight_layout import (
    Conventions,
    UnsupportedNetworkError,
    WeightLayout,
)

# By layout: the names of the first layers, by which it is detected.
_FIRST_NAMES = {
    "timm_convnext": ("stem.0.weight", "stages.0.blocks.0.conv_dw.weight"),
    "convnext": ("downsample_layers.0.0.weight", "stages.0.0.dwconv.weight"),
    "convnext_transformers": (
        "stages.0.downsample_layers.0.weight",
        "stages.0.layers.0.depthwise_conv.weight",
    ),
}
_BLOCK = re.compile(r"stages\.(\d)\.(?:blocks\.|layers\.)?(\d+)\.(.+)")
# timm counts the stem apart from the layers between the stages.
_STEM = re.compile(r"(?:stem|downsample_layers\.0|stages\.0\.downsample_layers)\.([01])\.(\w+)")
_SHRINK = re.compile(
    r"(?:stages\.([1-3])\.downsample(?:_layers)?|downsample_layers\.([1-3]))\.([01])\.(\w+)"
)
_LAYERS = {
    **dict.fromkeys(("conv_dw", "dwconv", "depthwise_conv"), "depthwise"),
    **dict.fromkeys(("norm", "layer_norm"), "norm"),
    **dict.fromkeys(("mlp.fc1", "pwconv1", "pointwise_conv1"), "fc1"),
    **dict.fromkeys(("mlp.fc2", "pwconv2", "pointwise_conv2"), "fc2"),
}
_NOT_OURS = re.compile(r"(head|norm|norms|layer_norm|classifier)\.")


def _translate(name: str, tensor: np.ndarray) -> tuple[str, np.ndarray] | None:
    if _NOT_OURS.match(name):
        return None
    if match := _STEM.fullmatch(name):
        layer, leaf = ("stem", "stem_norm")[int(match[1])], match[2]
    elif match := _SHRINK.fullmatch(name):
        number = int(match[1] or match[2]) + 1
        layer = f"shrink{number}" + ("_norm" if match[3] == "0" else "")
        leaf = match[4]
    elif match := _BLOCK.fullmatch(name):
        block = f"stage{int(match[1]) + 1}_block{int(match[2]) + 1}"
        inner, _, leaf = match[3].rpartition(".")
        layer = f"{block}/{_LAYERS.get(inner, inner or 'scale')}"
    else:
        layer, _, leaf = name.rpartition(".")
    if leaf == "weight" and tensor.ndim == 1:
        leaf = "scale"
    elif leaf == "weight":
        # The perceptrons are linear layers in the file and 1x1 convolutions here.
        tensor = tensor.reshape(*tensor.shape, *(1,) * (4 - tensor.ndim))
        leaf, tensor = "kernel", tensor.transpose(2, 3, 1, 0)
    return f"backbone/{layer}/{leaf}", tensor


def _conventions(layout: str, file: File) -> Conventions:
    """Returns the conventions of a file.

    Raises:
        UnsupportedNetworkError: its network has other widths or depths than the supported ones.
    """
    widths: dict[int, int] = {}
    blocks: dict[int, set[int]] = {}
    for name, tensor in file.tensors.items():
        if match := _BLOCK.fullmatch(name):
            stage = int(match[1])
            blocks.setdefault(stage, set()).add(int(match[2]))
            if match[3] == "gamma":
                widths[stage] = tensor.shape[0]
    held = tuple(tuple(of[i] for i in sorted(of)) for of in (widths, _lengths(blocks)))
    for backbone, spec in SPECS.items():
        if held == spec:
            return Conventions(
                layout,
                input_normalization="imagenet",
                first_dilation="previous",
                epsilon_backbone=EPSILON,
                backbone=backbone,
            )
    known = (f"{k}: widths {v[0]}, depths {v[1]}" for k, v in SPECS.items() if "tiny_" not in k)
    raise UnsupportedNetworkError(
        f"a ConvNeXt that is not supported (widths {held[0]}, depths {held[1]}); supported are "
        f"{'; '.join(known)}"
    )


def _lengths(blocks: dict[int, set[int]]) -> dict[int, int]:
    return {stage: len(numbers) for stage, numbers in blocks.items()}


def _layout(name: str) -> WeightLayout:
    first = set(_FIRST_NAMES[name])
    return WeightLayout(
        lambda file: first <= file.tensors.keys(),
        lambda file: _conventions(name, file),
        _translate,
    )


LAYOUTS: dict[str, WeightLayout] = {name: _layout(name) for name in _FIRST_NAMES}
