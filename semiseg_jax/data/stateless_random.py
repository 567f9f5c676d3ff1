"""TensorFlow's stateless random draws, bit for bit, without TensorFlow.

The strong augmentation draws a few numbers for each image inside a Python function. TensorFlow's
operations would cost 20 µs a draw there. These functions return what `tf.random.stateless_uniform`,
`tf.random.experimental.stateless_split`, `stateless_fold_in` and `stateless_shuffle` return for the
same seed with alg="philox" (a test), so that seeds keep their meaning.

The generator is Philox 4x32 of ten rounds: Salmon et al., "Parallel Random Numbers: As Easy as 1,
2, 3", SC 2011, section 3.3. TensorFlow derives its key and half of its counter from the seed by one
block under a fixed key.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Float32, Int32, Int64, UInt64

# Two integers of 64 bits, signed or not.
Seed: TypeAlias = Sequence[int] | Int64[np.ndarray, "2"]

_WORD = 0xFFFFFFFF
_LONG = 0xFFFFFFFFFFFFFFFF
# The multipliers and the increments of the key, from the paper.
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_KEY_INCREMENTS = 0x9E3779B9, 0xBB67AE85
# Up to this number, Python's integers compute blocks faster than NumPy's arrays.
_FEW_BLOCKS = 12
# The key under which TensorFlow derives key and counter from a seed.
_SEED_KEY = 0x3EC8F720, 0x02461E29


def split(seed: Seed, count: int) -> list[Seed]:
    """Returns `count` independent seeds, as `stateless_split` of an int64 seed."""
    longs = _longs(seed, 2 * count)
    return list(zip(longs[::2], longs[1::2], strict=True))


def fold_in(seed: Seed, number: int) -> Seed:
    """Returns a seed that is a function of `seed` and an int64, as `stateless_fold_in`."""
    return _longs(seed, 1)[0], int(number)


def uniform(
    seed: Seed, shape: Sequence[int], low: float = 0, high: float = 1
) -> Float32[np.ndarray, "..."]:
    """Draws float32 values from low (included) to high (excluded), as `stateless_uniform`."""
    words = np.asarray(_words(seed, int(np.prod(shape))), np.uint32)
    # The 23 low bits are the mantissa of a number in [1, 2).
    ones = ((words & 0x7FFFFF) | 0x3F800000).view(np.float32) - np.float32(1)
    return (ones * (np.float32(high) - np.float32(low)) + np.float32(low)).reshape(shape)


def integers(seed: Seed, shape: Sequence[int], low: int, high: int) -> Int32[np.ndarray, "..."]:
    """Draws values from low..high, both included, as `stateless_uniform` of int32."""
    words = np.asarray(_words(seed, int(np.prod(shape))), np.int64)
    return (low + words % (high + 1 - low)).astype(np.int32).reshape(shape)


def shuffled(seed: Seed, count: int) -> Int32[np.ndarray, " count"]:
    """Returns 0..count - 1 in random order, as `stateless_shuffle` of tf.range(count)."""
    order = list(range(count))
    words = _words(seed, count)
    for i in range(count - 1):
        other = i + int(words[i]) % (count - i)
        order[i], order[other] = order[other], order[i]
    return np.array(order, np.int32)


def generator(seed: Seed) -> np.random.Generator:
    """Returns a generator for values of all pixels, which TensorFlow's algorithm draws too slowly.

    SFC64 is the fastest generator of NumPy: 2.0 ms for 2 bytes for each value of 769x769x3, and
    4.1 ms with Philox. Its methods do not hold Python's lock while they fill an array.
    """
    return np.random.Generator(np.random.SFC64([int(part) & _LONG for part in seed]))


def _longs(seed: Seed, count: int) -> list[int]:
    """Draws integers of 64 bits with a sign."""
    words = [int(word) for word in _words(seed, 2 * count)]
    longs = (low | high << 32 for low, high in zip(words[::2], words[1::2], strict=True))
    return [long - (long >> 63 << 64) for long in longs]


def _words(seed: Seed, count: int) -> Sequence[int] | UInt64[np.ndarray, " count"]:
    """Draws `count` integers of 32 bits."""
    first, second = (int(part) & _LONG for part in seed)
    *key, low, high = _block((first & _WORD, first >> 32, second & _WORD, second >> 32), _SEED_KEY)
    blocks = -(-count // 4)
    if blocks <= _FEW_BLOCKS:
        few: list[int] = []
        for number in range(blocks):
            few += _block((number, 0, low, high), key)
        return few[:count]
    words = _block((np.arange(blocks, dtype=np.uint64), 0, low, high), key)
    return np.stack(np.broadcast_arrays(*words), axis=1).ravel()[:count]


def _block(counter: Sequence[Any], key: Sequence[int]) -> tuple[Any, ...]:
    """Returns the four words of each block; the words of `counter` are int or uint64 [n]."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        first, second = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1 = (second >> 32) ^ c1 ^ k0, second & _WORD
        c2, c3 = (first >> 32) ^ c3 ^ k1, first & _WORD
        k0, k1 = (k0 + _KEY_INCREMENTS[0]) & _WORD, (k1 + _KEY_INCREMENTS[1]) & _WORD
    return c0, c1, c2, c3
