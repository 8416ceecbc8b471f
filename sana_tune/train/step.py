"""One optimizer step: micro-batches in, weights moved, numbers out.

The randomness of a micro-batch depends on its position alone, (seed, step, micro-batch): nothing is carried
from one step to the next but weights, average and optimizer state. The host reads the device once a step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

from sana_tune.data.batch import Batch
from sana_tune.data.records import Role, digest
from sana_tune.model import flow
from sana_tune.model.attention import trimmed
from sana_tune.model.blocks import TEXT_MULTIPLE
from sana_tune.model.levels import Levels
from sana_tune.model.rollout import OFF, Rollout
from sana_tune.progress import Progress
from sana_tune.schedule import Schedule
from sana_tune.train.ema import Ema, NoEma
from sana_tune.train.fence import Fence
from sana_tune.train.release import Release
from sana_tune.train.roll_in import Mixture, roll_in, velocity_of
from sana_tune.train.rounding import place
from sana_tune.train.scale import LossScale, NoLossScale
from sana_tune.train.sharding import local, whole_norm

if TYPE_CHECKING:
    from accelerate import Accelerator

    from sana_tune.data.order import MicroBatch
    from sana_tune.train.adapt import Adapter

    Sample = tuple[MicroBatch, Batch]

Value = TypeVar("Value")

_TOLD = (Role.TRAIN, Role.REGULARISE)  # the roles whose losses are told apart


@dataclass(frozen=True, eq=False)
class Parts:
    """What a step works with.

    accelerator: device, autocast, backward and gathering; built with the run's mixed_precision.
    transformer: the model, possibly wrapped by `accelerator.prepare`; `bare` is the one inside.
    optimizer:   not wrapped; over the parameters of `bare` that require a gradient.
    shift_at:    latent positions of a picture → flow shift (model.shift.shift_for with its settings).
    max_grad_norm, clip_method: 0 = no clipping; "norm" of the whole gradient or "value" of each element.
    scale: the loss scale of fp16. release: the weights are updated inside the backward pass; None = after it.
    fence: what is waited for before anything moves: a checkpoint that is being copied.
    adapter:     what is trained in place of the model's own weights; None = these.
    compiled:    whether the blocks are compiled, so that few lengths of text are wanted.
    levels, objective, perturbation: how noise levels are drawn, what is minimised, and noise beyond the target's.
    rollout:     which samples are trained at states that the model itself led to.
    base:        the untrained model, frozen; regularisation data learns what it predicts. None = its pictures.
    regularised: whether there is regularisation data: its loss is told apart then.
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
    scale: LossScale | NoLossScale = NoLossScale()
    release: Release | None = None
    fence: Fence = field(default_factory=Fence)
    levels: Levels = flow.RECIPE
    objective: flow.Objective = flow.MSE
    perturbation: flow.Perturbation = flow.Perturbation()
    rollout: Rollout = OFF
    base: nn.Module | None = None
    regularised: bool = False
    compiled: bool = False
    adapter: Adapter | None = None

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
        return self.trained[0].dtype if self.adapter is None else self.bare.proj_out.weight.dtype

    def kept(self) -> Mapping[str, Tensor]:
        """What a checkpoint holds of the weights, by name: the live tensors. All of the model, or its adapter."""
        return self.bare.state_dict() if self.adapter is None else self.adapter.state()

    def kept_average(self) -> Mapping[str, Tensor]:
        """The same of their average; {} where none is kept."""
        average = self.ema.state_dict()
        return {**average, **self.adapter.constants()} if self.adapter is not None and average else average


@dataclass(frozen=True)
class StepResult:
    """What a step came to. loss: mean over its micro-batches on all ranks; grad_norm: before clipping.

    images: pictures seen on all ranks. skipped: loss or norm was not finite, so no weight was moved; or, with
    `spoiled`, some weights had moved before that was known (gradient release).
    losses: with regularisation data, role → mean over the step's micro-batches of that role, if there were any.
    by_sigma: (noise level, loss) of each sample of this rank.
    """

    loss: float
    grad_norm: float
    learning_rate: float
    images: int
    skipped: bool
    losses: Mapping[str, float] = field(default_factory=dict)
    spoiled: bool = False
    by_sigma: tuple[tuple[float, float], ...] = ()


class MicroLoss(NamedTuple):
    """The loss of one micro-batch, fp32 on the device. mean: a scalar with its graph. per_sample: [B], without.

    levels: the noise levels [B], on the CPU.
    """

    mean: Tensor
    per_sample: Tensor
    levels: Tensor


def drawn(
    seed: int,
    step: int,
    micro: int,
    shape: Sequence[int],
    shift: float,
    levels: Levels = flow.RECIPE,
    micro_batches: int = 1,
) -> tuple[Tensor, Tensor]:
    """The noise levels [B] and the noise [B, C, h, w] of a micro-batch, fp32 on the CPU, from position alone.

    step: optimizer steps done before. micro: the micro-batch's number within the step, over all ranks, of so many
    `micro_batches` (only stratified levels depend on these). The levels are drawn first, then the noise, from one
    generator.
    """
    generator = _generator("noise", seed, step, micro)
    strata = (0, 1)
    if levels.stratified and micro_batches > 1:  # which strata are whose is drawn too, the same on every rank
        order = torch.randperm(micro_batches, generator=_generator("strata", seed, step))
        strata = (int(order[micro]), micro_batches)
    sigma = flow.draw_sigmas(shape[0], shift, generator, levels, strata)
    return sigma, torch.randn(tuple(shape), generator=generator, dtype=torch.float32)


def perturbed(noise: Tensor, seed: int, step: int, micro: int, amount: float) -> Tensor:
    """The noise that the picture is mixed with: `noise` and so much more, drawn from position alone. fp32, CPU."""
    if not amount:
        return noise
    return noise + amount * torch.randn(noise.shape, generator=_generator("perturbation", seed, step, micro))


def _generator(purpose: str, *position: int) -> torch.Generator:
    return torch.Generator().manual_seed(int(digest(purpose, *position)[:8], 16))


def train_step(parts: Parts, micro_batches: Sequence[Sample], progress: Progress) -> StepResult:
    """Do the step that follows `progress`. Skipped, and said so, when loss or gradient norm is not finite."""
    rate = set_rate(parts, progress.step)
    if parts.release is not None:
        return _released_step(parts, parts.release, micro_batches, progress.step, rate)
    count = len(micro_batches)
    ranks = parts.accelerator.num_processes
    losses: list[MicroLoss] = []
    for number, (micro_batch, batch) in enumerate(micro_batches):
        last = number == count - 1
        with nullcontext() if last else parts.accelerator.no_sync(parts.transformer):
            micro = micro_batch.index % (count * ranks)
            loss = micro_loss(parts, batch, progress.step, micro, count * ranks)
            parts.accelerator.backward(parts.scale.scaled(loss.mean / count))
        losses.append(loss._replace(mean=loss.mean.detach() / count))
    parts.scale.unscale(parts.trained)
    norm = clip(parts.trained, parts.max_grad_norm, parts.clip_method)
    images = sum(batch.latents.shape[0] for _, batch in micro_batches)
    roles = [batch.role for _, batch in micro_batches] if parts.regularised else []
    read = _read(parts, losses, norm, images, roles)

    good = read.is_finite
    if good:
        parts.ema.fence()
        parts.fence.wait()
        parts.optimizer.step()
    parts.optimizer.zero_grad(set_to_none=True)
    parts.scale.update(good)
    if good:
        parts.ema.update(progress.step + 1)
    return read.result(rate, skipped=not good)


def set_rate(parts: Parts, step: int) -> float:
    """Make the optimizer ready for the step that follows `step` done ones: its learning rate, which is returned."""
    rate = parts.schedule.lr(step)
    for group in parts.optimizer.param_groups:
        group["lr"] = rate
    place(parts.optimizer, step)
    return rate


def passed_over(parts: Parts, micro_batches: Sequence[Sample], progress: Progress) -> StepResult:
    """The result of a step that is not done, since its gradient is known not to be finite."""
    images = sum(batch.latents.shape[0] for _, batch in micro_batches)
    return StepResult(math.nan, math.nan, parts.schedule.lr(progress.step), images, skipped=True)


def _released_step(
    parts: Parts, release: Release, micro_batches: Sequence[Sample], step: int, rate: float
) -> StepResult:
    """The step with gradients released. One micro-batch on one rank.

    With clipping by norm the first pass tells whether all is finite, and a bad step moves nothing, as ever.
    """
    ((_, batch),) = micro_batches
    images = batch.latents.shape[0]
    roles = [batch.role] if parts.regularised else []

    def backward() -> Read:
        loss = micro_loss(parts, batch, step, 0)
        parts.accelerator.backward(loss.mean)
        return _read(parts, [loss._replace(mean=loss.mean.detach())], release.norm(), images, roles)

    if release.passes == 2:
        with release.measuring():
            read = backward()
        if not read.is_finite:
            return read.result(rate, skipped=True)
    parts.ema.fence()
    parts.fence.wait()
    with release.updating():
        read = backward()
    if read.is_finite:
        parts.ema.update(step + 1)
    return read.result(rate, skipped=not read.is_finite, spoiled=not read.is_finite)


def micro_loss(
    parts: Parts, batch: Batch, step: int, micro: int, micro_batches: int = 1, *, exact: bool = False
) -> MicroLoss:
    """The loss of one micro-batch of the step's `micro_batches`; the forward pass of the step.

    exact: computed in the dtype of the weights, without autocast.
    """
    shape = batch.latents.shape
    device, dtype = parts.accelerator.device, parts.input_dtype
    shift = parts.shift_at(shape[-2] * shape[-1])
    levels, gauss = drawn(parts.seed, step, micro, shape, shift, parts.levels, micro_batches)
    mixed_in = perturbed(gauss, parts.seed, step, micro, parts.perturbation.at(step))
    x0, sigma, noise = to_device(batch.latents, device), to_device(levels, device), to_device(gauss, device)
    mixed = noise if mixed_in is gauss else to_device(mixed_in, device)
    text, text_mask = trimmed(
        batch.text, batch.text_mask, TEXT_MULTIPLE if parts.compiled else 8, masked=parts.compiled
    )
    noisy, mask = flow.noised(x0, mixed, sigma), None if batch.loss_mask is None else to_device(batch.loss_mask, device)
    inputs = {
        "hidden_states": noisy.to(dtype),
        "encoder_hidden_states": to_device(text, device).to(dtype),
        "encoder_attention_mask": None if text_mask is None else to_device(text_mask, device),
        "timestep": flow.timestep(sigma),
        "return_dict": False,
    }
    rolled = None
    if parts.rollout.max_offset and batch.role is not Role.REGULARISE:
        lengths = parts.rollout.lengths(shape[0], step, _generator("rollout", parts.seed, step, micro))
        velocity = velocity_of(parts.bare, parts.accelerator.autocast, inputs, shape[0] if parts.compiled else None)
        rolled = roll_in(parts.rollout, velocity, Mixture(x0, noise, noisy, levels), lengths, shift)
        inputs["hidden_states"] = rolled.states.to(dtype)
    with nullcontext() if exact else parts.accelerator.autocast():
        prediction = parts.transformer(**inputs)[0]
    wanted = flow.target(x0, noise)
    if parts.base is not None and batch.role is Role.REGULARISE:
        with torch.no_grad(), parts.accelerator.autocast():
            wanted = parts.base(**inputs)[0]
    plain = flow.loss(prediction, wanted, mask, sigma, parts.objective)
    per_sample = plain.per_sample
    if rolled is not None:
        per_sample = rolled.loss(per_sample, prediction, wanted, mask, sigma, parts.objective)
    return MicroLoss(per_sample.mean(), per_sample.detach(), levels)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device, without making the host wait (only pinned memory is copied aside)."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def clip(parameters: Sequence[nn.Parameter], limit: float, method: Literal["norm", "value"]) -> Tensor:
    """Clip the gradients in place and return their norm before that (an fp32 scalar on the device).

    Of tensors that are split over processes each clips its part, by the norm of the whole.
    """
    whole = [parameter.grad for parameter in parameters if parameter.grad is not None]
    gradients = [local(gradient) for gradient in whole]
    # In fp32, also of bf16 gradients: bf16 would round the norm by up to 0.4 %.
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float32)))
    norm = whole_norm(norm, whole)
    if method == "norm" and limit > 0:
        if gradients[0] is whole[0]:
            nn.utils.clip_grads_with_norm_(parameters, limit, norm)
        else:
            torch._foreach_mul_(gradients, torch.clamp(limit / (norm + 1e-6), max=1.0))
    elif limit > 0:
        torch._foreach_clamp_min_(gradients, -limit)
        torch._foreach_clamp_max_(gradients, limit)
    return norm


@dataclass(frozen=True)
class Read:
    """The numbers of a step on the host: mean loss, gradient norm, pictures and loss by role over all ranks.

    by_sigma: (noise level, loss) of this rank's samples.
    """

    loss: float
    grad_norm: float
    images: int
    losses: Mapping[str, float]
    by_sigma: tuple[tuple[float, float], ...]

    @property
    def is_finite(self) -> bool:
        """Whether the weights may be moved by this step."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)

    def result(self, rate: float, *, skipped: bool, spoiled: bool = False) -> StepResult:
        """What the step came to. rate: its learning rate."""
        return StepResult(self.loss, self.grad_norm, rate, self.images, skipped, self.losses, spoiled, self.by_sigma)


def _read(parts: Parts, losses: Sequence[MicroLoss], norm: Tensor, images: int, roles: Sequence[Role]) -> Read:
    """The one read of the device in a step.

    losses: of the micro-batches, each mean over their number. roles: theirs, or none when nobody asks.
    """
    asked, ranks = _TOLD if roles else (), parts.accelerator.num_processes
    means = [loss.mean for loss in losses]
    counts = [float(roles.count(role)) for role in asked]
    own = [[mean for mean, of in zip(means, roles, strict=True) if of is role] for role in asked]
    sums = [torch.stack(some).sum() if some else torch.zeros_like(means[0]) for some in own]
    values = torch.stack([torch.stack(means).sum(), norm.float(), *sums])
    if ranks > 1:
        values = summed(parts.accelerator, torch.cat([values / ranks, values.new_tensor([float(images), *counts])]))
    told = torch.cat([values, *(loss.per_sample for loss in losses)]).tolist()
    if ranks == 1:
        told[len(values) : len(values)] = [float(images), *counts]
    samples = told[3 + 2 * len(asked) :]
    loss, norm_value, *shares = told[: 2 + len(asked)]
    total, *counts = told[2 + len(asked) : 3 + 2 * len(asked)]
    each = len(losses) * ranks
    found = zip(asked, shares, counts, strict=True)
    by_role = {role.value: share * each / count for role, share, count in found if count}
    levels = [level for one in losses for level in one.levels.tolist()]
    return Read(loss, norm_value, int(total), by_role, tuple(zip(levels, samples, strict=True)))


def summed(accelerator: Accelerator, tensor: Tensor) -> Tensor:
    """The tensor summed over all ranks, on each of them."""
    return cast(Tensor, accelerator.reduce(tensor, "sum"))


def joined(accelerator: Accelerator, values: list[Value]) -> list[Value]:
    """The values of all ranks, those of rank 0 first, on each of them."""
    if accelerator.num_processes == 1:
        return values
    from accelerate.utils import gather_object

    return cast(list[Value], gather_object(values))
