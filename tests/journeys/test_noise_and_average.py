"""Settings of noise levels, loss and average from the command line on nano: each has its effect, resuming is exact."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from sana_tune.cli.main import exit_code
from sana_tune.config.load import load, parse_overrides
from sana_tune.data.batch import Batch
from sana_tune.data.records import Role
from sana_tune.output import Output
from sana_tune.prepare import prepare
from sana_tune.run import build_parts
from sana_tune.train.device import make_accelerator
from sana_tune.train.ema import Ema
from sana_tune.train.step import Parts, micro_loss
from tests.journeys.kit import differences, metrics_of, output_of, pictures, small_run, state_of

# name → flags. What each changes is in the loss of the first step.
RECIPES = {
    "mean": "--flow_logit_mean 1",
    "std": "--flow_logit_std 0.5",
    "scale": "--flow_sigmoid_scale 2",
    "uniform": "--flow_use_uniform_schedule",
    "beta": "--flow_use_beta_schedule",
    "another beta": "--flow_distribution beta --flow_beta_schedule_alpha 5 --flow_beta_schedule_beta 3",
    "beta's beta": "--flow_distribution beta --flow_beta_schedule_beta 3",
    "mode": "--flow_distribution mode",
    "another mode": "--flow_distribution mode --flow_mode_scale -0.5",
    "custom": "--flow_custom_timesteps 250,500",
    "stratified": "--flow_stratified",
    "huber": "--loss_type huber",
    "huber's width": "--loss_type huber --huber_c 0.5",
    "huber's schedule": "--loss_type huber --huber_schedule constant",
    "exponential": "--loss_type huber --huber_schedule exponential",
    "smooth_l1": "--loss_type smooth_l1",
    "sigma_sqrt": "--loss_weighting sigma_sqrt",
    "cosmap": "--loss_weighting cosmap",
    "min-SNR": "--snr_gamma 5",
    "another gamma": "--snr_gamma 0.1",
    "soft min-SNR": "--snr_gamma 5 --use_soft_min_snr",
    "perturbation": "--input_perturbation 0.2",
}
# name → flags, with `ROLLED`.
ROLLED = "--scheduled_sampling_max_step_offset 4 --scheduled_sampling_probability 1"
ROLLOUTS = {
    "rolled in": "",
    "shorter": "--scheduled_sampling_max_step_offset 2",
    "half of them": "--scheduled_sampling_probability 0.5",
    "a ramp": "--scheduled_sampling_ramp_steps 2 --scheduled_sampling_prob_start 0.7",
    "early": "--scheduled_sampling_strategy biased_early",
    "late": "--scheduled_sampling_strategy biased_late",
    "Euler": "--scheduled_sampling_sampler euler",
    "DPM-Solver++": "--scheduled_sampling_sampler dpm",
    "order 3": "--scheduled_sampling_sampler dpm --scheduled_sampling_order 3",
    "without ReflexFlow": "--scheduled_sampling_reflexflow false",
    "alpha": "--scheduled_sampling_reflexflow_alpha 3",
    "beta1": "--scheduled_sampling_reflexflow_beta1 1",
    "beta2": "--scheduled_sampling_reflexflow_beta2 2",
    "longer steps": "--validation_num_inference_steps 8",
}
# name → flags. What each changes is in the average of the last step.
AVERAGES = {
    "ramp": "--use_ema",
    "decay": "--use_ema --ema_decay 0.1",
    "interval": "--use_ema --ema_update_interval 3",
    "warm-up": "--use_ema --ema_warmup_steps 2",
}
STEPS = 4


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures and full caches, which all runs share, and a run of the defaults."""
    folder = tmp_path_factory.mktemp("noise")
    pictures(folder / "pictures", 4)
    train(folder, folder / "plain", "--use_ema")
    return folder


def train(home: Path, folder: Path, flags: str = "", **settings: Any) -> dict[str, Any]:
    """A run in a folder of its own: all that its last checkpoint holds."""
    small_run(
        folder, {"instance_data_dir": str(home / "pictures")}, cache_dir=str(home / "cache"), max_train_steps=STEPS,
        **settings,
    )  # fmt: skip
    assert exit_code(["train", "--config", str(folder / "config.json"), *flags.split()]) == 0
    return state_of(folder / "output" / f"checkpoint-{STEPS}")


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in metrics_of(folder / "output")]


def asked(home: Path, flags: str) -> Parts:
    """The parts of a run with these flags, built as a run builds them."""
    loaded = load(home / "plain/config.json", parse_overrides(flags.split()), {})
    prepared = prepare(loaded, Output(output_of(loaded)), fresh=True)
    return build_parts(prepared, make_accelerator("cpu", "no"))


def loss_at(parts: Parts, batch: Batch, step: int = 0) -> float:
    with torch.no_grad():
        return float(micro_loss(parts, batch, step, 0).mean)


@pytest.fixture(scope="module")
def batch() -> Batch:
    generator = torch.Generator().manual_seed(1)
    latents, text = torch.randn(2, 8, 4, 4, generator=generator), torch.randn(2, 3, 64, generator=generator)
    return Batch(latents, text, torch.ones(2, 3, dtype=torch.int64), None, Role.TRAIN, ("a", "b"))


def test_every_recipe_has_its_own_loss(home: Path, batch: Batch):
    """No two are alike, so every setting has its effect, beside the others too."""
    found = {name: loss_at(asked(home, flags), batch) for name, flags in {"plain": "", **RECIPES}.items()}
    assert all(math.isfinite(loss) for loss in found.values())
    assert len(set(found.values())) == len(found) == 1 + len(RECIPES), found


def test_every_rollout_has_its_own_loss(home: Path):
    generator = torch.Generator().manual_seed(1)
    latents, text = torch.randn(16, 8, 4, 4, generator=generator), torch.randn(16, 3, 64, generator=generator)
    many = Batch(latents, text, torch.ones(16, 3, dtype=torch.int64), None, Role.TRAIN, ("a",) * 16)
    found = {name: loss_at(asked(home, f"{ROLLED} {flags}"), many) for name, flags in ROLLOUTS.items()}
    plain = loss_at(asked(home, ""), many)
    assert all(math.isfinite(loss) for loss in found.values())
    assert len({plain, *found.values()}) == 1 + len(ROLLOUTS), found
    off = ("--scheduled_sampling_max_step_offset 4", ROLLED + " --scheduled_sampling_start_step 1")
    assert [loss_at(asked(home, flags), many) for flags in off] == [plain, plain]


def test_a_perturbation_ends_with_its_steps(home: Path, batch: Batch):
    plain, falling = asked(home, ""), asked(home, "--input_perturbation 0.2 --input_perturbation_steps 2")
    whole = asked(home, "--input_perturbation 0.2")
    assert loss_at(falling, batch, 0) == loss_at(whole, batch, 0) != loss_at(plain, batch, 0)
    assert len({loss_at(parts, batch, 1) for parts in (plain, falling, whole)}) == 3
    assert loss_at(falling, batch, 2) == loss_at(plain, batch, 2)


@pytest.mark.parametrize("weights", ["fp32", "bf16"])
def test_averages_differ_where_they_should_and_not_by_where_they_are_kept(
    home: Path, tmp_path: Path, weights: str, full: bool
):
    dtype = f" --weights_dtype {weights}"
    names = list(AVERAGES) if full or weights == "fp32" else ["ramp"]
    moved = names if full else names[-1:]
    made = {name: train(home, tmp_path / name, AVERAGES[name] + dtype) for name in names}
    aside = {name: train(home, tmp_path / f"{name} cpu", f"{AVERAGES[name]} --ema_device cpu{dtype}") for name in moved}
    some = "transformer_ema/proj_out.weight"
    assert len({made[name][some].numpy().tobytes() for name in made}) == len(names)
    assert {made[name][some].dtype for name in names} == {torch.float32}
    for name, state in aside.items():
        assert differences(made[name], state) == []
    need = {place: memory_of(tmp_path / place)["ema_bytes"] for place in (moved[-1], f"{moved[-1]} cpu")}
    assert len(set(need.values())) == 2, "on a CPU the copies of the weights come on top"


def memory_of(folder: Path) -> dict[str, int]:
    return json.loads((folder / "output/plan.json").read_text(encoding="utf-8"))["memory"]["need"]


def test_ema_cpu_only_is_ema_device_cpu(home: Path):
    for flags, is_aside in (("", False), ("--ema_device cpu", True), ("--ema_cpu_only", True)):
        ema = asked(home, f"--use_ema {flags}").ema
        assert isinstance(ema, Ema) and ema.is_aside is is_aside


COMBINED = (
    "--use_ema --ema_device cpu --ema_warmup_steps 1 --flow_stratified --flow_distribution mode --loss_type huber "
    "--loss_weighting cosmap --input_perturbation 0.1 --input_perturbation_steps 3 --gradient_accumulation_steps 2 "
    "--scheduled_sampling_max_step_offset 3 --scheduled_sampling_ramp_steps 3 --scheduled_sampling_prob_end 1"
)


def test_a_run_with_all_of_it_resumes_to_the_bit(home: Path, tmp_path: Path):
    straight = train(home, tmp_path / "straight", COMBINED)
    train_stopped(home, tmp_path / "resumed")
    assert not (tmp_path / "resumed/output/checkpoint-4").exists()
    resumed = train(home, tmp_path / "resumed", COMBINED)
    assert differences(straight, resumed) == []
    assert losses(tmp_path / "straight") == losses(tmp_path / "resumed") and len(losses(tmp_path / "resumed")) == STEPS


def train_stopped(home: Path, folder: Path) -> None:
    small_run(folder, {"instance_data_dir": str(home / "pictures")}, cache_dir=str(home / "cache"))
    words = ["train", "--config", str(folder / "config.json"), *COMBINED.split(), "--max_train_steps", "2"]
    assert exit_code(words) == 0


def test_check_draws_the_distribution(home: Path, capsys: pytest.CaptureFixture[str]):
    path = str(home / "plain/config.json")
    assert exit_code(["check", "--config", path, "--flow_use_beta_schedule"]) == 0
    said = capsys.readouterr().out
    assert "Noise     beta (2, 2), shift 1: median 0.50" in said and "█" in said


def test_check_draws_the_learning_rate_and_says_what_the_weights_are(home: Path, capsys: pytest.CaptureFixture[str]):
    flags = "--lr_scheduler cosine --lr_warmup_steps 2 --max_train_steps 20"
    assert exit_code(["check", "--config", str(home / "plain/config.json"), *flags.split()]) == 0
    said = capsys.readouterr().out
    (rate,) = [line for line in said.splitlines() if line.startswith("Rate")]
    assert rate.startswith("Rate      cosine, peak ") and "2 steps of warm-up" in rate
    assert "█▇" in said and "\nWeights   fp32 (" in said


def test_ema_validation_chooses_the_pictures(home: Path, tmp_path: Path):
    train(
        home, tmp_path, "--use_ema --ema_validation ema_only", validation_disable=False, validation_prompt="a star",
        validation_resolution="32", validation_num_inference_steps=1, disable_benchmark=True,
        validation_disable_unconditional=True,
    )  # fmt: skip
    (name,) = (path.stem for path in (tmp_path / "output/validation_images").glob(f"step_{STEPS}_validation_*"))
    assert name.endswith("_ema")
    assert isinstance(ema := asked(home, "--use_ema --ema_validation none").ema, Ema) and ema.shown == "none"
