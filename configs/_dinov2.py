"""What the configs on DINOv2 have in common; not a config itself."""

from ml_collections import ConfigDict


def use(config: ConfigDict, size: str) -> ConfigDict:
    """Gives a config the network, weights and optimiser that UniMatch V2 published for DINOv2.

    Source: Yang et al., UniMatch V2, and its code (LiheYoung/UniMatch-V2).

    Args:
        config: it is changed.
        size: of the backbone, "s", "b" or "l".
    """
    config.model.backbone = f"dinov2_vit{size}14"
    config.model.head = "dpt"
    config.model.pretrained = "dinov2"
    config.optim.kind = "adamw"
    config.optim.weight_decay = 0.01
    config.optim.decay_all = True
    for rates in (config.optim.teacher, config.optim.student):
        rates.learning_rate, rates.head_multiplier = 5e-6, 40.0
    return config
