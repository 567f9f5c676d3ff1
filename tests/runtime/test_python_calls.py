"""Python functions in TensorFlow's graphs: results, errors, and the end of the process."""

import subprocess
import sys
import textwrap

import numpy as np
import pytest
import tensorflow as tf

from semiseg_jax.runtime import python_calls


def test_results_have_the_given_types_and_shapes():
    @tf.function
    def halves(x):
        return python_calls.call(
            lambda x, factor: [x * factor, x > 1],
            [x, 0.5],
            [tf.float32, tf.bool],
            [x.shape, (3,)],
        )

    half, is_large = halves(tf.constant([1.0, 2.0, 3.0]))
    np.testing.assert_array_equal(half, [0.5, 1, 1.5])
    np.testing.assert_array_equal(is_large, [False, True, True])
    assert halves.get_concrete_function(tf.TensorSpec([3])).output_shapes[0] == (3,)


def test_scalars_are_arrays():
    kinds = []
    graph = tf.function(
        lambda x: python_calls.call(lambda x: (kinds.append(type(x)), x)[1], [x], tf.float32, ())
    )
    assert graph(2.0) == 2
    assert kinds == [np.ndarray]


def test_errors_become_those_of_tensorflow():
    def fail(x):
        raise ValueError("no such level")

    graph = tf.function(lambda x: python_calls.call(fail, [x], tf.float32, ()))
    with pytest.raises(tf.errors.InvalidArgumentError, match="no such level"):
        graph(1.0)


def test_a_process_ends_while_an_iterator_is_alive():
    """Without the exit handler, it waits forever for the calls in progress."""
    script = """
        import time
        import tensorflow as tf
        from semiseg_jax.runtime import python_calls

        def slow(number):
            time.sleep(0.1)
            return number

        numbers = tf.data.Dataset.range(1000).map(
            lambda i: python_calls.call(slow, [i], tf.int64, ()), num_parallel_calls=2
        )
        iterator = iter(numbers)
        assert next(iterator) == 0
        raise SystemExit(3)
    """
    process = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], timeout=60)
    assert process.returncode == 3
