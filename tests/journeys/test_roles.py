"""Masks, held-out and regularisation data, schedules, small buckets and several text caches in whole runs on nano."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sana_tune.cli.main import exit_code
from sana_tune.data.cache import TensorCache
from sana_tune.log import log
from sana_tune.run import run
from tests.data.pictures import encoded
from tests.journeys.kit import Heard, differences, metrics_of, pictures, small_run, state_of


@pytest.fixture(autouse=True)
def _heard(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    log.addHandler(caplog.handler)
    with caplog.at_level(logging.INFO, log.name):
        yield
    log.removeHandler(caplog.handler)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of pictures and masks, and the caches that the runs of this module share."""
    folder = tmp_path_factory.mktemp("roles")
    pictures(folder / "subject", 4)
    pictures(folder / "others", 3, seed=1, name="o")
    for name, levels in (("white", 255), ("black", 0), ("left", None)):
        (folder / name).mkdir()
        for number in range(4):
            mask = np.full((32, 32), 255 if levels is None else levels, np.uint8)
            if levels is None:
                mask[:, 16:] = 0
                mask[0, 31] = number  # no two alike
            (folder / name / f"p{number:02}.png").write_bytes(encoded(mask))
    return folder


def asked(home: Path, here: Path, *entries: dict[str, Any], **settings: Any) -> Any:
    listed = [
        {key: str(home / value) if key == "instance_data_dir" else value for key, value in entry.items()}
        for entry in entries
    ]
    return small_run(here, *listed, cache_dir=str(home / "cache"), **settings)


SUBJECT = {"id": "subject", "instance_data_dir": "subject"}
OTHERS = {"id": "others", "instance_data_dir": "others"}


def masked(name: str, **more: Any) -> list[dict[str, Any]]:
    return [
        {**SUBJECT, "conditioning_data": "m", **more},
        {"id": "m", "dataset_type": "conditioning", "instance_data_dir": name},
    ]


def trained(home: Path, here: Path, *entries: dict[str, Any], **settings: Any) -> list[dict[str, Any]]:
    """The lines of a run's metrics."""
    run(asked(home, here, *entries, **settings))
    return metrics_of(here / "output")


# ---- masks ----


def test_masks_decide_what_counts(home: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    plain = trained(home, tmp_path / "plain", SUBJECT)
    white = trained(home, tmp_path / "white", *masked("white"))
    left = trained(home, tmp_path / "left", *masked("left"))
    black = trained(home, tmp_path / "black", *masked("black"))
    for key in ("loss", "grad_norm"):
        assert [line[key] for line in white] == pytest.approx([line[key] for line in plain], rel=1e-3)
        assert [line[key] for line in black] == [0.0] * 4
    assert all(abs(one["loss"] - other["loss"]) > 1e-3 for one, other in zip(left, plain, strict=True))
    assert "masks of 4 pictures are black where they are trained" in caplog.text


def test_masks_are_cached_beside_the_latents_once(home: Path, tmp_path: Path):
    for expected in (4, None):
        heard = Heard()
        loaded = asked(home, tmp_path, *masked("left"), cache_dir_vae=str(tmp_path / "vae"), max_train_steps=1)
        run(loaded, sinks=[heard], restart=True)
        assert heard.encoded.get("masks of subject") == expected
    needs = {need["name"]: need for need in json.loads((tmp_path / "output" / "plan.json").read_text())["caches"]}
    assert (needs["masks of subject"]["needed"], needs["masks of subject"]["hits"]) == (4, 4)
    cache = TensorCache(tmp_path / "vae" / "subject")
    shapes = sorted(tuple(cache.get(key).shape) for key in cache.index.items)
    assert len(shapes) == 8 and shapes[:4] == [(1, 4, 4)] * 4, "factor 8: 4 x 4 places, 2 of 4 columns marked"


def test_masks_are_not_kept_where_latents_are_not_or_change(home: Path, tmp_path: Path):
    """On the fly, and with crops drawn anew in each epoch, they are made for the crop that is trained."""
    for number, more in enumerate(({"vae_cache_disable": True}, {"crop": True, "vae_cache_clear_each_epoch": True})):
        vae = tmp_path / f"vae{number}"
        lines = trained(home, tmp_path / str(number), *masked("left", **more), cache_dir_vae=str(vae))
        assert len(lines) == 4 and all(line["loss"] > 0 for line in lines)
        folder = vae / "subject"
        kept = TensorCache(folder) if folder.is_dir() else None
        assert kept is None or all(kept.get(key).shape[0] > 1 for key in kept.index.items)


def test_segmentation_is_applied_by_its_share(home: Path, tmp_path: Path):
    entries = masked("black")
    entries[1]["conditioning_type"] = "segmentation"
    lines = trained(home, tmp_path, *entries, masked_loss_probability=0.5, max_train_steps=8)
    losses = [line["loss"] for line in lines]
    assert any(loss > 0 for loss in losses) and len(set(losses)) > 4
    assert trained(home, tmp_path / "never", *entries, masked_loss_probability=0)[0]["loss"] > 0
    assert trained(home, tmp_path / "always", *entries)[0]["loss"] == 0


def test_a_mask_that_turns_out_broken_leaves_its_picture_out(home: Path, tmp_path: Path, caplog):
    shutil.copytree(home / "left", tmp_path / "torn")
    whole = (home / "subject" / "p02.png").read_bytes()  # a header of the right size, and half of a body
    (tmp_path / "torn" / "p02.png").write_bytes(whole[: len(whole) // 2])
    trained(home, tmp_path, *masked(str(tmp_path / "torn")), max_train_steps=1)
    (ledger,) = json.loads((tmp_path / "output" / "ledger.json").read_text())["datasets"]
    assert ledger["trained"] == 3 and ledger["left_out"][0][0] == "p02.png"
    assert "its mask p02.png is damaged" in ledger["left_out"][0][1]
    assert "left out: subject/p02.png" in caplog.text


# ---- regularisation ----


def test_regularisation_data_is_logged_apart_and_can_teach_the_base_model(home: Path, tmp_path: Path):
    regular = {**OTHERS, "is_regularisation_data": True}
    settings: dict[str, Any] = {"max_train_steps": 6, "data_backend_sampling": "uniform"}
    data = trained(home, tmp_path / "data", SUBJECT, regular, **settings)
    assert {tuple(sorted(key for key in line if key.startswith("loss_"))) for line in data} == {
        ("loss_train",), ("loss_regularisation",),
    }  # fmt: skip
    assert all(line["loss"] in (line.get("loss_train"), line.get("loss_regularisation")) for line in data)
    plain = trained(home, tmp_path / "plain", SUBJECT, OTHERS, **settings)
    assert [line["loss"] for line in plain] == [line["loss"] for line in data], "data: trained as any other picture"
    base = trained(home, tmp_path / "base", SUBJECT, regular, **settings, regularisation_target="base")
    regular_losses = [
        (one["loss_regularisation"], other["loss_regularisation"])
        for one, other in zip(base, data, strict=True)
        if "loss_regularisation" in one
    ]
    assert len(regular_losses) >= 2 and all(one < other for one, other in regular_losses)
    assert regular_losses[-1][0] > 0, "by then pictures have moved the model away from the base"
    only = trained(home, tmp_path / "only", regular, regularisation_target="base")
    assert [line["loss_regularisation"] for line in only] == [0.0] * 4, "a model that did not move predicts the same"
    said = (tmp_path / "base" / "output" / "log.txt").read_text()
    assert "regularisation data: it teaches what the model predicts before any training" in said
    assert "base model 7.0 MB" in said and "  regularisation 0." in said


def test_the_base_model_is_the_untrained_one_after_a_resume_too(home: Path, tmp_path: Path):
    entries = (SUBJECT, {**OTHERS, "is_regularisation_data": True})
    settings: dict[str, Any] = {"regularisation_target": "base", "checkpoint_step_interval": 3}
    straight = trained(home, tmp_path / "straight", *entries, max_train_steps=6, **settings)
    trained(home, tmp_path / "cut", *entries, max_train_steps=3, **settings)
    assert trained(home, tmp_path / "cut", *entries, max_train_steps=6, **settings) == straight
    states = [state_of(tmp_path / name / "output" / "checkpoint-6") for name in ("straight", "cut")]
    assert differences(*states) == []


# ---- held out ----


def test_held_out_pictures_are_cached_and_never_trained_on(home: Path, tmp_path: Path, caplog):
    shutil.copytree(home / "others", tmp_path / "held")
    shutil.copy(home / "subject" / "p01.png", tmp_path / "held" / "o01.png")
    held = {"id": "held", "dataset_type": "eval", "instance_data_dir": str(tmp_path / "held"), "repeats": 9}
    alone = trained(home, tmp_path / "alone", SUBJECT)
    heard = Heard()
    run(asked(home, tmp_path, SUBJECT, held), sinks=[heard])
    assert metrics_of(tmp_path / "output") == alone, "not one number of the run depends on them"
    assert heard.encoded["latents of held"] == 3
    assert "held/o01.png is the same file as subject/p01.png" in caplog.text
    assert "dataset held: repeats has no effect: it is never trained on" in caplog.text
    plan = json.loads((tmp_path / "output" / "plan.json").read_text())
    assert [bucket["dataset"] for bucket in plan["buckets"]] == ["subject"] and plan["held_out"][0]["pictures"] == 3


# ---- schedules ----


def test_datasets_start_and_end_and_a_cut_run_ends_with_the_same_bytes(home: Path, tmp_path: Path, full: bool):
    """Two micro-batches of each an epoch; others are shown from step 4 to step 9, the cut falls between."""
    entries = (SUBJECT, {**OTHERS, "is_regularisation_data": True, "start_step": 4, "end_step": 9})
    settings: dict[str, Any] = {"max_train_steps": 12, "checkpoint_step_interval": 6}
    straight = trained(home, tmp_path / "straight", *entries, **settings)
    shown = [line["step"] for line in straight if "loss_regularisation" in line]
    assert shown and min(shown) >= 4 and max(shown) <= 9
    epochs = [line["epoch"] for line in straight]
    assert epochs[1] == 1.0 and epochs == sorted(set(epochs)), "longer epochs while there is more to show"
    for stop in (2, 5, 9) if full else (5,):
        here = tmp_path / f"cut{stop}"
        trained(home, here, *entries, **{**settings, "max_train_steps": stop})
        assert trained(home, here, *entries, **settings) == straight
        states = [state_of(place / "output" / "checkpoint-12") for place in (tmp_path / "straight", here)]
        assert differences(*states) == []


def test_a_changed_schedule_is_said_when_a_run_goes_on(home: Path, tmp_path: Path, caplog):
    trained(home, tmp_path, SUBJECT, OTHERS, max_train_steps=2)
    trained(home, tmp_path, SUBJECT, OTHERS, max_train_steps=3)
    assert "the order from here on is the new plan's" not in caplog.text
    trained(home, tmp_path, SUBJECT, {**OTHERS, "end_step": 3}, max_train_steps=4)
    assert "the order from here on is the new plan's" in caplog.text


# ---- counts, buckets, caches ----


def test_ten_pictures_just_work_whatever_becomes_of_small_buckets(tmp_path: Path, capsys):
    """Seven squares and three of other shapes, batches of 4."""
    folder = pictures(tmp_path / "pictures", 7, (64, 64))
    pictures(folder, 2, (96, 48), seed=1, name="wide")
    pictures(folder, 1, (40, 96), seed=2, name="tall")
    entry = {"id": "ten", "instance_data_dir": str(folder)}
    seen = {}
    for choice in ("fill", "merge", "drop"):
        settings: dict[str, Any] = {"train_batch_size": 4, "max_train_steps": 1, "cache_dir": str(tmp_path / "cache")}
        small_run(tmp_path / choice, entry, small_buckets=choice, **settings)
        assert exit_code(["train", "--config", str(tmp_path / choice / "config.json")]) == 0
        plan = json.loads((tmp_path / choice / "output" / "plan.json").read_text())
        seen[choice] = [(bucket["pictures"], bucket["filled"]) for bucket in plan["buckets"]]
    assert seen == {"fill": [(1, 3), (7, 1), (2, 2)], "merge": [(10, 2)], "drop": [(7, 1)]}
    said = capsys.readouterr().out
    assert "merged: 2 pictures of the small bucket" in said and "1 filled in from the same bucket" in said
    assert "fewer than train_batch_size 4 (small_buckets drop)" in said
    small_run(tmp_path / "error", entry, small_buckets="error", train_batch_size=4)
    assert exit_code(["check", "--config", str(tmp_path / "error" / "config.json")]) == 1
    assert "every bucket must fill a batch of 4" in capsys.readouterr().out


def test_a_sample_of_a_dataset_is_the_same_one_each_time(home: Path, tmp_path: Path):
    few = {**SUBJECT, "max_num_samples": 2}
    lines = trained(home, tmp_path, few, max_train_steps=1)
    assert trained(home, tmp_path, few, max_train_steps=2)[:1] == lines
    (ledger,) = json.loads((tmp_path / "output" / "ledger.json").read_text())["datasets"]
    assert (ledger["found"], ledger["trained"], ledger["not_drawn"], ledger["left_out"]) == (4, 2, 2, [])


def test_datasets_have_batches_and_text_caches_of_their_own(home: Path, tmp_path: Path):
    entries: list[dict[str, Any]] = [
        {**SUBJECT, "train_batch_size": 3},
        {**OTHERS, "text_embeds": "second", "train_batch_size": 1},
        {"id": "zero", "instance_data_dir": "others", "probability": 0},
        {"id": "first", "dataset_type": "text_embeds", "default": True, "cache_dir": str(tmp_path / "first")},
        {"id": "second", "dataset_type": "text_embeds", "cache_dir": str(tmp_path / "second")},
    ]
    lines = trained(home, tmp_path, *entries, max_train_steps=5)
    assert len(lines) == 5
    plan = json.loads((tmp_path / "output" / "plan.json").read_text())
    assert [(b["dataset"], b["batch_size"], b["micro_batches"]) for b in plan["buckets"]] == [
        ("subject", 3, 2), ("others", 1, 3),
    ]  # fmt: skip
    assert (len(TensorCache(tmp_path / "first")), len(TensorCache(tmp_path / "second"))) == (1 + 4, 1 + 3)
    one = [{key: value for key, value in entry.items() if key != "text_embeds"} for entry in entries[:4]]
    assert trained(home, tmp_path / "one", *one, max_train_steps=5) == lines, "where captions are kept changes nothing"
