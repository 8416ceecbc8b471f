"""The exponential moving average of the weights, in fp32, and the null object that stands in for none."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn


def ramped(decay: float, step: int) -> float:
    """The decay of one step: min(decay, (1 + s) / (10 + s)), s = optimizer steps done (contracts §3)."""
    return min(decay, (1 + step) / (10 + step))


class Ema:
    """A moving average of named parameters, updated every `interval` steps with the decay compensated.

    named_parameters: `model.named_parameters()` of the bare (unwrapped) model.
    The average starts as the weights.
    """

    def __init__(self, named_parameters: Iterable[tuple[str, nn.Parameter]], decay: float, interval: int = 1):
        pairs = list(named_parameters)
        self.decay = decay
        self.interval = interval
        self._names = [name for name, _ in pairs]
        self._weights: list[Tensor] = [parameter for _, parameter in pairs]
        self._same_dtype = all(parameter.dtype == torch.float32 for parameter in self._weights)
        self._shadow = [parameter.detach().to(torch.float32, copy=True) for parameter in self._weights]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the weights after optimizer step number `step` (1 = the first)."""
        if step % self.interval:
            return
        share = 1.0 - ramped(self.decay, step) ** self.interval
        if self._same_dtype:
            torch._foreach_lerp_(self._shadow, self._weights, share)
        else:
            torch._foreach_mul_(self._shadow, 1.0 - share)
            torch._foreach_add_(self._shadow, self._weights, alpha=share)

    @torch.no_grad()
    def reset(self) -> None:
        """Start again from the weights as they are."""
        torch._foreach_copy_(self._shadow, self._weights)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """In here the model holds the averaged weights (in its own dtype); its own are put back in any case.

        Only pointers are exchanged when the weights are fp32, so no memory is taken.
        """
        own = [parameter.data for parameter in self._weights]
        try:
            for parameter, average in zip(self._weights, self._shadow, strict=True):
                parameter.data = average.to(parameter.dtype)
            yield
        finally:
            for parameter, data in zip(self._weights, own, strict=True):
                parameter.data = data

    def views(self) -> Iterator[tuple[str, AbstractContextManager[None]]]:
        """(suffix, context) for each set of weights there is: the raw ones, then the average."""
        yield "", nullcontext()
        yield "_ema", self.swapped()

    def state_dict(self) -> dict[str, Tensor]:
        """Name → averaged fp32 weight (not copies)."""
        return dict(zip(self._names, self._shadow, strict=True))

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave. Raises KeyError when a name is missing."""
        torch._foreach_copy_(self._shadow, [state[name].to(self._shadow[0].device) for name in self._names])


class NoEma:
    """Stands where no average is kept."""

    def update(self, step: int) -> None:
        pass

    def reset(self) -> None:
        pass

    @contextmanager
    def swapped(self) -> Iterator[None]:
        yield

    def views(self) -> Iterator[tuple[str, AbstractContextManager[None]]]:
        yield "", nullcontext()

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        pass
