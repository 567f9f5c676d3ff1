"""A vision transformer with a DPT head in PyTorch, written in the usual way, for `train_step.py`.

ViT-S of DINOv2 (patch 14, learned positions of 37x37 patches) and the head of UniMatch V2. Queries,
keys and values come from one matrix product; attention is `scaled_dot_product_attention`. It
imports only PyTorch and NumPy.
"""

import numpy as np
import torch
from torch import nn
from torch.nn import functional

WIDTH, DEPTH, HEADS, PATCH, GRID = 384, 12, 6, 14, 37
TAPS = (2, 5, 8, 11)
FEATURES, LEVELS = 64, (48, 96, 192, 384)
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


class Block(nn.Module):
    """Attention and a perceptron, each behind a layer norm and scaled by channel."""

    def __init__(self):
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH, eps=1e-6)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)
        self.scale1 = nn.Parameter(torch.ones(WIDTH))
        self.norm2 = nn.LayerNorm(WIDTH, eps=1e-6)
        self.fc1 = nn.Linear(WIDTH, 4 * WIDTH)
        self.fc2 = nn.Linear(4 * WIDTH, WIDTH)
        self.scale2 = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x):
        """[b, n, WIDTH] -> the same."""
        batch, count, _ = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, count, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        y = functional.scaled_dot_product_attention(*qkv)
        y = self.proj(y.transpose(1, 2).reshape(x.shape))
        x = x + self.scale1 * y
        y = self.fc2(functional.gelu(self.fc1(self.norm2(x))))
        return x + self.scale2 * y


class Backbone(nn.Module):
    """DINOv2's ViT-S; the features of four blocks."""

    def __init__(self):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + GRID**2, WIDTH))
        self.patch_embed = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.norm = nn.LayerNorm(WIDTH, eps=1e-6)

    def forward(self, x):
        """Normalised images [n, 3, h, w] -> four times [n, WIDTH, h / PATCH, w / PATCH]."""
        x = self.patch_embed(x)
        size = x.shape[2:]
        positions = self.pos_embed[:, 1:].reshape(1, GRID, GRID, WIDTH).permute(0, 3, 1, 2)
        factors = [(n + 0.1) / GRID for n in size]
        positions = functional.interpolate(positions, scale_factor=factors, mode="bicubic")
        x = (x + positions).flatten(2).transpose(1, 2)
        first = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        x = torch.cat([first, x], 1)
        taps = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in TAPS:
                patches = self.norm(x)[:, 1:].transpose(1, 2)
                taps.append(patches.reshape(len(x), WIDTH, *size))
        return taps


class ResidualUnit(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(FEATURES, FEATURES, 3, padding=1)
        self.conv2 = nn.Conv2d(FEATURES, FEATURES, 3, padding=1)

    def forward(self, x):
        """[n, FEATURES, h, w] -> the same."""
        return x + self.conv2(functional.relu(self.conv1(functional.relu(x))))


class Fusion(nn.Module):
    """Adds a level, refines, enlarges."""

    def __init__(self, has_level):
        super().__init__()
        if has_level:
            self.unit1 = ResidualUnit()
        self.unit2 = ResidualUnit()
        self.project = nn.Conv2d(FEATURES, FEATURES, 1)

    def forward(self, x, level, size):
        """Adds `level` to x, where there is one, and returns [n, FEATURES, *size]."""
        if level is not None:
            x = x + self.unit1(level)
        return self.project(enlarge(self.unit2(x), size))


def enlarge(x, size):
    """Resizes bilinearly with aligned corners, as the published network does."""
    return functional.interpolate(x, tuple(size), mode="bilinear", align_corners=True)


class DPT(nn.Module):
    """The head of UniMatch V2, without its classifier."""

    def __init__(self):
        super().__init__()
        for i, width in enumerate(LEVELS, 1):
            setattr(self, f"project{i}", nn.Conv2d(WIDTH, width, 1))
            setattr(self, f"level{i}", nn.Conv2d(width, FEATURES, 3, padding=1, bias=False))
            setattr(self, f"fusion{i}", Fusion(has_level=i < 4))
        self.enlarge1 = nn.ConvTranspose2d(LEVELS[0], LEVELS[0], 4, 4)
        self.enlarge2 = nn.ConvTranspose2d(LEVELS[1], LEVELS[1], 2, 2)
        self.shrink4 = nn.Conv2d(LEVELS[3], LEVELS[3], 3, 2, 1)
        self.output = nn.Conv2d(FEATURES, FEATURES, 3, padding=1)

    def forward(self, taps):
        """Four times [n, WIDTH, h, w] -> [n, FEATURES, 8 h, 8 w]."""
        resizers = (self.enlarge1, self.enlarge2, nn.Identity(), self.shrink4)
        levels = [
            getattr(self, f"level{i}")(resize(getattr(self, f"project{i}")(tap)))
            for i, (tap, resize) in enumerate(zip(taps, resizers, strict=True), 1)
        ]
        x, level = levels[3], None
        for i in (4, 3, 2, 1):
            size = levels[i - 2].shape[2:] if i > 1 else [2 * n for n in levels[0].shape[2:]]
            x = getattr(self, f"fusion{i}")(x, level, size)
            level = levels[i - 2]
        return functional.relu(self.output(x))


class DINOv2WithDPT(nn.Module):
    """The whole network; `is_frozen`: the backbone has no gradient."""

    def __init__(self, classes, is_frozen):
        super().__init__()
        self.backbone, self.dpt = Backbone(), DPT()
        self.classifier = nn.Conv2d(FEATURES, classes, 1)
        self.is_frozen = is_frozen
        self.backbone.requires_grad_(not is_frozen)
        for name, values in (("mean", MEAN), ("std", STD)):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)

    def forward(self, images):
        """uint8 [n, 3, h, w] -> logits [n, classes, h, w]."""
        x = (images.float() - self.mean) / self.std
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.is_frozen):
            taps = self.backbone(x)
        return enlarge(self.classifier(self.dpt(taps)), x.shape[2:])


def to_state(weights):
    """The state dict from arrays under our names, such as "backbone.block_0.fc1.kernel"."""
    state, fused = {}, {}
    for name, value in weights.items():
        tensor = torch.from_numpy(np.ascontiguousarray(_transposed(name, value)))
        name = name.replace("backbone.block_", "backbone.blocks.").replace(".attention.", ".")
        name = name.replace(".gamma", "").replace(".kernel", ".weight").replace(".scale", ".weight")
        name = name.replace(".weight1", ".scale1").replace(".weight2", ".scale2")
        layer, _, leaf = name.rpartition(".")
        owner, _, part = layer.rpartition(".")
        if part in ("query", "key", "value"):
            fused.setdefault(f"{owner}.qkv.{leaf}", {})[part] = tensor
        else:
            state[name] = tensor
    for name, parts in fused.items():
        state[name] = torch.cat([parts[part] for part in ("query", "key", "value")])
    return state


def _transposed(name, value):
    if not name.endswith(".kernel"):
        return value
    if value.ndim == 2:
        return value.T
    # A transposed convolution has its inputs first.
    return value.transpose(2, 3, 0, 1) if ".enlarge" in name else value.transpose(3, 2, 0, 1)
