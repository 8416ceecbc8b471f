"""Learning-rate schedules by hand and against the libraries that others use; their picture; scaling."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from sana_tune.config.choices import LR_SCHEDULERS
from sana_tune.memory import changed, default_config
from sana_tune.schedule import BARS, TIMESCALE, Schedule, lr_at, lr_factor, schedule_of


def weights() -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(3))]


def test_warm_up_rises_from_the_first_step():
    for name in ("constant_with_warmup", "linear", "polynomial", "cosine", "cosine_with_restarts", "inverse_sqrt"):
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


def test_unknown_names_are_errors():
    with pytest.raises(KeyError):
        lr_at("wave", 0, 10, 0)


@pytest.mark.parametrize(("warmup", "total", "cycles"), [(5, 25, 1), (5, 45, 2), (0, 30, 3)])
def test_restarts_are_those_of_transformers(warmup: int, total: int, cycles: int):
    """transformers' get_cosine_with_hard_restarts_schedule_with_warmup, whose warm-up begins at 0."""
    from transformers import get_cosine_with_hard_restarts_schedule_with_warmup

    optimizer = torch.optim.SGD(weights(), 1e-4)
    theirs = get_cosine_with_hard_restarts_schedule_with_warmup(optimizer, warmup, total, num_cycles=cycles)
    ours = Schedule("cosine_with_restarts", 1e-4, total, warmup_steps=warmup, cycles=cycles)
    for step in range(total + 2):
        if step >= warmup:
            assert ours.lr(step) == pytest.approx(theirs.get_last_lr()[0], rel=1e-9, abs=1e-15), step
        optimizer.step()
        theirs.step()


def test_restarts_begin_at_the_peak_and_end_at_lr_end():
    schedule = Schedule("cosine_with_restarts", 1e-4, 120, warmup_steps=20, end_lr=1e-5, cycles=4)
    assert [schedule.lr(step) for step in (20, 45, 70, 95)] == pytest.approx([1e-4] * 4)
    assert schedule.lr(44) == pytest.approx(1e-5, rel=0.05) and schedule.lr(120) == pytest.approx(1e-5)
    one = replace(schedule, cycles=1)
    assert [one.lr(step) for step in range(121)] == [replace(one, name="cosine").lr(step) for step in range(121)]


@pytest.mark.parametrize("warmup", [0, 7])
def test_inverse_sqrt_is_that_of_transformers(warmup: int):
    from transformers import get_inverse_sqrt_schedule

    optimizer = torch.optim.SGD(weights(), 1e-4)
    theirs = get_inverse_sqrt_schedule(optimizer, warmup)
    ours = Schedule("inverse_sqrt", 1e-4, 50, warmup_steps=warmup)
    for step in range(52):
        if step >= warmup:
            assert ours.lr(step) == pytest.approx(theirs.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        theirs.step()
    assert ours.lr(4 * (warmup or TIMESCALE) - (0 if warmup else TIMESCALE)) == pytest.approx(0.5e-4)


def test_the_picture_shows_the_course():
    assert Schedule("constant", 1e-5, 100).picture() == "█" * 40
    assert Schedule("constant", 1e-5, 3).picture() == "███"
    assert Schedule("constant", 1e-5, 0).picture() == "█"
    assert Schedule("linear", 1e-5, 1000).picture(8) == "█▇▆▅▄▃▂▁"
    rising = Schedule("constant_with_warmup", 1e-5, 80, warmup_steps=40).picture(8)
    assert rising[0] == "▁" and rising[-4:] == "████" and set(rising) <= set(BARS)


def test_the_words_name_peak_warm_up_and_end():
    assert Schedule("constant", 1e-5, 100).words == "constant, peak 1e-05"
    words = Schedule("cosine", 2e-5, 100, warmup_steps=7, end_lr=1e-6).words
    assert words == "cosine, peak 2e-05, 7 steps of warm-up, 1.01e-06 at the last step"


def test_the_rate_is_scaled_by_the_pictures_of_a_step():
    def schedule(**changes) -> Schedule:
        settings = {"lr_scheduler": "polynomial", "learning_rate": 1e-5, "lr_end": 1e-6, "lr_warmup_steps": 3}
        return schedule_of(changed(default_config(), {**settings, **changes}), 50, 16.0)

    assert (schedule().peak_lr, schedule().end_lr) == (1e-5, 1e-6)
    assert schedule(lr_scale=True).peak_lr == pytest.approx(16e-5)
    assert schedule(lr_scale_sqrt=True).peak_lr == pytest.approx(4e-5)
    assert schedule(lr_scale_sqrt=True).lr(50) == pytest.approx(4e-6), "lr_end is scaled too"
    assert schedule(lr_scheduler="cosine_with_restarts", lr_num_cycles=3).cycles == 3
    assert lr_factor(default_config(), 16.0) == 1.0
