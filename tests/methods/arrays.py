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
