"""The plan: how long, how much, how big, before anything heavy. Every number is worked out by hand here."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from sana_tune.config.schema import Config
from sana_tune.data.buckets import Bucket
from sana_tune.data.geometry import Size
from sana_tune.data.survey import DatasetLedger, Ledger
from sana_tune.model.facts import ModelFacts, known
from sana_tune.plan import CacheNeed, Plan, human_bytes, latent_bytes, make_plan, plan_lines, text_bytes, total_steps
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
    once = plan(tmp_path, facts, max_train_steps=100, checkpoint_step_interval=0)
    assert once.disk_needed_bytes == 3 * weights + weights
    assert caches[0].misses == 2 and caches[1].misses == 0
    assert latent_bytes(Size(384, 640), facts) == 12 * 20 * 32 * 4
    assert text_bytes(facts, 0) == 0 < text_bytes(facts, 1) < text_bytes(facts, 2)


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
