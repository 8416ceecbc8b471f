"""Who listens to a run: the screen and metrics.jsonl. A sink that breaks is told once and dropped.

This is the one place where a broad `except` is right: no observer may stop a run.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from sana_tune.log import log
from sana_tune.watch.card import Seen
from sana_tune.watch.events import (
    CacheProgress,
    Event,
    Finished,
    Measured,
    Noticed,
    Saved,
    Started,
    Stepped,
    Stopped,
    Validated,
)
from sana_tune.watch.metrics import Metrics

if TYPE_CHECKING:
    from rich.console import Console

    from sana_tune.watch.bars import Bars

CACHE_TITLES = {"text": "Caching captions", "latents": "Caching latents"}


class Sink(Protocol):
    """Takes every event of a run, in order, on the thread that trains."""

    def emit(self, event: Event) -> None: ...

    def close(self) -> None: ...


class Watcher:
    """Hands every event to every sink. A sink that raises is reported once and hears no more.

    seen: the last pictures and numbers, for the model card.
    """

    def __init__(self, sinks: Sequence[Sink]):
        self._sinks = list(sinks)
        self.seen = Seen()

    def emit(self, event: Event) -> None:
        """Never raises for a sink's sake."""
        self.seen.emit(event)
        for sink in tuple(self._sinks):
            try:
                sink.emit(event)
            except Exception as error:
                self._drop(sink, error)

    def close(self) -> None:
        """Close what is left of the sinks; after that nothing is heard."""
        for sink in tuple(self._sinks):
            try:
                sink.close()
            except Exception as error:
                self._drop(sink, error)
        self._sinks.clear()

    def __enter__(self) -> Watcher:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _drop(self, sink: Sink, error: Exception) -> None:
        self._sinks.remove(sink)
        name = type(sink).__name__
        log.warning("%s failed and is switched off; the run goes on: %s: %s", name, type(error).__name__, error)
        log.debug("the failure of %s", name, exc_info=error)


class MetricsSink:
    """Writes metrics.jsonl: cut back to where the run starts, then a line a step."""

    def __init__(self, path: Path):
        self._metrics = Metrics(path)

    def emit(self, event: Event) -> None:
        if isinstance(event, Stepped):
            self._metrics.append(event)
        elif isinstance(event, Started):
            self._metrics.cut_back_to(event.progress.step)

    def close(self) -> None:
        self._metrics.close()


class Meter:
    """Means over the last steps: what a line on the screen shows. Pure but for what it was fed."""

    def __init__(self, window: int = 50):
        self._steps: deque[Stepped] = deque(maxlen=window)

    def add(self, event: Stepped) -> None:
        self._steps.append(event)

    @property
    def last_step(self) -> int:
        """The step of the newest event; 0 before the first."""
        return self._steps[-1].progress.step if self._steps else 0

    @property
    def loss(self) -> float:
        """Mean loss over the steps of the window that counted, without regularisation data's; NaN before the first."""
        return self._mean([event.losses.get("train") if event.losses else event.loss for event in self._good])

    @property
    def regularisation(self) -> float | None:
        """The same of regularisation data; None when the window had none."""
        found = [event.losses["regularise"] for event in self._good if "regularise" in event.losses]
        return self._mean(found) if found else None

    @property
    def _good(self) -> list[Stepped]:
        return [event for event in self._steps if not event.skipped]

    @staticmethod
    def _mean(losses: Sequence[float | None]) -> float:
        there = [loss for loss in losses if loss is not None]
        return sum(there) / len(there) if there else float("nan")

    @property
    def steps_per_s(self) -> float:
        seconds = sum(event.step_s for event in self._steps)
        return len(self._steps) / seconds if seconds > 0 else 0.0

    @property
    def images_per_s(self) -> float:
        seconds = sum(event.step_s for event in self._steps)
        return sum(event.images for event in self._steps) / seconds if seconds > 0 else 0.0

    def left_s(self, total_steps: int) -> float:
        """Seconds to the last step at the present pace, saving and drawing not counted."""
        if not self._steps or self.steps_per_s == 0:
            return 0.0
        return (total_steps - self._steps[-1].progress.step) / self.steps_per_s

    @property
    def numbers(self) -> str:
        """loss, learning rate, gradient norm and pace; after at least one step."""
        last = self._steps[-1]
        pace = f"{self.steps_per_s:.2f} steps/s  {self.images_per_s:.1f} images/s"
        regular = "" if self.regularisation is None else f"  regularisation {self.regularisation:.4f}"
        return f"loss {self.loss:.4f}{regular}  lr {last.learning_rate:.2e}  grad {last.grad_norm:.3g}  {pace}"


class CacheMeter:
    """How fast a cache is filled and how long it takes yet, from the first event of a filling on."""

    def __init__(self, now: Callable[[], float] = time.monotonic):
        self._now = now
        self._begun: dict[str, tuple[float, int]] = {}

    def numbers(self, event: CacheProgress) -> str:
        """Items a second and the time left; "" while there is nothing to tell them from."""
        now = self._now()
        begun_s, before = self._begun.setdefault(event.cache, (now, event.done))
        if event.finished:
            del self._begun[event.cache]  # the next filling of this cache is another one
        made, seconds = event.done - before, now - begun_s
        if made <= 0 or seconds <= 0:
            return ""
        rate = made / seconds
        unit = "captions" if event.cache.startswith("text") else "images"
        left = "" if event.finished else f"  left {clock((event.total - event.done) / rate)}"
        return f"{rate:.1f} {unit}/s{left}"


def clock(seconds: float) -> str:
    """Seconds as 0:42, 12:05 or 3:07:09."""
    whole = max(0, int(seconds + 0.5))
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def message_of(event: Event) -> str | None:
    """What an event says as one line of the log, or None when it says nothing there."""
    match event:
        case Started(progress=progress, total_steps=total):
            start = f"going on after step {progress.step}" if progress.step else "starting"
            source = f" from {event.resumed_from}" if event.resumed_from else ""
            epochs = event.epochs
            if epochs is None:
                epochs = total / event.steps_per_epoch if event.steps_per_epoch else 0.0
            return f"Training: {start}{source}, to step {total} ({epochs:.4g} epochs)"
        case Saved(path=path, duration_s=duration, removed=removed):
            gone = f"; removed {', '.join(Path(name).name for name in removed)}" if removed else ""
            return f"Saved {path} ({duration:.1f} s){gone}"
        case Validated(files=files, failed=failed, duration_s=duration) if files or failed:
            folder = f" in {Path(files[0]).parent}" if files else ""
            lost = f"; {len(failed)} failed: {'; '.join(failed)}" if failed else ""
            return f"Drew {len(files)} pictures at step {event.progress.step} ({duration:.1f} s){folder}{lost}"
        case Measured(progress=progress, values=values) if values:
            numbers = "  ".join(f"{name} {value:.4g}" for name, value in values.items() if name.count("/") < 2)
            return "\n".join((f"Measured at step {progress.step}: {numbers}", *event.advice))
        case Finished(progress=progress, pipeline=pipeline):
            kind = "adapter" if pipeline and pipeline.endswith("adapter") else "pipeline"
            where = f"; the {kind} is in {pipeline}" if pipeline else ""
            return f"Finished: {progress.step} steps, {progress.images} images{where}{_lost(event.skipped)}"
        case Stopped(progress=progress, reason=reason):
            return f"Stopped after step {progress.step}{': ' + reason if reason else ''}{_lost(event.skipped)}"
    return None


def _lost(skipped: int) -> str:
    return f"; {skipped} of this start's steps were skipped, their numbers not finite" if skipped else ""


_LEVELS = {"info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


def say(event: Event) -> None:
    """Log the event's message; failed pictures as a warning."""
    if isinstance(event, Noticed):
        log.log(_LEVELS[event.severity], "%s", event.message)
        return
    message = message_of(event)
    if message is not None:
        failed = isinstance(event, Validated) and bool(event.failed)
        log.warning(message) if failed else log.info(message)


class BarsSink:
    """Progress bars on a terminal: one for each cache, one for the training; messages are printed above."""

    def __init__(self, console: Console, refresh_per_s: float = 2.0):
        self._console = console
        self._refresh_per_s = refresh_per_s
        self._bars: Bars | None = None
        self._meter = Meter()
        self._caching = CacheMeter()
        self._total_steps = 0

    def emit(self, event: Event) -> None:
        say(event)
        match event:
            case CacheProgress(cache=cache, done=done, total=total) if total:
                numbers = self._caching.numbers(event).partition("  left")[0]  # the bar tells what is left
                self._open().show(CACHE_TITLES.get(cache, f"Caching {cache}"), done, total, below=numbers)
                if event.finished:
                    self.close()
            case Started(progress=progress, total_steps=total):
                self._total_steps = total
                self._open().show("Training", progress.step, total)
            case Stepped(progress=progress):
                self._meter.add(event)
                left = clock(self._meter.left_s(self._total_steps))
                self._open().show("Training", progress.step, self._total_steps, left, self._meter.numbers)
            case Finished() | Stopped():
                self.close()

    def close(self) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def _open(self) -> Bars:
        if self._bars is None:
            from sana_tune.watch.bars import Bars

            self._bars = Bars(self._console, self._refresh_per_s)
            self._bars.start()
        return self._bars


class LinesSink:
    """Plain lines where there is no terminal: each tenth of the way and every so many seconds."""

    def __init__(self, every_s: float = 10.0, now: Callable[[], float] = time.monotonic):
        self._every_s = every_s
        self._now = now
        self._last_s: dict[str, float] = {}
        self._tenth: dict[str, int] = {}
        self._meter = Meter()
        self._caching = CacheMeter(now)
        self._total_steps = 0
        self._first_step = 0

    def emit(self, event: Event) -> None:
        say(event)
        match event:
            case CacheProgress(cache=cache, done=done, total=total) if total:
                numbers = self._caching.numbers(event)
                if self._turn(cache, done, total):
                    title = CACHE_TITLES.get(cache, f"Caching {cache}")
                    share = f"{title}: {done} of {total} ({100 * done // total} %)"
                    log.info("%s", f"{share}  {numbers}" if numbers else share)
                if event.finished:
                    self._tenth.pop(cache, None)  # it may be filled again: an epoch's new crops, a damaged item
                    self._last_s.pop(cache, None)
            case Started():
                self._total_steps, self._first_step = event.total_steps, event.progress.step
            case Stepped():
                self._meter.add(event)
                step, total = event.progress.step, self._total_steps
                if self._turn("train", step, total) or step == self._first_step + 1:
                    left = clock(self._meter.left_s(total))
                    log.info("step %d of %d  %s  left %s", step, total, self._meter.numbers, left)

    def close(self) -> None:
        pass

    def _turn(self, name: str, done: int, total: int) -> bool:
        """Whether a line is due: a new tenth, the end, or enough seconds after the last one."""
        tenth, now = (10 * done // total if total else 0), self._now()
        due = tenth > self._tenth.get(name, 0) or now - self._last_s.setdefault(name, now) >= self._every_s
        if due:
            self._tenth[name], self._last_s[name] = tenth, now
        return due


def screen(console: Console) -> Sink:
    """The sink for this console: bars on a terminal, lines elsewhere."""
    return BarsSink(console) if console.is_terminal else LinesSink()
