"""Work that a run does not wait for: one thread with a bounded queue, and tries with waits between them.

What a job raises is handed to whoever made the worker: an upload or a message that fails must not stop a run, so this
is, beside the sinks, a place where a broad `except` is right.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Job = Callable[[], None]
_LOOKS_EVERY_S = 0.1  # a signal is heard between two looks


@dataclass(frozen=True)
class _Waiting:
    job: Job
    key: str | None
    passing: bool


class Worker:
    """Does jobs in order on a thread of its own. `put` takes microseconds.

    longest: jobs that may wait. failed: called on that thread with what a job raised. hurry is set when the end is
    near: jobs that wait for something look at it.
    """

    def __init__(self, name: str, longest: int, failed: Callable[[Exception], None]):
        self._name, self._longest, self._failed = name, longest, failed
        self._waiting: deque[_Waiting] = deque()
        self._changed = threading.Condition()
        self._busy = self._ended = False
        self._thread: threading.Thread | None = None
        self.hurry = threading.Event()

    def put(self, job: Job, *, key: str | None = None, passing: bool = False) -> bool:
        """Queue a job; False when there is no room, or the worker has ended.

        key: a waiting job of the same key gives way to this one. passing: gives way to others when the queue is full.
        """
        new = _Waiting(job, key, passing)
        with self._changed:
            if self._ended:
                return False
            if key is not None and self._replace(new):
                return True
            if len(self._waiting) >= self._longest and not self._make_room():
                return False
            self._waiting.append(new)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
                self._thread.start()
            self._changed.notify_all()
        return True

    def drain(self, limit_s: float | None = None) -> bool:
        """Wait until all is done, for `limit_s` at most (None: as long as it takes). Whether all was done."""
        end_s = None if limit_s is None else time.monotonic() + limit_s
        with self._changed:
            while self._waiting or self._busy:
                left_s = _LOOKS_EVERY_S if end_s is None else min(_LOOKS_EVERY_S, end_s - time.monotonic())
                if left_s <= 0:
                    return False
                self._changed.wait(left_s)
        return True

    def finish(self, limit_s: float | None = None) -> bool:
        """As `drain`, and end: what still waits then is not done."""
        done = self.drain(limit_s)
        with self._changed:
            self._ended = True
            self._waiting.clear()
            self._changed.notify_all()
        self.hurry.set()
        return done

    @property
    def pending(self) -> int:
        """Jobs that are not done yet."""
        with self._changed:
            return len(self._waiting) + self._busy

    def _replace(self, new: _Waiting) -> bool:
        for place, waiting in enumerate(self._waiting):
            if waiting.key == new.key:
                self._waiting[place] = new
                return True
        return False

    def _make_room(self) -> bool:
        for waiting in self._waiting:
            if waiting.passing:
                self._waiting.remove(waiting)
                return True
        return False

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._waiting:
                    if self._ended:
                        return
                    self._changed.wait()
                job, self._busy = self._waiting.popleft().job, True
            try:
                job()
            except Exception as error:
                self._failed(error)
            finally:
                with self._changed:
                    self._busy = False
                    self._changed.notify_all()


def attempt(work: Job) -> Exception | None:
    """Do it; what it raised, or None."""
    try:
        work()
    except Exception as error:
        return error
    return None


def persist(
    work: Job,
    waits_s: Sequence[float],
    hurry: threading.Event,
    is_final: Callable[[Exception], bool],
    told: Callable[[Exception, float], None] = lambda error, wait_s: None,
) -> None:
    """Do it, and again after each of the waits while it raises. The last error goes through.

    is_final: errors that trying again does not mend. hurry: when it is set, waits are over at once. told: hears of
    every failure that is tried again, and of the wait.
    """
    for wait_s in waits_s:
        try:
            return work()
        except Exception as error:
            if is_final(error):
                raise
            told(error, wait_s)
        hurry.wait(wait_s)
    return work()
