"""The benchmark runs both loops in turn and tells their ratio; it measures the start and the help too."""

from __future__ import annotations

import re
import sys
import time

import pytest

from scripts import benchmark


def test_blocks_alternate_and_are_timed_apart():
    done: list[str] = []

    class Steps:
        def steps(self, first: int, total: int):
            yield from range(first, total)

    def bare(count: int) -> None:
        done.extend(["bare"] * count)
        time.sleep(0.02 * count)

    batches = benchmark.Alternating(Steps(), 2, bare, lambda: done.append("waited"))
    for step in batches.steps(0, 4):
        done.append(str(step))
        time.sleep(0.01)
    turn = ["waited", "bare", "bare", "waited"]
    assert done == ["0", "1", *turn, "2", "3", *turn]
    assert len(batches.ours) == len(batches.theirs) == len(batches.waited) == 2
    assert all(0.01 <= seconds for seconds in batches.ours) and all(0.02 <= seconds for seconds in batches.theirs)


def test_a_short_run_tells_everything(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(benchmark, "HELP_TIMES", 1)
    monkeypatch.setattr(sys, "argv", "benchmark --blocks 2 --block 1 --batch 1 --resolution 32".split())
    benchmark.main()
    told = capsys.readouterr().out
    found = re.search(r"ratio ([\d.]+) \(quartiles [\d.]+ to [\d.]+; 2 pairs of 1 steps\)", told)
    assert found and 0.1 < float(found[1]) < 10
    assert re.search(r"waiting for data: [\d.]+%", told)
    assert re.search(
        r"to the first step, warm caches: [\d.]+ s, [\d.]+ s of it not imports\nsana_tune --help: [\d.]+ s", told
    )


def test_the_check_is_timed_alone(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(benchmark, "HELP_TIMES", 1)
    monkeypatch.setattr(sys, "argv", "benchmark --only check --pictures 7".split())
    benchmark.main()
    told = capsys.readouterr().out
    assert re.fullmatch(r"sana_tune check, 7 pictures: cold [\d.]+ s, warm [\d.]+ s \(median of 1\)\n", told)
