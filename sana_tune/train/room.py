"""Room on the disk before a checkpoint is written: what must be free, and what is done where it is not. Torch-free."""

from __future__ import annotations

import errno
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sana_tune.config.values import disk_bytes

# A disk that is full, or the share of it that this user may fill.
FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_SLICE_S = 0.1  # how soon a wait notices that the run is to stop

Action = Literal["wait", "stop", "script"]


def is_full(error: BaseException | None) -> bool:
    """Whether a write failed for want of room."""
    return isinstance(error, OSError) and error.errno in FULL


@dataclass(frozen=True)
class Lack:
    """There is too little room: what is free (with what is about to be removed), and what must be."""

    free_bytes: int
    needed_bytes: int
    why: str


@dataclass(frozen=True)
class Room:
    """What must be free before a checkpoint is written, and what to do otherwise.

    threshold: as values.parse_disk_size takes it; None = the checkpoint's size alone. script: of the action of that
    name. look_s: seconds between two looks at a full disk; retry_s: before a write is tried again that failed though
    the disk tells of room (a quota); tell_s: between two messages.
    """

    threshold: str | None = None
    action: Action = "wait"
    script: str | None = None
    look_s: float = 1.0
    retry_s: float = 30.0
    tell_s: float = 1800.0

    def lack(self, folder: Path, size_bytes: int, freed_bytes: int = 0) -> Lack | None:
        """What is missing for a checkpoint of a size; None = there is room.

        freed_bytes: of checkpoints that are removed before it is written.
        """
        disk = shutil.disk_usage(folder)
        threshold = 0 if self.threshold is None else disk_bytes(self.threshold, disk.total)
        free = disk.free + freed_bytes
        if free >= max(size_bytes, threshold):
            return None
        why = f"disk_low_threshold {self.threshold}" if threshold > size_bytes else "its size"
        return Lack(free, max(size_bytes, threshold), why)


def call_script(command: str, folder: Path, lack: Lack, stopping: Callable[[], bool]) -> str | None:
    """Run the command that makes room and wait for it. Answers what went wrong, or None.

    It sees SANA_TUNE_OUTPUT_DIR, SANA_TUNE_FREE_BYTES and SANA_TUNE_NEEDED_BYTES. A run that is to stop ends it.
    """
    told = {
        "SANA_TUNE_OUTPUT_DIR": str(folder),
        "SANA_TUNE_FREE_BYTES": str(lack.free_bytes),
        "SANA_TUNE_NEEDED_BYTES": str(lack.needed_bytes),
    }
    try:
        child = subprocess.Popen(shlex.split(command), env={**os.environ, **told}, stdin=subprocess.DEVNULL)
    except (OSError, ValueError) as error:
        return f"cannot be started: {error}"
    try:
        while child.poll() is None:
            if stopping():
                return "was ended, since the run is to stop"
            time.sleep(_SLICE_S)
    finally:
        if child.poll() is None:
            child.terminate()
            child.wait()
    return f"ended with exit code {child.returncode}" if child.returncode else None


def slices(seconds: float) -> Iterator[None]:
    """Wait so long, giving a turn every moment."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        time.sleep(min(_SLICE_S, left))
        yield
