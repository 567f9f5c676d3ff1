"""Hostile model.json and weight files: one sentence for each, no traceback and no code."""

import io
import itertools
import json
import os
import pickle
import zipfile

import numpy as np
import pytest
import safetensors.numpy

from semiseg_jax.models import pretrained, weight_files
from semiseg_jax.runtime.errors import UserError
from semiseg_jax.serving import model_bundle
from tests.errors import raises_code
from tests.test_export import make_workdir

JSON_VALUES = [None, True, -1, 0, 10**20, 1e308, "", "x", "a\0b", "\ud800", [], [-1], [[]], {}]
JSON_VALUES += [["x"] * 3, [10**20] * 2, {"size": [1, 1], "stride": [2, 2]}, float("nan")]


def places(content, path=()):
    """Yields the path of each value of a JSON document, itself included."""
    yield path
    if isinstance(content, dict | list):
        keys = content if isinstance(content, dict) else range(min(len(content), 1))
        for key in keys:
            yield from places(content[key], (*path, key))


def replaced(content, path, value, remove=False):
    """Returns a copy of a JSON document with another value at a path, or without the value."""
    if not path:
        return value
    copy = json.loads(json.dumps(content))
    parent = copy
    for key in path[:-1]:
        parent = parent[key]
    if remove:
        del parent[path[-1]]
    else:
        parent[path[-1]] = value
    return copy


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return make_workdir(tmp_path_factory.mktemp("hostile") / "run")


@pytest.fixture
def no_network(monkeypatch):
    """Reads model.json alone: weights are compared with the description first of all."""
    monkeypatch.setattr(model_bundle, "variable_shapes", lambda model: {"params": {}})
    monkeypatch.setattr(model_bundle, "inference_variables", lambda variables: variables)
    monkeypatch.setattr(model_bundle, "_read_weights", lambda folder, shapes, description: {})


@pytest.mark.usefixtures("no_network")
def test_every_value_of_model_json_may_have_any_type(workdir):
    path = workdir / "model" / "model.json"
    original = path.read_text()
    content = json.loads(original)
    loaded = []
    for place in places(content):
        changes = [replaced(content, place, value) for value in JSON_VALUES]
        if place:
            changes.append(replaced(content, place, None, remove=True))
        for changed in changes:
            path.write_text(json.dumps(changed))
            try:
                bundle = model_bundle.load(workdir)
            except UserError as error:
                assert str(path) in str(error) and "\n" not in str(error) and len(str(error)) < 700
            else:
                loaded.append(place)
                check_sane(bundle)
    path.write_text(original)
    # What a person may edit, and what nothing reads, may change.
    editable = {"classes", "palette", "trained_on", "iou", "pretrained", "kept"}
    assert {"classes", "palette", "iou"} <= {place[0] for place in loaded if place}
    for place in loaded:
        assert (
            place == ()
            or place[0] in editable
            or place[0]
            in (*("preprocessing", "protocol", "model", "batch", "miou", "largest_pixels"),)
        )


def check_sane(bundle):
    """What inference does with a bundle cannot fail."""
    assert all(isinstance(name, str) and name for name in bundle.classes)
    assert np.asarray(bundle.palette, np.uint8).shape == (len(bundle.classes), 3)
    config = model_bundle.evaluation_config(bundle, 1)
    buckets = model_bundle.make_shape_buckets(bundle, config, [(3, 5)], 1)
    height, width = buckets.padded_size((3, 5))
    assert 0 < height * width <= 4096**2 and buckets.batch_size((height, width)) >= 1
    json.dumps(bundle.description)


@pytest.mark.parametrize(
    "text", ["", "[" * 10**5, "1" * 5000, "nan", "{}", "[]", '{"format": 1}', '"x"', "\udcff"]
)
def test_text_that_is_no_description_is_refused(workdir, tmp_path, text):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "weights.safetensors").write_bytes(b"")
    (folder / "model.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=r"model\.json"):
        model_bundle.load(tmp_path)


TENSORS = {"params/a/kernel": np.ones((2, 3), np.float32), "b": np.zeros(0, np.float16)}


def contents(file_format):
    """Returns the bytes of a small valid file."""
    if file_format == ".safetensors":
        return safetensors.numpy.save(TENSORS, {"description": '{"model": {}}'})
    buffer = io.BytesIO()
    (np.savez if file_format == ".npz" else np.savez_compressed)(buffer, **TENSORS)
    return buffer.getvalue()


@pytest.mark.parametrize("file_format", [".npz", ".safetensors", "compressed.npz"])
def test_mutated_bytes_are_read_or_refused(tmp_path, file_format):
    """Truncations, flipped bits, and inserted and repeated bytes; the header and the whole file."""
    content = contents(file_format)
    rng = np.random.default_rng(0)
    path = tmp_path / f"w{file_format}"
    for number in range(300):
        mutated = bytearray(content)
        first, last = sorted(int(n) for n in rng.integers(0, len(content), 2))
        match number % 4:
            case 0:
                mutated = mutated[:first]
            case 1:
                for position in rng.integers(0, len(content), 3):
                    mutated[int(position)] ^= 1 << int(rng.integers(8))
            case 2:
                mutated[first:last] = rng.integers(0, 256, last - first).astype(np.uint8).tobytes()
            case 3:
                mutated[first:first] = mutated[first:last]
        path.write_bytes(mutated)
        for read in (weight_files.read_header, weight_files.read, pretrained.inspect):
            try:
                file = read(path)
            except UserError as error:
                assert str(path) in str(error) and "\n" not in str(error)
            else:
                if isinstance(file, weight_files.File):
                    assert isinstance(file.description, dict)
                    assert all(isinstance(t, np.ndarray) for t in file.tensors.values())


def safetensors_bytes(header, size=8):
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(size)


def test_every_value_of_a_safetensors_header_may_have_any_type(tmp_path):
    path = tmp_path / "w.safetensors"
    header = {
        "__metadata__": {"description": "{}"},
        "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
    }
    for place, value in itertools.product(places(header), [*JSON_VALUES, [2**62, 4], "[]", "1"]):
        path.write_bytes(safetensors_bytes(replaced(header, place, value)))
        for read in (weight_files.read_header, weight_files.read, pretrained.inspect):
            try:
                read(path)
            except UserError as error:
                assert str(path) in str(error)


def npy_header(shape, dtype="<f4"):
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ("(10**6,)", "<f4"),
        ("(1000000000000,)", "<f4"),
        ("(-1,)", "<f4"),
        ("(4,)", "|O"),
        ("4", "x"),
    ],
)
def test_an_array_of_another_size_or_of_objects_is_refused(tmp_path, shape, dtype):
    path = tmp_path / "w.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.npy", npy_header(shape, dtype) + bytes(16))
    for read in (weight_files.read_header, weight_files.read):
        with raises_code("weights-damaged", "w.npz"):
            read(path)


def test_a_small_file_that_expands_to_gigabytes_is_refused(tmp_path):
    path = tmp_path / "w.npz"
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("a.npy", "w", force_zip64=True) as member,
    ):
        member.write(npy_header(f"({2**26 + 2**20},)"))
        for _ in range(260 + 4):
            member.write(bytes(2**20))
    with raises_code("weights-damaged", "would expand"):
        weight_files.read(path)


class Executes:
    """A pickle that runs a command when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_in_any_weight_file_executes_nothing(tmp_path):
    victim = tmp_path / "executed"
    payload = pickle.dumps(Executes(victim))
    array = io.BytesIO()
    np.save(array, np.array([Executes(victim)], object), allow_pickle=True)
    with zipfile.ZipFile(tmp_path / "b.npz", "w") as archive:
        archive.writestr("a.npy", array.getvalue())
    for name in ("a.npz", "a.safetensors", "a.pth", "a.pt"):
        (tmp_path / name).write_bytes(payload)
    for path in sorted(tmp_path.iterdir()):
        for read in (weight_files.read, weight_files.read_header):
            with pytest.raises(UserError, match=path.name):
                read(path)
    assert not victim.exists()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_not_loaded(tmp_path, value):
    path = tmp_path / "w.safetensors"
    kernel = np.ones((1, 1, 3, 8), np.float32)
    kernel[0, 0, 1, 1] = value
    safetensors.numpy.save_file({"params/stem/conv/kernel": kernel}, path)
    shapes = {"params": {"stem": {"conv": {"kernel": np.zeros(kernel.shape, np.float32)}}}}
    with raises_code("weights-not-finite", "params/stem/conv/kernel"):
        pretrained.load(path, shapes)
