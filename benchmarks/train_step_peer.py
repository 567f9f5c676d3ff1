"""The worker of `train_step.py`: the same network and step in PyTorch, in its own environment.

    python train_step_peer.py FOLDER THREADS

FOLDER holds weights.npz, parameters under our names ("backbone.stem.conv.kernel"), and for each
case CASE.npz with uint8 `images` [n, h, w, 3] and `labels` [n, h, w]. The worker prints a line of
JSON with its version, then answers each line {"case", "steps"} with {"seconds", "cpu_seconds",
"loss"}, the loss being that of the first of the steps, until its input ends. It imports nothing but
PyTorch, NumPy and the standard library.
"""

import json
import pathlib
import sys
import time

import numpy as np
import torch
from torch import nn
from torch.nn import functional

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
        # For sizes of the form 32 n + 1, TensorFlow's SAME padding is alike on both sides.
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
    """Of the backbone."""
    return nn.ReLU6(inplace=True)


class Block(nn.Module):
    """Inverted residual."""

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


class Backbone(nn.Module):
    """EfficientNet-Lite0 with output stride 16."""

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


def head_conv(inputs, outputs, **options):
    """Of the head: ReLU, and the epsilon of its norms."""
    return ConvNorm(inputs, outputs, act=nn.ReLU(inplace=True), eps=1e-5, **options)


class Separable(nn.Module):
    """Depthwise 3x3 and 1x1."""

    def __init__(self, inputs, outputs, dilation=1):
        super().__init__()
        self.depthwise = head_conv(inputs, inputs, kernel=3, dilation=dilation, groups=inputs)
        self.pointwise = head_conv(inputs, outputs)

    def forward(self, x):
        """[n, inputs, h, w] -> [n, outputs, h, w]."""
        return self.pointwise(self.depthwise(x))


def resize(x, size):
    """Bilinear, half-pixel centres."""
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
    """The network; names as ours."""

    def __init__(self, classes):
        super().__init__()
        self.backbone = Backbone()
        self.aspp = ASPP(320, 256)
        self.low = head_conv(24, 48)
        self.decoder1 = Separable(304, 256)
        self.decoder2 = Separable(256, 256)
        self.classifier = nn.Conv2d(256, classes, 1)

    def forward(self, images):
        """uint8 [n, 3, h, w] -> logits [n, classes, h, w]."""
        low, high = self.backbone((images.float() - 127) / 128)
        low = self.low(low)
        y = torch.cat([resize(self.aspp(high), low.shape[2:]), low], 1)
        return resize(self.classifier(self.decoder2(self.decoder1(y))), images.shape[2:])


def load(model, weights):
    """Fills every parameter from arrays under our names."""
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
    """Network, optimiser and one batch."""

    def __init__(self, folder, case):
        weights = np.load(folder / "weights.npz")
        batch = np.load(folder / f"{case}.npz")
        self.model = DeepLabV3Plus(len(weights["classifier.bias"]))
        load(self.model, weights)
        self.model.to(memory_format=torch.channels_last).train()
        kernels = [p for p in self.model.parameters() if p.ndim == 4]
        others = [p for p in self.model.parameters() if p.ndim != 4]
        self.optimizer = torch.optim.SGD(
            [{"params": kernels, "weight_decay": 1e-4}, {"params": others}],
            lr=0.01,
            momentum=0.9,
            fused=True,
        )
        # A view in channels_last.
        self.images = torch.from_numpy(batch["images"]).permute(0, 3, 1, 2)
        self.labels = torch.from_numpy(batch["labels"])

    def step(self):
        """One step; its loss."""
        self.optimizer.zero_grad(set_to_none=True)
        logits = self.model(self.images)
        loss = functional.cross_entropy(logits, self.labels.long(), ignore_index=255)
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def main(folder, threads):
    """Answers requests until the input ends."""
    torch.set_num_threads(int(threads))
    trainers = {}
    print(json.dumps({"torch": torch.__version__, "threads": torch.get_num_threads()}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        case = request["case"]
        try:
            if case not in trainers:
                trainers[case] = Trainer(pathlib.Path(folder), case)
            wall, cpu = time.perf_counter(), time.process_time()
            losses = [trainers[case].step() for _ in range(request["steps"])]
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
