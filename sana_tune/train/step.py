"""One optimizer step: micro-batches in, weights moved, numbers out.

The randomness of a micro-batch depends on its position alone, (seed, step, micro-batch): nothing is carried
from one step to the next but weights, average and optimizer state. The host reads the device once a step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from sana_tune.data.batch import Batch
from sana_tune.data.records import digest
from sana_tune.model import flow
from sana_tune.progress import Progress
from sana_tune.train.ema import Ema, NoEma
from sana_tune.train.optim import Schedule

if TYPE_CHECKING:
    from accelerate import Accelerator

    from sana_tune.data.order import MicroBatch

    Sample = tuple[MicroBatch, Batch]


@dataclass(frozen=True, eq=False)
class Parts:
    """What a step works with.

    accelerator: device, autocast, backward and gathering; built with the run's mixed_precision.
    transformer: the model, possibly wrapped by `accelerator.prepare`; `bare` is the one inside.
    optimizer:   not wrapped; over the parameters of `bare` that require a gradient.
    shift_at:    latent positions of a picture → flow shift (model.shift.shift_for with its settings).
    max_grad_norm, clip_method: 0 = no clipping; "norm" of the whole gradient or "value" of each element.
    """

    accelerator: Accelerator
    transformer: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    ema: Ema | NoEma
    shift_at: Callable[[int], float]
    seed: int
    max_grad_norm: float = 0.1
    clip_method: Literal["norm", "value"] = "norm"

    @cached_property
    def bare(self) -> Any:
        """The diffusers model without wrappers."""
        return self.accelerator.unwrap_model(self.transformer)

    @cached_property
    def trained(self) -> list[nn.Parameter]:
        """The parameters that are trained, in the model's order."""
        return [parameter for parameter in self.bare.parameters() if parameter.requires_grad]

    @cached_property
    def input_dtype(self) -> torch.dtype:
        """What the model's inputs are cast to, last of all: its weights' dtype (autocast does the rest)."""
        return self.trained[0].dtype


@dataclass(frozen=True)
class StepResult:
    """What a step came to. loss: mean over its micro-batches on all ranks; grad_norm: before clipping.

    images: pictures seen on all ranks. skipped: loss or norm was not finite, so no weight was moved.
    """

    loss: float
    grad_norm: float
    learning_rate: float
    images: int
    skipped: bool


def drawn(seed: int, step: int, micro: int, shape: Sequence[int], shift: float) -> tuple[Tensor, Tensor]:
    """The noise levels [B] and the noise [B, C, h, w] of a micro-batch, fp32 on the CPU, from position alone.

    step: optimizer steps done before. micro: the micro-batch's number within the step, over all ranks.
    The levels are drawn first, then the noise, from one generator.
    """
    generator = torch.Generator().manual_seed(int(digest("noise", seed, step, micro)[:8], 16))
    sigma = flow.draw_sigmas(shape[0], shift, generator)
    return sigma, torch.randn(tuple(shape), generator=generator, dtype=torch.float32)


def train_step(parts: Parts, micro_batches: Sequence[Sample], progress: Progress) -> StepResult:
    """Do the step that follows `progress`. Skipped, and said so, when loss or gradient norm is not finite."""
    count = len(micro_batches)
    ranks = parts.accelerator.num_processes
    losses = []
    for place, (micro_batch, batch) in enumerate(micro_batches):
        last = place == count - 1
        with nullcontext() if last else parts.accelerator.no_sync(parts.transformer):
            loss = micro_loss(parts, batch, progress.step, micro_batch.index % (count * ranks)) / count
            parts.accelerator.backward(loss)
        losses.append(loss.detach())
    norm = clip(parts.trained, parts.max_grad_norm, parts.clip_method)
    images = sum(batch.latents.shape[0] for _, batch in micro_batches)
    loss_value, norm_value, images = _read(parts, losses, norm, images)

    good = math.isfinite(loss_value) and math.isfinite(norm_value)
    rate = parts.schedule.apply(parts.optimizer, progress.step)
    if good:
        parts.optimizer.step()
    parts.optimizer.zero_grad(set_to_none=True)
    if good:
        parts.ema.update(progress.step + 1)
    return StepResult(loss_value, norm_value, rate, images, skipped=not good)


def micro_loss(parts: Parts, batch: Batch, step: int, micro: int) -> Tensor:
    """Mean loss of one micro-batch, with its graph. Scalar fp32 on the device."""
    shape = batch.latents.shape
    device, dtype = parts.accelerator.device, parts.input_dtype
    levels, gauss = drawn(parts.seed, step, micro, shape, parts.shift_at(shape[-2] * shape[-1]))
    x0, sigma, noise = to_device(batch.latents, device), to_device(levels, device), to_device(gauss, device)
    with parts.accelerator.autocast():
        prediction = parts.transformer(
            hidden_states=flow.noised(x0, noise, sigma).to(dtype),
            encoder_hidden_states=to_device(batch.text, device).to(dtype),
            encoder_attention_mask=to_device(batch.text_mask, device),
            timestep=flow.timestep(sigma),
            return_dict=False,
        )[0]
    mask = None if batch.loss_mask is None else to_device(batch.loss_mask, device)
    return flow.loss(prediction, flow.target(x0, noise), mask).mean


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device, without making the host wait (only pinned memory is copied aside)."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def clip(parameters: Sequence[nn.Parameter], limit: float, method: Literal["norm", "value"]) -> Tensor:
    """Clip the gradients in place and return their norm before that (a scalar on the device)."""
    if method == "norm" and limit > 0:
        return nn.utils.clip_grad_norm_(parameters, limit)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    if limit > 0:
        torch._foreach_clamp_min_(gradients, -limit)
        torch._foreach_clamp_max_(gradients, limit)
    return norm


def _read(parts: Parts, losses: list[Tensor], norm: Tensor, images: int) -> tuple[float, float, int]:
    """Mean loss, gradient norm and pictures over all ranks: the one read of the device in a step."""
    values = torch.stack([torch.stack(losses).sum(), norm.float()])
    ranks = parts.accelerator.num_processes
    if ranks == 1:
        loss, norm_value = values.tolist()
        return loss, norm_value, images
    together = torch.cat([values / ranks, values.new_full((1,), float(images))])
    loss, norm_value, total = summed(parts.accelerator, together).tolist()
    return loss, norm_value, int(total)


def summed(accelerator: Accelerator, tensor: Tensor) -> Tensor:
    """The tensor summed over all ranks, on each of them."""
    return cast(Tensor, accelerator.reduce(tensor, "sum"))
