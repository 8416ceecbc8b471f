"""Runs that are killed at any moment end as if nothing had been; caches never do the same work twice."""

from __future__ import annotations

import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sana_tune.config.load import Loaded
from sana_tune.data import shards
from sana_tune.run import run
from sana_tune.train import folders
from tests.journeys.kit import (
    Child,
    cache_of,
    differences,
    metrics_of,
    one_thread,
    pictures,
    pipeline_of,
    small_run,
    state_of,
)

KILLS, KILLS_IN_FULL = 20, 100
STEPS = 6
# How long a write of this kind takes, about, in seconds: a kill comes within that time of its beginning.
REACH_S = {"shard": 0.01, "checkpoint": 0.2, "pipeline": 0.05}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


# ---- killed ----


@dataclass(frozen=True)
class History:
    """A run that writes much: 10 shards of three items, a checkpoint after every step, a pipeline."""

    data: Path
    folder: Path

    @property
    def output(self) -> Path:
        return self.folder / "output"

    def loaded(self) -> Loaded:
        squares = {"instance_data_dir": str(self.data / "squares")}
        wide = {"instance_data_dir": str(self.data / "wide"), "train_batch_size": 1}
        text = {"dataset_type": "text_embeds", "write_batch_size": 3}
        return small_run(
            self.folder, squares, wide, text, max_train_steps=STEPS, use_ema=True, write_batch_size=3,
            vae_batch_size=2, checkpoint_step_interval=1, checkpoints_total_limit=2,
        )  # fmt: skip

    def start(self) -> Child:
        loaded = self.loaded()
        return Child(lambda: run(loaded) and 0, self.folder / "console.txt")

    def being_written(self) -> dict[str, str]:
        """Paths of what is half done (written, replaced or removed) → its kind."""
        found = dict.fromkeys((self.output / "cache").rglob(".writing-*.tmp"), "shard")
        found |= dict.fromkeys(self.output.glob(".checkpoint-*"), "checkpoint")
        found |= dict.fromkeys(self.output.glob(".pipeline.*"), "pipeline")
        return {str(path): kind for path, kind in found.items()}

    def check_what_is_there(self) -> None:
        """Whatever has its name is whole, at every moment."""
        for path in self.output.glob("checkpoint-*"):
            found = folders.read(path)
            assert found is not None and folders.damage(found) == [], path
        for folder in (self.output / "cache").glob("**/"):
            assert not shards.scan(folder).torn, folder
        if (self.output / "pipeline").exists():
            assert len(pipeline_of(self.output)) == 12

    def result(self) -> dict[str, Any]:
        """All that must be the same in the end: checkpoints, pipeline, caches, metrics; and no file more or less."""
        found = {f"line {number}": line for number, line in enumerate(metrics_of(self.output), start=1)}
        for step in (STEPS - 1, STEPS):
            state = state_of(self.output / f"checkpoint-{step}")
            found |= {f"{step}/{name}": value for name, value in state.items()}
        found["files"] = sorted(path.name for path in self.output.iterdir())
        return {**found, **pipeline_of(self.output), **cache_of(self.output / "cache")}


def strike(history: History, luck: random.Random, span_s: float) -> str | None:
    """Start the run and kill it, mostly within a write. What it was writing, "nothing", or None: it ended before."""
    before = history.being_written().keys()
    child = history.start()
    if luck.random() < 0.2:
        time.sleep(luck.uniform(0, span_s))
    else:
        wanted, seen = luck.randint(1, 3), {}
        while child.running and len(seen) < wanted:
            seen |= {path: kind for path, kind in history.being_written().items() if path not in before}
            time.sleep(0.0005)
        if seen:
            time.sleep(luck.uniform(0, REACH_S[list(seen.values())[-1]]))
    child.send(signal.SIGKILL)
    if (code := child.wait()) == 0:
        return None
    assert code == -signal.SIGKILL, child
    return next((kind for path, kind in history.being_written().items() if path not in before), "nothing")


@pytest.mark.timeout(3600)
def test_killed_at_any_moment_it_ends_as_if_undisturbed(tmp_path: Path, full: bool):
    pictures(tmp_path / "squares", 6)
    pictures(tmp_path / "wide", 4, (64, 32), seed=1)
    undisturbed = History(tmp_path, tmp_path / "undisturbed")
    began_s = time.monotonic()
    child = undisturbed.start()
    assert child.wait() == 0, child
    span_s = time.monotonic() - began_s
    expected = undisturbed.result()
    assert len(cache_of(undisturbed.output / "cache")) == 6 + 4 + 6 + 4 + 1

    luck, kills, histories = random.Random(20), Counter[str](), 0
    while kills.total() < (KILLS_IN_FULL if full else KILLS):
        histories += 1
        history = History(tmp_path, tmp_path / f"killed {histories}")
        while kills.total() < (KILLS_IN_FULL if full else KILLS):
            landed = strike(history, luck, span_s)
            if landed is None:
                break
            kills[landed] += 1
            history.check_what_is_there()
        child = history.start()
        assert child.wait() == 0, child
        assert differences(expected, history.result()) == []
    print(f"{kills.total()} kills in {histories} runs, within the writing of: {dict(kills)}")
    assert kills["shard"] + kills["checkpoint"] + kills["pipeline"] >= kills.total() // 2, kills
    assert kills["shard"] >= 2 and kills["checkpoint"] >= 4, kills
