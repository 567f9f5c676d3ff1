"""The training step: its collectives, its independence of the devices, its losses."""

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from semiseg_jax import compiled_model, losses, optim, train, train_state, train_step
from semiseg_jax import mesh as mesh_lib
from semiseg_jax.data.batch_layout import BatchSpec
from semiseg_jax.models import deeplab
from tests.conftest import tiny_config

CLASSES = 5
TEACHER = BatchSpec(("labeled",), (), 8, 8)
STUDENT = BatchSpec(("labeled",), ("pseudo",), 8, 8)


def make_batch(spec, groups, seed=0):
    """The same images whatever the groups; arranged as `batch_layout.lay_out_batch` joins them."""
    rng = np.random.default_rng(seed)
    parts = {}
    for name in ("weak", "strong"):
        count = spec.size(name)
        parts[name] = {
            "image": rng.integers(0, 256, (count, 32, 40, 3)).astype(np.uint8),
            "label": rng.integers(0, CLASSES, (count, 32, 40)).astype(np.uint8),
            "is_pseudo": np.full(count, name == "strong"),
        }
        # Valid pixels are unevenly spread over the devices.
        parts[name]["label"][: count // 4] = 255
    blocks = [
        {
            k: np.split(v, groups * spec.accum_steps)[part * groups + g]
            for k, v in parts[name].items()
        }
        for g in range(groups)
        for part in range(spec.accum_steps)
        for name in ("weak", "strong")
    ]
    return {k: np.concatenate([b[k] for b in blocks]) for k in blocks[0]}


@functools.cache
def make_program(spec, devices, **changes):
    """The jitted step of a config with these changes, its network and its mesh; made once."""
    config = tiny_config(**changes)
    mesh = mesh_lib.make_mesh(jax.devices()[:devices])
    model = deeplab.build(config.model, CLASSES)
    tx, schedule = optim.make_optimizer(config.optim, "teacher", 20)
    step = train_step.make_train_step(model, tx, config.loss, spec, mesh)
    return (
        compiled_model.StageProgram(step, tx, schedule, spec, train_state.variable_shapes(model)),
        model,
        mesh,
    )


def lower_step(spec, devices, **changes):
    """The step's program before it is compiled; no variables are drawn for it."""
    program, _, mesh = make_program(spec, devices, **changes)
    return train.trace_step(program, (32, 40), mesh).lower()


@functools.cache
def init_variables(model, mesh, x64):
    """Drawn once for each network and mesh: `train_state.create_train_state` copies them."""
    return train_state.init_variables(model, 0, mesh)


def make_step(spec, devices, dtype=jnp.float32, **changes):
    program, model, mesh = make_program(spec, devices, **changes)
    variables = init_variables(model, mesh, jax.config.jax_enable_x64)
    variables = jax.tree.map(lambda v: v.astype(dtype), variables)
    return program.step, train_state.create_train_state(variables, program.tx, mesh), mesh


def collectives(program):
    """How often each kind of collective occurs in a compiled program."""
    kinds = (
        "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast"
    )
    found = re.findall(rf"= [^=]*? ({kinds})(?:-start)?\(", program.as_text())
    return {kind: found.count(kind) for kind in set(found)}


def test_student_has_all_reduces_alone_and_no_more_than_the_teacher():
    counts = {}
    for name, spec in (("teacher", TEACHER), ("student", STUDENT)):
        counts[name] = collectives(lower_step(spec, 8).compile())
    assert set(counts["student"]) == {"all-reduce"}
    assert 0 < counts["student"]["all-reduce"] <= counts["teacher"]["all-reduce"]


def test_rematerialised_norms_reduce_their_moments_once():
    counts = [
        collectives(lower_step(TEACHER, 8, model__remat=remat).compile()) for remat in (False, True)
    ]
    assert counts[0] == counts[1]


def run_steps(devices, count, dtype, batches=None, spec=STUDENT, **changes):
    """Losses and the last state; `batches` different batches, one each step unless given."""
    step, made, mesh = make_step(spec, devices, dtype, **changes)
    totals = []
    for i in range(count):
        batch = mesh_lib.shard_batch(make_batch(spec, devices, seed=i % (batches or count)), mesh)
        made, metrics = step(made, batch, jax.random.key(0))
        totals.append(float(metrics["loss"]))
    return np.array(totals), jax.device_get(made)


# What `first_step` returns. Where a change of the training is intended, print the new values with
#     python -m tests.test_train_step
# and tell in the commit why they moved.
GOLDEN = {
    "loss": [7.79667],
    "gradient_norm": [0.0447659],
    "params/backbone/stem/conv/kernel": [0.096559, 0.0896288, -0.111165],
    "params/backbone/stem/norm/strong/bias": [1.07316e-05, -8.23514e-07, 1.64004e-06],
    "params/backbone/stem/norm/weak/bias": [-2.42914e-06, -3.70983e-06, -5.27216e-07],
    "params/classifier/bias": [-2.4384e-05, -1.27522e-05, -3.65633e-05],
    "params/classifier/kernel": [-0.00689618, -0.0116613, 0.00614758],
    "batch_stats_strong/backbone/stem/norm/mean": [-0.0170433, 0.0350734, -0.0193503],
    "batch_stats_weak/backbone/stem/norm/mean": [-0.0112559, 0.0328672, -0.018673],
    "batch_stats_weak/backbone/stem/norm/var": [1.01436, 0.991307, 0.993531],
}


def first_step():
    """Loss, gradient norm and a few values of the state after a student's first step.

    Biases start at 0, so that after the step they are the update.
    """
    step, made, mesh = make_step(STUDENT, 1)
    batch = mesh_lib.shard_batch(make_batch(STUDENT, 1), mesh)
    made, metrics = step(made, batch, jax.random.key(0))
    leaves = traverse_util.flatten_dict(made.variables, sep="/") | metrics
    return {name: np.ravel(leaves[name])[:3].tolist() for name in GOLDEN}


def test_the_first_step_of_a_student_is_as_recorded():
    for name, values in first_step().items():
        # Room for another order of the sums, as compilers and processors have it.
        tolerance = 1e-3 * np.abs(GOLDEN[name]).max()
        np.testing.assert_allclose(values, GOLDEN[name], rtol=0, atol=tolerance, err_msg=name)


def test_one_device_is_eight_devices_in_float64():
    with jax.enable_x64(True):
        one, _ = run_steps(1, 20, jnp.float64, model__dropout=0.3)
        eight, _ = run_steps(8, 20, jnp.float64, model__dropout=0.3)
    assert np.ptp(one) > 0.01  # it trains
    np.testing.assert_allclose(eight, one, rtol=1e-9)


IN_FOUR = dataclasses.replace(STUDENT, accum_steps=4)


def test_accumulated_gradients_are_those_of_the_whole_batch():
    """With statistics that stand still nothing else differs, uneven valid pixels included."""
    with jax.enable_x64(True):
        whole, one = run_steps(1, 3, jnp.float64, model__norm="frozen")
        parts, four = run_steps(1, 3, jnp.float64, spec=IN_FOUR, model__norm="frozen")
    np.testing.assert_allclose(parts, whole, rtol=1e-9)
    for a, b in zip(*(jax.tree.leaves(s.params) for s in (one, four)), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-7, atol=1e-12)


@pytest.mark.slow
def test_accumulation_on_eight_devices_is_that_on_one():
    two = dataclasses.replace(STUDENT, batch_labeled=16, batch_pseudo=16, accum_steps=2)
    with jax.enable_x64(True):
        one, _ = run_steps(1, 5, jnp.float64, spec=two, model__dropout=0.3)
        eight, _ = run_steps(8, 5, jnp.float64, spec=two, model__dropout=0.3)
    np.testing.assert_allclose(eight, one, rtol=1e-9)


def test_running_moments_move_with_each_micro_batch_in_turn():
    """As if the network had gone forward through one after the other."""
    model = deeplab.build(tiny_config().model, CLASSES)
    with jax.enable_x64(True):
        step, made, mesh = make_step(IN_FOUR, 1, jnp.float64)
        start = jax.device_get(made)
        batch = make_batch(IN_FOUR, 1)
        after, _ = step(made, mesh_lib.shard_batch(batch, mesh), jax.random.key(0))
        forward = jax.jit(
            lambda variables, x: model.apply(
                variables, x, domain="both", train=True, mutable=list(start.norms)
            )[1]
        )
        norms = start.norms
        for part in np.split(batch["image"], 4):
            norms = forward({"params": start.params, **norms}, part)
        for a, b in zip(*map(jax.tree.leaves, (norms, after.norms)), strict=True):
            np.testing.assert_allclose(b, a, rtol=1e-9, atol=1e-12)


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


def instructions(spec):
    """How many there are in the program before the compiler's first pass."""
    return len(re.findall(r"^ *%.* = ", lower_step(spec, 1).as_text(), re.M))


def test_a_students_program_holds_one_network():
    """And so takes about as long to compile as a teacher's."""
    counts = [instructions(spec) for spec in (TEACHER, STUDENT)]
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
    spec = BatchSpec((), ("pseudo",), 8, 8)
    step, made, mesh = make_step(spec, 1, optim__weight_decay=0.0)
    before = jax.device_get(made)
    batch = make_batch(STUDENT, 1)
    batch = mesh_lib.shard_batch({k: v[8:] for k, v in batch.items()}, mesh)
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
    is_pseudo = jnp.array([False, True])
    sums = train_step.LossSums.compute(logits, labels, is_pseudo, config)
    total, metrics = sums.loss(config), sums.metrics(config)
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
    sums = train_step.LossSums.compute(*two_images, jnp.array([True, True]), config)
    total = sums.loss(config)
    np.testing.assert_allclose(total, np.divide(*expected(*two_images)), rtol=1e-6)


def test_all_ignored_changes_nothing_but_by_decay():
    step, made, mesh = make_step(STUDENT, 1, optim__weight_decay=0.0)
    before = jax.device_get(made.params)
    batch = make_batch(STUDENT, 1) | {"label": np.full((16, 32, 40), 255, np.uint8)}
    after, metrics = step(made, mesh_lib.shard_batch(batch, mesh), jax.random.key(0))
    assert float(metrics["loss"]) == 0
    for a, b in zip(*map(jax.tree.leaves, (before, after.params)), strict=True):
        np.testing.assert_array_equal(a, b)


if __name__ == "__main__":
    print(json.dumps(first_step(), indent=4))
