import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from semiseg_jax.models.dsbn import DomainLayout, DomainNorm

WEAK, STRONG = "batch_stats_weak", "batch_stats_strong"


def make(kind="dsbn", **kwargs):
    return DomainNorm(kind=kind, momentum=0.9, epsilon=1e-3, **kwargs)


def images(count, seed=0, channels=3):
    x = np.random.default_rng(seed).normal(1.0, 2.0, (count, 4, 5, channels))
    return jnp.asarray(x, jnp.float32)


@pytest.fixture
def variables():
    """The variables of a norm whose domains differ in every number."""
    initial = make().init(jax.random.key(0), images(2), DomainLayout("both", train=False))
    rng = np.random.default_rng(5)
    return jax.tree.map(lambda v: jnp.asarray(rng.uniform(0.5, 1.5, v.shape), v.dtype), initial)


def test_collections_and_names(variables):
    assert set(variables) == {"params", WEAK, STRONG}
    assert jax.tree.map(jnp.shape, variables["params"]) == {
        d: {"scale": (3,), "bias": (3,)} for d in ("weak", "strong")
    }
    for collection in (WEAK, STRONG):
        assert set(variables[collection]) == {"mean", "var"}


def test_agrees_with_flax(variables):
    flax_norm = nn.BatchNorm(use_running_average=False, momentum=0.9, epsilon=1e-3)
    expected, updated = flax_norm.apply(
        {"params": variables["params"]["strong"], "batch_stats": variables[STRONG]},
        images(4),
        mutable=["batch_stats"],
    )
    result, changed = make().apply(
        variables, images(4), DomainLayout("strong", train=True), mutable=[WEAK, STRONG]
    )
    np.testing.assert_allclose(result, expected, atol=2e-6)
    for name in ("mean", "var"):
        np.testing.assert_allclose(changed[STRONG][name], updated["batch_stats"][name], rtol=1e-6)


@pytest.mark.parametrize(("domain", "other"), [("weak", "strong"), ("strong", "weak")])
def test_a_domain_does_not_change_the_other(variables, domain, other):
    def loss(params):
        y, changed = make().apply(
            {**variables, "params": params},
            images(4),
            DomainLayout(domain, train=True),
            mutable=[WEAK, STRONG],
        )
        return jnp.sum(y**3), changed

    gradients, changed = jax.grad(loss, has_aux=True)(variables["params"])
    for name in ("mean", "var"):
        other_stats = f"batch_stats_{other}"
        np.testing.assert_array_equal(changed[other_stats][name], variables[other_stats][name])
        own = f"batch_stats_{domain}"
        assert not np.array_equal(changed[own][name], variables[own][name])
    assert not np.any(gradients[other]["scale"]) and not np.any(gradients[other]["bias"])
    assert np.all(gradients[domain]["scale"]) and np.all(gradients[domain]["bias"])


@pytest.mark.parametrize(
    ("groups", "num_weak", "num_strong"), [(1, 4, 4), (4, 1, 1), (1, 5, 2), (4, 1, 2), (2, 3, 1)]
)
def test_both_domains_equal_two_separate_passes(variables, groups, num_weak, num_strong):
    weak, strong = images(groups * num_weak, 1), images(groups * num_strong, 2) * 3 - 1
    joined = jnp.concatenate(
        [
            block
            for g in range(groups)
            for block in (
                weak[g * num_weak : (g + 1) * num_weak],
                strong[g * num_strong : (g + 1) * num_strong],
            )
        ]
    )
    cotangent = images(len(joined), 3)

    def run(params, x, dy, layout):
        y, changed = make().apply(
            {**variables, "params": params}, x, layout, mutable=[WEAK, STRONG]
        )
        return jnp.sum(y * dy), (y, changed)

    grad = jax.grad(run, argnums=(0, 1), has_aux=True)
    both = DomainLayout("both", train=True, groups=groups, num_weak=num_weak)
    (params, dx), (y, changed) = grad(variables["params"], joined, cotangent, both)

    is_weak = np.arange(len(joined)) % (num_weak + num_strong) < num_weak
    for domain, mask in (("weak", is_weak), ("strong", ~is_weak)):
        alone = DomainLayout(domain, train=True)
        (params_alone, dx_alone), (y_alone, changed_alone) = grad(
            variables["params"], joined[mask], cotangent[mask], alone
        )
        np.testing.assert_allclose(y[mask], y_alone, atol=1e-5)
        np.testing.assert_allclose(dx[mask], dx_alone, atol=1e-5)
        stats = f"batch_stats_{domain}"
        for name in ("mean", "var"):
            np.testing.assert_allclose(changed[stats][name], changed_alone[stats][name], atol=1e-6)
        for name in ("scale", "bias"):
            np.testing.assert_allclose(
                params[domain][name], params_alone[domain][name], rtol=1e-5, atol=1e-4
            )


def test_half_of_each_block_is_weak_by_default(variables):
    layouts = (
        DomainLayout("both", train=False, groups=2),
        DomainLayout("both", False, groups=2, num_weak=2),
    )
    by_default, explicit = (make().apply(variables, images(8), layout) for layout in layouts)
    np.testing.assert_array_equal(by_default, explicit)


def test_inference_reads_only_the_weak_norm(variables):
    weak_alone = {"params": {"weak": variables["params"]["weak"]}, WEAK: variables[WEAK]}
    layout = DomainLayout("weak", train=False)
    np.testing.assert_array_equal(
        make().apply(weak_alone, images(2), layout), make().apply(variables, images(2), layout)
    )


def test_a_constant_channel_gives_finite_results(variables):
    x = jnp.full((2, 4, 5, 3), 1000.1)
    y, _ = make().apply(variables, x, DomainLayout("weak", train=True), mutable=[WEAK])
    assert np.isfinite(y).all()


def test_shared_affine_has_one_affine_and_two_statistics():
    norm = make("dsbn_shared_affine")
    variables = norm.init(jax.random.key(0), images(2), DomainLayout("both", train=False))
    assert set(variables) == {"params", WEAK, STRONG}
    assert set(variables["params"]) == {"weak"}


def test_shared_treats_all_images_as_one_batch():
    norm = make("shared")
    x = images(4)
    variables = norm.init(jax.random.key(0), x, DomainLayout("both", train=False))
    assert set(variables) == {"params", WEAK}
    both, _ = norm.apply(variables, x, DomainLayout("both", train=True, groups=2), mutable=[WEAK])
    weak, _ = norm.apply(variables, x, DomainLayout("weak", train=True), mutable=[WEAK])
    np.testing.assert_array_equal(both, weak)


def test_frozen_does_not_update_its_statistics_and_trains_its_affine():
    norm = make("frozen")
    x = images(4)
    variables = norm.init(jax.random.key(0), x, DomainLayout("both", train=False))

    def loss(params):
        y, changed = norm.apply(
            {**variables, "params": params}, x, DomainLayout("both", train=True), mutable=[WEAK]
        )
        return jnp.sum(y**2), (y, changed)

    gradient, (y, changed) = jax.grad(loss, has_aux=True)(variables["params"])
    np.testing.assert_array_equal(changed[WEAK]["mean"], np.zeros(3))
    np.testing.assert_allclose(y, x / np.sqrt(1 + 1e-3), rtol=1e-6)
    assert np.all(gradient["weak"]["scale"])


def test_bfloat16_in_and_out_with_float32_statistics(variables):
    x = images(4).astype(jnp.bfloat16) + 100
    y, changed = make(dtype=jnp.bfloat16).apply(
        variables, x, DomainLayout("weak", train=True), mutable=[WEAK]
    )
    assert y.dtype == jnp.bfloat16
    assert changed[WEAK]["mean"].dtype == jnp.float32
    expected = 0.9 * variables[WEAK]["mean"] + 0.1 * np.asarray(x, np.float64).mean((0, 1, 2))
    np.testing.assert_allclose(changed[WEAK]["mean"], expected, rtol=1e-6)


@pytest.mark.parametrize(
    "layout",
    [
        DomainLayout("both", train=True, groups=3),
        DomainLayout("both", train=True, groups=1, num_weak=4),
        DomainLayout("both", train=True, groups=4),
    ],
)
def test_a_batch_that_does_not_divide_is_an_error(variables, layout):
    with pytest.raises(ValueError, match="does not divide"):
        make().apply(variables, images(4), layout)
