"""What an exported model says of itself: export.json beside it, and the texts in an ONNX file."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from semiseg_jax.models.vit_segmenter import ViTSegmenter
from semiseg_jax.serving.export_parity import ExportDiff
from semiseg_jax.serving.model_bundle import ModelBundle


def describe(bundle: ModelBundle, interface: Mapping[str, Any], diff: ExportDiff) -> dict[str, Any]:
    """Returns the content of export.json, the interface description for users of the export.

    Args:
        bundle: the exported model.
        interface: the entries that depend on the format; "shape" is that of a class map.
        diff: between the exported model and its network.
    """
    description = bundle.description
    entries = dict(interface)
    shape = entries.pop("shape")
    return {
        **entries,
        "classes": list(bundle.classes),
        "palette": [list(colour) for colour in bundle.palette],
        "input": {
            "images": {
                "dtype": "uint8",
                "shape": [*shape, 3],
                "is": description["preprocessing"]["input"],
            }
        },
        "outputs": {
            "class_map": {"dtype": "uint8", "shape": shape, "is": "ids of classes"},
            "probabilities": {"dtype": "float32", "shape": [*shape, len(bundle.classes)]},
        },
        "preprocessing": preprocessing(bundle),
        "inference": "each image once, whole, at its own size"
        + f" divided by {bundle.downscale}" * (bundle.downscale > 1)
        + "; the sizes of a batch are equal",
        "miou": description["miou"],
        "protocol": description["protocol"],
        "trained_on": description["trained_on"],
        "parity": {"agreement": diff.agreement, **dataclasses.asdict(diff)},
    }


def preprocessing(bundle: ModelBundle) -> dict[str, Any]:
    """Returns what the exported model does with images before and after the network."""
    model: Any = bundle.model
    rule = "each image keeps its size; sides need not be multiples of the stride"
    stride = bundle.model_config.output_stride
    if isinstance(model, ViTSegmenter):
        stride = model.patch
        rule = (
            f"sides are resized to the nearest multiple of the patch of {stride} pixels, at least "
            "one patch, and the logits back"
        )
    return {
        "done": "inside the file",
        "mean": list(model.mean),
        "std": list(model.std),
        "downscale": bundle.downscale,
        "stride": stride,
        "size_rule": rule,
    }


def texts(bundle: ModelBundle) -> dict[str, str]:
    """Returns what an ONNX file holds as `metadata_props`, by name: JSON texts."""
    content = {
        "classes": list(bundle.classes),
        "palette": [list(colour) for colour in bundle.palette],
        "input": bundle.description["preprocessing"]["input"],
        **preprocessing(bundle),
        "miou": bundle.description["miou"],
    }
    return {name: json.dumps(value) for name, value in content.items()}
