"""Writes the fixtures of vision transformers and ConvNeXt, as make_fixtures.py the others.

    python tests/models/make_vit_fixtures.py [--sizes=518x518,518x532] [--folder=F] [NAME …]

It needs a separate environment with NumPy, torch 2.13.0 and timm 1.0.31. The transformers are
timm's; the interpolation of positions by the rule of DINOv2's own code, and the DPT head with the
names of UniMatch V2's checkpoints, are written out here with PyTorch's own functions.
"""

import argparse
import functools
import importlib.metadata
import json
import pathlib

import numpy as np
import reference_weights
import timm
import torch
from timm.models.convnext import ConvNeXt
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn.functional import interpolate, relu

FOLDER = pathlib.Path(__file__).parent / "fixtures"
CLASSES = 5
TINY = {"embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 0, "dynamic_img_size": True}
# (blocks that the head reads, features, widths of the levels)
SMALL_HEAD = ((2, 5, 8, 11), 64, (48, 96, 192, 384))
TINY_HEAD = ((0, 1, 2, 3), 8, (4, 8, 8, 16))


def dinov2(name):
    """timm's network, whose positions are 37x37."""
    if name.startswith("tiny"):
        return VisionTransformer(img_size=518, patch_size=14, init_values=1.0, **TINY)
    return timm.create_model("vit_small_patch14_dinov2", dynamic_img_size=True)


def dinov3(name):
    """timm's network."""
    if not name.startswith("tiny"):
        return timm.create_model("vit_small_patch16_dinov3", num_classes=0)
    return Eva(
        img_size=256,
        patch_size=16,
        qkv_bias=False,
        init_values=1e-5,
        rope_type="dinov3",
        rope_temperature=100,
        rope_rotate_half=True,
        use_rot_pos_emb=True,
        use_abs_pos_emb=False,
        num_reg_tokens=4,
        use_fc_norm=False,
        norm_layer=functools.partial(nn.LayerNorm, eps=1e-5),
        **TINY,
    )


def convnext(name, stride):
    """timm's network; its features are those of the stages."""
    if not name.startswith("tiny"):
        return timm.create_model(name, output_stride=stride)
    widths, depths = (8, 16, 16, 24), (1, 1, 2, 1)
    return ConvNeXt(dims=widths, depths=depths, num_classes=0, output_stride=stride)


def original_positions(embedding, size):
    """Interpolates [1, 37 * 37, c] to [1, h * w, c] by the rule of DINOv2's own code."""
    side, channels = round(embedding.shape[1] ** 0.5), embedding.shape[2]
    if size == (side, side):
        return embedding
    grid = embedding.reshape(1, side, side, channels).permute(0, 3, 1, 2)
    factors = tuple((n + 0.1) / side for n in size)
    grid = interpolate(grid, scale_factor=factors, mode="bicubic")
    assert grid.shape[2:] == size
    return grid.flatten(2).transpose(1, 2)


def original_blocks(model, x):
    """The results of all blocks of timm's network, with positions by the original rule."""
    x = model.patch_embed.proj(x)
    size = tuple(x.shape[2:])
    x = x.flatten(2).transpose(1, 2) + original_positions(model.pos_embed[:, 1:], size)
    x = torch.cat([model.cls_token + model.pos_embed[:, :1], x], dim=1)
    results = []
    for block in model.blocks:
        x = block(x)
        results.append(x)
    return results


def timm_blocks(model, x):
    """The results of all blocks, as timm computes them."""
    results = []
    hooks = [b.register_forward_hook(lambda m, i, y: results.append(y)) for b in model.blocks]
    model.forward_features(x)
    for hook in hooks:
        hook.remove()
    return results


class ResidualUnit(nn.Module):
    """Two 3x3 convolutions, each behind a ReLU."""

    def __init__(self, features):
        super().__init__()
        self.conv1 = nn.Conv2d(features, features, 3, padding=1)
        self.conv2 = nn.Conv2d(features, features, 3, padding=1)

    def forward(self, x):
        return x + self.conv2(relu(self.conv1(relu(x))))


class Fusion(nn.Module):
    """Adds a level, refines, enlarges, and then projects."""

    def __init__(self, features):
        super().__init__()
        self.out_conv = nn.Conv2d(features, features, 1)
        self.resConfUnit1 = ResidualUnit(features)
        self.resConfUnit2 = ResidualUnit(features)

    def forward(self, x, level, size):
        if level is not None:
            x = x + self.resConfUnit1(level)
        x = self.resConfUnit2(x)
        return self.out_conv(interpolate(x, size, mode="bilinear", align_corners=True))


class Head(nn.Module):
    """The DPT head, with the names of the published checkpoints."""

    def __init__(self, width, features, levels):
        super().__init__()
        self.projects = nn.ModuleList(nn.Conv2d(width, level, 1) for level in levels)
        self.resize_layers = nn.ModuleList(
            [
                nn.ConvTranspose2d(levels[0], levels[0], 4, stride=4),
                nn.ConvTranspose2d(levels[1], levels[1], 2, stride=2),
                nn.Identity(),
                nn.Conv2d(levels[3], levels[3], 3, stride=2, padding=1),
            ]
        )
        self.scratch = nn.Module()
        for i, level in enumerate(levels, 1):
            conv = nn.Conv2d(level, features, 3, padding=1, bias=False)
            setattr(self.scratch, f"layer{i}_rn", conv)
            setattr(self.scratch, f"refinenet{i}", Fusion(features))
        self.scratch.output_conv = nn.Sequential(
            nn.Conv2d(features, features, 3, padding=1), nn.ReLU(), nn.Conv2d(features, CLASSES, 1)
        )

    def forward(self, levels):
        resized = []
        for i, level in enumerate(levels):
            x = self.resize_layers[i](self.projects[i](level))
            resized.append(getattr(self.scratch, f"layer{i + 1}_rn")(x))
        x = None
        for i in (3, 2, 1, 0):
            below = resized[i - 1].shape[2:] if i else tuple(2 * n for n in resized[0].shape[2:])
            fusion = getattr(self.scratch, f"refinenet{i + 1}")
            x = fusion(resized[3], None, below) if x is None else fusion(x, resized[i], below)
        return self.scratch.output_conv(x)


class Network(nn.Module):
    """DINOv2 and the DPT head; and a linear head of the last features, with weights of its own."""

    def __init__(self, name):
        super().__init__()
        self.backbone = dinov2(name)
        self.taps, features, levels = TINY_HEAD if name.startswith("tiny") else SMALL_HEAD
        self.head = Head(self.backbone.embed_dim, features, levels)

    def forward(self, x):
        size = tuple(x.shape[2:])
        sides = tuple(int(n / 14 + 0.5) * 14 for n in size)
        if sides != size:
            x = interpolate(x, sides, mode="bilinear", align_corners=True)
        blocks = original_blocks(self.backbone, x)
        grid = tuple(n // 14 for n in sides)
        levels = [
            self.backbone.norm(blocks[i])[:, 1:].transpose(1, 2).unflatten(2, grid)
            for i in self.taps
        ]
        weight = reference_weights.drawn("classifier.weight", (CLASSES, levels[-1].shape[1], 1, 1))
        bias = reference_weights.drawn("classifier.bias", (CLASSES,))
        linear = nn.functional.conv2d(levels[-1], torch.from_numpy(weight), torch.from_numpy(bias))
        return {"dpt": self._to(self.head(levels), sides, size), "linear": linear}

    def _to(self, logits, sides, size):
        logits = interpolate(logits, sides, mode="bilinear", align_corners=True)
        if sides != size:
            logits = interpolate(logits, size, mode="bilinear", align_corners=True)
        return logits


def run(model, x):
    """Returns the outputs of a reference by name, channels last."""
    if isinstance(model, Network):
        return {key: value.permute(0, 2, 3, 1) for key, value in model(x).items()}
    if isinstance(model, ConvNeXt):
        low = model.stages[0](model.stem(x))
        high = model.stages[3](model.stages[2](model.stages[1](low)))
        return {"low": low.permute(0, 2, 3, 1), "high": high.permute(0, 2, 3, 1)}
    rules = {"timm": timm_blocks}
    if isinstance(model, VisionTransformer):
        rules["original"] = original_blocks
    outputs = {}
    for rule, blocks in rules.items():
        for i, block in enumerate(blocks(model, x)):
            outputs[f"{rule}/block_{i}"] = block
    return outputs


NETWORKS = {
    "timm_tiny_dinov2": (dinov2, ((98, 98), (112, 70))),
    "timm_dinov2_vits14": (dinov2, ((98, 98), (112, 70))),
    "timm_tiny_dinov3": (dinov3, ((96, 96), (128, 80), (256, 384))),
    "timm_dinov3_vits16": (dinov3, ((96, 96), (128, 80))),
    **{
        f"timm{stride}_{name}": (functools.partial(convnext, stride=stride), ((64, 96),))
        for name in ("tiny_convnext", "convnext_tiny")
        for stride in (8, 16, 32)
    },
    "unimatch_tiny_dinov2": (Network, ((98, 98), (112, 70), (100, 75))),
    "unimatch_dinov2_vits14": (Network, ((98, 98), (112, 70))),
}
# Grids of patches for 518x518, 518x532, 546x602, 98x98 and 112x70.
GRIDS = ((37, 37), (37, 38), (39, 43), (7, 7), (8, 5))


def write(path, arrays, **about):
    """Writes a fixture with the versions of the packages."""
    versions = {package: importlib.metadata.version(package) for package in ("torch", "timm")}
    text = json.dumps({"versions": versions, **about}).encode()
    np.savez_compressed(path, **arrays, about=np.frombuffer(text, np.uint8))


def make(folder, name, make_network, sizes):
    """Writes the fixture of a network."""
    model = make_network(name.partition("_")[2]).eval()
    state = model.state_dict()
    drawn = {k: torch.from_numpy(reference_weights.drawn(k, v.shape)) for k, v in state.items()}
    model.load_state_dict(drawn)
    arrays = {}
    for size in sizes:
        x = torch.from_numpy(reference_weights.image(*size)).permute(0, 3, 1, 2)
        with torch.inference_mode():
            outputs = run(model, x)
        for output, value in outputs.items():
            key = f"{size[0]}x{size[1]}/{output}"
            value = value.numpy()
            arrays[key] = reference_weights.sampled(value)
            arrays[f"{key}/max"] = np.abs(value).max()
            arrays[f"{key}/shape"] = np.array(value.shape)
        print(name, key, value.shape, f"max {np.abs(value).max():.3g} sd {value.std():.3g}")
    write(
        folder / f"{name}.npz",
        arrays,
        parameters=sum(p.numel() for p in model.parameters()),
        shapes={k: list(v.shape) for k, v in state.items()},
    )


def make_positions(folder):
    """Writes interpolated positions: PyTorch's interpolate, by both rules."""
    embedding = torch.from_numpy(reference_weights.drawn("pos_embed", (1, 37 * 37, 3)))
    arrays = {}
    for size in GRIDS:
        key = f"{size[0]}x{size[1]}"
        arrays[f"original/{key}"] = original_positions(embedding, size)[0]
        grid = embedding.reshape(1, 37, 37, 3).permute(0, 3, 1, 2)
        resized = interpolate(grid, size, mode="bicubic", antialias=True)
        arrays[f"timm/{key}"] = resized.flatten(2).transpose(1, 2)[0]
    sampled = {key: reference_weights.sampled(value.numpy()) for key, value in arrays.items()}
    write(folder / "positions.npz", sampled)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", default="")
    parser.add_argument("--folder", type=pathlib.Path, default=FOLDER)
    parser.add_argument("names", nargs="*")
    arguments = parser.parse_args()
    given = [tuple(map(int, size.split("x"))) for size in arguments.sizes.split(",") if size]
    if not arguments.names:
        make_positions(arguments.folder)
    for name in arguments.names or NETWORKS:
        make_network, sizes = NETWORKS[name]
        make(arguments.folder, name, make_network, given or sizes)
