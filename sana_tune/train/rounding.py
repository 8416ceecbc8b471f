"""bf16 weights that keep what rounding to the nearest would lose: stochastic rounding around any optimizer's update.

A weight is rounded up or down with the probability of its distance, so that it is right on average; an update far
below the weight's own step (2^-8 of its size) is then taken now and then, and not never. One parameter at a time is
held in fp32, so that the optimizer computes as with fp32 weights and little memory is taken.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sana_tune.data.records import digest
from sana_tune.train.single import OneByOne


def round_stochastically(full: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """fp32 → bf16, up or down with the probability of the distance. NaN and infinity stay what they are.

    bf16 is the upper half of fp32: a random number below 2^16 is added to the bits and the lower half cut off.
    """
    bits = full.view(torch.int32)
    noise = torch.randint(0, 1 << 16, full.shape, dtype=torch.int32, device=full.device, generator=generator)
    rounded = (bits + noise).bitwise_and_(-(1 << 16)).view(torch.float32)
    return torch.where(torch.isfinite(full), rounded, full).to(torch.bfloat16)


class Rounded(torch.optim.Optimizer):
    """An optimizer over bf16 parameters whose update is done in fp32 and rounded stochastically.

    Randomness comes from (seed, step, the parameter's place): `at` says the step. State and parameter groups are the
    inner optimizer's own, and so is what is saved. Its states are made for fp32 weights.
    """

    def __init__(self, inner: torch.optim.Optimizer, seed: int = 0):
        # No super().__init__: groups and states are shared with the optimizer that does the work.
        self.inner = inner
        self.defaults, self.param_groups, self.state = inner.defaults, inner.param_groups, inner.state
        self.seed = seed
        self._step = 0
        parameters = [parameter for group in inner.param_groups for parameter in group["params"]]
        self._places = {id(parameter): place for place, parameter in enumerate(parameters)}
        self._generator = torch.Generator(device=parameters[0].device)
        self._one = OneByOne(inner)

    def at(self, step: int) -> None:
        """The next update is that of the step that follows `step` done ones."""
        self._step = step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.update(parameter)

    @torch.no_grad()
    def update(self, parameter: nn.Parameter) -> None:
        """Update one parameter. Its gradient is used up: fp32 and scratch of the optimizer afterwards, then None."""
        low, gradient = parameter.data, parameter.grad
        assert gradient is not None
        parameter.grad = None
        parameter.data = low.float()
        parameter.grad = gradient.float()
        place = self._places[id(parameter)]
        self._generator.manual_seed(int(digest("rounding", self.seed, self._step, place)[:8], 16))
        try:
            self._one.update(parameter, self._generator)
            low.copy_(round_stochastically(parameter.data, self._generator))
        finally:
            parameter.grad = None
            parameter.data = low

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        self.inner.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's."""
        return self.inner.state_dict()


def place(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Tell an optimizer that rounds which step follows (`step` are done); others need not know."""
    if isinstance(optimizer, Rounded):
        optimizer.at(step)
