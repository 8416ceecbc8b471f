"""Runs that are killed at any moment end as if nothing had been; caches never do the same work twice."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from sana_tune.config.load import Loaded
from sana_tune.data import shards
from sana_tune.run import run
from sana_tune.train import folders
from sana_tune.watch.events import Finished, Stepped
from tests.data.pictures import put
from tests.journeys.kit import (
    Child,
    Heard,
    cache_of,
    differences,
    metrics_of,
    pictures,
    pipeline_of,
    small_run,
    state_of,
)

KILLS, KILLS_IN_FULL = 20, 100
STEPS = 5
# What the kills of one run aim at, in the order in which it comes there; None = any moment.
AIMS = ("shard", "shard", "shard", "shard", None, "checkpoint", "checkpoint", "checkpoint", None, "pipeline")
# How the names begin under which things are written, replaced or removed → what they are.
ASIDE = {".writing-": "shard", ".checkpoint-": "checkpoint", ".pipeline.": "pipeline"}
# On how many operations an aim is spread; and how long such a write takes at least, on a quick disk, in seconds.
OPERATIONS = {"shard": 4, "checkpoint": 40, "pipeline": 20}
WRITE_S = {"shard": 0.0005, "checkpoint": 0.05, "pipeline": 0.02}
# What Python tells an audit hook of files, the path first (https://docs.python.org/3/library/audit_events.html).
FILE_EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.copyfile")


# ---- killed ----


@dataclass(frozen=True)
class History:
    """A run that writes much: 21 shards of one item each, a checkpoint after every step, a pipeline."""

    data: Path
    folder: Path

    @property
    def output(self) -> Path:
        return self.folder / "output"

    def loaded(self) -> Loaded:
        squares = {"instance_data_dir": str(self.data / "squares")}
        wide = {"instance_data_dir": str(self.data / "wide"), "train_batch_size": 1}
        text = {"dataset_type": "text_embeds", "write_batch_size": 1}
        return small_run(
            self.folder, squares, wide, text, max_train_steps=STEPS, use_ema=True, write_batch_size=1,
            vae_batch_size=2, checkpoint_step_interval=1, checkpoints_total_limit=2,
        )  # fmt: skip

    def start(self, before: Callable[[], None] = lambda: None) -> Child:
        """The run in a process of its own, which does `before` first."""

        def life() -> None:
            before()
            run(self.loaded())

        return Child(life, self.folder / "console.txt")

    def half_done(self) -> dict[str, str]:
        """Paths of what is being written, replaced or removed → its kind."""
        cache = self.output / "cache"
        folders = [self.output, cache / "text", cache / "vae" / "d0", cache / "vae" / "d1"]
        names = [str(path) for folder in folders if folder.is_dir() for path in folder.iterdir()]
        return {path: kind for path in names if (kind := kind_of(path))}

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
        found["files"] = sorted(path.name for path in self.output.iterdir() if not path.name.startswith("."))
        found["half done"] = self.half_done()
        return {**found, **pipeline_of(self.output), **cache_of(self.output / "cache")}


def kind_of(path: str) -> str | None:
    """What a path is a half-done one of."""
    return next((kind for begin, kind in ASIDE.items() if f"/{begin}" in path), None)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_at(kind: str, nth: int) -> None:
    """Have this process killed right before the nth operation on half-done things of a kind."""
    turns = count(1)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        path = str(arguments[0]) if event in FILE_EVENTS else ""
        if kind_of(path) == kind and os.path.exists(path) and next(turns) == nth:
            die()

    sys.addaudithook(hook)


def killed_during(kind: str, nth: int, share: float) -> None:
    """Have this process killed when so much of a write's time has gone by, of the nth write of a kind."""
    begun: set[str] = set()

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        path = str(arguments[0]) if event in ("open", "os.mkdir") else ""
        if kind_of(path) == kind and kind_of(os.path.dirname(path)) is None and path not in begun:
            begun.add(path)
            if len(begun) == nth:
                threading.Timer(share * WRITE_S[kind], die).start()

    sys.addaudithook(hook)


def strike(history: History, aim: str | None, luck: random.Random, span_s: float) -> str | None:
    """Run, and be killed. What was half done then, "nothing", or None: it had ended before."""
    before = history.half_done().keys()
    if aim is None:
        child = history.start()
        time.sleep(luck.uniform(0, span_s))
        child.send(signal.SIGKILL)
    elif luck.random() < 0.5:
        child = history.start(partial(killed_at, aim, luck.randint(1, OPERATIONS[aim])))
    else:
        nth = 1 if aim == "pipeline" else luck.randint(1, 2)
        child = history.start(partial(killed_during, aim, nth, luck.random()))
    if (code := child.wait()) == 0:
        return None
    assert code == -signal.SIGKILL, child
    return next((kind for path, kind in history.half_done().items() if path not in before), "nothing")


@pytest.mark.timeout(3600)
def test_killed_at_any_moment_it_ends_as_if_undisturbed(tmp_path: Path, full: bool):
    pictures(tmp_path / "squares", 6)
    pictures(tmp_path / "wide", 4, (64, 32), seed=1)
    undisturbed = History(tmp_path, tmp_path / "undisturbed")
    run(undisturbed.loaded())  # in this process: the ones that are forked from it have everything imported
    began_s = time.monotonic()
    again = History(tmp_path, tmp_path / "again")
    child = again.start()
    assert child.wait() == 0, child
    span_s = time.monotonic() - began_s
    expected = undisturbed.result()
    assert differences(expected, again.result()) == []
    assert len(cache_of(undisturbed.output / "cache")) == 6 + 4 + 6 + 4 + 1

    luck, kills, histories = random.Random(20), Counter[str](), 0
    wanted = KILLS_IN_FULL if full else KILLS
    while kills.total() < wanted:
        histories += 1
        assert histories <= wanted, f"the aims are not found any more: {kills}"
        history = History(tmp_path, tmp_path / f"killed {histories}")
        for aim in AIMS[: wanted - kills.total()]:
            landed = strike(history, aim, luck, span_s)
            if landed is None:
                break
            kills[landed] += 1
            history.check_what_is_there()
        child = history.start()
        assert child.wait() == 0, child
        assert differences(expected, history.result()) == []
        shutil.rmtree(history.folder)
    print(f"{kills.total()} kills in {histories} runs, within the writing of: {dict(kills)}")
    assert sum(kills[kind] for kind in WRITE_S) >= wanted // 2, kills
    assert kills["shard"] >= wanted // 10 and kills["checkpoint"] >= wanted // 10, kills


# ---- nothing is encoded twice ----


def test_a_second_run_encodes_nothing_and_an_edit_re_encodes_that_item_alone(tmp_path: Path):
    first = pictures(tmp_path / "pictures", 5, variants=2)
    pictures(tmp_path / "more", 3, (64, 32), seed=1)

    def encoded(**settings: Any) -> dict[str, int]:
        datasets = [{"instance_data_dir": str(first)}, {"instance_data_dir": str(tmp_path / "more")}]
        settings = {"max_train_steps": 1, "cache_dir": str(tmp_path / "cache"), **settings}
        heard, loaded = Heard(), small_run(tmp_path, *datasets, **settings)
        run(loaded, sinks=[heard], restart=True)
        plan = Path(loaded.config.train.output_dir) / "plan.json"
        needs = json.loads(plan.read_bytes())["caches"]
        missed = {need["name"]: need["needed"] - need["hits"] for need in needs if need["needed"] > need["hits"]}
        assert missed == heard.encoded, "what was made is what the plan said"
        assert len(heard.of(Finished)) == 1
        return heard.encoded

    assert encoded() == {"text": 1 + 5 * 2 + 3, "latents of d0": 5, "latents of d1": 3}
    whole = cache_of(tmp_path / "cache")
    assert encoded() == {}
    assert encoded(output_dir=str(tmp_path / "elsewhere"), train_batch_size=1, seed=3, learning_rate=1e-5) == {}

    put(first, "p02.png", 32, 32, seed=99)
    assert encoded() == {"latents of d0": 1}
    lines = (first / "p03.txt").read_text(encoding="utf-8").splitlines()
    (first / "p03.txt").write_text(f"{lines[0]}\nan edited caption", encoding="utf-8")
    assert encoded() == {"text": 1}
    assert encoded() == {}
    for path in first.iterdir():
        os.utime(path)
    (first / "p01.png").rename(first / "renamed.png")
    (first / "p01.txt").rename(first / "renamed.txt")
    put(first, "again.png", 32, 32, seed=99, caption="an edited caption")
    assert encoded() == {}, "touched, renamed and doubled: the bytes are known"
    assert encoded(resolution=40) == {"latents of d0": 5, "latents of d1": 3}
    now = cache_of(tmp_path / "cache")
    assert len(now) == len(whole) + 2 + 8 and {key: now[key] for key in whole} == whole, "nothing old was touched"


def test_one_picture_is_a_dataset(tmp_path: Path):
    pictures(tmp_path / "pictures", 1)
    heard = Heard()
    run(small_run(tmp_path, train_batch_size=4, gradient_accumulation_steps=2), sinks=[heard])
    plan = json.loads((tmp_path / "output/plan.json").read_bytes())
    assert [(bucket["pictures"], bucket["micro_batches"], bucket["filled"]) for bucket in plan["buckets"]] == [
        (1, 1, 3)
    ]
    assert heard.encoded == {"text": 2, "latents of d0": 1}
    assert [event.images for event in heard.of(Stepped)] == [8] * 4
    assert len(heard.of(Finished)) == 1 and (tmp_path / "output/pipeline/model_index.json").is_file()


def test_a_bucket_smaller_than_a_batch_is_filled_and_that_is_said(tmp_path: Path):
    folder = pictures(tmp_path / "pictures", 5)
    pictures(folder, 2, (64, 32), name="wide")
    heard = Heard()
    run(small_run(tmp_path, train_batch_size=3, num_train_epochs=1, max_train_steps=0), sinks=[heard])
    plan, ledger = (json.loads((tmp_path / f"output/{name}.json").read_bytes()) for name in ("plan", "ledger"))
    buckets = {(bucket["width_px"], bucket["height_px"]): bucket for bucket in plan["buckets"]}
    assert {size: bucket["filled"] for size, bucket in buckets.items()} == {(32, 32): 1, (48, 24): 1}
    assert [event.images for event in heard.of(Stepped)] == [3, 3, 3] and len(heard.of(Finished)) == 1
    (entry,) = ledger["datasets"]
    assert entry["found"] == entry["trained"] == 7 and entry["left_out"] == []
    said = (tmp_path / "output/log.txt").read_text(encoding="utf-8")
    assert "48x24: 2 pictures = 1 micro-batches of 3 (1 filled in from the same bucket)" in said
