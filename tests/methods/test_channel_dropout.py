import jax
import jax.numpy as jnp
import numpy as np
import pytest

from semiseg_jax.methods import channel_dropout
from semiseg_jax.methods.image_keys import image_keys
from tests.methods.published import fixture

KEY = jax.random.key(3)


def levels(images=6, dtype=jnp.float32):
    """Levels of feature maps as DeepLab's, and of tokens as a ViT's; all ones."""
    return {
        "low": jnp.ones((images, 4, 5, 48), dtype),
        "high": jnp.ones((images, 2, 3, 160), dtype),
        "tokens": jnp.ones((images, 7, 160), dtype),
    }


def by_channel(feature):
    """[n, c] of [n, ..., c], where all places of a channel are alike."""
    flat = np.asarray(feature, np.float32).reshape(feature.shape[0], -1, feature.shape[-1])
    np.testing.assert_array_equal(flat, np.broadcast_to(flat[:, :1], flat.shape))
    return flat[:, 0]


def test_whole_channels_are_dropped_and_the_others_scaled():
    dropped = jax.jit(lambda f: channel_dropout.channel_dropout(image_keys(KEY, 6), f, 0.25))(
        levels()
    )
    factors = {name: by_channel(f) for name, f in dropped.items()}
    for name, values in factors.items():
        assert set(np.unique(values)) == {0, np.float32(1 / 0.75)}, name
        assert 0.5 < np.mean(values > 0) < 0.9, name
    # Each image and each level has a mask of its own.
    assert len(np.unique(factors["high"], axis=0)) == 6
    assert np.any(factors["high"] != factors["tokens"])


def test_the_masks_of_two_views_are_complementary_and_half_of_the_pairs_are_spared():
    first, second = jax.jit(lambda a, b: channel_dropout.complementary_dropout(KEY, a, b))(
        levels(), levels()
    )
    m = {name: by_channel(f) for name, f in first.items()}
    for name, f in second.items():
        np.testing.assert_array_equal(by_channel(f), 2 - m[name])
    # Levels of one width share their masks, as the published four levels do.
    np.testing.assert_array_equal(m["high"], m["tokens"])
    spared = np.all(m["high"] == 1, axis=1)
    np.testing.assert_array_equal(spared, np.all(m["low"] == 1, axis=1))
    assert spared.sum() == 3
    assert set(np.unique(m["high"][~spared])) == {0, 2}
    assert 0.4 < np.mean(m["high"][~spared] == 2) < 0.6


@pytest.mark.parametrize(("pairs", "spared"), [*fixture("unimatch_v2")["spared_pairs"].items()])
def test_as_many_pairs_are_spared_as_in_the_published_code(pairs, spared):
    draw = jax.jit(channel_dropout.spared_pairs, static_argnums=1)
    assert np.sum(draw(KEY, int(pairs))) == spared


def test_other_keys_spare_other_pairs():
    draw = jax.jit(jax.vmap(lambda key: channel_dropout.spared_pairs(key, 8)))
    drawn = np.array(draw(jax.random.split(KEY, 200)))
    assert np.all(drawn.sum(1) == 4)
    assert np.all(np.abs(drawn.mean(0) - 0.5) < 0.15)


def test_features_keep_their_dtype_and_gradients_reach_the_kept_channels_alone():
    def total(f):
        return sum(
            jnp.sum(leaf.astype(jnp.float32))
            for leaf in jax.tree.leaves(channel_dropout.channel_dropout(image_keys(KEY, 2), f))
        )

    features = {"low": jnp.ones((2, 3, 3, 32), jnp.bfloat16)}
    gradient = jax.jit(jax.grad(total))(features)["low"]
    assert gradient.dtype == jnp.bfloat16
    assert set(np.unique(by_channel(gradient))) == {0, 2}
