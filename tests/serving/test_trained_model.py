"""Predictions on arrays: forms of the input, batches, padding and tiles."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from semiseg_jax import mesh
from semiseg_jax.eval_protocol import EvalProtocol
from semiseg_jax.serving import model_bundle
from semiseg_jax.serving.trained_model import TrainedModel
from tests.errors import raises_code
from tests.networks import Pointwise

PROTOCOL = EvalProtocol(
    data="folder",
    split="val",
    scales=(1.0,),
    flip=False,
    window="whole",
    selection="last",
    pad_to=1,
    split_hash="",
    evaluation_hash=None,
    seed=0,
    config_hash="",
)


def make_bundle(**changes):
    """A network whose classes depend on each pixel alone; batches of 4, padding to 16 pixels."""
    network = Pointwise()
    variables = jax.jit(network.init)(jax.random.key(1), np.zeros((1, 4, 4, 3), np.float32))
    bundle = model_bundle.ModelBundle(
        model=network,
        variables=jax.device_get(variables),
        classes=("ground", "thing", "corner"),
        palette=((0, 0, 0), (200, 100, 0), (0, 250, 0)),
        model_config=ConfigDict(),
        pad_value=np.array([9, 8, 7], np.uint8),
        pad_to=16,
        exact_sizes=frozenset(),
        downscale=1,
        batch=4,
        largest_pixels=0,
        protocol=PROTOCOL,
        description={},
    )
    return dataclasses.replace(bundle, **changes)


def make_model(num_devices=1, **settings):
    bundle = make_bundle()
    config = model_bundle.evaluation_config(bundle, num_devices)
    devices = mesh.make_mesh(jax.devices()[:num_devices])
    return TrainedModel(bundle, dataclasses.replace(config, **settings), devices)


def shapes_of_batches(model, monkeypatch):
    """A list to which the shapes of the computed batches are added, each one once."""
    shapes = []
    start = model.start_batch

    def record(images):
        shapes.extend([images.shape] * (images.shape not in shapes))
        return start(images)

    monkeypatch.setattr(model, "start_batch", record)
    return shapes


def draw(*size, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3)).astype(np.uint8)


def expected_probabilities(image):
    (kernel, bias) = (make_variables()[name] for name in ("kernel", "bias"))
    logits = image.astype(np.float32) / 255 @ kernel[0, 0] + bias
    exponents = np.exp(logits - logits.max(-1, keepdims=True))
    return exponents / exponents.sum(-1, keepdims=True)


@functools.cache
def make_variables():
    return make_bundle().variables["params"]["Conv_0"]


def test_the_output_has_the_form_of_the_input():
    model = make_model()
    images = [draw(6, 9), draw(5, 4, seed=1), draw(6, 9, seed=2)]
    maps = model.predict(images)
    probabilities = model.predict_probabilities(images)
    for image, classes, shares in zip(images, maps, probabilities, strict=True):
        assert classes.dtype == np.uint8 and classes.shape == image.shape[:2]
        assert shares.dtype == np.float32 and shares.shape == image.shape
        np.testing.assert_allclose(shares, expected_probabilities(image), atol=1e-5)
        np.testing.assert_array_equal(classes, shares.argmax(-1))
    assert len(np.unique(np.concatenate([m.ravel() for m in maps]))) > 1
    # One image, a batch, and everything that NumPy reads as an array.
    for one in (images[0], jax.numpy.asarray(images[0]), Image.fromarray(images[0])):
        np.testing.assert_array_equal(model.predict(one), maps[0])
    batch = np.stack([images[0], images[2]])
    np.testing.assert_array_equal(model.predict(batch), np.stack([maps[0], maps[2]]))
    np.testing.assert_array_equal(model.predict(images[0][:, ::-1]), maps[0][:, ::-1])
    assert len(model.predict(iter(images))) == 3
    assert model.palette[maps[0]].shape == images[0].shape


def test_no_image_gives_no_prediction():
    model = make_model()
    assert model.predict([]) == [] and model.predict_probabilities(()) == []
    assert model.predict(np.zeros((0, 4, 5, 3), np.uint8)).shape == (0, 4, 5)
    assert model.predict_probabilities(np.zeros((0, 4, 5, 3), np.uint8)).shape == (0, 4, 5, 3)


@pytest.mark.parametrize(
    ("images", "code", "parts"),
    [
        (draw(4, 5) / 255, "image-dtype-invalid", ("float64", "255 * image")),
        (np.full((4, 5, 3), np.nan, np.float32), "image-dtype-invalid", ("float32",)),
        (draw(4, 5).astype(np.uint16), "image-dtype-invalid", ("The image", "uint16")),
        (draw(4, 5).astype(np.int64), "image-dtype-invalid", ("int64",)),
        (draw(4, 5)[..., 0], "image-shape-invalid", ("[4, 5]", "grey")),
        (draw(4, 5)[..., :1], "image-shape-invalid", ("[4, 5, 1]", "grey")),
        (np.zeros((4, 5, 4), np.uint8), "image-shape-invalid", ("[4, 5, 4]", "image[..., :3]")),
        (np.zeros((0, 5, 3), np.uint8), "image-shape-invalid", ("[0, 5, 3]",)),
        (np.zeros((1, 1, 4, 5, 3), np.uint8), "image-shape-invalid", ("[1, 4, 5, 3]",)),
        ([draw(4, 5), draw(4, 5)[..., 0]], "image-shape-invalid", ("Image 1", "[4, 5]")),
        ([draw(4, 5), None], "image-shape-invalid", ("Image 1",)),
        ([[[1, 2, 3], [1, 2]]], "image-shape-invalid", ("Image 0",)),
        ("photo.jpg", "images-not-a-sequence", ("str", "read_image")),
        (["photo.jpg"], "image-shape-invalid", ("Image 0", "read_image")),
        (None, "images-not-a-sequence", ("NoneType",)),
        ({"image": draw(4, 5)}, "images-not-a-sequence", ("dict",)),
    ],
)
def test_other_arrays_are_refused_in_one_sentence(images, code, parts):
    model = make_model()
    for predict in (model.predict, model.predict_probabilities):
        with raises_code(code, *parts):
            predict(images)


def test_images_larger_than_a_pass_are_predicted_in_tiles(monkeypatch):
    image = draw(41, 130)
    whole, tiled = make_model(), make_model(max_pixels=900)
    shapes = shapes_of_batches(tiled, monkeypatch)
    small = draw(20, 30, seed=3)
    for expected, result in zip(
        whole.predict([image, small]), tiled.predict([image, small]), strict=True
    ):
        np.testing.assert_array_equal(result, expected)
    assert all(height * width <= 900 for _, height, width, _ in shapes)
    np.testing.assert_allclose(
        tiled.predict_probabilities(image), whole.predict_probabilities(image), atol=1e-6
    )


def test_few_programs_are_compiled_for_many_sizes_one_after_the_other(monkeypatch):
    model = make_model()
    shapes = shapes_of_batches(model, monkeypatch)
    images = [draw(20 + i, 45 - i) for i in range(25)]
    maps = [model.predict(image) for image in images]
    # Eight without padding; the others are padded to multiples of 16.
    assert [shape for _, *shape, _ in shapes[:8]] == [list(i.shape[:2]) for i in images[:8]]
    assert {shape[1:3] for shape in shapes[8:]} == {(32, 48), (48, 32)}
    # A size that was not padded is never padded.
    count = len(shapes)
    np.testing.assert_array_equal(model.predict(images[0]), maps[0])
    assert [m.shape for m in model.predict(images)] == [i.shape[:2] for i in images]
    assert not any(shape[1:3] == (32, 48) and shape[0] > 4 for shape in shapes[count:])


def test_few_programs_are_compiled_for_calls_with_any_number_of_images(monkeypatch):
    for devices, places in ((1, [1, 2, 4]), (2, [2, 4])):
        model = make_model(devices)
        shapes = shapes_of_batches(model, monkeypatch)
        for count in range(1, 8):
            images = draw(count, 7, 8)
            maps = model.predict(images)
            np.testing.assert_array_equal(maps[-1], model.predict(images[-1]))
        assert sorted(shape[0] for shape in shapes) == places


def test_padding_that_is_asked_for_applies_to_every_image(monkeypatch):
    model = make_model(pad_to=16)
    shapes = shapes_of_batches(model, monkeypatch)
    model.predict([draw(20, 30), draw(17, 32)])
    assert {shape[1:3] for shape in shapes} == {(32, 32)}


def test_settings_are_checked():
    for settings, code, parts in (
        ({"scales": (0,)}, "flag-value-invalid", ("scales is (0,)",)),
        ({"scales": 0.5}, "flag-value-invalid", ("scales is 0.5: make it a tuple",)),
        ({"scales": [float("inf")]}, "flag-value-not-finite", ("scales",)),
        ({"window": (16, 16)}, "window-flag-missing", ("window_stride",)),
        ({"max_pixels": 0}, "flag-value-invalid", ("max_pixels is 0",)),
        ({"scale": (1.0,)}, "inference-setting-unknown", ("scale ", "scales", "max_pixels")),
    ):
        with raises_code(code, *parts):
            TrainedModel.load("missing", **settings)
    with raises_code("model-bundle-missing", "missing"):
        TrainedModel.load("missing", scales=[0.5, 1])
