"""Files of weights: what is in them by name, and nothing in them is run."""

import dataclasses
import importlib
import io
import json
import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from etils import epath

from semiseg_jax.errors import UserError, unread

# Names of counters and of optimisers' variables, which are no weights.
NO_WEIGHT = re.compile(
    r"num_batches_tracked$|(^|/)(global_step|Momentum|ExponentialMovingAverage)$"
)


@dataclasses.dataclass(frozen=True)
class File:
    """A file's tensors by name, and the description in its header, if it has one."""

    tensors: Mapping[str, np.ndarray]
    description: Mapping[str, Any]


_DAMAGED = (
    OSError,
    EOFError,
    ValueError,
    zipfile.BadZipFile,
    zlib.error,
    safetensors.SafetensorError,
)


def read(path: epath.PathLike) -> File:
    """The tensors of a file.

    Args:
        path: a .npz, .safetensors, .pth or .pt file, or the prefix of a TensorFlow checkpoint.

    Raises:
        UserError: it is missing, damaged, or of none of these kinds, or needs torch.
    """
    path = epath.Path(path)
    readers = {".npz": _read_npz, ".safetensors": _read_safetensors}
    readers |= dict.fromkeys((".pth", ".pt"), _read_torch)
    prefix = path.with_suffix("") if path.suffix == ".index" else path
    if epath.Path(f"{prefix}.index").exists():
        path, reader = prefix, _read_tensorflow
    elif path.suffix in readers:
        reader = readers[path.suffix]
    else:
        raise UserError(
            f"{path} is neither .npz, .safetensors or .pth nor the prefix of a TensorFlow "
            "checkpoint: save the weights as one of them."
        )
    try:
        return reader(path)
    except FileNotFoundError as error:
        raise UserError(
            f"{path} is missing: correct the path to the weights, or leave model.pretrained empty."
        ) from error
    except PermissionError as error:
        raise unread(path, error, "make it readable") from error
    except _DAMAGED as error:
        raise UserError(
            f"{path} cannot be read ({error}): it is truncated, corrupt or no such file; get it "
            "again."
        ) from error


def _read_npz(path: epath.Path) -> File:
    # Without pickles: they run what they hold.
    archive = np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise ValueError("one array instead of an archive of arrays")
    return File({name: archive[name] for name in archive.files}, {})


def _read_safetensors(path: epath.Path) -> File:
    content = path.read_bytes()
    try:
        tensors = safetensors.numpy.load(content)
    except KeyError as error:
        raise UserError(
            f"{path} holds tensors of type {error.args[0]}, which NumPy does not have: save them "
            "as float32."
        ) from error
    # The header, sound if the tensors could be read: its length in 8 bytes, then JSON.
    (length,) = struct.unpack("<Q", content[:8])
    metadata = json.loads(content[8 : 8 + length]).get("__metadata__", {})
    return File(tensors, json.loads(metadata.get("description", "{}")))


def _read_torch(path: epath.Path) -> File:
    """A state dict, by PyTorch's own reader, which with weights_only runs nothing of the file."""
    content = io.BytesIO(path.read_bytes())
    try:
        torch = importlib.import_module("torch")
    except ImportError as error:
        raise UserError(
            f"{path} can be read only where torch is installed; convert it there with python -c "
            '"import sys, torch, safetensors.torch as s; '
            "w = torch.load(sys.argv[1], weights_only=True, map_location='cpu'); "
            's.save_file({k: v.contiguous() for k, v in w.items()}, sys.argv[2])" '
            f"{path.name} {path.stem}.safetensors, and give that file."
        ) from error
    try:
        state = torch.load(content, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} holds more than tensors, which reading would run, or is damaged: save the "
            "model's state_dict() alone, best as .safetensors."
        ) from error
    except (RuntimeError, LookupError) as error:
        # PyTorch's of an archive that is cut off, and its unpickler's of what is no pickle.
        raise ValueError(str(error).partition(". ")[0]) from error
    for wrapper in ("state_dict", "model"):
        state = state.get(wrapper, state) if isinstance(state, Mapping) else state
    if not isinstance(state, Mapping) or not all(hasattr(v, "numpy") for v in state.values()):
        raise ValueError("it holds no state dict")
    return File({name: _from_torch(value, torch) for name, value in state.items()}, {})


def _from_torch(value: Any, torch: Any) -> np.ndarray:
    """A tensor or parameter as NumPy's array; bfloat16, which NumPy does not have, as float32."""
    return (value.float() if value.dtype == torch.bfloat16 else value).detach().numpy()


def _read_tensorflow(path: epath.Path) -> File:
    # Imported here: files of the other kinds do not need it.
    from tensorflow.errors import OpError
    from tensorflow.train import load_checkpoint

    try:
        reader = load_checkpoint(str(path))
        names = reader.get_variable_to_shape_map()
        tensors = {name: reader.get_tensor(name) for name in names if not NO_WEIGHT.search(name)}
    except OpError as error:
        raise ValueError(error.message) from error
    return File(tensors, {})
