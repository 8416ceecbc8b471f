"""Rules between settings, each alone (their messages in the whole are in test_load)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from sana_tune.config.load import load
from sana_tune.config.optimizers import OPTIMIZER_FACTS, REFUSED_OPTIMIZERS
from sana_tune.config.rules import (
    bf16_keeps_its_rest,
    check_rules,
    distribution_of,
    downsample_needs_both,
    needs_instance_prompt,
)
from tests.config.helpers import load_with, problems_of, write_list
from tests.config.test_optimizers import THEIRS


def test_rules_pass_on_good_settings(tmp_path: Path) -> None:
    loaded = load_with(tmp_path, {}, {"caption_strategy": "instanceprompt", "instance_prompt": "a zib"})
    notes: list[str] = []
    assert check_rules(loaded.config, loaded.datasets, notes) == [] and notes == []


def test_each_rule_can_fail(tmp_path: Path) -> None:
    loaded = load_with(tmp_path, {"weights_dtype": "bf16"})
    config, dataset = loaded.config, loaded.datasets[0]
    assert needs_instance_prompt(config, dataset.model_copy(update={"prepend_instance_prompt": True}))
    assert downsample_needs_both(config, dataset.model_copy(update={"crop": True, "maximum_image_size": 64.0}))
    assert bf16_keeps_its_rest(config) is None
    without = config.optimizer.model_copy(update={"optimizer_config": "kahan_sum=false"})
    assert bf16_keeps_its_rest(config.model_copy(update={"optimizer": without}))


def test_what_a_role_leaves_without_effect_is_said(tmp_path: Path) -> None:
    def said(settings: dict[str, Any], *entries: dict[str, Any]) -> str:
        listed = [{"id": "d", "instance_data_dir": "d"}, *entries]
        return "\n".join(load(write_list(tmp_path, settings, listed), {}, {}).notes)

    held = {"id": "h", "dataset_type": "eval", "instance_data_dir": "h"}
    note = "dataset h: repeats, start_step have no effect: it is never trained on"
    assert note in said({}, {**held, "repeats": 3, "start_step": 7})
    assert "never trained on" not in said({"small_buckets": "merge"}, held), (
        "what config.json says for all is no mistake"
    )
    masks = {"id": "m", "dataset_type": "conditioning", "instance_data_dir": "m", "resolution": 512, "crop": True}
    linked = {"id": "e", "instance_data_dir": "e", "conditioning_data": "m"}
    assert "masks m: no dataset names them" in said({}, masks)
    assert "m: resolution, crop have no effect: masks are resized, cropped and cached as" in said({}, masks, linked)
    share = {"masked_loss_probability": 0.5}
    assert "masked_loss_probability has no effect" in said(share, masks, linked)
    assert "masked_loss_probability" not in said(share, {**masks, "conditioning_type": "segmentation"}, linked)
    base = {"regularisation_target": "base"}
    assert "regularisation_target base has no effect" in said(base)
    assert "has no effect: no dataset has is_reg" not in said(
        base, {**linked, "conditioning_data": None, "is_regularisation_data": True}
    )
    assert "dataset e: its probability is 0: it is left out" in said(
        {}, {**linked, "conditioning_data": "", "probability": 0}
    )


# ---- sizes, crops and aspects ----


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"resolution": 1024, "resolution_type": "area"},
         "dataset pictures: resolution: resolution_type area is in megapixels, and resolution is 1024\n"
         "  → use resolution_type pixel_area for px, or give megapixels (1024x1024 px are 1.05)"),
        ({"resolution": 1.0},
         "dataset pictures: resolution: resolution_type pixel_area is in px, and resolution is 1\n"
         "  → use resolution_type area for megapixels, or give px, such as 1024"),
        ({"resolution": 0.5, "resolution_type": "pixel"}, "resolution_type pixel is in px, and resolution is 0.5"),
        ({"resolution": 1.0, "resolution_type": "area", "minimum_image_size": 512},
         "dataset pictures: minimum_image_size: resolution_type area is in megapixels, and minimum_image_size is 512"),
        ({"resolution": 1.0, "resolution_type": "area", "maximum_image_size": 1024}, "and maximum_image_size is 1024"),
        ({"minimum_image_size": 0.25}, "resolution_type pixel_area is in px, and minimum_image_size is 0.25"),
        ({"crop": True, "maximum_image_size": 4.0, "target_downsample_size": 2.0}, "and maximum_image_size is 4"),
        ({"minimum_image_size": 512, "maximum_image_size": 256},
         "minimum_image_size must not be above maximum_image_size; found 512 and 256"),
        ({"crop": True, "maximum_image_size": 256, "target_downsample_size": 32},
         "target_downsample_size must not be below resolution; found 32 and 64"),
        ({"crop": True, "maximum_image_size": 256, "target_downsample_size": 512},
         "target_downsample_size must not be above maximum_image_size; found 512 and 256"),
        ({"crop": True, "crop_aspect": "closest"}, "crop_aspect closest needs crop_aspect_buckets"),
        ({"crop": True, "crop_aspect": "random", "crop_aspect_buckets": []}, "random needs crop_aspect_buckets"),
        ({"minimum_aspect_ratio": 1.5, "maximum_aspect_ratio": 0.5},
         "minimum_aspect_ratio must not be above maximum_aspect_ratio; found 1.5 and 0.5"),
    ],
)  # fmt: skip
def test_settings_of_a_dataset_that_contradict_each_other(tmp_path: Path, entry: dict[str, Any], message: str) -> None:
    told = problems_of(tmp_path, {}, entry)
    assert message in told and "  → " in told


@pytest.mark.parametrize(
    "entry",
    [
        {"resolution": 0.25, "resolution_type": "area", "minimum_image_size": 0.1, "maximum_image_size": 50},
        {"resolution": 16.8, "resolution_type": "area"},
        {"resolution": 512, "resolution_type": "pixel", "minimum_image_size": 512},
        {"minimum_image_size": 0, "maximum_image_size": 0, "target_downsample_size": 0},
        {"minimum_image_size": 512, "maximum_image_size": 512, "target_downsample_size": 512, "resolution": 512,
         "crop": True, "crop_aspect": "square", "crop_style": "center"},
        {"minimum_image_size": 1024, "maximum_image_size": 1024, "target_downsample_size": 1024, "resolution": 1024},
        {"minimum_aspect_ratio": 0.5, "maximum_aspect_ratio": 0.5},
        {"crop_aspect": "closest"},
    ],
)  # fmt: skip
def test_what_can_be_meant_loads(tmp_path: Path, entry: dict[str, Any]) -> None:
    load_with(tmp_path, {}, entry)


def test_sizes_of_config_json_are_in_the_unit_of_the_dataset(tmp_path: Path) -> None:
    entry = {"resolution": 0.5, "resolution_type": "area"}
    told = problems_of(tmp_path, {"minimum_image_size": 512}, entry)
    assert "dataset pictures: minimum_image_size: resolution_type area is in megapixels" in told
    assert load_with(tmp_path, {"minimum_image_size": 0.25}, entry).datasets[0].minimum_image_size == 0.25


@pytest.mark.parametrize(
    ("entry", "note"),
    [
        ({"crop_aspect_buckets": [1.0]}, "crop_aspect_buckets has no effect with crop: false"),
        ({"crop_aspect": "closest", "crop_aspect_buckets": [1.0]}, "crop_aspect has no effect with crop: false"),
        ({"crop": True, "crop_aspect_buckets": [1.0]}, "crop_aspect_buckets has no effect with crop_aspect square"),
        ({"crop": True, "crop_aspect": "preserve", "crop_aspect_buckets": [1.0]}, "with crop_aspect preserve"),
        ({"crop": True, "crop_aspect": "random", "crop_aspect_buckets": [1.0]}, None),
        ({"crop": True, "crop_aspect": "preserve"}, None),
        ({"crop_aspect": "square"}, None),
    ],
)  # fmt: skip
def test_crop_settings_without_effect_are_noted(tmp_path: Path, entry: dict[str, Any], note: str | None) -> None:
    notes = [line for line in load_with(tmp_path, {}, entry).notes if "crop_aspect" in line]
    assert notes == [] if note is None else len(notes) == 1 and note in notes[0] and "dataset pictures" in notes[0]


# ---- rollouts ----


def test_a_rollout_is_a_part_of_the_way(tmp_path: Path) -> None:
    told = problems_of(tmp_path, {"scheduled_sampling_max_step_offset": 21, "scheduled_sampling_probability": 1})
    assert "scheduled_sampling_max_step_offset: a rollout must not be longer" in told and "(20) steps; found 21" in told
    told = problems_of(tmp_path, {"scheduled_sampling_sampler": "heun", "scheduled_sampling_order": 4})
    assert "no sampler of rollouts has the name 'heun'" in told and "scheduled_sampling_order" in told


@pytest.mark.parametrize(
    ("settings", "note"),
    [
        ({"max_step_offset": 3, "probability": 0.5}, None),
        ({"max_step_offset": 3, "ramp_steps": 10, "prob_end": 1.0}, None),
        ({"probability": 0.5}, "scheduled_sampling_probability: no effect, since scheduled_sampling_max_step_offset"),
        ({"max_step_offset": 3}, "scheduled sampling rolls nothing in"),
        ({"max_step_offset": 3, "probability": 0.5, "prob_end": 1.0}, "scheduled_sampling_ramp_steps is 0"),
        ({"max_step_offset": 3, "probability": 0.5, "ramp_steps": 9}, "the ramp takes its place"),
        ({"max_step_offset": 3, "probability": 0.5, "sampler": "euler", "order": 3}, "Euler's method has order 1"),
    ],
)
def test_settings_of_rollouts_without_effect_are_noted(tmp_path: Path, settings: dict, note: str | None) -> None:
    asked = {f"scheduled_sampling_{key}": value for key, value in settings.items()}
    notes = [line for line in load_with(tmp_path, asked).notes if "scheduled" in line]
    assert notes == [] if note is None else len(notes) == 1 and note in notes[0]


# ---- the learning rate ----


def test_the_end_of_the_learning_rate_is_below_its_start(tmp_path: Path) -> None:
    falling = {"lr_scheduler": "polynomial", "learning_rate": 1e-5}
    assert load_with(tmp_path, {**falling, "lr_end": 9e-6, "lr_power": 2}).config.optimizer.lr_end == 9e-6
    told = problems_of(tmp_path, {**falling, "lr_end": 1e-5})
    assert "lr_end: must be below learning_rate 1e-05; found 1e-05" in told
    told = problems_of(tmp_path, {"lr_scheduler": "polynomial", "learning_rate": 4e-7})
    assert "must be below learning_rate 4e-07; found 4e-07 (the default of polynomial)" in told
    assert "must be below" in problems_of(tmp_path, {"lr_scheduler": "cosine", "learning_rate": 1e-5, "lr_end": 1})
    load_with(tmp_path, {"lr_scheduler": "linear", "learning_rate": 1e-7, "lr_end": 1})


def test_settings_of_another_schedule_are_noted(tmp_path: Path) -> None:
    def notes(**config: Any) -> list[str]:
        return [line for line in load_with(tmp_path, config).notes if line.startswith("lr_")]

    assert notes(lr_scheduler="linear", lr_end=1e-7) == [
        "lr_end has no effect with lr_scheduler linear: polynomial, cosine and cosine_with_restarts use it"
    ]
    assert notes(lr_scheduler="cosine", lr_power=2) == [
        "lr_power has no effect with lr_scheduler cosine: it is for polynomial"
    ]
    assert notes(lr_scheduler="polynomial", lr_end=1e-7, lr_power=2) == notes(lr_scheduler="cosine", lr_end=1e-7) == []
    assert notes(lr_scheduler="constant") == []


@pytest.mark.parametrize(
    ("name", "messages"),
    [
        ("sine", ("'sine' cannot be used here", "use cosine")),
        ("polynominal", ("did you mean 'polynomial'?",)),
    ],
)
def test_schedules_there_are_not(tmp_path: Path, name: str, messages: tuple[str, ...]) -> None:
    told = problems_of(tmp_path, {"lr_scheduler": name})
    assert all(message in told for message in messages)


# ---- noise levels and loss ----


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"flow_use_uniform_schedule": True, "flow_use_beta_schedule": True},
         "noise levels are drawn from one distribution; found flow_use_uniform_schedule (uniform) and "
         "flow_use_beta_schedule (beta)\n  → keep one of them"),
        ({"flow_distribution": "mode", "flow_custom_timesteps": "0.5,1"},
         "found flow_distribution (mode) and flow_custom_timesteps (custom)"),
        ({"flow_distribution": "custom"}, "custom needs flow_custom_timesteps"),
        ({"snr_gamma": 5, "loss_weighting": "cosmap"}, "snr_gamma is a weighting itself; found loss_weighting cosmap"),
        ({"loss_weighting": "logit_normal"}, "use flow_distribution logit-normal"),
        ({"loss_weighting": "min_snr"}, "use snr_gamma 5"),
        ({"flow_distribution": "unifrom"}, "did you mean 'uniform'?"),
        ({"flow_custom_timesteps": "0.5,0"}, "noise levels are numbers above 0"),
        ({"flow_mode_scale": 2}, "flow_mode_scale"),
        ({"offset_noise": True}, "offset_noise: cannot be used"),
        ({"timestep_bias_strategy": "later"}, "use flow_distribution and flow_schedule_shift"),
        ({"flow_timesteps_mode": "x"}, "use flow_distribution"),
        ({"flow_cubic_schedule_weights": "1,2"}, "use flow_distribution beta"),
    ],
)  # fmt: skip
def test_noise_levels_and_losses_that_contradict_each_other(tmp_path: Path, config: dict[str, Any], message: str):
    told = problems_of(tmp_path, config)
    assert message in told and "  → " in told


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({}, "logit-normal"),
        ({"flow_distribution": "logit_normal", "flow_logit_mean": -1}, "logit-normal"),
        ({"flow_use_uniform_schedule": "true"}, "uniform"),
        ({"flow_use_uniform_schedule": True, "flow_distribution": "uniform"}, "uniform"),
        ({"flow_use_beta_schedule": True, "flow_beta_schedule_alpha": 3.0}, "beta"),
        ({"flow_custom_timesteps": [1000, 500]}, "custom"),
        ({"flow_custom_timesteps": "", "flow_distribution": ""}, "logit-normal"),
        # what files of SimpleTuner hold beside the rest is no contradiction
        ({"loss_type": "l2", "snr_gamma": 0, "noise_offset": 0.1, "offset_noise": False, "ema_device": "cpu"},
         "logit-normal"),
    ],
)  # fmt: skip
def test_one_distribution_is_chosen(tmp_path: Path, config: dict[str, Any], kind: str):
    loaded = load_with(tmp_path, config)
    assert distribution_of(loaded.config) == kind
    assert [note for note in loaded.notes if note.startswith(("flow_", "huber_", "input_"))] == []


@pytest.mark.parametrize(
    ("config", "note"),
    [
        ({"flow_logit_std": 2, "flow_use_uniform_schedule": True},
         "flow_logit_std has no effect with noise levels of the distribution uniform: it is for logit-normal"),
        ({"flow_beta_schedule_beta": 3}, "flow_beta_schedule_beta has no effect with noise levels of the distribution"),
        ({"flow_custom_timesteps": "0.5", "flow_schedule_shift": 3}, "flow_custom_timesteps are taken as they are"),
        ({"huber_c": 0.5}, "huber_c has no effect with loss_type l2"),
        ({"huber_schedule": "constant"}, "huber_schedule has no effect with loss_type l2"),
        ({"use_soft_min_snr": True}, "use_soft_min_snr has no effect without snr_gamma"),
        ({"input_perturbation_steps": 10}, "input_perturbation_steps has no effect without input_perturbation"),
    ],
)  # fmt: skip
def test_settings_of_another_distribution_or_loss_are_noted(tmp_path: Path, config: dict[str, Any], note: str):
    assert any(line.startswith(note) for line in load_with(tmp_path, config).notes)


# ---- optimizers and precision ----


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights_dtype": "bf16", "optimizer_config": "kahan_sum=false"},
         "weights_dtype: bf16 weights need what rounding to the nearest loses to be kept; without Kahan summation "
         "about 85 % of the weights would not move in a step at a learning rate of 1e-05"),
        ({"weights_dtype": "bf16", "optimizer_config": "kahan_sum=false", "learning_rate": 1e-4}, "about 12 % of the"),
        ({"mixed_precision": "fp16", "weights_dtype": "bf16"}, "fp16 needs fp32 weights; found weights_dtype bf16"),
        ({"optimizer_config": "aplha=2", "optimizer": "bnb-ademamix"},
         "bnb-ademamix has no option aplha\n  → did you mean alpha?"),
        ({"optimizer_config": "alpha=2"}, "optimi-adamw has no option alpha"),
        ({"optimizer_config": "kahan_sum=1"}, "kahan_sum must be true or false; found 1\n  → such as"),
        ({"optimizer_config": "k=2.5", "optimizer": "optimi-ranger"}, "k must be a whole number; found 2.5"),
        ({"optimizer_config": "eps=small"}, "eps must be a number; found small"),
        ({"optimizer_config": "beta1=1"}, "beta1 must be at least 0 and below 1; found 1"),
        ({"optimizer_config": "d=0.5", "optimizer": "torch-adafactor"}, "d must be 1 or more; found 0.5"),
        ({"optimizer_config": "beta2_decay=1", "optimizer": "torch-adafactor"}, "beta2_decay must be 0 or less"),
        ({"optimizer_config": "nesterov=true", "optimizer": "torch-sgd"}, "nesterov needs a momentum above 0"),
        ({"optimizer_config": "beta1=0.8", "optimizer_beta1": 0.7}, "beta1 stands in optimizer_config too"),
        ({"optimizer_config": "beta1"}, 'must be "name=value,name=value"; found \'beta1\''),
        ({"optimizer_config": "beta1=0.1,beta1=0.2"}, "beta1 stands there twice"),
        ({"lr_scale": True, "lr_scale_sqrt": True}, "found lr_scale_sqrt beside it"),
        ({"optimizer_release_gradients": True, "gradient_accumulation_steps": 2},
         "needs gradient_accumulation_steps 1: a gradient that is freed cannot be added to; found 2"),
        ({"optimizer_release_gradients": True, "mixed_precision": "fp16"}, "cannot be used with mixed_precision fp16"),
        ({"optimizer": "prodigy"}, "there is none of this name here; the nearest is optimi-adamw"),
        ({"optimizer": "ao-adamw8bit"}, "the nearest is bnb-adamw8bit"),
    ],
)  # fmt: skip
def test_a_contradiction_of_the_optimizer_is_told(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    assert message in problems_of(tmp_path, settings, {})


def test_every_optimizer_of_theirs_loads_or_is_refused_with_one_that_does(tmp_path: Path) -> None:
    """From a file, as a user has it; what the refusal names is itself taken."""
    loaded = {}
    for name in THEIRS:
        if name in REFUSED_OPTIMIZERS:
            told = problems_of(tmp_path, {"optimizer": name})
            (near,) = re.findall(r"the nearest is (\S+)", told)
            assert f"'{name}' cannot be used here" in told
            name = near
        loaded[name] = load_with(tmp_path, {"optimizer": name}).config.optimizer.optimizer
    assert set(loaded.values()) <= set(OPTIMIZER_FACTS) and loaded["bnb-lion-8bit-paged"] == "bnb-lion8bit-paged"
    assert set(loaded) >= {name for name in THEIRS if name not in REFUSED_OPTIMIZERS}


@pytest.mark.parametrize(
    "settings",
    [
        {"weights_dtype": "bf16", "optimizer": "torch-adamw"},
        {"weights_dtype": "bf16", "optimizer": "bnb-lion-8bit-paged"},
        {"optimizer": "optimi-sgd", "optimizer_config": "momentum=0.9, dampening=true"},
        {"optimizer_config": {"beta1": 0.8, "kahan_sum": True}},
        {"mixed_precision": "fp16"},
        {"optimizer_release_gradients": True, "max_grad_norm": 0},
        {"gradient_checkpointing_interval": 3, "gradient_checkpointing_segment_stride": 3},
        {"gradient_checkpointing_backend": "selective", "dynamo_backend": "no"},
        {"gradient_checkpointing_backend": "torch", "dynamo_backend": "inductor"},
    ],
)
def test_what_goes_together_passes(settings: dict[str, Any], tmp_path: Path) -> None:
    loaded = load_with(tmp_path, settings)
    assert not [
        note for note in loaded.notes if "optimizer" in note and "unlike" not in note and "defaults" not in note
    ]


@pytest.mark.parametrize(
    ("settings", "note"),
    [
        ({"optimizer": "optimi-lion", "optimizer_epsilon": 1e-8}, "optimizer_epsilon has no effect with optimi-lion"),
        ({"optimizer": "torch-sgd", "optimizer_beta1": 0.8}, "optimizer_beta1 has no effect with torch-sgd"),
        ({"lr_num_cycles": 3}, "lr_num_cycles has no effect with lr_scheduler constant_with_warmup"),
        (
            {"gradient_checkpointing": False, "gradient_checkpointing_backend": "selective"},
            "gradient_checkpointing_backend has no effect: gradient_checkpointing is off",
        ),
        ({"optimizer_release_gradients": True}, "two forward and backward passes a step, about twice the time"),
    ],
)
def test_what_does_nothing_or_costs_is_noted(settings: dict[str, Any], note: str, tmp_path: Path) -> None:
    assert any(note in told for told in load_with(tmp_path, settings).notes)
