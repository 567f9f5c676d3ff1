"""Files of torch.save: those of PyTorch itself, damaged ones, and those of an attacker.

fixtures/torch_*.pth are written by PyTorch (make_torch_files.py).
"""

import pickle
import random
import sys
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

from semiseg_jax.models import torch_files, weight_files
from semiseg_jax.runtime.errors import UserError
from tests.errors import raises_code
from tests.models.torch_writer import (
    call_ops,
    name_ops,
    ops,
    state_file,
    state_pickle,
    storage_ops,
    stream_file,
    tensor_ops,
    zip_file,
)

FIXTURES = Path(__file__).parent / "fixtures"
FORMATS = {"zip": zip_file, "stream": stream_file}
EIGHT = np.arange(8, dtype="f4").tobytes()
WHOLE = storage_ops("0", 8)


@pytest.mark.parametrize(
    ("file", "values"),
    [("zip", "tensors"), ("stream", "tensors"), ("training", "training")],
)
def test_tensors_equal_those_that_pytorch_saved(file, values):
    tensors = weight_files.read(FIXTURES / f"torch_{file}.pth").tensors
    with np.load(FIXTURES / f"torch_{values}.npz") as expected:
        assert list(tensors) == expected.files
        for name, array in expected.items():
            assert tensors[name].dtype == array.dtype, name
            np.testing.assert_array_equal(tensors[name], array, err_msg=name)


def test_numbers_of_a_big_endian_machine():
    content = state_pickle({"a": tensor_ops(WHOLE, (2, 3), (4, 1), 1)})
    file = zip_file(content, {"0": np.arange(8, dtype=">f4").tobytes()}, order="big")
    (tensor,) = torch_files.read(file).values()
    assert tensor.dtype == np.float32 and tensor.dtype.isnative
    np.testing.assert_array_equal(tensor, [[1, 2, 3], [5, 6, 7]])


def test_a_view_of_an_old_storage_starts_inside_it():
    storage = storage_ops("0", 8, "torch FloatStorage", ("view", 2, 4))
    content = state_pickle({"a": tensor_ops(storage, (3,), (1,), 1)})
    np.testing.assert_array_equal(
        torch_files.read(stream_file(content, {"0": EIGHT}))["a"], [3, 4, 5]
    )


def test_a_dict_of_python_2_is_made_from_pairs():
    pairs = b"](" + b"](" + ops("a") + tensor_ops(WHOLE, (8,), (1,)) + b"ee"
    content = b"\x80\x02" + call_ops("collections OrderedDict", pairs) + b"."
    np.testing.assert_array_equal(
        torch_files.read(stream_file(content, {"0": EIGHT}))["a"], range(8)
    )


# ---- files of an attacker

CALLED = "semiseg_hostile_call"


class Reduced:
    """Pickles as a call."""

    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


def pickled_calls():
    """Pickles of every protocol whose unpickling runs code, by name."""
    import os
    import subprocess

    audit = Reduced(getattr, (Reduced(__import__, ("sys",)), "audit"))
    calls = {
        "os.system": Reduced(os.system, (f"echo {CALLED}",)),
        "eval": Reduced(eval, (f"__import__('sys').audit('{CALLED}')",)),
        "exec": Reduced(exec, (f"import sys; sys.audit('{CALLED}')",)),
        "audit": Reduced(sys.audit, (CALLED,)),
        "getattr": audit,
        "Popen": Reduced(subprocess.Popen, (("echo", CALLED),)),
        "map": Reduced(list, (Reduced(map, (audit, (CALLED,))),)),
        "import": Reduced(__import__, ("antigravity",)),
        "bytearray": Reduced(bytearray, (1 << 40,)),
        "pickle.loads": Reduced(pickle.loads, (pickle.dumps(Reduced(sys.audit, (CALLED,))),)),
        "state": Reduced(dict, (), {"__class__": 1}),
        "object": Path("/etc/passwd"),
    }
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        for name, value in calls.items():
            yield f"{name}-{protocol}", pickle.dumps(value, protocol)
            yield f"{name}-{protocol}-in-a-dict", pickle.dumps({"a": value}, protocol)


def written_calls():
    """Pickles that Python's pickler would not write."""
    audit = b"(" + ops(CALLED) + b"t"
    yield "instance", b"(" + ops(CALLED) + b"isys\naudit\n."
    yield "object", b"(" + name_ops("sys audit") + ops(CALLED) + b"o."
    yield "new object", b"\x80\x02" + name_ops("sys audit") + audit + b"\x81."
    yield "stack global", b"\x80\x04" + ops("sys") + ops("audit") + b"\x93" + audit + b"R."
    yield "extension", b"\x80\x02\x82\x01."
    yield (
        "attribute of a known name",
        b"\x80\x04" + ops("collections") + ops("OrderedDict.__init__.__globals__") + b"\x93.",
    )
    yield (
        "call of a storage class",
        b"\x80\x02" + call_ops("torch FloatStorage", ops(1 << 40)) + b".",
    )
    yield "call of a result", b"\x80\x02" + call_ops("collections OrderedDict") + audit + b"R."
    yield (
        "attributes of a name",
        b"\x80\x02" + name_ops("collections OrderedDict") + ops({"a": 1}) + b"b.",
    )
    yield "torch.load", b"\x80\x02" + call_ops("torch load", ops("/etc/passwd")) + b"."
    yield "torch.hub", b"\x80\x02" + call_ops("torch.hub load", ops("a"), ops("b")) + b"."
    yield (
        "source of a module",
        b"\x80\x02("
        + ops("module")
        + name_ops("sys audit")
        + ops("a.py")
        + ops(f"import sys; sys.audit('{CALLED}')")
        + b"tQ.",
    )
    yield (
        "hooks",
        state_pickle(
            {"a": call_ops("torch._utils _rebuild_tensor_v2", WHOLE, name_ops("sys audit"))}
        ),
    )


def damaged_views():
    """State dicts whose tensors do not fit their numbers."""
    huge = 1 << 62
    views = {
        "too long": ((9,), (1,), 0),
        "behind": ((4,), (1,), 5),
        "before": ((4,), (1,), -1),
        "strided beyond": ((4,), (3,), 0),
        "backwards": ((4,), (-1,), 7),
        "repeated": ((1 << 20, 8), (0, 1), 0),
        "huge": ((huge, huge), (1, 1), 0),
        "huge offset": ((1,), (1,), huge),
        "huge stride": ((2,), (huge,), 0),
        "empty and huge": ((0, huge, huge), (1, 1, 1), 0),
        "many sides": ((1,) * 100, (1,) * 100, 0),
        "fewer strides": ((2, 2), (1,), 0),
        "strings": (("a",), (1,), 0),
        "floats": ((2.0,), (1,), 0),
        "booleans": ((True,), (True,), False),
        "no tuple": ([2], [1], 0),
    }
    for name, (size, stride, offset) in views.items():
        yield name, state_pickle({"a": tensor_ops(WHOLE, size, stride, offset)})
    storages = {
        "larger than its bytes": storage_ops("0", 1 << 40),
        "negative": storage_ops("0", -8),
        "of another key": storage_ops("1", 8),
        "of a path": storage_ops("../../../etc/passwd", 8),
        "of larger elements": storage_ops("0", 8, "torch DoubleStorage"),
        "of an unknown class": storage_ops("0", 8, "torch QInt8Storage"),
        "of a dict": storage_ops("0", 8, "collections OrderedDict"),
        "part beyond": storage_ops("0", 8, "torch FloatStorage", ("view", 6, 8)),
    }
    for name, storage in storages.items():
        size = (16,) if name in ("larger than its bytes", "part beyond") else (8,)
        yield f"storage {name}", state_pickle({"a": tensor_ops(storage, size, (1,))})


def bombs():
    """Small pickles that would take much memory or a deep stack."""
    tensor = tensor_ops(WHOLE, (8,), (1,))
    item = b"](" + ops("a") + ops(1) + b"e"
    pairs = b"](" + item + b"q\x01" + b"h\x01" * 20_000 + b"eq\x02"
    copies = (name_ops("collections OrderedDict") + b"h\x02\x85R") * 2_000
    half = storage_ops("0", 1 << 24, "torch BFloat16Storage")
    many = {f"a{i}": tensor_ops(half, (1 << 24,), (1,)) for i in range(50)}
    yield "copies of a dict", b"\x80\x02(" + pairs + copies + b"l."
    yield "memo", b"\x80\x02]r\xff\xff\xff\xff."
    yield "string", b"\x80\x04\x8d" + (1 << 60).to_bytes(8, "little") + b"a."
    yield "frame", b"\x80\x04\x95" + (1 << 60).to_bytes(8, "little") + b"]."
    yield "long", b"\x80\x02\x8b" + (1 << 30).to_bytes(4, "little") + b"1."
    yield "digits", b"L" + b"9" * 100_000 + b"L\n."
    yield "nested tuples as a key", b"\x80\x02}" + b")" + b"\x85" * 20_000 + tensor + b"s."
    yield "nested lists", b"\x80\x02" + b"](" * 20_000 + b"e" * 20_000 + b"."
    yield "nested marks", b"\x80\x02" + b"(" * 20_000 + b"."
    yield "a dict in itself", b"\x80\x02}q\x01" + ops("state_dict") + b"h\x01s."
    yield "a list in itself", b"\x80\x02]q\x01h\x01a."
    yield "copies of numbers", state_pickle(many)


HOSTILE = [*pickled_calls(), *written_calls(), *damaged_views(), *bombs()]


@pytest.fixture(scope="module")
def watch():
    """A function that runs another and returns the audited events by which code would run."""
    events, active = [], []

    def hook(event, arguments):
        if active and event in (
            *("import", "exec", "compile", "pickle.find_class", "os.system", "os.exec"),
            *("subprocess.Popen", "open", "socket.connect", "ctypes.dlopen", CALLED),
        ):
            events.append((event, arguments))

    sys.addaudithook(hook)  # It cannot be removed, hence `active`.

    def run(function, *arguments):
        events.clear()
        active.append(True)
        try:
            return function(*arguments)
        finally:
            active.clear()
            assert events == []

    # What the standard library imports at its first use.
    for write in FORMATS.values():
        torch_files.read(state_file({"a": np.ones(3, "f4")}, write))
        with pytest.raises(ValueError):
            torch_files.read(write(b"."))
    return run


def test_the_watch_notices_code(watch):
    for name in ("os.system", "audit", "import"):
        content = dict(pickled_calls())[f"{name}-2"]
        with pytest.raises(AssertionError):
            watch(pickle.loads, content)


@pytest.mark.parametrize("write", FORMATS.values(), ids=FORMATS)
def test_hostile_pickles_are_refused_and_nothing_runs(write, watch):
    accepted = []
    for name, content in HOSTILE:
        try:
            watch(torch_files.read, write(content, {"0": EIGHT}))
            accepted.append(name)
        except (ValueError, torch_files.UnsafeFileError):
            pass
    assert accepted == []


@pytest.mark.parametrize("content", [pytest.param(content, id=name) for name, content in bombs()])
def test_small_files_take_little_memory(content):
    tracemalloc.start()
    with pytest.raises((ValueError, torch_files.UnsafeFileError)):
        torch_files.read(stream_file(content, {"0": EIGHT}))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50e6


def test_a_file_with_a_call_is_a_user_error_that_names_it(tmp_path):
    path = tmp_path / "weights.pth"
    for name, content in written_calls():
        for write in FORMATS.values():
            path.write_bytes(write(content, {"0": EIGHT}))
            with pytest.raises(UserError) as error:
                weight_files.read_header(path)
            assert error.value.code in ("torch-weights-unsafe", "weights-damaged"), name
    path.write_bytes(zip_file(dict(pickled_calls())["os.system-2"]))
    with raises_code("torch-weights-unsafe", "weights.pth", "posix.system", "state_dict()"):
        weight_files.read(path)


def test_compressed_and_repeated_parts_are_refused():
    zeros = bytes(10_000_000)
    content = state_pickle({"a": tensor_ops(storage_ops("0", 2_500_000), (2_500_000,), (1,))})
    with pytest.raises(ValueError, match="larger than the file"):
        torch_files.read(zip_file(content, {"0": zeros}, compression=zipfile.ZIP_DEFLATED))
    assert torch_files.read(zip_file(content, {"0": zeros}))["a"].size == 2_500_000


# ---- damaged files


def mutated(content, rng):
    """Returns the content with a few random changes of the kinds that damage files."""
    content = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at, length = rng.randrange(len(content)), rng.choice((1, 1, 2, 4, 8, 40))
        kind = rng.choice(("flip", "set", "cut", "insert", "repeat", "truncate"))
        if kind == "flip":
            content[at] ^= 1 << rng.randrange(8)
        elif kind == "set":
            content[at : at + length] = bytes(
                rng.choice((0, 0x7F, 0x80, 0xFF)) for _ in range(length)
            )
        elif kind == "cut":
            del content[at : at + length]
        elif kind == "insert":
            content[at:at] = rng.randbytes(length)
        elif kind == "repeat":
            content[at:at] = content[at : at + length]
        elif rng.random() < 0.2:
            del content[at:]
        if not content:
            break
    return bytes(content)


def mutations(count):
    """Yields damaged files: bytes of whole files, and pickles inside of intact archives."""
    rng = random.Random(0)
    files = [
        (FIXTURES / f"torch_{name}.pth").read_bytes() for name in ("zip", "stream", "training")
    ]
    with zipfile.ZipFile(FIXTURES / "torch_zip.pth") as archive:
        inside = archive.read("torch_zip/data.pkl")
        buffers = {
            name.rpartition("/")[2]: archive.read(name)
            for name in archive.namelist()
            if "/data/" in name
        }
    for _ in range(count):
        for content in files:
            yield mutated(content, rng)
        yield zip_file(mutated(inside, rng), buffers)


def test_damaged_files_are_refused_or_give_tensors(tmp_path, watch):
    dtypes = {
        f"{kind}" for kind in ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u1", "b1", "c8", "c16")
    }
    read = refused = 0
    for content in mutations(250):
        try:
            tensors = watch(torch_files.read, content)
        except (ValueError, torch_files.UnsafeFileError):
            refused += 1
            continue
        read += 1
        assert all(isinstance(name, str) for name in tensors)
        assert {tensor.dtype.str[1:] for tensor in tensors.values()} <= dtypes
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 16 * len(content)
        for tensor in tensors.values():
            np.array(tensor)  # every element can be read
    # Both happen often: many bytes are those of numbers or names.
    assert read > 50 and refused > 500


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x02.", b"ustar" * 100, bytes(600)])
def test_other_files_are_a_user_error(content, tmp_path):
    (tmp_path / "weights.pt").write_bytes(content)
    with raises_code("weights-damaged", "weights.pt"):
        weight_files.read(tmp_path / "weights.pt")
