"""Every optimizer, precision, schedule and average: it trains, is saved and restored, and goes on bit for bit."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from sana_tune.config.choices import LR_SCHEDULERS
from sana_tune.config.optimizers import OPTIMIZER_FACTS
from sana_tune.progress import Progress
from sana_tune.train import folders
from sana_tune.train.checkpoint import Checkpoints
from sana_tune.train.scale import LossScale
from sana_tune.train.step import Parts, train_step
from tests.train.toys import ToyBatches, differences, make_parts, state_of

NAMES = [name for name, facts in OPTIMIZER_FACTS.items() if not facts.paged]  # on a CPU those are these
SCHEDULES = list(LR_SCHEDULERS)
# dtype of the weights, and what is computed in
PRECISIONS: dict[str, tuple[torch.dtype, str]] = {
    "fp32": (torch.float32, "no"),
    "bf16": (torch.bfloat16, "no"),
    "fp32, bf16 computed": (torch.float32, "bf16"),
    "bf16 under autocast": (torch.bfloat16, "bf16"),
    "the loss scale of fp16": (torch.float32, "no"),  # a CPU does not compute in fp16 itself (test_half.py)
}
AVERAGES: dict[str, dict[str, Any]] = {
    "none": {"ema_decay": None},
    "beside the weights": {},
    "in main memory": {"ema_options": {"place": "cpu"}},
    "every other step": {"ema_interval": 2},
    "warmed up, in main memory": {"ema_options": {"place": "cpu", "warmup": 1}},
}


def steps(parts: Parts, first: int, last: int) -> list[float]:
    losses, progress = [], Progress(first)
    for micro_batches in ToyBatches().steps(first, last):
        losses.append(train_step(parts, micro_batches, progress).loss)
        progress = progress.advance(1, 0.0)
    return losses


@dataclass(frozen=True)
class Kind:
    """One way to train. precision: of PRECISIONS; average: of AVERAGES."""

    optimizer: str
    precision: str
    release: bool
    schedule: str
    average: str

    def parts(self) -> Parts:
        dtype, computed = PRECISIONS[self.precision]
        options = {"momentum": 0.9} if self.optimizer.endswith("-sgd") else {}
        made = make_parts(
            optimizer=self.optimizer, dtype=dtype, mixed_precision=computed, release=self.release,
            scheduler=self.schedule, total_steps=4, lr=1e-2 if options else 1e-3,
            max_grad_norm=0.0 if self.release else 0.1, options=options, **AVERAGES[self.average],
        )  # fmt: skip
        if self.precision != "the loss scale of fp16":
            return made
        return replace(made, scale=LossScale(made.optimizer))


def check(tmp_path: Path, kind: Kind) -> None:
    """It trains, is saved and restored whole, and goes on bit for bit."""
    straight = kind.parts()
    before = state_of(straight)
    losses = steps(straight, 0, 2)
    Checkpoints(tmp_path).save(straight, Progress(2))
    resumed = kind.parts()
    assert Checkpoints(tmp_path).restore(resumed, folders.find(tmp_path, "latest")) == Progress(2)
    assert differences(state_of(straight), state_of(resumed)) == []
    assert steps(straight, 2, 4) == steps(resumed, 2, 4) != losses
    after = state_of(straight)
    assert differences(after, state_of(resumed)) == []
    for part in ("weights", *["ema"] * (kind.average != "none")):
        moved = [key for key in before if key.startswith(part) and not torch.equal(before[key], after[key])]
        assert len(moved) > 20, part
    tensors = [value for value in after.values() if isinstance(value, torch.Tensor) and value.is_floating_point()]
    assert all(value.isfinite().all() for value in tensors)
    assert (kind.average == "none") == (not any(key.startswith("ema") for key in after))


def kind_of(number: int) -> Kind:
    """Two kinds for each optimizer, of which one has bf16 weights; all else in turn, by numbers without a divisor."""
    precisions, averages = list(PRECISIONS), list(AVERAGES)
    return Kind(
        NAMES[number // 2],
        precisions[number % 4],
        bool((number // 4 + number) % 2),
        SCHEDULES[number % len(SCHEDULES)],
        averages[number % len(averages)],
    )


KINDS = [kind_of(number) for number in range(len(NAMES) * 2)]


def test_the_kinds_meet_each_other():
    """Every optimizer with fp32 and with bf16 weights; every schedule, precision and average with every other."""
    weights = {(kind.optimizer, PRECISIONS[kind.precision][0]) for kind in KINDS}
    assert len(weights) == 2 * len(NAMES) == 44
    averages, schedules, precisions = list(AVERAGES), SCHEDULES, list(PRECISIONS)[:4]
    for one, other, found in (
        (schedules, averages, {(kind.schedule, kind.average) for kind in KINDS}),
        (precisions, averages, {(kind.precision, kind.average) for kind in KINDS}),
        (precisions, schedules, {(kind.precision, kind.schedule) for kind in KINDS}),
        ([False, True], averages, {(kind.release, kind.average) for kind in KINDS}),
        ([False, True], precisions, {(kind.release, kind.precision) for kind in KINDS}),
        ([False, True], schedules, {(kind.release, kind.schedule) for kind in KINDS}),
    ):
        assert found == {(a, b) for a in one for b in other}


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_optimizer_schedule_precision_and_average(kind: Kind, tmp_path: Path):
    check(tmp_path, kind)


@pytest.mark.parametrize("number", range(5))
def test_fp16_with_its_loss_scale(number: int, tmp_path: Path):
    """Of every family of optimizers one; gradients cannot be released then."""
    name = ("optimi-adamw", "torch-adamw", "adamw_bf16", "came", "bnb-lion8bit")[number]
    check(tmp_path, Kind(name, "the loss scale of fp16", False, SCHEDULES[number + 1], list(AVERAGES)[number]))


@pytest.mark.timeout(3600)
def test_the_whole_product(full: bool, tmp_path: Path):
    if not full:
        pytest.skip("long: --full")
    for place, parts in enumerate(product(NAMES, PRECISIONS, (False, True), SCHEDULES[1:], AVERAGES)):
        kind = Kind(*parts)
        if not (kind.release and kind.precision == "the loss scale of fp16"):
            check(tmp_path / str(place), kind)
            shutil.rmtree(tmp_path / str(place))
