"""Single parameters updated one by one move as the whole step would move them."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

from sana_tune.config.optimizers import OPTIMIZER_FACTS
from sana_tune.train.optim import build_optimizer, load_optimizer_state, parameter_groups
from sana_tune.train.single import OneByOne
from tests.train.params import copies, give_gradients, parameters, push, same

NAMES = list(OPTIMIZER_FACTS)


def push_singly(named, optimizer, steps: int, start: int = 0) -> None:
    one = OneByOne(optimizer)
    for step in range(start, start + steps):
        give_gradients(named, step)
        for name in sorted(named):  # another order than the optimizer's
            one.update(named[name])
        optimizer.zero_grad()


@pytest.mark.parametrize("name", NAMES)
def test_one_by_one_is_the_whole_step(name: str):
    options = {"momentum": 0.9} if name.endswith("-sgd") else {}
    whole, single = parameters(), parameters()
    push(whole, build_optimizer(name, parameter_groups(whole.items()), 1e-3, options=options), 7)
    optimizer = build_optimizer(name, parameter_groups(single.items()), 1e-3, options=options, release=True)
    push_singly(single, optimizer, 7)
    for key in whole:
        torch.testing.assert_close(single[key], whole[key], rtol=0, atol=2e-7)
    assert all("group" not in state for state in optimizer.state.values())


@pytest.mark.parametrize("name", ["optimi-adamw", "optimi-adan", "bnb-lion8bit", "came", "torch-adamw"])
def test_it_goes_on_after_loading_and_the_learning_rate_reaches_it(name: str):
    straight = parameters()
    optimizer = build_optimizer(name, parameter_groups(straight.items()), 1e-3, release=True)
    push_singly(straight, optimizer, 3)
    resumed = copies(straight)
    other = build_optimizer(name, parameter_groups(resumed.items()), 1e-3, release=True)
    load_optimizer_state(other, deepcopy(optimizer.state_dict()))
    push_singly(straight, optimizer, 2, start=3)
    push_singly(resumed, other, 2, start=3)
    assert same(straight, resumed)
    before = copies(resumed)
    for group in other.param_groups:
        group.update(lr=0.0, weight_decay=0.0)
    push_singly(resumed, other, 1, start=5)
    assert same(before, resumed)
