"""Patience with what is far away: tries again, waits longer each time, and gives up with a reason. No torch."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar, runtime_checkable

Value = TypeVar("Value")
Sleep = Callable[[float], object]


@dataclass(frozen=True)
class Patience:
    """How long to put up with a store or a server.

    tries: attempts in all. first_wait_s: before the second one; each wait is twice the last, up to longest_wait_s.
    connect_s, read_s: how long to wait for a connection, and for the next bytes.
    """

    tries: int = 5
    first_wait_s: float = 0.5
    longest_wait_s: float = 60.0
    connect_s: float = 10.0
    read_s: float = 30.0

    def wait_s(self, failures: int) -> float:
        """How long to wait after so many failures, at least one, in a row."""
        return min(self.longest_wait_s, self.first_wait_s * 2 ** (failures - 1))


PATIENCE = Patience()


class Passing(Exception):
    """A failure that may pass: the same request may succeed in a while.

    reason completes "it cannot be read: …". wait_s: what the server asks for, if it does.
    """

    def __init__(self, reason: str, wait_s: float | None = None):
        self.reason, self.wait_s = reason, wait_s
        super().__init__(reason)


class GaveUp(Exception):
    """It failed to the last try, or the server asks for more patience than there is."""

    def __init__(self, reason: str, tries: int):
        self.reason, self.tries = reason, tries
        super().__init__(f"{reason} (tried {tries} times)" if tries > 1 else reason)


class Rest:
    """Waits that end when somebody is in a hurry, for good."""

    def __init__(self) -> None:
        self._hurry = threading.Event()

    def __call__(self, seconds: float) -> None:
        """Wait. Raises GaveUp once there is a hurry."""
        if self._hurry.wait(max(0.0, seconds)):
            raise GaveUp("it was interrupted", 1)

    def hurry(self) -> None:
        """End all waits: the program was interrupted."""
        self._hurry.set()


@runtime_checkable
class Resting(Protocol):
    """A store whose reads may wait before they try again."""

    rest: Rest


def persist(action: Callable[[], Value], patience: Patience = PATIENCE, sleep: Sleep = time.sleep) -> Value:
    """What `action` answers; it is tried again after each Passing. Raises GaveUp, and whatever else it raises."""
    failures = 0
    while True:
        try:
            return action()
        except Passing as error:
            failures += 1
            wait_s = max(patience.wait_s(failures), error.wait_s or 0.0)
            if error.wait_s is not None and error.wait_s > patience.longest_wait_s:
                raise GaveUp(f"{error.reason}, and asks for {error.wait_s:.0f} s of patience", failures) from error
            if failures >= patience.tries:
                raise GaveUp(error.reason, failures) from error
            sleep(wait_s)
