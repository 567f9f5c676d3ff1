"""Predictions compared with evaluation, all kinds of image files, and invalid arguments."""

import dataclasses
import functools
import json
import os

import jax
import numpy as np
import pytest
from PIL import Image

from semiseg_jax import (
    checkpoints,
    evaluate,
    mesh,
    self_training,
    train,
    train_state,
)
from semiseg_jax.data import load, visualize
from semiseg_jax.models import deeplab
from semiseg_jax.runtime import preemption
from semiseg_jax.runtime.errors import UserError
from semiseg_jax.serving import inputs, model_bundle, prediction_writer, tiling
from semiseg_jax.serving.trained_model import TrainedModel
from tests import mains, workdirs
from tests.conftest import tiny_config
from tests.errors import raises_code
from tests.networks import Pointwise

CLASSES = ("ground", "thing", "corner")
FEW = [(37, 51), (48, 36)]
MANY = [(33 + 3 * i, 60 - 5 * i) for i in range(9)]


def make_data(root, sizes):
    """Writes images of noise and blocks in the given sizes: 2 to train on, 9 to evaluate."""
    rng = np.random.default_rng(0)
    for i in range(11):
        height, width = sizes[i % len(sizes)]
        mask = np.kron(rng.integers(0, 3, (8, 8)), np.ones((9, 9)))[:height, :width]
        mask = mask.astype(np.uint8)
        mask[0] = 255
        image = rng.integers(0, 90, (height, width, 3)) + 55 * np.minimum(mask, 2)[..., None]
        split = "train" if i < 2 else "val"
        for kind, array in (("images", image.astype(np.uint8)), ("masks", mask)):
            path = root / kind / split / ("" if i % 2 else "nested") / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(path)


def write_random_weights(path, config):
    """Writes weights that predict several classes; a short training would predict one."""
    rng = np.random.default_rng(3)

    def draw(key_path, shape):
        name = jax.tree_util.keystr(key_path)
        values = rng.normal(0, 0.5, shape.shape).astype(shape.dtype)
        if "classifier" in name and "bias" in name:
            return 0 * values
        return np.abs(values) + 0.5 if "var" in name else values

    shapes = train_state.variable_shapes(deeplab.build(config, 3))
    variables = jax.tree_util.tree_map_with_path(draw, shapes)
    checkpoints.save_weights(path, train_state.inference_variables(variables), {})


def one_device_mesh():
    return mesh.make_mesh(jax.devices()[:1])


def run(folder, sizes, **changes):
    """Runs a teacher with random weights on images of these sizes; returns (config, workdir).

    Args:
        folder: for the data and the workdir.
        sizes: (height, width) of the images in turn.
        changes: of the config, by dotted key with __ for the dot.
    """
    make_data(folder / "data", sizes)
    config = tiny_config(
        data__root=str(folder / "data"),
        data__cache_dir=str(folder / "cache"),
        data__classes=CLASSES,
        rounds__count=0,
        **{"eval__batch": 4, "eval__pad_to": 16} | changes,
    )
    write_random_weights(folder / "weights.safetensors", config.model)
    config.model.pretrained = str(folder / "weights.safetensors")
    devices = one_device_mesh()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mesh, "make_mesh", lambda: devices)
        # Returns the initial state instead of training.
        patch.setattr(train, "run", workdirs.train_nothing)
        self_training.run(config, folder / "run")
    return config, folder / "run"


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    return run(tmp_path_factory.mktemp("few"), FEW)


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    return run(tmp_path_factory.mktemp("many"), MANY)


predict = functools.partial(mains.run, command="predict")
get_error = functools.partial(mains.refused, command="predict")


def flags(workdir, source, output):
    return f"--workdir={workdir}", f"--input={source}", f"--output={output}"


def read_maps(folder):
    """Returns the class ids of the label maps in a folder, by name."""
    images = {p.relative_to(folder).as_posix(): Image.open(p) for p in folder.rglob("*.png")}
    assert all(image.mode == "P" for image in images.values())
    return {name: np.asarray(image) for name, image in images.items()}


def compute_miou(predicted, truth, num_classes=3):
    """Returns the mIoU, computed with NumPy alone."""
    counts = np.zeros((num_classes, 256), np.int64)
    for name, ids in predicted.items():
        label = np.asarray(Image.open(truth / name))
        np.add.at(counts, (ids, label), 1)
    counts = counts[:, :num_classes]
    union = counts.sum(0) + counts.sum(1) - np.diag(counts)
    return np.mean(np.diag(counts)[union > 0] / union[union > 0])


@pytest.mark.parametrize("sizes", ["few", "many"])
def test_predicted_files_have_the_evaluated_miou(sizes, request, tmp_path, monkeypatch):
    config, workdir = request.getfixturevalue(sizes)
    (row,) = json.loads((workdir / "results.json").read_text())["rows"]
    assert row["protocol"]["pad_to"] == {"few": 1, "many": 16}[sizes]
    bundle = model_bundle.load(workdir)
    data = load.load_dataset(config)
    evaluator = evaluate.Evaluator(
        bundle.model, data, config.eval, one_device_mesh(), bundle.pad_value
    )
    images = os.path.join(config.data.root, "images", "val")
    predict(monkeypatch, *flags(workdir, images, tmp_path))
    label_maps = read_maps(tmp_path)
    assert len(label_maps) == 9
    assert len(np.unique(np.concatenate([ids.ravel() for ids in label_maps.values()]))) > 1
    miou = compute_miou(label_maps, workdir.parent / "data" / "masks" / "val")
    assert 0.05 < miou < 0.9
    assert miou == pytest.approx(row["miou"], abs=1e-6)
    assert miou == pytest.approx(evaluator(bundle.variables).miou, abs=1e-6)
    # The prediction of an image does not depend on the other images.
    predict(monkeypatch, *flags(workdir, f"{images}/nested/4.png", tmp_path / "alone"))
    np.testing.assert_array_equal(
        read_maps(tmp_path / "alone")["4.png"], label_maps["nested/4.png"]
    )


def test_an_evaluated_size_is_never_padded(few, tmp_path, monkeypatch):
    """Few sizes were evaluated and many are predicted: only the new sizes are padded."""
    _, workdir = few
    images = workdir.parent / "data" / "images" / "val"
    predict(monkeypatch, *flags(workdir, images, tmp_path / "before"))
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for i, size in enumerate(MANY):
        Image.fromarray(np.full((*size, 3), 20 * i, np.uint8)).save(mixed / f"new{i}.png")
    (mixed / "3.png").write_bytes((images / "3.png").read_bytes())
    predict(monkeypatch, *flags(workdir, mixed, tmp_path / "after"))
    before, after = read_maps(tmp_path / "before"), read_maps(tmp_path / "after")
    np.testing.assert_array_equal(after["3.png"], before["3.png"])
    assert [after[f"new{i}.png"].shape for i in range(9)] == MANY


@pytest.mark.parametrize("sizes", ["few", "many"])
def test_arrays_are_predicted_as_their_files(sizes, request, tmp_path, monkeypatch):
    config, workdir = request.getfixturevalue(sizes)
    images = os.path.join(config.data.root, "images", "val")
    predict(monkeypatch, *flags(workdir, images, tmp_path), "--probabilities", "--nooverlays")
    files = read_maps(tmp_path)
    arrays = [np.asarray(Image.open(os.path.join(images, name))) for name in files]
    # As a copy of model/ alone.
    model = TrainedModel.load(workdir / "model", devices=jax.devices()[:1])
    shares = model.predict_probabilities(arrays)
    for name, classes, share in zip(files, model.predict(arrays), shares, strict=True):
        np.testing.assert_array_equal(classes, files[name], err_msg=name)
        npz = tmp_path / "probabilities" / f"{name[:-4]}.npz"
        np.testing.assert_array_equal(np.round(255 * share), np.load(npz)["probabilities"])


def test_arrays_are_predicted_as_their_files_by_a_downscaled_network_in_tiles(pointwise, tmp_path):
    bundle = dataclasses.replace(pointwise, downscale=2)
    devices = one_device_mesh()
    config = dataclasses.replace(model_bundle.evaluation_config(bundle, 1), max_pixels=900)
    pixels = {"large": (71, 130, 3), "small": (41, 37, 3)}
    rng = np.random.default_rng(5)
    pixels = {k: rng.integers(0, 256, shape).astype(np.uint8) for k, shape in pixels.items()}
    for name, image in pixels.items():
        Image.fromarray(image).save(tmp_path / f"{name}.png")
    writer = prediction_writer.PredictionWriter(bundle, config, devices, tmp_path / "out")
    assert writer([load.Example(n, str(tmp_path / f"{n}.png"), None) for n in pixels]) == {}
    files = read_maps(tmp_path / "out")
    for name, classes in zip(
        pixels, TrainedModel(bundle, config, devices).predict(list(pixels.values())), strict=True
    ):
        np.testing.assert_array_equal(classes, files[f"{name}.png"])


@pytest.fixture
def photos(tmp_path):
    """Returns a folder with one image in several file formats, and unreadable files."""
    folder = tmp_path / "photos"
    (folder / "deep").mkdir(parents=True)
    rng = np.random.default_rng(1)
    pixels = np.kron(rng.integers(0, 256, (5, 6, 1)), np.ones((8, 8, 3))).astype(np.uint8)
    image = Image.fromarray(pixels)
    image.save(folder / "deep" / "plain.bmp")
    image.convert("L").save(folder / "grey.png")
    alpha = np.dstack([pixels, rng.integers(0, 256, (40, 48))]).astype(np.uint8)
    Image.fromarray(alpha).save(folder / "alpha.png")
    exif = Image.Exif()
    exif[0x112] = 6
    # Stored with an EXIF orientation that rotates it by 90 degrees.
    image.transpose(Image.Transpose.ROTATE_90).save(
        folder / "turned.webp", "WEBP", lossless=True, exif=exif
    )
    image.save(folder / "same.png")
    image.save(folder / "same.tif")
    Image.fromarray(pixels[:1, :1]).save(folder / "one.png")
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 200).save(folder / "sixteen.png")
    (folder / "empty.jpg").write_bytes(b"")
    content = (folder / "same.tif").read_bytes()
    (folder / "cut.tif").write_bytes(content[: len(content) // 2])
    os.mkfifo(folder / "pipe.png")
    (folder / "notes.txt").write_text("no image")
    return folder


def test_all_image_formats_are_predicted_and_unreadable_files_listed(
    few, photos, monkeypatch, capsys
):
    _, workdir = few
    output = photos / "predicted"
    error = get_error(monkeypatch, *flags(workdir, photos, output))
    assert error.startswith("Error: 4 files could not be predicted, all others are written:\n")
    for line in (
        *("cut.tif cannot be decoded", "empty.jpg is not an image", "sixteen.png has more"),
        "pipe.png is a named pipe",
    ):
        assert f"\n  {photos}/{line}" in error
    assert "1 files below" in capsys.readouterr().out
    label_maps = read_maps(output)
    assert label_maps.keys() == {
        *("deep/plain.png", "grey.png", "alpha.png", "turned.png", "one.png"),
        # Their names differ only in the suffix.
        *("same.png.png", "same.tif.png"),
    }
    assert label_maps["one.png"].shape == (1, 1)
    equal = ("grey.png", "alpha.png", "turned.png", "same.png.png", "same.tif.png")
    for name in equal:
        np.testing.assert_array_equal(label_maps[name], label_maps["deep/plain.png"], err_msg=name)
    record = json.loads((output / "predictions.json").read_text())
    assert record["images"] == 7 and len(record["broken"]) == 4 and record["ended"]
    # A second call ignores the predictions in the input folder and writes the same files.
    files = {p: p.read_bytes() for p in output.rglob("*") if p.is_file()}
    get_error(monkeypatch, *flags(workdir, photos, output))
    assert {p: p.read_bytes() for p in output.rglob("*") if p.is_file()} == files


def test_probabilities_and_changed_protocol(few, photos, tmp_path, monkeypatch, capsys):
    _, workdir = few
    arguments = flags(workdir, photos / "same.png", tmp_path / "out")
    predict(monkeypatch, *arguments, "--probabilities", "--nooverlays", "--flip", "--scales=.5,1")
    out = capsys.readouterr().out
    assert "--flip=True --scales=(0.5, 1.0) instead" in out and "\n1 image predicted: " in out
    assert not (tmp_path / "out" / "overlays").exists()
    with np.load(tmp_path / "out" / "probabilities" / "same.npz") as archive:
        levels, names = archive["probabilities"], archive["classes"]
    assert levels.dtype == np.uint8 and levels.shape == (40, 48, 3)
    assert tuple(names) == CLASSES
    assert np.abs(levels.sum(-1, dtype=int) - 255).max() <= 2
    ids = read_maps(tmp_path / "out")["same.png"]
    assert (np.take_along_axis(levels, ids[..., None], -1)[..., 0] == levels.max(-1)).all()
    record = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert record["protocol"]["scales"] == [0.5, 1.0] and not record["as_evaluated"]


@pytest.fixture
def pointwise(few):
    network = Pointwise()
    variables = jax.jit(network.init)(jax.random.key(1), np.zeros((1, 4, 4, 3), np.float32))
    bundle = model_bundle.load(few[1])
    return dataclasses.replace(bundle, model=network, variables=jax.device_get(variables))


def test_tiled_prediction_equals_prediction_in_one_pass(pointwise, tmp_path):
    pixels = np.random.default_rng(5).integers(0, 256, (41, 130, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "large.png")
    example = load.Example("large", str(tmp_path / "large.png"), None)
    devices = mesh.make_mesh(jax.devices()[:2])
    protocol = model_bundle.evaluation_config(pointwise, 2)
    outputs = {}
    for name, max_pixels in (("whole", 10_000), ("tiles", 900)):
        config = dataclasses.replace(protocol, max_pixels=max_pixels)
        writer = prediction_writer.PredictionWriter(
            pointwise, config, devices, tmp_path / name, overlays=False, probabilities=True
        )
        assert writer([example]) == {}
        levels = np.load(tmp_path / name / "probabilities" / "large.npz")["probabilities"]
        outputs[name] = read_maps(tmp_path / name)["large.png"], levels
    assert len(np.unique(outputs["whole"][0])) > 1
    for whole, tiles in zip(outputs["whole"], outputs["tiles"], strict=True):
        np.testing.assert_array_equal(whole, tiles)


@pytest.mark.parametrize(("size", "tile"), [(10_000, 2048), (2049, 2048), (5, 5), (1, 1)])
def test_tiles_cover_an_axis_without_their_borders(size, tile):
    tiles = tiling.tile_axis(size, tile)
    assert [i for t in tiles for i in range(t.low, t.high)] == list(range(size))
    assert all(t.start <= t.low and t.high <= t.start + tile <= size for t in tiles)
    # Inside the image, no tile provides pixels near its own border.
    assert all(t.low - t.start >= 256 for t in tiles[1:])


def test_names_that_would_collide_keep_their_suffixes():
    paths = ["a.jpg", "a.png", "b.png", "a.jpg.png", "sub/a.png"]
    assert inputs.output_names(paths) == ["a.jpg", "a.png", "b", "a.jpg.png", "sub/a"]


def test_the_legend_of_an_overlay_lists_the_present_classes():
    palette = ((0, 0, 0), (200, 100, 0), (0, 250, 0))
    image = np.full((40, 60, 3), 100, np.uint8)
    classes = np.zeros((40, 60), np.uint8)
    classes[:, 15:] = 1
    sheet = np.asarray(visualize.with_legend(image, classes, CLASSES, palette))
    # Enlarged four times to make room for the legend; blended from 45 % image and 55 % class.
    assert sheet.shape[1] == 240 and sheet.shape[0] > 160
    assert (sheet[:160, :60] == 45).all() and (sheet[:160, 60:] == (155, 100, 45)).all()
    legend = sheet[160:].reshape(-1, 3).tolist()
    assert [200, 100, 0] in legend and [0, 0, 0] in legend and [0, 250, 0] not in legend
    large = visualize.with_legend(
        np.zeros((30, 5000, 3), np.uint8), np.ones((30, 5000), np.uint8), CLASSES, palette
    )
    assert large.width == 1667


def test_a_stopped_prediction_is_recorded_as_unfinished(pointwise, photos, tmp_path):
    images = inputs.Images(photos, tmp_path / "out")
    protocol = dataclasses.replace(model_bundle.evaluation_config(pointwise, 1), batch=1)
    writer = prediction_writer.PredictionWriter(
        pointwise, protocol, one_device_mesh(), tmp_path / "out"
    )
    counts = []
    with pytest.raises(preemption.Preempted), preemption.stop_when(lambda: len(counts) >= 5):
        writer(images.examples, counts.append)
    assert 0 < len(read_maps(tmp_path / "out")) < 7
    assert not json.loads((tmp_path / "out" / "predictions.json").read_text())["ended"]


def test_invalid_arguments_print_one_sentence(few, photos, tmp_path, monkeypatch):
    _, workdir = few
    (tmp_path / "file").write_text("")
    (tmp_path / "none").mkdir()
    for arguments, sentence in (
        ((workdir, tmp_path / "none", tmp_path / "o"), "none holds no image"),
        ((workdir, tmp_path / "missing", tmp_path / "o"), "missing is missing: give a folder"),
        ((workdir, photos, photos), "--output is the folder of the images"),
        ((workdir, photos, tmp_path / "file"), "file/predictions.json cannot be written"),
        ((photos, photos, tmp_path / "o"), "has no model/weights.safetensors: a run writes it"),
        ((workdir, photos, ""), "--output is missing: give it"),
    ):
        assert sentence in get_error(monkeypatch, *flags(*arguments))
    for option, sentence in (
        ("--scales=1,x", "numbers with commas between them"),
        ("--scales=0", "--scales is (0.0,): make it a tuple of numbers above 0"),
        ("--scales=1,inf", "--scales is (1.0, inf): make it finite"),
        ("--window=16,16", "--window and --window_stride go together"),
        ("--batch=0", "--batch is 0: make it at least 1"),
        ("--max_pixels=0", "--max_pixels is 0"),
        ("--pad_two=3", "Unknown command line flag 'pad_two'"),
    ):
        assert sentence in get_error(monkeypatch, *flags(workdir, photos, tmp_path / "o"), option)


def test_links_that_form_cycles_add_no_images(photos, tmp_path):
    before = [e.id for e in inputs.Images(photos, tmp_path / "out").examples]
    (photos / "itself").symlink_to(photos)
    (photos / "deep" / "up").symlink_to(tmp_path)
    (photos / "deep" / "across").symlink_to(photos / "deep")
    assert [e.id for e in inputs.Images(photos, tmp_path / "out").examples] == before


@pytest.fixture
def writer_into(pointwise):
    """Returns a function that predicts images into a folder, with all kinds of files."""

    def predict_into(images, output):
        protocol = model_bundle.evaluation_config(pointwise, 1)
        writer = prediction_writer.PredictionWriter(
            pointwise, protocol, one_device_mesh(), output, probabilities=True
        )
        return writer(inputs.Images(images, output).examples)

    return predict_into


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.*")}


def test_files_that_no_prediction_wrote_are_not_overwritten(photos, tmp_path, writer_into):
    photo, output = photos / "grey.png", tmp_path / "out"
    writer_into(photo, output)
    written = contents(output)
    assert sorted(written) == [
        *("grey.png", "overlays/grey.jpg", "predictions.json", "probabilities/grey.npz"),
    ]
    for name in written:
        for other in (b"", b"mine", b"{}", b'{"ended": true}'):
            # In a folder of its own, and in place of the file that was predicted.
            for folder, files in ((tmp_path / "new", {}), (output, written)):
                for path, content in (files | {name: other}).items():
                    (folder / path).parent.mkdir(parents=True, exist_ok=True)
                    (folder / path).write_bytes(content)
                before = contents(folder)
                with pytest.raises(UserError) as error:
                    writer_into(photo, folder)
                assert error.value.code.startswith("output-") and name in str(error.value)
                assert contents(folder) == before
                (folder / name).unlink()
    for path, content in written.items():
        (output / path).write_bytes(content)
    writer_into(photo, output)
    assert contents(output) == written


def test_predictions_of_several_commands_and_of_older_code_are_replaced(
    photos, tmp_path, writer_into
):
    output = tmp_path / "out"
    for name in ("grey.png", "same.png", "grey.png"):
        writer_into(photos / name, output)
    record = json.loads((output / "predictions.json").read_text())
    assert len(record["files"]) == 6 and all(record["files"].values())
    # Older code wrote no list of files, and a command that was killed knows no content.
    del record["files"]
    (output / "predictions.json").write_text(json.dumps(record))
    for name in ("same.png", "grey.png"):
        writer_into(photos / name, output)
    record = json.loads((output / "predictions.json").read_text())
    (output / "predictions.json").write_text(
        json.dumps(record | {"ended": False, "files": dict.fromkeys(record["files"])})
    )
    (output / "grey.png").unlink()
    (output / "same.png").write_bytes(b"half")
    writer_into(photos / "same.png", output)


def test_only_folders_of_predictions_are_left_out_of_the_input(
    few, photos, tmp_path, writer_into, monkeypatch, capsys
):
    writer_into(photos / "same.png", photos / "deep" / "predicted")
    (photos / "predictions.json").write_text('{"images": []}')
    (photos / "deep" / "predictions.json").write_text("[]")
    images = inputs.Images(photos, tmp_path / "out")
    assert [os.path.relpath(f, photos) for f in images.predictions] == ["deep/predicted"]
    assert "deep/plain" in [e.id for e in images.examples]
    for folder, code in (
        (photos / "deep" / "predicted", "input-holds-predictions"),
        (photos, "output-is-input"),
    ):
        with raises_code(code, folder.name):
            inputs.Images(folder, photos)
    with raises_code("output-holds-images", "deep"):
        inputs.Images(photos, photos / "deep")
    get_error(monkeypatch, *flags(few[1], photos, tmp_path / "out"))
    out = capsys.readouterr().out
    assert "folders of earlier predictions are left out of the input: " in out
    assert "deep/predicted" in out
