"""Frozen networks with packed weights: what stays, what becomes 4 or 8 bits, and what that costs in exactness.

Weights alone are packed; what is computed stays in the precision of its inputs (or of autocast): each product unpacks
its matrix, and so does its backward pass, so that no dense weight is kept. bitsandbytes packs nf4 (QLoRA, arXiv
2305.14314) and int8, torchao int8 and fp8.

The 1×1 convolutions of GLUMBConv hold nearly half of Sana's weights. Such a convolution is a matrix on the channels of
each place, so they are packed as the linear layers are, in a layer that stays a convolution to the outside: adapters
find what they find on an unquantised base, and their files fit both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCKS = ("transformer_blocks", "layers")  # what the stack of blocks is called in Sana, and in Gemma
# What is left as it is → in words. Biases, norms and tables are told together.
SPARED: Mapping[str, str] = {
    "patch_embed": "patch embedding",
    "time_embed": "time embedding",
    "caption_projection": "caption projection",
    "proj_out": "output projection",
    "conv_depth": "depthwise convolutions",
    "embed_tokens": "token embeddings",
}
OTHERS = "norms, biases and tables"


@dataclass(frozen=True)
class Quantised:
    """What `quantise` did.

    replaced: names of the layers with packed weights. kept: what stayed → its parameters. bytes_before: in the dtype of
    what stayed. error: relative error of the prediction; error_if_all: the same had the layers that stayed been
    quantised too. Both None where it was not measured.
    """

    precision: str
    replaced: tuple[str, ...]
    kept: Mapping[str, int]
    bytes_before: int
    bytes_after: int
    error: float | None = None
    error_if_all: float | None = None

    def told(self) -> str:
        """One line for the log."""
        layers = f"{len(self.replaced)} layers in {self.precision}, "
        sizes = f"{self.bytes_before / 1e9:.3g} GB → {self.bytes_after / 1e9:.3g} GB"
        kept = ", ".join(f"{words} {_count(number)}" for words, number in self.kept.items())
        line = f"{layers}{sizes}; not quantised: {kept} parameters"
        if self.error is None or self.error_if_all is None:
            return line
        return (
            f"{line}: the prediction is off by {100 * self.error:.2g} % (noise as input), with them quantised too it "
            f"would be by {100 * self.error_if_all:.2g} %"
        )


def quantise(
    model: Any,
    precision: str,
    *,
    device: torch.device | str,
    via: str = "cpu",
    default_dtype: torch.dtype | None = None,
    measure: bool | None = None,
) -> Quantised:
    """Freeze a SanaTransformer2DModel or a Gemma, which is in main memory, pack its matrices and put it on a device.

    precision: a name of config.choices.PRECISIONS; no_change packs nothing. via: "cpu" packs in main memory,
    "accelerator" on the device; either way layer by layer, so that the device never holds more than one dense matrix
    beside what is packed. default_dtype: of what is not packed; None = as it is. measure: compare predictions before
    and after (Sana alone, and unless it is False).
    """
    device, dense = torch.device(device), dict[str, int]()
    model.requires_grad_(False)
    names = [] if precision == "no_change" else matrices_of(model)
    measured = bool(names) and measure is not False and hasattr(model, "transformer_blocks")
    before = _prediction(model) if measured else None
    for name, parameter in model.named_parameters():
        dense[name] = parameter.numel() * (default_dtype or parameter.dtype).itemsize
    where = device if via == "accelerator" else torch.device("cpu")
    tables: list[Any] = []
    for name in names:
        parent, _, last = name.rpartition(".")
        holder = model.get_submodule(parent)
        made = _packed(holder.get_submodule(last), precision, where, device, default_dtype)
        _share(made, tables)
        holder.register_module(last, made)
    _settle(model, device, default_dtype)
    error = if_all = None
    if before is not None:
        error = _distance(_prediction(model), before)
        with _all_rounded(model, precision):
            if_all = _distance(_prediction(model), before)
    return Quantised(precision, tuple(names), _kept(model), sum(dense.values()), footprint(model), error, if_all)


def matrices_of(model: nn.Module) -> list[str]:
    """Names of the layers whose weights are packed: linear ones and 1×1 convolutions inside the blocks."""
    return [
        name
        for name, module in model.named_modules()
        if any(part in BLOCKS for part in name.split(".")) and _is_matrix(module)
    ]


def is_packed(layer: nn.Module) -> bool:
    """Whether a layer's weight is packed: what adds to it must add to its output (LyCORIS: `bypass_mode`)."""
    return isinstance(layer, _Packed)


def footprint(model: nn.Module) -> int:
    """Bytes of a network's parameters and buffers with the scales of packed weights, each counted once."""
    found: dict[tuple[str, int], int] = {}
    states = [module.state for module in model.modules() if isinstance(module, _Packed) and module.state is not None]
    apart = [[state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code] for state in states]
    for tensor in (*model.parameters(), *model.buffers(), *chain(*apart)):
        for part in _parts(tensor):
            storage = part.untyped_storage()
            found[str(part.device), storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


# ---- the layers ----


class _Packed(nn.Module):
    """A frozen matrix [out, in] that is packed: `weight`, with what the format keeps apart in `scale` or `state`."""

    precision: str
    weight: Any
    bias: Any
    scale: Any  # int8-bnb: [out, 1] fp32
    state: Any  # nf4-bnb: bitsandbytes' QuantState

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The matrix unpacked: [out, in]."""
        if self.precision == "nf4-bnb":
            from bitsandbytes.functional import dequantize_4bit

            return dequantize_4bit(self.weight, self.state).to(dtype)
        if self.scale is None:
            return self.weight.dequantize().to(dtype)
        out = torch.empty(self.weight.shape, dtype=dtype, device=self.weight.device)
        return torch.mul(self.weight, self.scale, out=out)  # in fp32, rounded once

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        if self.state is not None:
            self.state.to(self.weight.device)
        return self

    def multiply(self, tokens: Tensor) -> Tensor:
        """[..., in] → [..., out], in the precision of the tokens or of autocast, as of a linear layer."""
        if torch.is_autocast_enabled(tokens.device.type):
            tokens = tokens.to(torch.get_autocast_dtype(tokens.device.type))
        bias = None if self.bias is None else self.bias.to(tokens.dtype)
        if self.precision == "nf4-bnb":
            from bitsandbytes import matmul_4bit

            return matmul_4bit(tokens, self.weight, quant_state=self.state, bias=bias)
        return _Product.apply(tokens, bias, self)  # pyright: ignore[reportReturnType]


class QuantisedLinear(_Packed, nn.Linear):
    """A frozen linear layer: [..., in] → [..., out]."""

    def forward(self, input: Tensor) -> Tensor:
        return self.multiply(input)


class QuantisedPointwise(_Packed, nn.Conv2d):
    """A frozen 1×1 convolution: [B, in, h, w] → [B, out, h, w], channels-last."""

    def forward(self, input: Tensor) -> Tensor:
        tokens = self.multiply(input.flatten(2).transpose(1, 2))
        return tokens.transpose(1, 2).unflatten(2, input.shape[2:])


class _Product(torch.autograd.Function):
    """A product with a frozen matrix that is unpacked for it, and again for the gradient: nothing dense is kept."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, bias: Tensor | None, layer: _Packed) -> Tensor:
        ctx.layer = layer
        return F.linear(tokens, layer.dense(tokens.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return gradients[0] @ ctx.layer.dense(gradients[0].dtype), None, None


def _is_matrix(module: nn.Module) -> bool:
    if type(module) is nn.Conv2d:
        return module.kernel_size == (1, 1) and module.stride == (1, 1) and module.groups == 1
    return type(module) is nn.Linear


def _packed(
    layer: Any, precision: str, where: torch.device, device: torch.device, dtype: torch.dtype | None = None
) -> _Packed:
    """The layer that takes the place of another, its weight packed `where` and put on the device.

    dtype: that a gradient most often needs it in.
    """
    made: Any
    if isinstance(layer, nn.Conv2d):
        made = QuantisedPointwise(layer.in_channels, layer.out_channels, 1, bias=False, device="meta")
    else:
        made = QuantisedLinear(layer.in_features, layer.out_features, bias=False, device="meta")
    made.precision, made.bias = precision, layer.bias
    weight, made.state, scale = pack(layer.weight.detach().flatten(1).to(where), precision)
    made.weight = nn.Parameter(weight.to(device), requires_grad=False)
    made.register_buffer("scale", None if scale is None else scale.to(device))
    if made.state is not None:
        made.state.to(device)
        made.state.dtype = dtype or made.state.dtype  # what it unpacks to, with no other on the way
    return made.train(layer.training)


def pack(matrix: Tensor, precision: str) -> tuple[Tensor, Any, Tensor | None]:
    """A matrix [out, in] packed where it lies, with `state` and `scale` of _Packed."""
    if precision == "nf4-bnb":
        from bitsandbytes.functional import quantize_4bit

        return *quantize_4bit(matrix, compress_statistics=True, quant_type="nf4"), None
    if precision == "int8-bnb":
        from bitsandbytes.functional import int8_vectorwise_quant

        values, largest, _ = int8_vectorwise_quant(matrix.to(torch.float16))
        return values, None, largest[:, None] / 127
    from torchao.quantization import (  # pyright: ignore[reportMissingImports]
        Float8WeightOnlyConfig,
        Int8WeightOnlyConfig,
        PerRow,
        quantize_,
    )

    kinds = {"int8-torchao": Int8WeightOnlyConfig, "fp8-torchao": Float8WeightOnlyConfig}
    holder = nn.Sequential(nn.Linear(*reversed(matrix.shape), bias=False, device="meta"))
    holder[0].weight = nn.Parameter(matrix, requires_grad=False)
    quantize_(holder, kinds[precision](granularity=PerRow(), set_inductor_config=False))
    return holder[0].weight.data, None, None


def _share(layer: _Packed, tables: list[Any]) -> None:
    """Have all layers of nf4 look their values up in the same tables, a kilobyte each. tables: the first layer's."""
    if layer.state is not None:
        tables[:] = tables or [layer.state.code, layer.state.state2.code]
        layer.state.code, layer.state.state2.code = tables


def _settle(model: nn.Module, device: torch.device, dtype: torch.dtype | None) -> None:
    """Put on the device what is not packed, cast before it goes; buffers keep their dtype."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if isinstance(module, _Packed) and name == "weight":
                continue
            moved = parameter.data.to(dtype or parameter.dtype).to(device)
            setattr(module, name, nn.Parameter(moved, requires_grad=False))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(device))


# ---- what is told of it ----


def _prediction(model: Any) -> Tensor:
    """What a Sana transformer predicts for noise at three noise levels: [3, C, 4, 4], fp32 on the CPU."""
    weight, config = model.proj_out.weight, model.config
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(3, config["in_channels"], 4, 4, generator=generator)
    text = torch.randn(3, 8, config["caption_channels"], generator=generator)
    with torch.no_grad():
        found = model(
            latents.to(weight.device, weight.dtype),
            encoder_hidden_states=text.to(weight.device, weight.dtype),
            timestep=torch.tensor([100.0, 500.0, 900.0], device=weight.device),
            return_dict=False,
        )[0]
    return found.float().cpu()


def _distance(found: Tensor, truth: Tensor) -> float:
    return float((found - truth).norm() / truth.norm())


@contextmanager
def _all_rounded(model: nn.Module, precision: str) -> Iterator[None]:
    """While inside, the matrices and convolutions that stayed have the values that quantising would leave of them."""
    kept: list[tuple[Any, Tensor]] = []
    layers: list[Any] = [module for module in model.modules() if type(module) in (nn.Linear, nn.Conv2d)]
    try:
        for module in layers:
            weight = module.weight.data
            kept.append((module, weight))
            module.weight.data = rounded(weight.flatten(1), precision).view_as(weight)
        yield
    finally:
        for module, weight in kept:
            module.weight.data = weight


def rounded(matrix: Tensor, precision: str) -> Tensor:
    """A matrix [out, in] packed and unpacked again, in its own dtype and place."""
    layer = nn.Linear(*reversed(matrix.shape), bias=False, device="meta")
    layer.weight = nn.Parameter(matrix, requires_grad=False)
    return _packed(layer, precision, matrix.device, matrix.device).dense(matrix.dtype)


def _kept(model: nn.Module) -> dict[str, int]:
    """What is not packed, in words → parameters, the most first."""
    found: dict[str, int] = {}
    for name, module in model.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            if isinstance(module, _Packed) and own == "weight":
                continue
            words = next((said for key, said in SPARED.items() if key in name.split(".")), OTHERS)
            found[words] = found.get(words, 0) + parameter.numel()
    return dict(sorted(found.items(), key=lambda each: -each[1]))


def _count(number: int) -> str:
    return f"{number / 1e6:.3g} M" if number >= 1e6 else f"{number / 1e3:.3g} k"


def _parts(tensor: Any) -> Iterator[Tensor]:
    """The tensors that hold a tensor's bytes: torchao's have several."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _parts(vars(tensor)[name])
