"""Sana's linear attention kept in fp32, whatever precision surrounds it.

diffusers' own processor calls `.float()`, which bf16 autocast undoes at the next matmul, and adds 1e-15 to a
denominator that NVlabs guards with 1e-8 (`diffusion/model/nets/sana_blocks.py`, LiteLA).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-8


class LinearAttention:
    """Attention processor: ReLU linear attention, its products in fp32 with autocast off, eps 1e-8.

    Projections stay in the surrounding precision. hidden_states: [B, N, width] → the same shape and dtype.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = attn.to_q(hidden_states), attn.to_k(source), attn.to_v(source)
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)
        mixed = mix(_split(query, attn.heads), _split(key, attn.heads), _split(value, attn.heads))
        mixed = mixed.flatten(1, 2).transpose(1, 2).to(hidden_states.dtype)
        out = attn.to_out[1](attn.to_out[0](mixed))
        return out.clip(-65504, 65504) if hidden_states.dtype == torch.float16 else out


def mix(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """sum_j v_j (k_j · q_i) / (sum_j k_j · q_i + eps) with ReLU on q and k, in fp32. All [B, heads, d, N]."""
    with torch.autocast(query.device.type, enabled=False):
        query, key, value = F.relu(query).float(), F.relu(key).float(), value.float()
        value = F.pad(value, (0, 0, 0, 1), value=1.0)  # a row of ones: the denominator comes with the numerator
        mixed = torch.matmul(torch.matmul(value, key.transpose(2, 3)), query)
        return mixed[:, :, :-1] / (mixed[:, :, -1:] + EPS)


def install(transformer: Any) -> None:
    """Give every block of a SanaTransformer2DModel the fp32 linear attention. Weights and names do not change."""
    for block in transformer.transformer_blocks:
        block.attn1.set_processor(LinearAttention())


@contextmanager
def published(transformer: Any) -> Iterator[None]:
    """While inside, the linear attention is diffusers' own: pictures equal an exported pipeline's to the pixel."""
    from diffusers.models.attention_processor import SanaLinearAttnProcessor2_0

    ours = [block.attn1.processor for block in transformer.transformer_blocks]
    for block in transformer.transformer_blocks:
        block.attn1.set_processor(SanaLinearAttnProcessor2_0())
    try:
        yield
    finally:
        for block, processor in zip(transformer.transformer_blocks, ours, strict=True):
            block.attn1.set_processor(processor)


def _split(tokens: Tensor, heads: int) -> Tensor:
    """[B, N, heads * d] → [B, heads, d, N]"""
    return tokens.transpose(1, 2).unflatten(1, (heads, -1))
