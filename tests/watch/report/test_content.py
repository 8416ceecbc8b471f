"""What the page says: where the run stands, its numbers, its data, its events."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime

import pytest

from sana_tune.progress import Progress
from sana_tune.watch.events import Event, Failed, Finished, Measured, Started, Stopped
from sana_tune.watch.journal import EventsSink
from sana_tune.watch.report import content
from sana_tune.watch.report.reading import Reader, Run
from scripts.benchmark_report import run_folder

NOW = datetime.now(UTC)
LATER = datetime(2100, 1, 1, tzinfo=UTC)


def run_of(folder, *events: Event) -> Run:
    sink = EventsSink(folder, lambda: "2026-01-31T12:00:00Z")
    for event in events:
        sink.emit(event)
    sink.close()
    return Reader(folder).read()


@pytest.mark.parametrize(
    ("last", "word", "tone"),
    [(Finished(Progress(9)), "finished", "good"), (Stopped(Progress(4), "Ctrl-C"), "stopped", "warn"),
     (Failed("no room"), "failed", "bad")],
)  # fmt: skip
def test_the_last_event_says_how_it_ended(tmp_path, last, word, tone):
    state = content.state_of(run_of(tmp_path, Started(Progress(), 9, 3.0), last), live=False, now=NOW)
    assert (state.word, state.tone, state.total) == (word, tone, 9)
    again = run_of(tmp_path, Started(Progress(4), 12, 3.0))
    assert content.state_of(again, live=True, now=LATER).word == "running"


def test_a_run_without_an_end_is_running_or_was_killed(tmp_path):
    run = run_of(tmp_path, Started(Progress(), 9, 3.0))
    assert content.state_of(run, live=False, now=NOW).word == "running"
    os.utime(tmp_path / "events.jsonl", (1, 1))
    state = content.state_of(run, live=False, now=NOW)
    assert state.word == "ended" and "killed" in state.detail
    assert content.state_of(Reader(tmp_path / "none").read(), live=False, now=NOW).word == "empty"


def test_the_key_numbers(tmp_path):
    run = Reader(run_folder(tmp_path, 200, validations=2, side_px=8)).read()
    state = content.state_of(run, live=False, now=NOW)
    found = {tile["name"]: tile["value"] for tile in content.key_numbers(run, state)}
    assert list(found) == ["Loss", "Held-out loss", "CLIP score", "Speed", "Step", "Memory", "Waiting for data", "Time"]
    assert found["Loss"] == f"{run.metrics.columns['loss'][-50:].mean():.4g}" and found["Memory"] == "33.5 GB"
    assert state.step == state.total == 200 and state.share == 1.0
    empty = Reader(tmp_path / "none").read()
    assert content.key_numbers(empty, content.state_of(empty, live=False, now=NOW)) == []


def test_the_ledger_counts_and_gives_reasons(tmp_path):
    left_out = [[f"{number}.jpg", "is damaged"] for number in range(60)]
    entry = {"dataset": "d", "found": 100, "trained": 25, "not_drawn": 10, "left_out": left_out, "role": "regularise",
             "held_out": list("abcde")}  # fmt: skip
    (tmp_path / "ledger.json").write_text(json.dumps({"datasets": [entry]}))
    (found,) = content.ledgers(Reader(tmp_path).read())
    assert [(part["name"], part["count"], part["share"]) for part in found["parts"]] == [
        ("used", 25, 0.25), ("held out", 5, 0.05), ("left out", 60, 0.6), ("not drawn", 10, 0.1),
    ]  # fmt: skip
    assert found["reasons"] == [("is damaged", 60)] and len(found["files"]) == 50 and found["more"] == 10
    assert found["role"] == "regularisation"


def test_buckets_have_their_shapes(tmp_path):
    run = Reader(run_folder(tmp_path, 10, validations=1, side_px=8)).read()
    square, tall, *_ = content.buckets(run)
    assert square["icon_w"] == square["icon_h"] and tall["icon_w"] < tall["icon_h"] and square["share"] == 1.0
    assert (square["shown"], tall["filled"]) == (212, 0)
    again = {**run.plan["buckets"][0], "repeats": 2, "filled": 4}
    (tmp_path / "plan.json").write_text(json.dumps({"buckets": [again], "held_out": [{**again, "role": "eval"}]}))
    shown, held = content.buckets(Reader(tmp_path).read())
    assert (shown["shown"], shown["share"], held["shown"], held["share"]) == (636, 636 / 640, 0, 0.0)
    assert content.buckets(Reader(tmp_path / "none").read()) == []


def test_environments_say_where_they_differ(tmp_path):
    runs = []
    for name, torch in (("a", "2.13"), ("b", "2.14")):
        (tmp_path / name).mkdir()
        told = {"python": "3.11", "libraries": {"torch": torch}, "device": {"name": "H100", "memory_bytes": 8e10}}
        (tmp_path / name / "environment.json").write_text(json.dumps(told))
        runs.append(Reader(tmp_path / name).read())
    rows = {row["name"]: row for row in content.environments(runs)}
    assert rows["torch"]["differs"] and not rows["Python"]["differs"] and rows["Device"]["values"][0] == "H100, 80 GB"
    assert content.environments([Reader(tmp_path / "none").read()]) == []


def test_events_that_matter_stand_apart_and_skipped_steps_are_one(tmp_path):
    lines = [{"step": number, "loss": 1.0, "step_s": 1.0} for number in range(1, 30)]
    for line in lines[:25]:
        line |= {"skipped": True, "loss": None}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = run_of(
        tmp_path, Started(Progress(), 40, 3.0), Measured(Progress(9), {"drift": 0.1}), Failed("no room"),
        Started(Progress(4), 40, 3.0), Measured(Progress(9), {"drift": 0.5}, ("drift: lower learning_rate",)),
    )  # fmt: skip
    found = content.events(run)
    texts = [line["text"] for line in found["notable"]]
    assert sum("25 skipped" in text and "…" in text for text in texts) == 1 and len(texts) == 5
    assert "Failed: no room" in texts and any("Resumed after step 4" in text for text in texts)
    (usual,) = found["usual"]
    assert usual["abandoned"] and usual["text"] == "Measured drift 0.1" and found["more"] == 0
