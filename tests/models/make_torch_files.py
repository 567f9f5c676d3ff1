"""Writes fixtures/torch_*.pth: small state dicts by torch.save, and their values as .npz.

    python tests/models/make_torch_files.py

It needs a separate environment with NumPy and torch; the files here are of torch 2.14.1. `zip` and
`stream` are the two formats of torch.save, `training` is the checkpoint of a training script.
"""

import collections
import pathlib

import numpy as np
import torch

FOLDER = pathlib.Path(__file__).parent / "fixtures"
DTYPES = (
    *("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8"),
    *("bool", "complex64", "complex128"),
)


def tensors():
    """Returns tensors of every dtype and kind of view, by name."""
    base = torch.arange(24, dtype=torch.float32)
    values = {f"dtype.{name}": (base[:6] - 2).to(getattr(torch, name)) for name in DTYPES}
    values |= {
        "shared.whole": base,
        "shared.part": base[5:17].view(3, 4),
        "shared.strided": base[::2],
        "transposed": torch.arange(24.0).reshape(2, 3, 4).permute(2, 0, 1),
        "channels_last": torch.arange(48.0)
        .reshape(2, 2, 3, 4)
        .to(memory_format=torch.channels_last),
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0, 4),
        "parameter": torch.nn.Parameter(torch.arange(3.0)),
    }
    return collections.OrderedDict(values)


def numpy(tensor):
    """Returns a tensor as an array; bfloat16 as float32."""
    tensor = tensor.detach()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def training_checkpoint():
    """Returns a checkpoint with the state of an optimiser, after a step."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 3), torch.nn.BatchNorm2d(2))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model(torch.ones(1, 3, 8, 8)).sum().backward()
    optimizer.step()
    return {
        "epoch": 3,
        "state_dict": model.state_dict(),
        "best": torch.tensor(71.5),
        "optimizer": optimizer.state_dict(),
    }


if __name__ == "__main__":
    state, checkpoint = tensors(), training_checkpoint()
    torch.save(state, FOLDER / "torch_zip.pth")
    torch.save(state, FOLDER / "torch_stream.pth", _use_new_zipfile_serialization=False)
    torch.save(checkpoint, FOLDER / "torch_training.pth")
    np.savez_compressed(FOLDER / "torch_tensors.npz", **{k: numpy(v) for k, v in state.items()})
    np.savez_compressed(
        FOLDER / "torch_training.npz", **{k: numpy(v) for k, v in checkpoint["state_dict"].items()}
    )
