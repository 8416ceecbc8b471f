"""Whether the other processes of a run live: known at once on this machine, within minutes on others. No torch.

A process that waits for a value in the store is told by nobody that the one who should set it is gone.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from dataclasses import asdict, dataclass
from typing import Protocol

import psutil

EVERY_S = 5.0
SILENT_S = 300.0  # a beat may be late while Python's lock is held, by reading a large file over a network, say


class Store(Protocol):
    """What is needed of torch.distributed's stores. clone: the same store for another thread."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...
    def check(self, keys: list[str]) -> bool: ...
    def clone(self) -> Store: ...


@dataclass(frozen=True)
class Place:
    """Where a process lives. machine: a name that is the same where process ids are. born_s: tells it from a later one
    of the same id."""

    machine: str
    pid: int
    born_s: float

    @classmethod
    def own(cls) -> Place:
        """That of this process."""
        pid = os.getpid()
        return cls(_machine(), pid, psutil.Process(pid).create_time())

    @property
    def is_here(self) -> bool:
        """Whether this process can see whether that one lives."""
        return self.machine == _machine()

    @property
    def lives(self) -> bool:
        """Whether the process is there; it must be here. A zombie is not."""
        try:
            process = psutil.Process(self.pid)
            return process.create_time() == self.born_s and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False
        except psutil.AccessDenied:
            return True


class Pulse:
    """A beat of this process every few seconds, by a thread, and a look at those of others."""

    def __init__(self, rank: int, store: Store):
        self._store = store
        self._over = threading.Event()
        self._heard: dict[int, tuple[bytes, float]] = {}
        store.set(f"place/{rank}", json.dumps(asdict(Place.own())))
        store.set(f"pulse/{rank}", "0")
        arguments = (store.clone(), f"pulse/{rank}")
        self._thread = threading.Thread(target=self._beat, args=arguments, name="pulse", daemon=True)
        self._thread.start()

    def _beat(self, store: Store, key: str) -> None:
        beats = 0
        while not self._over.wait(EVERY_S):
            beats += 1
            try:
                store.set(key, str(beats))
            except RuntimeError:  # the store is gone with the process that held it: who waits is told that
                return

    def death(self, rank: int) -> str | None:
        """How it is known that another process lives no more; None = it does, or has not begun."""
        if not self._store.check([f"place/{rank}"]):
            return None
        place = Place(**json.loads(self._store.get(f"place/{rank}")))
        if place.is_here:
            return None if place.lives else f"rank {rank} (process {place.pid}) has ended"
        beat, now = self._store.get(f"pulse/{rank}"), time.monotonic()
        before, since_s = self._heard.get(rank, (b"", now))
        self._heard[rank] = (beat, since_s if beat == before else now)
        if now - self._heard[rank][1] <= SILENT_S:
            return None
        machine = place.machine.partition(" ")[0]
        return f"rank {rank} (process {place.pid} on {machine}) shows no sign of life for {SILENT_S / 60:.0f} min"

    def end(self) -> None:
        """No more beats."""
        self._over.set()
        self._thread.join(1)


def _machine() -> str:
    """Containers may share a host's name and count processes each for itself; Linux tells them apart."""
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()
