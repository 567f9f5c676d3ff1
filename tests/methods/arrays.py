"""The inputs of the fixtures: small random arrays that tests and `make_fixtures.py` both draw.

Channels are last, as in this package. Sizes are unequal, so that swapped axes are seen.
"""

import numpy as np

IMAGES, HEIGHT, WIDTH, CLASSES = 4, 12, 17, 5
IGNORE = 255
THRESHOLD = 0.8
# (height, width) of the images that boxes are drawn for.
BOX_SIZES = ((12, 17), (129, 257), (321, 321))
BOXES_PER_SIZE = 20
UNIMATCH_SIZE = 129
QUANTILES = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99)
RAMP_STEPS = (0, 1, 3, 5, 9, 10, 14)


def logits(seed, scale=4.0, images=IMAGES):
    """Class scores [n, h, w, C], float64; at scale 4 a third of them are confident."""
    rng = np.random.default_rng(seed)
    return scale * rng.normal(size=(images, HEIGHT, WIDTH, CLASSES))


def images(seed):
    """Images [n, h, w, 3], float64."""
    return np.random.default_rng(seed).normal(size=(IMAGES, HEIGHT, WIDTH, 3))


def valid_pixels(seed):
    """False in some columns at the right of each image, bool [n, h, w]."""
    columns = np.random.default_rng(seed).integers(WIDTH - 5, WIDTH + 1, IMAGES)
    return np.broadcast_to(
        np.arange(WIDTH) < columns[:, None, None], (IMAGES, HEIGHT, WIDTH)
    ).copy()


def labels(seed, ignore=IGNORE):
    """True labels [n, h, w], a tenth ignored."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, CLASSES, (IMAGES, HEIGHT, WIDTH))
    return np.where(rng.random(ids.shape) < 0.1, ignore, ids)


def masks(seed):
    """One box for each image, bool [n, h, w]."""
    rng = np.random.default_rng(seed)
    mask = np.zeros((IMAGES, HEIGHT, WIDTH), bool)
    for image in mask:
        top, left = rng.integers(0, 6, 2)
        image[top : top + rng.integers(3, 7), left : left + rng.integers(3, 10)] = True
    return mask


def box_draws(size_index):
    """Uniform draws (aspect, vertical, horizontal) [n, 3], in the order of French's generator."""
    rng = np.random.RandomState(size_index)
    rng.uniform(0.5, 0.5, size=(BOXES_PER_SIZE, 1))  # the area, which is fixed
    aspect = rng.uniform(0, 1, size=(BOXES_PER_SIZE, 1))
    position = rng.uniform(0, 1, size=(BOXES_PER_SIZE, 1, 2))
    return np.concatenate([aspect, position[:, 0]], axis=1)


def network_values(seed):
    """The values of a network after one of its updates: weights [3, 2] and statistics [2]."""
    rng = np.random.default_rng(seed)
    return {"weight": rng.normal(size=(3, 2)), "mean": 100 + rng.normal(size=2)}


def teacher_classes():
    """Labels [n, h, w] of images that show 5, 4, 3 and 1 classes."""
    rng = np.random.default_rng(11)
    shown = ([0, 1, 2, 3, 4], [0, 2, 3, 4], [1, 2, 4], [3])
    return np.stack([rng.choice(classes, (HEIGHT, WIDTH)) for classes in shown])


# ---- features and logits of CCT and PseudoSeg


def _normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def _uniform(seed, *shape):
    return np.random.default_rng(seed).uniform(size=shape)


# Weights of a decoder with 3 input channels, 2 classes and 8 times the size: kernels [in, out].
DECODER_KERNELS = [_normal(10, 3, 2)] + [_normal(11 + i, 2, 8) for i in range(3)]
DECODER_BIASES = [_normal(20 + i, 8) for i in range(3)]
# CCT: features of 3 channels, and logits of 3 classes.
FEATURES = np.abs(_normal(1, 2, 3, 2, 3))  # [n, h, w, c]
START = _uniform(2, 2, 3, 2, 3) - 0.5
AUXILIARY_LOGITS = 3 * _normal(3, 2, 2, 5, 4, 3)  # of two decoders
MAIN_LOGITS = 3 * _normal(4, 2, 5, 4, 3)
LABELED_LOGITS = 3 * _normal(5, 2, 5, 4, 3)
LABELS_OF_THREE = np.random.default_rng(6).choice([0, 1, 2, IGNORE], (2, 5, 4))
# A step of the ramp of the weight, and the number of its steps.
RAMP_STEP, RAMP_LENGTH = 3, 10

# PseudoSeg: 4 classes with the background, a last layer of 5 channels and one of 3.
LAST = _normal(30, 2, 4, 3, 5)
MIDDLE = _normal(31, 2, 7, 5, 3)
CLASSIFIER_KERNEL = _normal(32, 5, 3)
PRESENT = np.array([[1, 0, 1], [1, 1, 0]], bool)
QUERY_KERNEL = _normal(33, 8, 128) / 8
KEY_KERNEL = _normal(34, 8, 128) / 8
CONV_KERNEL = _normal(35, 4, 4)
PADDED = np.ones((2, 4, 3), bool)
PADDED[0, 3] = PADDED[0, :, 2] = False
DECODER_LOGITS = 5 * _normal(36, 2, 4, 3, 4)
ATTENTION_LOGITS = _normal(37, 2, 4, 3, 4)
STRONG_LOGITS = _normal(38, 2, 4, 3, 4)
# The labelled images: last layers, logits of the decoder, labels.
LABELED_LAST = _normal(39, 2, 4, 3, 5)
LABELED_MIDDLE = _normal(40, 2, 7, 5, 3)
LABELED_DECODER_LOGITS = 5 * _normal(41, 2, 4, 3, 4)
LABELS_OF_FOUR = np.random.default_rng(42).choice([0, 1, 3, IGNORE], (2, 4, 3))
LABELS_OF_FOUR[1][LABELS_OF_FOUR[1] == 1] = 2
