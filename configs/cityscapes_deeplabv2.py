"""Cityscapes with the paper's other network: DeepLabV2 on ResNet-101.

    python -m semiseg_jax.main --config=configs/cityscapes_deeplabv2.py:1_8 \
        --config.data.root=/path/to/cityscapes

The argument is a share of configs/cityscapes.py; only the network differs.

Expected score and time: not measured. Lower bound of the time on a TPU v5e:4x4 in bfloat16:
0.52 hours, as planned from the compiled programs (docs/scaling.md).
"""

from ml_collections import ConfigDict

from configs import _arguments, cityscapes


def get_config(share: str = "1_8") -> ConfigDict:
    """Returns the config of configs/cityscapes.py with DeepLabV2 on ResNet-101."""
    (share,) = _arguments.choose(
        share, "configs/cityscapes_deeplabv2.py", ("1_8", cityscapes.LABELS)
    )
    config = cityscapes.get_config(share)
    config.model.backbone = "resnet101"
    config.model.head = "v2"
    config.model.output_stride = 8
    return config
