"""What training receives: one micro-batch of one bucket, with shapes. The only torch in sight is the type."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sana_tune.data.records import Role

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One micro-batch on one rank, all of one bucket: B pictures, C channels, T tokens, D text width."""

    latents: Tensor  # [B, C, h, w]  scaled latents, fp32; Sana: C = 32, h = height_px / 32
    text: Tensor  # [B, T, D]     only as long as the longest caption of the batch; Sana: D = 2304, T <= 300
    text_mask: Tensor  # [B, T]        1 = a real token
    loss_mask: Tensor | None  # [B, 1, h, w]  0..1; None = every position counts
    role: Role
    ids: tuple[str, ...]
    captions: tuple[str, ...] = ()  # as they were embedded, "" = dropped; () where nobody says
