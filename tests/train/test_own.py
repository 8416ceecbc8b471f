"""AdamW for bf16 and CAME, against other people's numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sana_tune.train.own import AdamWBf16, Came
from tests.train.params import parameters, push


def grid(shape: tuple[int, ...], phase: int) -> torch.Tensor:
    """Numbers that everyone can make."""
    count = torch.Size(shape).numel()
    return torch.sin(torch.arange(count, dtype=torch.float32) * (0.7 + 0.1 * phase) + phase).reshape(shape)


# What the authors' own CAME (came-pytorch 0.1.3 of PyPI) makes of `grid` in 5 steps of lr 0.01 with weight decay 0.1.
OFFICIAL = {
    (3, 4): [-0.4831418, -0.0868037, 0.1114363, 0.5055496, 0.3194866, 0.0578334, 0.0458813, -0.4694127, -0.3464144,
             -0.0006001, -0.0711294, 0.510963],
    (5,): [-0.0068562, 0.0623315, 0.1005275, 0.0930528, 0.0370905],
}  # fmt: skip


@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 1, 1), (5,)])
def test_came_gives_the_official_numbers(shape: tuple[int, ...]):
    """A 1x1 convolution is the matrix that it is, as in NVIDIA's trainer."""
    parameter = nn.Parameter(0.1 * grid(shape, 0))
    optimizer = Came([parameter], lr=1e-2, weight_decay=0.1)
    for step in range(1, 6):
        parameter.grad = grid(shape, step) * 10.0 ** (step - 3)
        optimizer.step()
    official = torch.tensor(OFFICIAL[shape[:2]])
    torch.testing.assert_close(parameter.detach().flatten(), official, rtol=1e-5, atol=2e-6)


def test_came_factors_matrices_alone():
    named = parameters()
    optimizer = Came(list(named.values()), lr=1e-3)
    push(named, optimizer, 1)
    held = {name: optimizer.state[parameter] for name, parameter in named.items()}
    assert held["conv.weight"]["exp_avg_sq_row"].shape == (72,) and held["conv.weight"]["exp_avg_res_col"].shape == (
        64,
    )
    assert held["depth.weight"]["exp_avg_sq"].shape == (40, 1, 3, 3) and "exp_avg_res_row" not in held["depth.weight"]
    assert held["linear.bias"]["exp_avg_sq"].shape == (30,)


def test_came_clips_the_update_by_its_size():
    moves = []
    for threshold in (1.0, 0.1):
        parameter = nn.Parameter(torch.zeros(20))
        optimizer = Came([parameter], lr=1.0, clip_threshold=threshold)
        parameter.grad = grid((20,), 1)
        optimizer.step()
        moves.append(parameter.detach().clone())
    torch.testing.assert_close(moves[1], 0.1 * moves[0])
    assert (moves[0].norm() / 20**0.5).item() == pytest.approx(0.1), "the threshold, times 1 - beta1"


def test_adamw_with_fp32_states_is_torchs():
    ours, theirs = parameters(), parameters()
    push(ours, AdamWBf16(list(ours.values()), 1e-3, eps=1e-8), 6)
    push(theirs, torch.optim.AdamW(list(theirs.values()), 1e-3, eps=1e-8), 6)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-6)


def test_a_second_moment_in_bf16_is_right_on_average():
    """With beta2 = 0.999 a step adds a thousandth, which rounding to the nearest would lose."""
    parameter = nn.Parameter(torch.zeros(4000))
    optimizer = AdamWBf16([parameter], 1e-4, state_dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        parameter.grad = torch.ones(4000)
        with torch.no_grad():
            optimizer.update_one(optimizer.param_groups[0], parameter, generator)
    moment = optimizer.state[parameter]["exp_avg_sq"]
    assert moment.dtype == torch.bfloat16
    assert moment.float().mean().item() == pytest.approx(1 - 0.999**300, rel=0.01)
    stuck = torch.full((), 0.6, dtype=torch.bfloat16)
    assert (stuck.float() * 0.999 + 0.001).to(torch.bfloat16) == stuck, "to the nearest it would stay there"
