"""Events are plain frozen values, and importing them does not load torch."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import get_args

import pytest

from sana_tune.progress import Progress
from sana_tune.watch import events


def test_every_event_is_frozen():
    kinds = get_args(events.Event)
    assert len(kinds) >= 7
    assert all(dataclasses.is_dataclass(kind) and kind.__dataclass_params__.frozen for kind in kinds)


def test_an_event_cannot_be_changed():
    event = events.Saved(Progress(1), "there", 0.1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        event.path = "elsewhere"  # type: ignore[misc]


def test_events_and_metrics_are_torch_free():
    modules = "sana_tune.watch.events, sana_tune.watch.metrics, sana_tune.watch.sinks"
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
