"""How far noise levels are moved towards the noise, by picture size. Plain numbers, torch-free: plans show it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def auto_shift(s: float, tokens: int, native_tokens: int) -> float:
    """The shift for a picture of `tokens` latent positions: s * sqrt(tokens / native_tokens).

    The square-root rule of arXiv 2403.03206, §5.3.2, anchored so that the model's own size keeps its shift.
    """
    return s * math.sqrt(tokens / native_tokens)


def exponential_shift(tokens: int, base_shift: float, max_shift: float, base: int = 256, most: int = 4096) -> float:
    """SD3's and FLUX's form: exp(mu), mu linear in tokens from base_shift at `base` to max_shift at `most`.

    diffusers, `calculate_shift` of the Flux pipeline.
    """
    slope = (max_shift - base_shift) / (most - base)
    return math.exp(base_shift + slope * (tokens - base))


def shift_for(s: float, tokens: int, native_tokens: int, scheduler: Mapping[str, Any], *, auto: bool) -> float:
    """The shift to train a picture of `tokens` latent positions with.

    auto false: s. auto true: `exponential_shift` if the scheduler's config has base_shift and max_shift,
    else `auto_shift`.
    """
    if not auto:
        return s
    if "base_shift" in scheduler and "max_shift" in scheduler:
        base, most = scheduler.get("base_image_seq_len", 256), scheduler.get("max_image_seq_len", 4096)
        return exponential_shift(tokens, scheduler["base_shift"], scheduler["max_shift"], base, most)
    return auto_shift(s, tokens, native_tokens)
