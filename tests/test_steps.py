"""The training step: its collectives, its independence of the devices, its losses."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from semiseg_jax import losses, optim, state, steps
from semiseg_jax import mesh as mesh_lib
from semiseg_jax.data.streams import Streams
from semiseg_jax.models import deeplab
from tests.conftest import tiny_config

CLASSES = 5
TEACHER = Streams(("labeled",), (), 8, 8)
STUDENT = Streams(("labeled",), ("pseudo",), 8, 8)


def make_batch(streams, groups, seed=0):
    """The same images whatever the groups; arranged as `streams.slots` joins them."""
    rng = np.random.default_rng(seed)
    parts = {}
    for name in ("weak", "strong"):
        count = streams.size(name)
        parts[name] = {
            "image": rng.integers(0, 256, (count, 32, 40, 3)).astype(np.uint8),
            "label": rng.integers(0, CLASSES, (count, 32, 40)).astype(np.uint8),
            "is_pseudo": np.full(count, name == "strong"),
        }
        # Valid pixels are unevenly spread over the devices.
        parts[name]["label"][: count // 4] = 255
    blocks = [
        {k: np.split(v, groups * streams.parts)[part * groups + g] for k, v in parts[name].items()}
        for g in range(groups)
        for part in range(streams.parts)
        for name in ("weak", "strong")
    ]
    return {k: np.concatenate([b[k] for b in blocks]) for k in blocks[0]}


def make_step(streams, devices, dtype=jnp.float32, **changes):
    config = tiny_config(**changes)
    mesh = mesh_lib.make_mesh(jax.devices()[:devices])
    model = deeplab.build(config.model, CLASSES)
    tx, _ = optim.make_optimizer(config.optim, "teacher", 20)
    step = steps.make_train_step(model, tx, config.loss, streams, mesh)
    variables = state.init_variables(model, 0, mesh)
    variables = jax.tree.map(lambda v: v.astype(dtype), variables)
    return step, state.create(variables, tx, mesh), mesh


def collectives(program):
    """How often each kind of collective occurs in a compiled program."""
    kinds = (
        "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast"
    )
    found = re.findall(rf"= [^=]*? ({kinds})(?:-start)?\(", program.as_text())
    return {kind: found.count(kind) for kind in set(found)}


def test_student_has_all_reduces_alone_and_no_more_than_the_teacher():
    counts = {}
    for name, streams in (("teacher", TEACHER), ("student", STUDENT)):
        step, made, mesh = make_step(streams, 8)
        batch = mesh_lib.to_devices(make_batch(streams, 8), mesh)
        counts[name] = collectives(step.lower(made, batch, jax.random.key(0)).compile())
    assert set(counts["student"]) == {"all-reduce"}
    assert 0 < counts["student"]["all-reduce"] <= counts["teacher"]["all-reduce"]


def test_rematerialised_norms_reduce_their_moments_once():
    counts = []
    for remat in (False, True):
        step, made, mesh = make_step(TEACHER, 8, model__remat=remat)
        batch = mesh_lib.to_devices(make_batch(TEACHER, 8), mesh)
        counts.append(collectives(step.lower(made, batch, jax.random.key(0)).compile()))
    assert counts[0] == counts[1]


def run_steps(devices, count, dtype, batches=None, streams=STUDENT, **changes):
    """Losses and the last state; `batches` different batches, one each step unless given."""
    step, made, mesh = make_step(streams, devices, dtype, **changes)
    totals = []
    for i in range(count):
        batch = mesh_lib.to_devices(make_batch(streams, devices, seed=i % (batches or count)), mesh)
        made, metrics = step(made, batch, jax.random.key(0))
        totals.append(float(metrics["loss"]))
    return np.array(totals), jax.device_get(made)


def test_one_device_is_eight_devices_in_float64():
    with jax.enable_x64(True):
        one, _ = run_steps(1, 20, jnp.float64, model__dropout=0.3)
        eight, _ = run_steps(8, 20, jnp.float64, model__dropout=0.3)
    assert np.ptp(one) > 0.01  # it trains
    np.testing.assert_allclose(eight, one, rtol=1e-9)


IN_FOUR = dataclasses.replace(STUDENT, parts=4)


def test_accumulated_gradients_are_those_of_the_whole_batch():
    """With statistics that stand still nothing else differs, uneven valid pixels included."""
    with jax.enable_x64(True):
        whole, one = run_steps(1, 3, jnp.float64, model__norm="frozen")
        parts, four = run_steps(1, 3, jnp.float64, streams=IN_FOUR, model__norm="frozen")
    np.testing.assert_allclose(parts, whole, rtol=1e-9)
    for a, b in zip(*(jax.tree.leaves(s.params) for s in (one, four)), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-7, atol=1e-12)


@pytest.mark.slow
def test_accumulation_on_eight_devices_is_that_on_one():
    two = dataclasses.replace(STUDENT, batch_labeled=16, batch_pseudo=16, parts=2)
    with jax.enable_x64(True):
        one, _ = run_steps(1, 5, jnp.float64, streams=two, model__dropout=0.3)
        eight, _ = run_steps(8, 5, jnp.float64, streams=two, model__dropout=0.3)
    np.testing.assert_allclose(eight, one, rtol=1e-9)


def test_running_moments_move_with_each_micro_batch_in_turn():
    """As if the network had gone forward through one after the other."""
    model = deeplab.build(tiny_config().model, CLASSES)
    step, made, mesh = make_step(IN_FOUR, 1)
    start = jax.device_get(made)
    batch = make_batch(IN_FOUR, 1)
    after, _ = step(made, mesh_lib.to_devices(batch, mesh), jax.random.key(0))
    forward = jax.jit(
        lambda variables, x: model.apply(
            variables, x, domain="both", train=True, mutable=list(start.norms)
        )[1]
    )
    norms = start.norms
    for part in np.split(batch["image"], 4):
        norms = forward({"params": start.params, **norms}, part)
    for a, b in zip(*map(jax.tree.leaves, (norms, after.norms)), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_bfloat16_and_rematerialised_steps_follow_the_float32_ones():
    """20 steps on one batch. Rematerialisation computes the same, but for the order of sums; what
    bfloat16's 8 bits change stays below a twentieth of what training changes."""
    fast = {"batches": 1, "optim__teacher__learning_rate": 0.2}
    plain, _ = run_steps(1, 20, jnp.float32, **fast)
    remat, _ = run_steps(1, 20, jnp.float32, model__remat=True, **fast)
    half, state = run_steps(1, 20, jnp.float32, model__compute_dtype="bfloat16", **fast)
    assert np.ptp(plain) > 0.1  # it trains
    np.testing.assert_allclose(remat, plain, rtol=1e-5)
    np.testing.assert_allclose(half, plain, atol=np.ptp(plain) / 20)
    assert not np.array_equal(half, plain)
    kept = {leaf.dtype for leaf in jax.tree.leaves((state.params, state.norms, state.opt_state))}
    assert kept <= {np.dtype("float32"), np.dtype("int32")}


def instructions(streams, **changes):
    """How many there are in the program before the compiler's first pass."""
    step, made, mesh = make_step(streams, 1, **changes)
    batch = mesh_lib.to_devices(make_batch(STUDENT, 1), mesh)
    batch = {k: v[: streams.size("weak") + streams.size("strong")] for k, v in batch.items()}
    return len(re.findall(r"^ *%.* = ", step.lower(made, batch, jax.random.key(0)).as_text(), re.M))


def test_a_students_program_holds_one_network():
    """And so takes about as long to compile as a teacher's."""
    counts = [instructions(streams) for streams in (TEACHER, STUDENT)]
    assert counts[1] <= 1.3 * counts[0]


def test_one_float32_step_on_eight_devices_is_that_on_one():
    """Parameters after one step: the start is the same, so this compares the gradients."""
    _, one = run_steps(1, 1, jnp.float32)
    _, eight = run_steps(8, 1, jnp.float32)
    momentum = {d: s.opt_state[1].trace for d, s in (("one", one), ("eight", eight))}
    flat = [dict(jax.tree_util.tree_leaves_with_path(momentum[d])) for d in ("one", "eight")]
    largest = max(np.linalg.norm(v) for v in flat[0].values())
    for path, value in flat[0].items():
        difference = np.linalg.norm(flat[1][path] - value)
        # Biases in front of a norm have no gradient but rounding noise.
        assert difference <= 1e-4 * max(np.linalg.norm(value), 1e-3 * largest), path


def test_strong_batch_leaves_the_weak_norms_alone():
    streams = Streams((), ("pseudo",), 8, 8)
    step, made, mesh = make_step(streams, 1, optim__weight_decay=0.0)
    before = jax.device_get(made)
    batch = make_batch(STUDENT, 1)
    batch = mesh_lib.to_devices({k: v[8:] for k, v in batch.items()}, mesh)
    after, _ = step(made, batch, jax.random.key(0))
    for name, same in (("batch_stats_weak", True), ("batch_stats_strong", False)):
        pairs = zip(*(jax.tree.leaves(s.norms[name]) for s in (before, after)), strict=True)
        assert all(np.array_equal(a, b) for a, b in pairs) == same
    for path, old in jax.tree_util.tree_leaves_with_path(before.params):
        if "weak" in jax.tree_util.keystr(path):
            new = dict(jax.tree_util.tree_leaves_with_path(after.params))[path]
            np.testing.assert_array_equal(new, old)


@pytest.fixture
def two_images():
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(2, 4, 4, 3)), jnp.float32)
    labels = rng.integers(0, 3, (2, 4, 4)).astype(np.uint8)
    labels[1, 0] = 255
    return logits, jnp.asarray(labels)


def test_loss_follows_is_pseudo_and_each_part_its_own_valid_pixels(two_images):
    logits, labels = two_images
    config = tiny_config(loss__unlabeled_weight=0.5).loss
    sums = steps.loss_sums(logits, labels, jnp.array([False, True]), config)
    total, metrics = steps.from_sums(sums, config)
    supervised = np.divide(*losses.cross_entropy(logits[0], labels[0]))
    unsupervised = np.divide(*losses.self_correction(logits[1], labels[1]))
    np.testing.assert_allclose(total, supervised + 0.5 * unsupervised, rtol=1e-6)
    np.testing.assert_allclose(metrics["loss_labeled"], supervised, rtol=1e-6)
    agreement = np.mean(np.argmax(logits[1, 1:], -1) == np.asarray(labels[1, 1:]))
    np.testing.assert_allclose(metrics["agreement"], agreement, rtol=1e-6)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("ce", losses.cross_entropy),
        ("sce", losses.symmetric_cross_entropy),
        ("scl", losses.self_correction),
        ("scl_official", functools.partial(losses.self_correction, direction="official")),
    ],
)
def test_unlabeled_loss_by_name(two_images, kind, expected):
    config = tiny_config(loss__unlabeled=kind).loss
    total, _ = steps.from_sums(
        steps.loss_sums(*two_images, jnp.array([True, True]), config), config
    )
    np.testing.assert_allclose(total, np.divide(*expected(*two_images)), rtol=1e-6)


def test_all_ignored_changes_nothing_but_by_decay():
    step, made, mesh = make_step(STUDENT, 1, optim__weight_decay=0.0)
    before = jax.device_get(made.params)
    batch = make_batch(STUDENT, 1) | {"label": np.full((16, 32, 40), 255, np.uint8)}
    after, metrics = step(made, mesh_lib.to_devices(batch, mesh), jax.random.key(0))
    assert float(metrics["loss"]) == 0
    for a, b in zip(*map(jax.tree.leaves, (before, after.params)), strict=True):
        np.testing.assert_array_equal(a, b)
