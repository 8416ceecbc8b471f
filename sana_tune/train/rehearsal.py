"""The heaviest moments of a run, gone through before its first step, so that memory runs out then or never.

Forward and backward of the largest micro-batch with the longest text, beside as many bytes as the optimizer's states
will take, then one validation picture. Nothing is kept of it and nothing changed: no weight, gradient, state, average
or position, and no random number is drawn from a generator that anything else draws from.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from sana_tune.data.batch import Batch
from sana_tune.data.records import Role
from sana_tune.memory import Load
from sana_tune.model.sana import empty_device_cache
from sana_tune.train.sharding import local
from sana_tune.train.step import Parts, clip, micro_loss


@dataclass(frozen=True)
class Heaviest:
    """What is gone through.

    loads:        role → its largest micro-batch. factor: pixels a side of a latent position. tokens: of the longest
                  text.
    accumulation: micro-batches in a step of this process: with more than one, gradients are there in the forward pass.
    masked:       whether samples may have a loss mask. states_bytes: what the optimizer's states take on the device, of
                  a split model this process's part.
    draw:         makes one validation picture of the largest size with one step of its sampler; None = none are drawn.
    """

    loads: Mapping[Role, Load]
    factor: int
    tokens: int
    accumulation: int = 1
    masked: bool = False
    states_bytes: int = 0
    draw: Callable[[], None] | None = None


@dataclass(frozen=True)
class Taken:
    """What a rehearsal took. peak_bytes: of the GPU's memory, at most; None elsewhere, where nobody counts it."""

    duration_s: float
    peak_bytes: int | None


def rehearse(parts: Parts, heaviest: Heaviest, step: int) -> Taken:
    """Go through it as in the step that follows `step` done ones. Whatever memory running out raises is raised."""
    device, started = parts.accelerator.device, time.perf_counter()
    on_gpu, training = device.type == "cuda", parts.transformer.training
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    with torch.random.fork_rng([device] if on_gpu else []):
        try:
            parts.transformer.train()
            with _held(heaviest.states_bytes - held_bytes(parts.optimizer, device), device):
                for role, load in heaviest.loads.items():
                    _passes(parts, batch_of(parts, heaviest, role, load), step, heaviest.accumulation)
                    _free_gradients(parts)
                if heaviest.draw is not None:
                    heaviest.draw()
            peak = torch.cuda.max_memory_allocated(device) if on_gpu else None
        finally:
            _free_gradients(parts)
            parts.transformer.train(training)
            empty_device_cache()
            if on_gpu:  # from here on it is what the steps take
                torch.cuda.reset_peak_memory_stats(device)
    return Taken(time.perf_counter() - started, peak)


def batch_of(parts: Parts, heaviest: Heaviest, role: Role, load: Load) -> Batch:
    """A micro-batch of that size, all of zeros and ones; one of several texts is shorter, so that they are masked."""
    config, size = parts.bare.config, load.batch_size
    height, width = load.height_px // heaviest.factor, load.width_px // heaviest.factor
    mask = torch.ones(size, heaviest.tokens, dtype=torch.int64)
    if size > 1 and heaviest.tokens > 1:
        mask[0, -1] = 0
    return Batch(
        latents=torch.zeros(size, config["in_channels"], height, width),
        text=torch.ones(size, heaviest.tokens, config["caption_channels"], dtype=parts.input_dtype),
        text_mask=mask,
        loss_mask=torch.ones(size, 1, height, width) if heaviest.masked else None,
        role=role,
        ids=tuple(f"rehearsal/{number}" for number in range(size)),
    )


def held_bytes(optimizer: torch.optim.Optimizer, device: torch.device) -> int:
    """Bytes of the optimizer's states that are on the device already: all of them in a run that goes on."""
    values = (value for state in optimizer.state.values() for value in state.values())
    tensors = {id(value): value for value in values if isinstance(value, Tensor) and value.device.type == device.type}
    return sum(local(tensor).nbytes for tensor in tensors.values())


def _passes(parts: Parts, batch: Batch, step: int, accumulation: int) -> None:
    """Forward and backward; a second time beside the gradients of the first where they are accumulated."""
    if parts.release is not None:
        with parts.release.measuring():
            parts.accelerator.backward(micro_loss(parts, batch, step, 0).mean)
        return
    for _ in range(min(accumulation, 2)):
        parts.accelerator.backward(micro_loss(parts, batch, step, 0).mean)
    clip(parts.trained, parts.max_grad_norm, parts.clip_method)


def _free_gradients(parts: Parts) -> None:
    for parameter in parts.trained:
        parameter.grad = None


@contextmanager
def _held(count: int, device: torch.device) -> Iterator[None]:
    """So many bytes of the device are taken in here."""
    taken = torch.empty(max(0, count), dtype=torch.uint8, device=device)
    yield
    del taken
