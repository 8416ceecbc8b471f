"""Randomness from position: numbers and permutations that depend on a key and on nothing else. Pure, no torch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from sana_tune.data.records import digest


def unit_float(*parts: object) -> float:
    """A number in [0, 1) that depends on the parts and on nothing else (53 bits of `digest`)."""
    return (int(digest(*parts)[:16], 16) >> 11) / (1 << 53)


def permuted(place: int, size: int, key: tuple[object, ...]) -> int:
    """Where a pseudo-random permutation of 0 … size−1, chosen by `key`, puts `place`. Constant time and
    memory.

    A Feistel network permutes the next power of 4; walking its cycle until the value is below `size` makes
    that a permutation of the range asked for (Black and Rogaway, "Ciphers with Arbitrary Finite Domains",
    2002).
    """
    if size == 1:
        return 0
    half_bits = ((size - 1).bit_length() + 1) // 2
    keys = _round_keys(key)
    while True:
        place = _feistel(place, half_bits, keys)
        if place < size:
            return place


_ROUNDS = 8
_WORD = (1 << 64) - 1


def _feistel(value: int, half_bits: int, keys: Sequence[int]) -> int:
    """A permutation of 0 … 4^half_bits − 1."""
    mask = (1 << half_bits) - 1
    left, right = value >> half_bits, value & mask
    for key in keys:
        mixed = ((right ^ key) * 0x9E3779B97F4A7C15) & _WORD
        mixed ^= mixed >> 32
        left, right = right, left ^ ((mixed * 0xD6E8FEB86659FD93 & _WORD) >> 40) & mask
    return left << half_bits | right


@lru_cache(maxsize=1024)
def _round_keys(key: tuple[object, ...]) -> tuple[int, ...]:
    """The Feistel network's 64-bit round keys."""
    hashed = "".join(digest(*key, half) for half in range(_ROUNDS // 2))
    return tuple(int(hashed[16 * i : 16 * i + 16], 16) for i in range(_ROUNDS))
