"""Scheduled sampling: some samples are trained at states that the model itself has led to. Pure, sources cited.

Drawing shows the model its own earlier steps, training shows it mixtures of picture and noise: exposure bias. With
scheduled sampling (Bengio et al., arXiv 1506.03099) a sample begins some sampler steps nearer to the noise, the model
walks it back to the level that was drawn for it, and that state takes the mixture's place. ReflexFlow (arXiv
2512.04904) adds to the loss of such a sample what its drift tells.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from sana_tune.model import flow

HIGHEST = 0.999  # where samplers begin; at 1 their log-SNR is infinite


@dataclass(frozen=True)
class Reflex:
    """ReflexFlow's terms. alpha: how much more positions count whose prediction drifts (frequency compensation).

    beta1: factor of the anti-drift term. beta2: factor of the velocity's own loss.
    """

    alpha: float = 1.0
    beta1: float = 10.0
    beta2: float = 1.0


@dataclass(frozen=True)
class Rollout:
    """How samples are rolled in. Off with max_offset 0.

    max_offset: sampler steps of the longest rollout. steps: of the sampler from noise to picture, so that one step is
    1 / steps of the levels before the shift. strategy: which lengths 1 … max_offset are likely (of
    config.choices.ROLLOUT_STRATEGIES). sampler, order: of `solvers.walk`.
    probability: share of the samples that are rolled in. With ramp_steps it rises from prob_start to prob_end over so
    many optimizer steps from start_step on; before start_step nothing is rolled in. ramp_shape: linear or cosine.
    reflex: None without ReflexFlow.
    """

    max_offset: int = 0
    steps: int = 20
    strategy: str = "uniform"
    probability: float = 0.0
    prob_start: float = 0.0
    prob_end: float = 0.5
    ramp_steps: int = 0
    start_step: int = 0
    ramp_shape: str = "linear"
    sampler: str = "unipc"
    order: int = 2
    reflex: Reflex | None = None

    def probability_at(self, step: int) -> float:
        """Share of the samples that the step that follows `step` done ones rolls in."""
        if not self.max_offset or step < self.start_step:
            return 0.0
        if not self.ramp_steps:
            return self.probability
        way = min(1.0, (step - self.start_step) / self.ramp_steps)
        if self.ramp_shape == "cosine":
            way = (1 - math.cos(math.pi * way)) / 2
        return self.prob_start + way * (self.prob_end - self.prob_start)

    def lengths(self, n: int, step: int, generator: torch.Generator) -> Tensor:
        """How many sampler steps each of n samples is rolled in by, [n] ints on the CPU; 0 = it is not.

        biased_early prefers long rollouts, begun early in the drawing: length k has weight k. biased_late the other
        way round. The same numbers are drawn whatever the probability, so that a ramp changes nothing else.
        """
        chosen, share = torch.rand(n, generator=generator), torch.rand(n, generator=generator, dtype=torch.float64)
        weights = torch.ones(self.max_offset, dtype=torch.float64)
        if self.strategy != "uniform":
            weights = torch.arange(1, self.max_offset + 1, dtype=torch.float64)
        if self.strategy == "biased_late":
            weights = weights.flip(0)
        edges = (weights.cumsum(0) / weights.sum())[:-1]
        length = 1 + torch.searchsorted(edges, share, right=True)
        return torch.where(chosen < self.probability_at(step), length, 0)


OFF = Rollout()


def levels_of(sigma: Tensor, lengths: Tensor, steps: int, shift: float) -> tuple[Tensor, Tensor]:
    """The levels that each sample passes on its way to sigma, and how many steps of it there is room for.

    sigma: [B] levels in 0..1, as shifted by `shift`; lengths: [B] ints. Levels are evenly spaced by 1 / steps before
    the shift, as a sampler's are. Returns ([B, 1 + max], fp64, falling: a row holds its levels from the first on, of
    which sigma is the last, and sigma again after that) and [B] ints: what has no room below `HIGHEST` is cut.
    """
    sigma, s = sigma.double(), shift
    plain = sigma / (s - (s - 1) * sigma)
    top = HIGHEST / (s - (s - 1) * HIGHEST)
    room = ((top - plain) * steps).floor().clamp_min(0).to(lengths.dtype)
    lengths = torch.minimum(lengths, room)
    longest = int(lengths.max()) if len(lengths) else 0
    left = (lengths[:, None] - torch.arange(longest + 1)[None]).clamp_min(0)  # steps that remain
    passed = flow.shift(plain[:, None] + left / steps, s)
    return torch.where(left == 0, sigma[:, None], passed), lengths


def loss(
    prediction: Tensor,
    wanted: Tensor,
    state: Tensor,
    x0: Tensor,
    clean: Tensor,
    mask: Tensor | None,
    sigma: Tensor,
    objective: flow.Objective,
    reflex: Reflex,
) -> Tensor:
    """ReflexFlow's loss of samples that were rolled in, [B] fp32.

    prediction, wanted: velocity at `state` and its target noise - x0. clean: the prediction at the mixture of the same
    level, without a graph. All [B, C, h, w]; mask as `flow.loss`; sigma [B].

    Frequency compensation: a position counts 1 + alpha · e, where e is how far its prediction drifts, |prediction -
    clean| over the channels, over its mean in the sample; the weights' mean is then made 1.
    Anti-drift: beta1 · |v/|v| - d/|d||², where d = state - x0 points from the picture to where the sample has drifted:
    the velocity is to lead back to the picture from there, whatever noise the sample began with.
    """
    drift = (prediction.detach().float() - clean.float()).square().sum(1, keepdim=True).sqrt()
    mean = drift.flatten(1).mean(1).clamp_min(torch.finfo(torch.float32).tiny).view(-1, 1, 1, 1)
    weight = (1 + reflex.alpha * drift / mean) / (1 + reflex.alpha)
    weight = weight if mask is None else weight * mask.float()
    own = flow.loss(prediction, wanted, weight, sigma, objective).per_sample
    shown = 1.0 if mask is None else mask.float()
    led = F.normalize((prediction.float() * shown).flatten(1), dim=1, eps=1e-12)
    back = F.normalize(((state - x0).float() * shown).flatten(1), dim=1, eps=1e-12)
    return reflex.beta2 * own + reflex.beta1 * (led - back).square().sum(1)
