"""The report during a run: at the start, now and then, at the end; never so often that the steps feel it."""

from __future__ import annotations

import threading
from pathlib import Path

from sana_tune.log import log
from sana_tune.progress import Progress
from sana_tune.watch.events import CacheProgress, Event, Finished, Started, Stepped, Validated
from sana_tune.watch.report.sink import EVERY_S, SHARE, ReportSink
from sana_tune.watch.sinks import Watcher

START = Started(Progress(), 100, 10.0)


def step(number: int) -> Stepped:
    return Stepped(Progress(number), 0.5, 1e-5, 0.1, 0.5, 0.0, 4)


class Writing:
    """A writer that takes `takes_s`, or waits for `gate`, or fails; and a clock that is set by hand."""

    def __init__(self) -> None:
        self.lives: list[bool] = []
        self.threads: set[int] = set()
        self.gate = threading.Event()
        self.gate.set()
        self.error: Exception | None = None
        self.now_s = self.takes_s = 0.0
        self.sink = ReportSink(self, Path("report.html"), lambda: self.now_s)

    def write(self, path: Path, *, live: bool = False) -> None:
        assert self.gate.wait(10)
        self.lives.append(live)
        self.now_s += self.takes_s
        self.threads.add(threading.get_ident())
        if self.error is not None:
            raise self.error

    def emit(self, event: Event) -> int:
        """How many were written once the thread is idle again."""
        self.sink.emit(event)
        self.idle()
        return len(self.lives)

    def idle(self) -> None:
        self.sink._thread.submit(int).result(10)


def test_it_is_written_at_the_start_now_and_then_and_at_the_end():
    written = Writing()
    assert written.emit(CacheProgress("text", 1, 2)) == 0
    assert written.emit(START) == 1
    assert written.emit(step(1)) == 1  # the next one is due in a while
    written.now_s = EVERY_S + 1
    assert written.emit(step(2)) == 2
    assert threading.get_ident() not in written.threads and written.lives == [True, True]
    written.sink.close()
    assert written.lives == [True, True, False]


def test_new_pictures_are_shown_soon():
    written = Writing()
    written.emit(START)
    assert written.emit(step(1)) == 1
    written.now_s = 1.0
    assert written.emit(Validated(Progress(1), ("a.png",))) == 2


def test_a_slow_report_is_written_more_seldom():
    written = Writing()
    written.takes_s = 10.0
    written.emit(START)
    written.emit(step(1))  # hears that it took 10 s, at second 10
    written.now_s = 10 + 10 / SHARE - 1
    assert written.emit(step(2)) == 1
    written.now_s = 10 + 10 / SHARE + 1
    assert written.emit(step(3)) == 2


def test_the_steps_do_not_wait_for_it():
    written = Writing()
    written.gate.clear()
    written.sink.emit(START)
    for number in range(1, 50):
        written.now_s += EVERY_S
        written.sink.emit(step(number))
    assert written.lives == []
    written.gate.set()
    written.sink.emit(Finished(Progress(50)))
    written.sink.close()
    assert written.lives[-1] is False and len(written.lives) <= 3


def test_a_report_that_fails_ends_itself_and_not_the_run(caplog, monkeypatch):
    monkeypatch.setattr(log, "propagate", True)
    written = Writing()
    written.error = OSError("no room")
    with Watcher([written.sink]) as watcher:
        watcher.emit(START)
        written.idle()
        for number in range(1, 4):
            watcher.emit(step(number))
    assert len(written.lives) == 1
    assert [record.getMessage() for record in caplog.records if "ReportSink failed" in record.getMessage()] == [
        "ReportSink failed and is switched off; the run goes on: OSError: no room"
    ]


def test_a_run_that_never_began_writes_none():
    written = Writing()
    written.sink.close()
    assert written.lives == []
