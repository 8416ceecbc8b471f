"""The charts: which there are, of one run and of several, with what is missing left out."""

from __future__ import annotations

import json

import numpy as np
import pytest

from sana_tune.progress import Progress
from sana_tune.watch.events import Measured, Started
from sana_tune.watch.journal import EventsSink
from sana_tune.watch.metrics import Metrics
from sana_tune.watch.report.charts import Chart, Series, charts_of
from sana_tune.watch.report.reading import Reader
from scripts.benchmark_report import run_folder, steps_of

EACH = ["lr", "grad-norm", "images-s", "step-s", "memory-bytes", "waiting"]
MEASURED = ["held_out", "held_out-loss", "held_out-sigma", "clip", "gap", "drift"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return Reader(run_folder(tmp_path_factory.mktemp("a") / "one", 3000, validations=4, side_px=8)).read()


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return Reader(run_folder(tmp_path_factory.mktemp("b") / "two", 500, seed=1, validations=2, side_px=8)).read()


def test_one_run_has_a_chart_for_all_that_is_known(run):
    charts = {chart.id: chart for chart in charts_of([run])}
    assert list(charts) == ["loss", "loss-bands", "loss-sigma", *MEASURED, *EACH]
    labels = [one.label for one in charts["loss"].series]
    assert labels == ["loss, each step", "loss, smoothed"] and len(charts["loss-bands"].series) == 5
    assert [one.label for one in charts["held_out"].series] == ["weights", "EMA"]
    assert charts["held_out"].series[0].low is not None and charts["held_out"].reference == (1.0, "base model")
    json.dumps([chart.to_json() for chart in charts.values()], allow_nan=False)


def test_curves_stay_small_and_keep_what_they_show(run):
    raw, smoothed = next(chart for chart in charts_of([run]) if chart.id == "loss").series
    loss = run.metrics.columns["loss"]
    assert len(raw.x) <= 802 and raw.y.max() == loss.max() and raw.x[-1] == 3000
    assert len(smoothed.x) <= 400 and smoothed.y.mean() == pytest.approx(loss.mean(), rel=0.01)
    size = len(json.dumps([chart.to_json() for chart in charts_of([run])]))
    assert size < 150_000


def test_the_loss_over_the_noise_level_is_the_mean_of_its_samples(tmp_path):
    metrics, steps = Metrics(tmp_path / "metrics.jsonl"), steps_of(50, batch=3)
    for step in steps:
        metrics.append(step)
    metrics.close()
    (late,) = [one for chart in charts_of([Reader(tmp_path).read()]) if chart.id == "loss-sigma"
               for one in chart.series if one.label == "last fifth"]  # fmt: skip
    pairs = [pair for step in steps[40:] for pair in step.by_sigma]
    for x, y in zip(late.x, late.y, strict=True):
        own = [loss for sigma, loss in pairs if int(sigma * 10) == int(x * 10)]
        assert own and y == pytest.approx(np.mean(own), rel=1e-4)


def test_runs_are_told_apart_by_colour_and_their_parts_by_dashes(run, other):
    charts = {chart.id: chart for chart in charts_of([run, other])}
    assert [(one.label, one.colour) for one in charts["loss"].series] == [("one, smoothed", 0), ("two, smoothed", 1)]
    found = [(one.label, one.colour, one.style) for one in charts["held_out"].series]
    assert found == [("one, weights", 0, "points"), ("two, weights", 1, "points"), ("one, EMA", 0, "dash"),
                     ("two, EMA", 1, "dash")]  # fmt: skip
    assert "loss-bands" not in charts and set(EACH) < set(charts)


def test_what_is_not_known_has_no_chart(tmp_path):
    assert charts_of([Reader(tmp_path).read()]) == []
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "loss": null, "lr": 1e-5}\n{"step": 2, "loss": null, "lr": 1e-5}\n'
    )
    (only,) = charts_of([Reader(tmp_path).read()])
    told = only.to_json()
    assert only.id == "lr" and told["low"] < told["high"]


def test_losses_by_role_are_two_curves(tmp_path):
    lines = ({"step": step, "loss": 1.0, "loss_train": 2.0, "loss_regularisation": 3.0} for step in range(1, 9))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (chart,) = charts_of([Reader(tmp_path).read()])
    assert [one.label for one in chart.series if one.style == "line"] == [
        "training, smoothed",
        "regularisation, smoothed",
    ]


def test_abandoned_measurements_are_not_drawn_and_unknown_ones_are(tmp_path):
    sink = EventsSink(tmp_path)
    told = (Started(Progress(), 9, 1.0), Measured(Progress(4), {"sharpness/raw": 9.0}), Started(Progress(2), 9, 1.0),
            Measured(Progress(3), {"sharpness/raw": 1.0}), Measured(Progress(4), {"sharpness/raw": 2.0}))  # fmt: skip
    for event in told:
        sink.emit(event)
    sink.close()
    (chart,) = charts_of([Reader(tmp_path).read()])
    assert chart.title == "Sharpness" and chart.series[0].y.tolist() == [1.0, 2.0]


def test_an_axis_is_logarithmic_where_values_spread_far():
    def axis(values: list[float], **looks) -> bool:
        y = np.array(values)
        return Chart("x", "X", (Series("x", y, y),), **looks).to_json()["log"]

    assert axis([1e-3, 1.0]) and not axis([0.5, 1.0]) and not axis([0.0, 1.0]) and not axis([1e-3, 1.0], zero=True)
    assert not axis([1.0, 1e9], format="bytes")
