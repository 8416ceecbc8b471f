"""The plan: how long, how much, how big, before anything heavy. Every number is worked out by hand here."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sana_tune.config.schema import Config
from sana_tune.data.buckets import Bucket, trained
from sana_tune.data.geometry import Size
from sana_tune.data.order import timeline_of
from sana_tune.data.records import Role
from sana_tune.data.survey import DatasetLedger, Ledger
from sana_tune.data.timeline import Window
from sana_tune.errors import UserError
from sana_tune.hardware import Device
from sana_tune.memory import Load, MemoryPlan, caching_needed, plan_memory
from sana_tune.model.facts import ModelFacts, known
from sana_tune.model.levels import Levels
from sana_tune.plan import (
    CacheNeed,
    DatasetPlan,
    Plan,
    checkpoint_bytes,
    dataset_lines,
    human_bytes,
    human_time,
    latent_bytes,
    length_line,
    levels_of,
    loads_of,
    make_plan,
    memory_lines,
    memory_warnings,
    noise_lines,
    pace_of,
    plan_lines,
    rate_line,
    saving_line,
    saving_plan,
    schedule_lines,
    text_bytes,
    time_lines,
    total_steps,
)
from sana_tune.progress import Every
from tests.config.helpers import load_with

NAME = "Efficient-Large-Model/Sana_600M_512px_diffusers"


def config(folder: Path, **settings: Any) -> Config:
    return load_with(folder, settings).config


@pytest.fixture(scope="module")
def facts() -> ModelFacts:
    found = known(NAME)
    assert found is not None and (found.vae_factor, found.native_px) == (32, 512)
    return found


# Two micro-batches and a third that is filled up, and two of two.
BUCKETS = (
    Bucket("cats", Size(512, 512), tuple(range(10)), 4),
    Bucket("cats", Size(384, 640), (10, 11), 1),
)


def plan(folder: Path, facts: ModelFacts, caches: tuple[CacheNeed, ...] = (), **settings: Any) -> Plan:
    return make_plan(
        config(folder, **settings), facts, BUCKETS, caches, first_step=0, disk_free_bytes=10**12, notes=["a note"] * 2
    )


@pytest.mark.parametrize(
    ("steps", "epochs", "expected"),
    [
        (None, None, 3),  # one epoch of 5 micro-batches, 2 a step
        (0, 0, 3),
        (7, None, 7),
        (None, 2, 5),
        (None, 0.5, 2),
        (4, 2, 4),
        (9, 2, 5),
        (9, 0, 9),
    ],
)
def test_the_first_of_steps_and_epochs_ends_the_run(steps, epochs, expected, tmp_path):
    asked = {
        key: value for key, value in (("max_train_steps", steps), ("num_train_epochs", epochs)) if value is not None
    }
    assert total_steps(config(tmp_path, **asked), 5, 2) == expected


def test_the_length_and_what_is_seen(tmp_path, facts):
    made = plan(tmp_path, facts, gradient_accumulation_steps=2, num_train_epochs=4, checkpoint_step_interval=3)
    assert (made.micro_batches_per_epoch, made.micro_batches_per_step, made.steps_per_epoch) == (5, 2, 2.5)
    assert (made.total_steps, made.epochs) == (10, 4.0)
    assert made.images_seen == 4 * (3 * 4 + 2 * 1)  # fill-ins are seen like the others
    assert [(part.micro_batches, part.filled) for part in made.buckets] == [(3, 2), (2, 0)]
    assert made.save_every == Every(3) and made.validate_every == Every(500)
    assert made.notes[0] == "a note" and made.notes.count("a note") == 1
    assert json.loads(json.dumps(made.to_json()))["buckets"][1]["height_px"] == 640


def test_the_shift_is_the_models_the_users_or_grows_with_the_bucket(tmp_path, facts):
    assert [bucket.flow_shift for bucket in plan(tmp_path, facts).buckets] == [facts.flow_shift] * 2
    assert plan(tmp_path, facts, flow_schedule_shift=2.5).shift_of(512, 512) == 2.5
    auto = plan(tmp_path, facts, flow_schedule_auto_shift=True, flow_schedule_shift=2.5)
    assert auto.shift_of(512, 512) == facts.flow_shift
    assert auto.shift_of(384, 640) == pytest.approx(facts.flow_shift * math.sqrt(12 * 20 / 16**2), abs=1e-4)
    assert auto.flow_shift == facts.flow_shift, "the run's shift is told as it is used"
    assert any("flow_schedule_shift is not used" in note for note in auto.notes)
    with pytest.raises(KeyError, match="64x64"):
        auto.shift_of(64, 64)


def test_the_disk_it_needs(tmp_path, facts):
    """Checkpoints kept of weights and two states each, the average, the pipeline, and the caches to come."""
    weights = facts.parameters * 4
    caches = (CacheNeed("text", "t", 5, 3, 700), CacheNeed("latents of cats", "l", 12, 12, 0))
    few = plan(tmp_path, facts, caches, max_train_steps=10, checkpoint_step_interval=4)  # at 4, 8 and 10
    assert few.disk_needed_bytes == 3 * 3 * weights + weights + 700
    kept = plan(
        tmp_path, facts, max_train_steps=100, checkpoint_step_interval=4, checkpoints_total_limit=2, use_ema=True
    )
    assert kept.disk_needed_bytes == 2 * 4 * weights + 2 * weights
    assert (kept.disk.kept, kept.disk.checkpoints_bytes, kept.disk.caches_bytes) == (2, 8 * weights, 0)
    once = plan(tmp_path, facts, max_train_steps=100, checkpoint_step_interval=0)
    assert once.disk_needed_bytes == 3 * weights + weights
    half = plan(tmp_path, facts, max_train_steps=10, checkpoint_step_interval=0, weights_dtype="bf16")
    assert half.disk_needed_bytes == 8 * facts.parameters + 2 * facts.parameters, "weights, two states and Kahan's"
    assert checkpoint_bytes(config(tmp_path, weights_dtype="bf16", use_ema=True), 10) == 120
    assert caches[0].misses == 2 and caches[1].misses == 0
    assert latent_bytes(Size(384, 640), facts) == 12 * 20 * 32 * 4
    assert text_bytes(facts, 0) == 0 < text_bytes(facts, 1) < text_bytes(facts, 2)


def test_the_plan_draws_the_learning_rate_over_the_runs_true_length(tmp_path, facts):
    made = plan(tmp_path, facts, lr_scheduler="linear", lr_warmup_steps=50, max_train_steps=100, learning_rate=2e-5)
    line = rate_line(made)
    assert line.startswith("linear, peak 2e-05, 50 steps of warm-up, 4e-07 at the last step  ▁")
    drawn = line.rpartition("  ")[2]
    assert len(drawn) == 40 and drawn.index("█") in range(17, 22) and drawn.endswith("▁"), "up half the way, then down"
    assert f"Learning rate: {line}" in plan_lines(made, Ledger(()))
    accumulated = plan(tmp_path, facts, lr_scale_sqrt=True, gradient_accumulation_steps=4, max_train_steps=9)
    assert accumulated.schedule.peak_lr == pytest.approx(1e-5 * (4 * 2.8) ** 0.5), "pictures of a step"
    assert accumulated.schedule.total_steps == 9


def test_noise_levels_are_told_with_a_picture(tmp_path, facts):
    made = plan(tmp_path, facts)
    (line,) = noise_lines(made)
    assert line.startswith("logit-normal (mean 0, std 1), shift 3: median 0.75, 9 of 10 in 0.37-0.94  0▁")
    assert line.endswith("1") and len(set(line) & set("▁▂▃▄▅▆▇█")) >= 5
    assert f"Noise: {line}" in plan_lines(made, Ledger(()))
    auto = noise_lines(plan(tmp_path, facts, flow_schedule_auto_shift=True, flow_stratified=True))
    assert auto[0] == "logit-normal (mean 0, std 1), stratified" and len(auto) == 3
    assert auto[1].startswith("shift 2.9") and auto[2].startswith("shift 3: median 0.75")
    table = plan(tmp_path, facts, flow_custom_timesteps=(0.25, 0.5, 0.75), flow_schedule_shift=3)
    assert table.shift_of(512, 512) == 1
    assert noise_lines(table)[0].startswith("custom (3 levels), median 0.50, 9 of 10 in 0.25-0.75  0")
    assert json.loads(json.dumps(table.to_json()))["levels"]["table"] == [0.25, 0.5, 0.75]


def test_settings_of_the_noise_become_its_distribution(tmp_path):
    scaled = levels_of(config(tmp_path, flow_logit_mean=-1.0, flow_logit_std=2.0, flow_sigmoid_scale=0.5))
    assert scaled == Levels(mean=-0.5, std=1.0)
    beta = levels_of(config(tmp_path, flow_use_beta_schedule=True, flow_beta_schedule_alpha=3.0, flow_stratified=True))
    assert beta == Levels("beta", alpha=3.0, stratified=True)
    assert levels_of(config(tmp_path, flow_distribution="mode", flow_mode_scale=0.5)) == Levels("mode", mode_scale=0.5)


def test_it_is_told_in_plain_lines(tmp_path, facts):
    left_out = tuple((f"{number}.png", "too small") for number in range(7))
    ledger = Ledger((DatasetLedger("cats", 19, 12, left_out, 14, 12),))
    caches = (CacheNeed("text", "t", 5, 3, 700), CacheNeed("latents of cats", "l", 12, 12, 0))
    lines = plan_lines(plan(tmp_path, facts, caches, max_train_steps=10), ledger)
    text = "\n".join(lines)
    assert "19 pictures found = 12 trained + 7 left out; 14 other files, 12 of them captions" in text
    assert "left out: 4.png (too small)" in text and "5.png" not in text and "… and 2 more" in text
    assert "512x512: 10 pictures = 3 micro-batches of 4 (2 filled in from the same bucket)" in text
    assert "384x640: 2 pictures = 2 micro-batches of 1, shift" in text
    assert "Cache text: 3 of 5 there, 2 to make, about 700 B" in text and "12 of 12 there, 0 to make\n" in text
    assert "Length: 10 steps of 1 micro-batch(es), 5 steps an epoch, 2 epochs, 28 images" in text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1234, "1.2 kB"), (5e6, "5.0 MB"), (7e12, "7000.0 GB")]
)
def test_bytes_for_people(count, text):
    assert human_bytes(count) == text


# ---- caches nobody hashed, memory, time ----

CARD = Device("a card", 24 * 10**9, 20 * 10**9)


def with_memory(folder: Path, device: Device | None, vae_batch: int = 1, **settings: Any) -> Plan:
    """A plan of the 1.6B model with its memory on a device."""
    facts = known("Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers")
    assert facts is not None
    wanted = config(folder, **settings)
    caching = caching_needed(5_230_000_000, 1_250_000_000, [Load(1024, 1024, vae_batch)])
    memory = plan_memory(wanted, facts, loads_of(BUCKETS), caching, device)
    return make_plan(wanted, facts, BUCKETS, (), first_step=0, disk_free_bytes=1, memory=memory)


def memory_of(plan: Plan) -> MemoryPlan:
    assert plan.memory is not None
    return plan.memory


def test_what_nobody_hashed_is_unknown_and_no_miss(tmp_path, facts):
    cache = CacheNeed("text", "t", 9, 2, 500, unknown=4)
    assert cache.misses == 3
    made = plan(tmp_path, facts, (cache,))
    assert made.to_json()["caches"][0] == {**vars(cache), "misses": 3}
    ledger = Ledger((DatasetLedger("cats", 12, 12),))
    assert "Cache text: 2 of 9 there, 3 to make, 4 unknown (never hashed yet), about 500 B" in plan_lines(made, ledger)


def test_each_load_of_the_buckets_counts_once():
    assert loads_of([*BUCKETS, *BUCKETS]) == [Load(384, 640, 1), Load(512, 512, 4)]


def test_memory_is_told_and_stored(tmp_path):
    made = with_memory(tmp_path, Device("a card", 80 * 10**9, 1), use_ema=True)
    (line,) = memory_lines(made)
    need = memory_of(made).need
    for part in ("weights 6.4 GB", "optimizer 12.8 GB", "EMA 6.4 GB", "bf16 copies 3.2 GB", "a card has 80.0 GB"):
        assert part in line
    assert line.startswith(f"about {human_bytes(need.total_bytes)} to train")
    assert f"Memory: {line}" in plan_lines(made, Ledger(()))
    stored = json.loads(json.dumps(made.to_json()))["memory"]
    assert stored["need"]["total_bytes"] == need.total_bytes and stored["fits"] is True
    assert memory_warnings(memory_of(made)) == []
    assert memory_lines(replace(made, memory=None)) == []


def test_main_memory_of_the_average_is_told(tmp_path):
    line = memory_lines(with_memory(tmp_path, Device("a card", 80 * 10**9, 1), use_ema=True, ema_device="cpu"))[1]
    assert line == "    and 12.8 GB of main memory for the EMA"


def test_what_does_not_fit_is_a_warning_with_the_settings_that_would(tmp_path):
    made = with_memory(tmp_path, CARD)
    told, way = memory_lines(made)[:2]
    assert "it would fit with weights_dtype bf16 (1" in way and "a card has 24.0 GB" in told
    (warning,) = memory_warnings(memory_of(made))
    assert "training takes about 3" in warning and "it would fit with weights_dtype bf16" in warning
    none = memory_warnings(memory_of(with_memory(tmp_path, Device("a card", 7 * 10**9, 1))))
    assert len(none) == 1 and "no setting makes it fit" in none[0]
    assert memory_warnings(memory_of(with_memory(tmp_path, None))) == []


def test_caching_that_does_not_fit_is_a_warning_too(tmp_path):
    small = memory_warnings(memory_of(with_memory(tmp_path, Device("a card", 6 * 10**9, 1))))
    assert any("filling the caches with the text encoder (6.7 GB) does not fit" in warning for warning in small)
    (large,) = memory_warnings(memory_of(with_memory(tmp_path, Device("a card", 40 * 10**9, 1), vae_batch=32)))
    assert "the VAE" in large and "lower vae_batch_size" in large


def test_time_is_told_where_a_speed_is_known(tmp_path, facts):
    made = plan(tmp_path, facts, max_train_steps=1000)
    assert time_lines(made) == [] and made.left_s is None and made.to_json()["left_s"] is None
    known_speed = replace(made, step_s=2.0, first_step=400)
    assert (known_speed.steps_left, known_speed.left_s) == (600, 1200.0)
    assert "about 20 min for 600 steps at 2 s a step" in time_lines(known_speed)[0]
    assert time_lines(replace(known_speed, first_step=1000)) == []


def test_the_pace_is_what_decides_a_steps_time(tmp_path, facts):
    def pace(buckets=BUCKETS, **settings: Any) -> dict[str, Any]:
        return pace_of(config(tmp_path, **settings), facts, buckets, 1, None)

    same = pace()
    assert json.loads(json.dumps(same)) == same
    assert pace(max_train_steps=9, learning_rate=1e-3, seed=4) == same
    assert pace(use_ema=True, ema_device="cpu") != pace(use_ema=True) != pace(use_ema=True, ema_update_interval=9)
    for change in ({"use_ema": True}, {"gradient_checkpointing_interval": 2}, {"mixed_precision": "no"}):
        assert pace(**change) != same
    assert pace([replace(BUCKETS[0], batch_size=2), BUCKETS[1]]) != same
    assert pace_of(config(tmp_path), facts, BUCKETS, 2, None) != same
    assert pace_of(config(tmp_path), facts, BUCKETS, 1, None, "no") != same


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (89, "89 s"), (90, "2 min"), (5300, "88 min"), (7500, "2 h 05 min"), (190_000, "2 d 5 h")],
)
def test_durations_for_people(seconds, text):
    assert human_time(seconds) == text


# ---- roles and schedules ----


def told_of(part: DatasetLedger, dataset: DatasetPlan | None, made: Plan) -> str:
    return "\n".join(dataset_lines(part, replace(made, datasets=(dataset,) if dataset else ())))


def test_what_a_dataset_is_for_is_told_where_it_is_not_the_usual(tmp_path, facts):
    made, part = plan(tmp_path, facts), DatasetLedger("cats", 12, 12, masks=12, masks_resized=3)
    plain = told_of(part, DatasetPlan("cats", "train"), made)
    assert plain == told_of(part, None, made) and plain.count("\n") == 0
    scheduled = DatasetPlan("cats", "train", start_epoch=2, start_step=5, end_step=90, masks="m", mask_kind="mask")
    said = told_of(part, scheduled, made)
    assert "shown from epoch 2 and step 5 to the end of step 90" in said
    assert "masks: 12 found in m (mask), 3 of another size than the picture, resized to it" in said
    assert "shown from the start to the end of epoch 4 or step 90" in told_of(
        part, replace(scheduled, start_epoch=1, start_step=0, end_epoch=4), made
    )
    regular = DatasetPlan("cats", "regularise", target="base", text_cache="t")
    assert "it teaches what the model predicts before any training; its loss is told apart" in told_of(
        part, regular, made
    )
    assert "captions are kept in the text cache t" in told_of(part, regular, made)
    assert "it teaches its pictures" in told_of(part, replace(regular, target="data"), made)
    held = DatasetLedger("cats", 12, 9, role="eval", not_drawn=3)
    said = told_of(held, DatasetPlan("cats", "eval"), made)
    assert "9 held out + 0 left out + 3 not drawn (max_num_samples)" in said and "never trained on" in said
    merged = replace(part, merged=(("a", "96x48", "64x64"), ("b", "96x48", "64x64"), ("c", "48x96", "64x64")))
    assert "merged: 2 pictures of the small bucket 96x48 into 64x64" in told_of(merged, None, made)


def scheduled(folder: Path, facts: ModelFacts, when: dict[str, Window], **settings: Any) -> Plan:
    """Two datasets of 6 and 4 micro-batches of 1 and 2 pictures, and one that is held out; two micro-batches a step."""
    buckets = (
        Bucket("a", Size(512, 512), tuple(range(6)), 1),
        Bucket("b", Size(512, 512), tuple(range(6, 14)), 2),
        Bucket("held", Size(512, 512), (14, 15, 16), 4, 0, Role.EVAL),
    )
    wanted = config(folder, gradient_accumulation_steps=2, **settings)
    timeline = timeline_of(trained(buckets), {}, "auto-weighting", 0, when, 2)
    return make_plan(wanted, facts, buckets, (), first_step=0, disk_free_bytes=10**12, timeline=timeline)


def test_the_length_of_a_run_whose_datasets_come_and_go(tmp_path, facts):
    """a alone has 3 steps an epoch; with b there are 5."""
    made = scheduled(tmp_path, facts, {"b": Window(start_epoch=3, end_epoch=4)}, num_train_epochs=5)
    assert (made.micro_batches_per_epoch, made.steps_per_epoch) == (6, 3.0)
    assert (made.total_steps, made.epochs) == (2 * 3 + 2 * 5 + 3, 5.0)
    assert made.images_seen == 5 * 6 + 2 * 8
    assert [made.epoch_after(step) for step in (0, 3, 6, 11, 16, 19)] == [0, 1, 2, 3, 4, 5]
    assert made.epoch_after(7) == pytest.approx(2.2)
    assert [(e.first_epoch, e.first_step, e.epochs, e.datasets) for e in made.epochs_shown] == [
        (1, 1, 2, ("a",)), (3, 7, 2, ("a", "b")), (5, 17, 1, ("a",)),
    ]  # fmt: skip
    assert schedule_lines(made) == [
        "    from step 1: epoch 1 to 2, 6 micro-batches: a",
        "    from step 7: epoch 3 to 4, 10 micro-batches: a, b",
        "    from step 17: epoch 5, 6 micro-batches: a",
    ]
    assert "3 steps an epoch in the first, 5 epochs" in length_line(made)
    short = scheduled(tmp_path, facts, {"b": Window(start_epoch=3)}, max_train_steps=4)
    assert [shown.epochs for shown in short.epochs_shown] == [2] and schedule_lines(short)[0].endswith(": a")
    assert json.loads(json.dumps(made.to_json()))["epochs_shown"][1]["datasets"] == ["a", "b"]


def test_a_run_that_is_longer_than_its_datasets_is_refused_with_the_numbers(tmp_path, facts):
    when = {"a": Window(end_step=4), "b": Window(end_epoch=1)}
    with pytest.raises(UserError, match=r"after step 5 .* goes on to max_train_steps 9"):
        scheduled(tmp_path, facts, {"a": Window(end_step=4), "b": Window(end_step=5)}, max_train_steps=9)
    with pytest.raises(UserError, match="goes on to num_train_epochs 7"):
        scheduled(tmp_path, facts, when, num_train_epochs=7)
    assert scheduled(tmp_path, facts, when, max_train_steps=4).total_steps == 4


def test_held_out_buckets_are_planned_apart(tmp_path, facts):
    made = scheduled(tmp_path, facts, {}, num_train_epochs=1)
    assert [bucket.dataset for bucket in made.buckets] == ["a", "b"] and made.total_steps == 5
    (held,) = made.held_out
    assert (held.dataset, held.pictures, held.role) == ("held", 3, "eval")
    ledger = Ledger((DatasetLedger("held", 3, 3, role="eval"),))
    assert "    512x512: 3 pictures, held out" in plan_lines(made, ledger)


def test_asking_the_base_model_too_takes_time_and_is_another_pace(tmp_path, facts):
    wanted = config(tmp_path)
    assert "learns_from_base" not in pace_of(wanted, facts, BUCKETS, 1, None)
    assert pace_of(wanted, facts, BUCKETS, 1, None, learns_from_base=True)["learns_from_base"] is True


# ---- checkpoints ----


def test_how_checkpoints_are_written_is_told(tmp_path, facts):
    made = plan(
        tmp_path, facts, max_train_steps=1000, checkpoint_epoch_interval=2, checkpoints_keep_every=1000,
        checkpoints_total_limit=3,
    )  # fmt: skip
    assert made.save_every == Every(500, 2)
    saving = saving_plan(config(tmp_path, checkpoints_total_limit=3), facts, None, 10**12)
    line = saving_line(replace(made, saving=saving))
    size = human_bytes(3 * 4 * facts.parameters)
    assert line.startswith(f"every 500 steps, every 2 epochs, at the end: {size} each; kept: the newest 3; written in")
    told = saving_line(replace(made, saving=replace(saving, background=False)))
    assert "training waits while they are written (a copy takes" in told
    assert f"Checkpoints: {line}" in plan_lines(replace(made, saving=saving), Ledger(()))


def test_on_a_cpu_training_itself_takes_main_memory(tmp_path):
    """The 1.6B model on a CPU with 50 GB leaves too little of it; beside a GPU all of it is free for the copy."""
    free = 50 * 10**9
    on_cpu = with_memory(tmp_path, Device("CPU", free, free, "cpu"))
    facts = known("Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers")
    assert facts is not None and on_cpu.memory is not None
    assert not saving_plan(config(tmp_path), facts, on_cpu.memory, free).background
    assert saving_plan(config(tmp_path), facts, with_memory(tmp_path, CARD).memory, free).background
