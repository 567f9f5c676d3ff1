"""Artefacts against the network that they are made from; test_export_slow loads them elsewhere."""

import functools
import json
import math
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from semiseg_jax import artefacts, checkpoints, deployed
from semiseg_jax.data import streets
from semiseg_jax.errors import UserError
from semiseg_jax.models import deeplab, folding
from tests.conftest import tiny_config
from tests.models.test_folding import random_variables

CLASSES = ("ground", "thing", "corner")
PALETTE = ((0, 0, 0), (200, 30, 30), (30, 200, 30))
PROTOCOL = {"scales": [1.0], "flip": False, "window": "whole", "pad_to": 1}


def make_workdir(folder, protocol=PROTOCOL, weights_of=random_variables, **changes):
    """A workdir as a run leaves it, of the tiny network with a norm that is far from nothing."""
    config = tiny_config(**changes)
    resolved = deeplab.resolve(config.model)
    weights = weights_of(deeplab.build(resolved, len(CLASSES)))
    row = {"miou": 0.25, "iou": [0.5, 0.25, None], "protocol": protocol}
    described = deployed.describe(resolved, config.eval, CLASSES, PALETTE, {"data": "folder"}, row)
    checkpoints.save_weights(folder / "model" / deployed.WEIGHTS, weights, described)
    (folder / "model" / deployed.DESCRIPTION).write_text(json.dumps(described))
    return folder


def make(workdir, output, format_="stablehlo", photographs=None):
    """The lines that exporting says."""
    lines = []
    artefacts.export(workdir, output, format_, photographs, lines.append)
    return lines


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return make_workdir(tmp_path_factory.mktemp("trained") / "run")


@pytest.fixture
def one_small_scene(monkeypatch):
    """Fewer programs to compile, where parity is not what is tested."""
    monkeypatch.setattr(artefacts, "scenes", lambda: [streets.draw(0, 2, 33, 40)[0][None]])


def check_on_images_of_any_size(workdir, output, format_):
    found = deployed.load(workdir)
    run = artefacts.load(output, format_)
    apply = jax.jit(functools.partial(found.model.apply, domain="weak", train=False))
    for shape in ((3, 32, 56, 3), (1, 37, 51, 3)):
        images = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
        logits = apply(found.variables, images)
        result = {name: np.asarray(value) for name, value in run(images).items()}
        assert result.keys() == {"class_map", "probabilities"}
        assert result["class_map"].dtype == np.uint8
        assert result["probabilities"].dtype == np.float32
        np.testing.assert_allclose(result["probabilities"], jax.nn.softmax(logits), atol=1e-5)
        assert (result["class_map"] == np.argmax(logits, -1)).mean() > 0.9999


def test_stablehlo_of_every_size_and_platform(workdir, tmp_path):
    lines = make(workdir, tmp_path / "out" / "1")
    assert lines[0] == "stablehlo: any batch, height and width; cpu, tpu, cuda; float32"
    # Two scenes of 96x160 and one of 97x131.
    assert f"parity on 3 images: class maps agree on 100.0000 % of {30720 + 12707:,}" in lines[1]
    content = bytearray((tmp_path / "out" / "1" / "model.stablehlo").read_bytes())
    weights = (workdir / "model" / "weights.safetensors").stat().st_size
    assert lines[2] == f"size: {weights:,} bytes of weights before, {len(content):,} bytes after"
    program = jax.export.deserialize(content)
    assert program.platforms == ("cpu", "tpu", "cuda")
    # The forms of the CPU and of the others (convolutions.py).
    assert "stablehlo.case" in program.mlir_module()
    assert "stablehlo.convolution" in program.mlir_module()
    check_on_images_of_any_size(workdir, tmp_path / "out" / "1", "stablehlo")


@pytest.mark.usefixtures("one_small_scene")
def test_saved_model_of_every_size_and_its_description(workdir, tmp_path):
    make(workdir, tmp_path / "out", "saved_model")
    check_on_images_of_any_size(workdir, tmp_path / "out", "saved_model")
    says = json.loads((tmp_path / "out" / "export.json").read_text())
    assert (says["format"], says["classes"]) == ("saved_model", list(CLASSES))
    assert says["palette"] == [list(colour) for colour in PALETTE]
    assert says["input"]["images"]["shape"] == ["n", "h", "w", 3]
    assert says["outputs"]["probabilities"]["shape"] == ["n", "h", "w", 3]
    assert (says["miou"], says["protocol"]) == (0.25, PROTOCOL)
    assert says["parity"]["agreement"] == 1 and says["parity"]["pixels"] == 33 * 40


@pytest.mark.usefixtures("one_small_scene")
def test_what_the_measured_miou_had_and_the_artefact_has_not_is_said(tmp_path):
    protocol = {"scales": [0.5, 1.0], "flip": True, "window": {"size": [32, 32]}, "pad_to": 128}
    workdir = make_workdir(tmp_path / "run", protocol, model__compute_dtype="bfloat16")
    lines = make(workdir, tmp_path / "out")
    assert lines[1] == (
        "the mIoU of 25.00 was measured with scales 0.5, 1.0, mirrored images too, windows, sides "
        "padded to multiples of 128, bfloat16; the artefact sees each image once, whole, at its "
        "own size"
    )
    # Beside the network in float32, which bfloat16 would miss by a hundred times as much.
    assert json.loads((tmp_path / "out" / "export.json").read_text())["parity"]["difference"] < 1e-5


@pytest.mark.usefixtures("one_small_scene")
def test_an_artefact_that_is_not_the_model_is_not_kept(workdir, tmp_path, monkeypatch):
    fold = folding.fold

    def wrongly(model, variables):
        folded, weights = fold(model, variables)
        bias = weights["params"]["classifier"]["bias"]
        weights["params"]["classifier"]["bias"] = bias + np.float32([1, 0, 0])
        return folded, weights

    monkeypatch.setattr(folding, "fold", wrongly)
    with pytest.raises(UserError, match="is not the model, and was not kept"):
        make(workdir, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("differing", "difference", "good"),
    [(1, 1e-4, True), (2, 0.0, False), (0, 2e-4, False), (0, math.nan, False)],
)
def test_how_far_an_artefact_may_be_from_the_model(differing, difference, good):
    parity = artefacts.Parity(10_000, differing, difference)
    if good:
        artefacts.check(parity)
    else:
        with pytest.raises(UserError):
            artefacts.check(parity)


def test_parity_counts_pixels_and_does_not_lose_a_nan():
    model = deeplab.build(tiny_config().model, 3)
    variables = random_variables(model)
    images = np.random.default_rng(0).integers(0, 256, (1, 32, 40, 3)).astype(np.uint8)
    right = jax.jit(functools.partial(artefacts.predict, model))(variables, images)
    class_map, probabilities = (np.array(right[k]) for k in ("class_map", "probabilities"))
    class_map[0, :2, :3] = (class_map[0, :2, :3] + 1) % 3
    probabilities[0, 5, 5, 1] += 0.125

    def compared(**outputs):
        return artefacts.compare(model, variables, lambda _: outputs, [images])

    parity = compared(class_map=class_map, probabilities=probabilities)
    assert (parity.pixels, parity.differing) == (32 * 40, 6)
    assert parity.difference == pytest.approx(0.125, abs=1e-5)
    probabilities[0, 0, 0, 0] = np.nan
    assert math.isnan(compared(class_map=class_map, probabilities=probabilities).difference)


def test_photographs_are_taken_as_they_are_and_one_at_an_odd_size(tmp_path):
    for index in range(6):
        image, _ = streets.draw(0, index, 40, 50 + index)
        (tmp_path / "nested").mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / "nested" / f"{index}.png")
    (tmp_path / "notes.txt").write_text("not an image")
    batches = artefacts.from_folder(tmp_path)
    assert [b.shape[1:3] for b in batches] == [(40, 50), (40, 51), (40, 52), (40, 53), (39, 49)]
    np.testing.assert_array_equal(batches[0][0], streets.draw(0, 0, 40, 50)[0])


def missing_run(workdir, folder):
    return make(folder / "nothing", folder / "out")


def unknown_format(workdir, folder):
    return make(workdir, folder / "out", "onnx")


def output_in_use(workdir, folder):
    (folder / "out").mkdir()
    (folder / "out" / "mine.txt").write_text("keep")
    return make(workdir, folder / "out")


def output_below_a_file(workdir, folder):
    (folder / "file").write_text("")
    return make(workdir, folder / "file" / "out")


def no_folder_of_images(workdir, folder):
    return make(workdir, folder / "out", photographs=folder / "photos")


def no_images(workdir, folder):
    (folder / "photos").mkdir()
    return no_folder_of_images(workdir, folder)


@pytest.mark.parametrize(
    ("case", "sentence"),
    [
        (missing_run, "nothing has no model/weights.safetensors"),
        (unknown_format, "--format is onnx: make it one of stablehlo, saved_model."),
        (output_in_use, "out exists already: remove it, or give another --output."),
        (output_below_a_file, r"out cannot be written \(File exists\): free space or give another"),
        (no_folder_of_images, "photos of --images is missing."),
        (no_images, r"photos has no image \(\.png, "),
    ],
)
def test_what_a_user_can_cause_is_one_sentence(workdir, tmp_path, case, sentence):
    with pytest.raises(UserError, match=sentence):
        case(workdir, tmp_path)
    made = [p for p in tmp_path.rglob("*") if p.is_file() and p.name not in ("mine.txt", "file")]
    assert not made


@pytest.mark.parametrize(
    ("error", "reason"),
    [(OSError(28, "No space left on device"), "No space left on device"), (OSError(), "OSError")],
)
def test_a_disk_that_fills_leaves_nothing(workdir, tmp_path, monkeypatch, error, reason):
    def full(*_):
        raise error

    monkeypatch.setattr(artefacts, "_stablehlo", full)
    with pytest.raises(UserError, match=rf"out cannot be written \({reason}\)"):
        make(workdir, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--workdir=x", "--format=stablehlo"], "Say --output"),
        (["--workdir=x", "--output=y", "z"], "'z' is not an option"),
        (["--workdri=x"], "workdri"),
    ],
)
def test_a_command_that_cannot_be_meant_ends_in_one_sentence(arguments, sentence):
    command = [sys.executable, "-m", "semiseg_jax.export", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: ") and sentence in done.stderr
    assert len(done.stderr.splitlines()) == 1
