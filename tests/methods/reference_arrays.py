"""The random arrays of the fixtures: NumPy's default generator, by seed, in float64."""

import numpy as np


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def uniform(seed, *shape):
    return np.random.default_rng(seed).uniform(size=shape)


# Weights of a decoder with 3 input channels, 2 classes and 8 times the size: kernels [in, out].
DECODER_KERNELS = [normal(10, 3, 2)] + [normal(11 + i, 2, 8) for i in range(3)]
DECODER_BIASES = [normal(20 + i, 8) for i in range(3)]
FEATURES = np.abs(normal(1, 2, 3, 2, 3))  # [b, h, w, c]
START = uniform(2, 2, 3, 2, 3) - 0.5
AUXILIARY_LOGITS = 3 * normal(3, 2, 2, 5, 4, 3)  # of two decoders
MAIN_LOGITS = 3 * normal(4, 2, 5, 4, 3)

# PseudoSeg: 4 classes with the background, a last layer of 5 channels and one of 3.
LAST = normal(30, 2, 4, 3, 5)
MIDDLE = normal(31, 2, 7, 5, 3)
CLASSIFIER_KERNEL = normal(32, 5, 3)
PRESENT = np.array([[1, 0, 1], [1, 1, 0]], bool)
QUERY_KERNEL = normal(33, 8, 128) / 8
KEY_KERNEL = normal(34, 8, 128) / 8
CONV_KERNEL = normal(35, 4, 4)
PADDED = np.ones((2, 4, 3), bool)
PADDED[0, 3] = PADDED[0, :, 2] = False
DECODER_LOGITS = 5 * normal(36, 2, 4, 3, 4)
ATTENTION_LOGITS = normal(37, 2, 4, 3, 4)
STRONG_LOGITS = normal(38, 2, 4, 3, 4)
