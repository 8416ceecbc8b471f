"""events.jsonl: a line an event, kept over resumes and kills; what no longer holds is found by the reader."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import get_args

from sana_tune.progress import Progress
from sana_tune.watch import events
from sana_tune.watch.events import (
    CacheProgress,
    Event,
    Failed,
    Finished,
    Measured,
    Noticed,
    Previewed,
    Saved,
    Started,
    Stepped,
    Stopped,
    Validated,
)
from sana_tune.watch.journal import FILE, EventsSink, abandoned, line_of, read

TIME = "2026-01-31T12:00:00Z"
AT = Progress(3, 1.5, 12)


def written(root: Path, *told: Event) -> list[dict]:
    sink = EventsSink(root, lambda: TIME)
    for event in told:
        sink.emit(event)
    sink.close()
    return read(root / FILE)


def test_every_kind_of_event_but_steps_and_caches_is_a_line(tmp_path):
    step = Stepped(AT, 0.5, 1e-5, 0.1, 0.5, 0.0, 4)
    told = [
        CacheProgress("text", 1, 2), Started(Progress(), 9, 3.0), step, Validated(AT, ()), Validated(AT, (), ("a: b",)),
        Previewed(AT, "fox", 5, 20, b"png"), Measured(AT, {"held_out/raw": 0.9, "x": math.nan}, ("stop",)),
        Noticed(AT, "a 「notice」\u2028 here"), Saved(AT, str(tmp_path / "checkpoint-3"), 1.0), Finished(AT),
        Stopped(AT), Failed("no\nmore"),
    ]  # fmt: skip
    assert {type(event) for event in told} == set(get_args(events.Event))
    lines = written(tmp_path, *told)
    kinds = "started validated previewed measured noticed saved finished stopped failed".split()
    assert [line["event"] for line in lines] == kinds
    assert all((line["time"], line["step"]) == (TIME, 3) for line in lines[1:])
    assert lines[3]["values"] == {"held_out/raw": 0.9, "x": None} and lines[3]["advice"] == ["stop"]
    assert lines[4]["message"] == "a 「notice」\u2028 here" and lines[8]["message"] == "no\nmore"
    assert len((tmp_path / FILE).read_text(encoding="utf-8").split("\n")) == len(kinds) + 1


def test_paths_of_the_run_are_told_from_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    event = Validated(AT, ("run/validation_images/a.png", "/elsewhere/b.png"))
    line = line_of(event, Path("run"), Progress(), TIME)
    assert line["files"] == ["validation_images/a.png", "/elsewhere/b.png"]
    assert line_of(Started(AT, 9, 3.0), Path("run"), Progress(), TIME)["resumed_from"] is None
    assert line_of(Finished(AT, "run/pipeline"), Path("run"), Progress(), TIME)["pipeline"] == "pipeline"


def test_previews_are_files_of_the_newest_step(tmp_path):
    (first, _) = written(tmp_path, Previewed(AT, "fox", 5, 20, b"one"), Previewed(AT, "fox", 10, 20, b"two"))
    assert "picture" not in first and (tmp_path / first["file"]).read_bytes() == b"one"
    later = Progress(6, 3.0, 24)
    lines = written(tmp_path, Previewed(later, "fox", 5, 20, b"three"))
    assert [each.name for each in (tmp_path / "previews").iterdir()] == ["step_6_fox_5_of_20.png"]
    assert len(lines) == 3 and (tmp_path / lines[-1]["file"]).read_bytes() == b"three"


def test_a_torn_line_is_left_out_and_swallows_nothing(tmp_path):
    written(tmp_path, Started(Progress(), 9, 3.0))
    with open(tmp_path / FILE, "a", encoding="utf-8") as file:
        file.write('{"event": "saved", "step": 3, "pa')
    lines = written(tmp_path, Started(AT, 9, 3.0), Finished(Progress(9, 4.5, 36)))
    assert [line["event"] for line in lines] == ["started", "started", "finished"]
    (tmp_path / FILE).write_text('[1]\n{"event": 3}\n{"step": 1}\n\n{"event": "noticed", "step": 1}\n')
    assert read(tmp_path / FILE) == [{"event": "noticed", "step": 1, "time": ""}]
    assert read(tmp_path / "none") == []


def test_what_was_done_anew_is_abandoned_and_failures_are_kept(tmp_path):
    def measured(step: int) -> Measured:
        return Measured(Progress(step), {"held_out/raw": 1.0})

    first = [Started(Progress(), 9, 3.0), measured(2), measured(4), Failed("out of memory")]
    lines = written(
        tmp_path, *first, Started(Progress(2), 9, 3.0), measured(4), measured(6), Started(Progress(4), 9, 3.0)
    )
    found = [(line["event"], line["step"]) for line, gone in zip(lines, abandoned(lines), strict=True) if gone]
    assert found == [("measured", 4), ("measured", 6)]
    assert [line["event"] for line in lines].count("failed") == 1
    assert json.loads((tmp_path / FILE).read_text(encoding="utf-8").splitlines()[0])["event"] == "started"
