"""A handful of parameters of every kind that Sana has, and gradients for them that depend on the step alone."""

from __future__ import annotations

import torch
from torch import nn

from sana_tune.train.rounding import place

SHAPES = {
    "linear.weight": (80, 70), "conv.weight": (72, 64, 1, 1), "depth.weight": (40, 1, 3, 3),
    "scale_shift_table": (6, 30), "linear.bias": (30,),
}  # fmt: skip


def parameters(dtype: torch.dtype = torch.float32, scale: float = 0.1) -> dict[str, nn.Parameter]:
    """The same each time."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: nn.Parameter((scale * torch.randn(shape, generator=generator)).to(dtype))
        for name, shape in SHAPES.items()
    }


def give_gradients(named: dict[str, nn.Parameter], step: int) -> None:
    """The gradients of a step."""
    generator = torch.Generator().manual_seed(100 + step)
    for parameter in named.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def push(named: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, steps: int, start: int = 0) -> None:
    """So many steps."""
    for step in range(start, start + steps):
        give_gradients(named, step)
        place(optimizer, step)
        optimizer.step()
        optimizer.zero_grad()


def copies(named: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Other parameters of the same values."""
    return {name: nn.Parameter(parameter.detach().clone()) for name, parameter in named.items()}


def same(one: dict[str, nn.Parameter], other: dict[str, nn.Parameter]) -> bool:
    """Whether all values are the same, bit for bit."""
    return all(torch.equal(one[name], other[name]) for name in one)
