"""Counter-based randomness: hashes, uniform numbers and permutations as pure functions of integer keys."""

from __future__ import annotations

from functools import lru_cache
from itertools import takewhile

import numpy as np
from numpy.typing import NDArray

UInt64 = NDArray[np.uint64]
Int64 = NDArray[np.int64]

# Streams of randomness. They are part of every key, so that different uses of a seed are independent.
STREAM_BLOCKS, STREAM_WINDOW, STREAM_CROP, STREAM_MASK, STREAM_PROBE, STREAM_REPLACEMENT = range(1, 7)

_FEISTEL_ROUNDS = 8
_MIN_FEISTEL_BITS = 6


def mix64(x: UInt64) -> UInt64:
    """Finaliser of splitmix64 (Steele et al. 2014): a bijection of 64-bit words in which every input bit avalanches."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hash64(*parts: int | NDArray[np.integer]) -> UInt64:
    """Hash integers, broadcasting over arrays; at least 1-D. The order of the parts matters."""
    ints = tuple(int(part) for part in takewhile(lambda part: isinstance(part, int), parts))
    state = _hash_of_ints(ints)
    for part in parts[len(ints) :]:
        state = _absorb(state, part)
    return state


@lru_cache(maxsize=4096)
def _hash_of_ints(parts: tuple[int, ...]) -> UInt64:
    """Hash of the leading integers, (1,).

    It is cached, because nearly all hashes start with the same few keys, and a NumPy call costs as much for one number
    as for many.
    """
    state = np.full(1, 0x9E3779B97F4A7C15, np.uint64)
    for part in parts:
        state = _absorb(state, part)
    state.flags.writeable = False
    return state


def _absorb(state: UInt64, part: int | NDArray[np.integer]) -> UInt64:
    word = np.atleast_1d(np.asarray(part)).astype(np.uint64)
    return mix64((state + np.uint64(0x9E3779B97F4A7C15)) ^ mix64(word + np.uint64(0xD1B54A32D192ED03)))


def uniform(*parts: int | NDArray[np.integer]) -> NDArray[np.float64]:
    """Counter-based uniform numbers in [0, 1) with 53 bits, one for each broadcast combination of the parts."""
    return (hash64(*parts) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permute(x: NDArray[np.integer], size: int, key: int, *, inverse: bool = False) -> Int64:
    """Apply a keyed pseudo-random permutation of [0, size), or its inverse, to positions x. Needs O(1) memory.

    This is a Feistel network over the next power of two with cycle walking: outputs outside the range are permuted
    again.
    """
    bits = max((size - 1).bit_length(), _MIN_FEISTEL_BITS)
    out = np.asarray(x).astype(np.uint64)
    todo = np.ones(out.shape, bool)
    while todo.any():
        out[todo] = _feistel(out[todo], bits, key, inverse)
        todo = out >= size
    return out.astype(np.int64)


def _feistel(x: UInt64, bits: int, key: int, inverse: bool) -> UInt64:
    """Permute words of `bits` bits by rounds (l, r) → (r, l ⊕ F_i(r)). The halves may differ by one bit."""
    a, b = bits // 2, bits - bits // 2  # widths of the halves, which swap each round; the number of rounds is even
    left, right = x >> np.uint64(b), x & np.uint64((1 << b) - 1)
    for i in reversed(range(_FEISTEL_ROUNDS)) if inverse else range(_FEISTEL_ROUNDS):
        if inverse:
            left, right, a, b = right ^ (hash64(key, i, left) >> np.uint64(64 - b)), left, b, a
        else:
            left, right, a, b = right, left ^ (hash64(key, i, right) >> np.uint64(64 - a)), b, a
    return (left << np.uint64(b)) | right


def int_key(*parts: int) -> int:
    """Hash of integers as one Python integer, for use as a key."""
    return int(hash64(*parts)[0])
