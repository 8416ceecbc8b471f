"""A run whose every text tries to be more than text."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from sana_tune.data.images import encode_png
from sana_tune.progress import Progress
from sana_tune.watch.events import Failed, Measured, Noticed, Previewed, Started, Validated
from sana_tune.watch.journal import EventsSink
from scripts.benchmark_report import run_folder

EVIL = "</script><script>window.hacked=1</script><!-- \" onload='window.hacked=2' & \u2028{{ 7*7 }}"


def hostile_run(root: Path) -> Path:
    """The folder of such a run, below `root`."""
    folder = run_folder(root / 'a "run" & <b>more', 30, validations=1, side_px=8, changes={"comment": EVIL, EVIL: 1})
    picture = encode_png(np.zeros((8, 8, 3), np.uint8))
    sink = EventsSink(folder)
    at = Progress(30)
    for event in (
        Started(at, 60, 3.0, EVIL), Measured(at, {f"{EVIL}/raw": 1.0, "clip/raw": 2.0}, (EVIL,)), Noticed(at, EVIL),
        Previewed(at, "fox", 5, 20, picture), Validated(at, (), (EVIL,)), Failed(EVIL),
    ):  # fmt: skip
        sink.emit(event)
    sink.close()
    entry = {"dataset": EVIL, "found": 2, "trained": 1, "left_out": [[EVIL, EVIL]], "role": EVIL}
    bucket = {"dataset": EVIL, "width_px": 8, "height_px": 8, "pictures": 1, "repeats": 0, "filled": 1, "role": EVIL}
    first = {"file": "00.png", "masked": "01.png", "id": EVIL, "caption": EVIL, "width": 8, "height": 8}
    written = {
        "ledger.json": {"datasets": [entry]},
        "plan.json": {"model": EVIL, "total_steps": 60, "buckets": [bucket]},
        "environment.json": {"python": EVIL, "libraries": {EVIL: EVIL}, "device": {"name": EVIL}},
        "prompts.json": {"fox": {"name": EVIL, "prompt": EVIL}},
        "first_batches/index.json": {"pictures": [first]},
    }
    for name, content in written.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return folder
