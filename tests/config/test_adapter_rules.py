"""What goes with an adapter and what does not, told when the file is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sana_tune.config.adapter_rules import ADAPTER_RULES, unused_adapter_settings
from sana_tune.memory import changed, default_config


def problems(**settings: Any) -> list[str]:
    config = changed(default_config(), settings)
    return [str(problem) for rule in ADAPTER_RULES if (problem := rule(config)) is not None]


@pytest.fixture
def file(tmp_path: Path):
    def write(**content: Any) -> dict[str, str]:
        path = tmp_path / "lycoris.json"
        path.write_text(json.dumps({"algo": "lokr", "linear_dim": 4, "linear_alpha": 1, **content}))
        return {"model_type": "lora", "lycoris_config": str(path)}

    return write


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"lora_type": "standard"}, "a standard LoRA does not fit Sana"),
        ({"lora_type": "peft"}, "adapters of Sana are made by LyCORIS; found peft"),
        ({"weights_dtype": "bf16"}, "always fp32"),
        ({"dynamo_backend": "inductor"}, "not compiled"),
        ({"init_lora_step": 5}, "needs init_lora"),
        ({"init_lora_ema": "x"}, "needs init_lora"),
        ({"init_lora": "x", "init_lora_ema": "y"}, "needs use_ema"),
        ({"init_lora": "x", "init_lokr_norm": 0.1}, "keep one of them"),
        ({"init_lora": "x", "init_lora_step": 50, "max_train_steps": 50}, "must be below max_train_steps"),
    ],
)
def test_each_mistake_has_its_message(file, settings: dict[str, Any], part: str):
    (told,) = problems(**file(), **settings)
    assert part in told
    assert problems(**{key: value for key, value in settings.items() if key != "weights_dtype"}) == [], "full rank"


def test_what_is_in_the_file_is_looked_at_too(file):
    assert problems(**file()) == []
    assert "is for LoKr; " in problems(**file(algo="loha"), init_lokr_norm=0.01)[0]
    assert "DoRA needs fp32 weights" in problems(**file(dora_wd=True))[0]
    assert problems(**file(dora_wd=True), mixed_precision="no") == []
    assert "quantised base" in problems(**file(dora_wd=True), base_model_precision="nf4-bnb")[0]


def test_without_an_adapter_its_settings_have_no_effect_and_that_is_said(file):
    config = changed(default_config(), {"init_lora": "x", "lora_type": "standard"})
    assert unused_adapter_settings(config) == ["init_lora has no effect: model_type full trains every weight"]
    assert unused_adapter_settings(changed(default_config(), file())) == []
