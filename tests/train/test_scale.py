"""The loss scale of fp16: what GradScaler would do, with the step's own knowledge of what is finite."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sana_tune.progress import Progress
from sana_tune.train import folders
from sana_tune.train.checkpoint import Checkpoints
from sana_tune.train.scale import FIRST_SCALE, GROWTH_STEPS, LossScale, NoLossScale
from sana_tune.train.step import Parts, train_step
from tests.train.toys import ToyBatches, differences, make_parts, state_of


def scaled_parts(**settings) -> Parts:
    parts = make_parts(**settings)
    return replace(parts, scale=LossScale(parts.optimizer))


def steps(parts: Parts, first: int, last: int, bad: tuple[int, ...] = ()) -> list[float]:
    losses, progress = [], Progress(first)
    for micro_batches in ToyBatches(bad_steps=bad).steps(first, last):
        result = train_step(parts, micro_batches, progress)
        losses.append(result.loss)
        progress = progress.advance(result.images, 0.0)
    return losses


def scale_of(parts: Parts) -> float:
    assert isinstance(parts.scale, LossScale)
    return parts.scale.value


def test_a_scaled_run_is_the_plain_one():
    """Scales are powers of 2, which fp32 takes without rounding."""
    plain, scaled = make_parts(), scaled_parts()
    assert steps(plain, 0, 4) == steps(scaled, 0, 4)
    names = [name for name in differences(state_of(plain), state_of(scaled)) if "loss_scale" not in name]
    assert names == []


def test_it_falls_after_a_bad_step_and_rises_after_many_good_ones():
    parts = scaled_parts()
    steps(parts, 0, 3, bad=(1, 2))
    assert scale_of(parts) == FIRST_SCALE / 4
    for _ in range(GROWTH_STEPS):
        parts.scale.update(True)
    assert scale_of(parts) == FIRST_SCALE / 2
    for _ in range(40):
        parts.scale.update(False)
    assert scale_of(parts) == 1.0


def test_its_course_is_gradscalers():
    """The same scale after the same good and bad steps."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], 1e-3)
    theirs = torch.amp.GradScaler("cpu", init_scale=FIRST_SCALE, growth_interval=GROWTH_STEPS)
    ours = LossScale(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 1e-3))
    for number in range(GROWTH_STEPS + 40):
        good = number not in (3, 4, 20)
        theirs.scale(parameter.sum() * (1.0 if good else float("inf"))).backward()
        theirs.step(optimizer)
        theirs.update()
        optimizer.zero_grad()
        ours.update(good)
    assert ours.value == theirs.get_scale()


def test_it_is_in_the_checkpoint(tmp_path: Path):
    parts = scaled_parts()
    steps(parts, 0, 3, bad=(1,))
    Checkpoints(tmp_path).save(parts, Progress(3))
    other = scaled_parts()
    checkpoint = folders.find(tmp_path, "latest")
    Checkpoints(tmp_path).restore(other, checkpoint)
    assert scale_of(other) == FIRST_SCALE / 2
    assert steps(parts, 3, 5) == steps(other, 3, 5)
    assert differences(state_of(parts), state_of(other)) == []


def test_gradients_below_fp16_survive():
    """What the scale is for: 1e-9 is nothing in fp16."""
    weight = torch.tensor([1.0], requires_grad=True)
    scale = LossScale(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 1e-3))

    def gradient(scaler) -> float:
        weight.grad = None
        scaler.scaled((weight.to(torch.float16) * 1e-3).float().sum() * 1e-5).backward()
        parameter = torch.nn.Parameter(weight.detach())
        parameter.grad = weight.grad
        scaler.unscale([parameter])
        assert parameter.grad is not None
        return parameter.grad.item()

    assert gradient(NoLossScale()) == 0.0
    assert gradient(scale) == pytest.approx(1e-8, rel=0.02)
