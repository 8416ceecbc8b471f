"""Each sampler is really that one: the states it shows the model are those that diffusers' scheduler shows it."""

from __future__ import annotations

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from torch import Tensor

from sana_tune.model.solvers import walk

LEVELS = torch.tensor([0.98, 0.9, 0.77, 0.6, 0.38, 0.2], dtype=torch.float64)


def velocity(x: Tensor, level: Tensor, places: Tensor | None = None) -> Tensor:
    """A curved field: of another sample it is another one."""
    at = level.view(-1, 1, 1, 1).to(x.dtype)
    return torch.sin(2 * x + at) * (1.5 - at) + 0.3 * x.roll(1, -1) * at


def by_diffusers(name: str, order: int, x: Tensor, levels: Tensor) -> list[Tensor]:
    """The states at which the model is asked, and the last one."""
    flows = {
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "lower_order_final": False,
        "final_sigmas_type": "sigma_min",
    }
    scheduler = {
        "euler": lambda: FlowMatchEulerDiscreteScheduler(),
        "dpm": lambda: DPMSolverMultistepScheduler(solver_order=order, **flows),
        "unipc": lambda: UniPCMultistepScheduler(solver_order=order, **flows),
    }[name]()
    scheduler.set_timesteps(len(levels) - 1)
    scheduler.sigmas = levels.float()
    scheduler.timesteps = 1000 * levels[:-1].float()
    states = [x]
    for level, timestep in zip(levels[:-1], scheduler.timesteps, strict=True):
        x = scheduler.step(velocity(x, level[None]), timestep, x).prev_sample
        states.append(x)
    return states


@pytest.mark.parametrize(
    "name, order",
    [("euler", 1), ("dpm", 1), ("dpm", 2), ("dpm", 3), ("unipc", 1), ("unipc", 2), ("unipc", 3)],
)
def test_the_states_are_those_of_diffusers_scheduler(name: str, order: int):
    x = torch.randn(1, 2, 3, 4, generator=torch.Generator().manual_seed(0))
    states = by_diffusers(name, order, x, LEVELS)
    for steps in range(len(LEVELS)):
        shown: list[Tensor] = []

        def asked(state: Tensor, level: Tensor, places: Tensor, seen: list[Tensor] = shown) -> Tensor:
            seen.append(state.clone())
            return velocity(state, level)

        found = walk(x, LEVELS[None], torch.tensor([steps]), asked, name, order)
        torch.testing.assert_close(found, states[steps], rtol=1e-4, atol=1e-5)
        for one, other in zip(shown, states, strict=False):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    apart = (states[-1] - by_diffusers("euler", 1, x, LEVELS)[-1]).abs().max()
    assert (apart > 1e-3) == (order > 1 or name == "unipc"), "DPM-Solver++ of order 1 is Euler's method"


@pytest.mark.parametrize("name, order", [("euler", 1), ("dpm", 3), ("unipc", 2)])
def test_samples_of_a_batch_walk_their_own_ways_in_shared_calls(name: str, order: int):
    x = torch.randn(4, 2, 3, 4, generator=torch.Generator().manual_seed(1))
    levels = torch.stack([LEVELS, LEVELS * 0.9, LEVELS * 0.8, LEVELS * 0.7])
    steps = torch.tensor([2, 0, 5, 3])
    calls: list[int] = []

    def asked(state: Tensor, level: Tensor, places: Tensor) -> Tensor:
        calls.append(len(state))
        assert level.dtype == torch.float32 and len(places) == len(state)
        return velocity(state, level)

    together = walk(x, levels, steps, asked, name, order)
    assert calls == [3, 3, 2, 1, 1]
    for place in range(4):
        one = slice(place, place + 1)
        alone = walk(x[one], levels[one], steps[one], lambda s, v, p: velocity(s, v), name, order)
        torch.testing.assert_close(together[one], alone, rtol=1e-5, atol=1e-6)
    assert torch.equal(together[1], x[1])


def test_nothing_is_kept_for_a_gradient():
    x = torch.randn(1, 2, 3, 4, requires_grad=True)
    assert not walk(x, LEVELS[None], torch.tensor([2]), lambda s, v, p: velocity(s, v), "dpm", 2).requires_grad
