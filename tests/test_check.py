"""A check finds all that is wrong at once, says what will happen, and leaves nothing but what it remembers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from sana_tune.check import Report, look_over, own_settings, settings_changed
from sana_tune.config.load import Loaded, load
from sana_tune.data.cache import TensorCache
from sana_tune.model.fetch import locate
from sana_tune.output import Output
from sana_tune.prepare import identity_of, prepare, write_down, write_down_export
from sana_tune.progress import Progress
from tests.config.helpers import write_files, write_list
from tests.data.pictures import encoded, noise, put
from tests.test_prepare import card, checkpoint

ROOT = Path(__file__).resolve().parent.parent
BIG = "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers"
GOOD_PROMPT = "a photo of a red zib on a blue background"


def asked(folder: Path, dataset: dict[str, Any] | None = None, captions: str = "abc", **settings: Any) -> Loaded:
    """A run on nano over one picture a letter, captioned with the letter."""
    for number, caption in enumerate(captions):
        put(folder / "pictures", f"{number}.png", 64, 64, seed=number, caption=caption)
    wanted = {"caption_strategy": "textfile", "max_train_steps": 4, "validation_prompt": GOOD_PROMPT, **settings}
    return load(write_files(folder, wanted, dataset), {}, {})


def checked(folder: Path, dataset: dict[str, Any] | None = None, captions: str = "abc", **settings: Any) -> Report:
    return look_over(asked(folder, dataset, captions, **settings))


def files_below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def places(report: Report) -> list[str]:
    return [problem.where for problem in report.problems]


# ---- what it says and what it leaves ----


def test_a_good_run_is_ok_and_its_plan_is_that_of_train(tmp_path):
    loaded = asked(tmp_path, train_batch_size=2)
    before = files_below(tmp_path)
    found = look_over(loaded, ["a note"])
    assert found.ok and found.warnings == () and found.notes[0] == "a note"
    assert files_below(tmp_path) - before == {"output/cache/files.jsonl"}
    assert found.plan is not None and found.ledger is not None and found.model is not None
    plan, own = prepare(loaded, Output.open(tmp_path / "output"), ["a note"]).plan.to_json(), found.plan.to_json()
    assert {key for key in plan if plan[key] != own[key]} <= {"disk_free_bytes", "notes", "saving"}, (
        "free memory is another now"
    )
    assert (found.model.folder, found.model.fetch_bytes, found.images) == (str(locate("nano")), 0, None)
    assert json.loads(json.dumps(found.to_json()))["plan"]["buckets"][0]["pictures"] == 3


def test_no_torch_no_network_and_no_trace_of_weights(tmp_path):
    """A whole check in a process of its own; the network is blocked for it as for every test."""
    path = asked(tmp_path).path
    script = (
        "import sys\nfrom sana_tune.cli.main import exit_code\ncode = exit_code(sys.argv[1:])\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'accelerate', 'bitsandbytes', 'httpx', 'requests'}\n"
        "print(code, sorted(heavy & set(sys.modules)))"
    )
    command = [sys.executable, "-c", script, "check", "--config", str(path), "--images"]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert ran.stdout.endswith("ok: nothing is wrong\n0 []\n") and ran.stderr == "", ran.stderr
    assert files_below(tmp_path / "output") == {"cache/files.jsonl"}, "the model's hashes would be remembered too"


def test_everything_that_is_wrong_is_told_at_once(tmp_path):
    settings = {"resume_from_checkpoint": "none", "user_prompt_library": "none.json", "validation_resolution": "33"}
    loaded = asked(tmp_path, checkpoint_step_interval=1, checkpoints_total_limit=0, **settings)
    other = {"id": "gone", "instance_data_dir": str(tmp_path / "nowhere")}
    backends = json.loads((tmp_path / "multidatabackend.json").read_text())
    (tmp_path / "multidatabackend.json").write_text(json.dumps([*backends, other]))
    (tmp_path / "pictures" / "1.txt").unlink()
    loaded = load(loaded.path, {"max_train_steps": str(10**9)}, {})
    found = look_over(loaded)
    starts = ["resume_from_checkpoint none", "none.json", "validation_resolution", "dataset pictures", "dataset gone"]
    assert len(found.problems) == len(starts) + 1 and not found.ok
    assert all(place.startswith(start) for place, start in zip(places(found), starts, strict=False))
    assert found.problems[-1].what.startswith("the run writes about"), "the disk, though a picture has no caption"
    assert found.plan is not None and found.plan.buckets[0].pictures == 2
    assert found.datasets[0].captions.missing == 1 and found.datasets[1].captions.variants == 0


@pytest.mark.parametrize("output", ["config.json/out", "config.json", "bad\0name", "x" * 300])
def test_an_output_that_cannot_be_written_is_a_problem_and_nothing_is_made(output, tmp_path):
    loaded = asked(tmp_path)
    before = files_below(tmp_path)
    path = str(tmp_path / output)
    found = look_over(load(loaded.path, {"output_dir": path}, {}))
    assert len(found.problems) == 1 and "output_dir must be a folder that can be written" in found.problems[0].what
    assert files_below(tmp_path) == before and found.plan is not None


def test_a_folder_nobody_may_write_is_a_problem(tmp_path):
    loaded, output = asked(tmp_path), tmp_path / "locked"
    output.mkdir(mode=0o500)
    if os.access(output, os.W_OK):
        pytest.skip("this user may write everywhere")
    found = look_over(load(loaded.path, {"output_dir": str(output / "run")}, {}))
    assert "permission denied" in found.problems[0].what


def test_a_broken_model_is_told_with_the_pictures_problems(tmp_path):
    model = tmp_path / "model"
    shutil.copytree(locate("nano"), model)
    (model / "vae" / "config.json").unlink()
    loaded = asked(tmp_path, pretrained_model_name_or_path=str(model))
    (tmp_path / "pictures" / "0.txt").unlink()
    found = look_over(loaded)
    assert places(found)[0] == str(model) and "every picture needs a caption" in found.problems[1].what
    assert found.plan is None and found.model is None and found.ledger is not None


def test_buckets_that_the_vae_cannot_have(tmp_path):
    found = checked(tmp_path, aspect_bucket_alignment=12)
    assert places(found) == ["aspect_bucket_alignment"] and found.plan is None


# ---- settings ----


def test_settings_that_differ_are_told_with_their_origin_and_without_secrets(tmp_path):
    token = "hf_" + "a" * 30
    loaded = asked(tmp_path, {"repeats": 3}, seed=5, learning_rate=1e-5, validation_resolution="64x96,32",
                   validation_negative_prompt=f"no {token}")  # fmt: skip
    found = {each.key: each for each in settings_changed(load(loaded.path, {"use_ema": "true"}, {}))}
    assert "learning_rate" not in found and "validation_steps" not in found, "1e-5 is the default"
    assert (found["seed"].value, found["seed"].default) == (5, 0) and "config.json" in found["seed"].origin
    assert found["use_ema"].origin.startswith("command line")
    assert found["validation_resolution"].value == "64x96,32x32"
    assert token not in str(found["validation_negative_prompt"].value)
    assert token not in json.dumps(look_over(loaded).to_json())
    assert own_settings(loaded.config, loaded.datasets[0]) == {"resolution": 64, "repeats": 3}


# ---- the model ----


def test_a_hub_model_that_is_not_here_is_a_note_with_its_bytes(tmp_path):
    found = checked(tmp_path, {"resolution": 1024}, pretrained_model_name_or_path=BIG)
    assert found.ok and found.model is not None and found.model.folder is None and not found.model.assumed
    assert 12e9 < found.model.fetch_bytes < 14e9
    assert any(f"{BIG} is not on this machine: about 12.9 GB will be downloaded" in note for note in found.notes)
    assert any("HF_HUB_OFFLINE" in warning for warning in found.warnings), "the tests run offline"
    assert found.plan is not None and found.plan.parameters == 1_604_462_752
    assert found.datasets[0].captions.too_long is None
    assert checked(tmp_path, pretrained_model_name_or_path=BIG, weights_dtype="bf16").model.fetch_bytes < 10e9  # type: ignore[union-attr]


def test_an_unknown_hub_model_is_planned_as_the_common_one_and_a_typo_is_guessed(tmp_path):
    found = checked(tmp_path, {"resolution": 1024}, pretrained_model_name_or_path=BIG.replace("1600M", "1601M"))
    assert found.ok and found.model is not None and found.model.assumed
    assert found.plan is not None and found.plan.parameters == 1_604_462_752
    text = " ".join(found.notes)
    assert f"did you mean {BIG}?" in text and "as if it were the 1.6B model" in text


# ---- captions, prompts, pictures ----


def test_doubtful_captions_and_prompts_are_warnings(tmp_path):
    (tmp_path / "prompts.json").write_text(json.dumps({"a_<token>": GOOD_PROMPT, "b": "a cat", "c": "word " * 900}))
    settings = {"user_prompt_library": str(tmp_path / "prompts.json"), "missing_caption": "empty"}
    for number, caption in enumerate(("x", "x", "a photo of <token>", "word " * 900, " ")):
        put(tmp_path / "pictures", f"{number}.png", 64, 64, seed=number, caption=caption)
    found = checked(tmp_path, captions="", **settings)
    captions = found.datasets[0].captions
    assert (captions.repeated, captions.placeholder, captions.too_long, captions.empty) == (2, 1, 1, 1)
    assert found.ok and {warning.partition(":")[0] for warning in found.warnings} == {
        "dataset pictures",
        "prompts still hold a placeholder for the subject",
        "prompts of a few words look bad with Sana",
        "prompts are longer than 300 tokens and are cut",
    }
    told = "\n".join(found.warnings)
    assert "1 picture with a caption over 300 tokens, whose end is cut (3.png)" in told
    assert "b ('a cat')" in told and "a_<token>; put its name there" in told and "cut: c" in told
    counts = tmp_path / "output" / "cache" / "token_counts.json"
    before = counts.read_bytes()
    assert checked(tmp_path, captions="", **settings).warnings == found.warnings and counts.read_bytes() == before


def test_an_instance_prompt_that_was_never_filled_in(tmp_path):
    prompt = {"caption_strategy": "instanceprompt", "instance_prompt": "the name of your subject goes here"}
    found = checked(tmp_path, prompt)
    assert found.datasets[0].captions.repeated == 0, "it is meant for all of them"
    assert any("3 pictures with a placeholder" in warning for warning in found.warnings)


def test_enlarged_and_misshapen_pictures_are_warnings(tmp_path):
    put(tmp_path / "pictures", "wide.png", 500, 100, seed=8, caption="wide")
    put(tmp_path / "pictures", "tiny.png", 32, 32, seed=9, caption="tiny")
    found = checked(tmp_path)
    told = "\n".join(found.warnings)
    assert "1 picture enlarged to the size of training, up to 2.00 times (tiny.png)" in told
    assert "1 picture wider than 4:1 or narrower than 1:4, which Sana never saw (wide.png)" in told


def test_whole_pictures_are_read_and_remembered_when_asked(tmp_path):
    loaded, told = asked(tmp_path), []
    folder = tmp_path / "pictures"
    for copy, of in (("copy", "0"), ("torn", "1")):
        (folder / f"{copy}.txt").write_text(copy)
        shutil.copy(folder / f"{of}.png", folder / f"{copy}.png")
    whole = encoded(noise(64, 64, 7), "JPEG", quality=95)
    (folder / "torn.png").write_bytes(whole[: len(whole) // 2])
    found = look_over(loaded, images=True, report=lambda *event: told.append(event))
    assert found.images is not None and ("Reading pictures", 5, 5) in told
    assert list(found.images.broken) == ["pictures/torn.png"] and found.images.same == (
        ("pictures/0.png", "pictures/copy.png"),
    )
    text = "\n".join(found.warnings)
    assert "1 picture cannot be decoded, to be left out: pictures/torn.png" in text
    assert "1 picture of the same bytes as another: pictures/0.png = pictures/copy.png" in text
    assert found.ok and found.plan is not None and found.plan.buckets[0].pictures == 4
    assert found.plan.caches[1].needed == 3, "equal pictures have one latent, and now that is known"
    assert look_over(loaded).images is None
    for path in folder.glob("*.png"):
        path.write_bytes(whole[: len(whole) // 2])
    nothing = look_over(loaded, images=True)
    assert "not one of the pictures can be decoded" in nothing.problems[-1].what and nothing.plan is None


# ---- the plan ----


def test_caches_are_hits_misses_or_unknown(tmp_path):
    loaded = asked(tmp_path)

    def caches() -> list[tuple[int, int, int]]:
        plan = look_over(loaded).plan
        assert plan is not None
        return [(cache.hits, cache.misses, cache.unknown) for cache in plan.caches]

    assert caches() == [(0, 5, 0), (0, 3, 0)], "an empty cache has nothing"
    folder = tmp_path / "output" / "cache"
    TensorCache(folder / "text").fill([("of another model", torch.zeros(2))])
    TensorCache(folder / "vae" / "pictures").fill([("of another model", torch.zeros(2))])
    assert caches() == [(0, 0, 5), (0, 0, 3)], "nothing was hashed yet"
    prepared = prepare(loaded, Output.open(tmp_path / "output"))
    keys = prepared.keys
    TensorCache(folder / "text").fill([(keys.text("a"), torch.zeros(2))])
    TensorCache(folder / "vae" / "pictures").fill([(keys.latent(prepared.survey.records[0]), torch.zeros(2))])
    assert caches() == [(1, 4, 0), (1, 2, 0)]
    put(tmp_path / "pictures", "new.png", 64, 64, seed=99, caption="c")
    assert caches() == [(1, 4, 0), (1, 2, 1)]


def test_a_warmup_and_intervals_longer_than_the_run(tmp_path):
    found = checked(tmp_path, lr_warmup_steps=8, checkpoint_step_interval=2, validation_step_interval=9)
    assert any("lr_warmup_steps 8 is as long as the run (4 steps)" in warning for warning in found.warnings)
    assert any(note.startswith("validation_step_interval 9 is longer than the run") for note in found.notes)
    found = checked(tmp_path, lr_warmup_steps=3, validation_disable=True)
    assert found.warnings == () and any(
        note.startswith("checkpoint_step_interval 500 is longer") for note in found.notes
    )


def test_memory_that_does_not_fit_is_a_warning_with_the_way_out(tmp_path, monkeypatch):
    card(tmp_path, monkeypatch, 24564)
    found = checked(tmp_path, {"resolution": 1024}, pretrained_model_name_or_path=BIG, weights_dtype="fp32")
    assert found.ok and found.plan is not None and found.plan.memory is not None
    assert found.plan.memory.ways[0].changes == {"weights_dtype": "bf16"}
    assert any("a card has 25.8 GB: it would fit with weights_dtype bf16" in warning for warning in found.warnings)


def test_a_device_that_is_not_seen_and_one_that_others_use(tmp_path, monkeypatch):
    assert any("device cuda: none was found here" in text for text in checked(tmp_path, device="cuda").warnings)
    card(tmp_path, monkeypatch, 24564)
    script = Path(os.environ["PATH"].split(":")[0]) / "nvidia-smi"
    script.write_text("#!/bin/sh\necho 'GPU-1, a card, 24564, 100'\n")
    assert any("104.9 MB are free now, other programs use the rest" in text for text in checked(tmp_path).warnings)


def test_a_checkpoint_is_gone_on_from_and_a_finished_run_is_said(tmp_path):
    loaded = asked(tmp_path)
    checkpoint(tmp_path / "output", 3, identity_of(loaded.config))
    found = look_over(loaded)
    assert found.plan is not None and found.plan.first_step == 3
    assert any("goes on from step 3" in note for note in found.notes)
    checkpoint(tmp_path / "output", 4, identity_of(loaded.config))
    output = Output.open(tmp_path / "output")
    output.pipeline.mkdir()
    write_down_export(output, Progress(4))
    assert any("is finished: raise max_train_steps" in note for note in look_over(loaded).notes)
    (tmp_path / "output" / "checkpoint-5").mkdir()
    assert any("checkpoint-5 is not complete" in warning for warning in look_over(loaded).warnings)
    other = look_over(load(loaded.path, {"optimizer": "torch-adamw"}, {}))
    assert "trained with optimizer" in other.problems[0].what


def test_time_is_known_where_a_run_was_timed(tmp_path):
    loaded = asked(tmp_path)
    write_down(prepare(loaded, Output.open(tmp_path / "output")))
    lines = [{"step": step, "step_s": 0.25} for step in range(1, 4)]
    (tmp_path / "output" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    plan = look_over(loaded).plan
    assert plan is not None and (plan.step_s, plan.left_s) == (0.25, 1.0)


# ---- roles ----


def with_roles(folder: Path, **settings: Any) -> Loaded:
    """Three pictures with masks and two that are held out, one of which is trained too."""
    for number in range(3):
        put(folder / "d", f"{number}.png", 64, 64, seed=number, caption="abc"[number])
        put(folder / "m", f"{number}.png", 64, 64, seed=10 + number)
    put(folder / "held", "new.png", 64, 64, seed=20, caption="new")
    shutil.copy(folder / "d" / "1.png", folder / "held" / "old.png")
    (folder / "held" / "old.txt").write_text("old")
    entries = [
        {"id": "d", "instance_data_dir": "d", "conditioning_data": "m", "start_step": 0, "text_embeds": "t"},
        {"id": "late", "instance_data_dir": "d", "start_step": 3, "is_regularisation_data": True},
        {"id": "held", "instance_data_dir": "held", "dataset_type": "eval"},
        {"id": "m", "instance_data_dir": "m", "dataset_type": "conditioning"},
        {"id": "t", "dataset_type": "text_embeds", "cache_dir": str(folder / "texts")},
        {"id": "first", "dataset_type": "text_embeds", "default": True},
    ]
    wanted = {"caption_strategy": "textfile", "max_train_steps": 9, "resolution": 64, **settings}
    return load(write_list(folder, {"validation_prompt": GOOD_PROMPT, **wanted}, entries), {}, {})


def test_the_plan_of_a_check_is_that_of_train_with_roles_and_schedules_too(tmp_path):
    loaded = with_roles(tmp_path, regularisation_target="base")
    found = look_over(loaded)
    assert found.ok and found.plan is not None
    trained = prepare(loaded, Output.open(tmp_path / "output")).plan
    told, really = found.plan.to_json(), trained.to_json()
    for one in (told, really):
        one.pop("notes")
        one["disk_free_bytes"] = 0
    assert told["memory"]["need"]["base_bytes"] > 0
    assert told["caches"] == really["caches"]
    assert told["saving"]["checkpoint_bytes"] == really["saving"]["checkpoint_bytes"] > 0
    assert {key for key in told if told[key] != really[key]} <= {"memory", "saving"}, "free memory moves"
    assert [list(shown["datasets"]) for shown in told["epochs_shown"]] == [["d"], ["d", "late"], ["d", "late"]]
    assert [cache["name"] for cache in told["caches"]] == [
        "text", "text of t", "latents of d", "masks of d", "latents of late", "latents of held",
    ]  # fmt: skip
    assert look_over(with_roles(tmp_path)).plan.memory.need.base_bytes == 0  # pyright: ignore[reportOptionalMemberAccess]


def test_held_out_pictures_that_are_trained_are_told_as_soon_as_that_is_known(tmp_path):
    first = look_over(with_roles(tmp_path))
    assert any("held-out pictures that were not read yet" in note for note in first.notes)
    assert not any("that is held out" in warning for warning in first.warnings)
    again = look_over(with_roles(tmp_path), images=True)
    assert any("held/old.png is the same file as d/1.png" in warning for warning in again.warnings)
    assert not any("held-out pictures that were not read" in note for note in again.notes)
    small = Image.open(tmp_path / "d" / "2.png").resize((60, 60))
    (tmp_path / "held" / "old.png").write_bytes(encoded(small))
    alike = look_over(load(tmp_path / "config.json", {}, {}), images=True)
    assert any("held/old.png is much like d/2.png" in warning for warning in alike.warnings)


def test_missing_masks_and_small_buckets_are_problems_of_a_check_too(tmp_path):
    loaded = with_roles(tmp_path, small_buckets="error", train_batch_size=5)
    (tmp_path / "m" / "2.png").unlink()
    said = "\n".join(str(problem) for problem in look_over(loaded).problems)
    assert "every picture needs a mask of its name (conditioning_data m); 1 of 3 have none" in said
    assert "every bucket must fill a batch of 5 (small_buckets error)" in said
    assert "set repeats to 1 or train_batch_size to 3" in said
