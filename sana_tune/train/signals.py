"""How a run is asked to stop: SIGINT (Ctrl-C) and SIGTERM, handled in one place and given back afterwards.

While nothing needs finishing (loading, caching), a signal leaves at once. While training, the first one is
noted, so that the step can be finished and saved; the second leaves at once; a third kills the process. A SIGTERM
right after another one counts as the same.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from sana_tune.errors import Interrupted
from sana_tune.ranks import Rank, Repeats, own_rank

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class LeaveNow(KeyboardInterrupt):
    """A signal asked to leave at once. A KeyboardInterrupt, so that no `except Exception` holds it up."""

    def __init__(self, signal_number: int):
        self.signal_number = signal_number
        super().__init__(f"left at once on signal {signal_number}")

    @property
    def exit_code(self) -> int:
        return 128 + self.signal_number


class Stop:
    """Whether the run was asked to stop.

    with Stop().listening() as stop:      # a signal raises LeaveNow in here ...
        with stop.deferred():             # ... but in here the first one only sets stop.requested
            ...
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._deferred = False
        self._repeats = Repeats()
        self._before: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        """A stop was asked for and not yet obeyed."""
        return self.signal_number is not None

    @property
    def reason(self) -> str:
        """The signal's name, such as SIGINT; empty when none was asked for."""
        return signal.Signals(self.signal_number).name if self.signal_number is not None else ""

    def request(self, signal_number: int = signal.SIGTERM) -> None:
        """Ask for a stop without a signal (another process was asked)."""
        self.signal_number = int(signal_number)
        self._repeats.expect(self.signal_number)

    def interrupted(self) -> Interrupted:
        """What to raise once all is saved. Raises RuntimeError when no stop was asked for."""
        if self.signal_number is None:
            raise RuntimeError("the steps ended before the last one, though nobody asked for a stop")
        return Interrupted(self.signal_number)

    @contextmanager
    def listening(self) -> Iterator[Stop]:
        """Handle the signals in here and give the former handlers back. Elsewhere than on the main thread,
        where Python allows no handlers, nothing is installed."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        try:
            yield self
        finally:
            self._give_back()

    @contextmanager
    def deferred(self) -> Iterator[Stop]:
        """In here the first signal is noted in `requested` and the second one leaves at once."""
        before, self._deferred = self._deferred, True
        try:
            yield self
        finally:
            self._deferred = before

    def _give_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._before = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._repeats.has(number):
            return
        if self._deferred and not self.requested:
            self.signal_number = number
            if (own_rank() or Rank()).is_main:
                _tell("\nasked to stop: this step is finished and saved; once more leaves at once\n")
            return
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, self._kill)
        raise LeaveNow(number)

    def _kill(self, number: int, frame: FrameType | None) -> None:
        if not self._repeats.has(number):
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def _tell(text: str) -> None:
    """Write to standard error, past Python's buffers: a handler may have interrupted a print."""
    try:
        os.write(2, text.encode())
    except OSError:
        pass  # nobody is listening
