"""What stands before every update of weights and states while they are being copied."""

from __future__ import annotations

import threading


class Fence:
    """Stands before every update of weights and states: they move only when what is copied of them is there."""

    def __init__(self) -> None:
        self._copied: threading.Event | None = None

    def raise_until(self, copied: threading.Event) -> None:
        """Nothing moves until the event is set."""
        self._copied = copied

    def wait(self) -> None:
        """To be called right before anything moves."""
        if self._copied is not None:
            while not self._copied.wait(0.2):  # a signal that another thread received is heard between two waits
                pass
            self._copied = None
