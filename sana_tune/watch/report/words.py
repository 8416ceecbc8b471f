"""Numbers, times and events in words, as the report shows them. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

NONE = "–"
_UNITS = ("B", "kB", "MB", "GB", "TB")
_TONES = {"failed": "bad", "stopped": "warn", "finished": "good", "started": "plain"}


def count(value: float | None) -> str:
    """A whole number with thousands apart."""
    return NONE if value is None or not math.isfinite(value) else f"{value:,.0f}"


def short(value: float | None, digits: int = 4) -> str:
    """A number of so many significant digits."""
    if value is None or not math.isfinite(value):
        return NONE
    return f"{value:,.{digits}g}" if abs(value) < 10**digits else f"{value:,.0f}"


def size(value: float | None) -> str:
    """Bytes, in the unit that suits them."""
    if value is None or not math.isfinite(value):
        return NONE
    place = 0
    while abs(value) >= 999.5 and place < len(_UNITS) - 1:
        value, place = value / 1000, place + 1
    return f"{value:.3g} {_UNITS[place]}" if value < 1000 else f"{value:,.0f} {_UNITS[place]}"


def share(value: float | None) -> str:
    """A part of 1 as per cent."""
    return NONE if value is None or not math.isfinite(value) else f"{100 * value:.3g} %"


def lasting(seconds: float | None) -> str:
    """A time span: 42 s, 12 min, 3 h 07 min, 2 d 3 h."""
    if seconds is None or not math.isfinite(seconds):
        return NONE
    minutes = int(seconds / 60 + 0.5)
    if seconds < 90:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def lasting_short(seconds: float | None) -> str:
    """A time below some minutes: 850 ms, 1.25 s."""
    if seconds is None or not math.isfinite(seconds):
        return NONE
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    return f"{seconds:.3g} s" if seconds < 100 else lasting(seconds)


def moment(text: str) -> str:
    """A time of events.jsonl as people read it: 2026-01-31 12:00 UTC."""
    at = parsed(text)
    return text if at is None else f"{at:%Y-%m-%d %H:%M} UTC"


def parsed(text: Any) -> datetime | None:
    """A time of events.jsonl."""
    try:
        at = datetime.fromisoformat(str(text))
    except ValueError:
        return None
    return at if at.tzinfo is not None else at.replace(tzinfo=UTC)


def tone(line: Mapping[str, Any]) -> str:
    """How an event is coloured: good, warn, bad or plain."""
    if line["event"] == "noticed":
        return {"error": "bad", "warning": "warn"}.get(str(line.get("severity")), "plain")
    if line["event"] == "validated" and line.get("failed"):
        return "warn"
    if line["event"] == "measured" and line.get("advice"):
        return "warn"
    return _TONES.get(line["event"], "plain")


def told(line: Mapping[str, Any]) -> str:
    """An event of events.jsonl as a sentence."""
    step = count(line["step"])
    match line["event"]:
        case "started":
            whence = f" from {line['resumed_from']}" if line.get("resumed_from") else ""
            begin = f"Resumed after step {step}{whence}" if line["step"] else "Started"
            return f"{begin}, to step {count(line.get('total_steps'))}"
        case "validated":
            lost = line.get("failed") or []
            drew = f"Drew {len(line.get('files') or [])} pictures in {lasting(line.get('duration_s'))}"
            return f"{drew}; {len(lost)} failed: {'; '.join(map(str, lost))}" if lost else drew
        case "measured":
            values = {name: value for name, value in (line.get("values") or {}).items() if name.count("/") < 2}
            numbers = ", ".join(f"{name} {short(value)}" for name, value in values.items())
            return ". ".join([f"Measured {numbers}", *(_sentence(str(each)) for each in line.get("advice") or [])])
        case "saved":
            gone = f"; removed {', '.join(map(str, line['removed']))}" if line.get("removed") else ""
            return f"Saved {line.get('path')} in {lasting(line.get('duration_s'))}{gone}"
        case "finished":
            place = str(line.get("pipeline") or "")
            what = "adapter" if place.rpartition("/")[2] == "adapter" else "pipeline"
            where = f"; the {what} is in {place}" if place else ""
            return f"Finished: {step} steps, {count(line.get('images'))} pictures{where}"
        case "stopped":
            return f"Stopped after step {step}" + (f": {line['reason']}" if line.get("reason") else "")
        case "failed":
            return f"Failed: {line.get('message')}"
        case "previewed":
            return f"Preview of {line.get('prompt')}, {line.get('sampler_step')} of {line.get('sampler_steps')}"
    return str(line.get("message") or line["event"])


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
