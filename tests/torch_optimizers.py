"""What torch.optim computes in 20 steps on a small tree: the inputs, and the committed results.

    python tests/torch_optimizers.py

writes fixtures/torch_optimizers.json; the environment needs NumPy and torch.
"""

import functools
import json
import pathlib

import numpy as np

FILE = pathlib.Path(__file__).parent / "fixtures" / "torch_optimizers.json"
STEPS = 20
# The steps after which parameters are compared.
COMPARED = (1, 2, 20)
RATE, POWER, HEAD_MULTIPLIER, DECAY = 0.05, 0.9, 10.0, 0.1
MOMENTUM, BETAS, EPSILON = 0.9, (0.9, 0.999), 1e-8
SHAPES = {
    "backbone/conv/kernel": (2, 3),
    "backbone/norm/scale": (3,),
    "classifier/kernel": (3, 2),
    "classifier/bias": (2,),
}
# The name of the optimiser, and whether every parameter is decayed.
CASES = {
    "sgd": ("sgd", False),
    "adam": ("adam", False),
    "adamw": ("adamw", False),
    "adamw, all decayed": ("adamw", True),
}


def parameters():
    """The parameters before the first step, by path, float64."""
    rng = np.random.default_rng(0)
    return {path: rng.normal(size=shape) for path, shape in SHAPES.items()}


def gradients(step):
    """The gradients of a step; some are 0, and their sizes differ by powers of ten."""
    rng = np.random.default_rng(step + 1)
    return {
        path: 10.0 ** rng.integers(-4, 2, shape)
        * rng.normal(size=shape)
        * (rng.random(shape) > 0.1)
        for path, shape in SHAPES.items()
    }


@functools.cache
def fixture():
    """By case: the parameters after each of the compared steps, all in one list."""
    return json.loads(FILE.read_text())["parameters"]


def run(kind, decay_all):
    """Returns what a fixture has of a case."""
    import torch

    tensors = {p: torch.tensor(v, requires_grad=True) for p, v in parameters().items()}
    factors = {path: 1.0 if path.startswith("backbone") else HEAD_MULTIPLIER for path in SHAPES}
    groups = [
        {
            "params": [tensor],
            "weight_decay": DECAY if decay_all or path.endswith("kernel") else 0.0,
            "path": path,
        }
        for path, tensor in tensors.items()
    ]
    if kind == "sgd":
        optimizer = torch.optim.SGD(groups, lr=RATE, momentum=MOMENTUM)
    else:
        make = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[kind]
        optimizer = make(groups, lr=RATE, betas=BETAS, eps=EPSILON)
    after = []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = RATE * factors[group["path"]] * (1 - step / STEPS) ** POWER
        for path, gradient in gradients(step).items():
            tensors[path].grad = torch.tensor(gradient)
        optimizer.step()
        if step + 1 in COMPARED:
            after.append([x for t in tensors.values() for x in t.detach().flatten().tolist()])
    return after


if __name__ == "__main__":
    import torch

    results = {name: run(*case) for name, case in CASES.items()}
    FILE.write_text(
        json.dumps({"torch": torch.__version__, "parameters": results}, indent=1) + "\n"
    )
