"""Whether the other processes of a run live: known at once on this machine, within minutes on others. No torch.

A process that waits for a value in the store is told by nobody that the one who should set it is gone.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
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
    """Where a process lives. host: its machine's name. ids: the same where process ids mean the same."""

    host: str
    ids: str
    pid: int

    @classmethod
    def own(cls) -> Place:
        """That of this process."""
        return cls(socket.gethostname(), _ids(), os.getpid())

    @property
    def is_here(self) -> bool:
        """Whether this process can see whether that one lives."""
        return self.ids == _ids()

    @property
    def lives(self) -> bool:
        """Whether the process is there; it must be here. A zombie is not.

        It may be a later one of the same id: then nothing is noticed at once. When it began does not tell, since
        processes do not agree on that where the clock is set meanwhile.
        """
        try:
            return psutil.Process(self.pid).status() != psutil.STATUS_ZOMBIE
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
        self._thread = threading.Thread(target=self._beat, args=(f"pulse/{rank}",), name="pulse", daemon=True)
        self._thread.start()

    def _beat(self, key: str) -> None:
        # In this thread, since it connects once more, and for as long as a collective may take: a process that died
        # just now, and held the store, would keep the run waiting.
        beats = 0
        try:
            store = self._store.clone()
            while not self._over.wait(EVERY_S):
                beats += 1
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
        return f"rank {rank} (process {place.pid} on {place.host}) shows no sign of life for {SILENT_S / 60:.0f} min"

    def end(self) -> None:
        """No more beats."""
        self._over.set()
        self._thread.join(1)


@cache
def _ids() -> str:
    """Names may be the same on several machines, and containers of one count processes each for itself: Linux tells
    its boots and its namespaces apart."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()} {uuid.getnode()}"
