"""The recipe's numbers: shift, drawn noise levels, interpolation, target, timestep, loss."""

from __future__ import annotations

import math

import pytest
import torch

from sana_tune.model import flow


@pytest.mark.parametrize(("sigma", "shifted"), [(0.25, 0.5), (0.5, 0.75), (0.75, 0.9)])
def test_shift_by_three_as_the_recipe_says(sigma, shifted):
    assert flow.shift(torch.tensor(sigma), 3.0).item() == pytest.approx(shifted, abs=1e-7)


def test_shift_keeps_the_ends_and_one_changes_nothing():
    sigma = torch.linspace(0, 1, 101)
    assert torch.equal(flow.shift(sigma, 1.0), sigma)
    for s in (0.5, 3.0, 6.0):
        moved = flow.shift(sigma, s)
        assert moved[0] == 0 and moved[-1] == 1 and (moved.diff() > 0).all()


def test_shifts_compose_and_invert():
    sigma = torch.rand(100)
    assert torch.allclose(flow.shift(flow.shift(sigma, 2.0), 3.0), flow.shift(sigma, 6.0), atol=1e-6)
    assert torch.allclose(flow.shift(flow.shift(sigma, 3.0), 1 / 3), sigma, atol=1e-6)


def test_drawn_sigmas_have_the_recipes_quantiles():
    sigma = flow.draw_sigmas(200_000, 3.0, torch.Generator().manual_seed(1))
    assert sigma.dtype == torch.float32 and sigma.shape == (200_000,) and 0 < sigma.min() and sigma.max() < 1
    found = torch.quantile(sigma, torch.tensor([0.05, 0.5, 0.95]))
    assert found.tolist() == pytest.approx([0.367, 0.75, 0.940], abs=0.003)
    assert sigma.mean().item() == pytest.approx(0.713, abs=0.002)
    # shifting adds ln s to the mean of the normal
    normal = torch.logit(sigma)
    assert normal.mean().item() == pytest.approx(math.log(3), abs=0.01)
    assert normal.std().item() == pytest.approx(1, abs=0.01)


def test_drawing_depends_on_the_generator_alone():
    torch.manual_seed(5)
    first = flow.draw_sigmas(4, 3.0, torch.Generator().manual_seed(9))
    torch.manual_seed(6)
    assert torch.equal(first, flow.draw_sigmas(4, 3.0, torch.Generator().manual_seed(9)))
    other = flow.draw_sigmas(200_000, 1.0, torch.Generator().manual_seed(9), mean=-1.0, std=0.5)
    assert torch.logit(other).mean().item() == pytest.approx(-1, abs=0.01)


def test_interpolation_and_target():
    x0, noise = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    sigma = torch.tensor([0.0, 0.25, 1.0])
    mixed = flow.noised(x0, noise, sigma)
    assert torch.equal(mixed[0], x0[0]) and torch.equal(mixed[2], noise[2])
    assert torch.allclose(mixed[1], 0.75 * x0[1] + 0.25 * noise[1])
    assert torch.equal(flow.target(x0, noise), noise - x0)
    # going from x_t along the target by -sigma leads back to the picture
    assert torch.allclose(mixed - sigma.view(-1, 1, 1, 1) * flow.target(x0, noise), x0, atol=1e-6)


def test_everything_is_computed_in_fp32():
    x0, noise = torch.randn(2, 4, 2, 2).bfloat16(), torch.randn(2, 4, 2, 2).bfloat16()
    sigma = torch.tensor([0.3, 0.6])
    assert flow.noised(x0, noise, sigma).dtype == torch.float32
    assert torch.equal(flow.noised(x0, noise, sigma), flow.noised(x0.float(), noise.float(), sigma))
    assert flow.target(x0, noise).dtype == torch.float32
    assert flow.loss(x0, noise.float()).mean.dtype == torch.float32


def test_timestep_stays_on_the_fine_scale():
    assert flow.timestep(torch.tensor([0.5, 0.899])).tolist() == pytest.approx([500.0, 899.0], abs=1e-3)
    assert flow.timestep(torch.tensor([0.899]).bfloat16()).dtype == torch.float32
    assert torch.tensor(899.0).bfloat16().item() == 900, "why it is not kept in bf16"


def test_loss_is_the_plain_mean_squared_error():
    prediction, wanted = torch.randn(3, 4, 5, 6), torch.randn(3, 4, 5, 6)
    mean, per_sample = flow.loss(prediction, wanted)
    assert mean.item() == pytest.approx(torch.nn.functional.mse_loss(prediction, wanted).item(), rel=1e-6)
    assert per_sample.shape == (3,)
    assert per_sample[1].item() == pytest.approx((prediction[1] - wanted[1]).square().mean().item(), rel=1e-6)


def test_a_mask_chooses_positions():
    prediction, wanted = torch.randn(3, 4, 4, 4), torch.randn(3, 4, 4, 4)
    full = torch.ones(3, 1, 4, 4)
    assert torch.allclose(flow.loss(prediction, wanted, full).per_sample, flow.loss(prediction, wanted).per_sample)
    mask = torch.zeros(3, 1, 4, 4)
    mask[0, :, :2], mask[1, :, 1, 1] = 1, 0.5
    per_sample = flow.loss(prediction, wanted, mask).per_sample
    assert per_sample[0].item() == pytest.approx((prediction - wanted)[0, :, :2].square().mean().item(), rel=1e-6)
    assert per_sample[1].item() == pytest.approx((prediction - wanted)[1, :, 1, 1].square().mean().item(), rel=1e-6)
    assert per_sample[2] == 0, "nothing marked: no loss and no division by zero"
