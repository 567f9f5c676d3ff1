"""A run for each key that acts on what the network sees, and exported models that downscale."""

import functools
import json

import jax
import numpy as np
import pytest

from semiseg_jax.data.sources.downscale import shrink_image
from semiseg_jax.serving import downscaling, export_parity, exporters, model_bundle
from tests import test_predict
from tests.test_carried_keys import ACTING, check_prediction_equals_evaluation
from tests.test_export import make_workdir

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("key", [key for key in ACTING if key.startswith(("data.", "eval."))])
def test_predictions_equal_the_evaluation(key, tmp_path, monkeypatch):
    changes = {key.replace(".", "__"): ACTING[key]}
    if "window" in key:
        changes = {f"eval__{name}": ACTING[f"eval.{name}"] for name in ("window", "window_stride")}
    config, workdir = test_predict.run(tmp_path, test_predict.MANY, **changes)
    check_prediction_equals_evaluation(config, workdir, tmp_path / "out", monkeypatch)


def test_predictions_equal_the_evaluation_with_all_keys_changed(tmp_path, monkeypatch):
    changes = {
        key.replace(".", "__"): value
        for key, value in ACTING.items()
        if key.startswith(("data.", "eval.")) or key == "model.align_corners"
    }
    config, workdir = test_predict.run(tmp_path, test_predict.MANY, **changes)
    bundle = model_bundle.load(workdir)
    assert bundle.downscale == 2 and bundle.protocol.pad_to == 32
    check_prediction_equals_evaluation(config, workdir, tmp_path / "out", monkeypatch)


# ONNX and TFLite files: tests/serving.
@pytest.mark.parametrize("format_", ["stablehlo", "saved_model"])
def test_an_exported_model_downscales_inside(format_, tmp_path, monkeypatch):
    """It takes images as users have them, and returns the evaluation's classes at their size."""
    images = np.random.default_rng(0).integers(0, 256, (1, 67, 81, 3)).astype(np.uint8)
    monkeypatch.setattr(export_parity, "draw_scenes", lambda: [images])
    workdir = make_workdir(tmp_path / "run", downscale=3)
    exporters.export(workdir, tmp_path / "out", format_, None)
    outputs = exporters.load(tmp_path / "out", format_)(images)
    bundle = model_bundle.load(workdir)
    small = shrink_image(images[0], 3)[None]
    logits = jax.jit(functools.partial(bundle.model.apply, train=False))(bundle.variables, small)
    expected = downscaling.enlarge(np.asarray(jax.nn.softmax(logits))[0], (67, 81))
    np.testing.assert_allclose(np.asarray(outputs["probabilities"])[0], expected, atol=1e-5)
    assert (np.asarray(outputs["class_map"])[0] == expected.argmax(-1)).mean() > 0.9999
    description = json.loads((tmp_path / "out" / "export.json").read_text())
    assert "its own size divided by 3" in description["inference"]
