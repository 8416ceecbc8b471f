"""One parameter's update with any optimizer of the table: what stochastic rounding and gradient release are made of."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Group = dict[str, Any]


class PerParameter(torch.optim.Optimizer):
    """Base of our own optimizers: all there is to one is the update of a single parameter."""

    @abstractmethod
    def update_one(self, group: Group, parameter: nn.Parameter, generator: torch.Generator | None) -> None:
        """Move one fp32 parameter by its fp32 gradient. generator: for states that are rounded stochastically."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.update_one(group, parameter, None)


class OneByOne:
    """Steps an optimizer for single parameters, each of which counts its own steps."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.optimizer = optimizer
        self._places = {
            id(parameter): (group, number, place)
            for number, group in enumerate(optimizer.param_groups)
            for place, parameter in enumerate(group["params"])
        }
        self._update = _updates(optimizer)

    @torch.no_grad()
    def update(self, parameter: nn.Parameter, generator: torch.Generator | None = None) -> None:
        """Update one parameter by its gradient, which is scratch afterwards."""
        group, number, place = self._places[id(parameter)]
        self._update(self.optimizer, group, parameter, number, place, generator)


Update = Callable[[Any, Group, nn.Parameter, int, int, torch.Generator | None], None]


def _updates(optimizer: torch.optim.Optimizer) -> Update:
    """The function that fits an optimizer. Its module's name tells its library: importing them takes seconds."""
    libraries = {kind.__module__.partition(".")[0] for kind in type(optimizer).__mro__}
    if "bitsandbytes" in libraries:
        return _bitsandbytes
    if "optimi" in libraries:
        return _optimi
    return _own if isinstance(optimizer, PerParameter) else _torch


def _bitsandbytes(optimizer: Any, group: Group, parameter: nn.Parameter, number: int, place: int, _: Any) -> None:
    """What its `step` does for one parameter, less the wait for the device after each of them."""
    if not optimizer.state[parameter]:
        optimizer.init_state(group, parameter, number, place)
    optimizer.prefetch_state(parameter)
    optimizer.update_step(group, parameter, number, place)


def _optimi(optimizer: Any, group: Group, parameter: nn.Parameter, *_: Any) -> None:
    """Its own step for one parameter. It looks for the group in the parameter's state, where it must not stay:
    after loading that would be a copy, which the learning rate no longer reaches."""
    state = optimizer.state[parameter]
    state["group"] = group
    try:
        optimizer.step(param=parameter)
    finally:
        del state["group"]


def _own(
    optimizer: PerParameter, group: Group, parameter: nn.Parameter, number: int, place: int, generator: Any
) -> None:
    optimizer.update_one(group, parameter, generator)


def _torch(optimizer: torch.optim.Optimizer, group: Group, parameter: nn.Parameter, *_: Any) -> None:
    whole = optimizer.param_groups
    optimizer.param_groups = [{**group, "params": [parameter]}]
    try:
        optimizer.step()
    finally:
        optimizer.param_groups = whole
