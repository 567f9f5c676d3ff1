"""Reader of the files that torch.save writes: state dicts, without PyTorch.

Both formats hold a pickle that describes the tensors, and the numbers apart from it: a zip archive
(since PyTorch 1.6), and an older stream of pickles with the numbers behind them. A pickle is a
program, which Python's own unpickler runs with the file's choice of functions. This reader
interprets its instructions itself: it knows those that build dicts, lists, tuples, strings and
numbers, and `_GLOBALS`, the names that a state dict needs. A name from the file is compared and
never imported or called. Every other instruction or name refuses the file.
"""

import dataclasses
import io
import math
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

# The magic number and the version at the start of the older format.
_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001

# By class of storage: the dtype of the numbers. NumPy has no bfloat16: its bits are read as
# integers, and become float32.
_DTYPES = {
    "DoubleStorage": "f8",
    "FloatStorage": "f4",
    "HalfStorage": "f2",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "i8",
    "IntStorage": "i4",
    "ShortStorage": "i2",
    "CharStorage": "i1",
    "ByteStorage": "u1",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "c8",
    "ComplexDoubleStorage": "c16",
}
_READ_AS = {"bfloat16": "u2", "bool": "u1"}

# How often the tensors of a file may use its numbers, on average.
_MAX_SHARING = 8

# Dicts with this name around a state dict, as training scripts save it.
_WRAPPERS = ("state_dict", "model")


class UnsafeFileError(Exception):
    """A file holds more than tensors, containers, strings and numbers; the message names it."""


@dataclasses.dataclass(frozen=True)
class _Global:
    """A name that the pickle refers to, such as torch._utils._rebuild_tensor_v2; only a name."""

    name: str


@dataclasses.dataclass(frozen=True)
class _Storage:
    """The numbers of one or more tensors; `start` and `numel` count elements of `dtype`."""

    key: str
    dtype: str
    start: int
    numel: int

    @property
    def read_as(self) -> np.dtype:
        """NumPy's dtype of the bits, without a byte order."""
        return np.dtype(_READ_AS.get(self.dtype, self.dtype))

    @property
    def item_size(self) -> int:
        """Bytes per element."""
        return self.read_as.itemsize


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """A view of a storage; offset and strides count elements."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.size)


def read(content: bytes, entry: str = "") -> dict[str, np.ndarray]:
    """Returns the tensors of a state dict, also of one under the key "state_dict" or "model".

    Args:
        content: of the file.
        entry: key of the state dict, for files with several; "" for one of these keys.

    Returns:
        The tensors by name: views of `content`, read-only; bfloat16 becomes float32.

    Raises:
        UnsafeFileError: the file holds something else than tensors, or would call it.
        ValueError: the file is damaged, has another format, or holds no state dict.
    """
    try:
        if content[:4] == b"PK\x03\x04":
            return _read_zip(content, entry)
        return _read_stream(content, entry)
    except (
        # What the standard library raises for damaged archives and pickles. The reader's own code
        # raises LookupError and TypeError where the pickle's stack is not as it expects.
        *(zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError),
        *(RuntimeError, LookupError, TypeError, OverflowError),
    ) as error:
        raise ValueError(f"it is no state dict that torch.save wrote: {error!r}") from error


def _read_zip(content: bytes, entry: str) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        # torch.save stores without compression: entries larger than the file are an attack.
        if sum(entry.file_size for entry in archive.infolist()) > len(content):
            raise ValueError("its parts are larger than the file")
        (pickle_name,) = [n for n in archive.namelist() if n.split("/", 1)[-1] == "data.pkl"]
        prefix = pickle_name.removesuffix("data.pkl")
        order = "little"
        if f"{prefix}byteorder" in archive.namelist():
            order = archive.read(f"{prefix}byteorder").decode()
        if order not in ("little", "big"):
            raise ValueError(f"its byte order is {order!r}")
        value = _Machine().run(io.BytesIO(archive.read(pickle_name)))
        tensors = _find_state_dict(value, entry)
        keys = {tensor.storage.key for tensor in tensors.values()}
        buffers = {key: archive.read(f"{prefix}data/{key}") for key in keys}
    return _build_all(tensors, buffers, order, len(content))


def _read_stream(content: bytes, entry: str) -> dict[str, np.ndarray]:
    file = io.BytesIO(content)
    if not content.startswith(b"\x80") or _Machine().run(file) != _MAGIC:
        raise ValueError("it has neither of the formats of torch.save")
    if _Machine().run(file) != _PROTOCOL:
        raise ValueError("it has another version of the format")
    _Machine().run(file)  # Sizes of types on the machine that wrote it; the format fixes them.
    machine = _Machine()
    tensors = _find_state_dict(machine.run(file), entry)
    keys = _Machine().run(file)
    position = file.tell()
    buffers = {}
    for key in keys:
        # The numbers are little-endian on every machine, after their count in 8 bytes.
        (count,) = struct.unpack_from("<q", content, position)
        position += 8
        end = position + count * machine.storages[key].item_size
        if not position <= end <= len(content):
            raise ValueError("it ends inside its tensors")
        buffers[key] = memoryview(content)[position:end]
        position = end
    return _build_all(tensors, buffers, "little", len(content))


def _find_state_dict(value: Any, entry: str) -> Mapping[str, _Tensor]:
    if entry:
        if not isinstance(value, dict) or not isinstance(value.get(entry), dict):
            names = [k for k, v in value.items() if isinstance(v, dict)] if value else []
            raise ValueError(f"it holds no state dict {entry}, but {names or 'no other either'}")
        value = value[entry]
    else:
        for wrapper in _WRAPPERS:
            value = value.get(wrapper, value) if isinstance(value, dict) else value
    if not isinstance(value, dict) or not all(
        isinstance(key, str) and isinstance(tensor, _Tensor) for key, tensor in value.items()
    ):
        raise ValueError("it holds no state dict")
    return value


def _build_all(
    tensors: Mapping[str, _Tensor], buffers: Mapping[str, Any], order: str, file_size: int
) -> dict[str, np.ndarray]:
    # Tensors may share numbers, but a small file must not fill the memory.
    if sum(t.numel * t.storage.item_size for t in tensors.values()) > _MAX_SHARING * file_size:
        raise ValueError("its tensors are larger than the file")
    return {name: _build(t, buffers[t.storage.key], order) for name, t in tensors.items()}


def _build(tensor: _Tensor, buffer: bytes | memoryview, order: str) -> np.ndarray:
    """Returns a tensor as a view of its storage's bytes, in the byte order of this machine.

    Raises:
        ValueError: the tensor reaches beyond its storage, or repeats elements of it.
    """
    storage = tensor.storage
    dtype = storage.read_as.newbyteorder("<" if order == "little" else ">")
    sides = list(zip(tensor.size, tensor.stride, strict=True))
    if not tensor.numel:
        array = np.zeros(tensor.size, dtype)
    else:
        first = storage.start + tensor.offset
        end = first + sum((n - 1) * stride for n, stride in sides) + 1
        limit = min(storage.start + storage.numel, len(buffer) // dtype.itemsize)
        if end > limit or tensor.numel > storage.numel:
            raise ValueError(f"a tensor of shape {list(tensor.size)} reaches beyond its numbers")
        elements = np.frombuffer(buffer, dtype, end - first, first * dtype.itemsize)
        # The stride along a side of 1 is without effect, and may be any number.
        strides = [stride * dtype.itemsize if n > 1 else 0 for n, stride in sides]
        array = np.lib.stride_tricks.as_strided(elements, tensor.size, strides, writeable=False)
    if storage.dtype == "bfloat16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    if storage.dtype == "bool":
        return array != 0
    return array.astype(dtype.newbyteorder("="), copy=False)


def _is_count(value: Any) -> bool:
    # Not isinstance: True is an int.
    return type(value) is int and value >= 0


def _are_counts(value: Any) -> bool:
    return isinstance(value, tuple) and all(map(_is_count, value))


def _rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> _Tensor:
    # The other arguments are requires_grad, hooks and metadata.
    if (
        not isinstance(storage, _Storage)
        or not _is_count(offset)
        or not _are_counts(size)
        or not _are_counts(stride)
        or len(size) != len(stride)
    ):
        raise ValueError("a tensor has no storage, offset, size and strides")
    return _Tensor(storage, offset, size, stride)


def _rebuild_parameter(tensor: Any, *_: Any) -> _Tensor:
    if not isinstance(tensor, _Tensor):
        raise ValueError("a parameter has no tensor")
    return tensor


def _ordered_dict(pairs: Any = ()) -> dict[Any, Any]:
    items: dict[Any, Any] = {}
    for key, value in pairs:
        _set_item(items, key, value)
    return items


def _set_item(items: Any, key: Any, value: Any) -> None:
    # Hashing a tuple in a tuple in a tuple … would exhaust the stack of the interpreter.
    if not isinstance(items, dict) or not isinstance(key, str | int):
        raise ValueError("a dict has keys that are neither strings nor numbers")
    items[key] = value


class _NumPyValue:
    """Stands for a scalar of NumPy, such as the best score in a checkpoint; it has no content."""


def _numpy_value(*_: Any) -> _NumPyValue:
    return _NumPyValue()


# The names that a state dict may refer to, and what stands for the function of that name.
_GLOBALS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _ordered_dict,
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    # A scalar is a call with its dtype and its bytes, which in turn are a call with text.
    "numpy.core.multiarray.scalar": _numpy_value,
    "numpy._core.multiarray.scalar": _numpy_value,
    "numpy.dtype": _numpy_value,
    "_codecs.encode": _numpy_value,
}
_STORAGES = {f"{module}.{name}": name for module in ("torch", "torch.cuda") for name in _DTYPES}


class _Machine:
    """Interprets the instructions of one pickle.

    Attributes:
        storages: that the pickle refers to, by key.
    """

    def __init__(self) -> None:
        self.storages: dict[str, _Storage] = {}
        self._stack: list[Any] = []
        self._outer: list[list[Any]] = []  # the stacks below each mark
        self._memo: dict[int, Any] = {}
        # Entries that dicts may copy from lists, so that a small file cannot fill the memory.
        self._copies_left = 0

    def run(self, file: io.BytesIO) -> Any:
        """Returns the value of a pickle, and leaves the file behind it.

        Raises:
            UnsafeFileError: an instruction or a name is not in the tables.
            ValueError, LookupError, TypeError: the pickle is damaged.
        """
        self._copies_left = len(file.getbuffer())
        for opcode, argument, _ in pickletools.genops(file):
            if opcode.name == "STOP":
                break
            if opcode.name in _VALUES:
                self._stack.append(argument)
            elif opcode.name in _CONSTANTS:
                self._stack.append(_CONSTANTS[opcode.name]())
            elif opcode.name in _INSTRUCTIONS:
                _INSTRUCTIONS[opcode.name](self, argument)
            elif opcode.name not in ("PROTO", "FRAME"):
                raise UnsafeFileError(f"the pickle instruction {opcode.name}")
        (value,) = self._stack
        if self._outer:
            raise ValueError("the pickle ends inside a container")
        return value

    def _mark(self, _: Any) -> None:
        self._outer.append(self._stack)
        self._stack = []

    def _pop_mark(self) -> list[Any]:
        items = self._stack
        self._stack = self._outer.pop()
        return items

    def _put(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    def _memoize(self, _: Any) -> None:
        self._put(len(self._memo))

    def _get(self, index: int) -> None:
        self._stack.append(self._memo[index])

    def _tuple(self, _: Any) -> None:
        items = tuple(self._pop_mark())
        self._stack.append(items)

    def _short_tuple(self, length: int) -> None:
        items = [self._stack.pop() for _ in range(length)]
        self._stack.append(tuple(reversed(items)))

    def _append(self, _: Any) -> None:
        value = self._stack.pop()
        self._extend([value])

    def _appends(self, _: Any) -> None:
        self._extend(self._pop_mark())

    def _extend(self, values: list[Any]) -> None:
        target = self._stack[-1]
        if not isinstance(target, list):
            raise ValueError("the pickle appends to something that is no list")
        target.extend(values)

    def _set_item(self, _: Any) -> None:
        value = self._stack.pop()
        key = self._stack.pop()
        _set_item(self._stack[-1], key, value)

    def _set_items(self, _: Any) -> None:
        items = self._pop_mark()
        for key, value in zip(items[::2], items[1::2], strict=True):
            _set_item(self._stack[-1], key, value)

    def _global(self, name: str) -> None:
        name = ".".join(name.split(" ", 1))
        if name not in _GLOBALS and name not in _STORAGES:
            raise UnsafeFileError(name)
        self._stack.append(_Global(name))

    def _stack_global(self, _: Any) -> None:
        name = self._stack.pop()
        module = self._stack.pop()
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("the name of a global is no string")
        self._global(f"{module} {name}")

    def _reduce(self, _: Any) -> None:
        arguments = self._stack.pop()
        function = self._stack.pop()
        if not isinstance(arguments, tuple):
            raise ValueError("the arguments of a call are no tuple")
        if not isinstance(function, _Global) or function.name not in _GLOBALS:
            raise UnsafeFileError("a call of an unknown function")
        self._copies_left -= sum(len(a) for a in arguments if isinstance(a, list))
        if self._copies_left < 0:
            raise ValueError("its dicts are larger than the file")
        self._stack.append(_GLOBALS[function.name](*arguments))

    def _build(self, _: Any) -> None:
        # PyTorch sets an attribute of the state dict, the versions of its modules; NumPy the byte
        # order of a dtype.
        self._stack.pop()
        if not isinstance(self._stack[-1], dict | _NumPyValue):
            raise UnsafeFileError("an object with attributes")

    def _persistent(self, _: Any) -> None:
        """Pushes the storage that ("storage", class, key, device, numel[, view]) describes."""
        kind, storage, key, _, numel, *rest = self._stack.pop()
        if kind != "storage":
            raise UnsafeFileError(f"the source of a {kind}" if isinstance(kind, str) else "code")
        name = _STORAGES.get(storage.name) if isinstance(storage, _Global) else None
        if name is None or not isinstance(key, str) or not _is_count(numel):
            raise ValueError("a storage has no class, key and size")
        start = 0
        if rest and rest[0] is not None:
            _, start, numel = rest[0]
            if not _is_count(start) or not _is_count(numel):
                raise ValueError("a part of a storage has no start and size")
        value = _Storage(key, _DTYPES[name], start, numel)
        if self.storages.setdefault(key, value).item_size != value.item_size:
            raise ValueError("a storage has two types")
        self._stack.append(value)


# Instructions that push their own argument.
_VALUES = {
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINSTRING", "SHORT_BINSTRING"),
}
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
}
_INSTRUCTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "MARK": _Machine._mark,
    "BINPUT": _Machine._put,
    "LONG_BINPUT": _Machine._put,
    "MEMOIZE": _Machine._memoize,
    "BINGET": _Machine._get,
    "LONG_BINGET": _Machine._get,
    "TUPLE": _Machine._tuple,
    "TUPLE1": lambda machine, _: machine._short_tuple(1),
    "TUPLE2": lambda machine, _: machine._short_tuple(2),
    "TUPLE3": lambda machine, _: machine._short_tuple(3),
    "APPEND": _Machine._append,
    "APPENDS": _Machine._appends,
    "SETITEM": _Machine._set_item,
    "SETITEMS": _Machine._set_items,
    "GLOBAL": _Machine._global,
    "STACK_GLOBAL": _Machine._stack_global,
    "REDUCE": _Machine._reduce,
    "BUILD": _Machine._build,
    "BINPERSID": _Machine._persistent,
}
