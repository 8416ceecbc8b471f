"""The step: equal to an independent loop, its randomness from position alone, bad numbers never applied."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import optimi
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sana_tune.data.records import Role
from sana_tune.model.flow import Objective, Perturbation
from sana_tune.model.levels import Levels
from sana_tune.model.sana import freeze
from sana_tune.progress import Progress
from sana_tune.train.step import Parts, clip, drawn, micro_loss, perturbed, to_device, train_step
from tests.train.toys import ToyBatches, differences, make_parts, state_of, tiny_transformer


def run(parts: Parts, batches: ToyBatches, first: int, last: int) -> list[float]:
    progress, losses = Progress(first), []
    for micro_batches in batches.steps(first, last):
        result = train_step(parts, micro_batches, progress)
        losses.append(result.loss)
        progress = progress.advance(result.images, 0.0)
    return losses


def independent(steps: int, accumulation: int, decay: float, lr: float, warmup: int) -> tuple[dict, dict, list[float]]:
    """The recipe written out with diffusers and optimi alone (shared/reference/sana.md §1)."""
    model = tiny_transformer().train()
    optimizer = optimi.AdamW(model.parameters(), lr, betas=(0.9, 0.99), weight_decay=0.0, eps=1e-6)
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = []
    for step, micro_batches in enumerate(ToyBatches(accumulation).steps(0, steps)):
        total = 0.0
        for micro, (_, batch) in enumerate(micro_batches):
            x0, size = batch.latents, batch.latents.shape
            sigma, noise = drawn(7, step, micro, size, 3.0 if size[2] * size[3] == 16 else 2.0)
            level = sigma[:, None, None, None]
            prediction = model(
                (1 - level) * x0 + level * noise, batch.text, 1000 * sigma, encoder_attention_mask=batch.text_mask
            ).sample
            loss = ((prediction - (noise - x0)) ** 2).mean() / accumulation
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.param_groups[0]["lr"] = lr * min(1.0, (step + 1) / warmup)
        optimizer.step()
        optimizer.zero_grad()
        share = 1 - min(decay, (2 + step) / (11 + step))
        for name, p in model.named_parameters():
            average[name] += share * (p.detach() - average[name])
        losses.append(total)
    return model.state_dict(), average, losses


@pytest.mark.parametrize("accumulation", [1, 2])
def test_twenty_steps_equal_an_independent_loop(accumulation: int):
    parts = make_parts(scheduler="constant_with_warmup")
    losses = run(parts, ToyBatches(accumulation), 0, 20)
    weights, average, expected = independent(20, accumulation, 0.9, 1e-3, 2)
    assert losses == pytest.approx(expected, abs=1e-6)
    start = tiny_transformer().state_dict()
    assert max((weights[name] - start[name]).abs().max() for name in weights) > 1e-3
    for found, wanted in ((parts.bare.state_dict(), weights), (parts.ema.state_dict(), average)):
        apart = torch.cat([(found[name] - wanted[name]).abs().flatten() for name in wanted])
        # Adam divides what rounding leaves of a tiny gradient by itself: single weights differ between processors.
        assert (apart > 1e-6).float().mean() <= 1e-4 and apart.max() <= 1e-5


def test_two_equal_runs_are_equal_whatever_the_global_generator():
    states = []
    for seed in (1, 2):
        transformer = tiny_transformer()
        torch.manual_seed(seed)
        parts = make_parts(transformer=transformer)
        run(parts, ToyBatches(2), 0, 4)
        states.append(state_of(parts))
    assert differences(*states) == []


def test_the_seed_changes_the_run():
    one, other = make_parts(seed=1), make_parts(seed=2)
    assert run(one, ToyBatches(), 0, 1) != run(other, ToyBatches(), 0, 1)


def test_noise_depends_on_position_alone():
    sigma, noise = drawn(3, 5, 1, (4, 2, 3, 3), 3.0)
    again = drawn(3, 5, 1, (4, 2, 3, 3), 3.0)
    assert torch.equal(sigma, again[0]) and torch.equal(noise, again[1])
    assert sigma.shape == (4,) and noise.shape == (4, 2, 3, 3) and noise.dtype == sigma.dtype == torch.float32
    others = [drawn(*place, (4, 2, 3, 3), 3.0)[1] for place in ((4, 5, 1), (3, 6, 1), (3, 5, 2), (3, 1, 5))]
    assert all(not torch.equal(noise, other) for other in others)


def test_drawn_levels_have_the_recipes_quantiles():
    sigmas = torch.cat([drawn(0, step, 0, (50, 1, 1, 1), 3.0)[0] for step in range(400)])
    found = torch.quantile(sigmas, torch.tensor([0.05, 0.5, 0.95]))
    torch.testing.assert_close(found, torch.tensor([0.367, 0.75, 0.940]), rtol=0, atol=0.01)
    assert abs(sigmas.mean() - 0.713) < 0.01


def test_drawn_noise_is_standard_normal_across_steps():
    noise = torch.stack([drawn(0, step, 0, (1, 4, 4, 4), 3.0)[1] for step in range(300)])
    assert abs(noise.mean()) < 0.03 and abs(noise.std() - 1) < 0.03
    lag = (noise[1:] * noise[:-1]).mean()
    assert abs(lag) < 0.03, "neighbouring steps are independent"


def test_what_a_step_reports():
    parts = make_parts(lr=1e-3, scheduler="linear", total_steps=10)
    result = train_step(parts, next(ToyBatches(2).steps(0, 1)), Progress())
    assert result.images == 3 + 2 and result.learning_rate == pytest.approx(0.5e-3) and not result.skipped
    assert 0.1 < result.loss < 10 and result.grad_norm > 0.1, "the norm is told as it was before clipping"
    assert all(parameter.grad is None for parameter in parts.trained)


@pytest.mark.parametrize("where", ["latents", "gradient"])
def test_a_step_that_is_not_finite_moves_nothing(where: str):
    parts = make_parts()
    run(parts, ToyBatches(), 0, 2)
    before = state_of(parts)
    if where == "gradient":
        handle = parts.bare.proj_out.weight.register_hook(lambda gradient: gradient * float("inf"))
    result = train_step(parts, next(ToyBatches(bad_steps=(2,) if where == "latents" else ()).steps(2, 3)), Progress(2))
    assert result.skipped and math.isfinite(result.loss) is (where == "gradient")
    assert differences(before, state_of(parts)) == []
    assert all(parameter.grad is None for parameter in parts.trained)
    if where == "gradient":
        handle.remove()
    assert not train_step(parts, next(ToyBatches().steps(3, 4)), Progress(3)).skipped


def test_clipping_by_norm_by_value_and_not_at_all():
    def parameters() -> list[torch.nn.Parameter]:
        made = [
            torch.nn.Parameter(torch.zeros(2)),
            torch.nn.Parameter(torch.zeros(1)),
            torch.nn.Parameter(torch.zeros(1)),
        ]
        made[0].grad, made[1].grad = torch.tensor([3.0, -0.5]), torch.tensor([4.0])
        return made

    norm = math.sqrt(9 + 0.25 + 16)
    for limit, method, expected in (
        (1.0, "norm", [3 / norm, -0.5 / norm, 4 / norm]),
        (100.0, "norm", [3.0, -0.5, 4.0]),
        (0.0, "norm", [3.0, -0.5, 4.0]),
        (1.0, "value", [1.0, -0.5, 1.0]),
        (0.0, "value", [3.0, -0.5, 4.0]),
    ):
        some = parameters()
        assert clip(some, limit, method).item() == pytest.approx(norm)
        assert torch.cat([some[0].grad, some[1].grad]).tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("dtype", "mixed_precision"), [(torch.float32, "bf16"), (torch.bfloat16, "no"), (torch.bfloat16, "bf16")]
)
def test_bf16_trains(dtype: torch.dtype, mixed_precision: str):
    exact = run(make_parts(), ToyBatches(), 0, 3)
    parts = make_parts(dtype=dtype, mixed_precision=mixed_precision)
    losses = run(parts, ToyBatches(), 0, 3)
    assert losses == pytest.approx(exact, rel=0.03) and losses != exact
    assert {parameter.dtype for parameter in parts.trained} == {dtype}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_noised_picture_is_made_in_fp32_and_cast_last(dtype: torch.dtype):
    """Mixed in bf16 it would be another picture; the timestep is never rounded."""
    parts, seen = make_parts(dtype=dtype), []
    parts.bare.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    _, batch = ToyBatches().micro_batch(0, 1)
    micro_loss(parts, batch, 0, 0)
    sigma, noise = drawn(7, 0, 0, batch.latents.shape, 3.0)
    level = sigma[:, None, None, None]
    mixed = (1 - level) * batch.latents + level * noise
    (inputs,) = seen
    assert torch.equal(inputs["hidden_states"], mixed.to(dtype))
    assert torch.equal(inputs["timestep"], 1000 * sigma) and inputs["timestep"].dtype == torch.float32
    low = (1 - level).to(dtype) * batch.latents.to(dtype) + level.to(dtype) * noise.to(dtype)
    assert torch.equal(inputs["hidden_states"], low) is (dtype == torch.float32), "what rounding would make of it"


def test_the_loss_falls():
    batches = ToyBatches()
    batches.micro_batch = lambda step, index: ToyBatches.micro_batch(batches, step, 1)  # one batch over and over
    losses = run(make_parts(lr=3e-3), batches, 0, 60)
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


# ---- masks ----


def with_batch(index: int = 1, **changes: Any) -> list[Any]:
    micro, batch = ToyBatches().micro_batch(0, index)
    return [(micro, replace(batch, **changes))]


def test_a_mask_leaves_out_what_it_does_not_mark():
    """The loss is the mean over the marked places, so that it equals that of a picture which is nothing else."""
    mask = torch.zeros(2, 1, 4, 4)
    mask[0, :, :, :2], mask[1, :, 1, 3] = 1.0, 0.25
    parts = make_parts()
    loss = micro_loss(parts, with_batch(loss_mask=mask)[0][1], 0, 0).mean
    _, batch = with_batch()[0]
    sigma, noise = drawn(7, 0, 0, batch.latents.shape, 3.0)
    level = sigma[:, None, None, None]
    with torch.no_grad():
        found = parts.bare((1 - level) * batch.latents + level * noise, batch.text, 1000 * sigma,
                           encoder_attention_mask=batch.text_mask).sample  # fmt: skip
    error = (found - (noise - batch.latents)) ** 2
    expected = (error[0, :, :, :2].mean() + error[1, :, 1, 3].mean()) / 2
    torch.testing.assert_close(loss.detach(), expected)


def test_a_white_mask_is_none_and_a_black_one_teaches_nothing():
    plain = train_step(make_parts(), with_batch(), Progress())
    white = train_step(make_parts(), with_batch(loss_mask=torch.ones(2, 1, 4, 4)), Progress())
    assert white.loss == pytest.approx(plain.loss, rel=1e-6) and white.grad_norm == pytest.approx(plain.grad_norm, 1e-5)
    parts = make_parts()
    black = train_step(parts, with_batch(loss_mask=torch.zeros(2, 1, 4, 4)), Progress())
    assert (black.loss, black.grad_norm, black.skipped) == (0.0, 0.0, False)


# ---- regularisation ----


def test_losses_are_told_apart_by_role_and_together():
    pairs = [*with_batch(1), *with_batch(2, role=Role.REGULARISE), *with_batch(4)]
    plain = train_step(make_parts(), pairs, Progress())
    assert plain.losses == {}, "nobody asks where there is no regularisation data"
    result = train_step(make_parts(regularised=True), pairs, Progress())
    assert (result.loss, result.grad_norm) == (plain.loss, plain.grad_norm)
    alone = [micro_loss(make_parts(), batch, 0, micro.index % 3).mean.item() for micro, batch in pairs]
    assert result.losses["regularise"] == pytest.approx(alone[1], rel=1e-5)
    assert result.losses["train"] == pytest.approx((alone[0] + alone[2]) / 2, rel=1e-5)
    assert result.loss == pytest.approx(sum(alone) / 3, rel=1e-5)
    assert set(train_step(make_parts(regularised=True), with_batch(), Progress()).losses) == {"train"}


@pytest.mark.parametrize(
    ("dtype", "mixed_precision"),
    [(torch.float32, "no"), (torch.float32, "bf16"), (torch.bfloat16, "no"), (torch.bfloat16, "bf16")],
)
def test_regularisation_teaches_what_the_base_model_predicts(dtype: torch.dtype, mixed_precision: str):
    """Nothing as long as the two are equal, to the last bit whatever the precision; and then back towards it."""
    base: Any = freeze(tiny_transformer(), dtype, autocast=torch.bfloat16 if mixed_precision == "bf16" else None)
    parts = make_parts(dtype=dtype, mixed_precision=mixed_precision, base=base, regularised=True, ema_decay=None)
    regular = with_batch(role=Role.REGULARISE)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    first = train_step(parts, regular, Progress())
    assert (first.loss, first.grad_norm, first.losses) == (0.0, 0.0, {"regularise": 0.0})
    run(parts, ToyBatches(), 0, 5)
    away = micro_loss(parts, regular[0][1], 9, 0).mean.item()
    assert away > 0 and train_step(parts, with_batch(), Progress()).loss > away, "pictures are taught as before"
    for _ in range(20):
        train_step(parts, regular, Progress(9))
    assert micro_loss(parts, regular[0][1], 9, 0).mean.item() < away
    assert differences(before, dict(base.state_dict())) == [], "the base model stays what it is"
    kept = {module.weight.dtype for module in base.modules() if isinstance(module, torch.nn.Linear)}
    exact = dtype == torch.float32 and mixed_precision == "no"
    assert kept == {torch.float32 if exact else torch.bfloat16}


class HostReads(TorchDispatchMode):
    """Counts the operators that read a floating-point tensor on the host one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "is_nonzero", "equal", "nonzero") and args[0].is_floating_point():
            self.count += 1
        return func(*args, **(kwargs or {}))


def test_the_device_is_not_read_but_for_the_one_list():
    parts = make_parts(regularised=True)
    micro_batches = next(ToyBatches(2).steps(0, 1))
    with HostReads() as reads:
        train_step(parts, micro_batches, Progress())
        assert reads.count == 0
        torch.ones(1).item()
    assert reads.count == 1, "the counter counts"


def test_to_device_leaves_a_cpu_tensor_alone():
    tensor = torch.ones(2)
    assert to_device(tensor, torch.device("cpu")) is tensor


# ---- other noise levels and losses ----

RECIPES: dict[str, dict[str, Any]] = {
    "uniform": {"levels": Levels("uniform")},
    "beta": {"levels": Levels("beta")},
    "mode": {"levels": Levels("mode")},
    "custom": {"levels": Levels("custom", table=(0.2, 0.9))},
    "stratified": {"levels": Levels(stratified=True)},
    "huber": {"objective": Objective("huber")},
    "smooth_l1": {"objective": Objective("smooth_l1", huber_schedule="exponential")},
    "sigma_sqrt": {"objective": Objective(weighting="sigma_sqrt")},
    "cosmap": {"objective": Objective(weighting="cosmap")},
    "min-SNR": {"objective": Objective(snr_gamma=5.0)},
    "soft min-SNR": {"objective": Objective(snr_gamma=5.0, soft=True)},
    "perturbation": {"perturbation": Perturbation(0.1, 10)},
}


@pytest.fixture(scope="module")
def plain_losses() -> list[float]:
    return run(make_parts(), ToyBatches(2), 0, 2)


@pytest.mark.parametrize("recipe", RECIPES)
def test_each_recipe_is_followed_and_depends_on_position_alone(recipe: str, plain_losses: list[float]):
    parts = make_parts(**RECIPES[recipe])
    losses = run(parts, ToyBatches(2), 0, 2)
    assert all(math.isfinite(loss) for loss in losses) and losses[0] != plain_losses[0]
    again = make_parts(**RECIPES[recipe])
    run(again, ToyBatches(2), 0, 1)
    torch.manual_seed(99)
    assert run(again, ToyBatches(2), 1, 2) == losses[1:]
    assert differences(state_of(parts), state_of(again)) == []


def test_stratified_levels_fill_the_step_over_all_its_micro_batches():
    levels = Levels("uniform", stratified=True)
    for step in range(3):
        sigma = torch.cat([drawn(1, step, micro, (4, 1, 1, 1), 1.0, levels, 3)[0] for micro in range(3)])
        assert sorted(int(12 * level) for level in sigma.tolist()) == list(range(12))
    seen = {int(6 * drawn(1, step, 0, (1, 1, 1, 1), 1.0, levels, 6)[0]) for step in range(60)}
    assert seen == set(range(6)), "no place in the step has the same levels for ever"


def test_stratified_levels_leave_the_noise_as_it_is_shaped():
    sigma, noise = drawn(3, 5, 1, (4, 2, 3, 3), 3.0, Levels(stratified=True), 2)
    assert sigma.shape == (4,) and noise.shape == (4, 2, 3, 3) and sigma.dtype == noise.dtype == torch.float32


def test_a_perturbation_is_noise_of_its_own():
    _, noise = drawn(3, 5, 1, (4, 2, 8, 8), 3.0)
    assert perturbed(noise, 3, 5, 1, 0.0) is noise
    more = (perturbed(noise, 3, 5, 1, 0.5) - noise) / 0.5
    assert abs(more.mean()) < 0.15 and abs(more.std() - 1) < 0.15
    assert abs((more * noise).mean()) < 0.15, "independent of the noise"
    assert torch.equal(perturbed(noise, 3, 5, 1, 0.5), perturbed(noise, 3, 5, 1, 0.5))
    assert not torch.equal(perturbed(noise, 3, 6, 1, 0.5), perturbed(noise, 3, 5, 1, 0.5))


def test_one_batch_can_be_learned_by_heart():
    """The same step over and over, with its noise: the loss goes to near zero."""
    parts = make_parts(lr=3e-3, ema_decay=None, max_grad_norm=0.0)
    micro_batches = next(ToyBatches().steps(1, 2))
    losses = [train_step(parts, micro_batches, Progress(1)).loss for _ in range(300)]
    assert losses[0] > 1 and max(losses[-10:]) < 0.02


@pytest.mark.parametrize("release", [False, True])
def test_the_loss_of_each_sample_comes_with_its_noise_level(release: bool):
    parts = make_parts(release=release)
    batches = next(iter(ToyBatches(1 if release else 2).steps(0, 1)))
    result = train_step(parts, batches, Progress())
    levels = [
        drawn(7, 0, micro, batch.latents.shape, 3.0 if batch.latents[0, 0].numel() == 16 else 2.0)[0].tolist()
        for micro, (_, batch) in enumerate(batches)
    ]
    assert [level for level, _ in result.by_sigma] == [level for some in levels for level in some]
    means, at = [], 0
    for some in levels:
        means.append(sum(loss for _, loss in result.by_sigma[at : at + len(some)]) / len(some))
        at += len(some)
    assert sum(means) / len(means) == pytest.approx(result.loss, rel=1e-6)
