"""What is known before anything heavy: checks in the order of their cost, the plan's numbers, and what is told."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sana_tune.config.load import Loaded, load
from sana_tune.data.cache import TensorCache
from sana_tune.data.geometry import Size
from sana_tune.data.memory import FileMemory
from sana_tune.errors import UserError
from sana_tune.hardware import device_for
from sana_tune.log import log
from sana_tune.model.facts import known
from sana_tune.output import Output
from sana_tune.prepare import (
    Looking,
    Prepared,
    cache_needs,
    check_precision,
    drawing_sizes,
    existing,
    finished_already,
    identity_of,
    prepare,
    survey_of,
    tell,
    tell_changes,
    write_down,
    write_down_export,
)
from sana_tune.progress import Progress
from sana_tune.train import folders
from tests.config.helpers import write_files
from tests.data.pictures import put

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
KNOWN = "Efficient-Large-Model/Sana_600M_512px_diffusers"


@pytest.fixture(autouse=True)
def _heard(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """caplog hears the package, whatever a run before this test did to its logger."""
    log.addHandler(caplog.handler)
    with caplog.at_level(logging.DEBUG, log.name):
        yield
    log.removeHandler(caplog.handler)


def asked(folder: Path, dataset: dict[str, Any] | None = None, captions: str = "abb", **settings: Any) -> Loaded:
    """A run on nano over one picture a letter, captioned with the letter."""
    for number, caption in enumerate(captions):
        put(folder / "pictures", f"{number}.png", 64, 64, seed=number, caption=caption)
    wanted = {"caption_strategy": "textfile", "max_train_steps": 4, **settings}
    return load(write_files(folder, wanted, dataset), {}, {})


def prepared(folder: Path, **settings: Any) -> Prepared:
    return prepare(asked(folder, **settings), Output.open(folder / "output"))


def checkpoint(output: Path, step: int, identity: dict[str, str]) -> None:
    """A complete checkpoint of no weights to speak of."""
    folder = output / folders.folder_name(step)
    (folder / "transformer").mkdir(parents=True)
    (folder / WEIGHTS).write_text(f"weights of step {step}")
    header = {**Progress(step, step / 3, 2 * step).to_json(), "run": identity}
    (folder / folders.PROGRESS).write_text(json.dumps(header))
    files = folders.digest_files(folder, [folders.PROGRESS, WEIGHTS])
    (folder / folders.MANIFEST).write_text(json.dumps({"step": step, "serial": step, "files": files}))


def test_everything_is_known_and_nothing_written_but_what_is_remembered(tmp_path):
    found = prepared(tmp_path, train_batch_size=2, use_ema=True)
    assert {path.name for path in (tmp_path / "output").rglob("*") if path.is_file()} == {
        "files.jsonl",
        "model_hashes.json",
    }
    assert [record.key for record in found.survey.records] == ["0.png", "1.png", "2.png"]
    assert [bucket.size for bucket in found.buckets] == [Size(64, 64)] and found.checkpoint is None
    assert (found.plan.total_steps, found.plan.first_step, found.plan.micro_batches_per_epoch) == (4, 0, 2)
    copied = sum(path.stat().st_size for part in ("vae", "text_encoder") for path in (found.folder / part).iterdir())
    assert found.plan.disk_needed_bytes > found.facts.parameters * 4 * (4 + 2) + copied


def test_equal_texts_are_needed_once_and_prompts_are_texts_too(tmp_path):
    found = prepared(tmp_path, validation_prompt=" B ", validation_negative_prompt=" Ugly ", captions="abbc")
    assert list(found.captions.values()) == ["", "a", "b", "c"] and found.prompts == {
        "validation": "b",
        "unconditional": "",
    }
    assert list(found.negatives.values()) == ["ugly"]
    assert found.keys.text("b") != found.plain_keys.text("b"), "a negative prompt never has the instruction"
    text, latents = found.plan.caches
    assert (text.needed, text.hits, latents.needed, latents.hits) == (4, 0, 4, 0)
    assert latents.bytes_to_make == 4 * 8 * 8 * found.facts.latent_channels * 4
    kept = prepared(tmp_path, validation_prompt=" B ", prompt_case="keep", captions="abbc")
    assert list(kept.captions.values()) == ["", "a", "b", "c", "B"]
    assert prepared(tmp_path, validation_prompt="z", validation_disable=True).prompts == {}


def test_all_cheap_problems_come_at_once_and_before_the_pictures_are_read(tmp_path):
    settings = {"resume_from_checkpoint": "none", "user_prompt_library": "none.json", "validation_resolution": "33"}
    loaded = asked(tmp_path, {"instance_data_dir": str(tmp_path / "nowhere")}, **settings)
    with pytest.raises(UserError) as caught:
        prepare(loaded, Output.open(tmp_path / "output"))
    places = [problem.where.split(" ")[0] for problem in caught.value.problems]
    assert places == ["resume_from_checkpoint", "none.json", "dataset", "validation_resolution"]
    assert list((tmp_path / "output").rglob("*")) == []


@pytest.mark.parametrize("name, expected", [(KNOWN, "every picture needs a caption"), ("maker/sana", "offline mode")])
def test_the_pictures_of_a_known_model_are_looked_at_before_a_download(name, expected, tmp_path):
    loaded = asked(tmp_path, pretrained_model_name_or_path=name, resolution=512)
    (tmp_path / "pictures" / "1.txt").unlink()
    with pytest.raises(UserError, match=expected):
        prepare(loaded, Output.open(tmp_path / "output"))


def test_buckets_must_fit_the_vae(tmp_path):
    with pytest.raises(UserError, match="multiple of the VAE's factor 8; found 12"):
        prepared(tmp_path, aspect_bucket_alignment=12)
    assert prepared(tmp_path, aspect_bucket_alignment=64).buckets[0].size == Size(64, 64)


def test_pictures_are_drawn_at_the_size_asked_for_or_the_models(tmp_path):
    found = prepared(tmp_path)
    assert drawing_sizes(found.config, found.facts) == [(64, 64)]
    found = prepared(tmp_path, validation_resolution="96x64,32")
    assert drawing_sizes(found.config, found.facts) == [(96, 64), (32, 32)]
    with pytest.raises(UserError) as caught:
        prepared(tmp_path, validation_resolution="96x50,64,40")
    assert [problem.fix for problem in caught.value.problems] == ["use 96x64", "use 32x32"]


def test_a_run_goes_on_from_its_own_checkpoint_alone(tmp_path):
    loaded = asked(tmp_path)
    checkpoint(tmp_path / "output", 3, {**identity_of(loaded.config), "weights_dtype": "fp32"})
    assert prepared(tmp_path).plan.first_step == 3
    assert prepared(tmp_path, resume_from_checkpoint="").plan.first_step == 0
    assert prepare(loaded, Output.open(tmp_path / "output"), fresh=True).plan.first_step == 0
    others = {"optimizer": "torch-adamw", "weights_dtype": "bf16", "pretrained_model_name_or_path": KNOWN}
    for key, value in others.items():
        with pytest.raises(UserError, match="checkpoint-3: trained with"):
            prepared(tmp_path, **{key: value})


def test_what_is_told_and_written_down(tmp_path, caplog):
    found = prepare(asked(tmp_path), Output.open(tmp_path / "output"), ["a note"])
    tell(found)
    for part in ("Model: nano", "3 pictures found = 3 trained + 0 left out", "Licence: ", "a note", "Length: 4 steps"):
        assert part in caplog.text
    write_down(found)
    output = tmp_path / "output"
    assert json.loads((output / "ledger.json").read_text()) == json.loads(json.dumps(found.survey.ledger.to_json()))
    assert json.loads((output / "plan.json").read_text()) == json.loads(json.dumps(found.plan.to_json()))
    assert json.loads((output / "config.json").read_text())["max_train_steps"] == 4


def test_too_little_room_is_told_unless_the_run_is_over(tmp_path):
    huge = {"max_train_steps": 10**9, "checkpoint_step_interval": 1, "checkpoints_total_limit": 0}
    loaded = asked(tmp_path, **huge)
    with pytest.raises(UserError, match="GB are free"):
        tell(prepared(tmp_path, **huge))
    checkpoint(tmp_path / "output", 10**9, identity_of(loaded.config))
    tell(prepared(tmp_path, **huge))


def test_going_on_says_from_where_and_whether_the_pictures_changed(tmp_path, caplog):
    loaded = asked(tmp_path)
    write_down(prepared(tmp_path))
    checkpoint(tmp_path / "output", 2, identity_of(loaded.config))
    before = Output.open(tmp_path / "output").read_json("plan.json")
    tell(prepared(tmp_path))
    tell_changes(before, prepared(tmp_path))
    assert "Resuming from step 2" in caplog.text and "the order from here on" not in caplog.text
    tell_changes(before, prepared(tmp_path, captions="abcd"))
    assert "the order from here on is the new plan's" in caplog.text


def test_a_finished_run_is_known_and_says_how_to_go_on(tmp_path, caplog):
    loaded = asked(tmp_path)
    assert finished_already(prepared(tmp_path)) is None
    checkpoint(tmp_path / "output", 4, identity_of(loaded.config))
    assert finished_already(prepared(tmp_path)) is None, "its pipeline is still to be written"
    output = Output.open(tmp_path / "output")
    output.pipeline.mkdir()
    assert finished_already(prepared(tmp_path)) is None, "it is the pipeline of nobody knows what"
    write_down_export(output, Progress(4))
    assert finished_already(prepared(tmp_path)) == Progress(4, 4 / 3, 8)
    assert "raise max_train_steps" in caplog.text and "--restart" in caplog.text
    assert finished_already(prepared(tmp_path, max_train_steps=5)) is None
    checkpoint(tmp_path / "output", 5, identity_of(loaded.config))
    assert finished_already(prepared(tmp_path, max_train_steps=5)) is None, "it is an older checkpoint's pipeline"


def card(folder: Path, monkeypatch: pytest.MonkeyPatch, mib: int) -> None:
    """A stand-in for nvidia-smi that tells of one GPU."""
    script = folder / "bin" / "nvidia-smi"
    script.parent.mkdir()
    script.write_text(f"#!/bin/sh\necho 'GPU-1, a card, {mib}, {mib}'\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")


def test_the_plan_knows_the_device_and_what_the_run_takes_there(tmp_path, monkeypatch):
    on_cpu = prepared(tmp_path).plan
    assert on_cpu.memory is not None and on_cpu.memory.device is not None
    assert on_cpu.memory.device.kind == "cpu" and on_cpu.memory.need.copies_bytes == 0, "nothing is cast on a CPU"
    assert on_cpu.pace["precision"] == "no" and on_cpu.memory.fits
    card(tmp_path, monkeypatch, 900)
    on_card = prepared(tmp_path, weights_dtype="fp32").plan
    assert on_card.memory is not None and on_card.memory.device is not None
    assert (on_card.memory.device.name, on_card.pace["precision"]) == ("a card", "bf16")
    assert on_card.memory.need.copies_bytes > 0 and not on_card.memory.fits
    assert prepared(tmp_path).device == on_card.memory.device


def test_tiled_encoding_is_another_cache_takes_less_and_is_said(tmp_path):
    """The latents are others, so that none of whole pictures is taken for them."""
    whole = prepared(tmp_path / "one", dataset={"resolution": 1024}, vae_batch_size=2)
    tiled = prepared(tmp_path / "two", dataset={"resolution": 1024}, vae_batch_size=2, vae_tiled_encoding=True)
    assert whole.keys.latent_identity != tiled.keys.latent_identity
    assert whole.keys.text_identity == tiled.keys.text_identity
    first, second = (each.plan.memory.caching for each in (whole, tiled) if each.plan.memory)
    assert first.pictures_bytes - second.pictures_bytes == 2 * (1024**2 - 512**2) * 128 * 5 * 4
    assert any("latents that are trained differ from those of whole pictures" in note for note in tiled.plan.notes)
    assert not any("tiled" in note for note in whole.plan.notes)


def test_too_little_memory_is_a_warning(tmp_path, monkeypatch, caplog):
    card(tmp_path, monkeypatch, 900)
    found = prepared(tmp_path)
    tell(found)
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert any("training takes about 1.0 GB of memory; a card has 943.7 MB" in line for line in warned)
    assert "Memory: about 1.0 GB to train" in caplog.text
    write_down(found)
    assert json.loads((tmp_path / "output" / "plan.json").read_text())["memory"]["device"]["name"] == "a card"


def test_a_speed_counts_only_when_it_was_measured_at_this_pace(tmp_path):
    found = prepared(tmp_path, max_train_steps=100)
    assert found.plan.step_s is None
    write_down(found)
    lines = [{"step": step, "step_s": 9.0 if step == 1 else 0.5} for step in range(1, 9)]
    metrics = tmp_path / "output" / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    again = prepared(tmp_path, max_train_steps=200).plan
    assert (again.step_s, again.left_s) == (0.5, 100.0)
    assert prepared(tmp_path, max_train_steps=100, train_batch_size=2).plan.step_s is None
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines[:1]))
    assert prepared(tmp_path, max_train_steps=100).plan.step_s is None, "the first step warms up"


def test_steps_before_the_plan_are_of_another_pace(tmp_path):
    checkpoint(tmp_path / "output", 3, identity_of(asked(tmp_path).config))
    write_down(prepared(tmp_path, max_train_steps=100))
    (tmp_path / "output" / "metrics.jsonl").write_text('{"step": 2, "step_s": 7}\n{"step": 3, "step_s": 7}\n')
    assert prepared(tmp_path, max_train_steps=100).plan.step_s is None
    with open(tmp_path / "output" / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "step_s": 7}\n{"step": 5, "step_s": 2}\n')
    assert prepared(tmp_path, max_train_steps=100).plan.step_s == 2


def test_caches_of_what_was_never_hashed(tmp_path):
    """Unknown only where something is there: an empty cache holds nothing."""
    found, output = prepared(tmp_path, train_batch_size=2), Output.open(tmp_path / "output")

    def needs(keys, headers_only: bool) -> list[tuple[int, int, int, int]]:
        memory = FileMemory() if headers_only else FileMemory(output.file_memory)
        surveyed = survey_of(found.loaded, found.facts, memory, found.stores, headers_only=headers_only)
        listed = cache_needs(found.loaded, output, found.facts, surveyed, {}, keys)
        return [(need.needed, need.hits, need.misses, need.unknown) for need in listed]

    assert needs(None, True) == [(3, 0, 3, 0), (3, 0, 3, 0)]
    keys = found.keys
    TensorCache(output.text_folder(found.config, found.loaded.text_cache)).fill([(keys.text("a"), torch.zeros(2))])
    latents = TensorCache(output.latent_folder(found.config, found.loaded.datasets[0]))
    latents.fill([(keys.latent(found.survey.records[0]), torch.zeros(2))])
    assert needs(keys, False) == [(3, 1, 2, 0), (3, 1, 2, 0)]
    assert needs(keys, True) == [(3, 1, 2, 0), (3, 0, 0, 3)]
    assert needs(None, False) == needs(None, True) == [(3, 0, 0, 3), (3, 0, 0, 3)]


def test_the_nearest_folder_that_is_there(tmp_path):
    assert existing(tmp_path / "a" / "b" / "c") == tmp_path == existing(tmp_path)


def test_a_long_look_at_pictures_tells_how_far_it_is(monkeypatch, caplog):
    now = [0.0]
    monkeypatch.setattr("sana_tune.prepare.time.monotonic", lambda: now[0])
    looking = Looking()
    with caplog.at_level("INFO", logger=log.name):
        for done in range(1, 61):
            now[0] += 1
            looking("cats", done, 120)
    told = dict.fromkeys(record.getMessage() for record in caplog.records)
    assert list(told) == [
        "Looking at the pictures of cats: 22 of 120, 1.0 a second, about 2 min left",
        "Looking at the pictures of cats: 43 of 120, 1.0 a second, about 1 min left",
    ]


# ---- the dtype of the weights, and what cannot be computed ----

UNSAFE = "Efficient-Large-Model/Sana_1600M_1024px_diffusers"


def test_auto_takes_bf16_weights_where_fp32_does_not_fit_and_says_so(tmp_path, monkeypatch, caplog):
    assert (prepared(tmp_path).plan.weights.dtype, prepared(tmp_path).config.model.weights_dtype) == ("fp32", "fp32")
    card(tmp_path, monkeypatch, 900)
    found = prepared(tmp_path)
    assert found.plan.weights.dtype == found.config.model.weights_dtype == "bf16"
    assert found.loaded.config.model.weights_dtype == "auto", "what was asked stays what was asked"
    assert found.plan.memory is not None and found.plan.memory.need.copies_bytes == 0
    assert identity_of(found.config)["weights_dtype"] == "bf16"
    tell(found)
    assert "Weights: bf16 (it takes about 1.0 GB with fp32 weights, and a card has 0.9 GB; Kahan" in caplog.text
    assert prepared(tmp_path, weights_dtype="fp32").plan.weights.why == "as asked"


def test_auto_goes_on_in_the_dtype_of_the_checkpoint(tmp_path, monkeypatch):
    run = identity_of(asked(tmp_path).config)
    checkpoint(tmp_path / "output", 3, {**run, "weights_dtype": "bf16"})
    weights = prepared(tmp_path).plan.weights
    assert (weights.dtype, weights.why) == ("bf16", "as in the checkpoint")
    with pytest.raises(UserError, match="trained with weights_dtype 'bf16'; this run has 'fp32'"):
        prepared(tmp_path, weights_dtype="fp32")


def test_weights_that_break_in_bf16_are_refused_with_the_replacement(tmp_path, monkeypatch):
    card(tmp_path, monkeypatch, 80_000)
    with pytest.raises(UserError) as caught:
        prepared(tmp_path, pretrained_model_name_or_path=UNSAFE)
    (problem,) = caught.value.problems
    assert "break in bf16" in problem.what and "Sana_1600M_1024px_BF16_diffusers" in problem.fix
    for settings in ({"mixed_precision": "fp16"}, {"mixed_precision": "no"}):
        loaded = asked(tmp_path, pretrained_model_name_or_path=UNSAFE, **settings)
        check_precision(loaded, known(UNSAFE), device_for("auto"))
    with pytest.raises(UserError, match="break in bf16"):
        loaded = asked(tmp_path, pretrained_model_name_or_path=UNSAFE, mixed_precision="no", weights_dtype="bf16")
        check_precision(loaded, known(UNSAFE), device_for("auto"))


def test_fp16_on_a_cpu_is_refused(tmp_path):
    with pytest.raises(UserError, match="fp16 needs a GPU; the run is on a CPU"):
        prepared(tmp_path, mixed_precision="fp16", device="cpu")
