import jax
import jax.numpy as jnp
import numpy as np
import pytest

from semiseg_jax.methods import ema
from tests.methods import arrays
from tests.methods.published import fixture


def run_average(steps, decay, warmup, seed_of, rule="average"):
    """Parameters and statistics of an average after some updates, in float64."""

    def update(average, numbered):
        step, values = numbered
        weight = ema.update_weight(step, decay, warmup)
        return {
            "weight": ema.update_average(average["weight"], values["weight"], weight),
            "mean": ema.update_statistics(average["mean"], values["mean"], weight, rule),
        }, None

    networks = [arrays.network_values(seed_of(step)) for step in range(steps)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *networks)
    start = ema.init_average(arrays.network_values(0))
    return jax.lax.scan(update, start, (np.arange(steps), stacked))[0]


@pytest.mark.parametrize(
    ("name", "steps", "decay", "warmup", "seed_of", "rule"),
    [
        ("french2019", 5, 0.99, False, lambda step: step + 1, "average"),
        ("classmix", 5, 0.7, True, lambda step: step + 1, "keep"),
        ("unimatch_v2", 600, 0.996, True, lambda step: 1 + step % 7, "average"),
    ],
)
def test_averages_are_those_of_the_published_code(name, steps, decay, warmup, seed_of, rule):
    with jax.enable_x64(True):
        average = run_average(steps, decay, warmup, seed_of, rule)
    for key, expected in fixture(name)["average"].items():
        assert average[key].dtype == np.float64
        np.testing.assert_allclose(average[key], expected, rtol=1e-5, err_msg=key)


def test_the_average_with_warmup_is_first_a_copy_and_then_the_mean_of_all_values():
    with jax.enable_x64(True):
        for steps in (1, 2, 9):
            average = run_average(steps, 0.99, True, lambda step: step + 1)
            values = [arrays.network_values(seed)["weight"] for seed in range(1, steps + 1)]
            np.testing.assert_allclose(average["weight"], np.mean(values, axis=0), rtol=1e-13)


@pytest.mark.parametrize(
    ("step", "warmup", "decay", "expected"),
    [(0, True, 0.9, 1.0), (4, True, 0.9, 0.2), (100, True, 0.9, 0.1), (0, False, 0.996, 0.004)],
)
def test_weight_of_an_update(step, warmup, decay, expected):
    assert ema.update_weight(step, decay, warmup) == np.float32(expected)
    with jax.enable_x64(True):
        np.testing.assert_allclose(ema.update_weight(step, decay, warmup), expected, rtol=1e-15)


def test_both_ends_are_met_to_the_bit():
    rng = np.random.default_rng(0)
    old, new = (
        jnp.asarray(rng.normal(size=10_000) * 10.0 ** rng.integers(-9, 9, 10_000)) for _ in "ab"
    )
    np.testing.assert_array_equal(ema.update_average(old, new, 1.0), new)
    for weight in (0.004, 0.3, 0.7):
        np.testing.assert_array_equal(ema.update_average(old, old, weight), old)


def test_statistics_are_averaged_or_copied_or_kept():
    old, new = {"mean": jnp.zeros(2)}, {"mean": jnp.full(2, 8.0)}
    results = {
        rule: ema.update_statistics(old, new, 0.25, rule)["mean"][0]
        for rule in ("average", "copy", "keep")
    }
    assert results == {"average": 2, "copy": 8, "keep": 0}


def test_running_means_of_the_average_approach_those_of_the_network():
    """Inputs of mean 100, momentum .9: the average must not stay at its start."""

    def step(carry, number):
        statistics, network = carry
        network = 0.9 * network + 0.1 * 100
        weight = ema.update_weight(number, 0.9)
        return (ema.update_statistics(statistics, network, weight), network), None

    (statistics, network), _ = jax.lax.scan(step, (jnp.zeros(()),) * 2, np.arange(50))
    assert 95 < statistics < network < 100


def test_averages_of_bfloat16_are_float32_and_move():
    start = jnp.ones((), jnp.bfloat16)
    average = ema.update_average(
        ema.init_average(start), jnp.asarray(1.1, jnp.bfloat16), ema.update_weight(5, 0.996, False)
    )
    assert average.dtype == jnp.float32
    np.testing.assert_allclose(average, 1 + 0.004 * (float(jnp.bfloat16(1.1)) - 1), rtol=1e-7)


def test_counters_are_copied():
    average = ema.init_average({"steps": jnp.int32(3)})
    average = ema.update_average(average, {"steps": jnp.int32(7)}, 0.1)
    assert average["steps"] == 7 and average["steps"].dtype == jnp.int32


def test_an_update_by_step_and_decay():
    """By hand: decay_t = min(1 - 1 / (t + 1), .9), so that step 3 keeps three quarters."""
    average = {"w": jnp.float32(8.0)}
    for step, expected in ((0, 4.0), (3, 7.0), (1000, 7.6)):
        updated = ema.update(average, {"w": jnp.float32(4.0)}, step, 0.9)["w"]
        np.testing.assert_allclose(updated, expected, rtol=1e-6)
    np.testing.assert_allclose(ema.update(average, {"w": 4.0}, 0, 0.9, warmup=False)["w"], 7.6)
