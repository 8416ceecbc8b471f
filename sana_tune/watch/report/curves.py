"""Long curves as few points: smoothed, thinned without losing a peak, rounded. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

POINTS = 400  # of a curve, about as many as a screen shows side by side


def smooth(values: np.ndarray, half: int) -> np.ndarray:
    """The mean of each value and its `half` neighbours on both sides, fewer at the ends; NaN counts for nothing."""
    there = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(there, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(there)])
    places = np.arange(len(values))
    low, high = np.maximum(places - half, 0), np.minimum(places + half + 1, len(values))
    count = counts[high] - counts[low]
    return np.where(count > 0, (sums[high] - sums[low]) / np.maximum(count, 1), np.nan)


def thin(x: np.ndarray, y: np.ndarray, most: int = 2 * POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most about `most` points that look the same: the lowest and the highest of each stretch, in their order.

    A stretch without any number becomes one NaN, a gap; the first and the last point stay.
    """
    if len(x) <= most:
        return x, y
    edges = np.linspace(0, len(x), max(1, most // 2) + 1).astype(int)
    kept = {0, len(x) - 1}
    for begin, end in pairwise(edges.tolist()):
        part = y[begin:end]
        there = np.flatnonzero(np.isfinite(part))
        if not len(there):
            kept.add(begin)
            continue
        own = part[there]
        kept.update((int(begin + there[own.argmin()]), int(begin + there[own.argmax()])))
    places = np.array(sorted(kept))
    return x[places], y[places]


def sampled(x: np.ndarray, y: np.ndarray, most: int = POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most so many points, evenly; for curves that are smooth already. The first and the last one stay."""
    if len(x) <= most:
        return x, y
    places = np.unique(np.linspace(0, len(x) - 1, most).round().astype(int))
    return x[places], y[places]


def half_window(count: int) -> int:
    """How many steps on both sides a curve of so many is smoothed over: a fiftieth of it in all, at least five."""
    return max(2, count // 100)


def shown_range(curves: Sequence[tuple[np.ndarray, bool]]) -> tuple[float, float] | None:
    """From where to where an axis goes: (values, whether they are rough) of each curve. None when there are none.

    Of rough ones single peaks are left out: they would press everything else flat.
    """
    lows, highs = [], []
    for values, rough in curves:
        own = values[np.isfinite(values)]
        if len(own):
            low, high = np.quantile(own, (0.005, 0.995)) if rough and len(own) >= 50 else (own.min(), own.max())
            lows.append(float(low))
            highs.append(float(high))
    return (min(lows), max(highs)) if lows else None


def numbers(values: np.ndarray, digits: int = 4) -> list[float | int | None]:
    """As JSON takes them: so many significant digits, whole numbers as such, None for what is not finite."""
    found: list[float | int | None] = []
    for value in values.tolist():
        if not math.isfinite(value):
            found.append(None)
        elif float(value).is_integer() and abs(value) < 1e15:
            found.append(int(value))
        else:
            found.append(float(f"{value:.{digits}g}"))
    return found
