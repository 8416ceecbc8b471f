"""What SimpleTuner would have done otherwise is told of its files, and of ours nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sana_tune.config.differences import RULES, THEIR_DEFAULTS
from sana_tune.config.load import load
from tests.config.helpers import load_with, write_list


def told(folder: Path, config: dict[str, Any], dataset: dict[str, Any] | None = None) -> str:
    notes = load_with(folder, config, dataset).notes
    return " | ".join(note for note in notes if "SimpleTuner" in note)


CASES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "the recipe": ({}, {}, "noise levels are NVIDIA's"),
    "bf16": ({"mixed_precision": "bf16"}, {}, "fp32 master weights"),
    "cosine": ({"lr_scheduler": "cosine_with_warmup"}, {}, "falls to lr_end once"),
    "clipping": ({"max_grad_norm": 1}, {}, "norm of the whole gradient"),
    "shift": ({"flow_schedule_shift": 4}, {}, "flow_schedule_shift takes effect"),
    "false": ({"gradient_checkpointing": "false"}, {}, 'the text "false"'),
    "both lengths": ({"max_train_steps": 5, "num_train_epochs": 2}, {}, "the first reached ends the run"),
    "seed 0": ({"seed": 0}, {}, "seed like any other"),
    "uniform": ({"flow_use_uniform_schedule": True}, {}, "noise levels are of the distribution uniform"),
    "loss": ({"loss_type": "huber", "snr_gamma": 5}, {}, "loss_type and snr_gamma take effect"),
    "average": ({"use_ema": True, "ema_update_interval": 5}, {}, "ema_decay is per step"),
    "instruction": ({"sana_complex_human_instruction": ["a", "b"]}, {}, "all lines"),
    "crops": ({}, {"crop": True, "maximum_image_size": 64, "target_downsample_size": 64}, "only pictures above"),
    "regularisation": ({"regularisation_target": "base"}, {"is_regularisation_data": True}, "what the base model"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_difference_is_told_where_it_matters(name: str, tmp_path: Path) -> None:
    config, dataset, expected = CASES[name]
    assert expected in told(tmp_path, config, dataset)
    if config or dataset:
        quiet = told(tmp_path, {"weights_dtype": "fp32"})
        assert expected not in quiet, "not told of a file that does not ask for it"


def test_every_rule_has_its_case() -> None:
    assert len(RULES) == 13 and len(CASES) == 14  # masks need an entry of their own


def test_masks_are_told_apart(tmp_path: Path) -> None:
    entries = [
        {"id": "d", "instance_data_dir": "d", "conditioning_data": "m"},
        {"id": "m", "dataset_type": "conditioning", "instance_data_dir": "m"},
    ]
    notes = load(write_list(tmp_path, {}, entries), {}, {}).notes
    assert any("the loss is the mean over what they mark" in note for note in notes)


def test_open_defaults_are_told_and_given_ones_are_not(tmp_path: Path) -> None:
    said = told(tmp_path, {"learning_rate": 1e-5})
    assert (
        "train_batch_size 1 (4)" in said and "learning_rate 1" not in said and "validation_guidance 4.5 (7.5)" in said
    )
    given = {key: value for key, value in THEIR_DEFAULTS.items() if key != "optimizer"}
    assert "defaults" not in told(tmp_path, {**given, "optimizer": "torch-adamw"})


def test_nothing_is_said_of_a_file_of_ours(tmp_path: Path) -> None:
    assert told(tmp_path, {"$schema": "…/sana_tune/assets/schemas/config.schema.json", "seed": 0}) == ""
    assert told(tmp_path, {"__origins__": {}, "seed": 0}) == ""
