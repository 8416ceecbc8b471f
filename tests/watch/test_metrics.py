"""metrics.jsonl: a line a step, cut back on resume, sound after a kill."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest

from sana_tune.progress import Progress
from sana_tune.watch.events import Stepped
from sana_tune.watch.metrics import Metrics, binned, last_lines, line_of, read

KEYS = ["step", "epoch", "loss", "lr", "grad_norm", "step_s", "data_wait_s", "images_s"]


def stepped(step: int, loss: float = 0.5, *, skipped: bool = False) -> Stepped:
    return Stepped(Progress(step, step / 3, 4 * step), loss, 1e-5, 0.25, 0.5, 0.1, 4, skipped)


def test_a_line_has_the_keys_of_the_contract():
    line = line_of(stepped(6))
    assert list(line) == KEYS
    assert line["step"] == 6 and line["epoch"] == 2.0 and line["lr"] == 1e-5 and line["images_s"] == 8.0


def test_numbers_that_are_not_finite_are_null():
    line = line_of(stepped(1, math.nan, skipped=True))
    assert line["loss"] is None and line["skipped"] is True
    json.loads(json.dumps(line, allow_nan=False))


def test_lines_are_on_the_disk_at_once(tmp_path: Path):
    metrics = Metrics(tmp_path / "new" / "metrics.jsonl")
    metrics.append(stepped(1))
    assert [line["step"] for line in read(metrics.path)] == [1]
    metrics.append(stepped(2))
    assert [line["step"] for line in read(metrics.path)] == [1, 2]
    metrics.close()


def test_cutting_back_drops_later_and_torn_lines(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path)
    for step in range(1, 6):
        metrics.append(stepped(step))
    metrics.close()
    kept = path.read_text(encoding="utf-8").splitlines()[:3]
    with open(path, "a", encoding="utf-8") as file:
        file.write('{"step": 6, "epo')
    metrics.cut_back_to(3)
    metrics.append(stepped(4, 0.25))
    metrics.close()
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[:3] == kept
    assert [(line["step"], line["loss"]) for line in read(path)][3:] == [(4, 0.25)]
    assert [each.name for each in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_torn_last_line_does_not_swallow_the_next(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo', encoding="utf-8")
    metrics = Metrics(path)
    metrics.cut_back_to(9)
    metrics.append(stepped(2))
    metrics.close()
    assert [line["step"] for line in read(path)] == [1, 2]


def test_a_start_from_nothing_empties_the_file_and_needs_none(tmp_path: Path):
    metrics = Metrics(tmp_path / "metrics.jsonl")
    metrics.cut_back_to(0)
    assert not metrics.path.exists() and read(metrics.path) == []
    metrics.append(stepped(1))
    metrics.cut_back_to(0)
    assert metrics.path.read_text(encoding="utf-8") == ""


def test_the_last_lines_are_read_from_the_end_alone(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    assert last_lines(path, 3) == []
    metrics = Metrics(path)
    for step in range(1, 4001):
        metrics.append(stepped(step))
    metrics.close()
    assert [line["step"] for line in last_lines(path, 50)] == list(range(3951, 4001))
    assert last_lines(path, 9999) == read(path)
    with open(path, "ab") as file:
        file.write(b'{"step": 4001, "lo')
    assert [line["step"] for line in last_lines(path, 2)] == [3999, 4000]


def test_losses_by_role_stand_beside_the_loss():
    both = line_of(replace(stepped(1), losses={"train": 0.75, "regularise": math.nan}))
    assert (both["loss"], both["loss_train"], both["loss_regularisation"]) == (0.5, 0.75, None)
    assert "loss_regularisation" not in line_of(replace(stepped(1), losses={"train": 0.75}))


def test_memory_and_losses_by_noise_level_stand_where_they_are_known():
    line = line_of(replace(stepped(1), memory_bytes=123, by_sigma=((0.31, 1.0), (0.39, 2.0), (1.0, 0.5))))
    assert line["memory_bytes"] == 123 and line["by_sigma"] == [[3, 2, 1.5], [9, 1, 0.5]]


def test_losses_by_noise_level_are_few_numbers_whatever_the_batch_is():
    many = tuple((number / 1000, 1 / 3) for number in range(1000))
    found = binned((*many, (0.5, math.nan), (math.nan, 1.0)))
    assert [count for _, count, _ in found] == [100] * 10 and {loss for *_, loss in found} == {0.33333}
    assert len(json.dumps(line_of(replace(stepped(10**6), memory_bytes=10**11, by_sigma=many)))) < 500
    assert binned(()) == []


def test_the_last_lines_are_found_when_lines_are_long(tmp_path: Path):
    metrics = Metrics(tmp_path / "metrics.jsonl")
    many = tuple((number / 1000, number / 7) for number in range(1000))
    for step in range(1, 301):
        metrics.append(replace(stepped(step), memory_bytes=10**11, by_sigma=many))
    assert [line["step"] for line in last_lines(metrics.path, 50)] == list(range(251, 301))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device that is always full is Linux's")
def test_what_a_full_disk_does_not_take_is_written_later(tmp_path: Path):
    metrics = Metrics(tmp_path / "metrics.jsonl")
    metrics.path.symlink_to("/dev/full")
    metrics.append(stepped(1))
    metrics.append(stepped(2))
    metrics.close()
    metrics.path.unlink()
    metrics.append(stepped(3))
    metrics.close()
    assert [line["step"] for line in read(metrics.path)] == [1, 2, 3]
