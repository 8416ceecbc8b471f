"""Numbers, times and events in words."""

from __future__ import annotations

import pytest

from sana_tune.watch.report import words

NAN = float("nan")


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        (words.count(12345.0), "12,345"), (words.count(NAN), "–"), (words.short(0.123456), "0.1235"),
        (words.short(123456.7), "123,457"), (words.short(None), "–"), (words.size(0.0), "0 B"),
        (words.size(31.4e9), "31.4 GB"), (words.size(999_700_000), "1 GB"), (words.size(5e15), "5,000 TB"),
        (words.size(NAN), "–"), (words.share(0.0165), "1.65 %"), (words.share(None), "–"),
        (words.lasting(42.4), "42 s"), (words.lasting(3599), "1 h 00 min"), (words.lasting(720), "12 min"),
        (words.lasting(90_000_0), "10 d 10 h"), (words.lasting(NAN), "–"), (words.lasting_short(0.0125), "12.5 ms"),
        (words.lasting_short(1.25), "1.25 s"), (words.lasting_short(240), "4 min"), (words.lasting_short(None), "–"),
        (words.moment("2026-01-31T12:00:00Z"), "2026-01-31 12:00 UTC"), (words.moment("long ago"), "long ago"),
    ],
)  # fmt: skip
def test_numbers_and_times(said, wanted):
    assert said == wanted


@pytest.mark.parametrize(
    ("line", "wanted", "tone"),
    [
        ({"event": "started", "step": 0, "total_steps": 9}, "Started, to step 9", "plain"),
        ({"event": "started", "step": 4, "total_steps": 9, "resumed_from": "checkpoint-4"},
         "Resumed after step 4 from checkpoint-4, to step 9", "plain"),
        ({"event": "validated", "files": ["a", "b"], "failed": [], "duration_s": 3.0},
         "Drew 2 pictures in 3 s", "plain"),
        ({"event": "validated", "files": [], "failed": ["a: no room"], "duration_s": 3.0},
         "Drew 0 pictures in 3 s; 1 failed: a: no room", "warn"),
        ({"event": "measured", "values": {"clip/raw": 30.5, "clip/raw/fox": 1.0}}, "Measured clip/raw 30.5", "plain"),
        ({"event": "measured", "values": {"drift": 0.5}, "advice": ["stop earlier"]},
         "Measured drift 0.5. Stop earlier", "warn"),
        ({"event": "saved", "path": "checkpoint-4", "duration_s": 1.0, "removed": ["checkpoint-2"]},
         "Saved checkpoint-4 in 1 s; removed checkpoint-2", "plain"),
        ({"event": "finished", "images": 36, "pipeline": "pipeline"},
         "Finished: 4 steps, 36 pictures; the pipeline is in pipeline", "good"),
        ({"event": "finished", "images": 36, "pipeline": "adapter"},
         "Finished: 4 steps, 36 pictures; the adapter is in adapter", "good"),
        ({"event": "stopped", "reason": "Ctrl-C"}, "Stopped after step 4: Ctrl-C", "warn"),
        ({"event": "failed", "message": "no room"}, "Failed: no room", "bad"),
        ({"event": "noticed", "severity": "error", "message": "went back"}, "went back", "bad"),
        ({"event": "previewed", "prompt": "fox", "sampler_step": 5, "sampler_steps": 20},
         "Preview of fox, 5 of 20", "plain"),
        ({"event": "of another version"}, "of another version", "plain"),
    ],
)  # fmt: skip
def test_events(line, wanted, tone):
    line = {"step": 4, **line}
    assert (words.told(line), words.tone(line)) == (wanted, tone)
