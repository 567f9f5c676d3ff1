"""Python functions as operations of TensorFlow's graphs, which end before Python does.

A `tf.data` iterator calls such a function from threads of TensorFlow, ahead of its consumer. When
Python finalizes, it ends every other thread that asks for its lock. An iterator that still exists
then waits forever for its calls, and the process hangs: at the end of a script, at `sys.exit`, and
after an exception or Ctrl-C. The calls therefore end in an exit handler, while Python still runs
them. Dropping an iterator earlier is safe: TensorFlow releases the lock while it waits.
"""

import atexit
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from semiseg_jax.runtime.quiet_tensorflow import tf

# An iterator whose buffers are full makes no more calls. It counts as idle after `_IDLE` seconds
# without one; calls are refused from `_PATIENCE` seconds on.
_IDLE, _PATIENCE = 0.1, 5.0


class _RunningCalls:
    """Counts the calls in progress, over all threads."""

    def __init__(self):
        self._lock = threading.Lock()
        self._running = 0
        self._last_end = 0.0
        self._refusing = False

    def __enter__(self) -> None:
        if self._refusing:
            raise RuntimeError("Python is exiting.")
        with self._lock:
            self._running += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._running -= 1
            self._last_end = time.monotonic()

    def wait_until_idle(self) -> None:
        """Returns when no thread is in a call, and none has been for a while."""
        start = time.monotonic()
        while self._running or time.monotonic() - self._last_end < _IDLE:
            self._refusing = time.monotonic() - start > _PATIENCE
            time.sleep(_IDLE / 10)


_running_calls = _RunningCalls()
atexit.register(_running_calls.wait_until_idle)


def call(function: Callable[..., Any], inputs: Sequence[Any], dtypes: Any, shapes: Any) -> Any:
    """Calls a pure function of NumPy arrays when the graph runs.

    Args:
        function: arrays -> array, or a list of arrays; it must not write to its arguments. Errors
            that it raises become TensorFlow's errors.
        inputs: tensors, or values of `tf.convert_to_tensor`.
        dtypes: type of the result, or a list of types.
        shapes: static shape of the result, or a list of shapes, which the results must have.

    Returns:
        A tensor, or a list of tensors.
    """

    def counted(*values: Any) -> Any:
        with _running_calls:
            # TensorFlow passes a scalar as NumPy's scalar, which is no array.
            return function(*map(np.asarray, values))

    # Stateless: equal calls may be merged, and calls without a reader removed.
    results = tf.numpy_function(counted, inputs, dtypes, stateful=False)
    if isinstance(dtypes, list):
        return [tf.ensure_shape(r, shape) for r, shape in zip(results, shapes, strict=True)]
    return tf.ensure_shape(results, shapes)
