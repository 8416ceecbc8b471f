"""Rollouts: how many, how long, over which levels; what ReflexFlow's loss is."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from sana_tune.model import flow, rollout
from sana_tune.model.rollout import HIGHEST, Reflex, Rollout, levels_of


def drawn(plan: Rollout, n: int = 4000, step: int = 0) -> torch.Tensor:
    return plan.lengths(n, step, torch.Generator().manual_seed(3))


def test_probability_is_constant_or_a_ramp_from_the_start_step_on():
    constant = Rollout(3, probability=0.25, start_step=10)
    assert [constant.probability_at(step) for step in (0, 9, 10, 99)] == [0, 0, 0.25, 0.25]
    ramp = Rollout(3, probability=0.9, prob_start=0.1, prob_end=0.5, ramp_steps=20, start_step=10)
    assert [ramp.probability_at(step) for step in (9, 10, 20, 30, 99)] == pytest.approx([0, 0.1, 0.3, 0.5, 0.5])
    cosine = replace(ramp, ramp_shape="cosine")
    assert cosine.probability_at(15) == pytest.approx(0.1 + 0.4 * (1 - math.cos(math.pi / 4)) / 2)
    assert Rollout(0, probability=1.0).probability_at(5) == 0


@pytest.mark.parametrize(
    "strategy, shares", [("uniform", (1, 1, 1)), ("biased_early", (1, 2, 3)), ("biased_late", (3, 2, 1))]
)
def test_lengths_have_their_shares(strategy: str, shares: tuple[int, ...]):
    lengths = drawn(Rollout(3, strategy=strategy, probability=0.5))
    counts = torch.bincount(lengths, minlength=4) / len(lengths)
    assert len(counts) == 4 and counts[0] == pytest.approx(0.5, abs=0.03)
    wanted = [0.5 * share / sum(shares) for share in shares]
    assert counts[1:].tolist() == pytest.approx(wanted, abs=0.03)


def test_a_ramp_only_adds_samples():
    ramp = Rollout(4, prob_end=1.0, ramp_steps=10)
    early, late = drawn(ramp, step=3), drawn(ramp, step=7)
    assert 0 < (early > 0).sum() < (late > 0).sum() and torch.equal(early[early > 0], late[early > 0])


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_levels_are_those_of_a_sampler_and_end_at_the_drawn_one(shift: float):
    plain = torch.tensor([0.1, 0.5, 0.93, 0.9999])
    sigma = flow.shift(plain, shift)
    levels, lengths = levels_of(sigma, torch.tensor([3, 0, 3, 2]), 20, shift)
    assert lengths.tolist() == [3, 0, 1, 0], "there is no room above 1"
    assert levels.shape == (4, 4) and (levels.diff(dim=1) <= 0).all() and levels[:3].max() <= HIGHEST
    wanted = flow.shift(torch.tensor([0.25, 0.2, 0.15, 0.1]), shift)
    assert levels[0].tolist() == pytest.approx(wanted.tolist(), abs=1e-6)
    ends = levels[torch.arange(4), lengths].float()
    assert torch.equal(ends, sigma)


def test_the_reflexive_loss_by_hand():
    generator = torch.Generator().manual_seed(0)
    prediction, clean, wanted, state, x0 = (torch.randn(2, 3, 2, 2, generator=generator) for _ in range(5))
    prediction.requires_grad_()
    reflex = Reflex(alpha=2.0, beta1=5.0, beta2=0.5)
    sigma = torch.tensor([0.3, 0.8])
    found = rollout.loss(prediction, wanted, state, x0, clean, None, sigma, flow.MSE, reflex)
    for sample in range(2):
        p, c, w, d = (each[sample].detach() for each in (prediction, clean, wanted, state - x0))
        drift = (p - c).square().sum(0).sqrt()
        weight = (1 + 2 * drift / drift.mean()) / 3
        assert weight.mean() == pytest.approx(1, abs=1e-6)
        own = ((p - w).square() * weight).sum() / (3 * weight.sum())
        anti = (p / p.norm() - d / d.norm()).square().sum()
        assert found[sample].item() == pytest.approx((0.5 * own + 5 * anti).item(), rel=1e-5)
    found.sum().backward()
    assert prediction.grad is not None and prediction.grad.abs().sum() > 0


def test_without_drift_it_is_the_plain_loss_and_the_anti_drift_term_that_the_target_meets():
    generator = torch.Generator().manual_seed(1)
    x0, noise = (torch.randn(2, 3, 2, 2, generator=generator) for _ in range(2))
    sigma = torch.tensor([0.3, 0.8])
    state, wanted = flow.noised(x0, noise, sigma), flow.target(x0, noise)
    other = wanted + 0.1
    plain = flow.loss(other, wanted).per_sample
    found = rollout.loss(other, wanted, state, x0, other, None, sigma, flow.MSE, Reflex(beta1=0.0))
    torch.testing.assert_close(found, plain)
    exact = rollout.loss(wanted, wanted, state, x0, wanted, None, sigma, flow.MSE, Reflex())
    assert exact.abs().max() < 1e-6, "where nothing drifts, state - x0 is sigma times the target"


def test_masked_positions_count_nowhere():
    generator = torch.Generator().manual_seed(2)
    prediction, clean, wanted, state, x0 = (torch.randn(1, 3, 2, 2, generator=generator) for _ in range(5))
    prediction.requires_grad_()
    mask = torch.tensor([[[[1.0, 0.0], [1.0, 1.0]]]])
    rollout.loss(prediction, wanted, state, x0, clean, mask, torch.tensor([0.5]), flow.MSE, Reflex()).sum().backward()
    assert prediction.grad is not None
    assert (prediction.grad[..., 0, 1] == 0).all() and (prediction.grad[..., 0, 0] != 0).all()
