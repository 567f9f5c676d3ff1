"""Exported models compared with their networks.

test_export_slow loads exported models in environments without this package.
"""

import functools
import json
import math
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from semiseg_jax import checkpoints
from semiseg_jax.data.sources import streets
from semiseg_jax.models import deeplab, folding
from semiseg_jax.runtime.errors import UserError
from semiseg_jax.runtime.logger import capture_lines
from semiseg_jax.serving import export_parity, exporters, model_bundle
from tests.conftest import tiny_config
from tests.errors import raises_code
from tests.models.test_folding import random_variables
from tests.rows import PROTOCOL, result_row

CLASSES = ("ground", "thing", "corner")
PALETTE = ((0, 0, 0), (200, 30, 30), (30, 200, 30))


def make_workdir(folder, protocol=PROTOCOL, make_weights=random_variables, downscale=1, **changes):
    """Writes the model of a run with the tiny network, whose norm is far from the identity."""
    config = tiny_config(**changes)
    resolved = deeplab.resolve(config.model)
    weights = make_weights(deeplab.build(resolved, len(CLASSES)))
    row = result_row(protocol)
    description = model_bundle.describe(
        resolved, config.eval, CLASSES, PALETTE, {"data": "folder"}, row, downscale=downscale
    )
    checkpoints.save_weights(folder / "model" / model_bundle.WEIGHTS, weights, description)
    (folder / "model" / model_bundle.DESCRIPTION).write_text(json.dumps(description))
    return folder


def export(workdir, output, format_="stablehlo", photographs=None, **options):
    """Exports a model; returns the printed lines."""
    with capture_lines() as lines:
        exporters.export(workdir, output, format_, photographs, **options)
    return lines


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return make_workdir(tmp_path_factory.mktemp("trained") / "run")


@pytest.fixture
def one_small_scene(monkeypatch):
    """Replaces the scenes by one, so that fewer programs are compiled."""
    monkeypatch.setattr(export_parity, "draw_scenes", lambda: [streets.draw(0, 2, 33, 40)[0][None]])


def check_several_image_sizes(workdir, output, format_):
    bundle = model_bundle.load(workdir)
    predict = exporters.load(output, format_)
    apply = jax.jit(functools.partial(bundle.model.apply, domain="weak", train=False))
    for shape in ((3, 32, 56, 3), (1, 37, 51, 3)):
        images = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
        logits = apply(bundle.variables, images)
        outputs = {name: np.asarray(value) for name, value in predict(images).items()}
        assert outputs.keys() == {"class_map", "probabilities"}
        assert outputs["class_map"].dtype == np.uint8
        assert outputs["probabilities"].dtype == np.float32
        np.testing.assert_allclose(outputs["probabilities"], jax.nn.softmax(logits), atol=1e-5)
        assert (outputs["class_map"] == np.argmax(logits, -1)).mean() > 0.9999


def test_stablehlo_accepts_all_sizes_and_has_all_platforms(workdir, tmp_path):
    lines = export(workdir, tmp_path / "out" / "1")
    assert lines[0] == "stablehlo: any batch, height and width; cpu, tpu, cuda; float32"
    # Two scenes of 96x160 and one of 97x131.
    assert f"parity on 3 images: class maps agree on 100.0000 % of {30720 + 12707:,}" in lines[1]
    content = bytearray((tmp_path / "out" / "1" / "model.stablehlo").read_bytes())
    weights = (workdir / "model" / "weights.safetensors").stat().st_size
    assert lines[2] == f"size: {weights:,} bytes of weights before, {len(content):,} bytes after"
    program = jax.export.deserialize(content)
    assert program.platforms == ("cpu", "tpu", "cuda")
    # The convolutions for the CPU and for other platforms (convolutions.py).
    assert "stablehlo.case" in program.mlir_module()
    assert "stablehlo.convolution" in program.mlir_module()
    check_several_image_sizes(workdir, tmp_path / "out" / "1", "stablehlo")


@pytest.mark.usefixtures("one_small_scene")
def test_saved_model_accepts_all_sizes_and_has_a_description(workdir, tmp_path):
    export(workdir, tmp_path / "out", "saved_model")
    check_several_image_sizes(workdir, tmp_path / "out", "saved_model")
    description = json.loads((tmp_path / "out" / "export.json").read_text())
    assert (description["format"], description["classes"]) == ("saved_model", list(CLASSES))
    assert description["palette"] == [list(colour) for colour in PALETTE]
    assert description["input"]["images"]["shape"] == ["n", "h", "w", 3]
    assert description["outputs"]["probabilities"]["shape"] == ["n", "h", "w", 3]
    assert (description["miou"], description["protocol"]) == (0.25, PROTOCOL)
    assert description["parity"]["agreement"] == 1 and description["parity"]["pixels"] == 33 * 40


@pytest.mark.usefixtures("one_small_scene")
def test_differences_from_the_evaluation_are_printed(tmp_path):
    window = {"size": [32, 32], "stride": [32, 32]}
    changes = {"scales": [0.5, 1.0], "flip": True, "window": window, "pad_to": 128}
    protocol = PROTOCOL | changes
    workdir = make_workdir(tmp_path / "run", protocol, model__compute_dtype="bfloat16")
    lines = export(workdir, tmp_path / "out")
    assert lines[1] == (
        "the mIoU of 25.00 was measured with scales 0.5, 1.0, mirrored images too, windows, sides "
        "padded to multiples of 128, bfloat16; the exported model predicts each image once, whole, "
        "at its own size"
    )
    # The comparison is with the float32 network: the difference to bfloat16 is 100 times as large.
    assert json.loads((tmp_path / "out" / "export.json").read_text())["parity"]["difference"] < 1e-5


@pytest.mark.usefixtures("one_small_scene")
def test_an_export_that_differs_from_the_network_is_removed(workdir, tmp_path, monkeypatch):
    fold = folding.fold

    def fold_with_error(model, variables):
        folded, weights = fold(model, variables)
        bias = weights["params"]["classifier"]["bias"]
        weights["params"]["classifier"]["bias"] = bias + np.float32([1, 0, 0])
        return folded, weights

    monkeypatch.setattr(folding, "fold", fold_with_error)
    with raises_code("export-differs-from-model"):
        export(workdir, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("differing", "difference", "is_equal"),
    [(1, 1e-4, True), (2, 0.0, False), (0, 2e-4, False), (0, math.nan, False)],
)
def test_limits_of_the_difference(differing, difference, is_equal):
    diff = export_parity.ExportDiff(10_000, differing, difference)
    if is_equal:
        export_parity.check_diff(diff)
    else:
        with pytest.raises(UserError):
            export_parity.check_diff(diff)


def test_compare_counts_pixels_and_propagates_nan():
    model = deeplab.build(tiny_config().model, 3)
    variables = random_variables(model)
    images = np.random.default_rng(0).integers(0, 256, (1, 32, 40, 3)).astype(np.uint8)
    outputs = jax.jit(functools.partial(exporters.predict, model))(variables, images)
    class_map, probabilities = (np.array(outputs[k]) for k in ("class_map", "probabilities"))
    class_map[0, :2, :3] = (class_map[0, :2, :3] + 1) % 3
    probabilities[0, 5, 5, 1] += 0.125

    def compare(**outputs):
        return export_parity.compare(model, variables, lambda _: outputs, [images])

    diff = compare(class_map=class_map, probabilities=probabilities)
    assert (diff.pixels, diff.differing) == (32 * 40, 6)
    assert diff.difference == pytest.approx(0.125, abs=1e-5)
    probabilities[0, 0, 0, 0] = np.nan
    assert math.isnan(compare(class_map=class_map, probabilities=probabilities).difference)


def test_photographs_have_their_own_sizes_and_one_crop_is_odd(tmp_path):
    for index in range(6):
        image, _ = streets.draw(0, index, 40, 50 + index)
        (tmp_path / "nested").mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / "nested" / f"{index}.png")
    (tmp_path / "notes.txt").write_text("not an image")
    batches = export_parity.read_photographs(tmp_path)
    assert [b.shape[1:3] for b in batches] == [(40, 50), (40, 51), (40, 52), (40, 53), (39, 49)]
    np.testing.assert_array_equal(batches[0][0], streets.draw(0, 0, 40, 50)[0])


def missing_run(workdir, folder):
    return export(folder / "nothing", folder / "out")


def unknown_format(workdir, folder):
    return export(workdir, folder / "out", "coreml")


def output_in_use(workdir, folder):
    (folder / "out").mkdir()
    (folder / "out" / "mine.txt").write_text("keep")
    return export(workdir, folder / "out")


def output_below_a_file(workdir, folder):
    (folder / "file").write_text("")
    return export(workdir, folder / "file" / "out")


def no_folder_of_images(workdir, folder):
    return export(workdir, folder / "out", photographs=folder / "photos")


def no_images(workdir, folder):
    (folder / "photos").mkdir()
    return no_folder_of_images(workdir, folder)


@pytest.mark.parametrize(
    ("case", "code", "part"),
    [
        (missing_run, "model-bundle-missing", "model/weights.safetensors"),
        (unknown_format, "export-format-unknown", "coreml"),
        (output_in_use, "export-output-exists", "out"),
        (output_below_a_file, "export-unwritable", "File exists"),
        (no_folder_of_images, "export-images-folder-missing", "photos"),
        (no_images, "export-images-empty", "photos"),
    ],
)
def test_invalid_arguments_raise_user_errors(workdir, tmp_path, case, code, part):
    with raises_code(code, part):
        case(workdir, tmp_path)
    written = [p for p in tmp_path.rglob("*") if p.is_file() and p.name not in ("mine.txt", "file")]
    assert not written


@pytest.mark.parametrize(
    ("error", "reason"),
    [(OSError(28, "No space left on device"), "No space left on device"), (OSError(), "OSError")],
)
def test_a_full_disk_leaves_no_files(workdir, tmp_path, monkeypatch, error, reason):
    def raise_error(*_, **options):
        raise error

    monkeypatch.setattr(jax.export, "export", raise_error)
    with raises_code("export-unwritable", "out", f"({reason})"):
        export(workdir, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--workdir=x", "--format=stablehlo"], "--output is missing: give it"),
        (["--workdir=x", "--output=y", "z"], "'z' is not an option"),
        (["--workdri=x"], "workdri"),
    ],
)
def test_an_invalid_command_line_prints_one_sentence(arguments, sentence):
    command = [sys.executable, "-m", "semiseg_jax.export", *arguments]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 1
    assert process.stderr.startswith("Error: ") and sentence in process.stderr
    assert len(process.stderr.splitlines()) == 1
