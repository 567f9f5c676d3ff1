"""data.cache_features: the features of images that are always shown alike, kept on disk."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from PIL import Image

from semiseg_jax import (
    compiled_model,
    config_check,
    mesh,
    self_training,
    stages,
    train,
)
from semiseg_jax.data import input_pipeline, load
from semiseg_jax.feature_cache import FeatureCache
from semiseg_jax.models import deeplab
from semiseg_jax.reporting import page
from semiseg_jax.train_state import init_variables
from tests.conftest import in_pairs, tiny_config, tiny_folder_config, write_folder_data
from tests.errors import raises_code

VIT = {"model__backbone": "tiny_dinov2", "model__head": "linear"}
FROZEN = VIT | {"model__freeze_backbone": True, "data__cache_features": True}
IMAGES = np.random.default_rng(0).integers(0, 256, (3, 28, 42, 3), np.uint8)


def make_model(**changes):
    model = deeplab.build(tiny_config(**(FROZEN | changes)).model, 3)
    return model, init_variables(model, 0, mesh.make_mesh(jax.devices()[:1]))


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def only_reading(cache):
    """The cache, which may ask for the shapes of features, and computes none any more."""
    encode = cache._encode

    def shapes_alone(image):
        assert isinstance(image, jax.core.Tracer), "features were computed again"
        return encode(image)

    cache._encode = shapes_alone
    return cache


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_features_are_computed_once_and_read_to_the_bit(tmp_path, dtype):
    model, variables = make_model(model__compute_dtype=dtype)
    folder = epath.Path(tmp_path / "features")
    first = FeatureCache(folder, model, variables).features(IMAGES)
    assert first.high.dtype == jnp.dtype(dtype) and first.size == (28, 42)
    # In another order, and some of them.
    again = only_reading(FeatureCache(folder, model, variables)).features(IMAGES[[2, 0]])
    equal(again, jax.tree.map(lambda leaf: leaf[[2, 0]], first))


def test_a_damaged_file_is_computed_again(tmp_path):
    model, variables = make_model()
    cache = FeatureCache(epath.Path(tmp_path), model, variables)
    expected = cache.features(IMAGES[:1])
    (path,) = tmp_path.rglob("*.npz")
    intact = path.read_bytes()
    flipped = bytearray(intact)
    flipped[len(intact) // 2] ^= 1
    for damaged in (b"", intact[:-100], intact[: len(intact) // 2], bytes(flipped), b"no archive"):
        path.write_bytes(damaged)
        equal(cache.features(IMAGES[:1]), expected)
        assert path.read_bytes() == intact


def test_other_weights_rules_or_pixels_have_other_files(tmp_path):
    """Each change finds a cache that is full of the files of the others, and computes its own."""
    folder = epath.Path(tmp_path)
    model, variables = make_model()
    cases = [(model, variables, IMAGES)]
    exchanged = jax.tree.map(lambda leaf: leaf, variables)
    backbone = exchanged["params"]["backbone"]
    backbone["cls_token"] = backbone["cls_token"].at[0].add(1.0)
    cases.append((model, exchanged, IMAGES))
    for change in (
        {"model__position_rule": "timm"},
        {"model__input_normalization": "half"},
        {"model__compute_dtype": "bfloat16"},
    ):
        cases.append((make_model(**change)[0], variables, IMAGES))
    darker = IMAGES.copy()
    darker[0, 0, 0, 0] ^= 1
    cases.append((model, variables, darker))
    cases.append((model, variables, IMAGES[:, :14]))
    for model, variables, images in cases:
        files = len(list(tmp_path.rglob("*.npz")))
        features = FeatureCache(folder, model, variables).features(images)
        new = 1 if images is darker else len(images)
        assert len(list(tmp_path.rglob("*.npz"))) - files == new
        expected = model.apply(variables, images, method="encode")
        tolerance = 0.05 if features.high.dtype == jnp.bfloat16 else 1e-5
        np.testing.assert_allclose(
            np.float32(features.high), np.float32(expected.high), atol=tolerance, rtol=tolerance
        )


def test_the_head_alone_changes_no_file(tmp_path):
    """Networks for other classes and heads that were trained find the same features."""
    model, variables = make_model()
    FeatureCache(epath.Path(tmp_path), model, variables).features(IMAGES)
    trained = jax.tree.map(lambda leaf: leaf, variables)
    trained["params"]["classifier"]["kernel"] += 1.0
    more_classes = deeplab.build(tiny_config(**FROZEN).model, 5)
    for model_of_run, weights in ((model, trained), (more_classes, trained)):
        FeatureCache(epath.Path(tmp_path), model_of_run, weights).features(IMAGES)
        assert len(list(tmp_path.rglob("*.npz"))) == len(IMAGES)


@pytest.mark.parametrize(
    "changes, devices, accumulate",
    [({}, 2, 1), ({}, 2, 2), ({"model__backbone": "tiny", "model__head": "v3plus"}, 2, 1)],
)
def test_a_step_on_cached_features_is_the_step_on_the_images(
    tmp_path, changes, devices, accumulate
):
    """Both streams; the images of a batch are in blocks by device and micro-batch."""
    config = tiny_config(**(FROZEN | changes), train__accumulate=accumulate)
    data_mesh = mesh.make_mesh(jax.devices()[:devices])
    model = deeplab.build(config.model, 3)
    rng = np.random.default_rng(1)
    arrays = {
        "image": rng.integers(0, 256, (16, 32, 40, 3), np.uint8),
        "label": rng.integers(0, 3, (16, 32, 40), np.uint8),
    }
    states = []
    for cached in (False, True):
        config.data.cache_features = cached
        program = compiled_model.make_program(config, "student", 10, model, data_mesh)
        state = program.create_state(init_variables(model, 0, data_mesh), data_mesh)
        layout = input_pipeline.lay_out_batch(program.spec, devices)
        batch = input_pipeline.TrainBatch(
            **arrays, is_pseudo=layout.pseudo, seed=np.zeros((16, 2), np.int64), ids=("a",) * 16
        )
        if cached:
            cache = FeatureCache(epath.Path(tmp_path), model, state.variables)
            batches = (b for b in [batch])
            (batch,) = cache.with_features(batches, program.spec, data_mesh)
            assert batch.features.high.shape[0] == 8
        placed = mesh.shard_batch(batch.arrays(), data_mesh)
        state, metrics = program.step(state, placed, jax.random.key(0))
        states.append(jax.device_get((state.params, state.norms, metrics)))
    plain, cached = states
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), plain, cached)
    equal(plain[0]["backbone"], cached[0]["backbone"])


def test_the_step_of_a_teacher_encodes_nothing():
    """Its images are labelled and weak alone: the program takes no image."""
    config = tiny_config(**FROZEN)
    model = deeplab.build(config.model, 3)
    one = mesh.make_mesh(jax.devices()[:1])
    reads_images = []
    for cached in (False, True):
        config.data.cache_features = cached
        program = compiled_model.make_program(config, "teacher", 10, model, one)
        lowered = train.trace_step(program, (32, 40), one).lower()
        # Arguments that nothing reads are no parameters of the program.
        reads_images.append("8x32x40x3xui8" in lowered.as_text())
    assert reads_images == [True, False]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_folder_data(tmp_path_factory.mktemp("images") / "data")


def test_weak_views_are_the_whole_image_mirrored_or_not(data, tmp_path):
    """Images of 48x36 and 36x48 in crops of 24x32: scaled by 1/2 and 2/3."""
    config = in_pairs(tiny_folder_config(data, tmp_path))
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in FROZEN.items()})
    config.data.crop = (24, 32)
    dataset = load.load_dataset(config)
    pad = np.array([1, 2, 3], np.uint8)
    spec = stages.batch_spec(config, "student")
    seed = stages.stage_seed(0, 1, "student")
    seen: dict[str, set[bytes]] = {}
    strong = set()
    for batch in input_pipeline.train_batches(
        config, dataset, dataset.labeled, spec, seed, range(12), pad
    ):
        (weak_image, strong_image), (label, _) = batch.image[[0, 2]], batch.label[[0, 2]]
        seen.setdefault(batch.ids[0], set()).add(weak_image.tobytes())
        strong.add(strong_image.tobytes())
        (example,) = (e for e in dataset.labeled if e.id == batch.ids[0])
        width, height = Image.open(example.image).size
        inner = (24, 18) if height > width else (24, 32)
        assert np.all(weak_image[:, inner[1] :] == pad)
        assert np.all(label[:, inner[1] :] == 255)
        assert not np.all(weak_image[: inner[0], inner[1] - 1] == pad)
    assert sum(map(len, seen.values())) <= 2 * len(seen)
    assert any(len(views) == 2 for views in seen.values())
    assert len(strong) == 12


@pytest.fixture
def one_device(monkeypatch):
    make = mesh.make_mesh
    monkeypatch.setattr(mesh, "make_mesh", lambda: make(jax.devices()[:1]))
    monkeypatch.setattr(page, "write", lambda workdir: [])


@pytest.mark.slow
def test_runs_are_alike_whatever_the_cache_holds(data, tmp_path, one_device):
    """With an empty cache, a full one, and one of other weights: teacher, labels, student."""

    def run(name, cache, seed=0):
        config = in_pairs(tiny_folder_config(data, tmp_path / cache))
        config.update_from_flattened_dict({k.replace("__", "."): v for k, v in FROZEN.items()})
        config.seed = seed
        results = self_training.run(config, epath.Path(tmp_path / name))
        return [row.iou for row in results.rows]

    first = run("first", "a")
    files = sorted(path.name for path in (tmp_path / "a" / "features").rglob("*.npz"))
    assert 0 < len(files) <= 8
    again = run("again", "a")
    assert files == sorted(path.name for path in (tmp_path / "a" / "features").rglob("*.npz"))
    run("other_weights", "b", seed=1)
    beside = run("beside", "b")
    assert again == beside == first


def test_settings_without_sense_are_refused():
    with raises_code("cached-features-of-trained-backbone", "model.freeze_backbone"):
        config_check.check(tiny_config(**(FROZEN | {"model__freeze_backbone": False})))
    with raises_code("cached-features-of-random-views", "method.name is fixmatch"):
        config_check.check(tiny_config(**FROZEN, method__name="fixmatch"))
    config_check.check(tiny_config(**FROZEN))
