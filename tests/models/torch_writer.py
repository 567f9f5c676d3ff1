"""Writes files as torch.save does, byte by byte, so that tests can also write hostile ones."""

import io
import pickle
import struct
import zipfile

import numpy as np

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
STORAGES = {"f4": "FloatStorage", "f8": "DoubleStorage", "f2": "HalfStorage", "i8": "LongStorage"}


def ops(value):
    """Returns the instructions that push a value of strings, numbers, tuples, lists and dicts."""
    return pickle.dumps(value, 2)[2:-1]


def name_ops(name):
    """Returns the instruction that pushes a global, such as "os system"."""
    return b"c" + name.replace(" ", "\n").encode() + b"\n"


def call_ops(name, *arguments):
    """Returns the instructions that call a global with arguments, given as instructions."""
    return name_ops(name) + b"(" + b"".join(arguments) + b"tR"


def storage_ops(key, numel, storage="torch FloatStorage", *rest):
    """Returns the instructions that push a storage."""
    kind, tail = ops("storage"), b"".join(map(ops, (key, "cpu", numel, *rest)))
    return b"(" + kind + name_ops(storage) + tail + b"tQ"


def tensor_ops(storage, size, stride, offset=0):
    """Returns the instructions that push a tensor, given those that push its storage."""
    hooks = call_ops("collections OrderedDict")
    view = (ops(offset), ops(size), ops(stride), ops(False), hooks)
    return call_ops("torch._utils _rebuild_tensor_v2", storage, *view)


def state_pickle(items):
    """Returns the pickle of a state dict, given the instructions that push its values."""
    pairs = b"".join(ops(name) + value for name, value in items.items())
    return b"\x80\x02" + call_ops("collections OrderedDict") + b"(" + pairs + b"u."


def zip_file(content, buffers=(), order="little", compression=zipfile.ZIP_STORED):
    """Returns a file of the newer format, given its pickle and the bytes of its storages."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/byteorder", order)
        for key, buffer in dict(buffers).items():
            archive.writestr(f"archive/data/{key}", buffer)
    return file.getvalue()


def stream_file(content, buffers=(), item_size=4):
    """Returns a file of the older format; see `zip_file`."""
    parts = [pickle.dumps(value, 2) for value in (MAGIC, PROTOCOL, {"little_endian": True})]
    parts += [content, pickle.dumps(list(dict(buffers)), 2)]
    for buffer in dict(buffers).values():
        parts += [struct.pack("<q", len(buffer) // item_size), buffer]
    return b"".join(parts)


def state_file(arrays, write=zip_file):
    """Returns a file with the state dict of contiguous arrays."""
    items, buffers = {}, {}
    for i, (name, array) in enumerate(arrays.items()):
        strides = tuple(s // array.itemsize for s in np.ascontiguousarray(array).strides)
        storage = f"torch {STORAGES[array.dtype.str[1:]]}"
        items[name] = tensor_ops(storage_ops(str(i), array.size, storage), array.shape, strides)
        buffers[str(i)] = array.tobytes()
    return write(state_pickle(items), buffers)
