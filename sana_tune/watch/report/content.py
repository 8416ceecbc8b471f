"""What the page says beside its charts and pictures: state, key numbers, data, environment, events. Plain values."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np

from sana_tune.watch.report import words
from sana_tune.watch.report.reading import Run

LISTED = 50  # files that were left out, by name
EVENTS = 400  # of a kind, the newest
RECENT = 50  # steps that key numbers are means of
_SILENT_S = 300.0  # a run that wrote nothing for longer is not taken for a running one
_NOTABLE = frozenset({"started", "noticed", "failed", "stopped", "finished"})


@dataclass(frozen=True)
class State:
    """Where a run stands. word: running, finished, stopped, failed, ended (nobody said how) or empty."""

    word: str
    tone: str
    step: int
    total: int
    detail: str

    @property
    def share(self) -> float:
        """The part of the way that is done."""
        return min(1.0, self.step / self.total) if self.total else 0.0


def state_of(run: Run, *, live: bool, now: datetime) -> State:
    """live: whether it is known to be going on. Else a run without an end that wrote something lately is."""
    step = run.metrics.last_step
    starts = [line for line in run.events if line["event"] == "started"]
    total = int(starts[-1].get("total_steps") or 0) if starts else int(run.plan.get("total_steps") or 0)
    ends = [line for line in run.events if line["event"] in ("finished", "stopped", "failed", "started")]
    last = ends[-1] if ends else None
    if last is not None and last["event"] != "started":
        step = max(step, last["step"]) if last["event"] == "finished" else step
        return State(last["event"], words.tone(last), step, total, words.told(last))
    if not run.events and not run.metrics.count:
        return State("empty", "plain", 0, total, "nothing was trained yet")
    silent_s = _silent_s(run, now)
    if live or (silent_s is not None and silent_s < _SILENT_S):
        return State("running", "run", step, total, "")
    return State("ended", "warn", step, total, "no end is written down: it was killed, or goes on elsewhere")


def _silent_s(run: Run, now: datetime) -> float | None:
    """How long ago metrics.jsonl or events.jsonl were written."""
    times = []
    for name in ("metrics.jsonl", "events.jsonl"):
        try:
            times.append((run.root / name).stat().st_mtime)
        except OSError:
            continue
    return now.timestamp() - max(times) if times else None


def key_numbers(run: Run, state: State) -> list[dict[str, str]]:
    """The numbers that are looked at first: name, value, and what it is of."""
    columns = run.metrics.columns
    waited, took = columns["data_wait_s"], columns["step_s"]
    found = [
        ("Loss", words.short(_recent(columns["loss"])), f"mean of the last {min(RECENT, run.metrics.count)} steps"),
        *_measured_numbers(run),
        ("Speed", words.short(_recent(columns["images_s"]), 3), "pictures a second"),
        ("Step", words.lasting_short(_recent(took)), "mean time"),
        ("Memory", words.size(_last(columns["memory_bytes"])), "the most in use"),
        ("Waiting for data", words.share(_ratio(waited, took)), "of the time of the steps"),
        ("Time", words.lasting(float(np.nansum(took)) if len(took) else None), _left(run, state)),
    ]
    if skipped := int(np.nansum(columns["skipped"])) if run.metrics.has("skipped") else 0:
        found.append(("Skipped steps", words.count(skipped), "loss or gradient were not finite"))
    return [{"name": name, "value": value, "about": about} for name, value, about in found if value != words.NONE]


def _measured_numbers(run: Run) -> list[tuple[str, str, str]]:
    newest: dict[str, tuple[float, int]] = {}
    for line in run.of("measured"):
        newest |= {name: (value, line["step"]) for name, value in (line.get("values") or {}).items()}
    found = []
    for title, names, about in (
        ("Held-out loss", ("held_out/ema", "held_out/raw"), "of the base model's"),
        ("CLIP score", ("clip/ema", "clip/raw"), "higher is better"),
    ):
        for name in names:
            if name in newest and newest[name][0] is not None:
                value, step = newest[name]
                weights = "EMA" if name.endswith("ema") else "weights"
                found.append((title, words.short(value), f"{about}; {weights}, step {words.count(step)}"))
                break
    return found


def _left(run: Run, state: State) -> str:
    step_s = _recent(run.metrics.columns["step_s"])
    if state.word == "running" and step_s is not None and state.total > state.step:
        return f"about {words.lasting((state.total - state.step) * step_s)} left"
    return "in training steps"


def _recent(values: np.ndarray) -> float | None:
    own = values[-RECENT:]
    own = own[np.isfinite(own)]
    return float(own.mean()) if len(own) else None


def _last(values: np.ndarray) -> float | None:
    own = values[np.isfinite(values)]
    return float(own[-1]) if len(own) else None


def _ratio(part: np.ndarray, whole: np.ndarray) -> float | None:
    total = float(np.nansum(whole))
    return float(np.nansum(part)) / total if total > 0 else None


# ---- data ----


def ledgers(run: Run) -> list[dict[str, Any]]:
    """What became of every picture, dataset by dataset, with the reasons of those left out."""
    found = []
    for entry in run.ledger.get("datasets") or ():
        left_out = entry.get("left_out") or []
        parts = [
            ("trained" if entry.get("role") in ("train", None) else "used", entry.get("trained") or 0, "good"),
            ("held out", len(entry.get("held_out") or ()), "held"),
            ("left out", len(left_out), "bad"),
            ("not drawn", entry.get("not_drawn") or 0, "dim"),
        ]
        total = entry.get("found") or sum(number for _, number, _ in parts)
        found.append(
            {
                "name": entry.get("dataset", ""),
                "role": {"regularise": "regularisation", "eval": "held out"}.get(entry.get("role"), ""),
                "found": total,
                "parts": [
                    {"name": name, "count": number, "tone": tone, "share": number / total if total else 0}
                    for name, number, tone in parts
                    if number
                ],
                "reasons": Counter(str(reason) for _, reason in left_out).most_common(12),
                "files": [(str(key), str(reason)) for key, reason in left_out[:LISTED]],
                "more": max(0, len(left_out) - LISTED),
                "masks": entry.get("masks") or 0,
            }
        )
    return found


def buckets(run: Run) -> list[dict[str, Any]]:
    """The sizes that are trained at: pictures, how many an epoch shows, fill-ins, and the shape of each.

    No epoch shows those of pictures that are held out.
    """
    told = [(each, True) for each in run.plan.get("buckets") or ()]
    told += [(each, False) for each in run.plan.get("held_out") or ()]
    found = []
    for each, is_shown in told:
        width, height = each["width_px"], each["height_px"]
        side = math.sqrt(width * height) or 1
        found.append(
            {
                **each,
                "size": f"{width}×{height}",
                "shown": each["pictures"] * (each["repeats"] + 1) * is_shown,
                "filled": each["filled"] * is_shown,
                "icon_w": round(22 * width / side, 1),
                "icon_h": round(22 * height / side, 1),
            }
        )
    most = max((each["shown"] + each["filled"] for each in found), default=0) or 1
    return [{**each, "share": each["shown"] / most, "filled_share": each["filled"] / most} for each in found]


# ---- environment ----


def environments(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Name and value in each run, and whether these differ."""
    flat = [_flat_environment(run.environment) for run in runs]
    names = dict.fromkeys(name for each in flat for name in each)
    rows = []
    for name in names:
        values = [each.get(name, words.NONE) for each in flat]
        rows.append({"name": name, "values": values, "differs": len(set(values)) > 1})
    return rows


def _flat_environment(told: Mapping[str, Any]) -> dict[str, str]:
    if not told:
        return {}
    device = told.get("device") or {}
    memory = f", {words.size(device['memory_bytes'])}" if device.get("memory_bytes") else ""
    found = {
        "Device": f"{device.get('name')}{memory}" if device else words.NONE,
        "Processes": str(told.get("processes") or 1),
        "Processor": f"{told.get('processor')}, {told.get('cores')} cores",
        "Main memory": words.size(told.get("ram_bytes")),
        "System": str(told.get("system")),
        "Precision": str(told.get("mixed_precision")),
        "Python": str(told.get("python")),
        "sana_tune": str(told.get("sana_tune")),
    }
    libraries = told.get("libraries")
    return found | ({str(name): str(text) for name, text in libraries.items()} if isinstance(libraries, dict) else {})


# ---- events ----


def events(run: Run) -> dict[str, Any]:
    """What happened, the newest first: what should be known, apart from what happens all the time."""
    lines = [*run.events, *_skipped(run)]
    lines.sort(key=lambda line: (line["time"], line["step"]), reverse=True)
    told = [
        {
            "time": words.moment(line["time"]) if line["time"] else "",
            "step": words.count(line["step"]),
            "text": words.told(line),
            "tone": words.tone(line),
            "abandoned": line["abandoned"],
            "notable": line["event"] in _NOTABLE or words.tone(line) in ("warn", "bad"),
        }
        for line in lines
        if line["event"] != "previewed"
    ]
    notable = [line for line in told if line["notable"]]
    usual = [line for line in told if not line["notable"]]
    return {
        "notable": notable[:EVENTS],
        "usual": usual[:EVENTS],
        "more": max(0, len(notable) - EVENTS) + max(0, len(usual) - EVENTS),
    }


def _skipped(run: Run) -> list[dict[str, Any]]:
    """Skipped steps as one event, since nobody reads a thousand."""
    columns = run.metrics.columns
    steps = columns["step"][columns["skipped"] == 1].astype(int).tolist()
    if not steps:
        return []
    named = ", ".join(map(words.count, steps[:20])) + (" …" if len(steps) > 20 else "")
    message = f"{len(steps)} skipped, since loss or gradient were not finite: step {named}"
    return [{"event": "noticed", "severity": "warning", "time": "", "step": steps[-1], "message": message,
             "abandoned": False}]  # fmt: skip
