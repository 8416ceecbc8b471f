"""Scheduled sampling in the step: the states are the sampler's own, only the samples asked for, exactly repeatable."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sana_tune.data.records import Role
from sana_tune.model import flow
from sana_tune.model.rollout import Reflex, Rollout
from sana_tune.progress import Progress
from sana_tune.train.roll_in import Mixture, roll_in, velocity_of
from sana_tune.train.step import Parts, micro_loss, train_step
from tests.train.toys import ToyBatches, differences, make_parts, state_of, tiny_transformer

ALWAYS = Rollout(4, steps=10, probability=1.0, sampler="euler")


def losses_of(plan: Rollout, **more: object) -> list[float]:
    parts = make_parts(rollout=plan, **more)
    return [train_step(parts, batches, Progress(step)).loss for step, batches in enumerate(ToyBatches(2).steps(0, 3))]


def test_a_known_bias_is_walked_in_and_the_others_stay():
    x0, noise = (torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    sigma = torch.tensor([0.2, 0.5, 0.3])
    mixture = Mixture(x0, noise, flow.noised(x0, noise, sigma), sigma)
    found = roll_in(ALWAYS, lambda s, v, h: torch.full_like(s, -0.2), mixture, torch.tensor([3, 0, 2]), 1.0)
    assert found.places.tolist() == [0, 2]
    assert torch.equal(found.states[1], mixture.noisy[1])
    for place, steps in ((0, 3), (2, 2)):  # a constant velocity, so that the way is its length times it
        begun = flow.noised(x0[place : place + 1], noise[place : place + 1], sigma[place : place + 1] + steps / 10)
        torch.testing.assert_close(found.states[place : place + 1], begun + 0.2 * steps / 10)


def test_a_perfect_model_leads_where_the_mixture_is():
    x0, noise = (torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    sigma = torch.tensor([0.2, 0.5])
    mixture = Mixture(x0, noise, flow.noised(x0, noise, sigma), sigma)
    for sampler in ("euler", "dpm", "unipc"):
        plan = replace(ALWAYS, sampler=sampler, order=3, reflex=Reflex())
        found = roll_in(plan, lambda s, v, h: flow.target(x0, noise)[h], mixture, torch.tensor([3, 2]), 3.0)
        torch.testing.assert_close(found.states, mixture.noisy, rtol=1e-4, atol=1e-4)
        prediction = flow.target(x0, noise)
        plain = torch.zeros(2)
        assert found.loss(plain, prediction, prediction, None, sigma, flow.MSE).abs().max() < 1e-5


def test_the_models_own_velocity_is_followed():
    model = tiny_transformer()
    text, mask = torch.randn(3, 5, 16), torch.ones(3, 5, dtype=torch.int64)
    mask[1, 3:] = 0
    inputs = {"hidden_states": torch.zeros(3, 4, 4, 4), "encoder_hidden_states": text, "encoder_attention_mask": mask}
    states, levels, here = torch.randn(2, 4, 4, 4), torch.tensor([0.3, 0.6]), torch.tensor([2, 1])
    parts = make_parts()
    few = velocity_of(model, parts.accelerator.autocast, inputs, None)(states, levels, here)
    filled = velocity_of(model, parts.accelerator.autocast, inputs, 3)(states, levels, here)
    by_hand = model(states, text[here], 1000 * levels, encoder_attention_mask=mask[here]).sample.detach()
    torch.testing.assert_close(few, by_hand)
    torch.testing.assert_close(filled, by_hand)
    assert not few.requires_grad and few.shape == (2, 4, 4, 4)


def test_it_changes_training_and_only_when_it_is_due():
    plain = losses_of(Rollout())
    assert losses_of(replace(ALWAYS, probability=0.0)) == plain
    late = losses_of(replace(ALWAYS, start_step=1))
    assert late[0] == plain[0] and late[1] != plain[1]
    every = losses_of(ALWAYS)
    assert every[0] != plain[0]
    assert losses_of(ALWAYS) == every, "position decides"
    assert losses_of(replace(ALWAYS, reflex=Reflex())) != every
    assert losses_of(replace(ALWAYS, sampler="unipc")) != every
    assert losses_of(replace(ALWAYS, sampler="dpm", order=2)) != losses_of(replace(ALWAYS, sampler="dpm", order=3))


@pytest.mark.parametrize("reflex", [None, Reflex()])
def test_a_resumed_run_rolls_in_the_same(reflex: Reflex | None):
    plan = replace(ALWAYS, probability=0.5, reflex=reflex)

    def steps(parts: Parts, first: int, last: int) -> None:
        for step, batches in enumerate(ToyBatches(2).steps(first, last), start=first):
            train_step(parts, batches, Progress(step))

    straight, again = make_parts(rollout=plan), make_parts(rollout=plan)
    steps(straight, 0, 4)
    steps(again, 0, 2)
    torch.manual_seed(99)
    steps(again, 2, 4)
    assert differences(state_of(straight), state_of(again)) == []


def test_regularisation_data_is_not_rolled_in():
    ((_, batch),) = next(ToyBatches().steps(1, 2))
    kept = replace(batch, role=Role.REGULARISE)
    for shown, same in ((kept, True), (batch, False)):
        plain, rolled = (micro_loss(make_parts(rollout=plan), shown, 1, 0).mean for plan in (Rollout(), ALWAYS))
        assert torch.equal(plain, rolled) == same
