"""Predictions against evaluation, of every kind of file, and what is refused."""

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
    deployed,
    evaluate,
    interruption,
    mesh,
    predictions,
    rounds,
    seeing,
    state,
    train,
)
from semiseg_jax.data import inputs, pictures, sources
from semiseg_jax.errors import UserError
from semiseg_jax.models import deeplab
from tests import mains
from tests.conftest import tiny_config
from tests.networks import Pointwise

CLASSES = ("ground", "thing", "corner")
FEW = [(37, 51), (48, 36)]
MANY = [(33 + 3 * i, 60 - 5 * i) for i in range(9)]


def make_data(root, sizes):
    """Noise with blocks; 2 images to train on, and 9 to evaluate on, of the given sizes."""
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


def random_weights(path, config):
    """A network that sees several classes; after a short training it would see one."""
    rng = np.random.default_rng(3)

    def draw(where, shape):
        name = jax.tree_util.keystr(where)
        drawn = rng.normal(0, 0.5, shape.shape).astype(shape.dtype)
        if "classifier" in name and "bias" in name:
            return 0 * drawn
        return np.abs(drawn) + 0.5 if "var" in name else drawn

    shapes = state.variable_shapes(deeplab.build(config, 3))
    variables = jax.tree_util.tree_map_with_path(draw, shapes)
    checkpoints.save_weights(path, state.for_inference(variables), {})


def mesh_of_one():
    return mesh.make_mesh(jax.devices()[:1])


def run(folder, sizes):
    """A run over data of these sizes that ends with random weights: (config, workdir)."""
    make_data(folder / "data", sizes)
    config = tiny_config(
        data__root=str(folder / "data"),
        data__cache_dir=str(folder / "cache"),
        data__classes=CLASSES,
        eval__batch=4,
        eval__pad_to=16,
        rounds__count=0,
    )
    random_weights(folder / "weights.safetensors", config.model)
    config.model.pretrained = str(folder / "weights.safetensors")
    devices = mesh_of_one()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mesh, "make_mesh", lambda: devices)
        # Ends where training would start.
        patch.setattr(train, "run", lambda stage, program, start, **_: start())
        rounds.run(config, folder / "run")
    return config, folder / "run"


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    return run(tmp_path_factory.mktemp("few"), FEW)


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    return run(tmp_path_factory.mktemp("many"), MANY)


predict = functools.partial(mains.run, command="predict")
refused = functools.partial(mains.refused, command="predict")


def flags(workdir, source, output):
    return f"--workdir={workdir}", f"--input={source}", f"--output={output}"


def maps(folder):
    """Class ids by name."""
    found = {p.relative_to(folder).as_posix(): Image.open(p) for p in folder.rglob("*.png")}
    assert all(image.mode == "P" for image in found.values())
    return {name: np.asarray(image) for name, image in found.items()}


def scored(predicted, truth, num_classes=3):
    """mIoU by NumPy alone."""
    counts = np.zeros((num_classes, 256), np.int64)
    for name, ids in predicted.items():
        label = np.asarray(Image.open(truth / name))
        np.add.at(counts, (ids, label), 1)
    counts = counts[:, :num_classes]
    union = counts.sum(0) + counts.sum(1) - np.diag(counts)
    return np.mean(np.diag(counts)[union > 0] / union[union > 0])


@pytest.mark.parametrize("made", ["few", "many"])
def test_training_evaluation_and_predicted_files_agree(made, request, tmp_path, monkeypatch):
    config, workdir = request.getfixturevalue(made)
    (row,) = json.loads((workdir / "results.json").read_text())["rows"]
    assert row["protocol"]["pad_to"] == {"few": 1, "many": 16}[made]
    model = deployed.load(workdir)
    data = sources.load(config)
    score = evaluate.Evaluator(model.model, data, config.eval, mesh_of_one(), model.colour)
    images = os.path.join(config.data.root, "images", "val")
    predict(monkeypatch, *flags(workdir, images, tmp_path))
    found = maps(tmp_path)
    assert len(found) == 9
    assert len(np.unique(np.concatenate([ids.ravel() for ids in found.values()]))) > 1
    miou = scored(found, workdir.parent / "data" / "masks" / "val")
    assert 0.05 < miou < 0.9
    assert miou == pytest.approx(row["miou"], abs=1e-6)
    assert miou == pytest.approx(score(model.variables).miou, abs=1e-6)
    # One image alone, in another batch, is seen as it was among the others.
    predict(monkeypatch, *flags(workdir, f"{images}/nested/4.png", tmp_path / "alone"))
    np.testing.assert_array_equal(maps(tmp_path / "alone")["4.png"], found["nested/4.png"])


def test_an_evaluated_image_is_seen_as_it_was_whatever_lies_beside_it(few, tmp_path, monkeypatch):
    """Few sizes were evaluated and many are predicted: only the new ones are padded."""
    _, workdir = few
    images = workdir.parent / "data" / "images" / "val"
    predict(monkeypatch, *flags(workdir, images, tmp_path / "before"))
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for i, size in enumerate(MANY):
        Image.fromarray(np.full((*size, 3), 20 * i, np.uint8)).save(mixed / f"new{i}.png")
    (mixed / "3.png").write_bytes((images / "3.png").read_bytes())
    predict(monkeypatch, *flags(workdir, mixed, tmp_path / "after"))
    before, after = maps(tmp_path / "before"), maps(tmp_path / "after")
    np.testing.assert_array_equal(after["3.png"], before["3.png"])
    assert [after[f"new{i}.png"].shape for i in range(9)] == MANY


@pytest.fixture
def photos(tmp_path):
    """Files of every kind, three of them broken; one image in several guises."""
    folder = tmp_path / "photos"
    (folder / "deep").mkdir(parents=True)
    rng = np.random.default_rng(1)
    pixels = np.kron(rng.integers(0, 256, (5, 6, 1)), np.ones((8, 8, 3))).astype(np.uint8)
    image = Image.fromarray(pixels)
    image.save(folder / "deep" / "plain.bmp")
    image.convert("L").save(folder / "grey.png")
    alpha = np.dstack([pixels, rng.integers(0, 256, (40, 48))]).astype(np.uint8)
    Image.fromarray(alpha).save(folder / "alpha.png")
    turned = Image.Exif()
    turned[0x112] = 6
    # Stored lying; to be shown turned by a quarter.
    image.transpose(Image.Transpose.ROTATE_90).save(
        folder / "turned.webp", "WEBP", lossless=True, exif=turned
    )
    image.save(folder / "same.png")
    image.save(folder / "same.tif")
    Image.fromarray(pixels[:1, :1]).save(folder / "one.png")
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 200).save(folder / "sixteen.png")
    (folder / "empty.jpg").write_bytes(b"")
    content = (folder / "same.tif").read_bytes()
    (folder / "cut.tif").write_bytes(content[: len(content) // 2])
    (folder / "notes.txt").write_text("no image")
    return folder


def test_every_kind_of_file_and_broken_ones_at_the_end(few, photos, monkeypatch, capsys):
    _, workdir = few
    output = photos / "predicted"
    sentence = refused(monkeypatch, *flags(workdir, photos, output))
    assert sentence.startswith("Error: 3 files could not be predicted, all others are written:\n")
    for line in ("cut.tif cannot be decoded", "empty.jpg is not an image", "sixteen.png has more"):
        assert f"\n  {photos}/{line}" in sentence
    assert "1 files below" in capsys.readouterr().out
    found = maps(output)
    assert found.keys() == {
        *("deep/plain.png", "grey.png", "alpha.png", "turned.png", "one.png"),
        # They differ by their endings alone.
        *("same.png.png", "same.tif.png"),
    }
    assert found["one.png"].shape == (1, 1)
    same = ("grey.png", "alpha.png", "turned.png", "same.png.png", "same.tif.png")
    for name in same:
        np.testing.assert_array_equal(found[name], found["deep/plain.png"], err_msg=name)
    record = json.loads((output / "predictions.json").read_text())
    assert record["images"] == 7 and len(record["broken"]) == 3 and record["ended"]
    # Again: what was predicted is no image to predict, and every file is the same.
    files = {p: p.read_bytes() for p in output.rglob("*") if p.is_file()}
    refused(monkeypatch, *flags(workdir, photos, output))
    assert {p: p.read_bytes() for p in output.rglob("*") if p.is_file()} == files


def test_probabilities_and_another_protocol(few, photos, tmp_path, monkeypatch, capsys):
    _, workdir = few
    arguments = flags(workdir, photos / "same.png", tmp_path / "out")
    predict(monkeypatch, *arguments, "--probabilities", "--nooverlays", "--flip", "--scales=.5,1")
    assert "--flip=True --scales=(0.5, 1.0) instead" in capsys.readouterr().out
    assert not (tmp_path / "out" / "overlays").exists()
    with np.load(tmp_path / "out" / "probabilities" / "same.npz") as archive:
        levels, names = archive["probabilities"], archive["classes"]
    assert levels.dtype == np.uint8 and levels.shape == (40, 48, 3)
    assert tuple(names) == CLASSES
    assert np.abs(levels.sum(-1, dtype=int) - 255).max() <= 2
    ids = maps(tmp_path / "out")["same.png"]
    assert (np.take_along_axis(levels, ids[..., None], -1)[..., 0] == levels.max(-1)).all()
    record = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert record["protocol"]["scales"] == [0.5, 1.0] and not record["as_evaluated"]


@pytest.fixture
def pointwise(few):
    network = Pointwise()
    variables = jax.jit(network.init)(jax.random.key(1), np.zeros((1, 4, 4, 3), np.float32))
    model = deployed.load(few[1])
    return dataclasses.replace(model, model=network, variables=jax.device_get(variables))


def test_tiles_of_a_large_image_give_what_the_whole_gives(pointwise, tmp_path):
    pixels = np.random.default_rng(5).integers(0, 256, (41, 130, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "large.png")
    example = sources.Example("large", str(tmp_path / "large.png"), None)
    devices = mesh.make_mesh(jax.devices()[:2])
    protocol = seeing.as_evaluated(pointwise, 2)
    found = {}
    for name, most in (("whole", 10_000), ("tiles", 900)):
        tiled = dataclasses.replace(protocol, max_pixels=most)
        output = tmp_path / name
        assert predictions.Writer(pointwise, tiled, devices, output, False, True)([example]) == {}
        levels = np.load(output / "probabilities" / "large.npz")["probabilities"]
        found[name] = maps(output)["large.png"], levels
    assert len(np.unique(found["whole"][0])) > 1
    for whole, tiles in zip(found["whole"], found["tiles"], strict=True):
        np.testing.assert_array_equal(whole, tiles)


def test_a_device_is_given_no_more_than_it_should_have(pointwise):
    protocol = seeing.as_evaluated(pointwise, 1)
    sizes = [(600, 10_000), (3000, 4000), (1000, 1000), *FEW, *FEW, *FEW]
    plan = seeing.Sizes(sizes, pointwise, protocol, 1)
    assert [plan.seen(size) for size in sizes[:3]] == [(600, 2048), (2048, 2048), (1000, 1000)]
    assert [plan.batch(size) for size in [(600, 2048), (2048, 2048), (1000, 1000), FEW[0]]] == [
        *(3, 1, 4),
        4,
    ]
    for size, tile in ((10_000, 2048), (2049, 2048), (5, 5), (1, 1)):
        spans = seeing.spans(size, tile)
        decided = [range(s.low, s.high) for s in spans]
        assert [i for r in decided for i in r] == list(range(size))
        assert all(s.start <= s.low and s.high <= s.start + tile <= size for s in spans)
        # Away from the image's rim, a tile decides on nothing near its own.
        assert all(s.low - s.start >= 256 for s in spans[1:])


def test_names_that_differ_by_their_endings_keep_them():
    paths = ["a.jpg", "a.png", "b.png", "a.jpg.png", "sub/a.png"]
    assert inputs.output_names(paths) == ["a.jpg", "a.png", "b", "a.jpg.png", "sub/a"]


def test_an_overlay_names_the_classes_that_are_there():
    palette = ((0, 0, 0), (200, 100, 0), (0, 250, 0))
    image = np.full((40, 60, 3), 100, np.uint8)
    classes = np.zeros((40, 60), np.uint8)
    classes[:, 15:] = 1
    sheet = np.asarray(pictures.with_legend(image, classes, CLASSES, palette))
    # Four times as large, the least that gives the legend room; 45 % image and 55 % class.
    assert sheet.shape[1] == 240 and sheet.shape[0] > 160
    assert (sheet[:160, :60] == 45).all() and (sheet[:160, 60:] == (155, 100, 45)).all()
    legend = sheet[160:].reshape(-1, 3).tolist()
    assert [200, 100, 0] in legend and [0, 0, 0] in legend and [0, 250, 0] not in legend
    large = pictures.with_legend(
        np.zeros((30, 5000, 3), np.uint8), np.ones((30, 5000), np.uint8), CLASSES, palette
    )
    assert large.width == 1667


def test_it_stops_on_request_and_says_that_it_did_not_end(pointwise, photos, tmp_path):
    images = inputs.Images(photos, tmp_path / "out")
    protocol = dataclasses.replace(seeing.as_evaluated(pointwise, 1), batch=1)
    writer = predictions.Writer(pointwise, protocol, mesh_of_one(), tmp_path / "out")
    done = []
    with pytest.raises(interruption.Interrupted):
        writer(images.examples, done.append, asked=lambda: len(done) >= 5)
    assert 0 < len(maps(tmp_path / "out")) < 7
    assert not json.loads((tmp_path / "out" / "predictions.json").read_text())["ended"]


def test_what_cannot_be_done_is_one_sentence(few, photos, tmp_path, monkeypatch):
    _, workdir = few
    (tmp_path / "file").write_text("")
    (tmp_path / "none").mkdir()
    for arguments, sentence in (
        ((workdir, tmp_path / "none", tmp_path / "o"), "none holds no image"),
        ((workdir, tmp_path / "missing", tmp_path / "o"), "missing is missing: give a folder"),
        ((workdir, photos, photos), "--output is the folder of the images"),
        ((workdir, photos, tmp_path / "file"), "file/predictions.json cannot be written"),
        ((photos, photos, tmp_path / "o"), "has no model/weights.safetensors: a run writes it"),
        ((workdir, photos, ""), "Say --output"),
    ):
        assert sentence in refused(monkeypatch, *flags(*arguments))
    for option, sentence in (
        ("--scales=1,x", "numbers with commas between them"),
        ("--scales=0", "--scales is (0.0,): make it a tuple of numbers above 0"),
        ("--scales=1,inf", "--scales is (1.0, inf): make it finite"),
        ("--window=16,16", "--window and --window_stride go together"),
        ("--batch=0", "--batch is 0: make it at least 1"),
        ("--max_pixels=0", "--max_pixels is 0"),
        ("--pad_two=3", "Unknown command line flag 'pad_two'"),
    ):
        assert sentence in refused(monkeypatch, *flags(workdir, photos, tmp_path / "o"), option)


def test_what_is_no_prediction_is_not_written_over(photos, tmp_path):
    (photos / "masks").mkdir()
    mask = photos / "masks" / "grey.png"
    Image.new("L", (48, 40)).save(mask)
    with pytest.raises(UserError, match=r"masks/grey.png is there already, and is no predict"):
        inputs.Images(photos, photos / "masks")
    (photos / "masks" / "predictions.json").write_text("{}")
    assert len(inputs.Images(photos, photos / "masks").examples) == 10
