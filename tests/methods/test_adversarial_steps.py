"""Two networks in one step: each is updated by its own loss, and holds the other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from semiseg_jax import losses
from semiseg_jax import mesh as mesh_lib
from semiseg_jax.methods import discriminator_health, label_health, registry
from semiseg_jax.methods.adversarial_method import AdversarialMethod
from semiseg_jax.methods.network import Network
from tests.methods import test_method_steps as steps
from tests.methods.toy_network import narrow_discriminators

ADVERSARIAL = [name for name, cls in registry.METHODS.items() if issubclass(cls, AdversarialMethod)]


@pytest.fixture(scope="module", autouse=True)
def small_discriminators():
    with narrow_discriminators():
        yield


@functools.cache
def after(name, count=1, **changes):
    """(metrics of each step, the last state)."""
    return steps.run_steps(name, 1, count, **changes)


@functools.cache
def initial_state(name):
    """On the host."""
    return jax.device_get(steps.make_state(*steps.make_program(name, 1)))


def trained(state):
    """What is of the segmenter: parameters, statistics, optimiser."""
    return state.params, state.norms, state.opt_state


def assert_same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def differ(a, b):
    return any(np.any(x != y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name == "advsemiseg" else pytest.mark.slow)
        for name in ADVERSARIAL
    ],
)
def test_a_discriminator_update_leaves_every_bit_of_the_segmenter(name):
    """At a rate of 0 the discriminator stands still; the segmenter does not see the difference."""
    before = initial_state(name).method.discriminator.params
    _, still = after(name, discriminator_rate=0.0)
    _, moved = after(name)
    assert_same(trained(still), trained(moved))
    assert_same(still.method.discriminator.params, before)
    for leaf, start in zip(
        jax.tree.leaves(moved.method.discriminator.params), jax.tree.leaves(before), strict=True
    ):
        assert np.any(leaf != start)


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_a_segmenter_update_leaves_every_bit_of_the_discriminator(name):
    """Other weights of the segmenter's terms are another update of the segmenter alone."""
    changes = {"weight": 0.0}
    changes |= {
        key: 0.0
        for key in ("adversarial_labeled", "adversarial_unlabeled", "matching")
        if key in steps.make_config(name).method[name]
    }
    _, usual = after(name)
    _, other = after(name, **changes)
    assert_same(usual.method.discriminator, other.method.discriminator)
    assert differ(usual.params, other.params)


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_the_optimiser_of_the_discriminator_is_adam_with_its_own_schedule(name):
    """The first update of Adam is the rate in size, the last one of a stage is 0."""
    program, _ = steps.make_program(name, 1)
    before = initial_state(name).method.discriminator.params
    _, first = after(name)
    moved = jax.tree.map(np.subtract, first.method.discriminator.params, before)
    assert np.max([np.max(np.abs(leaf)) for leaf in jax.tree.leaves(moved)]) == pytest.approx(
        1e-4, rel=1e-2
    )
    rates = program.method._optimizer()
    state = rates.init({"w": jnp.ones(())})
    sizes = []
    for _ in range(program.method.num_steps):
        update, state = rates.update({"w": jnp.ones(())}, state)
        sizes.append(-float(update["w"]))
    share = np.arange(20) / 20
    np.testing.assert_allclose(sizes, 1e-4 * (1 - share) ** 0.9, rtol=1e-3)


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_self_training_begins_at_the_set_step(name):
    """Of 20 steps a tenth: the first two have none, whatever the discriminator passes."""
    for step in range(4):
        outcome = loss_of(name, step, threshold=0.0, start=0.1)
        begun = step >= 2
        assert outcome.terms["passed"] == 1
        assert bool(np.any(outcome.kept)) == bool(outcome.terms["loss_self_training"]) == begun
        np.testing.assert_array_equal(outcome.kept, begun * outcome.labeled)
    outcome = loss_of(name, 5, threshold=1.1, start=0.1)
    assert not outcome.terms["passed"] and not np.any(outcome.kept)
    # The first step of a stage has an untrained discriminator.
    assert bool(np.any(loss_of(name, 0, threshold=0.0).kept)) == (name != "s4gan")


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_ignored_pixels_count_nowhere(name):
    """What the segmenter predicts there changes no bit of its loss, nor what the other sees."""
    one, other = loss_of(name, 5, padding=0.0), loss_of(name, 5, padding=9.0)
    assert_same(one.loss, other.loss)
    assert_same(one.terms, other.terms)
    assert_same(one.examples, other.examples)


class GivenLogits(Network):
    """Random logits, with a constant added to one class where the pixels are ignored."""

    def __init__(self, batch, padding):
        self._groups = 1
        rng = np.random.default_rng(3)
        self._passes = []
        for ignored in (batch["label"] == losses.IGNORE, ~batch["valid"]):
            logits = rng.normal(size=(*ignored.shape, steps.CLASSES))
            logits[..., 1] += padding * ignored
            self._passes.append(jnp.asarray(logits, jnp.float32))

    def __call__(self, images, domain):
        assert domain == "weak"
        return self._passes.pop(0)


def loss_of(name, step, padding=0.0, **changes):
    """The outcome of a method on random logits, without labelled loss."""
    program, _ = steps.make_program(name, 1, **changes)
    batch = steps.make_batch(0, program.method.views.count)
    images = steps.train_step.method_batch(jax.tree.map(jnp.asarray, batch), program.method)
    return program.method.loss(
        GivenLogits(batch, padding),
        lambda logits, labels: jnp.zeros(()),
        initial_state(name).method,
        images,
        jnp.asarray(step),
        jax.random.key(0),
    )


def test_one_constant_image_is_no_nan():
    program, mesh = steps.make_program("s4gan", 1)
    batch = steps.make_batch(0, program.method.views.count)
    batch["image"][:] = batch["views"][:] = 93
    state, metrics = program.step(
        steps.make_state(program, mesh), mesh_lib.shard_batch(batch, mesh), jax.random.key(0)
    )
    for leaf in jax.tree.leaves((state, metrics)):
        assert np.all(np.isfinite(leaf))


def lines(passed, first=5, last=100):
    return [
        {"step": step, "kept": 0.5, "passed": passed, "accuracy_real": 0.9, "accuracy_fake": 0.1}
        for step in range(first, last + 1, 5)
    ]


def test_a_discriminator_that_passes_everything_or_nothing_is_named():
    assert discriminator_health.warnings(lines(0.4), 100, 25) == ()
    # Before self-training begins nothing depends on it, and a stretch is judged when it is over.
    assert discriminator_health.warnings(lines(1.0, last=25), 100, 25) == ()
    assert discriminator_health.warnings(lines(1.0, last=45), 100, 25) == ()
    (sentence,) = discriminator_health.warnings(lines(1.0, last=50), 100, 25)
    assert "From step 26 to 50" in sentence and "passed 100.0%" in sentence
    assert "90% of the labels and 10% of the predictions" in sentence and "raise" in sentence
    (sentence,) = discriminator_health.warnings(lines(0.0, last=50), 100, 25)
    assert "passed 0.0%" in sentence and "lower" in sentence


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_its_warnings_are_those_of_the_labels(name):
    method = registry.build(steps.make_config(name))
    health = label_health.summarize(lines(1.0), 100, (), method)
    assert len(health.warnings) == 4
