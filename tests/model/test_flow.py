"""The recipe's numbers: shift, drawn noise levels, interpolation, target, timestep, loss."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from sana_tune.model import flow
from sana_tune.model.flow import Objective
from sana_tune.model.levels import Levels


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
    other = flow.draw_sigmas(200_000, 1.0, torch.Generator().manual_seed(9), Levels(mean=-1.0, std=0.5))
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


# ---- other distributions of noise levels ----

KINDS = {
    "logit-normal": Levels(),
    "uniform": Levels("uniform"),
    "beta": Levels("beta", alpha=2.0, beta=5.0),
    "mode": Levels("mode"),
    "custom": Levels("custom", table=(0.25, 0.5, 0.75)),
}


def test_the_recipes_draws_never_change():
    """These very numbers: a run that was begun goes on with the noise it would have had."""
    sigma = flow.draw_sigmas(4, 3.0, torch.Generator().manual_seed(9))
    normal = torch.randn(4, generator=torch.Generator().manual_seed(9))
    assert torch.equal(sigma, flow.shift(torch.sigmoid(normal), 3.0))


@pytest.mark.parametrize("stratified", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_draws_have_the_quantiles_of_their_distribution(kind: str, stratified: bool):
    levels = replace(KINDS[kind], stratified=stratified)
    sigma = flow.draw_sigmas(20_000, 3.0, torch.Generator().manual_seed(1), levels)
    assert sigma.dtype == torch.float32 and sigma.shape == (20_000,)
    shares = [0.05, 0.3, 0.5, 0.6, 0.95]
    expected = [levels.at(share, 3.0) for share in shares]
    assert torch.quantile(sigma, torch.tensor(shares)).tolist() == pytest.approx(expected, abs=0.015)
    again = flow.draw_sigmas(20_000, 3.0, torch.Generator().manual_seed(1), levels)
    assert torch.equal(sigma, again)


def test_a_table_is_not_shifted():
    sigma = flow.draw_sigmas(300, 3.0, torch.Generator().manual_seed(1), KINDS["custom"])
    assert set(sigma.tolist()) == {0.25, 0.5, 0.75}


# ---- stratified draws ----


def strata(n: int, micro_batches: int, seed: int = 0) -> list[int]:
    """Which stratum each sample of a step lies in."""
    shares = [
        flow.spread(torch.full((n,), 0.5), torch.Generator().manual_seed(seed + which), (which, micro_batches))
        for which in range(micro_batches)
    ]
    return [int(share * n * micro_batches) for part in shares for share in part.tolist()]


@pytest.mark.parametrize(("n", "micro_batches"), [(1, 1), (4, 1), (1, 6), (8, 3)])
def test_every_stratum_of_a_step_has_one_sample(n: int, micro_batches: int):
    assert sorted(strata(n, micro_batches)) == list(range(n * micro_batches))


def test_which_sample_gets_which_stratum_is_chance():
    found = {tuple(strata(3, 1, seed)) for seed in range(100)}
    assert len(found) == 6, "all orders occur"


def test_stratified_draws_make_the_mean_of_a_batch_steadier():
    """The measured reason for the setting: the variance of the mean of a smooth function over a batch of 8."""

    def variance(stratified: bool) -> float:
        levels = Levels(stratified=stratified)
        means = [
            (1 - flow.draw_sigmas(8, 3.0, torch.Generator().manual_seed(seed), levels)).square().mean()
            for seed in range(300)
        ]
        return torch.stack(means).var().item()

    assert variance(True) < variance(False) / 5


# ---- other losses ----


def test_pseudo_huber_is_its_formula():
    prediction, wanted = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    difference, c = prediction.double() - wanted.double(), 0.3
    bent = (difference.square() + c**2).sqrt() - c
    for kind, expected in (("huber", 2 * c * bent), ("smooth_l1", 2 * bent)):
        objective = Objective(kind, huber_c=c, huber_schedule="constant")
        found = flow.loss(prediction, wanted, objective=objective)
        assert found.per_sample.tolist() == pytest.approx(expected.flatten(1).mean(1).tolist(), rel=1e-5)


def test_pseudo_huber_has_its_limits_and_keeps_small_differences():
    zero, small = torch.zeros(1, 1, 1, 1), torch.full((1, 1, 1, 1), 1e-5)
    wide = Objective("huber", huber_c=10.0, huber_schedule="constant")
    assert flow.loss(small, zero, objective=wide).mean.item() == pytest.approx(1e-10, rel=1e-3)
    narrow = Objective("smooth_l1", huber_c=1e-6, huber_schedule="constant")
    assert flow.loss(small * 1e5, zero, objective=narrow).mean.item() == pytest.approx(2.0, rel=1e-5)
    at_zero = torch.zeros(1, 1, 1, 1, requires_grad=True)
    flow.loss(at_zero, zero, objective=narrow).mean.backward()
    assert at_zero.grad is not None and at_zero.grad.item() == 0


def test_the_width_of_huber_follows_the_noise():
    sigma = torch.tensor([0.0, 0.5, 1.0])
    exponential = flow.huber_c_at(sigma, Objective("huber", 0.1, "exponential"))
    assert exponential.tolist() == pytest.approx([1.0, math.sqrt(0.1), 0.1])
    snr = flow.huber_c_at(sigma, Objective("huber", 0.1, "snr"))
    assert snr.tolist() == pytest.approx([1.0, 0.9 / 4 + 0.1, 0.1])
    ratio = 0.3 / 0.7  # the published formula, 1 / (1 + n)², with the flow's ratio of noise to picture
    found = flow.huber_c_at(torch.tensor([0.3]), Objective("huber", 0.1, "snr")).item()
    assert found == pytest.approx(0.9 / (1 + ratio) ** 2 + 0.1)
    prediction, wanted = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    whole = flow.loss(prediction, wanted, sigma=sigma, objective=Objective("huber", 0.1, "snr")).per_sample
    for sample, c in enumerate(snr.tolist()):
        one = slice(sample, sample + 1)
        alone = flow.loss(prediction[one], wanted[one], objective=Objective("huber", c, "constant")).mean
        assert whole[sample].item() == pytest.approx(alone.item(), rel=1e-5)
    with pytest.raises(ValueError, match="give sigma"):
        flow.loss(prediction, wanted, objective=Objective("huber"))
    with pytest.raises(KeyError):
        flow.huber_c_at(sigma, Objective("huber", 0.1, "linear"))


# ---- weights by noise level ----


def test_weights_are_those_of_diffusers():
    from diffusers.training_utils import compute_loss_weighting_for_sd3

    sigma = torch.tensor([0.01, 0.3, 0.5, 0.99, 1.0])
    for scheme in ("sigma_sqrt", "cosmap", "none"):
        theirs = compute_loss_weighting_for_sd3(scheme, sigma)
        torch.testing.assert_close(flow.weights(sigma, Objective(weighting=scheme)), theirs)
    assert flow.weights(torch.tensor([0.0]), Objective(weighting="sigma_sqrt")).item() == pytest.approx(1e6)
    with pytest.raises(KeyError):
        flow.weights(sigma, Objective(weighting="min_snr"))


def test_min_snr_weighs_the_error_of_the_picture():
    """By its definition: min(SNR, gamma) on the error of x0, worked out from the velocity's."""
    x0, noise, prediction = (torch.randn(5, 2, 3, 3).double() for _ in range(3))
    sigma, gamma = torch.tensor([0.05, 0.2, 0.309, 0.6, 1.0]), 5.0
    level = sigma.double().view(-1, 1, 1, 1)
    found = (1 - level) * x0 + level * noise - level * prediction  # x0 as the prediction has it
    error = (found - x0).square().flatten(1).mean(1)
    snr = ((1 - sigma.double()) / sigma.double()).square()
    for soft, weight in ((False, snr.clamp(max=gamma)), (True, snr * gamma / (snr + gamma))):
        objective = Objective(snr_gamma=gamma, soft=soft)
        per_sample = flow.loss(prediction, noise - x0, sigma=sigma, objective=objective).per_sample
        torch.testing.assert_close(per_sample.double(), weight * error, rtol=1e-5, atol=1e-7)
    ends = flow.weights(torch.tensor([0.0, 1.0]), Objective(snr_gamma=5.0, soft=True))
    assert ends.tolist() == [0.0, 0.0]


def test_weights_and_a_mask_go_together():
    prediction, wanted, mask = torch.randn(2, 4, 4, 4), torch.randn(2, 4, 4, 4), torch.zeros(2, 1, 4, 4)
    mask[:, :, 1] = 1
    sigma, objective = torch.tensor([0.2, 0.8]), Objective("huber", weighting="cosmap")
    plain = flow.loss(prediction[:, :, 1:2], wanted[:, :, 1:2], None, sigma, Objective("huber")).per_sample
    weighted = flow.loss(prediction, wanted, mask, sigma, objective)
    torch.testing.assert_close(weighted.per_sample, plain * flow.weights(sigma, objective))
    torch.testing.assert_close(weighted.mean, weighted.per_sample.mean())


def test_the_plain_objective_is_the_plain_loss_to_the_bit():
    prediction, wanted, sigma = torch.randn(3, 4, 5, 6), torch.randn(3, 4, 5, 6), torch.rand(3)
    assert torch.equal(flow.loss(prediction, wanted).mean, flow.loss(prediction, wanted, None, sigma).mean)


def test_a_perturbation_falls_over_its_steps():
    assert [flow.Perturbation(0.1).at(step) for step in (0, 1000)] == [0.1, 0.1]
    falling = [flow.Perturbation(0.1, 4).at(step) for step in range(6)]
    assert falling == pytest.approx([0.1, 0.075, 0.05, 0.025, 0.0, 0.0])


def test_a_velocity_points_to_its_picture():
    x0, noise = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    sigma = torch.tensor([0.3, 0.9])
    x_t = flow.noised(x0, noise, sigma)
    found = flow.predicted(x_t, flow.target(x0, noise), sigma.reshape(2, 1, 1, 1))
    assert torch.allclose(found, x0, atol=1e-5)


def test_guidance_by_hand_and_rescaled():
    away, velocity = torch.zeros(1, 2, 2), torch.tensor([[[1.0, 3.0], [5.0, 7.0]]])
    assert torch.equal(flow.guided(away, velocity, 2.0), 2 * velocity)
    assert torch.allclose(flow.guided(away, velocity, 2.0, 1.0), velocity), "all of the spread is given back"
    assert torch.allclose(flow.guided(away, velocity, 2.0, 0.5), 1.5 * velocity)
