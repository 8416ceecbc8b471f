"""Rules about quantised weights: what cannot be trained or computed with them, and settings that do nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sana_tune.config.datasets import ImageDataset
from sana_tune.config.schema import Config
from sana_tune.errors import Problem

# What the two ways to train on a small card take (ON_QUANTISED, FULL_RANK), in bytes, for the model of a config,
# pictures of so many px a side and so many a batch; None where the model is not known.
Prices = Callable[[Config, int, int], tuple[int, int] | None]

# What trains on a small card, as changes of the settings that were asked for: an adapter on the quantised base, and
# every weight without a copy of all gradients.
ON_QUANTISED: dict[str, Any] = {"model_type": "lora"}
FULL_RANK: dict[str, Any] = {
    "base_model_precision": "no_change",
    "weights_dtype": "bf16",
    "optimizer_release_gradients": True,
    "optimizer": "bnb-adamw8bit",
    "gradient_accumulation_steps": 1,
}


def base_is_frozen(
    config: Config, datasets: Sequence[ImageDataset] = (), prices: Prices | None = None
) -> Problem | None:
    """Full-rank training changes every weight, and packed ones cannot be changed."""
    model = config.model
    if model.model_type != "full" or model.base_model_precision == "no_change":
        return None
    side, batch = _largest(datasets)
    found = None if prices is None else prices(config, side, batch)
    adapter, whole = ("", "") if found is None else (f", about {each / 1e9:.1f} GB" for each in found)
    of = "" if found is None else f" (estimates for {side} px, batch {batch})"
    what = (
        "a quantised base must be frozen, and model_type full trains every weight: steps as small as training's are "
        f"lost between the few values that a quantised weight can take; found {model.base_model_precision}"
    )
    fix = (
        "two ways fit a small card: a LoKr adapter on the quantised base (model_type lora, lora_type lycoris"
        f"{adapter}); or full rank with base_model_precision no_change, weights_dtype bf16, "
        f"optimizer_release_gradients true and optimizer bnb-adamw8bit{whole}{of}"
    )
    return Problem("base_model_precision", what, fix)


def _largest(datasets: Sequence[ImageDataset]) -> tuple[int, int]:
    """Side in px and batch of the largest pictures that are asked for; a square of the same area stands for others."""
    sides = [
        round((each.resolution * 1e6) ** 0.5 if each.resolution_type == "area" else each.resolution)
        for each in datasets
    ]
    return max(sides, default=1024), max((each.train_batch_size for each in datasets), default=1)


def quantised_is_not_compiled(config: Config) -> Problem | None:
    """Packed weights are multiplied with by kernels of their libraries, which the compiler does not see through."""
    model = config.model
    if model.dynamo_backend == "no" or model.base_model_precision == "no_change":
        return None
    what = f"a quantised base is not compiled; found {model.dynamo_backend} with {model.base_model_precision}"
    return Problem("dynamo_backend", what, "use dynamo_backend no")


def fp16_needs_fp32_parts(config: Config) -> Problem | None:
    """fp16's autocast starts from fp32: what bf16 holds would be computed with in bf16."""
    model = config.model
    quantised = model.base_model_precision != "no_change"
    if not quantised or model.mixed_precision != "fp16" or model.base_model_default_dtype == "fp32":
        return None
    what = "fp16 needs what is not quantised of the base in fp32; found base_model_default_dtype bf16"
    return Problem("mixed_precision", what, "use mixed_precision bf16, or base_model_default_dtype fp32")


QUANTISATION_RULES: tuple[Callable[[Config], Problem | None], ...] = (
    quantised_is_not_compiled,
    fp16_needs_fp32_parts,
)


def unused_quantisation_settings(config: Config) -> list[str]:
    """Notes on settings of quantisation that have nothing to act on."""
    model, notes = config.model, []
    given = {key for key, info in type(model).model_fields.items() if vars(model)[key] != info.default}
    if model.base_model_precision == "no_change" and "base_model_default_dtype" in given:
        notes.append("base_model_default_dtype has no effect: base_model_precision is no_change")
    if {model.base_model_precision, model.text_encoder_1_precision} == {"no_change"} and "quantize_via" in given:
        notes.append(
            "quantize_via has no effect: nothing is quantised (base_model_precision, text_encoder_1_precision)"
        )
    return notes
