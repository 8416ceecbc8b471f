"""Gradients released inside the backward pass: the same steps, less memory, and no NaN that stays."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from sana_tune.errors import UserError
from sana_tune.progress import Every, Progress
from sana_tune.train import folders
from sana_tune.train.checkpoint import Checkpoints
from sana_tune.train.loop import fit
from sana_tune.train.signals import Stop
from sana_tune.train.step import Parts, StepResult, micro_loss, train_step
from sana_tune.train.validate import NoValidator
from sana_tune.watch.events import Event, Noticed, Started, Stepped
from sana_tune.watch.sinks import Watcher
from tests.train.toys import Course, ToyBatches, differences, make_parts, state_of

SINGLE = ("optimi-adamw", "optimi-lion", "bnb-lion8bit", "torch-adamw", "came")


def run(parts: Parts, steps: int, bad: tuple[int, ...] = ()) -> list[StepResult]:
    results, progress = [], Progress()
    for micro_batches in ToyBatches(bad_steps=bad).steps(0, steps):
        results.append(train_step(parts, micro_batches, progress))
        progress = progress.advance(results[-1].images, 0.0)
    return results


def weights(parts: Parts) -> dict:
    return {name: value for name, value in state_of(parts).items() if name.startswith(("weights", "ema"))}


@pytest.mark.parametrize("optimizer", SINGLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("limit", "method"), [(0.0, "norm"), (0.01, "value"), (0.1, "norm")])
def test_it_trains_as_without(optimizer: str, dtype: torch.dtype, limit: float, method: str):
    """Bit for bit; clipping by norm multiplies by a factor that is rounded elsewhere."""
    settings = {"optimizer": optimizer, "dtype": dtype, "max_grad_norm": limit, "clip_method": method}
    plain, released = make_parts(**settings), make_parts(**settings, release=True)
    one, other = run(plain, 4), run(released, 4)
    exact = limit == 0.0 or method == "value"
    assert [result.grad_norm for result in other] == pytest.approx([result.grad_norm for result in one], rel=1e-2)
    if exact and dtype == torch.float32:
        assert [result.loss for result in one] == [result.loss for result in other]
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    for name, value in weights(plain).items():
        torch.testing.assert_close(weights(released)[name], value, rtol=tolerance, atol=tolerance)
    assert all(parameter.grad is None for parameter in released.trained)


def test_no_two_gradients_are_there_at_once():
    parts = make_parts(release=True, max_grad_norm=0.0)
    most = 0

    def look(parameter: torch.Tensor) -> None:
        nonlocal most
        most = max(most, sum(each.grad is not None for each in parts.trained))

    handles = [each.register_post_accumulate_grad_hook(look) for each in parts.trained]
    run(parts, 1)
    assert most <= 1 and handles, "those hooks run after ours"
    for each in parts.trained:
        assert each.grad is None


def test_hooks_do_nothing_outside_a_step():
    parts = make_parts(release=True)
    before = weights(parts)
    sum(parameter.float().sum() for parameter in parts.trained).backward()  # type: ignore[union-attr]
    assert differences(before, weights(parts)) == []
    assert all(parameter.grad is not None for parameter in parts.trained)


def spoil_gradient(parts: Parts, step: list[int]) -> None:
    """From the first backward pass of step[0] on, one parameter's gradient is infinite; others are sound."""
    parts.bare.proj_out.weight.register_hook(lambda gradient: gradient * (float("inf") if step[0] else 1.0))


@pytest.mark.parametrize("where", ["latents", "gradient"])
def test_with_clipping_by_norm_a_bad_step_moves_nothing(where: str):
    parts = make_parts(release=True, max_grad_norm=0.1)
    run(parts, 2)
    before = state_of(parts)
    if where == "gradient":
        spoil_gradient(parts, [1])
    batch = next(ToyBatches(bad_steps=(2,) if where == "latents" else ()).steps(2, 3))
    result = train_step(parts, batch, Progress(2))
    assert result.skipped and not result.spoiled
    assert differences(before, state_of(parts)) == []


@pytest.mark.parametrize("where", ["latents", "gradient"])
def test_without_it_a_bad_gradient_is_taken_as_zero_and_said(where: str):
    parts = make_parts(release=True, max_grad_norm=0.0)
    run(parts, 2)
    average = {name: value for name, value in weights(parts).items() if name.startswith("ema")}
    if where == "gradient":
        spoil_gradient(parts, [1])
    batch = next(ToyBatches(bad_steps=(2,) if where == "latents" else ()).steps(2, 3))
    result = train_step(parts, batch, Progress(2))
    assert result.skipped and result.spoiled and not math.isfinite(result.grad_norm)
    assert all(torch.isfinite(value).all() for value in weights(parts).values())
    assert all(
        torch.isfinite(value.float()).all()
        for value in state_of(parts).values()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
    ), "no state is spoiled either"
    now = {name: value for name, value in weights(parts).items() if name.startswith("ema")}
    assert differences(average, now) == [], "the average does not follow"


def exact_gradients(parts: Parts, micro_batches) -> list[torch.Tensor]:
    """Of the mean loss of all micro-batches, at once and by nothing of the step but its loss."""
    count = len(micro_batches)
    losses = [micro_loss(parts, batch, 0, number, count).mean for number, (_, batch) in enumerate(micro_batches)]
    return list(torch.autograd.grad(torch.stack(losses).mean(), parts.trained))


@pytest.mark.parametrize(("accumulation", "release"), [(1, True), (1, False), (3, False)])
def test_the_gradients_are_those_of_the_mean_loss(accumulation: int, release: bool):
    """SGD without momentum moves weights by the gradient itself."""
    settings = {"optimizer": "torch-sgd", "lr": 1.0, "max_grad_norm": 0.0, "ema_decay": None, "total_steps": 3}
    parts = make_parts(**settings, release=release)
    micro_batches = next(ToyBatches(accumulation).steps(0, 1))
    expected = exact_gradients(parts, micro_batches)
    before = [weight.detach().clone() for weight in parts.trained]
    result = train_step(parts, micro_batches, Progress())
    for weight, start, gradient in zip(parts.trained, before, expected, strict=True):
        moved = (start - weight.detach()) / result.learning_rate
        torch.testing.assert_close(moved, gradient, rtol=1e-4, atol=1e-6)
    norm = torch.linalg.vector_norm(torch.cat([gradient.flatten() for gradient in expected]))
    assert result.grad_norm == pytest.approx(norm.item(), rel=1e-5)


@pytest.mark.parametrize("optimizer", ["optimi-adamw", "bnb-lion8bit", "torch-adamw", "came"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_after_a_resume_the_schedule_still_reaches_the_weights(optimizer: str, dtype: torch.dtype, tmp_path: Path):
    """optimi's own gradient release keeps copies of its groups in a checkpoint: the rate would stand still."""
    settings = {"optimizer": optimizer, "dtype": dtype, "max_grad_norm": 0.0, "release": True, "scheduler": "linear"}
    saved = make_parts(**settings)
    run(saved, 3)
    Checkpoints(tmp_path).save(saved, Progress(3))
    resumed = make_parts(**settings)
    Checkpoints(tmp_path).restore(resumed, folders.find(tmp_path, "latest"))
    rates = []
    for step in (3, 10, 19, 20):
        before = weights(resumed)
        result = train_step(resumed, next(ToyBatches().steps(step, step + 1)), Progress(step))
        rates.append(result.learning_rate)
        assert {group["lr"] for group in resumed.optimizer.param_groups} == {result.learning_rate}
        moved = [
            name
            for name, value in weights(resumed).items()
            if name.startswith("weights") and not torch.equal(before[name], value)
        ]
        assert bool(moved) is (step < 20), "with the rate at 0 nothing moves"
    assert rates == sorted(rates, reverse=True) and rates[-1] == 0.0


# ---- the loop goes back ----


class Kept:
    """A sink that keeps what it hears."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def emit(self, event: Event) -> None:
        self.events.append(event)

    def close(self) -> None:
        pass


def fitted(output: Path, parts: Parts, bad: tuple[int, ...], *, save_every: int = 3, limit: int = 10) -> list[Event]:
    kept = Kept()
    course = Course(total_steps=8, save_every=Every(save_every))
    with Watcher([kept]) as watcher:
        fit(
            course, parts, ToyBatches(bad_steps=bad), NoValidator(), Checkpoints(output), watcher, Stop(),
            max_bad_steps=limit,
        )  # fmt: skip
    return kept.events


def test_it_goes_back_to_its_checkpoint_and_passes_the_step_over(tmp_path: Path):
    """As if the step had been skipped before anything moved, which is what a run without release does."""
    plain = make_parts(max_grad_norm=0.0)
    fitted(tmp_path / "plain", plain, (5,))
    released = make_parts(max_grad_norm=0.0, release=True)
    events = fitted(tmp_path / "released", released, (5,))
    differing = differences(weights(plain), weights(released))
    assert differing == []
    notices = [event.message for event in events if isinstance(event, Noticed)]
    (said,) = [message for message in notices if "going back" in message]
    assert said.startswith("step 6: the gradient is not finite") and "checkpoint-3; the step is passed over" in said
    (first, again) = [event for event in events if isinstance(event, Started)]
    assert first.progress.step == 0 and again.progress.step == 3 and "checkpoint-3" in str(again.resumed_from)
    trained = [(event.progress.step, event.skipped) for event in events if isinstance(event, Stepped)]
    assert trained == [(1, False), (2, False), (3, False), (4, False), (5, False), (6, True), (4, False), (5, False),
                       (6, True), (7, False), (8, False)]  # fmt: skip


def test_before_the_first_checkpoint_it_goes_on(tmp_path: Path):
    released = make_parts(max_grad_norm=0.0, release=True)
    events = fitted(tmp_path, released, (1,))
    assert len([event for event in events if isinstance(event, Started)]) == 1
    assert [event.progress.step for event in events if isinstance(event, Stepped)] == list(range(1, 9))
    assert all(torch.isfinite(value).all() for value in weights(released).values())


def test_it_does_not_go_back_for_ever(tmp_path: Path):
    released = make_parts(max_grad_norm=0.0, release=True)
    with pytest.raises(UserError, match=r"3 steps after .*checkpoint-4 had gradients that are not finite"):
        fitted(tmp_path, released, (5, 6, 7), save_every=4, limit=3)
