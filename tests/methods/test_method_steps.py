"""The training step of every method, on a network that compiles in a second."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import default
from semiseg_jax import compiled_model, losses, optim, train_step
from semiseg_jax import mesh as mesh_lib
from semiseg_jax.data.batch_layout import BatchSpec
from semiseg_jax.methods import registry
from semiseg_jax.methods.adversarial_method import AdversarialMethod
from semiseg_jax.methods.method import OnlineMethod, State
from semiseg_jax.methods.network import Network
from tests import processes
from tests.methods.toy_network import ToyNetwork, narrow_discriminators

CLASSES = 5
LABELED, UNLABELED, SIZE = 8, 16, (16, 24)
ONLINE = [name for name, cls in registry.METHODS.items() if issubclass(cls, OnlineMethod)]
# Those of the others are in test_adversarial_slow.py.
ONE_NETWORK = [name for name in ONLINE if not issubclass(registry.METHODS[name], AdversarialMethod)]
# So that some pixels of an untrained network are kept.
CHANGES = {"threshold": 0.3, "cutout": 6, "classifier_dropout": 0.0, "start": 0.0}


@pytest.fixture(scope="module", autouse=True)
def small_discriminators():
    with narrow_discriminators():
        yield


def make_config(name, **changes):
    config = default.get_config()
    config.method.name = name
    config.optim.teacher.learning_rate = 0.1
    config.train.steps = 20
    for key, value in (CHANGES | changes).items():
        if key in config.method[name]:
            with config.unlocked():
                config.method[name][key] = value
    if name == "cct":
        for kind in ("vat", "dropout", "cutout", "context_mask", "object_mask", "feature_drop"):
            config.method.cct[kind] = 1
        config.method.cct.noise = 1
    return config


@functools.cache
def make_program(name, devices, **changes):
    mesh = mesh_lib.make_mesh(jax.devices()[:devices])
    config = make_config(name, **changes)
    method = registry.build(config)
    model = ToyNetwork(CLASSES)
    spec = BatchSpec(("labeled",), (), LABELED, 0)
    tx, schedule = optim.make_optimizer(config.optim, "teacher", 20)
    step = train_step.make_method_step(method, model, tx, config.loss, mesh)
    program = compiled_model.StageProgram(step, tx, schedule, spec, {}, model, method)
    return program, mesh


def make_state(program, mesh, dtype=jnp.float32):
    # Not optimised by rules of the network's own names: all kernels are of the head.
    images = jnp.zeros((2, *SIZE, 3), jnp.uint8)
    variables = program.model.init({"params": jax.random.key(0)}, images, domain="both")
    variables = jax.tree.map(lambda leaf: leaf.astype(dtype), variables)
    state = program.create_state(variables, mesh)
    # Auxiliary networks begin in float32.
    method = jax.tree.map(
        lambda leaf: leaf.astype(dtype) if leaf.dtype == jnp.float32 else leaf, state.method
    )
    return state.replace(method=method)


def make_batch(seed, views):
    """Random images whose last columns are padding in the views."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, CLASSES, (LABELED, *SIZE)).astype(np.uint8)
    label[:2] = losses.IGNORE
    valid = np.ones((UNLABELED, *SIZE), bool)
    valid[:, :, -5:] = False
    return {
        "image": rng.integers(0, 256, (LABELED, *SIZE, 3)).astype(np.uint8),
        "label": label,
        "is_pseudo": np.zeros(LABELED, bool),
        "views": rng.integers(0, 256, (UNLABELED, views, *SIZE, 3)).astype(np.uint8),
        "valid": valid,
    }


def run_steps(name, devices, count=2, dtype=jnp.float32, share=(0, 1), **changes):
    """The metrics of each step, and the last state.

    Args:
        share: index and number of this process.
    """
    program, mesh = make_program(name, devices, **changes)
    state, metrics = make_state(program, mesh, dtype), []
    for i in range(count):
        part = processes.own_part(make_batch(i, program.method.views.count), *share)
        batch = mesh_lib.shard_batch(part, mesh)
        state, found = program.step(state, batch, jax.random.key(0))
        metrics.append(jax.device_get(found))
    return metrics, jax.device_get(state)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name == "unimatch_v2" else pytest.mark.slow)
        for name in ONE_NETWORK
    ],
)
def test_the_result_does_not_depend_on_the_number_of_devices(name):
    with jax.enable_x64(True):
        (one, first), (eight, second) = (run_steps(name, n, dtype=jnp.float64) for n in (1, 8))
    make_program.cache_clear()
    for a, b in zip(jax.tree.leaves((one, first)), jax.tree.leaves((eight, second)), strict=True):
        np.testing.assert_allclose(np.asarray(a, float), np.asarray(b, float), rtol=0, atol=1e-9)
    assert sum(one[-1]["kept_pixels"]) > 0


@pytest.mark.parametrize("name", ONE_NETWORK)
def test_the_step_has_no_collective_but_all_reduce(name):
    program, mesh = make_program(name, 8)
    batch = mesh_lib.shard_batch(make_batch(0, program.method.views.count), mesh)
    text = (
        program.step.lower(make_state(program, mesh), batch, jax.random.key(0)).compile().as_text()
    )
    kinds = (
        "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast"
    )
    assert set(re.findall(rf"= [^=]*? ({kinds})(?:-start)?\(", text)) == {"all-reduce"}


@pytest.mark.parametrize("name", ["fixmatch", "unimatch", "unimatch_v2", "cutmix", "classmix"])
def test_a_threshold_that_no_pixel_meets_leaves_the_labels_alone(name):
    metrics, _ = run_steps(name, 1, threshold=1.1)
    for values in metrics:
        assert values["kept"] == 0
        share = {"fixmatch": 0.5, "unimatch": 0.5, "unimatch_v2": 0.5}.get(name, 1.0)
        np.testing.assert_allclose(values["loss"], share * values["loss_labeled"], rtol=1e-6)


def test_the_average_has_averaged_statistics():
    """A dozen public threads: an average of parameters with the statistics of step 0."""
    program, mesh = make_program("unimatch_v2", 1)
    state = make_state(program, mesh)
    state = state.replace(params=jax.tree.map(jnp.zeros_like, state.params))
    stem = state.params["stem"]
    state = state.replace(params=state.params | {"stem": stem | {"bias": stem["bias"] + 100.0}})
    frozen = state.params
    for i in range(50):
        batch = mesh_lib.shard_batch(make_batch(i, program.method.views.count), mesh)
        state, _ = program.step(
            state.replace(params=jax.tree.map(jnp.copy, frozen)), batch, jax.random.key(0)
        )
    mean = state.method.own["average"]["batch_stats_weak"]["norm"]["mean"]
    # The mean of 50 running means 100 (1 - .9^t) is 82.
    np.testing.assert_allclose(mean, 82, atol=0.5)


@pytest.mark.parametrize("name", ONLINE)
def test_what_is_ignored_altogether_gives_no_nan(name):
    program, mesh = make_program(name, 1)
    batch = make_batch(0, program.method.views.count)
    batch["label"][:] = losses.IGNORE
    batch["valid"][:] = False
    state, metrics = program.step(
        make_state(program, mesh), mesh_lib.shard_batch(batch, mesh), jax.random.key(0)
    )
    for leaf in jax.tree.leaves((state.params, state.norms, metrics)):
        assert np.all(np.isfinite(leaf))
    assert metrics["kept"] == 0


def unlabeled_gradients(name):
    """The gradients of the unlabelled loss alone: no labelled pixel has a label.

    Returns:
        Those of the network's parameters, of the method's own state, and of its auxiliary networks.
    """
    program, mesh = make_program(name, 1)
    state = make_state(program, mesh)
    batch = make_batch(0, program.method.views.count)
    batch["label"][:] = losses.IGNORE
    images = train_step.method_batch(jax.tree.map(jnp.asarray, batch), program.method)
    statistics = {k: v for k, v in state.method.auxiliary.items() if k != "params"}

    @functools.partial(jax.grad, argnums=(0, 1, 2))
    def gradients(params, own, auxiliary):
        network = Network(program.model, params, state.norms, jax.random.key(0), groups=1)
        beside = State(own, statistics | auxiliary, {}, state.method.discriminator)
        zero = lambda logits, labels: 0.0 * jnp.sum(logits)  # noqa: E731
        step = jnp.asarray(10)
        return program.method.loss(network, zero, beside, images, step, jax.random.key(0)).loss

    trained = {k: v for k, v in state.method.auxiliary.items() if k == "params"}
    return jax.jit(gradients)(state.params, state.method.own, trained)


def is_zero(tree):
    return not any(np.any(leaf) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", ONLINE)
def test_gradients_reach_the_student_and_no_teacher(name):
    network, own, auxiliary = unlabeled_gradients(name)
    assert is_zero(own)
    assert not is_zero(network["stem"]) and not is_zero(network["deep"])
    # CCT's target is the main decoder's prediction, which is detached.
    assert is_zero(network["classifier"]) == is_zero(network["head_norm"]) == (name == "cct")
    if name == "cct":
        for leaf in jax.tree.leaves(auxiliary):
            assert np.all(np.any(leaf, axis=tuple(range(1, leaf.ndim)))), "a decoder has none"
    if name == "pseudoseg":
        assert is_zero(auxiliary), "the fused labels are detached"


def test_labels_of_a_teacher_do_not_depend_on_the_other_images_of_the_batch():
    program, mesh = make_program("unimatch_v2", 1)
    state = make_state(program, mesh)
    first = make_batch(0, program.method.views.count)["views"][:2, 0]
    black, white = first.copy(), first.copy()
    black[1], white[1] = 0, 255
    average = state.method.own["average"]

    @jax.jit
    def predict(images):
        network = Network(program.model, state.params, state.norms, jax.random.key(0), groups=1)
        return network.predict(images, average)

    one, other = predict(black), predict(white)
    np.testing.assert_array_equal(one[0], other[0])
    assert np.any(one[1] != other[1])
