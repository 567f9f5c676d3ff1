"""Readers of weight files: tensors by name. No reader executes code from a file."""

import dataclasses
import functools
import io
import json
import math
import re
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from etils import epath

from semiseg_jax.models import torch_files
from semiseg_jax.runtime import fileio, rules
from semiseg_jax.runtime.errors import UserError, first_line, read_error

# Names of counters and of optimiser variables, which are not weights.
NO_WEIGHT = re.compile(
    r"num_batches_tracked$|(^|/)(global_step|Momentum|ExponentialMovingAverage)$"
)

# Dtypes of safetensors; NumPy has no bfloat16 and no float8.
_SAFETENSORS_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "I64": np.int64,
    "U64": np.uint64,
    "I32": np.int32,
    "U32": np.uint32,
    "I16": np.int16,
    "U16": np.uint16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
    "C64": np.complex64,
}


@dataclasses.dataclass(frozen=True)
class File:
    """The tensors of a file by name, and the description in its header, {} if it has none."""

    tensors: Mapping[str, np.ndarray]
    description: Mapping[str, Any]


# The largest compression of a file with more than this many bytes of tensors. Weights hardly
# shrink, while a file of zeros, which would fill the memory, shrinks to a thousandth.
_MAX_COMPRESSION, _FREE_BYTES = 64, 2**28


_TORCH_SUFFIXES = (".pth", ".pt")


def read(path: epath.PathLike) -> File:
    """Reads a file.

    Args:
        path: a .npz, .safetensors, .pth or .pt file, or the prefix of a TensorFlow checkpoint. Of a
            PyTorch file that holds several state dicts, one is chosen by its key, as in
            best.pth/model_ema.

    Raises:
        UserError: the file is missing or damaged, has none of these formats, or holds more than
            tensors.
    """
    return _call_reader(path, _READERS)


def read_header(path: epath.PathLike) -> File:
    """Reads the names, shapes and dtypes of a file's tensors, and its description.

    The tensors of the result are zeros that take no memory. Of a .npz or .safetensors file or a
    TensorFlow checkpoint, only the header is read: a truncated file raises an error, but a tensor
    with damaged content does not. A PyTorch file is read as a whole, once while it is unchanged.

    Args:
        path: see `read`.

    Raises:
        UserError: see `read`.
    """
    return _call_reader(path, _HEADER_READERS)


def parts(path: epath.PathLike) -> list[epath.Path]:
    """Returns the files that a path stands for: itself, or those of a TensorFlow checkpoint."""
    path, _ = _split_entry(epath.Path(path))
    prefix = _checkpoint_prefix(path)
    if prefix is None:
        return [path]
    return [*sorted(prefix.parent.glob(f"{prefix.name}.data-*")), epath.Path(f"{prefix}.index")]


def _split_entry(path: epath.Path) -> tuple[epath.Path, str]:
    """Returns the file and the key of a path such as best.pth/model_ema; "" for no key."""
    if path.parent.suffix in _TORCH_SUFFIXES and path.parent.is_file():
        return path.parent, path.name
    return path, ""


def _checkpoint_prefix(path: epath.Path) -> epath.Path | None:
    """Returns the prefix of a TensorFlow checkpoint; None for another file."""
    prefix = path.with_suffix("") if path.suffix == ".index" else path
    return prefix if epath.Path(f"{prefix}.index").exists() else None


def _call_reader(path: epath.PathLike, readers: Mapping[str, Callable[[epath.Path], File]]) -> File:
    """Calls the reader for the format of the path, and turns its errors into UserErrors."""
    path = epath.Path(path)
    file, entry = _split_entry(path)
    if entry:
        file_format = file.suffix
    elif prefix := _checkpoint_prefix(path):
        path, file_format = prefix, "tensorflow"
    elif path.suffix in readers:
        file_format = path.suffix
    else:
        raise UserError(
            f"{path} is neither .npz, .safetensors or .pth nor the prefix of a TensorFlow "
            "checkpoint: save the weights as one of them.",
            code="weights-format-unknown",
        )
    try:
        for part in parts(path):
            fileio.require_regular(part)
        return readers[file_format](path)
    except FileNotFoundError as error:
        raise UserError(
            f"{path} is missing: correct the path to the weights, or leave model.pretrained empty.",
            code="weights-missing",
        ) from error
    except PermissionError as error:
        raise read_error(path, error, "make it readable") from error
    except UserError:
        raise
    # The readers of NumPy, zipfile, PyTorch and TensorFlow raise many types for damaged content.
    except Exception as error:
        raise UserError(
            f"{path} cannot be read ({first_line(error)}): it is truncated, corrupt or no such "
            "file; get it again.",
            code="weights-damaged",
        ) from error


def _placeholder(shape: tuple[int, ...], dtype: np.typing.DTypeLike) -> np.ndarray:
    """Returns a read-only array of zeros that all share one element of memory."""
    return np.broadcast_to(np.zeros((), dtype), shape)


def _read_npz(path: epath.Path) -> File:
    content = path.read_bytes()
    names = _read_npz_members(io.BytesIO(content))
    # Without pickles: loading a pickle executes code from the file.
    with np.load(io.BytesIO(content), allow_pickle=False) as archive:
        return File({name: archive[name] for name in names}, {})


def _read_npz_header(path: epath.Path) -> File:
    with path.open("rb") as file:
        return File(_read_npz_members(file), {})


def _read_npz_members(file: Any) -> dict[str, np.ndarray]:
    """Returns placeholders for the arrays of a .npz archive by name, and checks their sizes."""
    with zipfile.ZipFile(file) as archive:
        placeholders = {
            member.filename.removesuffix(".npy"): _npy_placeholder(archive, member)
            for member in archive.infolist()
        }
        compressed = sum(member.compress_size for member in archive.infolist())
    expanded = sum(tensor.nbytes for tensor in placeholders.values())
    if expanded > max(_FREE_BYTES, _MAX_COMPRESSION * compressed):
        raise ValueError(f"{compressed} bytes would expand to {expanded}")
    return placeholders


def _npy_placeholder(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    """Returns a placeholder for the array in one member of a .npz archive."""
    with archive.open(info) as member:
        if np.lib.format.read_magic(member) == (1, 0):
            shape, _, dtype = np.lib.format.read_array_header_1_0(member)
        else:
            shape, _, dtype = np.lib.format.read_array_header_2_0(member)
    if dtype.hasobject:
        raise ValueError("Object arrays cannot be loaded when allow_pickle=False")
    # Compared before anything of the declared size is allocated.
    size = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or size > info.file_size:
        raise ValueError(f"{info.filename} declares {shape} in {info.file_size} bytes")
    return _placeholder(shape, dtype)


def _numpy_lacks(path: epath.Path, dtype: str) -> UserError:
    return UserError(
        f"{path} holds tensors of type {dtype}, which NumPy does not have: save them as float32.",
        code="weights-dtype-unsupported",
    )


def _read_safetensors(path: epath.Path) -> File:
    content = path.read_bytes()
    try:
        tensors = safetensors.numpy.load(content)
    except KeyError as error:
        raise _numpy_lacks(path, error.args[0]) from error
    header, _ = _parse_safetensors_header(io.BytesIO(content))
    return File(tensors, _safetensors_description(header))


def _read_safetensors_header(path: epath.Path) -> File:
    with path.open("rb") as file:
        header, data_size = _parse_safetensors_header(file)
    tensors = {}
    spans = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape, (first, last) = entry["dtype"], entry["shape"], entry["data_offsets"]
        except (KeyError, TypeError) as error:
            raise ValueError(f"the header has no dtype, shape and offsets of {name}") from error
        if dtype not in _SAFETENSORS_DTYPES:
            raise _numpy_lacks(path, dtype)
        if not all(rules.is_integer(n, 0, 2**48) for n in (*shape, first, last)):
            raise ValueError(f"the header has impossible numbers for {name}")
        if math.prod(shape) * np.dtype(_SAFETENSORS_DTYPES[dtype]).itemsize != last - first:
            raise ValueError(f"{name} has another size than its shape {shape}")
        tensors[name] = _placeholder(tuple(shape), _SAFETENSORS_DTYPES[dtype])
        spans.append((first, last))
    end = 0
    for first, last in sorted(spans):
        if first != end:
            raise ValueError(f"the tensors overlap or leave a gap at byte {min(first, end)}")
        end = last
    if end != data_size:
        raise ValueError(f"{data_size} bytes of tensors instead of {end}")
    return File(tensors, _safetensors_description(header))


def _parse_safetensors_header(file: Any) -> tuple[dict[str, Any], int]:
    """Returns the header, and the size of the data after it in bytes.

    The format is the length of the header in 8 bytes, the header in JSON, and the data.
    """
    length = int.from_bytes(file.read(8), "little")
    file.seek(0, io.SEEK_END)
    total = file.tell()  # TensorFlow's files, for remote paths, return nothing from `seek`.
    if total < 8 + length:
        raise ValueError("the header is incomplete")
    file.seek(8)
    header = json.loads(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("the header is not a JSON object")
    return header, total - 8 - length


def _safetensors_description(header: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the description that `checkpoints.save_weights` puts into the metadata."""
    description = json.loads(header.get("__metadata__", {}).get("description", "{}"))
    if not isinstance(description, dict):
        raise ValueError("the description in the header is not a JSON object")
    return description


def _read_torch(path: epath.Path) -> File:
    file, entry = _split_entry(path)
    try:
        return File(torch_files.read(file.read_bytes(), entry), {})
    except torch_files.UnsafeFileError as error:
        raise UserError(
            f"{path} holds more than tensors ({error}), and is not read, because reading it could "
            "execute code: save the model's state_dict() alone, best as .safetensors.",
            code="torch-weights-unsafe",
        ) from error


def _read_torch_header(path: epath.Path) -> File:
    status = _split_entry(path)[0].stat()
    return _cached_torch_header(path, status.length, status.mtime)


@functools.lru_cache(maxsize=8)
def _cached_torch_header(path: epath.Path, length: int, mtime: int) -> File:
    """Reads the whole file, because PyTorch's format has no separate header.

    `length` and `mtime` are part of the cache's key: a changed file is read again.
    """
    del length, mtime
    tensors = _read_torch(path).tensors
    return File({name: _placeholder(t.shape, t.dtype) for name, t in tensors.items()}, {})


def _read_tensorflow(path: epath.Path) -> File:
    return _read_checkpoint(path, lambda reader, name: reader.get_tensor(name))


def _read_tensorflow_header(path: epath.Path) -> File:
    def placeholder(reader: Any, name: str) -> np.ndarray:
        shape = tuple(reader.get_variable_to_shape_map()[name])
        return _placeholder(shape, reader.get_variable_to_dtype_map()[name].as_numpy_dtype)

    return _read_checkpoint(path, placeholder)


def _read_checkpoint(path: epath.Path, tensor: Callable[[Any, str], np.ndarray]) -> File:
    """Reads a TensorFlow checkpoint.

    Args:
        path: prefix of the checkpoint.
        tensor: returns a tensor, given the checkpoint's reader and the name.
    """
    # Imported here, because files of the other formats do not need TensorFlow.
    from tensorflow.errors import OpError
    from tensorflow.train import load_checkpoint

    try:
        reader = load_checkpoint(str(path))
        names = reader.get_variable_to_shape_map()
        tensors = {name: tensor(reader, name) for name in names if not NO_WEIGHT.search(name)}
    except OpError as error:
        raise ValueError(error.message) from error
    return File(tensors, {})


_READERS = {
    ".npz": _read_npz,
    ".safetensors": _read_safetensors,
    ".pth": _read_torch,
    ".pt": _read_torch,
    "tensorflow": _read_tensorflow,
}
_HEADER_READERS = {
    ".npz": _read_npz_header,
    ".safetensors": _read_safetensors_header,
    ".pth": _read_torch_header,
    ".pt": _read_torch_header,
    "tensorflow": _read_tensorflow_header,
}
