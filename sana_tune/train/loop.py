"""fit(): the loop, on one screen."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Protocol

import torch

from sana_tune.progress import Every, Progress, due
from sana_tune.train.checkpoint import Checkpoints
from sana_tune.train.device import MemoryMeter
from sana_tune.train.diagnosis import diagnose, diagnosed
from sana_tune.train.evaluate import Evaluator, NoEvaluator, judged
from sana_tune.train.folders import Checkpoint
from sana_tune.train.signals import SIGNALS, Stop
from sana_tune.train.step import Parts, StepResult, joined, passed_over, summed, train_step
from sana_tune.watch.events import Event, Finished, Measured, Noticed, Started, Stepped, Stopped, Validated
from sana_tune.watch.sinks import Watcher

if TYPE_CHECKING:
    from sana_tune.train.step import Sample


_NOTHING = NoEvaluator()


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
    @property
    def evaluate_every(self) -> Every: ...


class Batches(Protocol):
    """Gives each step's micro-batches; data.loader.Batches."""

    def steps(self, first_step: int, total_steps: int) -> Iterator[Sequence[Sample]]: ...


class Validates(Protocol):
    """Draws pictures when it is asked to: train.validate.Validator, NoValidator, train.external.ScriptValidator.

    from_files: whether it takes the weights from the newest checkpoint, which must be complete then.
    """

    @property
    def from_files(self) -> bool: ...
    def start(self, parts: Parts, progress: Progress) -> Validated: ...
    def run(self, parts: Parts, progress: Progress) -> Validated: ...
    def finish(self, parts: Parts, progress: Progress) -> Validated: ...


def fit(
    plan: Course,
    parts: Parts,
    batches: Batches,
    validator: Validates,
    checkpoints: Checkpoints,
    watcher: Watcher,
    stop: Stop,
    *,
    resume: Checkpoint | None = None,
    export: Callable[[Progress], str | None] = lambda progress: None,
    evaluator: Evaluator | NoEvaluator = _NOTHING,
    max_bad_steps: int = 10,
    rehearse: Callable[[Progress], None] = lambda progress: None,
) -> Progress:
    """Restore `resume`, `rehearse`, train to the last step; save, draw and tell on the way; at the end `export`.

    Returns the last position. Raises Interrupted after saving when a stop was asked for, UserError when the
    checkpoint does not fit, the disk is full, or `max_bad_steps` in a row are not finite.
    """
    progress, spoiled, patience = checkpoints.restore(parts, resume), Spoiled(max_bad_steps), Patience(max_bad_steps)
    rehearse(progress)
    watcher.emit(started(plan, progress, resume))
    with stop.deferred(), checkpoints.telling(watcher.emit, lambda: stop.requested):
        watcher.emit(validator.start(parts, progress))
        tell(watcher, evaluator.start(parts, progress))
        if stop_agreed(parts, stop):  # nothing was trained yet, so the next start draws these pictures again
            watcher.emit(Stopped(progress, stop.reason))
            raise stop.interrupted()
        parts.transformer.train()
        with closing(Timed(batches.steps(progress.step, plan.total_steps), parts.accelerator.device)) as steps:
            for micro_batches in steps:
                before, step = progress, passed_over if progress.step in spoiled else train_step
                result = step(parts, micro_batches, before)
                progress = progress.advance(result.images, plan.epoch_after(progress.step + 1))
                watcher.emit(steps.event(progress, result))
                if result.skipped:
                    watcher.emit(noticed(parts, progress, result, micro_batches))
                    patience.check(parts, micro_batches, before, result, checkpoints)
                if result.spoiled and (held := checkpoints.held()) is not None:
                    watcher.emit(spoiled.add(parts, micro_batches, before, result, held, checkpoints))
                    progress = checkpoints.restore(parts, held)
                    steps.restart(batches.steps(progress.step, plan.total_steps))
                    watcher.emit(started(plan, progress, held))
                    continue
                patience.end_row(result)
                checkpoints.poll()
                do_what_is_due(plan, parts, progress, checkpoints, evaluator, validator, watcher)
                if stop_agreed(parts, stop):
                    break
        if not checkpoints.finish(parts, progress) or progress.step < plan.total_steps:
            watcher.emit(Stopped(progress, stop.reason, patience.skipped))
            raise stop.interrupted()
        measure(evaluator.finish(parts, progress), progress, checkpoints, watcher)
        watcher.emit(validator.finish(parts, progress))
        watcher.emit(Finished(progress, export(progress), patience.skipped))
    if stop.requested:
        raise stop.interrupted()
    return progress


def do_what_is_due(
    plan: Course,
    parts: Parts,
    progress: Progress,
    checkpoints: Checkpoints,
    evaluator: Evaluator | NoEvaluator,
    validator: Validates,
    watcher: Watcher,
) -> None:
    """Save, measure and draw, where it is time for it; after the last step the end of the run does that."""
    checkpoints.save_due(plan.save_every, parts, progress, plan.epoch_after)
    if progress.step == plan.total_steps:
        return
    if due(plan.evaluate_every, progress, plan.epoch_after):
        measure(evaluator.run(parts, progress), progress, checkpoints, watcher)
    if due(plan.validate_every, progress, plan.epoch_after):
        if validator.from_files:
            checkpoints.held()
        watcher.emit(validator.run(parts, progress))


def measure(measured: Measured | None, progress: Progress, checkpoints: Checkpoints, watcher: Watcher) -> None:
    """Tell what was measured; the held-out loss also to the checkpoints, of which the best may be kept."""
    tell(watcher, measured)
    if measured is not None and (loss := judged(measured)) is not None:
        checkpoints.judge(progress, loss)


def tell(watcher: Watcher, event: Event | None) -> None:
    """Emit what there is to tell."""
    if event is not None:
        watcher.emit(event)


def started(plan: Course, progress: Progress, resumed: Checkpoint | None) -> Started:
    """What is told where training begins, or goes on from a checkpoint."""
    epochs = plan.epoch_after(plan.total_steps)
    return Started(progress, plan.total_steps, plan.steps_per_epoch, resumed and str(resumed.path), epochs)


def stop_agreed(parts: Parts, stop: Stop) -> bool:
    """Whether any rank was asked to stop, as all of them know it by now."""
    if parts.accelerator.num_processes == 1:
        return stop.requested
    asked = [float(stop.signal_number == number) for number in SIGNALS]
    heard = summed(parts.accelerator, torch.tensor(asked, device=parts.accelerator.device)).tolist()
    if any(heard) and not stop.requested:
        stop.request(SIGNALS[heard.index(max(heard))])
    return any(heard)  # a signal that came just now is for the next time: the others do not know of it


class Timed:
    """Hands steps on and measures them: step_s from asking for the data to `event`, data_wait_s the asking.

    device: whose memory is told with each step.
    """

    def __init__(self, steps: Iterator[Sequence[Sample]], device: torch.device):
        self._steps = steps
        self._memory = MemoryMeter(device)
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
            memory_bytes=self._memory.most_bytes(),
            skipped=result.skipped,
            losses=result.losses,
            by_sigma=result.by_sigma,
        )

    def restart(self, steps: Iterator[Sequence[Sample]]) -> None:
        """Go on with other steps; those before are ended."""
        self.close()
        self._steps = steps

    def close(self) -> None:
        """End the steps (and the thread that prepares them)."""
        if isinstance(self._steps, Generator):
            self._steps.close()


def noticed(parts: Parts, progress: Progress, result: StepResult, micro_batches: Sequence[Sample]) -> Noticed:
    """What whoever watches is told of a step that moved nothing. `progress` is right after it."""
    bad = "gradient norm" if math.isfinite(result.loss) else "loss"
    ids = joined(parts.accelerator, [id for _, batch in micro_batches for id in batch.ids])
    more = f" and {len(ids) - _TOLD} more" if len(ids) > _TOLD else ""
    pictures = f"its pictures: {', '.join(ids[:_TOLD])}{more}"
    return Noticed(progress, f"step {progress.step} was skipped: its {bad} is not finite; {pictures}")


_TOLD = 8


class Spoiled:
    """Steps that are passed over: their gradients were not finite when some weights had moved (gradient release).

    The run went back to a checkpoint for each of them. limit: how many a stretch between checkpoints may have.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self._steps: set[int] = set()

    def __contains__(self, step: int) -> bool:
        return step in self._steps

    def add(
        self,
        parts: Parts,
        micro_batches: Sequence[Sample],
        before: Progress,
        result: StepResult,
        held: Checkpoint,
        checkpoints: Checkpoints,
    ) -> Noticed:
        """The step after `before` is spoiled. Raises UserError when there are too many since the checkpoint."""
        self._steps.add(before.step)
        if sum(step >= held.step for step in self._steps) >= self.limit:
            why = f"{self.limit} steps after {held.path} had gradients that are not finite"
            found = diagnose(parts, micro_batches, before.step, result.loss, result.grad_norm)
            raise diagnosed(found, checkpoints.output_dir, why, f"The checkpoint {held.path.name} is sound")
        text = (
            f"step {before.step + 1}: the gradient is not finite (loss {result.loss}), and weights had moved already "
            f"(optimizer_release_gradients): going back to {held.path}; the step is passed over"
        )
        return Noticed(before, text)


class Patience:
    """Ends a run whose steps are not finite any more: `limit` of them in a row. skipped: how many there were in all."""

    def __init__(self, limit: int):
        self.limit = limit
        self.skipped = 0
        self._bad = 0

    def check(
        self,
        parts: Parts,
        micro_batches: Sequence[Sample],
        before: Progress,
        result: StepResult,
        checkpoints: Checkpoints,
    ) -> None:
        """Count a bad step, the one after `before`. Raises UserError with a diagnosis when the limit is reached."""
        self._bad, self.skipped = self._bad + 1, self.skipped + 1
        if self._bad < self.limit or (result.spoiled and checkpoints.held() is not None):
            return
        why = (
            f"{self._bad} steps in a row had numbers that are not finite (loss {result.loss}, gradient norm "
            f"{result.grad_norm})"
        )
        held = checkpoints.held()
        sound = "There is no checkpoint yet" if held is None else f"The checkpoint {held.path.name} is sound"
        if not result.spoiled:
            sound = f"None of them moved a weight; {sound[0].lower()}{sound[1:]}"
        found = diagnose(parts, micro_batches, before.step, result.loss, result.grad_norm)
        raise diagnosed(found, checkpoints.output_dir, why, sound)

    def end_row(self, result: StepResult) -> None:
        """A good step ends a row of bad ones."""
        if not result.skipped:
            self._bad = 0
