"""What SimpleTuner would have done otherwise with the same files: told in a line or two at start.

Silent when the file is ours (it names our schema, or a run wrote it). Facts from SimpleTuner's documentation and from
running it; the page docs/coming-from-simpletuner.md says why.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sana_tune.config.datasets import ImageDataset
from sana_tune.config.layers import DEFAULT, Flat
from sana_tune.config.rules import distribution_of
from sana_tune.config.schema import SECTIONS, Config, section_of

Difference = Callable[[Flat, Config, Sequence[ImageDataset]], str | None]

# Defaults of SimpleTuner where ours differ and the result does too.
THEIR_DEFAULTS: Mapping[str, Any] = {
    "train_batch_size": 4,
    "learning_rate": 4e-7,
    "optimizer": "adamw_bf16",
    "max_grad_norm": 2.0,
    "validation_resolution": "256",
    "validation_guidance": 7.5,
    "validation_num_inference_steps": 30,
    "validation_negative_prompt": "blurry, cropped, ugly",
    "validation_step_interval": 100,
}


def differences(flat: Flat, config: Config, datasets: Sequence[ImageDataset]) -> list[str]:
    """Notes on what is done otherwise here; none for a file that was written for sana_tune or for no file."""
    if flat.is_ours or not any(origin != DEFAULT for origin in flat.origins.values()):
        return []
    told = [text for rule in RULES if (text := rule(flat, config, datasets))]
    notes = [f"unlike SimpleTuner: {'; '.join(told)}"]
    defaults = [_default(key, theirs) for key, theirs in THEIR_DEFAULTS.items() if flat.origins[key] == DEFAULT]
    if defaults:
        notes.append(f"defaults used here and (SimpleTuner's): {', '.join(defaults)}")
    return notes


def _default(key: str, theirs: Any) -> str:
    ours = SECTIONS[section_of()[key]].model_fields[key].default
    shown = "the model's" if key == "validation_resolution" else repr(ours) if ours == "" else ours
    return f"{key} {shown} ({theirs})"


def recipe(flat: Flat, config: Config, datasets: Sequence[ImageDataset]) -> str:
    """Always: the noise levels and the scale of the latents."""
    kind = distribution_of(config)
    whose = "NVIDIA's (logit-normal, with flow shift)" if kind == "logit-normal" else f"of the distribution {kind}"
    return f"noise levels are {whose} and latents are scaled by the VAE's own factor"


def masters(flat: Flat, config: Config, datasets: Sequence[ImageDataset]) -> str | None:
    """bf16 there means bf16 weights."""
    if config.model.mixed_precision == "bf16" and config.model.weights_dtype == "auto":
        return "bf16 keeps fp32 master weights (weights_dtype bf16 saves their memory)"
    return None


def schedule(flat: Flat, config: Config, datasets: Sequence[ImageDataset]) -> str | None:
    """Its cosine is an endless wave."""
    if config.optimizer.lr_scheduler == "cosine":
        return "cosine warms up and falls to lr_end once, over the whole run"
    return None


def clipping(flat: Flat, config: Config, datasets: Sequence[ImageDataset]) -> str | None:
    """Its max_grad_norm clamps elements by default."""
    if flat.origins["grad_clip_method"] == DEFAULT and flat.origins["max_grad_norm"] != DEFAULT:
        return "max_grad_norm limits the norm of the whole gradient (grad_clip_method value limits each element)"
    return None


def shift(flat: Flat, config: Config, datasets: Sequence[ImageDataset]) -> str | None:
    """Its options of noise levels and loss are inert for Sana."""
    fields = {key: info for section in ("flow", "loss") for key, info in SECTIONS[section].model_fields.items()}
    values = {**vars(config.flow), **vars(config.loss)}
    given = [key for key in _INERT if flat.origins[key] != DEFAULT and values[key] != fields[key].default]
    return f"{' and '.join(given)} take{'s' * (len(given) == 1)} effect" if given else None


_INERT = (
    "flow_schedule_shift", "flow_schedule_auto_shift", "flow_sigmoid_scale", "flow_use_uniform_schedule",
    "flow_use_beta_schedule", "flow_custom_timesteps", "loss_type", "snr_gamma",
)  # fmt: skip


def false_text(flat: Flat, config: Config, datasets: Sequence[ImageDataset]) -> str | None:
    """It drops the text "false", and the default stays."""
    said = [key for key in ("gradient_checkpointing",) if str(flat.raw.get(key, "")) in ("false", "False")]
    return f'the text "false" of {said[0]} means false' if said and isinstance(flat.raw[said[0]], str) else None


def both_lengths(flat: Flat, config: Config, datasets: Sequence[ImageDataset]) -> str | None:
    """It refuses a file with both."""
    if config.train.max_train_steps and config.train.num_train_epochs:
        return "with max_train_steps and num_train_epochs the first reached ends the run"
    return None


def seed_zero(flat: Flat, config: Config, datasets: Sequence[ImageDataset]) -> str | None:
    """It takes the time for a seed of 0."""
    return "seed 0 is a seed like any other" if flat.origins["seed"] != DEFAULT and config.train.seed == 0 else None


def average(flat: Flat, config: Config, datasets: Sequence[ImageDataset]) -> str | None:
    """Its EMA is in bf16, and the interval is not made up for."""
    if config.ema.use_ema and config.ema.ema_update_interval > 1:
        return "ema_decay is per step whatever ema_update_interval is"
    return None


def instruction(flat: Flat, config: Config, datasets: Sequence[ImageDataset]) -> str | None:
    """It keeps the last line of a list."""
    if isinstance(flat.raw.get("sana_complex_human_instruction"), list):
        return "all lines of sana_complex_human_instruction are used"
    return None


def crops(flat: Flat, config: Config, datasets: Sequence[ImageDataset]) -> str | None:
    """It resizes every picture once a maximum is set."""
    if any(dataset.crop and dataset.maximum_image_size for dataset in datasets):
        return "only pictures above maximum_image_size are resized to target_downsample_size before the crop"
    return None


def masks(flat: Flat, config: Config, datasets: Sequence[ImageDataset]) -> str | None:
    """Its masked loss is divided by all places, and its masks are cut elsewhere than the pictures by random crops."""
    if any(dataset.conditioning_data for dataset in datasets):
        return "masks have the very crop of their pictures, and the loss is the mean over what they mark"
    return None


def regularisation(flat: Flat, config: Config, datasets: Sequence[ImageDataset]) -> str | None:
    """There it only renames the loss of a full-rank run."""
    if any(dataset.is_regularisation_data for dataset in datasets) and config.train.regularisation_target == "base":
        return "with regularisation_target base a full-rank run learns from such pictures what the base model predicts"
    return None


RULES: tuple[Difference, ...] = (
    recipe, masters, schedule, clipping, shift, false_text, both_lengths, seed_zero, average, instruction, crops,
    masks, regularisation,
)  # fmt: skip
