"""Optimizers by name, Kahan's buffers, and learning-rate schedules."""

from __future__ import annotations

import io
import math

import optimi
import pytest
import torch
from torch import nn

from sana_tune.config.choices import LR_SCHEDULERS, OPTIMIZER_DEFAULTS, OPTIMIZERS
from sana_tune.train.optim import Schedule, build_optimizer, load_optimizer_state, lr_at, seed_kahan


def weights(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in ((40, 30), (30,))]


def push(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, steps: int, start: int = 0) -> None:
    for step in range(start, start + steps):
        generator = torch.Generator().manual_seed(100 + step)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        optimizer.step()
        optimizer.zero_grad()


def test_every_name_of_the_table_is_built_with_its_defaults():
    assert len(OPTIMIZERS) >= 2
    for name in OPTIMIZERS:
        group = build_optimizer(name, weights(), 1e-3).param_groups[0]
        defaults = OPTIMIZER_DEFAULTS[name]
        betas = group.get("betas") or (group["beta1"], group["beta2"])
        assert betas == (defaults["beta1"], defaults["beta2"])
        assert (group["weight_decay"], group["eps"]) == (defaults["weight_decay"], defaults["eps"])


def test_given_values_win_each_on_its_own():
    group = build_optimizer("optimi-adamw", weights(), 1e-3, (None, 0.95), weight_decay=0.0, eps=1e-9).param_groups[0]
    assert (group["beta1"], group["beta2"], group["weight_decay"], group["eps"]) == (0.9, 0.95, 0.0, 1e-9)


def test_unknown_names_are_errors():
    with pytest.raises(KeyError):
        build_optimizer("adamw", weights(), 1e-3)
    with pytest.raises(KeyError):
        lr_at("wave", 0, 10, 0)


def test_frozen_parameters_are_left_out():
    parameters = weights()
    parameters[1].requires_grad_(False)
    assert build_optimizer("optimi-adamw", parameters, 1e-3).param_groups[0]["params"] == parameters[:1]


def test_optimi_adamw_is_optimis():
    ours, theirs = weights(), weights()
    push(ours, build_optimizer("optimi-adamw", ours, 1e-3), 5)
    push(theirs, optimi.AdamW(theirs, 1e-3, betas=(0.9, 0.99), weight_decay=0.0, eps=1e-6), 5)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_torch_adamw_is_torchs():
    ours, theirs = weights(), weights()
    push(ours, build_optimizer("torch-adamw", ours, 1e-3), 5)
    push(theirs, torch.optim.AdamW(theirs, 1e-3), 5)
    assert all(torch.allclose(a, b, rtol=0, atol=1e-6) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", list(OPTIMIZERS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_goes_on_bit_for_bit_through_a_weights_only_file(name: str, dtype: torch.dtype):
    straight = weights(dtype)
    optimizer = build_optimizer(name, straight, 1e-3)
    push(straight, optimizer, 3)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed = [nn.Parameter(parameter.detach().clone()) for parameter in straight]
    other = build_optimizer(name, resumed, 1e-3)
    load_optimizer_state(other, torch.load(file, weights_only=True))
    push(straight, optimizer, 3, start=3)
    push(resumed, other, 3, start=3)
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))


def test_state_of_another_model_is_refused():
    optimizer = build_optimizer("optimi-adamw", weights(), 1e-3)
    with pytest.raises(ValueError):
        load_optimizer_state(build_optimizer("optimi-adamw", weights()[:1], 1e-3), optimizer.state_dict())


def test_state_written_by_triton_kernels_runs_without_them():
    """What optimi holds on CUDA: the flag, and one placeholder byte per fp32 parameter."""
    parameters = weights()
    optimizer = build_optimizer("optimi-adamw", parameters, 1e-3)
    push(parameters, optimizer, 1)
    state = optimizer.state_dict()
    state["param_groups"][0]["triton"] = True
    for held in state["state"].values():
        held["kahan_comp"] = torch.zeros(1, dtype=torch.uint8)
    load_optimizer_state(optimizer, state)
    assert optimizer.param_groups[0]["triton"] is False
    assert all(optimizer.state[parameter]["kahan_comp"] is None for parameter in parameters)
    push(parameters, optimizer, 1)


def test_kahan_moves_bf16_weights_that_rounding_would_hold():
    """At lr 1e-5 a bf16 weight of size 1 is 400 steps away from its neighbour; rounding alone never gets there."""
    parameter = nn.Parameter(torch.ones(1000, dtype=torch.bfloat16))
    optimizer = build_optimizer("optimi-adamw", [parameter], 1e-5)
    for _ in range(600):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    assert (parameter < 1).all()


def test_kahan_starts_with_what_rounding_lost():
    exact = [weight.detach() for weight in weights()]
    parameters = [nn.Parameter(weight.to(torch.bfloat16)) for weight in exact]
    optimizer = build_optimizer("optimi-adamw", parameters, 0.0)
    seed_kahan(optimizer, parameters, exact)
    for full, parameter in zip(exact, parameters, strict=True):
        seen = parameter.float() + optimizer.state[parameter]["kahan_comp"].float()
        assert (seen - full).abs().max() < 1e-2 * (parameter.float() - full).abs().max()
    before = [parameter.float() + optimizer.state[parameter]["kahan_comp"].float() for parameter in parameters]
    push(parameters, optimizer, 1)
    after = [parameter.float() + optimizer.state[parameter]["kahan_comp"].float() for parameter in parameters]
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(before, after, strict=True))


def test_warm_up_rises_from_the_first_step():
    for name in ("constant_with_warmup", "linear", "polynomial", "cosine"):
        assert [lr_at(name, step, 100, 4) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert [lr_at("constant", step, 100, 0) for step in (0, 50, 99)] == [1.0, 1.0, 1.0]


def test_linear_and_cosine_fall_to_nothing_after_the_last_step():
    assert [lr_at("linear", step, 10, 0) for step in (0, 5, 9, 10)] == [1.0, 0.5, pytest.approx(0.1), 0.0]
    assert lr_at("cosine", 5, 10, 0) == pytest.approx(0.5)
    assert lr_at("cosine", 10, 10, 0) == 0.0 and lr_at("cosine", 12, 10, 0) == 0.0
    falling = [lr_at("cosine", step, 50, 5) for step in range(5, 51)]
    assert falling == sorted(falling, reverse=True)


def test_polynomial_and_cosine_fall_to_lr_end_and_linear_to_nothing():
    def ends(name: str, **settings: float) -> tuple[float, float]:
        schedule = Schedule(name, 1e-4, 100, warmup_steps=10, **settings)
        return schedule.lr(10), schedule.lr(100)

    assert ends("polynomial", power=0.8) == pytest.approx((1e-4, 4e-7), rel=1e-12)
    assert ends("polynomial", end_lr=0.0) == pytest.approx((1e-4, 0.0), abs=1e-20)
    assert ends("polynomial", end_lr=1e-5, power=2) == pytest.approx((1e-4, 1e-5), rel=1e-12)
    assert ends("cosine") == pytest.approx((1e-4, 0.0), abs=1e-20)
    assert ends("cosine", end_lr=1e-5) == pytest.approx((1e-4, 1e-5), rel=1e-12)
    assert ends("linear", end_lr=1e-5) == (1e-4, 0.0), "lr_end is not for linear"
    assert ends("constant_with_warmup", end_lr=1e-5) == (1e-4, 1e-4)


def test_polynomial_by_hand():
    schedule = Schedule("polynomial", 1e-4, 110, warmup_steps=10, end_lr=2e-5, power=2.0)
    assert schedule.lr(4) == pytest.approx(0.5e-4), "warm-up rises to the peak and knows no end"
    assert schedule.lr(35) == pytest.approx(2e-5 + 8e-5 * 0.75**2)
    assert schedule.lr(60) == pytest.approx(2e-5 + 8e-5 * 0.25)
    straight = Schedule("polynomial", 1e-4, 100, end_lr=0.0, power=1.0)
    assert [straight.lr(step) for step in range(101)] == pytest.approx(
        [Schedule("linear", 1e-4, 100).lr(step) for step in range(101)]
    )


@pytest.mark.parametrize("power", [0.8, 1.0, 2.0])
def test_polynomial_is_that_of_transformers(power: float):
    """transformers' get_polynomial_decay_schedule_with_warmup, whose warm-up begins at 0."""
    from transformers import get_polynomial_decay_schedule_with_warmup

    optimizer = torch.optim.SGD(weights(), 1e-4)
    theirs = get_polynomial_decay_schedule_with_warmup(optimizer, 5, 25, lr_end=4e-7, power=power)
    ours = Schedule("polynomial", 1e-4, 25, warmup_steps=5, power=power)
    for step in range(27):
        if step >= 5:
            assert ours.lr(step) == pytest.approx(theirs.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        theirs.step()


def test_cosine_with_an_end_is_torchs():
    optimizer = torch.optim.SGD(weights(), 1e-4)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20, eta_min=1e-5)
    ours = Schedule("cosine", 1e-4, 20, end_lr=1e-5)
    for step in range(20):
        assert ours.lr(step) == pytest.approx(theirs.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        theirs.step()


def test_cosine_is_torchs_cosine():
    optimizer = torch.optim.SGD(weights(), 1.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)
    for step in range(20):
        assert lr_at("cosine", step, 20, 0) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()


def test_factors_stay_in_range_whatever_the_lengths():
    assert len(LR_SCHEDULERS) >= 5
    for name in LR_SCHEDULERS:
        for total, warmup in ((0, 0), (1, 0), (1, 5), (10, 10), (10, 20), (10, 3)):
            factors = [lr_at(name, step, total, warmup, end=0.1, power=0.8) for step in range(total + 3)]
            assert all(0.0 <= factor <= 1.0 and math.isfinite(factor) for factor in factors)


def test_schedule_sets_every_group():
    optimizer = torch.optim.SGD([{"params": [each]} for each in weights()], 1.0)
    schedule = Schedule("linear", 2e-4, 10)
    assert schedule.apply(optimizer, 5) == pytest.approx(1e-4)
    assert [group["lr"] for group in optimizer.param_groups] == [schedule.lr(5)] * 2
