"""A run's folder as values: what the report is made from. Whatever is missing or torn is left out, never an error.

A reader keeps what it parsed of metrics.jsonl, so that a report during the run costs what is new alone.
"""

from __future__ import annotations

import json
import os
import re
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sana_tune.watch import journal
from sana_tune.watch.metrics import SIGMA_BINS

METRICS, ENVIRONMENT, PROMPTS = "metrics.jsonl", "environment.json", "prompts.json"
FIRST_BATCHES = "first_batches"
COLUMNS = (
    "step", "epoch", "loss", "loss_train", "loss_regularisation", "lr", "grad_norm", "step_s", "data_wait_s",
    "images_s", "memory_bytes", "skipped",
)  # fmt: skip
# step_<step>_<slug>_<i>_<WxH>[_ema].<ext> (contracts §8)
_PICTURE = re.compile(
    r"step_(?P<step>\d+)_(?P<slug>.+)_(?P<index>\d+)_(?P<width>\d+)x(?P<height>\d+)(?P<ema>_ema)?\.(?:png|webp|jpe?g)"
)


class Picture(NamedTuple):
    """One validation picture. view: "raw" or "ema"; at step 0 it is the base model's."""

    slug: str
    nth: int
    width_px: int
    height_px: int
    step: int
    view: str
    path: Path


@dataclass(frozen=True, eq=False)
class Metrics:
    """metrics.jsonl by columns of one length, NaN where a line has no such number.

    levels: [entries, 4] of by_sigma: number of the line, bin, how many, mean loss.
    """

    columns: Mapping[str, np.ndarray]
    levels: np.ndarray

    @property
    def count(self) -> int:
        return len(self.columns["step"])

    @property
    def last_step(self) -> int:
        return int(self.columns["step"][-1]) if self.count else 0

    def has(self, name: str) -> bool:
        """Whether any line has that number."""
        return bool(np.isfinite(self.columns[name]).any())


@dataclass(frozen=True)
class Run:
    """A run's folder at one moment. name: the folder's. events: each with "abandoned" beside its own values."""

    name: str
    root: Path
    metrics: Metrics
    events: Sequence[Mapping[str, Any]]
    pictures: Sequence[Picture]
    config: Mapping[str, Any]
    plan: Mapping[str, Any]
    ledger: Mapping[str, Any]
    environment: Mapping[str, Any]
    prompts: Mapping[str, Mapping[str, str]]
    first_batches: Sequence[Mapping[str, Any]]

    def of(self, kind: str) -> list[Mapping[str, Any]]:
        """The events of a kind that still hold."""
        return [line for line in self.events if line["event"] == kind and not line["abandoned"]]

    @property
    def last_step(self) -> int:
        """The last step that is known of."""
        return max([self.metrics.last_step, *(line["step"] for line in self.events[-1:])])


class Reader:
    """Reads one run's folder, again and again."""

    def __init__(self, root: Path):
        self.root = root
        self._lines = _Lines(root / METRICS)

    def read(self) -> Run:
        """What is there now."""
        lines = journal.read(self.root / journal.FILE)
        gone = journal.abandoned(lines)
        events = [{**line, "abandoned": old} for line, old in zip(lines, gone, strict=True)]
        metrics = self._lines.read()
        last = max([metrics.last_step, *(line["step"] for line in events[-1:])])
        return Run(
            name=self.root.resolve().name,
            root=self.root,
            metrics=metrics,
            events=events,
            pictures=pictures_of(self.root / "validation_images", last if metrics.count or events else None),
            config=_json(self.root / "config.json"),
            plan=_json(self.root / "plan.json"),
            ledger=_json(self.root / "ledger.json"),
            environment=_json(self.root / ENVIRONMENT),
            prompts={slug: told for slug, told in _json(self.root / PROMPTS).items() if isinstance(told, dict)},
            first_batches=_first_batches(self.root / FIRST_BATCHES / "index.json"),
        )


class _Lines:
    """The lines of a metrics.jsonl, parsed once each; from the start again when the file was replaced."""

    def __init__(self, path: Path):
        self._path = path
        self._forget()

    def _forget(self) -> None:
        self._mark, self._offset = -1, 0
        self._columns = {name: array("d") for name in COLUMNS}
        self._levels = array("d")

    def read(self) -> Metrics:
        try:
            with open(self._path, "rb") as file:
                status = os.fstat(file.fileno())
                if status.st_ino != self._mark or status.st_size < self._offset:
                    self._forget()
                    self._mark = status.st_ino
                file.seek(self._offset)
                whole = file.read()
        except OSError:
            self._forget()
            whole = b""
        whole = whole[: whole.rfind(b"\n") + 1]  # a line is written as it is read: its end comes next time
        self._offset += len(whole)
        for text in whole.split(b"\n"):
            self._add(text)
        columns = {name: np.array(column) for name, column in self._columns.items()}
        return Metrics(columns, np.array(self._levels).reshape(-1, 4))

    def _add(self, text: bytes) -> None:
        try:
            line = json.loads(text)
        except ValueError:
            return
        if not isinstance(line, dict) or not isinstance(line.get("step"), int):
            return
        row = len(self._columns["step"])
        for name, column in self._columns.items():
            column.append(_number(line.get(name)))
        for entry in line.get("by_sigma") or ():
            place, count, loss = map(_number, entry)
            if 0 <= place < SIGMA_BINS:
                self._levels.extend((row, place, count, loss))


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else float("nan")


def pictures_of(folder: Path, last_step: int | None = None) -> list[Picture]:
    """The validation pictures of a folder by their names, in order. last_step: those after it are of a run that went
    back; None = all."""
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return []
    matches = ((name, _PICTURE.fullmatch(name)) for name in names)
    found = [
        Picture(
            match["slug"],
            int(match["index"]),
            int(match["width"]),
            int(match["height"]),
            int(match["step"]),
            "ema" if match["ema"] else "raw",
            folder / name,
        )
        for name, match in matches
        if match
    ]
    return sorted(each for each in found if last_step is None or each.step <= last_step)


def is_run(folder: Path) -> bool:
    """Whether a run has left anything in that folder."""
    return any((folder / name).is_file() for name in (METRICS, journal.FILE, "plan.json"))


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _first_batches(path: Path) -> list[dict[str, Any]]:
    content = _json(path).get("pictures")
    return [each for each in content if isinstance(each, dict)] if isinstance(content, list) else []
