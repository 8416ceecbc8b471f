"""What Sana's blocks compute, made fast without changing it: diffusers' modules and weights, our ways through them.

`install` sets attention processors and a feed-forward on a SanaTransformer2DModel; `published` takes them off for a
while. The linear attention is computed in fp32 whatever precision surrounds it: diffusers' own processor calls
`.float()`, which bf16 autocast undoes at the next matmul, and adds 1e-15 to a denominator that NVlabs guards with 1e-8
(`diffusion/model/nets/sana_blocks.py`, LiteLA). A layer that an adapter or quantisation has replaced is called, never
looked into.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-8
# Elements of [B, N, width] from which on a backward by hand pays: below, its Python costs more than it saves.
LARGE = 2**17


class LinearAttention:
    """Attention processor: ReLU linear attention, its products in fp32 with autocast off, eps 1e-8.

    Projections stay in the surrounding precision; where nothing stands between them and the attention they are one
    product. hidden_states: [B, N, width] → [B, N, width] in the precision of the output projection.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        plain = encoder_hidden_states is None and attn.norm_q is None and attn.norm_k is None
        if plain and (torch.compiler.is_compiling() or _pays(hidden_states)) and fusible(attn):
            mixed = attend(attn.heads, _fused(attn, hidden_states))
        else:
            source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
            query, key = _normed(attn.norm_q, attn.to_q(hidden_states)), _normed(attn.norm_k, attn.to_k(source))
            mixed = attend(attn.heads, query, key, attn.to_v(source))
        out = attn.to_out[1](attn.to_out[0](mixed if _autocast(mixed) else mixed.to(hidden_states.dtype)))
        return out.clip(-65504, 65504) if hidden_states.dtype == torch.float16 else out


class CrossAttention:
    """Attention processor: pictures look at the text, softmax. attention_mask: a bias [B, 1, T], [B, 1, 1, T] or None.

    diffusers repeats the mask for every head in every block; here it stays as it is and is broadcast.
    hidden_states: [B, N, width], encoder_hidden_states: [B, T, width] → [B, N, width].
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key = _normed(attn.norm_q, attn.to_q(hidden_states)), _normed(attn.norm_k, attn.to_k(source))
        query, key, value = (_heads(states, attn.heads) for states in (query, key, attn.to_v(source)))
        bias = attention_mask[:, None] if attention_mask is not None and attention_mask.ndim == 3 else attention_mask
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        out = attn.to_out[1](attn.to_out[0](mixed.transpose(1, 2).flatten(2)))
        return out if attn.rescale_output_factor == 1.0 else out / attn.rescale_output_factor


def feed_forward(self: Any, hidden_states: Tensor) -> Tensor:
    """GLUMBConv's forward, [B, C, h, w] → the same: its 1×1 convolutions as products over the last axis.

    A block hands over a channels-last view of its tokens, so that nothing is copied on the way in or out. Between the
    products stand [B, C, h, w] and no views of it: inductor (torch 2.13) cannot keep such views of changing sizes.
    """
    states = F.silu(_pointwise(self.conv_inverted, hidden_states))
    return _pointwise(self.conv_point, gated(self.conv_depth(states)))


# ---- the attention itself ----


def attend(heads: int, *projected: Tensor) -> Tensor:
    """sum_j v_j (k_j · q_i) / (sum_j k_j · q_i + eps) with ReLU on q and k, in fp32, for each head.

    projected: query, key and value, [B, N, width] each, or the three side by side, [B, N, 3 * width].
    → [B, N, width] in the dtype of the value.
    """
    value = projected[-1]
    with torch.autocast(value.device.type, enabled=False):
        if torch.compiler.is_compiling() or not _pays(value):  # a compiler fuses this, and decides what to keep
            query, key, value = _apart(projected)
            return _mixed(*(_heads(states, heads) for states in (query, key, value))).to(value.dtype)
        return cast(Tensor, _Attend.apply(heads, *projected))


class _Attend(torch.autograd.Function):
    """`attend` with a backward by hand: it keeps q, k, v as they came, a fourth of what autograd would keep."""

    @staticmethod
    def forward(ctx: Any, heads: int, *projected: Tensor) -> Tensor:
        query, key, value = _ready(heads, projected)
        products = _products(key, value)
        summed = torch.matmul(query, products)
        divisor = summed[..., -1:] + EPS
        mixed = _tokens(summed[..., :-1] / divisor, projected[-1].dtype)
        ctx.heads = heads
        ctx.save_for_backward(products, divisor, mixed, *projected)
        return mixed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        products, divisor, mixed, *projected = ctx.saved_tensors
        query, key, value = _ready(ctx.heads, projected)
        # d(numerator) and, in the last place, d(denominator) = -sum d(numerator) · numerator / denominator
        numerator = _heads(gradients[0], ctx.heads).float() / divisor
        denominator = -(numerator * _heads(mixed, ctx.heads)).sum(-1, keepdim=True)
        change = torch.cat([numerator, denominator], -1)
        d_query = torch.matmul(change, products.transpose(-1, -2))
        d_products = torch.matmul(query.transpose(-1, -2), change)
        d_matrix, d_sum = d_products[..., :-1], d_products[..., -1]
        d_key = torch.matmul(value, d_matrix.transpose(-1, -2)).add_(d_sum.unsqueeze(-2))
        d_value = torch.matmul(key, d_matrix)
        d_query, d_key = (torch.ops.aten.threshold_backward(*pair, 0) for pair in ((d_query, query), (d_key, key)))
        found = [torch.empty_like(states) for states in projected]
        for place, states in zip(_apart(found), (d_query, d_key, d_value), strict=True):
            _heads(place, ctx.heads).copy_(states)
        return None, *found


def _mixed(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The attention of [B, heads, N, d] each, before ReLU and in any precision → [B, N, heads * d] in fp32."""
    query, key = F.relu(query).float(), F.relu(key).float()
    summed = torch.matmul(query, _products(key, value.float()))
    return (summed[..., :-1] / (summed[..., -1:] + EPS)).transpose(1, 2).flatten(2)


def _products(key: Tensor, value: Tensor) -> Tensor:
    """sum_j k_j v_j, and sum_j k_j as one more column: the denominator comes with the numerator. [B, heads, d, d+1]"""
    return torch.cat([torch.matmul(key.transpose(-1, -2), value), key.sum(-2).unsqueeze(-1)], -1)


def _ready(heads: int, projected: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Query and key after ReLU, and value: fp32 [B, heads, N, d], contiguous, and copies that may be written to."""
    query, key, value = (
        _heads(states, heads).to(torch.float32, memory_format=torch.contiguous_format, copy=True)
        for states in _apart(projected)
    )
    return query.relu_(), key.relu_(), value


def _apart(projected: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Views of query, key and value, which may lie side by side in one tensor."""
    return tuple(projected if len(projected) == 3 else projected[0].chunk(3, -1))  # pyright: ignore[reportReturnType]


def _heads(tokens: Tensor, heads: int) -> Tensor:
    """[B, N, heads * d] → [B, heads, N, d], a view"""
    return tokens.unflatten(-1, (heads, -1)).transpose(1, 2)


def _tokens(states: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, heads, N, d] → [B, N, heads * d] in one copy"""
    return states.transpose(1, 2).to(dtype, memory_format=torch.contiguous_format).flatten(2)


def _fused(attn: Any, tokens: Tensor) -> Tensor:
    """Query, key and value by one product: [B, N, width] → [B, N, 3 * width]."""
    layers = (attn.to_q, attn.to_k, attn.to_v)
    dtype = torch.get_autocast_dtype(tokens.device.type) if _autocast(tokens) else tokens.dtype
    weight = torch.cat([layer.weight.to(dtype) for layer in layers])
    bias = None if attn.to_q.bias is None else torch.cat([layer.bias.to(dtype) for layer in layers])
    return F.linear(tokens, weight, bias)


def _normed(norm: Any, states: Tensor) -> Tensor:
    """RMS norm over the whole width, as diffusers computes it, by torch's one function for it.

    Another module in its place, such as an adapter's, is called.
    """
    if norm is None:
        return states
    if type(norm).__name__ != "RMSNorm" or norm.bias is not None or norm.weight is None or not untouched(norm):
        return norm(states)
    return F.rms_norm(states.to(norm.weight.dtype), norm.weight.shape, norm.weight, norm.eps)


# ---- the feed-forward ----


def gated(states: Tensor) -> Tensor:
    """a * silu(g) of [B, 2 * width, h, w], a and g being its halves."""
    if torch.compiler.is_compiling() or not _pays(states):
        value, gate = states.chunk(2, 1)
        return value * F.silu(gate)
    return cast(Tensor, _Gated.apply(states))


class _Gated(torch.autograd.Function):
    """`gated` with a backward by hand: it keeps its input alone and writes both halves of the gradient in place."""

    @staticmethod
    def forward(ctx: Any, states: Tensor) -> Tensor:
        ctx.save_for_backward(states)
        value, gate = states.chunk(2, 1)
        return F.silu(gate).mul_(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (states,), (gradient,) = ctx.saved_tensors, gradients
        value, gate = states.chunk(2, 1)
        found = torch.empty_like(states)
        d_value, d_gate = found.chunk(2, 1)
        torch.mul(F.silu(gate), gradient, out=d_value)
        torch.ops.aten.silu_backward.grad_input(gradient * value, gate, grad_input=d_gate)
        return found


def _pointwise(layer: Any, states: Tensor) -> Tensor:
    """A 1×1 convolution as a product: [B, C, h, w] → [B, C', h, w], both channels-last."""
    if type(layer) is not nn.Conv2d or not untouched(layer) or layer.groups != 1:
        return layer(states)
    tokens = F.linear(states.flatten(2).transpose(1, 2), layer.weight.flatten(1), layer.bias)
    return tokens.transpose(1, 2).unflatten(2, states.shape[2:])


# ---- what may be rewritten ----


def untouched(layer: nn.Module) -> bool:
    """Whether a layer still is what diffusers built: no forward of its own, no hooks, and an ordinary weight.

    Adapters patch `forward` (LyCORIS) or put another class in the place (PEFT), quantisation packs the weight.
    """
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return "forward" not in layer.__dict__ and not any(hooks) and type(layer.weight) is nn.Parameter


def fusible(attn: Any) -> bool:
    """Whether query, key and value may be one product."""
    return all(type(layer) is nn.Linear and untouched(layer) for layer in (attn.to_q, attn.to_k, attn.to_v))


def _pays(tensor: Tensor) -> bool:
    return tensor.numel() >= LARGE


def _autocast(tensor: Tensor) -> bool:
    return torch.is_autocast_enabled(tensor.device.type)


# ---- on and off ----


def install(transformer: Any) -> None:
    """Give every block of a SanaTransformer2DModel our attention and feed-forward. Weights and names do not change.

    A feed-forward that an adapter has replaced or patched as a whole stays as it is.
    """
    for block in transformer.transformer_blocks:
        block.attn1.set_processor(LinearAttention())
        block.attn2.set_processor(CrossAttention())
        if type(block.ff).__name__ == "GLUMBConv" and "forward" not in vars(block.ff):
            block.ff.forward = MethodType(feed_forward, block.ff)


@contextmanager
def published(transformer: Any) -> Iterator[None]:
    """While inside, the blocks are diffusers' own: pictures equal an exported pipeline's to the pixel."""
    from diffusers.models.attention_processor import SanaLinearAttnProcessor2_0
    from diffusers.models.transformers.sana_transformer import SanaAttnProcessor2_0

    blocks = transformer.transformer_blocks
    ours = [(block.attn1.processor, block.attn2.processor, _is_ours(block.ff)) for block in blocks]
    for block, (_, _, is_ours) in zip(blocks, ours, strict=True):
        block.attn1.set_processor(SanaLinearAttnProcessor2_0())
        block.attn2.set_processor(SanaAttnProcessor2_0())
        if is_ours:
            del block.ff.forward
    try:
        yield
    finally:
        for block, (linear, cross, is_ours) in zip(blocks, ours, strict=True):
            block.attn1.set_processor(linear)
            block.attn2.set_processor(cross)
            if is_ours:
                block.ff.forward = MethodType(feed_forward, block.ff)


def _is_ours(ff: nn.Module) -> bool:
    """Whether a feed-forward runs our way; an adapter's own forward is not ours to take off."""
    forward = vars(ff).get("forward")
    return isinstance(forward, MethodType) and forward.__func__ is feed_forward


def trimmed(text: Tensor, mask: Tensor, multiple: int = 8, *, masked: bool = False) -> tuple[Tensor, Tensor | None]:
    """Embeddings [B, T, D] and their mask [B, T] as the model should get them; both on the CPU, so that nothing waits.

    Text that no sample has is cut off. When every token left is real, no mask is needed; else the length is rounded
    up to a multiple: attention kernels want aligned masks, and fewer lengths mean fewer compiled forms. masked: in any
    case round up and give a mask, for compiled blocks.
    """
    longest = int(mask.sum(1).max())
    text, mask = text[:, :longest], mask[:, :longest]
    if longest > 1 and not masked and bool(mask.all()):
        return text, None
    more = -longest % multiple
    return F.pad(text, (0, 0, 0, more)), F.pad(mask, (0, more))
