"""Stochastic rounding: right on average, a function of position alone, and around any optimizer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sana_tune.train.optim import build_optimizer, parameter_groups
from sana_tune.train.rounding import Rounded, place, round_stochastically
from tests.train.params import copies, give_gradients, parameters, push, same


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_it_rounds_to_a_neighbour_and_right_on_average():
    full = torch.tensor([1.0, -0.3, 1e-6, 123.456, -7.7e-3]).repeat_interleave(100_000).reshape(5, -1)
    rounded = round_stochastically(full, generator())
    assert rounded.dtype == torch.bfloat16
    for row, exact in zip(rounded.double(), full[:, 0].double(), strict=True):
        values = row.unique()
        assert len(values) <= 2 and values.min() <= exact <= values.max()
        assert row.mean().item() == pytest.approx(exact.item(), rel=1e-4)


def test_what_bf16_can_hold_stays_as_it_is():
    exact = torch.randn(1000, generator=generator()).to(torch.bfloat16)
    assert torch.equal(round_stochastically(exact.float(), generator()), exact)
    odd = torch.tensor([0.0, -0.0, float("inf"), -float("inf")])
    assert torch.equal(round_stochastically(odd, generator()).float(), odd)
    nans = torch.tensor([0x7F800001, 0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    assert round_stochastically(nans, generator()).isnan().all(), "no bits of a NaN are added to"


@pytest.mark.parametrize("name", ["torch-adamw", "bnb-lion8bit", "came", "adamw_bf16"])
def test_it_is_the_fp32_update_but_for_the_rounding(name: str):
    low = parameters(torch.bfloat16)
    full = {key: nn.Parameter(weight.detach().float()) for key, weight in low.items()}
    rounded = build_optimizer(name, parameter_groups(low.items()), 1e-2)
    exact = build_optimizer(name, parameter_groups(full.items()), 1e-2)
    give_gradients(low, 0)
    for key in full:
        assert low[key].grad is not None
        full[key].grad = low[key].grad.float()  # type: ignore[union-attr]
    rounded.step()
    exact.step()
    for key in full:
        distance = (low[key].float() - full[key]).abs()
        assert (distance <= full[key].abs() * 2**-7 + 1e-30).all(), "a neighbour"
        assert low[key].dtype == torch.bfloat16 and low[key].grad is None


def test_the_storage_of_the_weights_stays():
    named = parameters(torch.bfloat16)
    places = [parameter.data_ptr() for parameter in named.values()]
    push(named, build_optimizer("bnb-adamw8bit", parameter_groups(named.items()), 1e-2), 2)
    assert places == [parameter.data_ptr() for parameter in named.values()]


def test_randomness_comes_from_seed_step_and_place():
    def moved(seed: int, step: int) -> dict[str, nn.Parameter]:
        named = parameters(torch.bfloat16)
        optimizer = build_optimizer("torch-sgd", parameter_groups(named.items()), 1e-4, seed=seed)
        give_gradients(named, 0)
        torch.manual_seed(step + 100 * seed)  # of no influence
        place(optimizer, step)
        optimizer.step()
        return named

    assert same(moved(1, 5), moved(1, 5))
    assert not same(moved(1, 5), moved(2, 5)) and not same(moved(1, 5), moved(1, 6))
    twins = {"a.weight": nn.Parameter(torch.ones(900, 2, dtype=torch.bfloat16))}
    twins["b.weight"] = copies(twins)["a.weight"]
    optimizer = build_optimizer("torch-sgd", parameter_groups(twins.items()), 1e-3)
    for parameter in twins.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert not torch.equal(twins["a.weight"], twins["b.weight"])


def test_a_parameter_without_gradient_stays():
    named = parameters(torch.bfloat16)
    optimizer = build_optimizer("torch-adamw", parameter_groups(named.items()), 1e-2)
    give_gradients(named, 0)
    named["linear.weight"].grad = None
    before = copies(named)
    optimizer.step()
    assert torch.equal(before["linear.weight"], named["linear.weight"])
    assert not torch.equal(before["conv.weight"], named["conv.weight"])


def test_an_update_that_fails_leaves_the_parameter_bf16():
    named = parameters(torch.bfloat16)
    optimizer = build_optimizer("torch-adamw", parameter_groups(named.items()), 1e-2)
    assert isinstance(optimizer, Rounded)
    give_gradients(named, 0)
    optimizer.inner.param_groups[0]["betas"] = None
    before = copies(named)
    with pytest.raises(TypeError):
        optimizer.step()
    assert same(before, named) and {each.dtype for each in named.values()} == {torch.bfloat16}


def test_placing_another_optimizer_is_no_mistake():
    place(torch.optim.SGD(list(parameters().values()), 1e-3), 4)
