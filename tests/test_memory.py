"""Memory: the measured numbers of the reference, what scales them, and settings that fit a device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sana_tune.config.launch_rules import LAUNCH_RULES
from sana_tune.config.schema import Config
from sana_tune.errors import UserError
from sana_tune.hardware import Device
from sana_tune.memory import (
    GIB,
    OVERHEAD_BYTES,
    CachingNeed,
    Load,
    MemoryNeed,
    caching_needed,
    changed,
    checkpointed_share,
    decide_weights,
    default_config,
    host_needed,
    memory_needed,
    plan_memory,
    recommend,
    reliefs,
    resident_needed,
    ways_to_fit,
)
from sana_tune.model.facts import ModelFacts, known

GB = 10**9
ONE = [Load(1024, 1024, 1)]


def facts_of(name: str) -> ModelFacts:
    found = known(f"Efficient-Large-Model/{name}")
    assert found is not None
    return found


@pytest.fixture(scope="module")
def facts() -> ModelFacts:
    return facts_of("Sana_1600M_1024px_BF16_diffusers")


def asked(**settings: Any) -> Config:
    """The defaults with changes."""
    return changed(default_config(), settings)


def states(need: MemoryNeed) -> float:
    """Parameters, gradients and states, GB."""
    return (need.weights_bytes + need.gradients_bytes + need.optimizer_bytes) / GB


# ---- the reference's numbers (sana.md §4) ----


def test_weights_gradients_and_states_are_the_references(facts):
    fp32 = memory_needed(asked(use_ema=True), facts, ONE)
    assert states(fp32) == pytest.approx(25.7, abs=0.05)
    assert fp32.ema_bytes / GB == pytest.approx(6.4, abs=0.05)
    assert fp32.copies_bytes == 2 * facts.parameters, "autocast keeps bf16 copies of fp32 weights"
    bf16 = memory_needed(asked(weights_dtype="bf16"), facts, ONE)
    assert states(bf16) == pytest.approx(16.0, abs=0.05)
    assert (bf16.weights_bytes, bf16.optimizer_bytes) == (2 * facts.parameters, 6 * facts.parameters)
    assert bf16.copies_bytes == bf16.ema_bytes == 0
    plain = memory_needed(asked(optimizer="torch-adamw", mixed_precision="no"), facts, ONE)
    assert states(plain) == pytest.approx(25.7, abs=0.05) and plain.copies_bytes == 0


def per_image(facts: ModelFacts, **settings: Any) -> float:
    """Activations of one picture of 1024 px, GiB."""
    return memory_needed(asked(**settings), facts, ONE).activations_bytes / GIB


def test_activations_are_those_counted(facts):
    """2.86 GiB of 1024 px in bf16, tensor by tensor (diffusers' own: 3.66), and the reference's 0.11 that stays."""
    bf16 = {"weights_dtype": "bf16"}
    assert per_image(facts, gradient_checkpointing=False, **bf16) == pytest.approx(2.86)
    assert per_image(facts, **bf16) == pytest.approx(0.11 + 2.86 / 20)
    half = per_image(facts, gradient_checkpointing_interval=2, **bf16)
    assert half == pytest.approx((2.86 + 0.11 + 2.86 / 20) / 2)
    assert per_image(facts, gradient_checkpointing=False, mixed_precision="no", **bf16) == pytest.approx(2.86)


def test_beside_fp32_weights_what_passes_between_blocks_is_fp32(facts):
    """3.43 GiB under autocast and twice the kept, counted on the model itself with saved tensors and all."""
    assert per_image(facts, gradient_checkpointing=False) == pytest.approx(3.43, rel=0.01)
    assert per_image(facts) == pytest.approx(2 * 0.11 + 3.43 / 20, rel=0.01)
    assert per_image(facts, gradient_checkpointing=False, mixed_precision="no") == pytest.approx(2 * 2.86)


def test_selective_recomputing_keeps_the_products_too(facts):
    """13 times the width of each of 1024 positions in 20 blocks: 1.11 GiB of bf16, whatever the weights are."""
    products = 13 * 2240 * 1024 * 20 * 2 / GIB
    for precision in ({"weights_dtype": "bf16"}, {}):
        found = per_image(facts, gradient_checkpointing_backend="selective", **precision)
        assert found == pytest.approx(per_image(facts, **precision) + products)
    fp32 = {"mixed_precision": "no"}
    found = per_image(facts, gradient_checkpointing_backend="selective", **fp32)
    assert found == pytest.approx(per_image(facts, **fp32) + 2 * products)


def test_a_stride_recomputes_the_first_blocks_of_each_segment(facts):
    share = checkpointed_share(asked(gradient_checkpointing_interval=2, gradient_checkpointing_segment_stride=5), 20)
    assert share == 8 / 20


@pytest.mark.parametrize(
    ("interval", "share"), [(1, 1.0), (2, 0.5), (3, 7 / 20), (19, 2 / 20), (20, 1 / 20), (99, 0.05)]
)
def test_blocks_0_n_2n_are_recomputed(interval, share):
    assert checkpointed_share(asked(gradient_checkpointing_interval=interval), 20) == share
    assert checkpointed_share(asked(gradient_checkpointing_interval=interval, gradient_checkpointing=False), 20) == 0


def test_it_scales_with_positions_width_layers_and_batch(facts):
    config = asked(gradient_checkpointing=False, weights_dtype="bf16")

    def activations(facts: ModelFacts, *loads: Load) -> float:
        return memory_needed(config, facts, loads).activations_bytes / GIB

    assert activations(facts, Load(512, 512, 1)) == pytest.approx(2.86 / 4)
    assert activations(facts, Load(512, 512, 8), Load(1024, 1024, 3), Load(2048, 512, 1)) == pytest.approx(3 * 2.86)
    assert activations(facts_of("SANA1.5_4.8B_1024px_diffusers"), *ONE) == pytest.approx(3 * 2.86)
    assert activations(facts_of("Sana_600M_1024px_diffusers"), *ONE) == pytest.approx(2.86 * 1152 * 28 / (2240 * 20))
    assert activations(facts) == 0


def test_the_total_is_the_sum_and_a_cpu_casts_nothing(facts):
    need = memory_needed(asked(use_ema=True, train_batch_size=2), facts, ONE, precision="no")
    assert need.copies_bytes == 0
    assert need.total_bytes == need.activations_bytes + 20 * facts.parameters + OVERHEAD_BYTES


def test_caching_takes_one_network_at_a_time():
    need = caching_needed(5_200_000_000, 1_250_000_000, [Load(512, 512, 4), Load(1024, 1024, 4)])
    assert 6 < need.text_bytes / GB < 7.5 and need.total_bytes == max(need.text_bytes, need.pictures_bytes)
    small = caching_needed(5_200_000_000, 1_250_000_000, [Load(512, 512, 4)])
    assert small.pictures_bytes < need.pictures_bytes and small.total_bytes == small.text_bytes


# ---- what would fit ----


def test_changed_settings_go_to_their_sections():
    config = asked()
    other = changed(config, {"use_ema": True, "weights_dtype": "bf16", "train_batch_size": 3})
    assert (other.ema.use_ema, other.model.weights_dtype, other.data.train_batch_size) == (True, "bf16", 3)
    assert not config.ema.use_ema and other.validation == config.validation


def test_nothing_need_be_changed_when_it_fits(facts):
    (way,) = ways_to_fit(asked(), facts, ONE, 40 * GB)
    assert way.changes == {}


def test_recomputing_comes_first_and_only_as_much_as_it_takes(facts):
    config = asked(gradient_checkpointing=False, train_batch_size=8)
    loads = [Load(1024, 1024, 8)]
    best, *others = ways_to_fit(config, facts, loads, 47 * GB)
    assert best.changes == {"gradient_checkpointing": True, "gradient_checkpointing_interval": 2}
    assert best.total_bytes <= 47 * GB
    looser = changed(config, {**best.changes, "gradient_checkpointing_interval": 3})
    assert memory_needed(looser, facts, loads).total_bytes > 47 * GB
    assert {"train_batch_size": 4, "gradient_accumulation_steps": 2} in [way.changes for way in others]
    assert all(way.total_bytes <= 47 * GB for way in others)


def test_the_batch_is_divided_so_that_a_step_sees_as_many_pictures(facts):
    config = asked(train_batch_size=6, gradient_accumulation_steps=2)
    ways = ways_to_fit(config, facts, [Load(1024, 1024, 6)], int(31.5 * GB))
    assert ways[0].changes == {"train_batch_size": 3, "gradient_accumulation_steps": 4}


def test_precision_and_the_average_come_last(facts):
    config = asked(use_ema=True, optimizer="torch-adamw")
    ways = ways_to_fit(config, facts, ONE, int(25.8 * GB))
    assert ways[0].changes == {"weights_dtype": "bf16", "optimizer": "optimi-adamw"}
    assert all({"use_ema", "optimizer_release_gradients"} & {*way.changes} or "8bit" in str(way) for way in ways[1:])
    ways = ways_to_fit(config, facts, ONE, 20 * GB)
    kahan = {"weights_dtype": "bf16", "optimizer": "optimi-adamw"}
    assert ways[0].changes == {"ema_device": "cpu", **kahan}
    assert {**kahan, "use_ema": False} in [way.changes for way in ways]
    assert ways_to_fit(config, facts, ONE, 6 * GB) == ()


def test_fp32_compute_can_become_bf16(facts):
    config, loads = asked(mixed_precision="no", gradient_checkpointing=False), [Load(1024, 1024, 2)]
    ways = [way.changes for way in ways_to_fit(config, facts, loads, 38 * GB)]
    assert {"mixed_precision": "bf16"} in ways
    on_cpu = ways_to_fit(asked(gradient_checkpointing=False), facts, loads, 38 * GB, precision="no")
    precision = {"mixed_precision", "weights_dtype", "optimizer"}
    assert on_cpu and not any(precision & {*way.changes} for way in on_cpu)


def test_the_plan_says_whether_it_fits_and_what_would(facts):
    caching = CachingNeed(7 * GB, 3 * GB)

    def plan(device: Device | None):
        return plan_memory(asked(), facts, ONE, caching, device)

    unknown = plan(None)
    assert unknown.fits and unknown.caching_fits and unknown.to_json()["device"] is None
    large = plan(Device("large", 80 * GB, 1))
    assert large.fits and large.ways == ()
    small = plan(Device("small", 26 * GB, 1))
    assert not small.fits and small.caching_fits and small.ways[0].changes == {"weights_dtype": "bf16"}
    tiny = plan(Device("tiny", 6 * GB, 1))
    assert not tiny.caching_fits and tiny.ways == ()
    told = json.loads(json.dumps(small.to_json()))
    assert told["need"]["total_bytes"] == small.need.total_bytes > sum(told["need"].values()) / 2 - 1
    assert (told["fits"], told["device"]["name"], told["caching"]["total_bytes"]) == (False, "small", 7 * GB)


# ---- recommendations ----


@pytest.mark.parametrize(
    ("vram", "ema", "expected"),
    [
        (24, True, {"weights_dtype": "bf16", "train_batch_size": 2, "gradient_checkpointing_interval": 1}),
        (24, False, {"weights_dtype": "bf16", "train_batch_size": 4, "gradient_checkpointing_interval": 2}),
        (16, False, {"weights_dtype": "bf16", "optimizer_release_gradients": True, "optimizer": "optimi-adamw"}),
        (12, False, {"weights_dtype": "bf16", "optimizer": "bnb-adamw8bit"}),
        (10, False, {"optimizer_release_gradients": True, "optimizer": "bnb-adamw8bit"}),
        (48, True, {"weights_dtype": "fp32", "train_batch_size": 4}),
        (80, True, {"weights_dtype": "fp32", "train_batch_size": 4, "gradient_checkpointing": False}),
    ],
)
def test_cards_get_what_fits_them(vram, ema, expected, facts):
    found = recommend(facts, vram * GIB, 1024, 1024, use_ema=ema)
    assert expected.items() <= found.items() and found["use_ema"] == ema
    released = found.get("optimizer_release_gradients", False)
    assert found["train_batch_size"] * found["gradient_accumulation_steps"] == (1 if released else 4)
    load = Load(1024, 1024, found["train_batch_size"])
    assert memory_needed(changed(asked(), found), facts, [load]).total_bytes < 0.95 * vram * GIB


def test_the_average_is_given_up_before_the_run(facts):
    assert recommend(facts, 20 * GIB, 1024, 1024, use_ema=True)["use_ema"] is False


def test_what_no_setting_makes_fit_is_said(facts):
    with pytest.raises(UserError, match=r"needs about 8\.\d GB; the device has 8\.6 GB.*\n.*smaller model"):
        recommend(facts, 8 * GIB, 1024, 1024, use_ema=True)


def test_encoders_that_stay_are_counted_and_leave_less_room(facts):
    load, gemma, vae = Load(1024, 1024, 4), 5_228_000_000, 1_250_000_000
    assert resident_needed(0, 0, [load]) == 0
    text, both = resident_needed(gemma, 0, [load]), resident_needed(gemma, vae, [load])
    one = resident_needed(0, vae, [Load(1024, 1024, 1)])
    assert gemma < text < gemma + 1e9 and vae < one < both - text
    device = Device("GPU", 36 * GIB, 36 * GIB)
    caching = caching_needed(gemma, vae, [load])
    plain = plan_memory(asked(), facts, ONE, caching, device)
    beside = plan_memory(asked(), facts, ONE, caching, device, resident_bytes=both)
    assert beside.need.total_bytes == plain.need.total_bytes + both and not beside.fits
    assert all(both < way.total_bytes <= device.total_bytes for way in beside.ways) and beside.ways
    assert plan_memory(asked(), facts, ONE, caching, device, resident_bytes=37 * GIB).ways == ()


def test_a_cpu_computes_in_fp32(facts):
    found = recommend(facts, 64 * GIB, 1024, 1024, use_ema=False, on_cpu=True)
    assert (found["mixed_precision"], found["weights_dtype"]) == ("no", "fp32")


# ---- the average ----


def test_an_average_in_main_memory_takes_none_of_the_card(facts):
    for settings in ({"ema_device": "cpu"}, {"ema_cpu_only": True}):
        config = asked(use_ema=True, weights_dtype="bf16", **settings)
        need = memory_needed(config, facts, ONE)
        assert need.ema_bytes == 0 and host_needed(config, facts, need) == 6 * facts.parameters
        on_cpu = memory_needed(config, facts, ONE, precision="no", on_cpu=True)
        assert on_cpu.ema_bytes == 6 * facts.parameters, "the average, and the copies of the weights it is made from"
        assert host_needed(asked(**settings), facts, need) == 0
    beside = asked(use_ema=True)
    assert memory_needed(beside, facts, ONE, on_cpu=True).ema_bytes == 4 * facts.parameters
    assert host_needed(beside, facts, memory_needed(beside, facts, ONE)) == 0


def test_the_plan_tells_main_memory_beside_a_card(facts):
    config, caching = asked(use_ema=True, ema_device="cpu"), CachingNeed(7 * GB, 3 * GB)
    assert plan_memory(config, facts, ONE, caching, Device("card", 80 * GB, 1)).host_bytes == 8 * facts.parameters
    assert plan_memory(config, facts, ONE, caching, Device("cpu", 80 * GB, 1, "cpu")).host_bytes == 0


def test_moving_the_average_comes_before_precision_and_before_giving_it_up(facts):
    ways = [way.changes for way in ways_to_fit(asked(use_ema=True), facts, ONE, 33 * GB)]
    assert ways[0] == {"ema_device": "cpu"} and {"use_ema": False} in ways
    on_cpu = [way.changes for way in ways_to_fit(asked(use_ema=True), facts, ONE, 33 * GB, on_cpu=True)]
    assert {"use_ema": False} in on_cpu and not any("ema_device" in changes for changes in on_cpu)


# ---- optimizers and released gradients ----


@pytest.mark.parametrize(
    ("settings", "weights", "states"),
    [
        ({"optimizer": "optimi-lion"}, 4, 4),
        ({"optimizer": "optimi-lion", "weights_dtype": "bf16"}, 2, 4),
        ({"optimizer": "adamw_bf16", "weights_dtype": "bf16"}, 2, 4),
        ({"optimizer": "bnb-lion8bit", "weights_dtype": "bf16"}, 2, 1.016),
        ({"optimizer": "bnb-lion8bit-paged", "weights_dtype": "bf16"}, 2, 0),
        ({"optimizer": "optimi-sgd", "optimizer_config": "momentum=0.9"}, 4, 4),
    ],
)
def test_states_count_what_the_optimizer_holds(facts, settings, weights, states):
    need = memory_needed(asked(**settings), facts, ONE)
    assert need.weights_bytes == weights * facts.parameters
    rounded = settings.get("weights_dtype") == "bf16" and not settings["optimizer"].startswith("optimi")
    rounding = 16 * 5 * facts.width**2 * rounded
    assert need.optimizer_bytes == pytest.approx(states * facts.parameters + rounding, rel=0.01)


def test_a_cpu_pages_nothing_out(facts):
    config = asked(optimizer="bnb-lion8bit-paged", weights_dtype="bf16")
    assert memory_needed(config, facts, ONE, on_cpu=True).optimizer_bytes > facts.parameters


def test_released_gradients_are_those_of_two_layers(facts):
    released = memory_needed(asked(optimizer_release_gradients=True, weights_dtype="bf16"), facts, ONE)
    assert released.gradients_bytes == 2 * 2 * 5 * facts.width**2 < 0.04 * 2 * facts.parameters


def test_full_rank_fits_a_small_card(facts):
    """The aims of the 1.6B model at 1024 px, one picture, every block recomputed."""
    base = {"weights_dtype": "bf16", "optimizer_release_gradients": True, "max_grad_norm": 0}
    for changes, most in (
        ({"optimizer": "bnb-lion8bit"}, 10),
        ({"optimizer": "optimi-lion"}, 12),
        ({"optimizer": "optimi-adamw", "use_ema": True, "ema_device": "cpu"}, 16),
    ):
        assert memory_needed(asked(**base, **changes), facts, ONE).total_bytes < most * GB


def test_a_small_card_is_told_of_both(facts):
    ways = [way.changes for way in ways_to_fit(asked(), facts, ONE, int(9.5 * GB))]
    assert {"weights_dtype": "bf16", "optimizer_release_gradients": True, "optimizer": "bnb-adamw8bit"} in ways
    for way in ways_to_fit(asked(train_batch_size=4), facts, [Load(1024, 1024, 4)], 16 * GB):
        released = way.changes.get("optimizer_release_gradients")
        assert not released or way.changes.get("gradient_accumulation_steps", 1) == 1


def test_auto_weights(facts):
    large, small = Device("large", 80 * GB, 1), Device("small", 24 * GB, 1)
    config = asked()
    assert decide_weights(config, facts, ONE, large).dtype == "fp32"
    found = decide_weights(config, facts, ONE, small)
    assert found.dtype == "bf16" and "Kahan summation keeps" in found.why and "small has 24.0 GB" in found.why
    rounded = decide_weights(changed(config, {"optimizer": "torch-adamw"}), facts, ONE, small)
    assert rounded.dtype == "bf16" and "stochastic rounding keeps" in rounded.why
    assert decide_weights(changed(config, {"optimizer_config": "kahan_sum=false"}), facts, ONE, small).dtype == "fp32"
    assert decide_weights(config, facts, ONE, None).dtype == "fp32"
    assert decide_weights(config, facts, ONE, Device("cpu", 8 * GB, 1, "cpu")).dtype == "fp32"
    assert decide_weights(config, facts, ONE, small, precision="fp16").dtype == "fp32"
    assert decide_weights(config, facts, ONE, large, held="bf16").why == "as in the checkpoint"
    assert decide_weights(changed(config, {"weights_dtype": "fp32"}), facts, ONE, small).why == "as asked"


# ---- the untrained model beside the one that is trained ----


def test_the_base_model_is_priced_in_the_dtype_that_is_computed_in(facts):
    for settings, bytes_each in (
        ({}, 2),
        ({"weights_dtype": "bf16"}, 2),
        ({"mixed_precision": "no"}, 4),
    ):
        plain = memory_needed(asked(**settings), facts, ONE)
        with_base = memory_needed(asked(regularisation_target="base", **settings), facts, ONE)
        assert plain.base_bytes == 0 and with_base.base_bytes == bytes_each * facts.parameters
        assert with_base.total_bytes - plain.total_bytes == with_base.base_bytes


def test_a_run_that_does_not_fit_beside_the_base_model_can_do_without_it(facts):
    config = asked(regularisation_target="base")
    least = min(
        memory_needed(changed(config, way.changes), facts, ONE).total_bytes
        for way in ways_to_fit(config, facts, ONE, 200 * GB)
    )
    small = memory_needed(asked(weights_dtype="bf16", gradient_checkpointing_interval=1), facts, ONE).total_bytes
    ways = ways_to_fit(config, facts, ONE, small)
    assert least > small and any(way.changes.get("regularisation_target") == "data" for way in ways)


# ---- what each setting frees alone ----


def test_each_lever_alone_frees_what_the_plan_says(facts: ModelFacts):
    config = asked(weights_dtype="fp32", gradient_checkpointing=False, use_ema=True, train_batch_size=4)
    loads = [Load(1024, 1024, 4)]
    found = reliefs(config, facts, loads)
    assert [relief.freed_bytes for relief in found] == sorted((each.freed_bytes for each in found), reverse=True)
    names = {next(iter(relief.changes)) for relief in found}
    assert names == {"gradient_checkpointing", "train_batch_size", "weights_dtype", "optimizer_release_gradients",
                     "optimizer", "ema_device", "use_ema"}  # fmt: skip
    now = memory_needed(config, facts, loads).total_bytes
    for relief in found:
        size = relief.changes.get("train_batch_size", 4)
        then = memory_needed(changed(config, relief.changes), facts, [Load(1024, 1024, size)]).total_bytes
        assert now - then == relief.freed_bytes > 0
    by_name = {next(iter(relief.changes)): relief for relief in found}
    assert by_name["use_ema"].freed_bytes == 4 * facts.parameters
    assert by_name["gradient_checkpointing"].changes["gradient_checkpointing_interval"] == 1, "what frees most"
    assert by_name["train_batch_size"].changes == {"train_batch_size": 1, "gradient_accumulation_steps": 4}


def test_what_a_checkpoint_fixes_is_not_offered(facts: ModelFacts):
    config = asked(weights_dtype="fp32")
    found = reliefs(config, facts, ONE, fixed={"weights_dtype", "optimizer"})
    assert not any(relief.changes.keys() & {"weights_dtype", "optimizer"} for relief in found)
    assert {"optimizer_release_gradients": True} in [relief.changes for relief in found]


def test_what_frees_nothing_is_not_told(facts: ModelFacts):
    config = asked(weights_dtype="bf16", optimizer="bnb-adamw8bit", optimizer_release_gradients=True)
    assert reliefs(config, facts, ONE) == ()


# ---- several processes ----


def split(tmp_path: Path, **settings: Any) -> Config:
    """The settings with FSDP2 over eight processes."""
    content = {"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 2}, "num_processes": 8}
    (tmp_path / "fsdp.yaml").write_text(json.dumps(content))
    return asked(accelerate_config=str(tmp_path / "fsdp.yaml"), num_processes=8, **settings)


def test_each_of_several_processes_takes_what_one_does_unless_the_model_is_split(facts: ModelFacts, tmp_path: Path):
    settings: dict[str, Any] = {"use_ema": True, "weights_dtype": "fp32"}
    one = memory_needed(asked(**settings), facts, ONE)
    assert memory_needed(asked(num_processes=8, **settings), facts, ONE) == one
    part = memory_needed(split(tmp_path, **settings), facts, ONE)
    block = one.weights_bytes / facts.layers
    for name in ("weights_bytes", "gradients_bytes"):
        assert getattr(part, name) == pytest.approx(getattr(one, name) / 8 + 2 * block, abs=4)
    assert (part.optimizer_bytes, part.ema_bytes) == (one.optimizer_bytes // 8, one.ema_bytes // 8)
    assert part.activations_bytes == one.activations_bytes
    assert states(one) > 24 > part.total_bytes / GB, "it fits a card of 24 GB"


def test_an_average_in_main_memory_is_split_too(facts: ModelFacts, tmp_path: Path):
    config = split(tmp_path, use_ema=True, ema_device="cpu")
    assert host_needed(config, facts, memory_needed(config, facts, ONE)) == 8 * facts.parameters // 8


def test_what_several_processes_cannot_do_is_not_offered(facts: ModelFacts, tmp_path: Path):
    settings: dict[str, Any] = {"weights_dtype": "fp32", "gradient_checkpointing": False, "use_ema": True}
    config = asked(num_processes=2, **settings)
    offered = {name for relief in reliefs(config, facts, ONE) for name in relief.changes}
    assert "optimizer_release_gradients" not in offered and "optimizer" in offered and "weights_dtype" in offered
    offered = {name for relief in reliefs(split(tmp_path, **settings), facts, ONE) for name in relief.changes}
    assert not offered & {"optimizer_release_gradients", "optimizer", "weights_dtype"} and "ema_device" in offered
    for many in (config, split(tmp_path, **settings)):
        for way in ways_to_fit(many, facts, ONE, 12 * 10**9):
            assert not any(rule(changed(many, way.changes)) for rule in LAUNCH_RULES)


def test_split_weights_stay_fp32(facts: ModelFacts, tmp_path: Path):
    small = Device("a card", 8 * GB, 1)
    assert decide_weights(asked(), facts, ONE, small).dtype == "bf16"
    weights = decide_weights(split(tmp_path), facts, ONE, small, held="bf16")
    assert weights.dtype == "fp32" and "FSDP2 splits them" in weights.why
