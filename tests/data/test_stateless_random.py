"""The stateless draws against TensorFlow's, bit for bit."""

import numpy as np
import pytest
import tensorflow as tf

from semiseg_jax.data import stateless_random

SEEDS = [(0, 0), (1, 2), (-5, 2**40 + 3), (123456789012345, -77), (2**63 - 1, -(2**63))]


def tensor(seed):
    return tf.constant(seed, tf.int64)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", [(), (3,), (4, 5), (7, 9, 3)])  # one block, few, many
def test_uniform(seed, shape):
    ours = stateless_random.uniform(seed, shape, -20, 50)
    theirs = tf.random.stateless_uniform(shape, tensor(seed), -20, 50, alg="philox").numpy()
    assert ours.dtype == np.float32
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("seed", SEEDS)
def test_integers(seed):
    theirs = tf.random.stateless_uniform([50], tensor(seed), 7, 61, tf.int32, alg="philox")
    np.testing.assert_array_equal(stateless_random.integers(seed, (50,), 7, 60), theirs)


@pytest.mark.parametrize("seed", SEEDS)
def test_derived_seeds(seed):
    split = tf.random.experimental.stateless_split(tensor(seed), 3, alg="philox").numpy()
    np.testing.assert_array_equal(stateless_random.split(seed, 3), split)
    number = tf.constant(2**35, tf.int64)
    folded = tf.random.experimental.stateless_fold_in(tensor(seed), number, alg="philox").numpy()
    np.testing.assert_array_equal(stateless_random.fold_in(seed, 2**35), folded)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("count", [1, 3, 17])
def test_shuffled(seed, count):
    theirs = tf.random.experimental.stateless_shuffle(tf.range(count), tensor(seed), alg="philox")
    np.testing.assert_array_equal(stateless_random.shuffled(seed, count), theirs)


def test_generators_depend_on_the_whole_seed():
    seeds = [(1, 2), (2, 1), (1, -2), (1 + 2**40, 2), (1, 2 + 2**40)]
    draws = {stateless_random.generator(seed).random() for seed in seeds}
    assert len(draws) == len(seeds)
    again = stateless_random.generator(np.array([1, 2])).random()
    assert again == stateless_random.generator((1, 2)).random()
