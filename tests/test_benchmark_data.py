"""The measurements of the data path: each does the work it times, and tells it."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from sana_tune.data.cache import TensorCache
from sana_tune.data.images import prepare
from sana_tune.data.memory import FileMemory
from sana_tune.data.survey import survey
from scripts import benchmark, benchmark_data
from tests.data.pictures import dataset


def told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: str) -> str:
    """What `scripts/benchmark.py` prints."""
    monkeypatch.setattr(sys, "argv", ["benchmark", *words.split()])
    benchmark.main()
    return capsys.readouterr().out


def test_parts_take_turns():
    done: list[str] = []
    times = benchmark_data.in_turn(2, lambda: done.append("a"), lambda: done.append("b"))
    assert done == ["a", "b", "a", "b"] and [len(each) for each in times] == [2, 2]
    assert benchmark_data.ratios([2, 9, 4], [1, 3, 1]) == "3.00 (2.00 to 4.00)"
    assert benchmark_data.seconds([3, 1, 2]) == "min 1.00 s, median 2.00 s"


def test_the_scan(monkeypatch, capsys):
    monkeypatch.setattr(benchmark_data, "SCAN_SIZES", ((64, 48), (48, 64)))
    said = told(monkeypatch, capsys, "--only scan --pictures 5 --rounds 2")
    assert "scan of 5 JPEGs, 2 rounds" in said
    assert re.search(r"sana_tune, headers: +min [\d.]+ s, median [\d.]+ s; [\d.]+ \([\d.]+ to [\d.]+\) times", said)
    assert "all known:" in said


def test_preparing(monkeypatch, capsys):
    monkeypatch.setattr(benchmark_data, "LARGE", (160, 120))
    assert "preparing 512 px of 2 JPEGs" in told(monkeypatch, capsys, "--only prepare --pictures 2 --rounds 2")


def test_what_is_compared_is_the_same_work(tmp_path: Path):
    """The plain way gives the picture that a run trains, but for the draft decoding of JPEGs."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(benchmark_data.jpeg((640, 480), 0, quality=90))
    found = survey([dataset(folder)], alignment=32, rounding=2, prompt_case="lower", memory=FileMemory())
    (record,) = found.records
    plain = benchmark_data.plainly(folder / "a.jpg", record)
    ours = prepare((folder / "a.jpg").read_bytes(), record.placement)
    (filled,) = benchmark_data.fill(folder, found.records, tmp_path / "cache")
    np.testing.assert_array_equal(filled, ours)
    assert plain.shape == ours.shape and np.abs(plain.astype(int) - ours).mean() < 2
    assert len(TensorCache(tmp_path / "cache")) == 1


def test_the_loader_in_a_process_of_its_own(monkeypatch, capsys):
    said = told(monkeypatch, capsys, "--only loader --pictures 40")
    assert "loader over 40 items" in said and re.search(r"\n  32 pictures in [\d.]+ s: [\d,]+ pictures/s", said)
    assert float(re.search(r"memory: (\d+) MB at most", said)[1]) < 600  # pyright: ignore[reportOptionalSubscript]


def test_memory_is_watched():
    before = benchmark_data.anonymous_mb()
    with benchmark_data.watched_memory() as most:
        kept = torch.ones(64 << 20, dtype=torch.uint8)
    assert most[0] >= before + 60 and len(kept) == 64 << 20


def test_the_text_cache_is_a_seventh_of_the_padded_size(monkeypatch, capsys):
    said = told(monkeypatch, capsys, "--only text-cache --pictures 12")
    shares = [float(share) for share in re.findall(r"([\d.]+) %", said.partition("\n  ")[2])]
    assert len(shares) == 2 and max(shares) <= 15 and min(shares) >= 13
