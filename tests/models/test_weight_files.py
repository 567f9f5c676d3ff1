"""Headers of weight files: names, shapes and dtypes, without the content of the tensors."""

import json

import numpy as np
import pytest
import safetensors.numpy
import tensorflow as tf

from semiseg_jax.models import pretrained, torch_files, weight_files
from tests.errors import raises_code

TENSORS = {
    "params/a/kernel": np.arange(24, dtype=np.float32).reshape(2, 3, 4, 1),
    "params/b/scale": np.ones(5, np.float16),
    "scalar": np.array(3, np.int64),
    "empty": np.zeros((0, 4), np.float64),
}
DESCRIPTION = {"model": {"input_normalization": "half"}}


def save(folder, file_format):
    """Writes the tensors in one format, and returns the path."""
    path = folder / f"weights{file_format}"
    if file_format == ".npz":
        np.savez(path, **TENSORS)
    elif file_format == ".safetensors":
        metadata = {"description": json.dumps(DESCRIPTION)}
        safetensors.numpy.save_file(TENSORS, path, metadata)
    else:
        tf.raw_ops.SaveV2(
            prefix=str(path),
            tensor_names=list(TENSORS),
            shape_and_slices=[""] * len(TENSORS),
            tensors=[tf.constant(tensor) for tensor in TENSORS.values()],
        )
    return path


@pytest.mark.parametrize("file_format", [".npz", ".safetensors", ".ckpt"])
def test_a_header_has_the_shapes_and_dtypes_of_the_file(tmp_path, file_format):
    path = save(tmp_path, file_format)
    header, file = weight_files.read_header(path), weight_files.read(path)
    assert file.description == (DESCRIPTION if file_format == ".safetensors" else {})
    assert header.description == file.description
    assert header.tensors.keys() == file.tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        np.testing.assert_array_equal(file.tensors[name], tensor)
        placeholder = header.tensors[name]
        assert (placeholder.shape, placeholder.dtype) == (tensor.shape, tensor.dtype), name
        assert set(placeholder.strides) <= {0}  # no memory of its own


@pytest.mark.parametrize("file_format", [".npz", ".safetensors"])
def test_a_truncated_file_is_found_from_its_header(tmp_path, file_format):
    path = save(tmp_path, file_format)
    path.write_bytes(path.read_bytes()[:-9])
    with raises_code("weights-damaged", f"weights{file_format}"):
        weight_files.read_header(path)


@pytest.mark.parametrize("entry", [[], {"dtype": "F32", "shape": [2]}, None])
def test_a_malformed_safetensors_header_is_a_user_error(tmp_path, entry):
    header = json.dumps({"a": entry}).encode()
    path = tmp_path / "weights.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with raises_code("weights-damaged", "weights.safetensors", "the header has no dtype"):
        weight_files.read_header(path)


def test_only_loading_reads_the_content(tmp_path, monkeypatch):
    path = tmp_path / "weights.safetensors"
    safetensors.numpy.save_file({"params/stem/conv/kernel": np.ones((1, 1, 3, 8), "f4")}, path)
    shapes = {"params": {"stem": {"conv": {"kernel": np.zeros((1, 1, 3, 8), np.float32)}}}}

    def refuse(path):
        raise AssertionError(f"{path} is read as a whole")

    with monkeypatch.context() as patched:
        patched.setattr(weight_files, "read", refuse)
        assert pretrained.inspect(path).layout == "semiseg_jax"
        pretrained.check(path, shapes)
    loaded, _ = pretrained.load(path, shapes)
    np.testing.assert_array_equal(loaded["params"]["stem"]["conv"]["kernel"], 1)


def test_a_pytorch_file_is_read_once_while_it_is_unchanged(tmp_path, monkeypatch):
    sizes = []

    def read(content, entry=""):
        sizes.append(len(content))
        return {}

    monkeypatch.setattr(torch_files, "read", read)
    path = tmp_path / "weights.pth"
    for content in (b"one", b"three"):
        path.write_bytes(content)
        for _ in range(2):
            weight_files.read_header(path)
    assert sizes == [3, 5]
