"""fit(): the loop, on one screen."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Protocol

import torch

from sana_tune.errors import Problem, UserError
from sana_tune.log import log
from sana_tune.progress import Every, Progress, due
from sana_tune.train.checkpoint import Checkpoints
from sana_tune.train.folders import Checkpoint
from sana_tune.train.signals import Stop
from sana_tune.train.step import Parts, StepResult, passed_over, summed, train_step
from sana_tune.train.validate import NoValidator, Validator
from sana_tune.watch.events import Finished, Started, Stepped, Stopped
from sana_tune.watch.sinks import Watcher

if TYPE_CHECKING:
    from sana_tune.train.step import Sample


class Course(Protocol):
    """What the loop takes from the plan (plan.Plan is one): where to, and what is due on the way."""

    @property
    def total_steps(self) -> int: ...
    @property
    def steps_per_epoch(self) -> float: ...
    def epoch_after(self, step: int) -> float: ...
    @property
    def save_every(self) -> Every: ...
    @property
    def validate_every(self) -> Every: ...


class Batches(Protocol):
    """Gives each step's micro-batches; data.loader.Batches."""

    def steps(self, first_step: int, total_steps: int) -> Iterator[Sequence[Sample]]: ...


def fit(
    plan: Course,
    parts: Parts,
    batches: Batches,
    validator: Validator | NoValidator,
    checkpoints: Checkpoints,
    watcher: Watcher,
    stop: Stop,
    *,
    resume: Checkpoint | None = None,
    export: Callable[[Progress], str | None] = lambda progress: None,
    max_bad_steps: int = 10,
) -> Progress:
    """Train from where `resume` stands to the last step; save, draw and tell on the way; at the end `export`.

    Returns the last position. Raises Interrupted after saving when a stop was asked for, UserError when the
    checkpoint does not fit, the disk is full, or `max_bad_steps` in a row are not finite.
    """
    progress, spoiled = checkpoints.restore(parts, resume), Spoiled(max_bad_steps)
    epochs = plan.epoch_after(plan.total_steps)
    watcher.emit(Started(progress, plan.total_steps, plan.steps_per_epoch, resume and str(resume.path), epochs))
    with stop.deferred(), checkpoints.telling(watcher.emit, lambda: stop.requested):
        watcher.emit(validator.start(parts, progress))
        if stop_agreed(parts, stop):  # nothing was trained yet, so the next start draws these pictures again
            watcher.emit(Stopped(progress, stop.reason))
            raise stop.interrupted()
        parts.transformer.train()
        patience = Patience(max_bad_steps)
        with closing(Timed(batches.steps(progress.step, plan.total_steps))) as steps:
            for micro_batches in steps:
                if progress.step in spoiled:
                    result = passed_over(parts, micro_batches, progress)
                else:
                    result = train_step(parts, micro_batches, progress)
                before, progress = progress, progress.advance(result.images, plan.epoch_after(progress.step + 1))
                watcher.emit(steps.event(progress, result))
                if result.spoiled and (held := checkpoints.held()) is not None:
                    spoiled.add(progress, result, held)
                    progress = checkpoints.restore(parts, held)
                    steps.restart(batches.steps(progress.step, plan.total_steps))
                    watcher.emit(Started(progress, plan.total_steps, plan.steps_per_epoch, str(held.path)))
                    continue
                patience.check(progress, result)
                checkpoints.poll()
                checkpoints.save_due(plan.save_every, parts, before, progress)
                if due(plan.validate_every, progress) and progress.step < plan.total_steps:
                    watcher.emit(validator.run(parts, progress))
                if stop_agreed(parts, stop):
                    break
        if not checkpoints.finish(parts, progress) or progress.step < plan.total_steps:
            watcher.emit(Stopped(progress, stop.reason))
            raise stop.interrupted()
        watcher.emit(validator.finish(parts, progress))
        watcher.emit(Finished(progress, export(progress)))
    if stop.requested:
        raise stop.interrupted()
    return progress


def stop_agreed(parts: Parts, stop: Stop) -> bool:
    """Whether any rank was asked to stop."""
    if parts.accelerator.num_processes == 1:
        return stop.requested
    flag = torch.tensor(float(stop.requested), device=parts.accelerator.device)
    if summed(parts.accelerator, flag).item() > 0 and not stop.requested:
        stop.request()
    return stop.requested


class Timed:
    """Hands steps on and measures them: step_s from asking for the data to `event`, data_wait_s the asking."""

    def __init__(self, steps: Iterator[Sequence[Sample]]):
        self._steps = steps
        self._asked_s = self._given_s = 0.0

    def __iter__(self) -> Timed:
        return self

    def __next__(self) -> Sequence[Sample]:
        self._asked_s = time.perf_counter()
        micro_batches = next(self._steps)
        self._given_s = time.perf_counter()
        return micro_batches

    def event(self, progress: Progress, result: StepResult) -> Stepped:
        """The step that was just done, as a value."""
        return Stepped(
            progress,
            loss=result.loss,
            learning_rate=result.learning_rate,
            grad_norm=result.grad_norm,
            step_s=time.perf_counter() - self._asked_s,
            data_wait_s=self._given_s - self._asked_s,
            images=result.images,
            skipped=result.skipped,
            losses=result.losses,
        )

    def restart(self, steps: Iterator[Sequence[Sample]]) -> None:
        """Go on with other steps; those before are ended."""
        self.close()
        self._steps = steps

    def close(self) -> None:
        """End the steps (and the thread that prepares them)."""
        if isinstance(self._steps, Generator):
            self._steps.close()


class Spoiled:
    """Steps that are passed over: their gradients were not finite when some weights had moved (gradient release).

    The run went back to a checkpoint for each of them. limit: how many a stretch between checkpoints may have.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self._steps: set[int] = set()

    def __contains__(self, step: int) -> bool:
        return step in self._steps

    def add(self, progress: Progress, result: StepResult, held: Checkpoint) -> None:
        """`progress` is right after the step. Raises UserError when there are too many since the checkpoint."""
        self._steps.add(progress.step - 1)
        log.warning(
            "step %d: the gradient is not finite (loss %s), and weights had moved already "
            "(optimizer_release_gradients): going back to %s; the step is passed over",
            progress.step, result.loss, held.path,
        )  # fmt: skip
        if sum(step >= held.step for step in self._steps) >= self.limit:
            what = f"{self.limit} steps after {held.path} had gradients that are not finite; the checkpoint is sound"
            raise UserError(Problem(f"step {progress.step}", what, _CURE))


_CURE = "lower learning_rate, or train with --mixed_precision no to see whether precision is the cause"


class Patience:
    """Ends a run whose steps are not finite any more: `limit` of them in a row."""

    def __init__(self, limit: int):
        self.limit = limit
        self._bad = 0

    def check(self, progress: Progress, result: StepResult) -> None:
        """Count one step. Raises UserError with the last numbers when the limit is reached."""
        self._bad = self._bad + 1 if result.skipped else 0
        if self._bad >= self.limit:
            sound = "there is no checkpoint yet" if result.spoiled else "none of them moved a weight"
            what = (
                f"{self._bad} steps in a row had numbers that are not finite (loss {result.loss}, gradient norm "
                f"{result.grad_norm}); {sound}{'' if result.spoiled else ', so the checkpoints are sound'}"
            )
            raise UserError(Problem(f"step {progress.step}", what, _CURE))
