"""Rules about quantised weights: refused while the file is read, with what fits a small card and what it takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from sana_tune.config.choices import PRECISIONS, REFUSED_PRECISIONS
from sana_tune.config.quantisation_rules import (
    base_is_frozen,
    fp16_needs_fp32_parts,
    quantised_is_not_compiled,
    unused_quantisation_settings,
)
from sana_tune.config.schema import Config
from sana_tune.memory import base_weights_bytes, changed, default_config, memory_needed, small_card_bytes
from sana_tune.model.facts import known
from tests.config.helpers import load_with, problems_of

PUBLISHED = "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers"


def asked(**settings: object) -> Config:
    return changed(default_config(), settings)


def test_full_rank_on_a_quantised_base_is_refused_with_the_two_ways_that_fit(tmp_path: Path):
    text = problems_of(tmp_path, {"base_model_precision": "nf4-bnb"})
    assert "base_model_precision: a quantised base must be frozen, and model_type full trains every weight" in text
    assert "model_type lora, lora_type lycoris" in text
    assert "optimizer_release_gradients true and optimizer bnb-adamw8bit" in text


def test_the_two_ways_have_the_memory_models_numbers():
    config = asked(base_model_precision="nf4-bnb", pretrained_model_name_or_path=PUBLISHED)
    priced = small_card_bytes(config, 1024, 1)
    assert priced is not None
    adapter, whole = priced
    assert adapter < 6e9 and whole < 10e9
    problem = base_is_frozen(config, (), small_card_bytes)
    assert problem is not None
    assert f"about {adapter / 1e9:.1f} GB" in problem.fix and f"about {whole / 1e9:.1f} GB" in problem.fix
    assert "(estimates for 1024 px, batch 1)" in problem.fix
    assert small_card_bytes(asked(pretrained_model_name_or_path="somebody/unknown"), 1024, 1) is None
    nano = small_card_bytes(asked(pretrained_model_name_or_path="nano", base_model_precision="int8-bnb"), 64, 2)
    assert nano is not None and nano[0] < nano[1]


def test_an_adapter_on_a_quantised_base_is_allowed_and_takes_its_bytes():
    facts = known(PUBLISHED)
    assert facts is not None
    for precision, least, most in (
        ("nf4-bnb", 0.85e9, 1.0e9),
        ("int8-bnb", 1.6e9, 1.75e9),
        ("no_change", 3.1e9, 3.3e9),
    ):
        config = asked(model_type="lora", base_model_precision=precision)
        assert base_is_frozen(config, ()) is None
        need = memory_needed(config, facts, [])
        assert least < need.weights_bytes == base_weights_bytes(facts, precision, "bf16") < most
        assert need.gradients_bytes == need.optimizer_bytes == need.ema_bytes == 0
    exact = changed(config, {"base_model_default_dtype": "fp32", "base_model_precision": "nf4-bnb"})
    rest = facts.parameters - facts.layers * sum(rows * columns for rows, columns in facts.matrices)
    more = memory_needed(exact, facts, []).weights_bytes - base_weights_bytes(facts, "nf4-bnb", "bf16")
    assert more == 2 * rest


@pytest.mark.parametrize(("key", "value"), [("dynamo_backend", "inductor"), ("mixed_precision", "fp16")])
def test_what_packed_weights_cannot_be_computed_with(key: str, value: str):
    rule = quantised_is_not_compiled if key == "dynamo_backend" else fp16_needs_fp32_parts
    config = asked(model_type="lora", base_model_precision="nf4-bnb")
    problem = rule(changed(config, {key: value}))
    assert problem is not None and problem.where == key and problem.fix
    assert rule(config) is None and rule(asked(**{key: value})) is None
    exact = changed(config, {key: value, "base_model_default_dtype": "fp32"})
    assert (rule(exact) is None) == (key == "mixed_precision")


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("int8-quanto", "int8-bnb"), ("fp8-quanto", "fp8-torchao"), ("int4-torchao", "nf4-bnb"), ("uint4-sdnq", "nf4-bnb"),
     ("fp8-native", "fp8-torchao"), ("int8-sdnq", "int8-bnb")],
)  # fmt: skip
@pytest.mark.parametrize("key", ["base_model_precision", "text_encoder_1_precision"])
def test_other_names_are_refused_with_the_nearest_that_there_is(tmp_path: Path, key: str, name: str, nearest: str):
    text = problems_of(tmp_path, {key: name})
    assert f"{key}: {name!r} cannot be used" in text and nearest in text


def test_every_refused_name_leads_to_one_that_there_is():
    assert len(REFUSED_PRECISIONS) > 20 and not set(REFUSED_PRECISIONS) & set(PRECISIONS)
    for fix in REFUSED_PRECISIONS.values():
        assert any(name in fix for name in PRECISIONS)


def test_misspelt_precision_and_pipeline(tmp_path: Path):
    assert "nf4-bnb" in problems_of(tmp_path, {"base_model_precision": "nf4"})
    text = problems_of(tmp_path, {"quantize_via": "pipeline"})
    assert "'pipeline' cannot be used here" in text and "use cpu" in text
    refused = problems_of(tmp_path, {"quantization_config": '{"a": 1}'})
    assert "base_model_precision says how the base is quantised" in refused


def test_settings_without_anything_to_act_on_are_said(tmp_path: Path):
    idle = unused_quantisation_settings(asked(quantize_via="accelerator", base_model_default_dtype="fp32"))
    assert [line.split(" has no effect")[0] for line in idle] == ["base_model_default_dtype", "quantize_via"]
    assert unused_quantisation_settings(asked(quantize_via="accelerator", text_encoder_1_precision="nf4-bnb")) == []
    loaded = load_with(tmp_path, {"quantize_via": "cpu", "base_model_default_dtype": "bf16"})
    assert not any("quantize_via" in note or "default_dtype" in note for note in loaded.notes), (
        "the defaults are no wish"
    )
