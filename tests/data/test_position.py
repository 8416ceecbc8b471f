"""Numbers and permutations from position: uniform, complete, pinned."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from math import factorial

from hypothesis import given, settings
from hypothesis import strategies as st

from sana_tune.data.position import permuted, unit_float


@settings(max_examples=200)
@given(st.integers(1, 300), st.integers(0, 2**64))
def test_permutations_permute(size: int, seed: int):
    assert sorted(permuted(place, size, (seed,)) for place in range(size)) == list(range(size))


def test_small_permutations_are_all_about_equally_likely():
    for size, draws in ((2, 2000), (3, 3000), (4, 6000)):
        found = Counter(tuple(permuted(p, size, (seed,)) for p in range(size)) for seed in range(draws))
        expected = draws / factorial(size)
        assert len(found) == factorial(size)
        chi2 = sum((n - expected) ** 2 / expected for n in found.values())
        assert chi2 < factorial(size) + 5 * (2 * factorial(size)) ** 0.5


def test_large_permutations_scatter():
    size = 10**12
    drawn = [permuted(place, size, ("x",)) / size for place in range(2000)]
    assert len(set(drawn)) == 2000
    assert abs(sum(drawn) / 2000 - 0.5) < 0.03
    assert abs(sum(a * b for a, b in pairwise(drawn)) / 1999 - 0.25) < 0.03


def test_unit_floats_are_uniform_and_pinned():
    drawn = [unit_float("x", i) for i in range(4000)]
    assert all(0 <= x < 1 for x in drawn)
    for k in range(10):
        assert abs(sum(k / 10 <= x < (k + 1) / 10 for x in drawn) - 400) < 100
    assert unit_float(1, "x") != unit_float("1x") != unit_float("1", "x")
    assert unit_float(42, "caption", 3, 0, 1) == 0.6532481836591935
