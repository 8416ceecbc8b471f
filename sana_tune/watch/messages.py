"""What a run says to the outside, as values: an event becomes messages in words and in fields for machines. Pure."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sana_tune.progress import Progress
from sana_tune.watch.events import (
    CacheProgress,
    Event,
    Failed,
    Finished,
    Measured,
    Noticed,
    Previewed,
    Saved,
    Started,
    Stepped,
    Stopped,
    Validated,
)
from sana_tune.watch.metrics import line_of
from sana_tune.watch.sinks import CACHE_TITLES, Meter, message_of

_STAGES = {"text": "init_text_embed_cache", "latents": "init_vae_cache"}


@dataclass(frozen=True)
class Attachment:
    """A picture: its file name and its bytes, or the path where they are."""

    name: str
    content: bytes | Path = field(repr=False)

    def read(self) -> bytes:
        """The bytes. Raises OSError when the file is gone."""
        return self.content.read_bytes() if isinstance(self.content, Path) else self.content


@dataclass(frozen=True)
class Message:
    """One message.

    kind: its type for machines, such as training.status. text: what a person reads. fields: what the type has beside
    what every message has. status: one of many of its kind, of which only the newest counts; people do not get it.
    key: of a status, what it is the status of.
    """

    kind: str
    severity: str
    title: str
    text: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    pictures: tuple[Attachment, ...] = ()
    status: bool = False
    key: str = ""
    passing: bool = False


class Teller:
    """Turns the events of a run into messages; remembers how long the run is and how fast."""

    def __init__(self, run: str):
        self._run, self._total_steps, self._meter = run, 0, Meter()

    def greeting(self) -> Message:
        """The first message: that messages arrive."""
        return Message("notification", "info", "sana_tune", f"Messages of the run {self._run} come here")

    def messages(self, event: Event) -> list[Message]:
        """What is to be said of an event; nothing of some."""
        match event:
            case CacheProgress() if event.total:
                return [self._caching(event)]
            case Stepped():
                return self._stepped(event)
            case Previewed():
                return [self._previewed(event)]
            case Validated() if event.files or event.failed:
                return [self._validated(event)]
            case Saved():
                label = Path(event.path).name
                is_final = bool(self._total_steps) and event.progress.step >= self._total_steps
                fields = {"checkpoint": {"path": event.path, "label": label, "is_final": is_final}}
                return [self._said("training.checkpoint", event, "Checkpoint", fields)]
            case Measured() if event.values:
                data = {"step": event.progress.step, "values": _finite(event.values), "advice": list(event.advice)}
                return [self._said("notification", event, "Measured", {"data": data})]
            case Noticed(message=text, severity=severity):
                kind = "error" if severity == "error" else "notification"
                return [Message(kind, severity, "Notice", text, {"data": {"step": event.progress.step}})]
            case Failed(message=text):
                stage = _stage("training_abort", "Training", "failed", self._meter.last_step, self._total_steps)
                status = Message("lifecycle.stage", "error", "Failed", "The run failed", stage, status=True, key="end")
                return [Message("error", "error", "Failed", f"The run failed: {text}"), status]
            case Started() | Finished() | Stopped():
                return self._turned(event)
        return []

    def _turned(self, event: Started | Finished | Stopped) -> list[Message]:
        """The run begins or ends."""
        if isinstance(event, Started):
            self._total_steps = event.total_steps
            status, title = ("resumed" if event.resumed_from else "running"), "Training"
        else:
            status, title = ("completed", "Finished") if isinstance(event, Finished) else ("stopped", "Stopped")
        said = [self._said("training.status", event, title, self._status(event.progress, status, {}))]
        if isinstance(event, Started) and event.resumed_from:
            stage = _stage("init_resume_checkpoint", "Resuming", "completed", 1, 1)
            said.append(Message("lifecycle.stage", "info", title, "Resumed", stage, status=True, key="resume"))
        elif not isinstance(event, Started):
            name, how = ("training_complete", "completed") if status == "completed" else ("training_abort", "failed")
            stage = _stage(name, title, how, event.progress.step, self._total_steps)
            said.append(Message("lifecycle.stage", "info", title, title, stage, status=True, key="end"))
        return said

    def _said(self, kind: str, event: Event, title: str, fields: Mapping[str, Any]) -> Message:
        """A message in the words of the log."""
        return Message(kind, "info", title, message_of(event) or title, fields)

    def count(self, event: Stepped) -> None:
        """Take a step into the means without saying anything of it."""
        self._meter.add(event)

    def _stepped(self, event: Stepped) -> list[Message]:
        self._meter.add(event)
        step = event.progress.step
        metrics = {name: value for name, value in line_of(event).items() if name != "step" and value is not None}
        fields = self._status(event.progress, "running", metrics)
        text = f"Step {step} of {self._total_steps}: {self._meter.numbers}"
        found = [Message("training.status", "info", "Training", text, fields, status=True, key="step")]
        if event.skipped:
            skipped = f"Step {step} was skipped: its loss or gradient norm is not finite"
            found.append(Message("notification", "warning", "Step skipped", skipped, passing=True))
        return found

    def _status(self, progress: Progress, status: str, metrics: Mapping[str, Any]) -> dict[str, Any]:
        step, total = progress.step, self._total_steps
        shown = {
            "current": step,
            "total": total,
            "percent": _percent(step, total),
            "eta_seconds": round(self._meter.left_s(total), 1) if metrics else None,
            "metrics": dict(metrics),
        }
        state = {"global_step": step, "epoch": round(progress.epoch, 4), "images": progress.images}
        return {"data": {"status": status, "state": state}, "progress": shown}

    def _caching(self, event: CacheProgress) -> Message:
        name = event.cache.split(" ")[0]
        label = CACHE_TITLES.get(event.cache, f"Caching {event.cache}")
        status = "completed" if event.finished else "running"
        stage = _stage(_STAGES.get(name, "init_data_backend"), label, status, event.done, event.total)
        text = f"{label}: {event.done} of {event.total}"
        return Message("lifecycle.stage", "info", label, text, stage, status=True, key=event.cache)

    def _previewed(self, event: Previewed) -> Message:
        step, done, total = event.progress.step, event.sampler_step, event.sampler_steps
        text = f"Preview of {event.prompt} at step {step}: {done} of {total}"
        name = f"preview_step_{step}_{event.prompt}_{done}.png"
        stage = _stage("validation", f"Drawing {event.prompt}", "running", done, total)
        pictures = (Attachment(name, event.picture),)
        return Message("lifecycle.stage", "info", "Preview", text, stage, pictures, passing=True)

    def _validated(self, event: Validated) -> Message:
        drawn, lost, step = len(event.files), len(event.failed), event.progress.step
        last = bool(self._total_steps) and step >= self._total_steps
        key = "benchmark_base_model" if step == 0 else "final_validation" if last else "validation"
        stage = _stage(key, "Validation", "completed" if drawn else "failed", drawn, drawn + lost)
        pictures = tuple(Attachment(Path(file).name, Path(file)) for file in event.files)
        severity = "warning" if lost else "info"
        text = message_of(event) or "Drew pictures"
        return Message("lifecycle.stage", severity, "Validation", text, stage, pictures)


def _stage(key: str, label: str, status: str, current: int, total: int) -> dict[str, Any]:
    progress = {"current": current, "total": total, "percent": _percent(current, total)}
    return {"stage": {"key": key, "label": label, "status": status, "progress": progress}}


def _finite(values: Mapping[str, float]) -> dict[str, float | None]:
    """JSON knows neither NaN nor infinity: they become null."""
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def _percent(part: int, whole: int) -> float:
    return round(100 * part / whole, 2) if whole else 0.0


def picture_name(file: str | Path) -> str:
    """The name of a validation picture without its step and ending: the same prompt has the same name at every step."""
    return re.sub(r"^step_\d+_", "", Path(file).stem)
