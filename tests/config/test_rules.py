"""Rules between settings, each alone (their messages in the whole are in test_load)."""

from __future__ import annotations

from pathlib import Path

from sana_tune.config.rules import bf16_needs_kahan, check_rules, downsample_needs_both, needs_instance_prompt
from tests.config.helpers import load_with


def test_rules_pass_on_good_settings(tmp_path: Path) -> None:
    loaded = load_with(tmp_path, {}, {"caption_strategy": "instanceprompt", "instance_prompt": "a zib"})
    notes: list[str] = []
    assert check_rules(loaded.config, loaded.datasets, notes) == [] and notes == []


def test_each_rule_can_fail(tmp_path: Path) -> None:
    loaded = load_with(tmp_path, {"weights_dtype": "bf16"})
    config, dataset = loaded.config, loaded.datasets[0]
    assert needs_instance_prompt(config, dataset.model_copy(update={"prepend_instance_prompt": True}))
    assert downsample_needs_both(config, dataset.model_copy(update={"crop": True, "maximum_image_size": 64.0}))
    assert bf16_needs_kahan(config) is None
    adamw = config.optimizer.model_copy(update={"optimizer": "torch-adamw"})
    assert bf16_needs_kahan(config.model_copy(update={"optimizer": adamw}))


def test_regularisation_data_is_said_aloud(tmp_path: Path) -> None:
    loaded = load_with(tmp_path, {}, {"is_regularisation_data": True})
    assert any("is_regularisation_data is not built yet" in note for note in loaded.notes)
