"""The report in a real browser: every chart and picture, no complaint, the keyboard, a phone, the dark.

Where there is no Chromium these tests are skipped (.ci/run installs one where it may).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from sana_tune.data.images import shrunk
from sana_tune.watch.report.page import Reporter
from scripts import browser
from scripts.benchmark_report import run_folder
from tests.watch.report.hostile import EVIL, hostile_run

STEPS = 10_000
pytestmark = pytest.mark.skipif(browser.find() is None, reason="no Chromium on this machine")


@pytest.fixture(scope="module")
def page() -> Iterator[browser.Browser]:
    with browser.Browser(browser.find() or "") as opened:
        yield opened


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Path]:
    root = tmp_path_factory.mktemp("runs")
    long = run_folder(root / "long", STEPS, validations=4, side_px=48)
    return [long, run_folder(root / "short", 4000, seed=1, validations=2, side_px=48, changes={"seed": 1})]


@pytest.fixture(scope="module")
def report(runs) -> Path:
    Reporter(runs[:1], shrunk).write(runs[0] / "report.html")
    return runs[0] / "report.html"


def check_all_is_drawn(page: browser.Browser, path: Path) -> None:
    """Every chart has its curves, every picture is there, nothing was complained of and nothing asked for."""
    found = page.evaluate("""JSON.parse(document.getElementById('report-data').textContent).charts.map(chart => {
        const figure = document.getElementById('chart-' + chart.id);
        const box = figure.querySelector('svg').getBoundingClientRect();
        const paths = [...figure.querySelectorAll('.curve')].filter(curve => curve.getTotalLength() > 20);
        return [chart.id, chart.series.length, paths.length, box.width > 200 && box.height > 150,
                figure.querySelectorAll('text').length, figure.querySelector('.plot').getAttribute('aria-label')];
    })""")
    assert len(found) >= 10
    for name, series, curves, has_room, texts, label in found:
        assert series == curves and has_room and texts >= 5 and "from" in label, name
    pictures = page.evaluate("""Promise.all([...document.images].map(image => {
        image.loading = 'eager';
        const width = image.getBoundingClientRect().width;
        return image.decode().then(() => image.naturalWidth > 0 && width > 10 && image.alt !== '');
    }))""")
    assert len(pictures) >= 9 + 4 + 5 and all(pictures)
    assert page.problems == [] and page.asked_for == [path.resolve().as_uri()]


def test_every_chart_and_picture_of_a_long_run_is_there(page, report):
    page.open(report)
    check_all_is_drawn(page, report)
    assert page.first_paint_ms() > 0  # how long it takes is measured: scripts/benchmark.py --only report
    assert page.evaluate("[...document.querySelectorAll('input, select')].every(each => each.labels.length === 1)")


def test_runs_beside_each_other_are_all_there(page, runs):
    path = runs[0] / "compared.html"
    Reporter(runs, shrunk).write(path)
    page.open(path)
    check_all_is_drawn(page, path)
    assert page.evaluate("document.querySelectorAll('#timeline .runname').length") == 2 * 3


def test_all_can_be_read_with_the_keyboard(page, report):
    page.open(report)
    page.press("Tab", 9)
    assert page.evaluate("document.activeElement.textContent") == "Skip to the curves"
    stops = "[...document.querySelectorAll('a, button, .plot, select, input, summary, .strip')]"
    assert page.evaluate(f"{stops}.every(each => each.tabIndex >= 0)")
    page.evaluate("document.querySelector('#chart-loss .plot').focus()")
    page.press("End", 35)
    page.press("ArrowLeft", 37)
    said = page.evaluate("document.getElementById('spoken').textContent")
    assert said.startswith("step 9,") and "loss, smoothed 0." in said
    assert page.evaluate("document.querySelector('#chart-loss .tip').getBoundingClientRect().width") > 50
    page.press("Escape", 27)
    assert page.evaluate("document.querySelector('#chart-loss .tip')") is None
    page.evaluate("document.querySelector('#chart-loss .legend button').focus()")
    page.press(" ", 32)
    assert page.evaluate("document.querySelectorAll('#chart-loss .curve').length") == 1
    page.evaluate("document.getElementById('step').focus()")
    before = page.evaluate("document.querySelectorAll('#timeline img')[1].src")
    page.press("ArrowLeft", 37)
    assert page.evaluate("document.getElementById('step-now').textContent") == "7,500"
    assert page.evaluate("document.querySelectorAll('#timeline img')[1].src") != before
    page.press("Home", 36)
    assert page.evaluate("document.querySelectorAll('#timeline .none').length") == 2 * 3
    page.evaluate("document.getElementById('step-on').click()")
    page.evaluate("{const c = document.getElementById('prompt'); c.value = '1'; c.dispatchEvent(new Event('change'))}")
    assert page.evaluate("[...document.querySelectorAll('#timeline h3')].map(e => e.firstChild.textContent)") == [
        "harbour "
    ]
    assert page.evaluate("document.querySelector('#timeline a').getAttribute('href')").startswith("validation_images/")
    assert page.problems == []


@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_a_phone_in_light_and_dark(page, report, dark):
    page.open(report, width=360, height=740, dark=dark)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.evaluate(
        "[...document.querySelectorAll('.plot svg')].every(e => e.getBoundingClientRect().right <= 360)"
    )
    shades = page.evaluate("""['backgroundColor', 'color'].map(name => getComputedStyle(document.body)[name]
        .match(/\\d+/g).slice(0, 3).reduce((sum, part) => sum + Number(part), 0))""")
    assert (shades[0] < 120 and shades[1] > 600) if dark else (shades[0] > 650 and shades[1] < 150)
    assert page.problems == []


def test_texts_that_want_to_be_scripts_stay_texts(page, tmp_path):
    folder = hostile_run(tmp_path)
    Reporter([folder], shrunk).write(folder / "report.html")
    page.open(folder / "report.html")
    assert page.evaluate("window.hacked === undefined && document.scripts.length === 4")
    assert page.evaluate("document.querySelector('h1').textContent") == 'a "run" & <b>more'
    assert EVIL.replace("\u2028", "") in page.evaluate("document.querySelector('.prompt').textContent").replace(
        "\u2028", ""
    )
    assert page.problems == []
