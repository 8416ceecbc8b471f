"""How noise levels are distributed before the shift: quantile functions on plain numbers. Torch-free: plans show it.

A level is sigma of `flow.py`: 0 at the picture, 1 at pure noise. A quantile function turns shares that are spread
evenly over 0..1 into levels, so that stratified shares give stratified levels, whatever the distribution.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

_NORMAL = NormalDist()
_EDGE = 1e-7  # shares stay this far from 0 and 1, where some quantiles are infinite
_BETA_POINTS = 512
_SHARES = 2000  # of a picture of a distribution
_BLOCKS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Levels:
    """A distribution of noise levels.

    kind:       a name of config.choices.NOISE_DISTRIBUTIONS.
    mean, std:  of logit-normal: sigmoid(N(mean, std)).
    alpha, beta: of beta. mode_scale: of mode. table: of custom, rising levels in 0..1, each as likely.
    stratified: the levels of one optimizer step are spread evenly over the distribution.
    """

    kind: str = "logit-normal"
    mean: float = 0.0
    std: float = 1.0
    alpha: float = 2.0
    beta: float = 2.0
    mode_scale: float = 1.29
    table: tuple[float, ...] = ()
    stratified: bool = False

    @property
    def is_shifted(self) -> bool:
        """Whether the flow shift moves these levels; a table is taken as it is."""
        return self.kind != "custom"

    def quantile(self, share: float) -> float:
        """The level below which `share` (0..1) of all draws lie, before the shift. Raises KeyError for another kind.

        logit-normal: arXiv 2403.03206, eq. 19. mode: there, eq. 20, as a rising function. beta: Beta(alpha, beta).
        """
        share = min(max(share, _EDGE), 1.0 - _EDGE)
        if self.kind == "logit-normal":
            return (1.0 + math.tanh((self.mean + self.std * _NORMAL.inv_cdf(share)) / 2)) / 2  # the sigmoid
        if self.kind == "uniform":
            return share
        if self.kind == "mode":
            return share - self.mode_scale * (math.sin(math.pi / 2 * share) ** 2 - share)
        if self.kind == "beta":
            return _interpolated(beta_table(self.alpha, self.beta), share)
        if self.kind == "custom":
            return self.table[int(share * len(self.table))]
        raise KeyError(self.kind)

    def at(self, share: float, s: float) -> float:
        """The same after the shift s (s * sigma / (1 + (s - 1) * sigma); `flow.shift`)."""
        sigma = self.quantile(share)
        return s * sigma / (1 + (s - 1) * sigma) if self.is_shifted else sigma

    def told(self) -> str:
        """The distribution in words."""
        numbers = {
            "logit-normal": f" (mean {self.mean:g}, std {self.std:g})",
            "beta": f" ({self.alpha:g}, {self.beta:g})",
            "mode": f" (scale {self.mode_scale:g})",
            "custom": f" ({len(self.table)} levels)",
        }
        return f"{self.kind}{numbers.get(self.kind, '')}{', stratified' if self.stratified else ''}"


def spread(levels: Levels, s: float, count: int) -> tuple[float, ...]:
    """Rising levels after the shift s, each in the middle of one of `count` equal shares of all draws.

    A table with fewer levels gives each of them once.
    """
    found = (levels.at((number + 0.5) / count, s) for number in range(count))
    return tuple(dict.fromkeys(found))


def picture(levels: Levels, s: float, columns: int = 20) -> str:
    """How often each level is drawn after the shift s, from 0 on the left to 1, as one line of blocks."""
    counts = [0] * columns
    for number in range(_SHARES):
        counts[min(columns - 1, int(levels.at((number + 0.5) / _SHARES, s) * columns))] += 1
    most = max(counts)
    return "".join(_BLOCKS[math.ceil(count / most * (len(_BLOCKS) - 1))] for count in counts)


@lru_cache(maxsize=8)
def beta_table(alpha: float, beta: float) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(shares, levels) of Beta(alpha, beta), both rising from 0 to 1; denser in levels near 0 and 1."""
    levels = tuple(math.sin(math.pi / 2 * point / _BETA_POINTS) ** 2 for point in range(_BETA_POINTS + 1))
    shares = (0.0, *(_beta_share(level, alpha, beta) for level in levels[1:-1]), 1.0)
    return shares, levels


def _interpolated(table: tuple[Sequence[float], Sequence[float]], share: float) -> float:
    shares, levels = table
    place = min(max(bisect_right(shares, share), 1), len(shares) - 1)
    low, high = shares[place - 1], shares[place]
    part = (share - low) / (high - low) if high > low else 0.0
    return levels[place - 1] + part * (levels[place] - levels[place - 1])


def _beta_share(level: float, alpha: float, beta: float) -> float:
    """Share of Beta(alpha, beta) below a level: the regularised incomplete beta function (DLMF 8.17.22)."""
    if level > (alpha + 1) / (alpha + beta + 2):  # the fraction converges fast below that
        return 1.0 - _beta_share(1.0 - level, beta, alpha)
    logs = math.lgamma(alpha + beta) - math.lgamma(alpha) - math.lgamma(beta)
    front = math.exp(logs + alpha * math.log(level) + beta * math.log1p(-level)) / alpha
    fraction = 1.0
    for term in range(60, 0, -1):  # the continued fraction, from its end
        half = term // 2
        if term % 2:
            part = -(alpha + half) * (alpha + beta + half) / ((alpha + 2 * half) * (alpha + 2 * half + 1))
        else:
            part = half * (beta - half) / ((alpha + 2 * half - 1) * (alpha + 2 * half))
        fraction = 1.0 + part * level / fraction
    return min(1.0, front / fraction)
