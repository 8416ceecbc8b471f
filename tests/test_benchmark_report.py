"""The benchmarks of the report and the sinks tell their numbers; the browser is driven and found."""

from __future__ import annotations

import re
import sys
from functools import partial

import pytest

from scripts import benchmark, benchmark_report, browser


@pytest.fixture
def told(monkeypatch, capsys):
    """What a benchmark says, of a run with few and small pictures."""
    small = partial(benchmark_report.run_folder, validations=2, side_px=16)
    monkeypatch.setattr(benchmark_report, "run_folder", small)

    def tell(flags: str) -> str:
        monkeypatch.setattr(sys, "argv", ["benchmark", *flags.split()])
        benchmark.main()
        return capsys.readouterr().out

    return tell


def test_the_report_is_timed(told):
    said = told("--only report --pictures 300 --rounds 2")
    assert re.search(r"report of 300 steps: [\d.]+ MB; written in [\d.]+ s, then in [\d.]+ s", said)
    if browser.find():
        found = re.search(r"first paint: (\d+) ms \(fastest (\d+) ms of 2\), (\d+) curves", said)
        assert found and 0 < int(found[2]) <= int(found[1]) and int(found[3]) >= 20
    else:
        assert "not measured" in said


def test_without_a_browser_the_rest_is_told(told, monkeypatch):
    monkeypatch.setenv("CHROMIUM", "no-such-program")
    assert browser.find() is None and "first paint: not measured" in told("--only report --pictures 20 --rounds 1")


def test_the_share_of_the_sinks_is_told(told):
    said = told("--only sinks --pictures 200 --rounds 1")
    assert re.search(r"each step: \d+ us", said) and re.search(r"of a nano step of [\d.]+ ms: [\d.]+% in all", said)


def test_a_browser_that_cannot_be_started_is_told():
    with pytest.raises(RuntimeError, match="does not answer, or could not be started"):
        browser.Browser("false")
