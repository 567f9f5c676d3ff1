import jax
import jax.numpy as jnp
import numpy as np
import pytest

from semiseg_jax import losses
from semiseg_jax.losses import IGNORE
from semiseg_jax.methods import confidence, consistency, mixing
from tests.methods import arrays
from tests.methods.published import fixture, sample

T = arrays.THRESHOLD
ALL_VALID = np.ones((arrays.IMAGES, arrays.HEIGHT, arrays.WIDTH), bool)


@pytest.fixture(autouse=True)
def in_float64():
    with jax.enable_x64(True):
        yield


teacher_labels = jax.jit(confidence.teacher_labels)
confident_share = jax.jit(confidence.confident_share, static_argnums=2)
hard_cross_entropy = jax.jit(consistency.hard_cross_entropy, static_argnums=3)
squared_difference = jax.jit(consistency.squared_difference, static_argnums=(3, 4))


def mean(total_and_count):
    total, count = total_and_count
    return total / jnp.maximum(count, 1)


def teacher(seed, valid=ALL_VALID):
    return teacher_labels(arrays.logits(seed), valid)


def masks(seed):
    return jnp.asarray(arrays.masks(seed))


# ---- the published losses


def test_french_loss_is_that_of_the_published_code():
    published = fixture("french2019")
    first, second = (jnp.asarray(arrays.logits(seed)) for seed in (1, 2))
    valid = mixing.mix(masks(1), *(jnp.asarray(arrays.valid_pixels(seed)) for seed in (2, 1)))
    mixed = mixing.mix(masks(1), second, first)

    def loss(student, teacher):
        share = confidence.confident_share(confidence.teacher_labels(teacher, valid), T, "all")
        return share * mean(
            consistency.squared_difference(student, teacher, valid, divide_by="all")
        ), share

    (value, share), (gradient, of_teacher) = jax.jit(
        jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    )(jnp.asarray(arrays.logits(3)), mixed)
    np.testing.assert_allclose(share, published["share"], rtol=1e-6)
    np.testing.assert_allclose(value, published["loss"], rtol=1e-6)
    np.testing.assert_allclose(sample(gradient), published["gradient"], rtol=1e-5, atol=1e-12)
    assert not np.any(of_teacher)


def test_classmix_loss_is_that_of_the_published_code():
    published = fixture("classmix")

    def loss(student, own):
        mixed = mixing.mix(masks(1), own, mixing.partners(own, group_size=4, order="next"))
        share = confidence.confident_share(mixed, 0.968, "all")
        cross_entropy = mean(consistency.hard_cross_entropy(student, mixed, divide_by="all"))
        return share * cross_entropy, (mixed.label, share)

    (value, (label, share)), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(
        jnp.asarray(arrays.logits(3)), teacher(1)
    )
    np.testing.assert_array_equal(sample(label), published["mixed_label"])
    np.testing.assert_allclose(share, published["share"], rtol=1e-12)
    # The published code mixes in float32.
    np.testing.assert_allclose(value, published["loss"], rtol=1e-6)
    np.testing.assert_allclose(sample(gradient), published["gradient"], rtol=1e-6, atol=1e-12)


def labeled_loss(logits):
    return mean(losses.cross_entropy(logits, jnp.asarray(arrays.labels(7))))


def strong_loss(logits, mixed):
    return mean(consistency.hard_cross_entropy(logits, mixed, T))


def compare(published, loss, seeds):
    """Compares value, terms and gradients with a fixture; `loss` returns (value, terms)."""
    inputs = {name: jnp.asarray(arrays.logits(seed)) for name, seed in seeds.items()}
    (value, terms), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(inputs)
    np.testing.assert_allclose(value, published["loss"], rtol=1e-10)
    for name, term in terms.items():
        np.testing.assert_allclose(term, published[name], rtol=1e-10, err_msg=name)
    for name, gradient in gradients.items():
        np.testing.assert_allclose(
            sample(gradient), published["gradients"][name], rtol=1e-8, atol=1e-15, err_msg=name
        )


def test_unimatch_loss_is_that_of_the_published_code():
    published = fixture("unimatch")
    own = teacher(7, arrays.valid_pixels(1))
    partner = teacher(2, arrays.valid_pixels(2))
    mixed = [mixing.mix(masks(seed), partner, own) for seed in (1, 2)]
    valid = np.asarray(mixed[1].valid)
    np.testing.assert_array_equal(
        sample(np.where(valid, mixed[1].label, 0)),
        np.where(sample(valid), published["mixed_label"], 0),
    )

    def loss(logits):
        terms = {
            "loss_x": labeled_loss(logits["pred_x"]),
            "loss_u_s1": strong_loss(logits["pred_u_s1"], mixed[0]),
            "loss_u_s2": strong_loss(logits["pred_u_s2"], mixed[1]),
            "loss_u_w_fp": strong_loss(logits["pred_u_w_fp"], own),
        }
        return consistency.unimatch_loss(*terms.values()), terms

    compare(published, loss, {"pred_x": 3, "pred_u_s1": 4, "pred_u_s2": 5, "pred_u_w_fp": 6})


def test_fixmatch_loss_is_that_of_the_published_code():
    published = fixture("unimatch")["fixmatch"]

    @jax.jit
    def loss(pred_x, pred_u_s, partner, own):
        terms = labeled_loss(pred_x), strong_loss(pred_u_s, mixing.mix(masks(1), partner, own))
        return *terms, consistency.fixmatch_loss(*terms)

    terms = loss(
        *(arrays.logits(3), arrays.logits(4)),
        *(teacher(2, arrays.valid_pixels(2)), teacher(7, arrays.valid_pixels(1))),
    )
    np.testing.assert_allclose(
        terms, [published[name] for name in ("loss_x", "loss_u_s", "loss")], rtol=1e-10
    )


def test_unimatch_v2_loss_is_that_of_the_published_code():
    own = teacher(7, arrays.valid_pixels(1))
    partner = mixing.partners(own, group_size=4)
    mixed = [mixing.mix(masks(seed), partner, own) for seed in (1, 2)]

    def loss(logits):
        terms = {
            "loss_x": labeled_loss(logits["pred_x"]),
            "loss_u_s1": strong_loss(logits["pred_u_s1"], mixed[0]),
            "loss_u_s2": strong_loss(logits["pred_u_s2"], mixed[1]),
        }
        return consistency.unimatch_v2_loss(*terms.values()), terms

    compare(fixture("unimatch_v2"), loss, {"pred_x": 3, "pred_u_s1": 4, "pred_u_s2": 5})


# ---- hand values


# Two classes; confidences .9, .6, .8 and .99, the last at padding.
LOGITS = np.log([[[[0.9, 0.1], [0.4, 0.6], [0.2, 0.8], [0.01, 0.99]]]])
VALID = np.array([[[True, True, True, False]]])


def hand_labels():
    return teacher_labels(LOGITS, VALID)


def test_labels_of_a_teacher():
    labels = hand_labels()
    np.testing.assert_array_equal(labels.label, [[[0, 1, 1, IGNORE]]])
    assert labels.label.dtype == jnp.int32
    np.testing.assert_allclose(labels.confidence, [[[0.9, 0.6, 0.8, 0.99]]], rtol=1e-12)
    np.testing.assert_array_equal(labels.valid, VALID)


def test_confidences_have_no_gradient():
    def total(logits):
        return jnp.sum(confidence.teacher_labels(logits, jnp.asarray(VALID)).confidence)

    assert not np.any(jax.jit(jax.grad(total))(LOGITS))


@pytest.mark.parametrize(
    ("threshold", "divide_by", "expected"),
    [
        (0.8, "valid", 2 / 3),
        (0.85, "valid", 1 / 3),
        (0.85, "all", 2 / 4),
        (0, "all", 1),
        (1.1, "valid", 0),
    ],
)
def test_share_of_confident_pixels(threshold, divide_by, expected):
    # The confidence of .8 is a rounding of it.
    labels = hand_labels()
    share = confident_share(labels, threshold - 1e-9, divide_by)
    np.testing.assert_allclose(share, expected, rtol=1e-12)


def test_confident_pixels_by_class():
    by_class = jax.jit(confidence.confident_pixels_by_class, static_argnums=2)
    confident, valid = by_class(hand_labels(), 0.7, 3)
    np.testing.assert_array_equal(confident, [1, 1, 0])
    np.testing.assert_array_equal(valid, [1, 2, 0])


@pytest.mark.parametrize(("divide_by", "count"), [("valid", 3), ("all", 4)])
@pytest.mark.parametrize(("threshold", "kept"), [(0.0, [0, 1, 1]), (0.85, [0]), (1.1, [])])
def test_hard_cross_entropy_by_hand(divide_by, count, threshold, kept):
    labels = hand_labels()
    student = np.log([[[[0.5, 0.5], [0.75, 0.25], [0.3, 0.7], [0.5, 0.5]]]])
    total, divisor = hard_cross_entropy(student, labels, threshold, divide_by)
    expected = -sum(np.log([[0.5, 0.25, 0.7][i] for i in range(len(kept))]))
    np.testing.assert_allclose(total, expected, atol=1e-12)
    assert divisor == count


def test_squared_difference_by_hand():
    student = np.log([[[[0.5, 0.5], [0.4, 0.6], [0.3, 0.7], [0.5, 0.5]]]])
    by_hand = (student, LOGITS, VALID)
    total, count = squared_difference(*by_hand, "valid", "sum")
    np.testing.assert_allclose(total, 2 * (0.4**2 + 0 + 0.1**2), rtol=1e-12)
    assert count == 3
    of_mean, count = squared_difference(*by_hand, "all", "mean")
    np.testing.assert_allclose(of_mean, total / 2, rtol=1e-12)
    assert count == 4


# ---- properties


def test_gradients_reach_confident_pixels_of_the_student_alone():
    valid = jnp.asarray(arrays.valid_pixels(1))

    def loss(student, of_teacher):
        labels = confidence.teacher_labels(of_teacher, valid)
        share = confidence.confident_share(labels, T)
        return share * mean(consistency.hard_cross_entropy(student, labels, T))

    student, of_teacher = (jnp.asarray(arrays.logits(seed)) for seed in (1, 2))
    gradients = jax.jit(jax.grad(loss, argnums=(0, 1)))(student, of_teacher)
    kept = jax.jit(confidence.confident_pixels)(teacher(2, arrays.valid_pixels(1)), T)
    np.testing.assert_array_equal(np.any(gradients[0] != 0, axis=-1), kept)
    assert 0.2 < np.mean(kept) < 0.8
    assert not np.any(gradients[1])


def test_padding_changes_nothing():
    valid = arrays.valid_pixels(1)
    painted = np.where(valid[..., None], arrays.logits(1), 50 * arrays.logits(9))

    @jax.jit
    def compute(own):
        labels = confidence.teacher_labels(own, jnp.asarray(valid))
        mixed = mixing.mix(masks(1), mixing.partners(labels), labels)
        student = jnp.asarray(arrays.logits(3))
        return (
            confidence.confident_share(mixed, T),
            *consistency.hard_cross_entropy(student, mixed, T),
            *consistency.squared_difference(student, own, labels.valid),
        )

    assert compute(arrays.logits(1)) == compute(painted)


def test_a_batch_of_padding_alone_has_loss_and_gradient_0():
    logits, nothing = jnp.asarray(LOGITS), jnp.zeros(VALID.shape, bool)

    def loss(student):
        labels = confidence.teacher_labels(logits, nothing)
        hard = mean(consistency.hard_cross_entropy(student, labels, T))
        soft = mean(consistency.squared_difference(student, logits, nothing))
        return confidence.confident_share(labels, T) + hard + soft

    value, gradient = jax.jit(jax.value_and_grad(loss))(logits)
    assert value == 0 and not np.any(gradient)


def test_bfloat16_logits_are_compared_in_float32():
    """.968 and .97 are one number in bfloat16."""
    logits = np.array([[[[3.4531, 0.0]], [[3.5, 0.0]]]], jnp.bfloat16)
    labels = teacher_labels(logits, np.ones((1, 2, 1), bool))
    assert labels.confidence.dtype == jnp.float32
    below, above = np.asarray(labels.confidence)[0, :, 0]
    assert 0.968 < below < 0.97 < above
    assert confident_share(labels, 0.97, "valid") == 0.5
    total, count = squared_difference(
        logits, logits[:, ::-1], np.ones((1, 2, 1), bool), "valid", "sum"
    )
    assert total.dtype == count.dtype == jnp.float32 and 0 < total < 1e-5
