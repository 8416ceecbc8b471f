"""The maths of Sana's flow matching: noise levels, shift, interpolation, target, loss. Pure functions on tensors.

Conventions (NVlabs/Sana, `diffusion/model/respace.py` and `configs/sana_config`): sigma is 0 at the picture and 1
at pure noise; x_t = (1 - sigma) * x0 + sigma * noise; the model predicts the velocity noise - x0.
How large the shift is for a picture is decided in `shift.py`, how levels are distributed before it in `levels.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sana_tune.model.levels import Levels

TIMESTEPS = 1000.0
RECIPE = Levels()  # logit-normal (0, 1), NVIDIA's
_LEAST_SIGMA = 1 / TIMESTEPS  # where sigma^-2 ends to grow; the lowest level of a table of 1000


class Loss(NamedTuple):
    """A loss in fp32: `mean` is a scalar, `per_sample` is [B]."""

    mean: Tensor
    per_sample: Tensor


@dataclass(frozen=True)
class Objective:
    """What is minimised; the default is the recipe's plain mean squared error.

    kind: a name of config.choices.LOSS_TYPES; huber_c and huber_schedule (of HUBER_SCHEDULES) belong to the others.
    weighting: a name of config.choices.LOSS_WEIGHTINGS. snr_gamma: min-SNR weights, 0 = none; soft: their smooth form.
    """

    kind: str = "l2"
    huber_c: float = 0.1
    huber_schedule: str = "snr"
    weighting: str = "none"
    snr_gamma: float = 0.0
    soft: bool = False


MSE = Objective()


@dataclass(frozen=True)
class Perturbation:
    """Input perturbation: the picture is mixed with more noise than the target knows of (arXiv 2301.11706).

    amount: standard deviation of the extra noise beside the noise's 1. steps: it falls linearly to 0 over that many
    optimizer steps; 0 = it stays.
    """

    amount: float = 0.0
    steps: int = 0

    def at(self, step: int) -> float:
        """The amount in the step that follows `step` done ones."""
        return self.amount * max(0.0, 1 - step / self.steps) if self.steps else self.amount


def shift(sigma: Tensor, s: float) -> Tensor:
    """Move noise levels towards the noise: s * sigma / (1 + (s - 1) * sigma). Same shape; s = 1 changes nothing.

    Esser et al., Scaling Rectified Flow Transformers (arXiv 2403.03206), eq. 23; at s = 3, 0.5 → 0.75.
    """
    return s * sigma / (1 + (s - 1) * sigma)


def draw_sigmas(
    n: int,
    s: float,
    generator: torch.Generator | None = None,
    levels: Levels = RECIPE,
    place: tuple[int, int] = (0, 1),
) -> Tensor:
    """n noise levels in 0..1, fp32 on the generator's device: drawn from `levels`, then shifted by s. [n]

    The recipe's u = sigmoid(N(0, 1)) is NVlabs' `weighting_scheme: logit_normal` with logit_mean 0 and logit_std 1
    (arXiv 2403.03206, eq. 19). Shifting adds ln s to the mean of the normal. place: for stratified levels, which of
    how many micro-batches these are.
    """
    device = generator.device if generator is not None else torch.device("cpu")
    if levels.kind == "logit-normal" and not levels.stratified:
        normal = torch.randn(n, generator=generator, device=device, dtype=torch.float32) * levels.std + levels.mean
        sigma = torch.sigmoid(normal)
    else:
        shares = torch.rand(n, generator=generator, device=device, dtype=torch.float64)
        if levels.stratified:
            shares = spread(shares, generator, place)
        sigma = torch.tensor([levels.quantile(share) for share in shares.tolist()], dtype=torch.float32, device=device)
    return shift(sigma, s) if levels.is_shifted else sigma


def spread(shares: Tensor, generator: torch.Generator | None, place: tuple[int, int]) -> Tensor:
    """Shares in 0..1, each put into a stratum of its own: of n·m equal ones every m-th, from the one `which` on. [n]

    place: (which, m). The m micro-batches of a step, of n samples each, fill all n·m strata once; with unequal sizes
    each is still spread evenly. Which sample gets which stratum is drawn, so that every single share stays uniform.
    """
    which, micro_batches = place
    n = len(shares)
    order = torch.randperm(n, generator=generator, device=shares.device)
    return (order * micro_batches + which + shares) / (n * micro_batches)


def noised(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """x_t = (1 - sigma) * x0 + sigma * noise, in fp32. x0, noise: [B, C, h, w]; sigma: [B]."""
    level = sigma.float().view(-1, *[1] * (x0.ndim - 1))
    return (1 - level) * x0.float() + level * noise.float()


def target(x0: Tensor, noise: Tensor) -> Tensor:
    """The velocity that the model learns: noise - x0, in fp32. [B, C, h, w]"""
    return noise.float() - x0.float()


def predicted(x_t: Tensor, velocity: Tensor, sigma: Tensor | float) -> Tensor:
    """The picture that a velocity at x_t points to: x_t - sigma * velocity."""
    return x_t - sigma * velocity


def guided(away: Tensor, velocity: Tensor, scale: float, rescale: float = 0.0) -> Tensor:
    """Classifier-free guidance: from the negative prompt's velocity through the prompt's, `scale` times as far.

    rescale: share by which the result gets the spread of the prompt's own (arXiv 2305.08891, section 3.4), each sample
    over all its values; 0 = off.
    """
    found = away + scale * (velocity - away)
    if not rescale:
        return found
    own, spread = (each.std(dim=tuple(range(1, each.ndim)), keepdim=True) for each in (velocity, found))
    return rescale * (found * (own / spread)) + (1 - rescale) * found


def timestep(sigma: Tensor) -> Tensor:
    """The timestep given to the model: 1000 * sigma, in fp32 (bf16 would round 899 to 900). [B]"""
    return TIMESTEPS * sigma.float()


def loss(
    prediction: Tensor,
    wanted: Tensor,
    mask: Tensor | None = None,
    sigma: Tensor | None = None,
    objective: Objective = MSE,
) -> Loss:
    """The objective in fp32. prediction, wanted: [B, C, h, w]; mask: [B, 1, h, w] in 0..1; sigma: [B].

    With a mask each sample is the mean over its marked positions; a sample with none counts 0. Weights by noise level
    multiply the samples' losses, not normalised. Raises ValueError when the objective needs sigma and there is none.
    """
    error = _error(prediction.float() - wanted.float(), sigma, objective)
    if mask is None:
        per_sample = error.flatten(1).mean(1)
    else:
        weight = mask.float().expand_as(error)
        total = weight.flatten(1).sum(1)
        per_sample = (error * weight).flatten(1).sum(1) / total.clamp_min(torch.finfo(torch.float32).tiny)
    if objective.weighting != "none" or objective.snr_gamma:
        per_sample = per_sample * weights(_needed(sigma), objective)
    return Loss(per_sample.mean(), per_sample)


def _error(difference: Tensor, sigma: Tensor | None, objective: Objective) -> Tensor:
    """The loss of each element: d² (l2), or pseudo-Huber, 2c·(√(d² + c²) - c) (huber) and that over c (smooth_l1).

    arXiv 2403.16728; d² and 2|d| are its limits for large and small c.
    """
    if objective.kind == "l2":
        return difference.square()
    if objective.huber_schedule == "constant":
        c = difference.new_full((1,), objective.huber_c)
    else:
        c = huber_c_at(_needed(sigma), objective).view(-1, *[1] * (difference.ndim - 1))
    # √(d² + c²) - c without the cancellation that loses all of a small d
    bent = 2 * difference.square() / ((difference.square() + c.square()).sqrt() + c)
    return bent * c if objective.kind == "huber" else bent


def huber_c_at(sigma: Tensor, objective: Objective) -> Tensor:
    """The width c of pseudo-Huber at each noise level, from 1 at the picture to huber_c at pure noise. [B]

    exponential: huber_c^sigma. snr: (1 - huber_c) / (1 + n)² + huber_c with n = sigma / (1 - sigma), the ratio of
    noise to picture, which makes the fraction (1 - sigma)² (as diffusers' text-to-image scripts have it, with the
    flow's n).
    Raises KeyError for another schedule.
    """
    level, c = sigma.float(), objective.huber_c
    if objective.huber_schedule == "exponential":
        return c**level
    if objective.huber_schedule == "snr":
        return (1 - c) * (1 - level).square() + c
    raise KeyError(objective.huber_schedule)


def weights(sigma: Tensor, objective: Objective) -> Tensor:
    """The weight of a sample's loss by its noise level. [B], fp32. Raises KeyError for an unknown weighting.

    sigma_sqrt: sigma^-2, cosmap: 2 / (π (1 - 2 sigma + 2 sigma²)) (arXiv 2403.03206, §3.1, and diffusers'
    `compute_loss_weighting_for_sd3`). min-SNR (arXiv 2303.09556) weighs the error of the picture by min(SNR, gamma);
    that error is sigma times the velocity's, and a flow's SNR ((1 - sigma) / sigma)², so the weight is
    min((1 - sigma)², gamma sigma²). Soft: SNR·gamma / (SNR + gamma) in its place (arXiv 2401.11605).
    """
    level = sigma.float()
    if objective.snr_gamma:
        clean, noisy = (1 - level).square(), objective.snr_gamma * level.square()
        if objective.soft:
            return clean * noisy / (clean + noisy)
        return torch.minimum(clean, noisy)
    if objective.weighting == "none":
        return torch.ones_like(level)
    if objective.weighting == "sigma_sqrt":
        return level.clamp_min(_LEAST_SIGMA).pow(-2)
    if objective.weighting == "cosmap":
        return 2 / (math.pi * (1 - 2 * level + 2 * level.square()))
    raise KeyError(objective.weighting)


def _needed(sigma: Tensor | None) -> Tensor:
    if sigma is None:
        raise ValueError("this objective depends on the noise level: give sigma")
    return sigma
