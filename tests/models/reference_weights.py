"""Random weights and images for comparisons with reference networks, reproducible with NumPy.

`make_fixtures.py` gives them to the references in PyTorch, the tests to our networks. The module
imports only NumPy, because both run in different environments.
"""

import re
import zlib

import numpy as np

SAMPLES = 512


def drawn(name, shape):
    """Draws the tensor with a name of a PyTorch state dict: float32, except for counters.

    Activations stay near 1: kernels preserve the second moment through a ReLU, and norms shrink it
    slightly, so that the sum over residual blocks stays bounded.
    """
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if name.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    if name.endswith("pos_embed"):
        # As large as the embedded patches, so that wrong positions are seen.
        return rng.standard_normal(shape, np.float32)
    if len(shape) > 1:
        fan_in = np.prod(shape[1:])
        return (rng.standard_normal(shape, np.float32) * np.sqrt(2 / fan_in)).astype(np.float32)
    low, high = {
        "running_var": (0.5, 1.5),
        "running_mean": (-0.2, 0.2),
        "weight": (0.5, 1.0),
        "bias": (-0.2, 0.2),
        "gamma": (0.2, 0.7),
    }[re.sub(r"^gamma_\d$", "gamma", name.rpartition(".")[2])]
    return rng.uniform(low, high, shape).astype(np.float32)


def image(height, width):
    """Draws one normalised image, [1, height, width, 3] float32."""
    return np.random.default_rng(height * width).standard_normal((1, height, width, 3), np.float32)


def sampled(values):
    """Samples values of an array [..., channels]; the positions depend only on its size."""
    flat = np.asarray(values).ravel()
    indices = np.random.default_rng(flat.size).choice(flat.size, min(SAMPLES, flat.size), False)
    return flat[indices]
