"""metrics.jsonl: one line a step, and how it is cut back when a run resumes at an earlier step."""

from __future__ import annotations

import errno
import json
import math
from collections.abc import Sequence
from io import FileIO
from pathlib import Path
from typing import Any

from sana_tune.store import write_atomically
from sana_tune.watch.events import Stepped

_NAMES = {"train": "loss_train", "regularise": "loss_regularisation"}
_LONGEST_LINE = 700  # bytes, about twice what a line takes
SIGMA_BINS = 10  # of equal width, 0 to 1


def line_of(event: Stepped) -> dict[str, Any]:
    """The values of one line. Numbers that are not finite become null (JSON knows neither NaN nor infinity).

    loss is what the step minimised. Where there is regularisation data, loss_train and loss_regularisation are its two
    parts, each in the steps that had such pictures. lr is the rate used by this step; step_s includes data_wait_s;
    images_s = images / step_s. memory_bytes: the most that was in use so far. by_sigma: the losses by noise level, see
    `binned`. Both only where they are known.
    """
    line: dict[str, Any] = {
        "step": event.progress.step,
        "epoch": round(event.progress.epoch, 6),
        "loss": _finite(event.loss),
        "lr": event.learning_rate,
        "grad_norm": _finite(event.grad_norm),
        "step_s": round(event.step_s, 6),
        "data_wait_s": round(event.data_wait_s, 6),
        "images_s": round(event.images / event.step_s, 3) if event.step_s > 0 else None,
    }
    line |= {_NAMES[role]: _finite(loss) for role, loss in event.losses.items()}
    if event.memory_bytes is not None:
        line["memory_bytes"] = event.memory_bytes
    if levels := binned(event.by_sigma):
        line["by_sigma"] = levels
    if event.skipped:
        line["skipped"] = True
    return line


def binned(by_sigma: Sequence[tuple[float, float]]) -> list[list[float]]:
    """(noise level, loss) pairs as [bin, how many, mean loss] of each of the ten bins that has any.

    A line stays short whatever the batch is. Losses that are not finite are left out.
    """
    bins: dict[int, list[float]] = {}
    for sigma, loss in by_sigma:
        if math.isfinite(loss) and math.isfinite(sigma):
            bins.setdefault(min(max(int(sigma * SIGMA_BINS), 0), SIGMA_BINS - 1), []).append(loss)
    return [[place, len(found), float(f"{math.fsum(found) / len(found):.5g}")] for place, found in sorted(bins.items())]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def read(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics file, in order; a torn line (the writer was killed in it) is left out."""
    if not path.exists():
        return []
    return _whole(path.read_text(encoding="utf-8", errors="replace"))


def _whole(content: str) -> list[dict[str, Any]]:
    found = []
    for text in content.splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            found.append(line)
    return found


def last_lines(path: Path, count: int) -> list[dict[str, Any]]:
    """About the last `count` whole lines, at most: as `read`, but of a long file its end alone is looked at."""
    if not path.exists():
        return []
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - count * _LONGEST_LINE))
        text = file.read().decode("utf-8", errors="replace")
    return _whole(text)[-count:]


class Metrics:
    """Appends lines to a metrics.jsonl, each at once, so that a killed run keeps all it did.

    What a full disk does not take is held back and written with a later line.
    """

    def __init__(self, path: Path):
        self.path = path
        self._file: FileIO | None = None
        self._waiting = b""

    def cut_back_to(self, step: int) -> None:
        """Drop the lines after `step`, and torn ones. A kill leaves the old file or the new one."""
        self.close()
        self._waiting = b""
        if not self.path.exists():
            return
        kept = [line for line in read(self.path) if line["step"] <= step]
        write_atomically(self.path, "".join(json.dumps(line) + "\n" for line in kept).encode("utf-8"))

    def append(self, event: Stepped) -> None:
        """Write one step's line. Raises OSError when the disk does not take it for another reason than its size."""
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "ab", buffering=0)
        self._waiting += (json.dumps(line_of(event)) + "\n").encode("utf-8")
        self._write(self._file)

    def _write(self, file: FileIO) -> None:
        try:
            while self._waiting:
                self._waiting = self._waiting[file.write(self._waiting) :]
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise

    def close(self) -> None:
        """Close the file; a later append opens it again."""
        if self._file is not None:
            self._write(self._file)
            self._file.close()
            self._file = None
