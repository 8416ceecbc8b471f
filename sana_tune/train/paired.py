"""Losses of fixed pictures beside those of the base model: shares, paired differences, their error. Pure.

At each noise level a loss is divided by the base model's mean loss there, so that no end of the range drowns the
others; the mean over levels is 1 for the base model, below 1 for one that is better. Pictures are independent of each
other, the levels of one picture are not: errors are told from the pictures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Paired:
    """Losses over the base model's.

    mean: over pictures and levels, 1 = as the base. levels: at each level. se: standard error of mean - 1, the paired
    difference; None for one picture. changes: of each picture, whose mean is mean - 1. loss: the plain mean loss.
    """

    mean: float
    levels: tuple[float, ...]
    se: float | None
    changes: tuple[float, ...]
    loss: float


def paired(losses: Tensor, base: Tensor) -> Paired:
    """Compare losses [pictures, levels] with the base model's.

    Pictures of which nothing counts, since their mask is black, have no loss at all and are left out.
    """
    counted = base.sum(1) != 0
    if not bool(counted.all()) and bool(counted.any()):
        losses, base = losses[counted], base[counted]
    mean_base = base.mean(0)
    scale = torch.where(mean_base > 0, mean_base, torch.ones_like(mean_base))
    changes = ((losses - base) / scale).mean(1)
    levels = 1 + (losses - base).mean(0) / scale
    return Paired(
        mean=1 + float(changes.mean()),
        levels=tuple(levels.tolist()),
        se=standard_error(changes.tolist()),
        changes=tuple(changes.tolist()),
        loss=float(losses.mean()),
    )


def standard_error(values: Sequence[float]) -> float | None:
    """The standard error of the mean of independent values; None for fewer than two."""
    count = len(values)
    if count < 2:
        return None
    mean = math.fsum(values) / count
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1) / count)


@dataclass(frozen=True)
class Drift:
    """How far predictions are from the base model's.

    share: of the base's own length (root of the mean squares). gained: share of the square of that way by which the
    loss fell: 1 when the model went straight to what it should say, 0 when it came no nearer.
    """

    share: float
    gained: float


def drift(now: Tensor, base: Tensor, gain: float) -> Drift:
    """The drift of predictions, fp32, one after another. gain: by how much their mean loss is below the base's."""
    length, way = (float(values.double().square().mean()) for values in (base, now.double() - base.double()))
    if not way > 0 or not length > 0:  # not NaN either
        return Drift(way, 0.0)
    return Drift(math.sqrt(way / length), gain / way)


def labels(sigmas: Tensor) -> tuple[str, ...]:
    """Names of the levels [pictures, levels]: their means over the pictures, with as many digits as tell them apart."""
    means = sigmas.mean(0).tolist()
    for digits in range(2, 8):
        found = tuple(f"{mean:.{digits}f}" for mean in means)
        if len(set(found)) == len(found):
            return found
    return tuple(f"{mean:.7f}_{number}" for number, mean in enumerate(means))
