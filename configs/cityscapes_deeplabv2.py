"""Cityscapes with the paper's other network: DeepLabV2 on ResNet-101.

    python -m semiseg_jax.main --config=configs/cityscapes_deeplabv2.py:1_8 \
        --config.data.root=/path/to/cityscapes

The argument is that of configs/cityscapes.py, from which this differs in the network alone. Its
scores have not been measured yet.
"""

from ml_collections import ConfigDict

from configs import cityscapes


def get_config(share: str = "1_8") -> ConfigDict:
    """configs/cityscapes.py on another network."""
    config = cityscapes.get_config(share)
    config.model.backbone = "resnet101"
    config.model.head = "v2"
    config.model.output_stride = 8
    return config
