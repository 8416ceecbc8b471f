"""events.jsonl: what happened in a run, a line an event, over all its starts. Steps are in metrics.jsonl.

Nothing is cut back when a run goes on from an earlier step: that it did, and what failed before, is worth knowing.
A reader finds the lines that no longer hold with `abandoned`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from sana_tune.progress import Progress
from sana_tune.watch.events import CacheProgress, Event, Previewed, Started, Stepped, Validated

FILE, PREVIEWS = "events.jsonl", "previews"
_PATHS = frozenset({"files", "path", "removed", "sheet", "pipeline", "resumed_from"})
# What an event says of the model at its step: no longer true once the run went back to before it.
_OF_A_STEP = frozenset({"validated", "previewed", "measured", "saved", "finished"})


def now() -> str:
    """The time, in UTC, to the second: 2026-01-31T12:00:00Z."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def line_of(event: Event, root: Path, last: Progress, time: str) -> dict[str, Any]:
    """The plain values of one line: event, time, step, epoch, images, then the event's own.

    last: where the run stands, for events that do not know. Paths inside of the run's folder `root` are told from
    there, so that it can be moved. Numbers that are not finite become null. A preview's picture is not in the line.
    """
    progress = last
    own: dict[str, Any] = {}
    for field in fields(event):
        value = vars(event)[field.name]
        if isinstance(value, Progress):
            progress = value
        elif field.name in _PATHS:
            own[field.name] = _moved(value, root)
        elif not isinstance(value, bytes):
            own[field.name] = _plain(value)
    place = {"step": progress.step, "epoch": round(progress.epoch, 6), "images": progress.images}
    return {"event": type(event).__name__.lower(), "time": time, **place, **own}


def _moved(value: Any, root: Path) -> Any:
    if isinstance(value, str):
        path, base = os.path.abspath(value), os.path.join(os.path.abspath(root), "")
        return path[len(base) :].replace(os.sep, "/") if value and path.startswith(base) else value
    return [_moved(each, root) for each in value] if isinstance(value, (tuple, list)) else value


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


class EventsSink:
    """Appends every event to events.jsonl of the run's folder and flushes it; steps and caches are told elsewhere.

    A validation that was not due says nothing either.

    The pictures of previews become files in previews/, of the newest step alone: when they are finished, they are in
    validation_images.
    """

    def __init__(self, root: Path, clock: Callable[[], str] = now):
        self.root = root
        self._clock = clock
        self._file: TextIO | None = None
        self._last = Progress()

    def emit(self, event: Event) -> None:
        """Write one line. Raises OSError when the disk does not take it."""
        if isinstance(event, CacheProgress):
            return
        if isinstance(event, Stepped | Started):
            self._last = event.progress
        if isinstance(event, Stepped) or (isinstance(event, Validated) and not event.files and not event.failed):
            return
        line = line_of(event, self.root, self._last, self._clock())
        if isinstance(event, Previewed):
            line["file"] = self._keep(event)
        file = self._open()
        file.write(json.dumps(line, ensure_ascii=False) + "\n")
        file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self) -> TextIO:
        """The file, at the start of a line: a kill may have torn the last one."""
        if self._file is None:
            self.root.mkdir(parents=True, exist_ok=True)
            path = self.root / FILE
            torn = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
            self._file = open(path, "a", encoding="utf-8")
            if torn:
                self._file.write("\n")
        return self._file

    def _keep(self, event: Previewed) -> str:
        """Write the picture's file. Answers its path from the run's folder."""
        folder, begin = self.root / PREVIEWS, f"step_{event.progress.step}_"
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.iterdir():
            if not old.name.startswith(begin):
                old.unlink()
        name = f"{begin}{event.prompt}_{event.sampler_step}_of_{event.sampler_steps}.png"
        aside = folder / f"{name}.tmp"
        aside.write_bytes(event.picture)
        os.replace(aside, folder / name)
        return f"{PREVIEWS}/{name}"


def read(path: Path) -> list[dict[str, Any]]:
    """The whole lines of an events.jsonl, in order; torn ones are left out."""
    if not path.exists():
        return []
    found = []
    for text in path.read_text(encoding="utf-8", errors="replace").split("\n"):  # splitlines() knows more ends
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(line, dict) and isinstance(line.get("event"), str) and isinstance(line.get("step"), int):
            found.append({"time": "", **line})
    return found


def abandoned(lines: Sequence[Mapping[str, Any]]) -> list[bool]:
    """For each line, whether it tells of a step that the run later did anew, having gone back to before it."""
    found, reached = [], math.inf
    for line in reversed(lines):
        found.append(line["event"] in _OF_A_STEP and line["step"] > reached)
        if line["event"] == "started":
            reached = min(reached, line["step"])
    return found[::-1]
