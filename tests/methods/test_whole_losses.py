"""The loss of each method on given logits beside the numbers of the authors' training scripts.

The parts of these losses are in test_consistency.py; here it is which logits, labels and masks a
method puts together.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import default
from semiseg_jax import losses
from semiseg_jax.methods import cct, confidence, masks, mixing, registry
from semiseg_jax.methods.method import Batch, State, mean
from semiseg_jax.methods.network import Network
from semiseg_jax.models.segmenter import Features
from tests.methods import arrays
from tests.methods.published import fixture


class GivenLogits(Network):
    """A network whose passes return given logits, the labelled, weak or strong ones, in turn."""

    def __init__(self, teacher, *passes):
        self._groups = 1
        self.teacher, self.passes, self.seen = teacher, list(passes), []

    def __call__(self, images, domain):
        self.seen.append((images, domain))
        logits = self.passes.pop(0)
        assert len(logits) == len(images)
        return logits

    def encode(self, images, domain):
        self.seen.append((images, domain))
        return jnp.ones((len(images), 1, 1, 8))

    def decode(self, features, domain):
        return self.passes.pop(0)

    def predict(self, images, variables=None, train=False):
        return jax.lax.stop_gradient(self.teacher)


def logits(seed):
    return jnp.asarray(arrays.logits(seed))


def uint8(array):
    return jnp.asarray(array, jnp.uint8)


def make_batch(views, valid=1):
    """Images with other values in each view, so that it shows which ones were mixed."""
    rng = np.random.default_rng(0)
    shape = (arrays.IMAGES, views + 1, arrays.HEIGHT, arrays.WIDTH, 3)
    images = uint8(rng.integers(0, 256, shape))
    return Batch(
        image=images[:, 0],
        label=uint8(arrays.labels(7)),
        weak=images[:, 0] // 2,
        strong=images[:, 1:],
        valid=jnp.asarray(arrays.valid_pixels(valid)),
    )


def labeled_loss(logits, labels):
    return mean(losses.cross_entropy(logits, labels))


def outcome(name, network, batch, **changes):
    config = default.get_config()
    config.method.name = name
    config.method[name].update({"threshold": arrays.THRESHOLD} | changes)
    state = State({"average": {}}, {}, {})
    method = registry.build(config)
    result = method.loss(network, labeled_loss, state, batch, jnp.asarray(3), jax.random.key(0))
    assert not network.passes
    return result


@pytest.fixture
def boxes(monkeypatch):
    """The boxes of the published arrays, in turn."""
    given = iter((arrays.masks(1), arrays.masks(2)))
    monkeypatch.setattr(masks, "box_masks", lambda boxes, size: jnp.asarray(next(given)))


@pytest.fixture
def partner_labels(monkeypatch):
    """The labels of the partners, which the authors' code takes from another batch of images."""
    partner = confidence.teacher_labels(logits(2), jnp.asarray(arrays.valid_pixels(2)))
    partners = mixing.partners

    def given(view, *args, **kwargs):
        is_labels = isinstance(view, type(partner))
        return partner if is_labels else partners(view, *args, **kwargs)

    monkeypatch.setattr(mixing, "partners", given)


def compare(result, published, names):
    np.testing.assert_allclose(result.loss, published["loss"], rtol=1e-6)
    for ours, theirs in names.items():
        np.testing.assert_allclose(result.terms[ours], published[theirs], rtol=1e-6)


def assert_seen(network, *expected):
    """Which images each pass of the network met, and with which norm."""
    for (seen, domain), (images, where) in zip(network.seen, expected, strict=True):
        np.testing.assert_array_equal(seen, images)
        assert domain == where


def assert_mixed(images, batch, view, mask, partner=(1, 0, 3, 2)):
    """The partner inside the box, the image outside."""
    strong = np.asarray(batch.strong[:, view])
    mixed = np.where(mask[..., None], strong[list(partner)], strong)
    np.testing.assert_array_equal(images, mixed)


@pytest.mark.usefixtures("boxes", "partner_labels")
def test_fixmatch():
    batch = make_batch(1)
    clean = jnp.concatenate([logits(3), logits(7)])
    network = GivenLogits(logits(2), clean, logits(4))
    result = outcome("fixmatch", network, batch)
    published = fixture("unimatch")["fixmatch"]
    compare(result, published, {"loss_labeled": "loss_x", "loss_strong": "loss_u_s"})
    assert [domain for _, domain in network.seen] == ["weak", "strong"]
    np.testing.assert_array_equal(network.seen[0][0], np.concatenate([batch.image, batch.weak]))
    assert_mixed(network.seen[1][0], batch, 0, arrays.masks(1))


TERMS = {"loss_labeled": "loss_x", "loss_strong_1": "loss_u_s1", "loss_strong_2": "loss_u_s2"}


@pytest.mark.usefixtures("boxes", "partner_labels")
def test_unimatch():
    batch = make_batch(2)
    clean = jnp.concatenate([logits(3), logits(7), logits(6)])
    network = GivenLogits(logits(2), clean, jnp.concatenate([logits(4), logits(5)]))
    result = outcome("unimatch", network, batch)
    compare(result, fixture("unimatch"), TERMS | {"loss_dropped": "loss_u_w_fp"})
    assert [domain for _, domain in network.seen] == ["weak", "strong"]
    for view in range(2):
        images = network.seen[1][0][view * arrays.IMAGES : (view + 1) * arrays.IMAGES]
        assert_mixed(images, batch, view, arrays.masks(1 + view))


@pytest.fixture
def groups_of_four(monkeypatch):
    """The authors' partner is that of the whole batch of four images."""
    partners = mixing.partners
    monkeypatch.setattr(
        mixing,
        "partners",
        lambda view, group_size=4, order="reversed": partners(view, group_size=4, order=order),
    )


@pytest.mark.usefixtures("boxes", "groups_of_four")
def test_unimatch_v2():
    batch = make_batch(2)
    strong = jnp.concatenate([logits(4), logits(5)])
    network = GivenLogits(logits(7), logits(3), strong)
    result = outcome("unimatch_v2", network, batch)
    compare(result, fixture("unimatch_v2"), TERMS)
    assert sorted(domain for _, domain in network.seen) == ["strong", "weak"]
    (images,) = (images for images, domain in network.seen if domain == "strong")
    for view in range(2):
        one = images[view * arrays.IMAGES : (view + 1) * arrays.IMAGES]
        assert_mixed(one, batch, view, arrays.masks(1 + view), partner=[3, 2, 1, 0])


@pytest.mark.usefixtures("boxes")
def test_cutmix():
    """Images 2k and 2k + 1 of the batch are the k-th of the two batches of the authors."""

    def interleave(first, second):
        return jnp.stack([jnp.asarray(first), jnp.asarray(second)], 1).reshape(-1, *first.shape[1:])

    rng = np.random.default_rng(0)
    shape = (2 * arrays.IMAGES, arrays.HEIGHT, arrays.WIDTH, 3)
    strong = uint8(rng.integers(0, 256, shape))
    batch = Batch(
        image=strong[: arrays.IMAGES],
        label=uint8(arrays.labels(7)),
        weak=strong // 2,
        strong=strong[:, None],
        valid=interleave(arrays.valid_pixels(1), arrays.valid_pixels(2)),
    )
    teacher = interleave(arrays.logits(1), arrays.logits(2))
    network = GivenLogits(teacher, logits(7), logits(3))
    result = outcome("cutmix", network, batch, divide_by="all", weight=1.0)
    published = fixture("french2019")
    np.testing.assert_allclose(
        result.loss - result.terms["loss_labeled"], published["loss"], rtol=1e-6
    )
    first, second = np.asarray(strong[::2]), np.asarray(strong[1::2])
    mask = arrays.masks(1)[..., None]
    np.testing.assert_array_equal(network.seen[1][0], np.where(mask, second, first))
    assert [domain for _, domain in network.seen] == ["weak", "strong"]


@pytest.mark.usefixtures("groups_of_four")
def test_classmix(monkeypatch):
    monkeypatch.setattr(mixing, "class_masks", lambda *_: jnp.asarray(arrays.masks(1)))
    batch = make_batch(1).replace(
        valid=jnp.ones((arrays.IMAGES, arrays.HEIGHT, arrays.WIDTH), bool)
    )
    network = GivenLogits(logits(1), logits(7), logits(3))
    result = outcome("classmix", network, batch, threshold=0.968, divide_by="all", weight=1.0)
    published = fixture("classmix")
    np.testing.assert_allclose(
        result.loss - result.terms["loss_labeled"], published["loss"], rtol=1e-6
    )
    strong = np.asarray(batch.strong[:, 0])
    mixed = np.where(arrays.masks(1)[..., None], strong, strong[[1, 2, 3, 0]])
    np.testing.assert_array_equal(network.seen[1][0], mixed)


class GivenDecoder:
    """An auxiliary decoder whose parameters are its logits, [n, h, w, classes]."""

    @staticmethod
    def apply(variables, x):
        return variables["params"]


class GivenFeatures(GivenLogits):
    """As `GivenLogits`; its features are the images."""

    def encode(self, images, domain):
        self.seen.append((images, domain))
        height, width = images.shape[1:3]
        return Features(low=images, high=images, size=(height, width), stride=1)


def test_cct(monkeypatch):
    def as_they_are(*_):
        return [lambda keys, decode, x: x] * len(arrays.AUXILIARY_LOGITS)

    monkeypatch.setattr(cct.CrossConsistency, "_perturbations", as_they_are)
    monkeypatch.setattr(cct, "_decoder", lambda *_: GivenDecoder)
    image = uint8(np.random.default_rng(0).integers(0, 256, (2, 5, 4, 3)))
    batch = Batch(
        image=image,
        label=uint8(arrays.LABELS_OF_THREE),
        weak=image // 2,
        strong=image[:, None][:, :0],
        valid=jnp.ones(image.shape[:3], bool),
    )
    passes = (arrays.LABELED_LOGITS, arrays.MAIN_LOGITS)
    network = GivenFeatures(None, *map(jnp.asarray, passes))
    config = default.get_config()
    config.method.name = "cct"
    config.train.steps = 100
    config.method.cct.ramp = arrays.RAMP_LENGTH / config.train.steps
    auxiliary = {"params": jnp.asarray(arrays.AUXILIARY_LOGITS)}
    result = registry.build(config).loss(
        network,
        labeled_loss,
        State({}, auxiliary, {}),
        batch,
        jnp.asarray(arrays.RAMP_STEP),
        jax.random.key(0),
    )
    published = fixture("cct")["whole"]
    np.testing.assert_allclose(result.loss, published["loss"], rtol=1e-6)
    np.testing.assert_allclose(result.terms["loss_labeled"], published["loss_sup"], rtol=1e-6)
    assert not network.passes
    assert_seen(network, (batch.image, "weak"), (batch.weak, "weak"))


class GivenBranches(GivenLogits):
    """As `GivenLogits`; its features are the given last layers."""

    def predict_features(self, images):
        self.seen.append((images, "deployed"))
        return last_layers(arrays.MIDDLE, arrays.LAST)

    def encode(self, images, domain):
        self.seen.append((images, domain))
        return last_layers(arrays.LABELED_MIDDLE, arrays.LABELED_LAST)


def last_layers(middle, last):
    low, high = (jnp.asarray(layer, jnp.float32) for layer in (middle, last))
    return Features(low=low, high=high, size=last.shape[1:3], stride=1)


def pseudoseg_variables():
    """Those of the published arrays, whose features are in the order (last, middle)."""

    def kernel(array):
        return {"kernel": jnp.asarray(array, jnp.float32)[None, None]}

    last = arrays.LAST.shape[-1]
    query, key = (np.roll(k, -last, axis=0) for k in (arrays.QUERY_KERNEL, arrays.KEY_KERNEL))
    norm = {"weak": {"scale": jnp.ones(4), "bias": jnp.zeros(4)}}
    attention = {name: kernel(k) for name, k in (("query", query), ("key", key))}
    attention |= {"conv": kernel(arrays.CONV_KERNEL), "norm": norm}
    classifier = {"classifier": kernel(arrays.CLASSIFIER_KERNEL) | {"bias": jnp.zeros(3)}}
    moments = {"attention": {"norm": {"mean": jnp.zeros(4), "var": jnp.ones(4)}}}
    return {
        "params": {"attention": attention, "classifier": classifier},
        "batch_stats_weak": moments,
    }


def test_pseudoseg():
    image = uint8(np.random.default_rng(0).integers(0, 256, (2, *arrays.LAST.shape[1:3], 3)))
    batch = Batch(
        image=image,
        label=uint8(arrays.LABELS_OF_FOUR),
        weak=image // 2,
        strong=image[:, None] // 3,
        valid=jnp.ones(image.shape[:3], bool),
    )
    passes = (arrays.LABELED_DECODER_LOGITS, arrays.DECODER_LOGITS, arrays.STRONG_LOGITS)
    network = GivenBranches(None, *(jnp.asarray(logits, jnp.float32) for logits in passes))
    config = default.get_config()
    config.method.name = "pseudoseg"
    config.method.pseudoseg.cutout = 0
    state = State({}, pseudoseg_variables(), {})
    result = registry.build(config).loss(
        network, labeled_loss, state, batch, jnp.asarray(0), jax.random.key(0)
    )
    published = fixture("pseudoseg")["whole"]
    for name, value in published.items():
        np.testing.assert_allclose(result.terms[name], value, rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(result.loss, sum(published.values()), rtol=1e-5)
    assert not network.passes
    assert_seen(
        network,
        (batch.weak, "deployed"),
        (batch.image, "weak"),
        (batch.weak, "weak"),
        (batch.strong[:, 0], "strong"),
    )
