"""Samplers' steps as pure functions on batches whose samples have noise levels of their own.

x is at level s and goes to level t < s; v is the model's velocity at (x, s); x - s·v is its prediction of the picture.
With alpha = 1 - sigma and lambda = ln(alpha / sigma) these are Euler's method, DPM-Solver++ (multistep, arXiv
2211.01095) and UniPC (B(h) = e^h - 1, arXiv 2302.04867), as diffusers' schedulers have them for flows. Those keep one
level for a whole batch, and training needs one for each sample.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x [n, C, h, w], levels [n] fp32 on the CPU, places of these samples in the batch [n]) → velocities like x, fp32."""


@dataclass
class Path:
    """Where a sampler was: its levels [B] (fp64, CPU) and the model's predictions of the picture [B, C, h, w]."""

    levels: list[Tensor] = field(default_factory=list)
    pictures: list[Tensor] = field(default_factory=list)

    def of(self, kept: Tensor) -> Path:
        """The same of some of the samples."""
        return Path([each[kept] for each in self.levels], [each[_like(kept, each)] for each in self.pictures])


def walk(x: Tensor, levels: Tensor, steps: Tensor, velocity: Velocity, sampler: str, order: int) -> Tensor:
    """Follow the model from levels[:, 0] on: sample i takes steps[i] steps of `sampler`. Without gradients.

    x: [B, C, h, w] fp32, on any device. levels: [B, 1 + max(steps)] falling noise levels in 0..1, fp64 on the CPU; what
    stands after a sample's last step is not looked at. steps: [B] ints on the CPU. All samples that are still on their
    way share each call of the model. sampler: "euler", "dpm" or "unipc"; order: 1 to 3 (euler: 1).
    Returns the states that the model would be shown next; those of samples without steps are x.
    """
    x, path = x.detach().clone(), Path()
    here = torch.arange(len(x))
    before = x
    with torch.no_grad():
        for number in range(int(steps.max()) if len(steps) else 0):
            kept = steps[here] > number
            here, before, path = here[kept], before[_like(kept, before)], path.of(kept)
            places = here.to(x.device)
            state, now, then = x[places], levels[here, number], levels[here, number + 1]
            picture = state - _wide(now, x) * velocity(state, now.float(), here)
            if sampler == "unipc" and number:  # the model was shown the predicted state; what goes on is corrected
                state = _unipc(before, path, now, min(order, number), picture)
            path.levels.append(now)
            path.pictures.append(picture)
            before = state
            x[places] = _step(state, path, then, sampler, min(order, number + 1))
    return x


def _step(x: Tensor, path: Path, then: Tensor, sampler: str, order: int) -> Tensor:
    if sampler == "euler":
        now = path.levels[-1]
        ratio = _wide(then / now, x)
        return ratio * x + (1 - ratio) * path.pictures[-1]
    if sampler == "dpm":
        return _dpm(x, path, then, order)
    return _unipc(x, path, then, order, None)


def _log_snr(level: Tensor) -> Tensor:
    return torch.log1p(-level) - torch.log(level)


def _dpm(x: Tensor, path: Path, then: Tensor, order: int) -> Tensor:
    """DPM-Solver++, multistep, midpoint."""
    now = path.levels[-1]
    h = _log_snr(then) - _log_snr(now)
    phi = torch.expm1(-h)
    picture = path.pictures[-1]
    found = _wide(then / now, x) * x - _wide((1 - then) * phi, x) * picture
    if order == 1:
        return found
    ratio = (_log_snr(now) - _log_snr(path.levels[-2])) / h
    first = (picture - path.pictures[-2]) / _wide(ratio, x)
    if order == 2:
        return found - _wide(0.5 * (1 - then) * phi, x) * first
    earlier = (_log_snr(path.levels[-2]) - _log_snr(path.levels[-3])) / h
    second = (path.pictures[-2] - path.pictures[-3]) / _wide(earlier, x)
    slope = first + _wide(ratio / (ratio + earlier), x) * (first - second)
    bend = _wide(1 / (ratio + earlier), x) * (first - second)
    by_slope, by_bend = (1 - then) * (phi / h + 1), (1 - then) * ((phi + h) / h**2 - 0.5)
    return found + _wide(by_slope, x) * slope - _wide(by_bend, x) * bend


def _unipc(x: Tensor, path: Path, then: Tensor, order: int, arrived: Tensor | None) -> Tensor:
    """UniPC's predictor; with `arrived`, the prediction at the state that it led to, its corrector."""
    now, picture = path.levels[-1], path.pictures[-1]
    h = _log_snr(then) - _log_snr(now)
    phi = torch.expm1(-h)
    ratios = [(_log_snr(path.levels[-1 - back]) - _log_snr(now)) / h for back in range(1, order)]
    slopes = [(path.pictures[-1 - back] - picture) / _wide(ratio, x) for back, ratio in enumerate(ratios, start=1)] + (
        [] if arrived is None else [arrived - picture]
    )
    found = _wide(then / now, x) * x - _wide((1 - then) * phi, x) * picture
    points = ratios if arrived is None else [*ratios, torch.ones_like(h)]
    for weight, slope in zip(_unipc_weights(points, h, phi), slopes, strict=True):
        found = found - _wide((1 - then) * phi * weight, x) * slope
    return found


def _unipc_weights(points: list[Tensor], h: Tensor, phi: Tensor) -> list[Tensor]:
    """Weights of the differences at these points, [B] each: one alone has 1/2, else they solve the order conditions."""
    if len(points) <= 1:
        return [torch.full_like(h, 0.5) for _ in points]
    rows, wanted = [], []
    term, factorial = phi / -h - 1, 1
    for power in range(len(points)):
        rows.append(torch.stack([point**power for point in points], dim=-1))
        wanted.append(term * factorial / phi)
        factorial *= power + 2
        term = term / -h - 1 / factorial
    solved = torch.linalg.solve(torch.stack(rows, dim=-2), torch.stack(wanted, dim=-1))
    return list(solved.unbind(-1))


def _wide(values: Tensor, like: Tensor) -> Tensor:
    """[n] on the CPU → [n, 1, 1, 1] beside `like`, in its dtype."""
    return values.to(like.dtype).view(-1, *[1] * (like.ndim - 1)).to(like.device, non_blocking=True)


def _like(kept: Tensor, tensor: Tensor) -> Tensor:
    return kept.to(tensor.device)
