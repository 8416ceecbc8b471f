"""Every optimizer in every precision, released or not: it trains, is saved and restored, and goes on bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sana_tune.config.choices import LR_SCHEDULERS
from sana_tune.config.optimizers import OPTIMIZER_FACTS
from sana_tune.progress import Progress
from sana_tune.train import folders
from sana_tune.train.checkpoint import Checkpoints
from sana_tune.train.step import Parts, train_step
from tests.train.toys import ToyBatches, differences, make_parts, state_of

NAMES = [name for name, facts in OPTIMIZER_FACTS.items() if not facts.paged]  # on a CPU those are these
SCHEDULES = list(LR_SCHEDULERS)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def steps(parts: Parts, first: int, last: int) -> list[float]:
    losses, progress = [], Progress(first)
    for micro_batches in ToyBatches().steps(first, last):
        losses.append(train_step(parts, micro_batches, progress).loss)
        progress = progress.advance(1, 0.0)
    return losses


def check(tmp_path: Path, name: str, dtype: torch.dtype, release: bool, schedule: str) -> None:
    def parts() -> Parts:
        made = {"optimizer": name, "dtype": dtype, "release": release, "scheduler": schedule, "total_steps": 4}
        options = {"momentum": 0.9} if name.endswith("-sgd") else {}
        return make_parts(**made, lr=1e-2 if options else 1e-3, max_grad_norm=0.0 if release else 0.1, options=options)

    straight = parts()
    before = state_of(straight)
    losses = steps(straight, 0, 2)
    Checkpoints(tmp_path).save(straight, Progress(2))
    resumed = parts()
    assert Checkpoints(tmp_path).restore(resumed, folders.find(tmp_path, "latest")) == Progress(2)
    assert differences(state_of(straight), state_of(resumed)) == []
    assert steps(straight, 2, 4) == steps(resumed, 2, 4) != losses
    assert differences(state_of(straight), state_of(resumed)) == []
    moved = [
        key for key in before if key.startswith("weights") and not torch.equal(before[key], state_of(straight)[key])
    ]
    assert len(moved) > 20


@pytest.mark.parametrize("number", range(len(NAMES) * 2))
def test_every_optimizer_and_precision(number: int, tmp_path: Path):
    """Released in every other case, and the schedules in turn."""
    name, dtype = NAMES[number // 2], (torch.float32, torch.bfloat16)[number % 2]
    check(tmp_path, name, dtype, bool((number // 2 + number) % 2), SCHEDULES[number % len(SCHEDULES)])


def test_the_whole_product(full: bool, tmp_path: Path):
    if not full:
        pytest.skip("long: --full")
    for name in NAMES:
        for dtype in (torch.float32, torch.bfloat16):
            for release in (False, True):
                for schedule in SCHEDULES[1:]:
                    check(tmp_path / f"{name} {dtype} {release} {schedule}", name, dtype, release, schedule)
