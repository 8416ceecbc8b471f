"""Gradient release: each weight is updated inside the backward pass, and its gradient freed at once.

At no time is there more than one gradient, which saves as much memory as the weights take. The price: an update cannot
wait for the norm of the whole gradient. So clipping by norm takes two passes, the first of which only measures; without
it a gradient that is not finite is taken as 0, others may have moved their weights already, and the loop goes back to
the last checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sana_tune.train.rounding import Rounded
from sana_tune.train.single import OneByOne


class Release:
    """Hooks on the parameters; they do nothing outside `measuring` and `updating`.

    max_norm: clip by the norm of the whole gradient, in two passes; 0 = no such clipping. max_value: clip each element;
    0 = not.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: Sequence[nn.Parameter],
        *,
        max_norm: float = 0.0,
        max_value: float = 0.0,
    ):
        self.max_norm, self.max_value = max_norm, max_value
        self._update = optimizer.update if isinstance(optimizer, Rounded) else OneByOne(optimizer).update
        self._mode = ""
        self._scale: Tensor | None = None
        self._norms: dict[int, Tensor] = {}
        self._order = [id(parameter) for parameter in parameters]
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._arrived)

    @property
    def passes(self) -> int:
        """Backward passes that a step takes."""
        return 2 if self.max_norm > 0 else 1

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """The backward pass in here only measures the norm; no weight moves."""
        yield from self._in("measure", None)

    @contextmanager
    def updating(self) -> Iterator[None]:
        """The backward pass in here moves the weights, clipped by the norm that was measured before."""
        scale = torch.clamp(self.max_norm / (self.norm() + 1e-6), max=1.0) if self.passes == 2 else None
        yield from self._in("update", scale)

    def norm(self) -> Tensor:
        """Norm of the gradients of the last pass, before clipping: an fp32 scalar on the device."""
        return torch.linalg.vector_norm(torch.stack([self._norms[key] for key in self._order if key in self._norms]))

    def _in(self, mode: str, scale: Tensor | None) -> Iterator[None]:
        self._mode, self._scale = mode, scale
        self._norms = {}
        try:
            yield
        finally:
            self._mode = ""

    @torch.no_grad()
    def _arrived(self, parameter: Tensor) -> None:
        """A parameter's gradient is complete. Nothing here waits for the device."""
        gradient = parameter.grad
        if not self._mode or gradient is None:
            return
        norm = torch.linalg.vector_norm(gradient, dtype=torch.float32)  # first: optimizers use the gradient as scratch
        self._norms[id(parameter)] = norm
        if self._mode == "update":
            gradient.masked_fill_(~torch.isfinite(norm), 0.0)
            if self.max_value > 0:
                gradient.clamp_(-self.max_value, self.max_value)
            if self._scale is not None:
                gradient.mul_(self._scale)
            assert isinstance(parameter, nn.Parameter)
            self._update(parameter)
        parameter.grad = None
