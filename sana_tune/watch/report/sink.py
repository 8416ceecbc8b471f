"""Keeps report.html fresh during a run: on a thread of its own, so seldom that the steps do not feel it."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from sana_tune.watch.events import CacheProgress, Event, Measured, Previewed, Started, Stepped, Validated

EVERY_S = 15.0
SHARE = 0.004  # of the time is spent on writing it at most


class Writer(Protocol):
    """Writes the report; page.Reporter."""

    def write(self, path: Path, *, live: bool = False) -> None: ...


class ReportSink:
    """Writes the report at the start, now and then, when there is something new to see, and at the end.

    It reads what the other sinks have written, so it stands after them. What goes wrong on the thread is raised by the
    next event: a sink that raises is told and dropped.
    """

    def __init__(self, writer: Writer, path: Path, now: Callable[[], float] = time.monotonic):
        self.path = path
        self._writer, self._now = writer, now
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="report")
        self._job: Future[float] | None = None
        self._due_s = 0.0
        self._heard = False

    def emit(self, event: Event) -> None:
        """Have it written when it is time. Raises what the last writing raised."""
        if isinstance(event, CacheProgress):
            return
        self._heard = True
        if self._job is not None:
            if not self._job.done():
                return
            took_s, self._job = self._job.result(), None
            self._due_s = self._now() + max(EVERY_S, took_s / SHARE)
        seen = isinstance(event, Validated | Measured | Previewed) and self._due_s - self._now() < EVERY_S
        if isinstance(event, Started) or (isinstance(event, Stepped) and self._now() >= self._due_s) or seen:
            self._job = self._thread.submit(self._write)

    def close(self) -> None:
        """Wait for the thread, and write the report of what has become of the run."""
        self._thread.shutdown(wait=True)
        if self._heard:
            self._writer.write(self.path)

    def _write(self) -> float:
        """Write it; how long that took, s."""
        begun_s = self._now()
        self._writer.write(self.path, live=True)
        return self._now() - begun_s
