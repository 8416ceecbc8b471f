"""The settings themselves: one home each, frozen, described, and the contracts' defaults."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from sana_tune.config.datasets import DATASET_KINDS
from sana_tune.config.schema import SECTIONS, OptimizerConfig, section_of

DEFAULTS = {
    "model_type": "full",
    "learning_rate": 1e-5,
    "lr_scheduler": "constant_with_warmup",
    "lr_warmup_steps": 0,
    "optimizer": "optimi-adamw",
    "max_grad_norm": 0.1,
    "grad_clip_method": "norm",
    "mixed_precision": "bf16",
    "weights_dtype": "auto",
    "train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": True,
    "gradient_checkpointing_interval": 1,
    "caption_dropout_probability": 0.1,
    "use_ema": False,
    "ema_decay": 0.995,
    "ema_update_interval": 1,
    "flow_schedule_shift": None,
    "flow_schedule_auto_shift": False,
    "validation_guidance": 4.5,
    "validation_num_inference_steps": 20,
    "validation_negative_prompt": "",
    "validation_step_interval": 500,
    "checkpoint_step_interval": 500,
    "checkpoints_total_limit": 5,
    "aspect_bucket_rounding": 2,
    "write_batch_size": 128,
    "vae_batch_size": 4,
    "small_buckets": "fill",
    "missing_caption": "error",
    "resume_from_checkpoint": "latest",
    "resolution_type": "pixel_area",
}


@pytest.mark.parametrize("key", DEFAULTS)
def test_defaults_are_the_contracts(key: str) -> None:
    field = SECTIONS[section_of()[key]].model_fields[key]
    assert field.default == DEFAULTS[key]


def test_every_setting_is_described() -> None:
    kinds = [*SECTIONS.values(), *DATASET_KINDS.values()]
    fields = [(name, field) for kind in kinds for name, field in kind.model_fields.items()]
    assert len(fields) > 80
    assert [name for name, field in fields if not field.description] == []


def test_sections_are_frozen_and_closed() -> None:
    section = OptimizerConfig()
    with pytest.raises(ValidationError):
        section.learning_rate = 1.0  # type: ignore[misc]
    with pytest.raises(ValidationError):
        OptimizerConfig(lerning_rate=1.0)  # type: ignore[call-arg]
