"""A network whose answers a test can foresee."""

import flax.linen as nn


class Pointwise(nn.Module):
    """What it says of a pixel depends on that pixel alone, whatever window or tile it is in."""

    num_classes: int = 3
    mean: tuple = (0.0, 0.0, 0.0)
    std: tuple = (255.0, 255.0, 255.0)
    align_corners: bool = False

    @nn.compact
    def __call__(self, x, domain="weak", train=False):
        return nn.Conv(3, (1, 1))(x)
