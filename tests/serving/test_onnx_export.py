"""ONNX files, run by onnxruntime and compared with their networks."""

import contextlib
import functools
import importlib.util
import json
import re
import textwrap
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from semiseg_jax.data.sources import streets
from semiseg_jax.models import deeplab, folding
from semiseg_jax.serving import exporters, jaxpr_program
from tests.conftest import tiny_config
from tests.errors import raises_code
from tests.models.test_folding import random_variables
from tests.test_export import CLASSES, PALETTE, export, make_workdir, one_small_scene

__all__ = ["one_small_scene"]

ROOT = Path(__file__).parents[2]
NEEDED = ("onnx", "onnxruntime")
needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in NEEDED),
    reason="onnx or onnxruntime is not installed (requirements-dev.txt)",
)
# An image that is smaller than a stride leaves a side of 1; 257x129 is odd at every stride.
SHAPES = ((3, 64, 96, 3), (1, 257, 129, 3), (1, 9, 33, 3), (1, 1, 40, 3))


def folded_program(downscale=1, **changes):
    """The program of an export with random weights, and its network with them."""
    model = deeplab.build(deeplab.resolve(tiny_config(**changes).model), len(CLASSES))
    model, variables = folding.fold(model, random_variables(model))
    return functools.partial(exporters.predict, model, variables, downscale=downscale)


def check_sizes(program, path, shapes):
    """Writes a file, and compares it with the program on images of several shapes."""
    from semiseg_jax.serving import onnx_export

    onnx_export.write(program, len(CLASSES), {}, path)
    run = onnx_export.load(path)
    for shape in shapes:
        images = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
        expected = jax.jit(program)(images)
        outputs = run(images)
        assert outputs["class_map"].dtype == np.uint8
        assert (outputs["class_map"] == expected["class_map"]).mean() >= 0.9999
        np.testing.assert_allclose(
            outputs["probabilities"], expected["probabilities"], atol=1e-4, err_msg=str(shape)
        )


@needs_onnx
def test_one_file_takes_several_sizes_and_batches(tmp_path):
    check_sizes(folded_program(), tmp_path / "model.onnx", SHAPES[::2])


@needs_onnx
@pytest.mark.usefixtures("one_small_scene")
def test_the_command_writes_parity_and_metadata(tmp_path):
    import onnx

    workdir = make_workdir(tmp_path / "run", model__backbone="tiny_dinov2", model__head="dpt")
    lines = export(workdir, tmp_path / "out", "onnx")
    assert lines[0] == "onnx: any batch, height and width; float32"
    assert "class maps agree on 100.0000 %" in lines[1]
    model = onnx.load(tmp_path / "out" / "model.onnx")
    assert {node.domain for node in model.graph.node} == {""}
    texts = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    assert texts["classes"] == list(CLASSES)
    assert texts["palette"] == [list(colour) for colour in PALETTE]
    assert len(texts["mean"]) == len(texts["std"]) == 3
    assert (texts["stride"], texts["downscale"]) == (14, 1) and "patch of 14" in texts["size_rule"]
    description = json.loads((tmp_path / "out" / "export.json").read_text())
    assert description["preprocessing"]["size_rule"] == texts["size_rule"]
    assert "onnxruntime" in description["made_by"]
    variables = run_snippet("import json, numpy as np, onnxruntime", tmp_path, "onnx")
    assert variables["class_map"].shape == (1, 33, 40)
    assert variables["classes"] == list(CLASSES)


def snippet(first_line):
    """The indented code of docs/deploy.md that begins with a line."""
    page = (ROOT / "docs" / "deploy.md").read_text()
    blocks = re.findall(r"(?:^ {4}.*\n|^\n(?= {4}))+", page, re.M)
    (block,) = (b for b in map(textwrap.dedent, blocks) if b.lstrip().startswith(first_line))
    return block


def run_snippet(first_line, folder, name):
    """Runs code of the page beside an exported model; returns its variables."""
    (folder / "served").mkdir()
    (folder / "out").rename(folder / "served" / name)
    image, _ = streets.draw(0, 2, 33, 40)
    Image.fromarray(image).save(folder / "photo.jpg")
    variables = {}
    with contextlib.chdir(folder):
        exec(snippet(first_line), variables)
    return variables


def test_missing_packages_are_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with raises_code("export-packages-missing", "onnxruntime", "requirements-onnx.txt"):
        export(tmp_path / "nothing", tmp_path / "out", "onnx")


class OnlyAddition:
    format_name = "onnx"
    elementwise = types.MappingProxyType({"add": None})
    operations = types.MappingProxyType({})
    emit = emit_elementwise = unsqueeze = expand = staticmethod(lambda *operands: operands)


def test_an_unknown_operation_is_refused_by_name_and_constants_are_not():
    def program(x):
        return jnp.sort(x) + jnp.cumsum(jnp.arange(4.0))

    traced = jax.jit(program).trace(jax.ShapeDtypeStruct((4,), jnp.float32)).jaxpr
    assert jaxpr_program.operations(traced) == {"sort", "add"}
    with raises_code("export-operation-unknown", "sort, which"):
        jaxpr_program.check_operations(traced, OnlyAddition())


def test_a_loop_depends_on_what_its_turns_carry():
    def program(x):
        return jax.lax.fori_loop(0, 3, lambda i, pair: (x * i, jnp.sin(pair[0])), (0.0, 0.0))

    traced = jax.jit(program).trace(jax.ShapeDtypeStruct((), jnp.float32)).jaxpr
    assert "sin" in jaxpr_program.operations(traced)
