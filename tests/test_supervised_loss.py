"""The loss of labelled pixels by `loss.labeled` and `loss.class_weights`, alone and in the step."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from semiseg_jax import config_check, optim, train_step
from semiseg_jax import mesh as mesh_lib
from semiseg_jax.losses import supervised_loss
from semiseg_jax.planning import suggestions
from semiseg_jax.train_state import create_train_state
from tests.conftest import tiny_config
from tests.errors import raises_code
from tests.test_train_step import CLASSES, IN_FOUR, STUDENT, collectives, make_batch

WEIGHTS = np.array([0.5, 2.0, 1.0, 0.25, 3.0])
# Gives WEIGHTS[c] = sqrt(median / n_c), with the median 14400.
PIXELS = np.round(14400 / WEIGHTS**2).astype(np.int64)
KINDS = {
    "ce": {},
    "weights": {"loss__class_weights": "balanced"},
    "ohem": {"loss__labeled": "ohem"},
    "ohem, weights": {"loss__labeled": "ohem", "loss__class_weights": "balanced"},
    "focal": {"loss__labeled": "focal"},
    "focal, weights": {"loss__labeled": "focal", "loss__class_weights": "balanced"},
    "ce_dice": {"loss__labeled": "ce_dice"},
    "ce_dice, weights": {"loss__labeled": "ce_dice", "loss__class_weights": "balanced"},
}


def resolved(**changes):
    return supervised_loss.resolve(tiny_config(**changes), PIXELS, list("abcde")).loss


def test_weights_are_balanced_by_the_pixels_of_the_labelled_set():
    config = tiny_config(loss__class_weights="balanced")
    np.testing.assert_allclose(resolved(**KINDS["weights"]).class_weights, WEIGHTS, rtol=1e-3)
    assert config.loss.class_weights == "balanced"
    assert resolved().class_weights == ""
    absent = np.array([100, 400, 0])
    with raises_code("class-without-labeled-pixels", "none: sign", "loss.absent_classes=zero"):
        supervised_loss.resolve(config, absent, ["road", "car", "sign"])
    config.loss.absent_classes = "zero"
    weights = supervised_loss.resolve(config, absent, ["road", "car", "sign"]).loss.class_weights
    np.testing.assert_allclose(weights, [np.sqrt(2.5), np.sqrt(0.625), 0])


def test_weights_may_be_given_as_numbers():
    given = (0.5, 2, 1.0, 0, 3.0)
    config = tiny_config(loss__class_weights=given)
    config_check.check(config)
    resolved_config = supervised_loss.resolve(config, PIXELS, list("abcde"))
    assert resolved_config.loss.class_weights == given
    with raises_code("class-weights-count", "5 numbers for 4 classes", "a, b, c, d"):
        supervised_loss.resolve(config, PIXELS[:4], list("abcd"))
    config.loss.class_weights = (0.0, 1.0)
    with raises_code("class-weights-all-zero", "0 for every class"):
        supervised_loss.resolve(config, np.array([7, 0]), ["road", "bus"])
    for wrong in ("median", (1, -1), ("a", "b")):
        config.loss.class_weights = wrong
        with raises_code("config-value-invalid", "loss.class_weights"):
            config_check.check(config)


def test_weights_that_were_not_counted_are_no_silent_ones():
    config = tiny_config(loss__class_weights="balanced").loss
    with pytest.raises(ValueError, match=r"supervised_loss\.resolve"):
        supervised_loss.pixel_weights(jnp.zeros((2, 2), int), config, jnp.float32)


def batch_of_two():
    """Logits and labels of a labelled image, with ignored pixels, and of a pseudo-labelled one."""
    rng = np.random.default_rng(0)
    logits = jnp.asarray(3 * rng.normal(size=(2, 6, 7, CLASSES)), jnp.float32)
    labels = rng.integers(0, CLASSES, (2, 6, 7)).astype(np.uint8)
    labels[0, 0] = 255
    return logits, jnp.asarray(labels), jnp.array([False, True])


def by_hand(name, logits, labels):
    """The loss of labelled pixels by its definition, float64; and the share that has one."""
    valid = labels != 255
    logits, y = np.asarray(logits, np.float64)[valid], np.asarray(labels)[valid].astype(int)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    p_label = p[np.arange(len(y)), y]
    loss, kept, weight = -np.log(p_label), np.full(len(y), True), np.ones(len(y))
    if "focal" in name:
        loss = (1 - p_label) ** 2 * loss
    if "ohem" in name:
        smallest = np.sort(p_label)[round(len(y) / 6) - 1]
        kept = p_label <= max(0.7, smallest)
    if "weights" in name:
        weight = WEIGHTS[y]
    value = np.sum((weight * loss)[kept]) / np.sum(weight[kept])
    if "dice" in name:
        t = np.eye(CLASSES)[y]
        dice = (2 * (p * t).sum(0) + 1) / (p.sum(0) + t.sum(0) + 1)
        value += 1 - dice[t.sum(0) > 0].mean()
    return value, kept.mean()


@functools.cache
def step_losses(name):
    """The jitted losses and metrics of a step, the gradient of the labelled loss, `mean_loss`."""
    config = resolved(loss__unlabeled_weight=0.5, **KINDS[name])

    @jax.jit
    def compute(logits, labels, is_pseudo):
        def labeled(logits):
            metrics = train_step.LossSums.compute(logits, labels, is_pseudo, config).metrics(config)
            return metrics["loss_labeled"], metrics

        (_, metrics), gradient = jax.value_and_grad(labeled, has_aux=True)(logits)
        return metrics, gradient, supervised_loss.mean_loss(logits, labels, config)

    return compute


@pytest.mark.parametrize("name", KINDS)
def test_labelled_images_have_the_loss_of_the_config(name):
    logits, labels, is_pseudo = batch_of_two()
    expected, kept = by_hand(name, logits[0], labels[0])
    metrics, gradient, _ = step_losses(name)(logits, labels, is_pseudo)
    np.testing.assert_allclose(metrics["loss_labeled"], expected, rtol=1e-3)
    assert np.any(gradient[0]) and not np.any(gradient[1])
    expected_sum = metrics["loss_labeled"] + 0.5 * metrics["loss_pseudo"]
    np.testing.assert_allclose(metrics["loss"], expected_sum, rtol=1e-5)
    assert ("kept_labeled" in metrics) == ("ohem" in name)
    if "ohem" in name:
        assert 0 < kept < 1
        np.testing.assert_allclose(metrics["kept_labeled"], kept, rtol=1e-6)


@pytest.mark.parametrize("name", KINDS)
def test_a_batch_of_labelled_images_alone_has_the_same_loss(name):
    logits, labels, _ = batch_of_two()
    expected, _, (loss, metrics) = step_losses(name)(logits, labels, jnp.array([False, False]))
    np.testing.assert_allclose(loss, expected["loss_labeled"], rtol=1e-6)
    assert metrics == {k: v for k, v in expected.items() if k == "kept_labeled"}


@pytest.mark.parametrize("name", KINDS)
def test_without_labelled_pixels_loss_and_gradient_are_0(name):
    logits, labels, _ = batch_of_two()
    metrics, gradient, _ = step_losses(name)(logits, labels, jnp.array([True, True]))
    assert metrics["loss_labeled"] == 0 and not np.any(gradient)
    ignored = jnp.full_like(labels, 255)
    metrics, gradient, (loss, _) = step_losses(name)(logits, ignored, jnp.array([False, False]))
    assert metrics["loss"] == loss == 0 and not np.any(gradient)


def test_weights_that_add_up_to_less_than_1_are_divided_by():
    config = tiny_config().loss
    with config.ignore_type():
        config.class_weights = (1e-3,) * CLASSES
    logits, labels, _ = batch_of_two()
    compute = jax.jit(functools.partial(supervised_loss.mean_loss, loss_config=config))
    loss, _ = compute(logits[:1], labels[:1])
    expected, _ = by_hand("ce", logits[0], labels[0])
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


class PerPixel(nn.Module):
    """A network without neighbours and norms, which compiles fast."""

    @nn.compact
    def __call__(self, images, domain, groups, num_weak, train):
        return nn.Dense(CLASSES, name="classifier")(images / 255 - 0.5)


@functools.cache
def run_steps(name, devices, spec=STUDENT):
    """Metrics of three steps in float64, the parameters after them, and the compiled program."""
    with jax.enable_x64(True):
        mesh = mesh_lib.make_mesh(jax.devices()[:devices])
        tx, _ = optim.make_optimizer(tiny_config().optim, "teacher", 20)
        step = train_step.make_train_step(PerPixel(), tx, resolved(**KINDS[name]), spec, mesh)
        kernel = 4 * np.random.default_rng(1).normal(size=(3, CLASSES))
        params = {"classifier": {"kernel": jnp.asarray(kernel), "bias": jnp.zeros(CLASSES)}}
        state, compiled, metrics = create_train_state({"params": params}, tx, mesh), None, []
        for number in range(3):
            batch = mesh_lib.shard_batch(make_batch(spec, devices, seed=number), mesh)
            arguments = state, batch, jax.random.key(0)
            compiled = compiled or step.lower(*arguments).compile()
            state, values = compiled(*arguments)
            metrics.append({key: float(value) for key, value in values.items()})
        return metrics, jax.device_get(state.params), compiled


def assert_same(one, other):
    for a, b in zip(jax.tree.leaves(one[:2]), jax.tree.leaves(other[:2]), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["weights", "ohem, weights", "focal, weights", "ce_dice, weights"])
def test_one_device_is_eight_devices_and_all_reduces_alone_join_them(name):
    one, eight = run_steps(name, 1), run_steps(name, 8)
    assert_same(one, eight)
    assert set(collectives(eight[2])) == {"all-reduce"}
    losses_of_steps = [metrics["loss_labeled"] for metrics in one[0]]
    assert np.ptp(losses_of_steps) > 0.001
    if "ohem" in name:
        assert 0 < one[0][0]["kept_labeled"] < 1


@pytest.mark.parametrize("name", ["weights", "focal, weights"])
def test_micro_batches_add_up_to_the_loss_of_the_whole_batch(name):
    """Their valid pixels and their classes are uneven."""
    assert_same(run_steps(name, 1), run_steps(name, 1, IN_FOUR))


@pytest.mark.parametrize("kind", ["ohem", "ce_dice"])
def test_losses_of_a_whole_batch_are_refused_with_micro_batches(kind):
    config = tiny_config(loss__labeled=kind, train__accumulate=2)
    with raises_code("loss-of-whole-batch-accumulated", kind, "train.accumulate 2"):
        config_check.check(config)
    config.train.accumulate = 1
    config_check.check(config)
    # Nor does a plan suggest them where the step does not fit.
    assert suggestions._more_micro_batches(config, 1) is None
    assert suggestions._more_micro_batches(tiny_config(), 1) == 2


def test_ohem_that_keeps_nothing_is_refused():
    nothing = {"loss__ohem__probability": 0.0, "loss__ohem__share": 0.0}
    config = tiny_config(loss__labeled="ohem", **nothing)
    with raises_code("ohem-without-pixels", "loss.ohem.share"):
        config_check.check(config)
    config_check.check(tiny_config(**nothing))
