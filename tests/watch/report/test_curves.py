"""Curves: smoothed, thinned without losing a peak, rounded."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sana_tune.watch.report.curves import half_window, numbers, sampled, shown_range, smooth, thin

NAN = float("nan")
VALUES = st.lists(st.one_of(st.floats(-1e6, 1e6), st.just(NAN)), min_size=1, max_size=60)


@settings(deadline=None)
@given(VALUES, st.integers(0, 20))
def test_smoothing_is_the_mean_of_the_neighbours_that_are_numbers(values, half):
    found = smooth(np.array(values), half)
    for place in range(len(values)):
        own = [value for value in values[max(0, place - half) : place + half + 1] if np.isfinite(value)]
        assert (found[place] == pytest.approx(np.mean(own), abs=1e-6)) if own else np.isnan(found[place])


@settings(deadline=None)
@given(VALUES, st.integers(2, 30))
def test_thinning_keeps_ends_peaks_and_order(values, most):
    x, y = np.arange(len(values), dtype=float), np.array(values)
    thin_x, thin_y = thin(x, y, most)
    assert len(thin_x) <= max(most + 2, 3) or len(values) <= most
    assert thin_x[0] == x[0] and thin_x[-1] == x[-1] and (np.diff(thin_x) > 0).all()
    if np.isfinite(y).any():
        assert np.nanmin(thin_y) == np.nanmin(y) and np.nanmax(thin_y) == np.nanmax(y)


def test_a_gap_stays_a_gap():
    y = np.ones(1000)
    y[300:400] = NAN
    x, thinned = thin(np.arange(1000.0), y, 20)
    gaps = x[np.isnan(thinned)]
    assert len(x) <= 24 and len(gaps) and (gaps >= 300).all() and (gaps < 400).all()


def test_samples_are_even_and_keep_the_ends():
    x, y = sampled(np.arange(1001.0), np.arange(1001.0) ** 2, 11)
    assert x.tolist() == list(range(0, 1001, 100)) and (y == x**2).all()


def test_single_peaks_do_not_press_everything_flat():
    rough = np.ones(1000)
    rough[::2], rough[500] = 2.0, 1e6
    assert shown_range([(rough, True)]) == (1.0, 2.0)
    assert shown_range([(rough, False)]) == (1.0, 1e6)
    assert shown_range([(np.array([NAN]), True)]) is None
    assert half_window(10_000) == 100 and half_window(3) == 2


def test_numbers_are_as_json_takes_them():
    assert numbers(np.array([1.0, 0.123456, 1e-7, NAN, np.inf, 123456.0])) == [1, 0.1235, 1e-7, None, None, 123456]
