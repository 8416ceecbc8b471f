"""The maths of Sana's flow matching: noise levels, shift, interpolation, target, loss. Pure functions on tensors.

Conventions (NVlabs/Sana, `diffusion/model/respace.py` and `configs/sana_config`): sigma is 0 at the picture and 1
at pure noise; x_t = (1 - sigma) * x0 + sigma * noise; the model predicts the velocity noise - x0.
How large the shift is for a picture is decided in `shift.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

TIMESTEPS = 1000.0


class Loss(NamedTuple):
    """Mean squared error in fp32: `mean` is a scalar, `per_sample` is [B]."""

    mean: Tensor
    per_sample: Tensor


def shift(sigma: Tensor, s: float) -> Tensor:
    """Move noise levels towards the noise: s * sigma / (1 + (s - 1) * sigma). Same shape; s = 1 changes nothing.

    Esser et al., Scaling Rectified Flow Transformers (arXiv 2403.03206), eq. 23; at s = 3, 0.5 → 0.75.
    """
    return s * sigma / (1 + (s - 1) * sigma)


def draw_sigmas(
    n: int, s: float, generator: torch.Generator | None = None, *, mean: float = 0.0, std: float = 1.0
) -> Tensor:
    """n noise levels in (0, 1), fp32 on the generator's device: logit-normal, then shifted by s. [n]

    u = sigmoid(N(mean, std)) as NVlabs' `weighting_scheme: logit_normal` with logit_mean 0 and logit_std 1
    (arXiv 2403.03206, eq. 19). Shifting adds ln s to the mean of the normal.
    """
    device = generator.device if generator is not None else torch.device("cpu")
    normal = torch.randn(n, generator=generator, device=device, dtype=torch.float32) * std + mean
    return shift(torch.sigmoid(normal), s)


def noised(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """x_t = (1 - sigma) * x0 + sigma * noise, in fp32. x0, noise: [B, C, h, w]; sigma: [B]."""
    level = sigma.float().view(-1, *[1] * (x0.ndim - 1))
    return (1 - level) * x0.float() + level * noise.float()


def target(x0: Tensor, noise: Tensor) -> Tensor:
    """The velocity that the model learns: noise - x0, in fp32. [B, C, h, w]"""
    return noise.float() - x0.float()


def timestep(sigma: Tensor) -> Tensor:
    """The timestep given to the model: 1000 * sigma, in fp32 (bf16 would round 899 to 900). [B]"""
    return TIMESTEPS * sigma.float()


def loss(prediction: Tensor, wanted: Tensor, mask: Tensor | None = None) -> Loss:
    """Unweighted mean squared error in fp32. prediction, wanted: [B, C, h, w]; mask: [B, 1, h, w] in 0..1.

    With a mask each sample is the mean over its marked positions; a sample with none counts 0.
    """
    error = (prediction.float() - wanted.float()).square()
    if mask is None:
        per_sample = error.flatten(1).mean(1)
    else:
        weight = mask.float().expand_as(error)
        total = weight.flatten(1).sum(1)
        per_sample = (error * weight).flatten(1).sum(1) / total.clamp_min(torch.finfo(torch.float32).tiny)
    return Loss(per_sample.mean(), per_sample)
