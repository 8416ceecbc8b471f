"""Sinks: a broken one stops nothing; the screen shows what happens, with and without a terminal."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from sana_tune import log as logs
from sana_tune.log import log
from sana_tune.progress import Progress
from sana_tune.watch.events import (
    CacheProgress,
    Event,
    Finished,
    Measured,
    Noticed,
    Saved,
    Started,
    Stepped,
    Stopped,
    Validated,
)
from sana_tune.watch.metrics import read
from sana_tune.watch.sinks import BarsSink, LinesSink, Meter, MetricsSink, Watcher, clock, message_of, say, screen


class Listener:
    """Keeps the events it heard; breaks at the n-th if asked."""

    def __init__(self, breaks_at: int | None = None):
        self.heard: list[Event] = []
        self.breaks_at = breaks_at
        self.closed = False

    def emit(self, event: Event) -> None:
        if len(self.heard) + 1 == self.breaks_at:
            raise ConnectionError("the server is gone")
        self.heard.append(event)

    def close(self) -> None:
        self.closed = True


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    """The log as the console shows it, on a console without a terminal."""
    handlers, level, propagate = list(log.handlers), log.level, log.propagate
    text = io.StringIO()
    logs.setup(target=Console(file=text, width=200))
    yield text
    log.handlers[:] = handlers
    log.setLevel(level)
    log.propagate = propagate


def stepped(step: int, *, loss: float = 0.5, step_s: float = 0.5, skipped: bool = False) -> Stepped:
    return Stepped(Progress(step, step / 10, 4 * step), loss, 1e-5, 0.25, step_s, 0.0, 4, skipped)


def test_a_broken_sink_is_told_once_and_dropped(lines: io.StringIO):
    broken, sound = Listener(breaks_at=2), Listener()
    watcher = Watcher([broken, sound])
    for step in range(1, 5):
        watcher.emit(stepped(step))
    watcher.close()
    assert len(broken.heard) == 1 and not broken.closed
    assert len(sound.heard) == 4 and sound.closed
    assert lines.getvalue().count("Listener failed") == 1
    assert "the server is gone" in lines.getvalue()


def test_interrupts_go_through():
    class Interrupting(Listener):
        def emit(self, event: Event) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Watcher([Interrupting()]).emit(stepped(1))


def test_watcher_closes_its_sinks_also_after_an_error():
    listener = Listener()
    with pytest.raises(RuntimeError), Watcher([listener]):
        raise RuntimeError
    assert listener.closed


def test_metrics_sink_starts_where_the_run_starts(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    for first, last in ((0, 5), (3, 6)):
        sink = MetricsSink(path)
        sink.emit(Started(Progress(first), 6, 10.0))
        for step in range(first + 1, last + 1):
            sink.emit(stepped(step))
        sink.close()
    assert [line["step"] for line in read(path)] == [1, 2, 3, 4, 5, 6]


def test_meter_means_over_its_window_and_leaves_out_skipped_losses():
    meter = Meter(window=3)
    for step, loss in enumerate((9.0, 1.0, float("nan"), 3.0), start=1):
        meter.add(stepped(step, loss=loss, skipped=loss != loss))
    assert meter.loss == 2.0
    assert meter.steps_per_s == 2.0 and meter.images_per_s == 8.0
    assert meter.left_s(10) == 3.0
    assert meter.numbers == "loss 2.0000  lr 1.00e-05  grad 0.25  2.00 steps/s  8.0 images/s"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (725, "12:05"), (11229, "3:07:09"), (-3, "0:00")]
)
def test_clock(seconds: float, text: str):
    assert clock(seconds) == text


def test_messages():
    done = Progress(20, 2.0, 80)
    assert message_of(Started(Progress(), 20, 10.0)) == "Training: starting, to step 20 (2 epochs)"
    resumed = Started(Progress(5), 20, 10.0, "out/checkpoint-5")
    assert message_of(resumed) == "Training: going on after step 5 from out/checkpoint-5, to step 20 (2 epochs)"
    saved = Saved(done, "out/checkpoint-20", 0.51, ("out/checkpoint-10",))
    assert message_of(saved) == "Saved out/checkpoint-20 (0.5 s); removed checkpoint-10"
    assert message_of(Validated(done, ())) is None
    drawn = Validated(done, (str(Path("v") / "a.png"),), ("b.png: RuntimeError: full",), 2.0)
    assert message_of(drawn) == "Drew 1 pictures at step 20 (2.0 s) in v; 1 failed: b.png: RuntimeError: full"
    assert (
        message_of(Finished(done, "out/pipeline")) == "Finished: 20 steps, 80 images; the pipeline is in out/pipeline"
    )
    assert message_of(Finished(done, "o/adapter")) == "Finished: 20 steps, 80 images; the adapter is in o/adapter"
    assert message_of(Stopped(done, "SIGINT")) == "Stopped after step 20: SIGINT"
    assert message_of(stepped(1)) is None


def test_lines_come_by_tenths_and_by_time(lines: io.StringIO):
    now = Clock()
    sink = LinesSink(every_s=10.0, now=now)
    sink.emit(Started(Progress(), 100, 10.0))
    for step in range(1, 101):
        now.now_s += 4.0 if step <= 10 else 0.1
        sink.emit(stepped(step))
    shown = [int(line.split()[1]) for line in lines.getvalue().splitlines() if line.startswith("step ")]
    assert shown[:5] == [1, 4, 7, 10, 20]
    assert shown[-1] == 100 and len(shown) == 13


def test_lines_of_a_cache(lines: io.StringIO):
    sink = LinesSink(now=Clock())
    for done in range(51):
        sink.emit(CacheProgress("latents", done, 50, finished=done == 50))
    sink.emit(CacheProgress("text", 0, 0, finished=True))
    text = lines.getvalue().splitlines()
    assert text[0] == "Caching latents: 5 of 50 (10 %)" and text[9] == "Caching latents: 50 of 50 (100 %)"


def test_skipped_steps_are_told_at_the_end():
    ended = (Finished(Progress(9), None, 2), Stopped(Progress(9), "SIGINT", 2))
    assert all("; 2 of this start's steps were skipped" in str(message_of(event)) for event in ended)
    assert "skipped" not in str(message_of(Finished(Progress(9))))


def test_a_cache_tells_its_speed_and_what_is_left_each_time_it_is_filled(lines: io.StringIO):
    now = Clock()
    sink = LinesSink(every_s=1.0, now=now)
    for _ in range(2):
        for done in (0, 10, 20, 40):
            sink.emit(CacheProgress("latents of cats", done, 40, finished=done == 40))
            now.now_s += 2.0
    sink.emit(CacheProgress("text", 0, 8))
    now.now_s += 1
    sink.emit(CacheProgress("text", 8, 8, finished=True))
    filling = [
        "Caching latents of cats: 10 of 40 (25 %)  5.0 images/s  left 0:06",
        "Caching latents of cats: 20 of 40 (50 %)  5.0 images/s  left 0:04",
        "Caching latents of cats: 40 of 40 (100 %)  6.7 images/s",
    ]
    assert lines.getvalue().splitlines() == [*filling, *filling, "Caching captions: 8 of 8 (100 %)  8.0 captions/s"]


def test_failed_pictures_are_a_warning(lines: io.StringIO):
    LinesSink().emit(Validated(Progress(3), (), ("a.png: RuntimeError: out of memory",)))
    assert lines.getvalue().startswith("warning: Drew 0 pictures at step 3")


def test_bars_on_a_terminal(lines: io.StringIO):
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=160, legacy_windows=False)
    sink = BarsSink(console)
    sink.emit(CacheProgress("latents", 1, 4))
    sink.emit(CacheProgress("latents", 4, 4, finished=True))
    sink.emit(Started(Progress(), 10, 5.0))
    for step in range(1, 11):
        sink.emit(stepped(step))
    sink.emit(Finished(Progress(10)))
    sink.close()
    shown = text.getvalue()
    assert "Caching latents" in shown and "4/4" in shown
    assert "10/10" in shown and "loss 0.5000" in shown
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h"), "the cursor is shown again"


def test_screen_chooses_by_terminal():
    assert isinstance(screen(Console(file=io.StringIO())), LinesSink)
    assert isinstance(screen(Console(file=io.StringIO(), force_terminal=True)), BarsSink)


def test_an_empty_validation_says_nothing(lines: io.StringIO):
    LinesSink().emit(Validated(Progress(3), ()))
    assert lines.getvalue() == ""


def test_regularisation_datas_loss_is_shown_apart():
    meter = Meter()
    meter.add(replace(stepped(1, loss=3.0), losses={"train": 1.0, "regularise": 5.0}))
    meter.add(replace(stepped(2, loss=4.0), losses={"regularise": 4.0}))
    meter.add(replace(stepped(3, loss=2.0), losses={"train": 2.0}))
    assert (meter.loss, meter.regularisation) == (1.5, 4.5)
    assert meter.numbers.startswith("loss 1.5000  regularisation 4.5000  lr")
    plain = Meter()
    plain.add(stepped(1))
    assert plain.regularisation is None and "regularisation" not in plain.numbers


def test_the_epochs_of_a_schedule_are_told_as_they_are():
    assert message_of(Started(Progress(), 20, 10.0, None, 3.5)) == "Training: starting, to step 20 (3.5 epochs)"


def test_what_is_noticed_and_measured_is_said(caplog):
    with caplog.at_level("INFO"):
        say(Noticed(Progress(3), "the disk is full: waiting", "error"))
        say(Measured(Progress(3), {"held_out/raw": 0.5, "held_out/raw/sigma_0.1": 0.25}, ("train less",)))
    (noticed, measured) = caplog.records
    assert (noticed.levelname, noticed.message) == ("ERROR", "the disk is full: waiting")
    assert measured.message == "Measured at step 3: held_out/raw 0.5\ntrain less"
