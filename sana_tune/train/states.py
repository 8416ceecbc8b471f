"""Optimizer state by the names of the parameters, whole: what a checkpoint holds, whatever the number of processes.

{"state": {parameter's name: {…}}, "param_groups": [{"params": [names], settings …}]}, which is the form that
torch.distributed.checkpoint.state_dict gives and takes too. Checkpoints of before count the parameters instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from sana_tune.train.optim import load_optimizer_state

Names = Mapping[int, str]


def names_of(named: Iterable[tuple[str, nn.Parameter]]) -> Names:
    """id of a parameter → its name; of `bare.named_parameters()`."""
    return {id(parameter): name for name, parameter in named}


def full_state(optimizer: torch.optim.Optimizer, names: Names) -> dict[str, Any]:
    """The whole state by name; the tensors are the optimizer's own, not copies. For parameters that are not sharded."""
    held = optimizer.state_dict()
    numbered: dict[int, str] = {}
    groups = []
    for saved, group in zip(held["param_groups"], optimizer.param_groups, strict=True):
        own = [names[id(parameter)] for parameter in group["params"]]
        numbered.update(zip(saved["params"], own, strict=True))
        groups.append({**saved, "params": own})
    return {"state": {numbered[number]: state for number, state in held["state"].items()}, "param_groups": groups}


def load_full_state(optimizer: torch.optim.Optimizer, names: Names, state: Mapping[str, Any]) -> None:
    """Load what `full_state` gave, or a state that counts the parameters. The state is taken over, not copied.

    Raises ValueError or KeyError when it is of other parameters or of another optimizer.
    """
    groups = state["param_groups"]
    if all(isinstance(name, str) for group in groups for name in group["params"]):
        state = _numbered(optimizer, names, state)
    load_optimizer_state(optimizer, state)


def _numbered(optimizer: torch.optim.Optimizer, names: Names, state: Mapping[str, Any]) -> dict[str, Any]:
    """The state by number, in the order of this run's parameters. Raises ValueError when the groups differ."""
    wanted = [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]
    saved = [list(group["params"]) for group in state["param_groups"]]
    odd = sorted({name for group in wanted for name in group} ^ {name for group in saved for name in group})
    if odd:
        raise ValueError(f"{len(odd)} parameters are on one side only, such as {odd[0]}")
    if [set(group) for group in wanted] != [set(group) for group in saved]:
        raise ValueError("its parameters are grouped in another way")
    numbers = {name: number for number, name in enumerate(name for group in wanted for name in group)}
    groups = [
        {**group, "params": [numbers[name] for name in own]}
        for group, own in zip(state["param_groups"], wanted, strict=True)
    ]
    return {"state": {numbers[name]: held for name, held in state["state"].items()}, "param_groups": groups}
