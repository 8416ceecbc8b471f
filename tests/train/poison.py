"""Numbers that go wrong at a chosen place of a tiny run: latents, captions, masks, a module's output, a gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sana_tune.data.batch import Batch
from sana_tune.data.order import MicroBatch
from sana_tune.train.step import Parts
from tests.train.toys import ToyBatches

NAN, INF = float("nan"), float("inf")


class PoisonedBatches(ToyBatches):
    """Toy batches, of which the second sample of some steps' first micro-batch holds a bad number.

    place: "latents", "text" or "loss_mask".
    """

    def __init__(self, steps: tuple[int, ...], place: str, value: float, accumulation: int = 1):
        super().__init__(accumulation)
        self._poisoned, self._place, self._value = steps, place, value

    def micro_batch(self, step: int, index: int) -> tuple[MicroBatch, Batch]:
        micro, batch = super().micro_batch(step, index)
        if step in self._poisoned and index == step * self.accumulation:
            tensor = getattr(batch, self._place)
            tensor = torch.ones_like(batch.latents[:, :1]) if tensor is None else tensor.clone()
            tensor[1].view(-1)[0] = self._value
            batch = replace(batch, **{self._place: tensor})
        return micro, batch


class Steps:
    """Tells which step is computed, by counting what is asked for; a hook asks it whether it is due."""

    def __init__(self, bad: tuple[int, ...]):
        self.bad, self.now = bad, -1

    @property
    def due(self) -> bool:
        return self.now in self.bad

    def watch(self, batches: ToyBatches) -> ToyBatches:
        """Batches that say which step is handed out."""
        inner = batches.steps

        def steps(first: int, total: int) -> Iterator[list[tuple[MicroBatch, Batch]]]:
            for number, micro_batches in enumerate(inner(first, total), start=first):
                self.now = number
                yield micro_batches

        batches.steps = steps  # type: ignore[method-assign]
        return batches


@contextmanager
def poisoned_output(parts: Parts, module: str, value: float, steps: Steps) -> Iterator[None]:
    """A module whose forward gives one bad number in the due steps."""
    target = parts.bare.get_submodule(module)
    inner: Callable[..., Any] = target.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = inner(*args, **kwargs)
        return output + _spot(output, value) if steps.due else output

    target.forward = forward
    try:
        yield
    finally:
        del target.forward


@contextmanager
def poisoned_gradient(parts: Parts, name: str, value: float, steps: Steps) -> Iterator[None]:
    """A weight whose gradient gets one bad number in the due steps."""
    handle = parts.bare.get_parameter(name).register_hook(lambda g: g + _spot(g, value) if steps.due else g)
    try:
        yield
    finally:
        handle.remove()


def _spot(like: Tensor, value: float) -> Tensor:
    spot = torch.zeros_like(like)
    spot.view(-1)[0] = value
    return spot
