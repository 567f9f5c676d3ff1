"""TFLite files, run by TensorFlow's interpreter and compared with their networks."""

import json
import sys
import types

import jax
import numpy as np
import pytest

from semiseg_jax import workdir as workdir_lib
from semiseg_jax.data.sources import streets
from semiseg_jax.runtime.quiet_tensorflow import tf
from semiseg_jax.serving import export_parity, run_images, tflite_export
from tests.conftest import tiny_config, write_folder_data
from tests.errors import raises_code
from tests.serving.test_onnx_export import folded_program, run_snippet
from tests.test_export import CLASSES, export, make_workdir, one_small_scene

__all__ = ["one_small_scene"]

SCENES = [streets.draw(0, index, 33, 48)[0] for index in range(6)]
VIT = {"model__backbone": "tiny_dinov2", "model__head": "dpt"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A workdir whose config names a folder of images of two sizes."""
    folder = tmp_path_factory.mktemp("tflite")
    write_folder_data(folder / "data")
    config = tiny_config(data__name="folder", data__root=str(folder / "data"))
    config.data.classes = CLASSES
    workdir = make_workdir(folder / "run")
    workdir_lib.write_config(workdir, config)
    return workdir


@pytest.mark.parametrize(("downscale", "changes"), [(2, {}), (1, VIT)], ids=["downscaled", "vit"])
def test_float32_equals_the_network(tmp_path, downscale, changes):
    program = folded_program(downscale, **changes)
    tflite_export.write(program, (33, 48), "float32", (), tmp_path / "model.tflite")
    outputs = tflite_export.load(tmp_path / "model.tflite")(np.stack(SCENES[:2]))
    expected = jax.jit(program)(np.stack(SCENES[:2]))
    assert (outputs["class_map"] == expected["class_map"]).mean() >= 0.9999
    np.testing.assert_allclose(outputs["probabilities"], expected["probabilities"], atol=1e-4)


def test_int8_computes_in_integers_by_builtin_operators(tmp_path):
    tflite_export.write(folded_program(), (33, 48), "int8", SCENES, tmp_path / "model.tflite")
    interpreter = tf.lite.Interpreter(str(tmp_path / "model.tflite"))
    interpreter.allocate_tensors()
    # Only the input and the outputs are of other types: the cast input and the probabilities.
    floats = [d for d in interpreter.get_tensor_details() if d["dtype"] == np.float32]
    assert len(floats) <= 2
    assert not any("Flex" in op["op_name"] for op in interpreter._get_ops_details())


def test_int8_depends_on_the_calibration(tmp_path):
    program = folded_program()
    expected = jax.jit(program)(np.stack(SCENES))["probabilities"]
    error = {}
    for name, images in {"own": SCENES, "black": [np.zeros_like(SCENES[0])]}.items():
        tflite_export.write(program, (33, 48), "int8", images, tmp_path / name)
        outputs = tflite_export.load(tmp_path / name)(np.stack(SCENES))
        error[name] = np.abs(outputs["probabilities"] - expected).mean()
    assert 2 * error["own"] < error["black"]


def test_int8_refuses_layer_norms_and_gelu_by_name(tmp_path):
    with raises_code("export-int8-too-coarse", "erfc (of GELU) and rsqrt (of layer norm)"):
        tflite_export.write(folded_program(**VIT), (28, 28), "int8", SCENES, tmp_path / "model")
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("one_small_scene")
def test_the_command_prints_the_iou_of_each_class_before_and_after(run, tmp_path, monkeypatch):
    lines = export(run, tmp_path / "out", "tflite", precision="int8")
    assert lines[0] == "--size is 32x40, the size of the run's crops"
    assert lines[1] == "tflite: one image of 32x40 at a time; int8"
    assert "calibrated on 12 training images" in lines
    start = lines.index("IoU on 5 evaluation images, of the network and of the file:")
    assert [line.split()[0] for line in lines[start + 1 : start + 5]] == [*CLASSES, "mean"]
    description = json.loads((tmp_path / "out" / "export.json").read_text())
    assert description["input"]["images"]["shape"] == [1, 32, 40, 3]
    change = description["iou_of_file"]
    assert set(change["iou"]["after"]) == set(CLASSES) and change["images"] == 5
    assert abs(change["miou"]["before"] - change["miou"]["after"]) < 0.1
    assert description["preprocessing"]["stride"] == 16
    # ai-edge-litert has TensorFlow's interpreter under its own name.
    interpreter = types.SimpleNamespace(Interpreter=tf.lite.Interpreter)
    monkeypatch.setitem(sys.modules, "ai_edge_litert", types.ModuleType("ai_edge_litert"))
    monkeypatch.setitem(sys.modules, "ai_edge_litert.interpreter", interpreter)
    variables = run_snippet("import json, numpy as np\nfrom ai_edge_litert", tmp_path, "tflite")
    assert variables["class_map"].shape == (1, 32, 40)


def test_a_lost_rare_class_is_a_warning():
    before = np.diag([1000, 1000, 10])
    after = before.copy()
    after[2] = [10, 0, 0]
    from semiseg_jax.runtime.logger import capture_lines

    with capture_lines() as lines:
        export_parity.IouChange(1, before, after).log(CLASSES)
    assert "corner" in lines[-1] and "lose more than 5.0" in lines[-1]


@pytest.mark.parametrize(
    ("options", "code", "part"),
    [
        ({"format_": "onnx", "precision": "int8"}, "export-flag-of-tflite", "onnx"),
        ({"format_": "tflite", "precision": "int4"}, "export-precision-unknown", "int4"),
        ({"format_": "tflite", "size": "96,160"}, "export-size-malformed", "96,160"),
    ],
)
def test_invalid_flags_raise_user_errors(run, tmp_path, options, code, part):
    with raises_code(code, part):
        export(run, tmp_path / "out", **options)


def test_a_copy_of_the_model_alone_is_refused(tmp_path):
    workdir = make_workdir(tmp_path / "run")
    with raises_code("export-run-config-missing", "config.json"):
        export(workdir, tmp_path / "out", "tflite")


def test_no_evaluated_image_calibrates(run):
    dataset = run_images.load_dataset(run_images.read_config(run))
    used = {example.image for example in run_images.calibration_examples(dataset)}
    assert used and not used & {example.image for example in dataset.evaluation}
