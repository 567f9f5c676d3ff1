"""The worker of `train_step.py`: the same networks and step in PyTorch, in its own environment.

    python train_step_peer.py FOLDER THREADS

FOLDER contains BACKBONE.npz, parameters under our names ("backbone.stem.conv.kernel"), and
BATCH.npz with uint8 `images` [n, h, w, 3] and `labels` [n, h, w]. The worker prints one line of
JSON with its version, then answers each line {"backbone", "batch", "steps", "frozen", "contiguous"}
with {"seconds", "cpu_seconds", "loss"}, where the loss is that of the first step, until its input
ends. It imports only PyTorch, NumPy, the standard library, and vit_peer.py beside it.
"""

import json
import pathlib
import sys
import time

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from vit_peer import DINOv2WithDPT, to_state

STAGES = (  # blocks, kernel, stride, expansion, channels
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class ConvNorm(nn.Module):
    """Convolution, batch norm, activation."""

    def __init__(
        self, inputs, outputs, kernel=1, stride=1, dilation=1, groups=1, act=None, eps=1e-3
    ):
        super().__init__()
        # For sizes of the form 32 n + 1, TensorFlow's SAME padding is equal on both sides.
        padding = dilation * (kernel - 1) // 2
        self.conv = nn.Conv2d(
            inputs, outputs, kernel, stride, padding, dilation, groups, bias=False
        )
        self.norm = nn.BatchNorm2d(outputs, eps=eps, momentum=0.1)
        self.act = act

    def forward(self, x):
        """[n, inputs, h, w] -> [n, outputs, h', w']."""
        x = self.norm(self.conv(x))
        return self.act(x) if self.act else x


def relu6():
    """Returns the activation of EfficientNet-Lite0."""
    return nn.ReLU6(inplace=True)


class Block(nn.Module):
    """Inverted residual block."""

    def __init__(self, inputs, outputs, kernel, expand, stride, dilation):
        super().__init__()
        width = inputs * expand
        self.expand = ConvNorm(inputs, width, act=relu6()) if expand != 1 else nn.Identity()
        self.depthwise = ConvNorm(width, width, kernel, stride, dilation, width, relu6())
        self.project = ConvNorm(width, outputs)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x):
        """[n, inputs, h, w] -> [n, outputs, h', w']."""
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.residual else y


class EfficientNetLite(nn.Module):
    """EfficientNet-Lite0 with output stride 16."""

    low_features, high_features = 24, 320
    mean, std = (127.0, 127.0, 127.0), (128.0, 128.0, 128.0)

    def __init__(self):
        super().__init__()
        self.stem = ConvNorm(3, 32, 3, 2, act=relu6())
        self.names, inputs, stride, dilation = [], 32, 2, 1
        for depth, kernel, step, expand, width in STAGES:
            first_dilation = dilation
            if stride * step > 16:
                dilation, step = dilation * step, 1
            stride *= step
            for i in range(depth):
                self.names.append(f"block_{len(self.names)}")
                options = (step, first_dilation) if i == 0 else (1, dilation)
                self.add_module(self.names[-1], Block(inputs, width, kernel, expand, *options))
                inputs = width

    def forward(self, x):
        """[n, 3, h, w] -> features at stride 4 and 16."""
        x, low = self.stem(x), None
        for name in self.names:
            x = getattr(self, name)(x)
            if name == "block_2":
                low = x
        return low, x


def relu():
    """Returns the activation of ResNet, Xception and the head."""
    return nn.ReLU(inplace=True)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions with a shortcut."""

    def __init__(self, inputs, width, stride, dilation):
        super().__init__()
        self.conv1 = ConvNorm(inputs, width, act=relu())
        self.conv2 = ConvNorm(width, width, 3, stride, dilation, act=relu())
        self.conv3 = ConvNorm(width, 4 * width)
        same = stride == 1 and inputs == 4 * width
        self.shortcut = nn.Identity() if same else ConvNorm(inputs, 4 * width, stride=stride)

    def forward(self, x):
        """[n, inputs, h, w] -> [n, 4 * width, h', w']."""
        y = self.conv3(self.conv2(self.conv1(x)))
        return functional.relu(y + self.shortcut(x), inplace=True)


class ResNet50(nn.Module):
    """ResNet-50 with output stride 16."""

    low_features, high_features = 256, 2048
    mean, std = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)

    def __init__(self):
        super().__init__()
        self.stem = ConvNorm(3, 64, 7, 2, act=relu())
        inputs, self.stages = 64, []
        # Blocks, stride of the first block, dilation of the other blocks.
        for number, (depth, stride, dilation) in enumerate(
            ((3, 1, 1), (4, 2, 1), (6, 2, 1), (3, 1, 2))
        ):
            width = 64 * 2**number
            self.stages.append([f"stage{number + 1}_block{i + 1}" for i in range(depth)])
            for i, name in enumerate(self.stages[-1]):
                options = (stride, 1) if i == 0 else (1, dilation)
                self.add_module(name, Bottleneck(inputs, width, *options))
                inputs = 4 * width

    def forward(self, x):
        """[n, 3, h, w] -> features at stride 4 and 16."""
        x = functional.max_pool2d(self.stem(x), 3, 2, 1)
        low = None
        for names in self.stages:
            for name in names:
                x = getattr(self, name)(x)
            low = x if low is None else low
        return low, x


class Separable(nn.Module):
    """Depthwise 3x3 and 1x1 convolution; the defaults are those of the head."""

    def __init__(self, inputs, outputs, dilation=1, stride=1, act=relu, eps=1e-5):
        super().__init__()
        self.depthwise = ConvNorm(inputs, inputs, 3, stride, dilation, inputs, act(), eps)
        self.pointwise = ConvNorm(inputs, outputs, act=act(), eps=eps)

    def forward(self, x):
        """[n, inputs, h, w] -> [n, outputs, h', w']."""
        return self.pointwise(self.depthwise(x))


class XceptionBlock(nn.Module):
    """Three separable convolutions.

    With `residual`, a ReLU precedes each and a shortcut is added; without, the ReLUs are inside.
    """

    def __init__(self, inputs, features, stride=1, dilation=1, residual=True):
        super().__init__()
        self.residual = residual
        same = stride == 1 and inputs == features[2]
        if residual and not same:
            self.shortcut = ConvNorm(inputs, features[2], stride=stride)
        elif residual:
            self.shortcut = nn.Identity()
        for i, outputs in enumerate(features):
            options = (dilation, stride if i == 2 else 1, (lambda: None) if residual else relu)
            self.add_module(f"separable{i + 1}", Separable(inputs, outputs, *options, eps=1e-3))
            inputs = outputs

    def forward(self, x):
        """[n, inputs, h, w] -> [n, outputs, h', w'], and the input of the last convolution."""
        y = x
        for name in ("separable1", "separable2", "separable3"):
            inner = y
            y = getattr(self, name)(functional.relu(y) if self.residual else y)
        return (y + self.shortcut(x) if self.residual else y), inner


class Xception65(nn.Module):
    """DeepLab's Xception-65 with output stride 16."""

    low_features, high_features = 256, 2048
    mean, std = (127.5, 127.5, 127.5), (127.5, 127.5, 127.5)

    def __init__(self):
        super().__init__()
        self.stem1 = ConvNorm(3, 32, 3, 2, act=relu())
        self.stem2 = ConvNorm(32, 64, 3, act=relu())
        self.names, inputs = [], 64
        for i, features in enumerate((128, 256, 728)):
            self._add(f"entry_block{i + 1}", XceptionBlock(inputs, (features,) * 3, 2))
            inputs = features
        for i in range(16):
            self._add(f"middle_block{i + 1}", XceptionBlock(728, (728,) * 3))
        self._add("exit_block1", XceptionBlock(728, (728, 1024, 1024)))
        last = XceptionBlock(1024, (1536, 1536, 2048), dilation=2, residual=False)
        self._add("exit_block2", last)

    def _add(self, name, block):
        self.names.append(name)
        self.add_module(name, block)

    def forward(self, x):
        """[n, 3, h, w] -> features at stride 4 and 16."""
        x, low = self.stem2(self.stem1(x)), None
        for name in self.names:
            x, inner = getattr(self, name)(x)
            if name == "entry_block2":
                low = inner
        return low, x


BACKBONES = {
    "efficientnet_lite0": EfficientNetLite,
    "resnet50": ResNet50,
    "xception65": Xception65,
}


def head_conv(inputs, outputs, **options):
    """Returns a convolution of the head, with its ReLU and the epsilon of its norms."""
    return ConvNorm(inputs, outputs, act=relu(), eps=1e-5, **options)


def resize(x, size):
    """Resizes to (height, width), bilinear with half-pixel centres."""
    return functional.interpolate(x, size, mode="bilinear", align_corners=False)


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling."""

    def __init__(self, inputs, features):
        super().__init__()
        self.point = head_conv(inputs, features)
        self.atrous1, self.atrous2, self.atrous3 = (
            Separable(inputs, features, rate) for rate in (6, 12, 18)
        )
        self.image_pooling = head_conv(inputs, features)
        self.project = head_conv(5 * features, features)

    def forward(self, x):
        """[n, inputs, h, w] -> [n, features, h, w]."""
        pooled = self.image_pooling(x.mean((2, 3), keepdim=True))
        branches = [self.point(x), self.atrous1(x), self.atrous2(x), self.atrous3(x)]
        return self.project(torch.cat([*branches, resize(pooled, x.shape[2:])], 1))


class DeepLabV3Plus(nn.Module):
    """DeepLabV3+; submodules have our names."""

    def __init__(self, backbone, classes):
        super().__init__()
        self.backbone = BACKBONES[backbone]()
        self.aspp = ASPP(self.backbone.high_features, 256)
        self.low = head_conv(self.backbone.low_features, 48)
        self.decoder1 = Separable(304, 256)
        self.decoder2 = Separable(256, 256)
        self.classifier = nn.Conv2d(256, classes, 1)
        for name in ("mean", "std"):
            values = torch.tensor(getattr(self.backbone, name)).view(1, 3, 1, 1)
            self.register_buffer(f"{name}_buffer", values, persistent=False)

    def forward(self, images):
        """uint8 [n, 3, h, w] -> logits [n, classes, h, w]."""
        return self.logits(self.normalize(images))

    def normalize(self, images):
        """uint8 [n, 3, h, w] -> float32 of the same shape."""
        return (images.float() - self.mean_buffer) / self.std_buffer

    def logits(self, x):
        """Normalised images [n, 3, h, w] -> logits [n, classes, h, w]."""
        low, high = self.backbone(x)
        low = self.low(low)
        y = torch.cat([resize(self.aspp(high), low.shape[2:]), low], 1)
        return resize(self.classifier(self.decoder2(self.decoder1(y))), x.shape[2:])


def load(model, weights):
    """Loads every parameter from arrays under our names.

    Raises:
        ValueError: names are missing or unexpected.
    """
    leaves = {"kernel": "weight", "scale": "weight", "bias": "bias"}
    state = {}
    for name, value in weights.items():
        layer, _, leaf = name.rpartition(".")
        value = value.transpose(3, 2, 0, 1) if leaf == "kernel" else value
        state[f"{layer}.{leaves[leaf]}"] = torch.from_numpy(np.ascontiguousarray(value))
    missing, unexpected = model.load_state_dict(state, strict=False)
    missing = [name for name in missing if "running" not in name and "tracked" not in name]
    if missing or unexpected:
        raise ValueError(f"another network: missing {missing}, unexpected {unexpected}")


class Trainer:
    """Trains a network on one batch."""

    def __init__(self, folder, backbone, batch, is_frozen, is_contiguous):
        weights = np.load(folder / f"{backbone}.npz")
        batch = np.load(folder / f"{batch}.npz")
        classes = len(weights["classifier.bias"])
        if backbone.startswith("dinov2"):
            self.model = DINOv2WithDPT(classes, is_frozen)
            self.model.load_state_dict(to_state(weights))
        else:
            self.model = DeepLabV3Plus(backbone, classes)
            load(self.model, weights)
        layout = torch.contiguous_format if is_contiguous else torch.channels_last
        self.model.to(memory_format=layout).train()
        self.optimizer = self._make_optimizer(backbone)
        # A view in channels_last.
        self.images = torch.from_numpy(batch["images"]).permute(0, 3, 1, 2)
        if is_contiguous:
            self.images = self.images.contiguous()
        self.labels = torch.from_numpy(batch["labels"])

    def _make_optimizer(self, backbone):
        """The optimiser of our recipe: AdamW on a vision transformer, else SGD."""
        if backbone.startswith("dinov2"):
            trained = [p for p in self.model.parameters() if p.requires_grad]
            return torch.optim.AdamW(trained, lr=5e-6, weight_decay=0.01, fused=True)
        kernels = [p for p in self.model.parameters() if p.ndim == 4]
        others = [p for p in self.model.parameters() if p.ndim != 4]
        return torch.optim.SGD(
            [{"params": kernels, "weight_decay": 1e-4}, {"params": others}],
            lr=0.01,
            momentum=0.9,
            fused=True,
        )

    def step(self):
        """Runs one step and returns its loss."""
        self.optimizer.zero_grad(set_to_none=True)
        logits = self.model(self.images)
        loss = functional.cross_entropy(logits, self.labels.long(), ignore_index=255)
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def main(folder, threads):
    """Answers requests until its input ends."""
    torch.set_num_threads(int(threads))
    case, trainer = None, None
    print(json.dumps({"torch": torch.__version__, "threads": torch.get_num_threads()}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            wanted = tuple(request[k] for k in ("backbone", "batch", "frozen", "contiguous"))
            if case != wanted:
                # One trainer at a time: the largest networks fill the memory of a laptop.
                case, trainer = wanted, None
                trainer = Trainer(pathlib.Path(folder), *case)
            wall, cpu = time.perf_counter(), time.process_time()
            losses = [trainer.step() for _ in range(request["steps"])]
            answer = {
                "seconds": time.perf_counter() - wall,
                "cpu_seconds": time.process_time() - cpu,
                "loss": float(losses[0]),
            }
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
