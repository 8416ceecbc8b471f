"""The search for settings that fit: the order, what is kept, what is missing, and what trying changes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from sana_tune.config.choices import OPTIMIZERS
from sana_tune.fitting import (
    COSTS,
    Candidate,
    Tried,
    Wanted,
    at_size,
    candidates,
    choose,
    drawing_needed,
    fitting,
    footprint,
    missing,
)
from sana_tune.memory import SPARE, Load, changed, default_config
from sana_tune.model.facts import TEXT_ENCODER_BYTES, VAE_BYTES, ModelFacts, known

GB = 10**9
OWNER = "Efficient-Large-Model"


def facts_of(name: str) -> ModelFacts:
    found = known(f"{OWNER}/{name}")
    assert found is not None
    return found


FACTS = facts_of("Sana_1600M_1024px_BF16_diffusers")
PLAIN: dict[str, Any] = {"train_batch_size": 4, "use_ema": True, "gradient_checkpointing": False}


def wanted(gigabytes: float, facts: ModelFacts = FACTS, **settings: Any) -> Wanted:
    """The 1.6B model at 1024 px on such a card: four pictures a step and an average, unless changed."""
    config = changed(default_config(), {**PLAIN, **settings})
    side, batch = facts.native_px, config.data.train_batch_size
    return Wanted(
        config,
        facts,
        (Load(side, side, batch),),
        (Load(side, side, config.data.vae_batch_size),),
        ((side, side),),
        int(gigabytes * GB),
        TEXT_ENCODER_BYTES,
        VAE_BYTES,
    )


def chosen(gigabytes: float, **settings: Any) -> Candidate:
    found = choose(wanted(gigabytes, **settings)).chosen
    assert found is not None
    return found


CARDS = {8: "lion", 10: "eight", 12: "eight", 16: "eight", 24: "bf16", 48: None, 80: None}


@pytest.mark.parametrize("gigabytes", CARDS)
def test_every_card_gets_what_fits_it_with_a_margin(gigabytes):
    one = chosen(gigabytes)
    assert one.footprint.most_bytes <= gigabytes * GB * (1 - SPARE)
    last = CARDS[gigabytes]
    assert last is None or last in one.given_up
    harder = {"bf16": ("eight", "lion"), "eight": ("lion",), None: ("bf16", "eight", "lion")}.get(last, ())
    assert not set(harder) & set(one.given_up), "no more is given up than must be"


def test_pictures_a_step_stay():
    for gigabytes in CARDS:
        config = changed(wanted(gigabytes).config, chosen(gigabytes).changes)
        assert config.data.train_batch_size * config.train.gradient_accumulation_steps == 4
        assert not config.optimizer.optimizer_release_gradients or config.train.gradient_accumulation_steps == 1


def test_the_order_is_that_of_the_table():
    """A card that becomes smaller and smaller gives up more and more; what costs least goes first."""
    costs = [chosen(gigabytes).cost for gigabytes in (100, 48, 32, 24, 16, 12, 10, 8)]
    assert costs == sorted(costs) and costs[0] == 0
    assert [cost for cost, _ in COSTS.values()] == sorted(cost for cost, _ in COSTS.values())
    found = list(candidates(wanted(10)))
    assert found[0].changes.keys() <= {"vae_batch_size", "vae_enable_tiling"} and found[0].cost == 0
    assert [one.cost for one in found] == sorted(one.cost for one in found) and len(found) > 200


def test_ten_gigabytes_hold_the_full_rank():
    """Issue: 1.6B at 1024 px, batch 1, under 10 GB."""
    one = chosen(10, train_batch_size=1, use_ema=False)
    assert one.changes == {
        "weights_dtype": "bf16", "optimizer": "bnb-adamw8bit", "optimizer_release_gradients": True,
        "gradient_checkpointing": True, "gradient_checkpointing_interval": 1, "vae_batch_size": 2,
        "vae_enable_tiling": True,
    }  # fmt: skip
    assert one.footprint.training.total_bytes / GB == pytest.approx(8.24, abs=0.01)


def test_every_optimizer_finds_its_way():
    for name in OPTIMIZERS:
        one = chosen(10, optimizer=name, train_batch_size=1)
        assert one.changes.get("optimizer", name) in OPTIMIZERS
    assert chosen(10, optimizer="optimi-lion").changes["optimizer"] == "bnb-lion8bit"
    assert "learning_rate" not in chosen(10, optimizer="optimi-lion").changes


def test_lion_gets_a_fifth_of_the_rate():
    one = chosen(8, learning_rate=1e-5)
    assert (one.changes["optimizer"], one.changes["learning_rate"]) == ("bnb-lion8bit-paged", 2e-6)


def test_options_of_another_optimizer_do_not_stay():
    assert chosen(10, optimizer_config="kahan_sum=true").changes["optimizer_config"] is None
    off = chosen(24, optimizer_config="kahan_sum=false")
    assert off.changes["weights_dtype"] == "bf16" and off.changes["optimizer_config"] is None


def test_weights_that_break_in_bf16_stay_in_fp32():
    small = wanted(24, facts_of("Sana_600M_1024px_diffusers"), mixed_precision="no", weights_dtype="fp32")
    assert not {"bf16", "eight", "lion"} & {word for one in candidates(small) for word in one.given_up}
    assert choose(small).chosen is not None


def test_accumulated_pictures_come_at_once_where_gradients_are_released():
    one = chosen(10, train_batch_size=1, gradient_accumulation_steps=4)
    assert one.changes["optimizer_release_gradients"] is True
    assert (one.changes["train_batch_size"], one.changes["gradient_accumulation_steps"]) == (4, 1)
    assert one.footprint.training.activations_bytes == chosen(10).footprint.training.activations_bytes


def test_fewer_pictures_a_step_are_the_last_resort():
    one = chosen(8, train_batch_size=32)
    assert "fewer" in one.given_up and one.changes["train_batch_size"] < 32


def test_batches_of_the_datasets_own_are_left_alone():
    asked = replace(wanted(24), fixed_batches=True, fixed_encoding=True)
    for one in candidates(asked):
        assert not {"train_batch_size", "gradient_accumulation_steps", "vae_batch_size"} & one.changes.keys()
    twice = replace(wanted(10, gradient_accumulation_steps=2), fixed_batches=True)
    assert not any("release" in one.given_up for one in candidates(twice)), "they could not be accumulated"


def test_drawing_and_caching_must_fit_too():
    one = wanted(10, train_batch_size=1, use_ema=False)
    whole, tiled = (
        footprint(one, changed(one.config, {"vae_enable_tiling": tiled}), one.loads).drawing_bytes
        for tiled in (False, True)
    )
    assert whole - tiled == (1024**2 - 512**2) * 128 * 5 * 4
    need = footprint(one, one.config, one.loads).training
    assert drawing_needed(need, VAE_BYTES, (), False) == 0
    undrawn = replace(one, drawn=())
    found = choose(undrawn).chosen
    assert found is not None and "vae_enable_tiling" not in found.changes


def test_encoders_that_stay_count():
    asked = replace(wanted(24), resident_bytes=5 * GB)
    one = choose(asked).chosen
    assert one is not None and one.footprint.training.resident_bytes == 5 * GB and one.cost > chosen(24).cost


# ---- nothing fits ----


def test_what_is_missing_and_what_would_fit():
    asked = wanted(10, facts_of("SANA1.5_4.8B_1024px_diffusers"))
    assert choose(asked).chosen is None
    lacks = missing(asked)
    assert lacks.least.footprint.most_bytes - asked.room_bytes == lacks.missing_bytes > 0
    assert any("SANA1.5_1.6B_1024px_diffusers" in words for words in lacks.instead)
    for words in lacks.instead:
        assert "smaller model" in words or next(fitting(at_size(asked, asked.facts, 512)))


def test_a_smaller_size_that_fits_is_named():
    asked = wanted(8, facts_of("Sana_1600M_4Kpx_BF16_diffusers"), train_batch_size=1)
    lacks = missing(asked)
    assert choose(asked).chosen is None and lacks.instead[0] == "pictures of 768 px (resolution 768)"


def test_the_text_encoder_can_be_what_is_too_large():
    assert "filled on a larger card" in missing(wanted(6)).instead[0]


# ---- trying ----


def test_trying_goes_on_to_what_takes_less():
    """A card on which everything takes a sixth more than estimated."""
    seen: list[int] = []

    def trial(one: Candidate) -> Tried:
        peak = round(one.footprint.training.total_bytes * 7 / 6)
        seen.append(peak)
        return Tried("out of memory" if peak > 24 * GB else "", peak, 0.5)

    found = choose(wanted(24), trial)
    assert found.chosen is not None and found.tried is not None and found.tried.peak_bytes == seen[-1] <= 24 * GB
    assert seen == sorted(seen, reverse=True) and len(found.failed) == len(seen) - 1
    first = choose(wanted(24), lambda one: Tried())
    assert first.chosen == choose(wanted(24)).chosen and not first.failed


def test_trying_ends():
    found = choose(wanted(80), lambda one: Tried("out of memory"))
    assert found.chosen is None and 1 < len(found.failed) <= 8
