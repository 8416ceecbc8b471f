"""The report's charts as plain values: which curves, over what, in which unit. The page's script draws them.

Of one run, colours tell curves apart; of several, colours are the runs and dashes tell curves apart.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sana_tune.watch.metrics import SIGMA_BINS
from sana_tune.watch.report.curves import POINTS, half_window, numbers, sampled, shown_range, smooth, thin
from sana_tune.watch.report.reading import Run

_LOG_FROM = 50.0  # an axis is logarithmic where its values spread by more than this factor
_BANDS = 5  # of noise levels, in the chart over steps
_FIRST_WORDS = {"held_out": "Held-out loss", "trained": "Loss of trained pictures", "gap": "Overfitting gap",
                "clip": "CLIP score", "drift": "Drift from the base model"}  # fmt: skip
_NOTES = {
    "held_out": "Of pictures that are never trained, beside the base model's: below 1 is better than the base model. "
    "Shaded: one standard error.",
    "trained": "Of trained pictures, measured as the held-out ones are.",
    "gap": "How much more the trained pictures gained than the held-out ones, in shares of the base model's loss.",
    "clip": "How well the validation pictures fit their prompts; higher is better.",
    "drift": "How far a fixed set of predictions is from the base model's, in shares of their length.",
}
_ONE = frozenset({"held_out", "trained"})  # compared with the base model, which is 1


@dataclass(frozen=True)
class Series:
    """One curve. style: line, raw (faint, behind its smoothed one), dash, or points (a line with its points).

    colour: 0 to 7; ramp: 0 to 1 in place of it, of curves that have an order. low, high: a shaded band.
    """

    label: str
    x: np.ndarray
    y: np.ndarray
    colour: int = 0
    style: str = "line"
    ramp: float | None = None
    low: np.ndarray | None = None
    high: np.ndarray | None = None

    def to_json(self) -> dict[str, Any]:
        told: dict[str, Any] = {"label": self.label, "x": numbers(self.x, 6), "y": numbers(self.y), "style": self.style}
        told |= {"colour": self.colour} if self.ramp is None else {"ramp": round(self.ramp, 3)}
        if self.low is not None and self.high is not None:
            told |= {"low": numbers(self.low), "high": numbers(self.high)}
        return told


@dataclass(frozen=True)
class Chart:
    """One chart. format: number, percent, bytes, seconds or small (of tiny numbers). x: name of its axis.

    zero: whether the axis begins at 0. reference: a level that is marked, with its name. wide: whether it takes the
    whole width. limits: what the axis shows; None = all.
    """

    id: str
    title: str
    series: tuple[Series, ...]
    note: str = ""
    unit: str = ""
    format: str = "number"
    x: str = "step"
    zero: bool = False
    wide: bool = False
    reference: tuple[float, str] | None = None
    limits: tuple[float, float] | None = field(default=None)

    def to_json(self) -> dict[str, Any]:
        low, high = self.limits or self._range()
        log = self.format in ("number", "small") and not self.zero and low > 0 and high / low > _LOG_FROM
        return {
            "id": self.id, "title": self.title, "unit": self.unit, "format": self.format, "x": self.x,
            "low": low, "high": high, "log": log,
            "reference": {"y": self.reference[0], "label": self.reference[1]} if self.reference else None,
            "series": [one.to_json() for one in self.series],
        }  # fmt: skip

    def _range(self) -> tuple[float, float]:
        curves = [(values, one.style == "raw") for one in self.series for values in (one.y, one.low, one.high)
                  if values is not None]  # fmt: skip
        low, high = shown_range(curves) or (0.0, 1.0)
        if self.reference is not None:
            low, high = min(low, self.reference[0]), max(high, self.reference[0])
        if self.zero:
            low = min(low, 0.0)
        return (low, high) if high > low else (low - abs(low) / 2 - 1e-9, high + abs(high) / 2 + 1e-9)


def charts_of(runs: Sequence[Run]) -> list[Chart]:
    """Every chart that there are numbers for."""
    found = [loss(runs), *noise_levels(runs), *measured(runs), *pace(runs)]
    return [chart for chart in found if chart.series]


# ---- of every step ----


def loss(runs: Sequence[Run]) -> Chart:
    """The loss of each step and its mean over some of them; by role where there is regularisation data."""
    series: list[Series] = []
    for number, run in enumerate(runs):
        x, half = run.metrics.columns["step"], half_window(run.metrics.count)
        parts = {"loss": "loss"}
        if run.metrics.has("loss_regularisation"):
            parts = {"loss_train": "training", "loss_regularisation": "regularisation"}
        for place, (column, word) in enumerate(parts.items()):
            y = run.metrics.columns[column]
            if not np.isfinite(y).any():
                continue
            colour = number if len(runs) > 1 else place
            name = _of(run, runs, word if len(parts) > 1 or len(runs) == 1 else "")
            if len(runs) == 1:
                series.append(Series(f"{name}, each step", *thin(x, y), colour, "raw"))
            style = "dash" if len(runs) > 1 and place else "line"
            series.append(Series(_joined(name, "smoothed"), *sampled(x, smooth(y, half)), colour, style))
    most = max((half_window(run.metrics.count) for run in runs), default=0)
    note = (
        f"Smoothed: the mean of {2 * most + 1} steps. The loss depends above all on the noise levels that a step "
        "happens to draw, so look at the smoothed curve, and at the held-out loss where there is one."
    )
    return Chart("loss", "Training loss", tuple(series), note, wide=True)


def noise_levels(runs: Sequence[Run]) -> Iterable[Chart]:
    """The loss by noise level: over steps in bands (of one run), and over the noise level early and late."""
    if len(runs) == 1 and len(runs[0].metrics.levels):
        levels, steps = runs[0].metrics.levels, runs[0].metrics.columns["step"]
        width = SIGMA_BINS // _BANDS
        found = []
        for band in range(_BANDS):
            own = levels[(levels[:, 1] // width) == band]
            if len(own) < 2:
                continue
            half = 3 * half_window(len(own))  # a band has few samples of each step
            mean = smooth(own[:, 2] * own[:, 3], half) / smooth(own[:, 2], half)
            x, y = sampled(steps[own[:, 0].astype(int)], mean)
            low, high = band / _BANDS, (band + 1) / _BANDS
            found.append(Series(f"σ {low:.1f} to {high:.1f}", x, y, ramp=band / (_BANDS - 1)))
        note = "Each band of noise levels σ by itself, smoothed: σ near 0 is hardly any noise, near 1 is noise alone."
        yield Chart("loss-bands", "Loss by noise level", tuple(found), note)
    profiles: list[Series] = []
    for number, run in enumerate(runs):
        for word, begin, end in (("first fifth", 0.0, 0.2), ("last fifth", 0.8, 1.0)):
            if len(runs) > 1 and word == "first fifth":
                continue
            x, y = _profile(run, begin, end)
            if len(x):
                colour = number if len(runs) > 1 else int(word == "last fifth")
                profiles.append(Series(_of(run, runs, word), x, y, colour, "points"))
    note = "The mean loss at each noise level over a part of the steps" + (
        "." if len(runs) == 1 else ": the last fifth of each run."
    )
    yield Chart("loss-sigma", "Loss over noise level", tuple(profiles), note, x="σ", zero=True)


def _profile(run: Run, begin: float, end: float) -> tuple[np.ndarray, np.ndarray]:
    """Centres of the bins of noise levels, and the mean loss in each over a part of the run."""
    levels, count = run.metrics.levels, run.metrics.count
    own = levels[(levels[:, 0] >= begin * count) & (levels[:, 0] < max(end * count, 1))]
    bins = own[:, 1].astype(int)
    sums = np.bincount(bins, own[:, 2] * own[:, 3], SIGMA_BINS)
    counts = np.bincount(bins, own[:, 2], SIGMA_BINS)
    there = np.flatnonzero(counts)
    return (there + 0.5) / SIGMA_BINS, sums[there] / counts[there]


def pace(runs: Sequence[Run]) -> Iterable[Chart]:
    """Learning rate, gradient norm, speed, memory and waiting."""
    yield _over_steps(runs, "lr", "Learning rate", format="small", rough=False, zero=True)
    note = "Before clipping, each step and smoothed."
    yield _over_steps(runs, "grad_norm", "Gradient norm", note=note, format="small")
    yield _over_steps(runs, "images_s", "Throughput", unit="pictures a second", zero=True)
    yield _over_steps(runs, "step_s", "Time of a step", unit="seconds", format="seconds", zero=True)
    note = "The most that was in use so far; a CPU's is the process's share of main memory."
    yield _over_steps(runs, "memory_bytes", "Memory", note=note, format="bytes", rough=False, zero=True)

    def waiting(run: Run) -> np.ndarray:
        columns = run.metrics.columns
        there = columns["step_s"] > 0
        return np.where(there, columns["data_wait_s"] / np.where(there, columns["step_s"], 1.0), np.nan)

    note = "The share of a step in which the next pictures were not there yet."
    yield _over_steps(runs, waiting, "Waiting for data", note=note, format="percent", zero=True, id="waiting")


def _over_steps(
    runs: Sequence[Run],
    column: str | Callable[[Run], np.ndarray],
    title: str,
    *,
    rough: bool = True,
    id: str = "",
    **looks: Any,
) -> Chart:
    """A number of each step. rough: it jumps, so that its smoothed curve stands before it."""
    series: list[Series] = []
    for number, run in enumerate(runs):
        x = run.metrics.columns["step"]
        y = run.metrics.columns[column] if isinstance(column, str) else column(run)
        if not np.isfinite(y).any():
            continue
        name = _of(run, runs, "")
        if not rough:
            series.append(Series(name or title.lower(), *thin(x, y), number))
            continue
        if len(runs) == 1:
            series.append(Series("each step", *thin(x, y, POINTS // 2), number, "raw"))
        smoothed = smooth(y, half_window(run.metrics.count))
        series.append(Series(name or "smoothed", *sampled(x, smoothed, POINTS // 2), number))
    return Chart(id or str(column).replace("_", "-"), title, tuple(series), **looks)


# ---- of what was measured now and then ----


def measured(runs: Sequence[Run]) -> Iterable[Chart]:
    """Everything that Measured events tell: a chart for each first word, and one over noise levels where told so."""
    names = dict.fromkeys(name for run in runs for line in run.of("measured") for name in _values(line))
    order = ("held_out", "clip", "gap", "trained", "drift")
    firsts = sorted({name.split("/")[0] for name in names}, key=lambda first: (first not in order, first))
    for first in sorted(firsts, key=lambda first: order.index(first) if first in order else len(order)):
        own = [name for name in names if name.split("/")[0] == first]
        plain = [name for name in own if not _LEVEL.search(name) and name.rpartition("/")[2] not in ("se", "loss")]
        top = [name for name in plain if name.count("/") < 2] or plain
        title = _FIRST_WORDS.get(first, first.replace("_", " ").capitalize())
        one = (1.0, "base model") if first in _ONE else (0.0, "no gap") if first == "gap" else None
        looks: dict[str, Any] = {"note": _NOTES.get(first, ""), "reference": one}
        if first in ("gap", "drift"):
            looks["format"] = "percent"
        yield Chart(first, title, tuple(_tracks(runs, top)), **looks)
        parts = [name for name in plain if name not in top]
        if first == "clip" and len(runs) == 1 and parts:
            yield Chart("clip-prompts", "CLIP score by prompt", tuple(_tracks(runs, parts[:8])))
        elif parts:
            yield Chart(f"{first}-parts", f"{title} by part", tuple(_tracks(runs, parts[:8])), reference=one)
        if first == "trained":  # stands beside the gap; the rest of it would say the same again
            continue
        if losses := [name for name in own if name.endswith("/loss") and name.count("/") == 2]:
            yield Chart(f"{first}-loss", f"{title}, absolute", tuple(_tracks(runs, losses, drop="/loss")))
        if levels := [name for name in own if _LEVEL.search(name) and name.count("/") == 2]:
            looks |= {"note": "The newest measurement at each noise level.", "x": "σ"}
            yield Chart(f"{first}-sigma", f"{title} over noise level", tuple(_over_levels(runs, levels)), **looks)


_LEVEL = re.compile(r"/sigma_([0-9.]+)$")


def _tracks(runs: Sequence[Run], names: Sequence[str], drop: str = "") -> Iterable[Series]:
    """Named numbers over steps, with their standard errors as bands."""
    for place, name in enumerate(names):
        for number, run in enumerate(runs):
            points = {line["step"]: _values(line) for line in run.of("measured") if name in _values(line)}
            if not points:
                continue
            x = np.array(list(points), float)
            y = np.array([values[name] for values in points.values()])
            error = np.array([values.get(f"{name}/se", np.nan) for values in points.values()])
            shaded = np.isfinite(error).any() and len(names) <= 2  # more of them hide each other
            band: dict[str, Any] = {"low": y - error, "high": y + error} if shaded else {}
            label = _of(run, runs, _word(name.removesuffix(drop)))
            if len(runs) == 1:
                yield Series(label, x, y, place, "points", **band)
            else:
                yield Series(label, x, y, number, "dash" if place else "points", **(band if not place else {}))


def _over_levels(runs: Sequence[Run], names: Sequence[str]) -> Iterable[Series]:
    """The newest numbers over the noise level, a curve for each view."""
    views = dict.fromkeys(_LEVEL.sub("", name) for name in names)
    for place, view in enumerate(views):
        for number, run in enumerate(runs):
            lines = [line for line in run.of("measured") if any(name.startswith(view + "/") for name in _values(line))]
            if not lines:
                continue
            found = {
                float(match[1]): value
                for name, value in _values(lines[-1]).items()
                if (match := _LEVEL.search(name)) and _LEVEL.sub("", name) == view
            }
            x = np.array(sorted(found))
            colour, style = (place, "points") if len(runs) == 1 else (number, "dash" if place else "points")
            label = f"{_of(run, runs, _word(view))}, step {lines[-1]['step']:,}"
            yield Series(label, x, np.array([found[level] for level in x.tolist()]), colour, style)


def _values(line: Mapping[str, Any]) -> dict[str, float]:
    values = line.get("values")
    found = values.items() if isinstance(values, dict) else ()
    return {name: float(value) for name, value in found if isinstance(value, (int, float))}


def _word(name: str) -> str:
    """What a named number is called beside others of its chart."""
    first, _, rest = name.partition("/")
    words = {"raw": "weights", "ema": "EMA"}
    return " ".join(words.get(part, part) for part in rest.split("/")) if rest else first.replace("_", " ")


def _of(run: Run, runs: Sequence[Run], word: str) -> str:
    return word if len(runs) == 1 else _joined(run.name, word)


def _joined(name: str, word: str) -> str:
    return ", ".join(part for part in (name, word) if part)
