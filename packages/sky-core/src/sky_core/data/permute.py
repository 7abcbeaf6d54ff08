"""A shuffle without a table: a keyed permutation of 0 .. n-1 that computes where item i goes, in O(1) memory.

Luby & Rackoff 1988, "How to construct pseudorandom permutations from pseudorandom functions": a Feistel network

    (L, R)  ->  (R, L xor f_round(R))

is a bijection whatever f is, since R stands in the output and gives back L; a few rounds with a pseudorandom f look
random. It permutes 2^bits numbers; Black & Rogaway 2002, "Ciphers with arbitrary finite domains", bring it to n by
cycle walking: apply it again until the result is below n. With 2^bits < 2n that takes fewer than two rounds on average.

The halves may differ by one bit, so that the domain is never more than twice n; they then swap widths every round.
This is for shuffling, not for secrets: f is the finaliser of SplitMix64 (Steele et al. 2014) over half, key and round.

Why it matters here: sequence i of a training run is a pure function of (seed, i), so the whole state of a data
reader is one integer, and any number of processes can read disjoint parts of the same order.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from itertools import pairwise

import numpy as np

ROUNDS = 12
"""Four suffice on large domains (Luby & Rackoff); below some hundred items a chi-squared test sees 4, 6, even 8."""

_BLOCK = 4096


class Permutation:
    """A permutation of 0 .. n-1 chosen by the integers `key` (a seed, an epoch): call it with the items to move."""

    def __init__(self, n: int, *key: int) -> None:
        self.n = n
        bits = max(2, (n - 1).bit_length())
        self._widths = (np.uint64(bits - bits // 2), np.uint64(bits // 2))
        digest = hashlib.shake_128(repr((n, *key)).encode()).digest(8 * ROUNDS)
        self._round_keys = np.frombuffer(digest, dtype="<u8").astype(np.uint64)

    def __call__(self, items: np.ndarray) -> np.ndarray:
        """Where each of `items` goes; integers in 0 .. n-1 of any shape, returned as int64 of that shape."""
        items = np.asarray(items)
        moved = self._feistel(items.astype(np.uint64).ravel())
        walking = np.flatnonzero(moved >= self.n)
        while walking.size:
            moved[walking] = self._feistel(moved[walking])
            walking = walking[moved[walking] >= self.n]
        return moved.astype(np.int64).reshape(items.shape)

    def _feistel(self, x: np.ndarray) -> np.ndarray:
        left_width, right_width = self._widths
        left, right = x >> right_width, x & _mask(right_width)
        for key in self._round_keys:
            left, right = right, left ^ (_mix(right ^ key) & _mask(left_width))
            left_width, right_width = right_width, left_width
        return (left << right_width) | right


def _mask(width: np.uint64) -> np.uint64:
    return (np.uint64(1) << width) - np.uint64(1)


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser: every input bit changes every output bit with probability about one half."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Shuffle:
    """An endless stream over n items: epoch after epoch, each a permutation of its own.

    Position i of the stream is in epoch i // n. Nothing is remembered but a few blocks of the order, for speed: small
    calls to numpy would otherwise cost more than reading the tokens.
    """

    def __init__(self, n: int, seed: int) -> None:
        self.n = n
        self.seed = seed
        self._block = lru_cache(maxsize=8)(self._compute_block)

    def __call__(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(epoch, item) of the positions start .. start + count - 1, two int64 arrays of length `count`."""
        borders = [start]
        while borders[-1] < start + count:
            epoch, within = divmod(borders[-1], self.n)
            block_end = min((within // _BLOCK + 1) * _BLOCK, self.n)
            borders.append(min(epoch * self.n + block_end, start + count))
        epochs = np.arange(start, start + count, dtype=np.int64) // self.n
        items = np.empty(count, dtype=np.int64)
        for low, high in pairwise(borders):
            epoch, within = divmod(low, self.n)
            first = within % _BLOCK
            items[low - start : high - start] = self._block(epoch, within // _BLOCK)[first : first + high - low]
        return epochs, items

    def _compute_block(self, epoch: int, block: int) -> np.ndarray:
        low = block * _BLOCK
        return Permutation(self.n, self.seed, epoch)(np.arange(low, min(low + _BLOCK, self.n)))


def draw(n: int, *key: int) -> int:
    """A number in 0 .. n-1 that is a function of `key` alone."""
    digest = hashlib.blake2b(repr((n, *key)).encode(), digest_size=16).digest()
    return int.from_bytes(digest, "big") % n
