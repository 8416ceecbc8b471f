"""Events as messages: the types and fields that a machine finds, and the words for people."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sana_tune.progress import Progress
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
from sana_tune.watch.messages import Message, Teller, picture_name

DONE = Progress(20, 2.0, 80)


def stepped(step: int, *, skipped: bool = False, loss: float = 0.5) -> Stepped:
    return Stepped(Progress(step, step / 10, 4 * step), loss, 1e-5, 0.25, 0.5, 0.0, 4, skipped)


def told(*events: Event) -> list[Message]:
    """The messages of the last event."""
    teller, found = Teller("dog"), []
    for event in events:
        found = teller.messages(event)
    return found


START = Started(Progress(), 20, 10.0)


def test_a_step_is_a_status_with_numbers_and_the_time_left():
    (message,) = told(START, stepped(5))
    assert (message.kind, message.severity, message.status) == ("training.status", "info", True)
    assert message.fields["data"] == {"status": "running", "state": {"global_step": 5, "epoch": 0.5, "images": 20}}
    progress = dict(message.fields["progress"])
    metrics = progress.pop("metrics")
    assert progress == {"current": 5, "total": 20, "percent": 25.0, "eta_seconds": 7.5}
    assert metrics["loss"] == 0.5 and metrics["lr"] == 1e-5 and metrics["grad_norm"] == 0.25
    assert message.text.startswith("Step 5 of 20: loss 0.5000")


def test_a_skipped_step_warns_and_a_loss_that_is_none_is_left_out():
    status, warning = told(START, stepped(3, skipped=True, loss=float("nan")))
    assert "loss" not in status.fields["progress"]["metrics"]
    assert (warning.kind, warning.severity) == ("notification", "warning") and "Step 3 was skipped" in warning.text


@pytest.mark.parametrize(
    ("event", "kind", "severity", "stage", "words"),
    [
        (CacheProgress("latents of cats", 4, 8), "lifecycle.stage", "info", "init_vae_cache", "4 of 8"),
        (CacheProgress("text", 8, 8, True), "lifecycle.stage", "info", "init_text_embed_cache", "8 of 8"),
        (Validated(Progress(), ("v/a.png",)), "lifecycle.stage", "info", "benchmark_base_model", "Drew 1"),
        (Validated(Progress(5), ("v/a.png",), ("b: no",)), "lifecycle.stage", "warning", "validation", "1 failed: b"),
        (Validated(DONE, ("v/a.png",)), "lifecycle.stage", "info", "final_validation", "Drew 1"),
        (Previewed(DONE, "zib", 5, 20, b"png"), "lifecycle.stage", "info", "validation", "zib at step 20: 5 of 20"),
        (Saved(DONE, "o/checkpoint-20", 1.0), "training.checkpoint", "info", None, "Saved o/checkpoint-20"),
        (Measured(DONE, {"clip/raw": 0.3}, ("more",)), "notification", "info", None, "clip/raw 0.3\nmore"),
        (Noticed(DONE, "the disk is full", "error"), "error", "error", None, "the disk is full"),
        (Noticed(DONE, "went back"), "notification", "warning", None, "went back"),
        (Failed("no room"), "error", "error", None, "The run failed: no room"),
        (Finished(DONE, "o/pipeline"), "training.status", "info", None, "the pipeline is in o/pipeline"),
        (Stopped(DONE, "SIGINT"), "training.status", "info", None, "Stopped after step 20: SIGINT"),
    ],
)
def test_every_event_has_its_type(event: Event, kind: str, severity: str, stage: str | None, words: str):
    message = told(START, event)[0]
    assert (message.kind, message.severity) == (kind, severity)
    assert words in message.text and message.title
    if stage:
        assert message.fields["stage"]["key"] == stage
    json.dumps(dict(message.fields), allow_nan=False)


def test_what_the_types_hold():
    (saved,) = told(START, Saved(Progress(10), "o/checkpoint-10", 1.0))
    assert saved.fields == {"checkpoint": {"path": "o/checkpoint-10", "label": "checkpoint-10", "is_final": False}}
    (last,) = told(START, Saved(DONE, "o/checkpoint-20", 1.0))
    assert last.fields["checkpoint"]["is_final"]
    (lost,) = told(START, Validated(Progress(5), (), ("a: full",)))
    assert lost.fields["stage"]["status"] == "failed"
    (preview,) = told(START, Previewed(Progress(5), "zib", 5, 20, b"png"))
    assert preview.fields["stage"]["progress"] == {"current": 5, "total": 20, "percent": 25.0}
    assert [picture.read() for picture in preview.pictures] == [b"png"] and preview.passing
    (measured,) = told(START, Measured(DONE, {"a": float("nan")}))
    assert measured.fields["data"]["values"] == {"a": None}


def test_the_ends_are_told_as_a_status_and_as_a_stage():
    for event, status, stage in (
        (Finished(DONE), "completed", ("training_complete", "completed")),
        (Stopped(Progress(5), "SIGINT"), "stopped", ("training_abort", "failed")),
    ):
        said, staged = told(START, event)
        assert said.fields["data"]["status"] == status
        assert (staged.fields["stage"]["key"], staged.fields["stage"]["status"]) == stage
    resumed, stage = told(Started(Progress(5), 20, 10.0, "o/checkpoint-5"))
    assert resumed.fields["data"]["status"] == "resumed" and "from o/checkpoint-5" in resumed.text
    assert stage.fields["stage"]["key"] == "init_resume_checkpoint"


def test_nothing_is_said_of_nothing():
    assert told(START, Validated(DONE, ())) == told(Measured(DONE, {})) == told(CacheProgress("text", 0, 0)) == []


def test_the_name_of_a_picture_is_that_of_its_prompt():
    assert picture_name(Path("v") / "step_20_a-zib_0_64x64_ema.png") == "a-zib_0_64x64_ema"
