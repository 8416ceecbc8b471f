"""Held-out losses and scores in whole runs on nano: from the settings to the numbers that are told."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sana_tune.data.records import Keys
from sana_tune.errors import UserError
from sana_tune.log import log
from sana_tune.measuring import subject_of
from sana_tune.run import run
from sana_tune.watch.events import Measured
from tests.clip import tiny_clip
from tests.data.pictures import encoded, record
from tests.journeys.kit import Heard, differences, one_thread, pictures, small_run, state_of


@pytest.fixture(autouse=True)
def _one_thread(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    log.addHandler(caplog.handler)
    with one_thread(), caplog.at_level(logging.INFO, log.name):
        yield
    log.removeHandler(caplog.handler)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of pictures, and the caches that the runs of this module share."""
    folder = tmp_path_factory.mktemp("measuring")
    pictures(folder / "photos", 6)
    pictures(folder / "wide", 3, (80, 40), seed=5, name="w", variants=2)
    (folder / "masks").mkdir()
    for number in range(3):
        mask = np.full((40, 80), 255 * (number > 0), np.uint8)
        mask[:, 40:] = 0
        (folder / "masks" / f"w{number:02}.png").write_bytes(encoded(mask))
    return folder


def asked(home: Path, here: Path, *entries: dict[str, Any], **settings: Any) -> Any:
    listed = [{key: str(home / value) if key == "instance_data_dir" else value for key, value in entry.items()}
              for entry in entries]  # fmt: skip
    return small_run(here, *listed, cache_dir=str(home / "cache"), **{"eval_timesteps": 3, **settings})


def numbers(loaded: Any, **how: Any) -> list[Measured]:
    """What a run measured."""
    heard = Heard()
    run(loaded, sinks=[heard], **how)
    return heard.of(Measured)


PHOTOS = {"id": "photos", "instance_data_dir": "photos"}
SPLIT = {**PHOTOS, "eval_split": 3}
WIDE = {"id": "wide", "dataset_type": "eval", "instance_data_dir": "wide"}


def test_it_falls_below_one_and_rises_again_while_the_gap_opens(home: Path, tmp_path: Path):
    """Three pictures learnt by heart: at first the held-out ones gain too."""
    settings = {"learning_rate": 1e-3, "max_train_steps": 48, "eval_steps_interval": 16, "train_batch_size": 3}
    found = numbers(asked(home, tmp_path, SPLIT, **settings, caption_dropout_probability=0))
    assert [each.progress.step for each in found] == [0, 16, 32, 48]
    held, gap = ([each.values[name] for each in found] for name in ("held_out/raw", "gap/raw"))
    assert held[0] == 1.0 and max(held[1:]) < 0.9 and held[3] > min(held[1:3]) + 0.01
    assert gap[0] == 0.0 and gap[1] < gap[2] < gap[3] and gap[3] > 0.2
    assert all(each.values["held_out/raw/se"] > 0 for each in found[1:])
    assert [line.partition(":")[0] for line in found[-1].advice] == ["overfitting", "held-out loss"]
    assert found[0].advice == found[1].advice == ()


def test_going_on_from_a_checkpoint_tells_the_same(home: Path, tmp_path: Path):
    settings = {"max_train_steps": 6, "eval_steps_interval": 2, "use_ema": True}
    whole = numbers(asked(home, tmp_path / "whole", SPLIT, **settings))
    first = numbers(asked(home, tmp_path / "parts", SPLIT, **{**settings, "max_train_steps": 2}))
    rest = numbers(asked(home, tmp_path / "parts", SPLIT, **settings))
    assert [each.progress.step for each in (*first, *rest)] == [0, 2, 4, 6]
    assert [each.values for each in (*first, *rest)] == [each.values for each in whole]


def test_training_is_the_same_to_the_bit_with_and_without(home: Path, tmp_path: Path):
    states = []
    for off in (False, True):
        settings = {"use_ema": True, "eval_steps_interval": 1, "eval_loss_disable": off}
        found = numbers(asked(home, tmp_path / str(off), SPLIT, **settings))
        assert bool(found) is not off
        assert off or {"held_out/raw", "held_out/ema"} < set(found[-1].values)
        states.append(state_of(tmp_path / str(off) / "output" / "checkpoint-4"))
    assert differences(*states) == []
    plan = json.loads((tmp_path / "True" / "output" / "plan.json").read_text())
    assert plan["evaluation"] is None and plan["buckets"][0]["pictures"] == 3, "still held out"


def test_plan_and_ledger_tell_the_split(home: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    numbers(asked(home, tmp_path, SPLIT, WIDE, max_train_steps=1, use_ema=True))
    assert "6 pictures found = 3 trained + 3 held out (eval_split) + 0 left out" in caplog.text
    line = "Held-out: 6 pictures × 3 noise levels, with 3 trained ones beside them, raw weights and EMA; at the start, "
    assert line + "every 500 steps and at the end" in caplog.text
    first, second = json.loads((tmp_path / "output" / "ledger.json").read_text())["datasets"]
    assert len(first["held_out"]) == 3 == second["trained"]
    kept = json.loads((tmp_path / "output" / "held_out.json").read_text())
    assert {f"photos/{key}" for key in first["held_out"]} < set(kept["pictures"][0])
    assert not set(kept["pictures"][0]) & set(kept["pictures"][1])


def test_crops_aspects_masks_and_limits(home: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Crops drawn anew in each epoch, latents that are not kept, a black mask; the same few pictures every time."""
    cropped = {**WIDE, "id": "cropped", "crop": True, "crop_style": "random", "vae_cache_clear_each_epoch": True}
    unkept = {**WIDE, "id": "un kept", "vae_cache_disable": True, "conditioning_data": "masks"}
    masks = {"id": "masks", "dataset_type": "conditioning", "instance_data_dir": "masks"}
    entries = (PHOTOS, cropped, unkept, masks)
    settings = {"max_train_steps": 4, "eval_epoch_interval": 0.5, "num_eval_images": 2}
    told = []
    for name in ("one", "other"):
        found = numbers(asked(home, tmp_path / name, *entries, **settings))
        kept = json.loads((tmp_path / name / "output" / "held_out.json").read_text())
        told.append(([each.values for each in found], kept["pictures"]))
    assert told[0] == told[1] and len(told[0][1][0]) == 4
    assert [each.progress.step for each in found] == [0, 2, 3, 4], (
        "an epoch has three steps; half of it ends in the 2nd"
    )
    assert {"held_out/cropped/raw", "held_out/un-kept/raw", "held_out/raw"} < set(found[-1].values)
    assert "masks of 1 pictures are black where they are trained" in caplog.text


def test_chosen_datasets_pooled(home: Path, tmp_path: Path):
    found = numbers(asked(home, tmp_path / "a", SPLIT, WIDE, max_train_steps=1, eval_dataset_pooling=True))
    assert not any("photos" in name or "wide" in name for name in found[0].values)
    numbers(asked(home, tmp_path / "b", SPLIT, WIDE, max_train_steps=1, eval_dataset_id="wide", alarms=False))
    kept = json.loads((tmp_path / "b" / "output" / "held_out.json").read_text())
    assert {name.partition("/")[0] for name in kept["pictures"][0]} == {"wide"} and kept["pictures"][1] == []


def test_what_a_subject_is_made_of():
    keys, mine = Keys("vae", "text"), record("p.png", captions=("one", "two"))
    made = subject_of(mine, keys, 32)
    assert (made.id, made.dataset, made.height, made.width) == ("cats/p.png", "cats", 2, 2)
    assert subject_of(record("p.png", captions=("one", "else")), keys, 32) == made, "the first caption alone counts"
    assert subject_of(record("p.png", captions=("two",)), keys, 32).made_of != made.made_of


# ---- scores ----

DRAWN = {"validation_disable": False, "validation_prompt": "a cat", "validation_resolution": "32",
         "validation_num_inference_steps": 2, "max_train_steps": 1, "evaluation_type": "clip"}  # fmt: skip


def test_validation_pictures_are_scored(home: Path, tmp_path: Path):
    clip = tiny_clip(tmp_path / "clip")
    settings = {**DRAWN, "pretrained_evaluation_model_name_or_path": str(clip), "use_ema": True}
    start, end = numbers(asked(home, tmp_path, PHOTOS, **settings))
    assert (start.progress.step, end.progress.step) == (0, 1)
    assert set(start.values) == {"clip/raw", "clip/raw/validation"}
    assert set(end.values) == {f"clip/{view}{name}" for view in ("raw", "ema") for name in ("", "/validation")}
    assert all(0 <= value <= 100 for value in (*start.values.values(), *end.values.values()))


def test_a_missing_scorer_is_told_before_the_run(home: Path, tmp_path: Path):
    clip = tiny_clip(tmp_path / "clip")
    (clip / "preprocessor_config.json").unlink()
    for name, what in ((str(clip), "lacks preprocessor_config.json"), ("some/clip", "offline mode is on")):
        loaded = asked(home, tmp_path, PHOTOS, **DRAWN, pretrained_evaluation_model_name_or_path=name)
        with pytest.raises(UserError, match=what):
            run(loaded)
    assert not (tmp_path / "output" / "plan.json").exists()
    shutil.rmtree(clip)


def test_without_prompts_nothing_is_loaded_to_score(home: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    clip = tiny_clip(tmp_path / "clip")
    settings = {**DRAWN, "validation_prompt": "", "pretrained_evaluation_model_name_or_path": str(clip)}
    assert numbers(asked(home, tmp_path, PHOTOS, **settings)) == []
    assert "evaluation_type clip has no effect: there is no prompt" in caplog.text
