"""The LoKr that the wizard offers: its file is the example's, and its settings fit the device."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sana_tune import memory
from sana_tune.cli import lokr, recipe
from sana_tune.cli.recipe import Target
from sana_tune.config.schema import section_of
from sana_tune.errors import UserError
from sana_tune.plan import usual_rate
from tests.cli.script import GB, SANA, model

ROOT = Path(__file__).resolve().parents[2]
UNSAFE = "Efficient-Large-Model/Sana_600M_512px_diffusers"


def test_the_file_is_the_examples():
    example = json.loads((ROOT / "config" / "lycoris_config.json.example").read_text(encoding="utf-8"))
    assert example == lokr.CONTENT
    assert (lokr.FILE.algo, lokr.FILE.full_matrix, lokr.FILE.target_module) == (
        "lokr",
        True,
        ("Attention", "GLUMBConv"),
    )


@pytest.mark.parametrize(
    "name, gigabytes, expected",
    [
        (SANA, 24, {"base_model_precision": "no_change", "mixed_precision": "bf16", "use_ema": True}),
        (SANA, 8, {"base_model_precision": "no_change", "gradient_checkpointing": True, "vae_batch_size": 1}),
        (SANA, 4, {"base_model_precision": "nf4-bnb", "text_encoder_1_precision": "nf4-bnb"}),
        (UNSAFE, 3, {"base_model_precision": "nf4-bnb", "base_model_default_dtype": "fp32", "mixed_precision": "no"}),
        (UNSAFE, 8, {"base_model_precision": "no_change", "mixed_precision": "no"}),
        ("nano", 24, {"base_model_precision": "no_change", "train_batch_size": 8, "mixed_precision": "no"}),
    ],
)
def test_settings_of_a_lokr_for_a_device(name, gigabytes, expected):
    """The base is quantised only where it does not fit as it is; the estimate counts the adapter and fits."""
    choice, target = model(name), Target(gigabytes * GB)
    size = (choice.facts.native_px,)
    settings = recipe.recommended(choice, target, size, 20, "lokr")
    assert expected.items() <= settings.items() and set(settings) <= set(section_of())
    assert settings["model_type"] == "lora" and "weights_dtype" not in settings
    assert 0 < recipe.estimated_bytes(settings, choice.facts, size) <= target.total_bytes
    told = "\n".join(recipe.reasons(settings))
    assert "the LoKr in fp32" in told
    assert ("packed in 4 bits (nf4), since it does not fit" in told) == (expected["base_model_precision"] == "nf4-bnb")
    assert ("caching: " in told) == bool({"vae_batch_size", "text_encoder_1_precision"} & settings.keys())


def test_a_cpu_never_has_a_quantised_base():
    nano = recipe.recommended(model("nano"), Target(2 * GB, on_cpu=True), (64,), 20, "lokr")
    assert nano["base_model_precision"] == "no_change" and "text_encoder_1_precision" not in nano
    with pytest.raises(UserError, match=r"a LoKr on .* needs about"):
        recipe.recommended(model(), Target(4 * GB, on_cpu=True), (1024,), 20, "lokr")


def test_the_pages_memory_is_the_plans():
    """Of the 1.6B model at 1024 px, every block recomputed, without an average."""
    rows = (ROOT / "docs" / "lokr.md").read_text(encoding="utf-8").splitlines()
    for precision, label in (("no_change", "bf16, as it is"), ("nf4-bnb", '`"base_model_precision": "nf4-bnb"`')):
        config = memory.changed(memory.default_config(), {"model_type": "lora", "base_model_precision": precision})
        needs = [
            memory.memory_needed(config, model().facts, [memory.Load(1024, 1024, batch)], adapter=lokr.FILE)
            for batch in (1, 4)
        ]
        assert f"| {label} | {' | '.join(f'{need.total_bytes / 1e9:.1f} GB' for need in needs)} |" in rows


def test_the_learning_rate_is_for_adamw():
    """The real models' is the usual one; nano needs more."""
    assert recipe.learning_rate(model(), "lokr") == usual_rate("optimi-adamw") == 1e-4
    assert recipe.learning_rate(model("nano"), "lokr") == 4e-3
    assert recipe.learning_rate(model(), "full") == 1e-5
