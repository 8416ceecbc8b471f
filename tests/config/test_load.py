"""Files and flags → Config: types from strings, origins, and every mistake with its message, all at once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from sana_tune.config.files import examples_dir
from sana_tune.config.load import load, parse_overrides
from sana_tune.errors import UserError
from tests.config.helpers import load_with, problems_of, write_files, write_list

ROOT = Path(__file__).resolve().parents[2]


def test_values_are_read_from_strings_and_dashed_keys(tmp_path: Path) -> None:
    loaded = load_with(
        tmp_path,
        {"--learning_rate": "1e-4", "--use_ema": "false", "gradient_checkpointing": "false", "max_train_steps": "20"},
    )
    assert loaded.config.optimizer.learning_rate == 1e-4
    assert loaded.config.ema.use_ema is False
    assert loaded.config.model.gradient_checkpointing is False, 'the text "false" means false'
    assert loaded.config.train.max_train_steps == 20


def test_null_and_empty_mean_not_set(tmp_path: Path) -> None:
    loaded = load_with(tmp_path, {"train_batch_size": None, "lr_scheduler": "", "resume_from_checkpoint": ""})
    assert loaded.config.data.train_batch_size == 1
    assert loaded.config.optimizer.lr_scheduler == "constant_with_warmup"
    assert loaded.config.train.resume_from_checkpoint == "", "an empty checkpoint name switches resuming off"


def test_the_command_line_wins_and_origins_are_told(tmp_path: Path) -> None:
    loaded = load(write_files(tmp_path, {"seed": 3, "train_batch_size": 2}), {"seed": "7"}, environ={})
    assert loaded.config.train.seed == 7
    assert loaded.origins["seed"] == "command line: seed"
    assert loaded.origins["train_batch_size"] == f"{tmp_path / 'config.json'}: train_batch_size"
    assert loaded.origins["max_grad_norm"] == "default"


def test_precision_from_the_environment_yields_to_the_file(tmp_path: Path) -> None:
    path = write_files(tmp_path)
    loaded = load(path, {}, environ={"MIXED_PRECISION": "no"})
    assert loaded.config.model.mixed_precision == "no"
    assert loaded.origins["mixed_precision"] == "environment: MIXED_PRECISION"
    path = write_files(tmp_path, {"mixed_precision": "bf16"})
    assert load(path, {}, environ={"MIXED_PRECISION": "no"}).config.model.mixed_precision == "bf16"


def test_a_dataset_inherits_and_overrides(tmp_path: Path) -> None:
    loaded = load_with(tmp_path, {"train_batch_size": 4, "caption_strategy": "textfile"}, {"train_batch_size": 2})
    dataset = loaded.datasets[0]
    assert (dataset.train_batch_size, dataset.caption_strategy, dataset.resolution) == (2, "textfile", 64)


def test_a_disabled_dataset_is_left_out(tmp_path: Path) -> None:
    assert "must be enabled" in problems_of(tmp_path, dataset={"disabled": "true"})


def test_no_text_cache_is_needed(tmp_path: Path) -> None:
    assert load_with(tmp_path).text_cache.default is True


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    said = problems_of(
        tmp_path, {"optimizr": "x", "seed": -1, "lr_scheduler": "cosin"}, {"crop_aspect": "sqare", "repeats": "many"}
    )
    for expected in ("optimizr", "did you mean optimizer?", "seed", "cosine", "'square'", "repeats"):
        assert expected in said, said


MISTAKES = {
    "unknown key": ({"train_batchsize": 2}, {}, "did you mean train_batch_size?"),
    "dataset's unknown key": ({}, {"instance_dir": "x"}, "there is no such setting"),
    "dataset key in config.json": ({"crop": True}, {}, "multidatabackend.json"),
    "renamed dataset key in config.json": ({"is_regularization_data": True}, {}, "multidatabackend.json"),
    "renamed config key in a dataset": ({}, {"checkpointing_steps": 5}, "is a setting of config.json"),
    "config key in a dataset": ({}, {"learning_rate": 1e-4}, "config.json"),
    "word for number": ({"train_batch_size": "four"}, {}, "valid integer; found 'four'"),
    "fraction for whole": ({"train_batch_size": 1.5}, {}, "found 1.5"),
    "switch for number": ({"max_train_steps": True}, {}, "must be no switch; found true"),
    "number below range": ({"learning_rate": 0}, {}, "greater than 0"),
    "not a number": ({"learning_rate": "nan"}, {}, "finite number"),
    "unknown optimizer": ({"optimizer": "adamv"}, {}, "no optimizer has the name 'adamv'"),
    "optimizer nearly right": ({"optimizer": "torch-adamv"}, {}, "did you mean 'torch-adam"),
    "optimizer of theirs": ({"optimizer": "soap"}, {}, "the nearest is optimi-stableadamw"),
    "standard LoRA": ({"model_type": "lora", "lora_type": "standard"}, {}, "a standard LoRA does not fit Sana"),
    "quantised base": (
        {"base_model_precision": "nf4-bnb"},
        {},
        "base_model_precision: a quantised base must be frozen",
    ),
    "deletes files": ({"delete_unwanted_images": True}, {}, "nothing is ever deleted"),
    "bad size": ({"validation_resolution": "1024 by 768"}, {}, "N or WxH"),
    "crop by faces": ({}, {"crop_style": "face"}, "'face' is not built yet"),
    "cloud dataset": ({}, {"type": "aws"}, "type aws needs aws_bucket_name"),
    "masks alone": ({}, {"dataset_type": "conditioning"}, "at least one dataset of pictures must be enabled"),
    "held-out pictures alone": ({}, {"dataset_type": "eval"}, "at least one dataset of pictures must be enabled"),
    "masks that are not there": ({}, {"conditioning_data": "m"}, "an entry with dataset_type conditioning that is not"),
    "a text cache that is not there": ({}, {"text_embeds": "t"}, "an entry with dataset_type text_embeds that is not"),
    "a probability of nothing": ({}, {"probability": 0}, "must have a probability above 0; found none"),
    "an end before the start": ({}, {"start_epoch": 3, "end_epoch": 2}, "end_epoch must not be below start_epoch"),
    "a start for everyone": ({}, {"start_step": 5}, "at least one dataset must be shown from the start"),
    "fading out": ({}, {"disable_after_epoch_step": 9}, "use end_step"),
    "no instance prompt": ({}, {"caption_strategy": "instanceprompt"}, "needs an instance_prompt"),
    "half of two": ({}, {"crop": True, "maximum_image_size": 64}, "must be given together"),
    "no model": ({"pretrained_model_name_or_path": "REMOVE"}, {}, "must be set and is not"),
    "plain bf16": ({"weights_dtype": "bf16", "optimizer_config": "kahan_sum=false"}, {}, "would not move"),
    "two spellings": ({"--seed": 1, "seed": 2}, {}, "means the same setting"),
    "old and new name": ({"validation_steps": 1, "validation_step_interval": 2}, {}, "means the same setting"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_gets_its_message(name: str, tmp_path: Path) -> None:
    config, dataset, expected = MISTAKES[name]
    assert expected in problems_of(tmp_path, config, dataset)


def test_of_masks_with_a_mistake_only_that_is_told(tmp_path: Path) -> None:
    entries = [
        {"id": "d", "instance_data_dir": "d", "conditioning_data": "m"},
        {"id": "m", "dataset_type": "conditioning", "instance_data_dir": "m", "type": "aws"},
    ]
    with pytest.raises(UserError) as caught:
        load(write_list(tmp_path, {}, entries), {}, {})
    (problem,) = caught.value.problems
    assert problem.what == "must be local; found 'aws'"
    off = {**entries[1], "type": "local", "disable": True}
    with pytest.raises(UserError, match="that is not disabled; found 'm', there is none"):
        load(write_list(tmp_path, {}, [entries[0], off]), {}, {})


NOTED = {
    "enable_watermark": True,
    "hash_filenames": True,
}


@pytest.mark.parametrize("key", NOTED)
def test_what_only_adds_output_is_a_note(key: str, tmp_path: Path) -> None:
    loaded = load_with(tmp_path, {key: NOTED[key]})
    assert [note for note in loaded.notes if note.startswith(key)], loaded.notes


def test_what_is_off_passes_without_a_word(tmp_path: Path) -> None:
    off = {"push_to_hub": "false", "report_to": "none", "publishing_config": "", "base_model_precision": "no_change"}
    loaded = load_with(tmp_path, {**off, "$schema": "sana_tune/config.schema.json"})
    assert loaded.notes == ()


def test_inert_sizes_are_said_once(tmp_path: Path) -> None:
    loaded = load_with(tmp_path, {}, {"maximum_image_size": 64, "target_downsample_size": 64})
    assert len([note for note in loaded.notes if "do nothing with crop: false" in note]) == 1


def test_values_tell_where_they_come_from(tmp_path: Path) -> None:
    """A dataset's own, what it inherits, and what nobody gave."""
    loaded = load_with(tmp_path, {"train_batch_size": 4}, {"repeats": "2"})
    origins = loaded.dataset_origins["pictures"]
    assert origins["repeats"] == f"{tmp_path / 'multidatabackend.json'}: pictures: repeats"
    assert origins["train_batch_size"] == f"{tmp_path / 'config.json'}: train_batch_size"
    assert origins["vae_batch_size"] == origins["crop"] == "default"


@pytest.mark.parametrize("ending", [".json", ".toml", ".yaml", ".yml"])
def test_every_format_says_the_same(ending: str, tmp_path: Path) -> None:
    backends = write_files(tmp_path).with_name("multidatabackend.json")
    values = {"pretrained_model_name_or_path": "nano", "data_backend_config": str(backends), "learning_rate": 1e-5,
              "mixed_precision": "no", "use_ema": True, "validation_resolution": "64x32"}  # fmt: skip
    texts = {
        ".json": json.dumps(values),
        ".toml": "\n".join(f"{key} = {json.dumps(value)}" for key, value in values.items()),
        ".yaml": "\n".join(f"{key}: {value if isinstance(value, str) else json.dumps(value)}  # why"
                           for key, value in values.items()),
    }  # fmt: skip
    path = tmp_path / f"mine{ending}"
    path.write_text(texts.get(ending, texts[".yaml"]), encoding="utf-8")
    loaded = load(path, {}, environ={})
    assert loaded.config == load(None, values, environ={}).config
    assert loaded.origins["use_ema"] == f"{path}: use_ema"


def test_a_shell_config_is_read_with_its_extra_arguments(tmp_path: Path) -> None:
    backends = write_files(tmp_path).with_name("multidatabackend.json")
    path = tmp_path / "config.env"
    path.write_text(
        f"export MODEL_NAME=nano\nDATALOADER_CONFIG='{backends}'\nMAX_NUM_STEPS=7  # short\n"
        "USE_GRADIENT_CHECKPOINTING=false\nLEARNING_RATE=1e-4\nHF_HOME=/elsewhere\n"
        'TRAINER_EXTRA_ARGS="--use_ema --validation_prompt=\'a red zib\'"\nTRAINER_EXTRA_ARGS+=" --seed 3"\n'
    )
    config = load(path, {"seed": "4"}, environ={}).config
    assert config.model.pretrained_model_name_or_path == "nano" and config.train.max_train_steps == 7
    assert config.model.gradient_checkpointing is False and config.optimizer.learning_rate == 1e-4
    assert config.ema.use_ema and config.validation.validation_prompt == "a red zib" and config.train.seed == 4


def test_ids_must_be_unique_and_lists_be_lists(tmp_path: Path) -> None:
    path = write_files(tmp_path)
    entry = {"id": "a", "instance_data_dir": "x"}
    (tmp_path / "multidatabackend.json").write_text(json.dumps([entry, entry]))
    with pytest.raises(UserError, match="must be unique"):
        load(path, {}, environ={})
    (tmp_path / "multidatabackend.json").write_text(json.dumps(entry))
    with pytest.raises(UserError, match="must be a list of datasets"):
        load(path, {}, environ={})


def test_a_flag_without_a_value_is_told_once(tmp_path: Path) -> None:
    with pytest.raises(UserError) as told:
        load(write_files(tmp_path), parse_overrides(["--validation_prompt", "--max_train_steps"]), environ={})
    said = [str(problem).splitlines()[0] for problem in told.value.problems]
    assert said == [
        f"command line: {key}: needs a value; found none" for key in ("max_train_steps", "validation_prompt")
    ]


def test_the_pictures_of_an_example_are_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = load(examples_dir() / "nano" / "config.json", {}, {}).datasets[0].instance_data_dir
    assert Path(folder) == examples_dir() / "nano" / "pictures"


def test_overrides_in_all_their_forms() -> None:
    found = parse_overrides(["--seed", "3", "--learning-rate=1e-4", "use_ema=true", "--gradient_checkpointing"])
    assert found == {"seed": "3", "learning_rate": "1e-4", "use_ema": "true", "gradient_checkpointing": True}
    assert parse_overrides(["--flow_schedule_shift", "-1"]) == {"flow_schedule_shift": "-1"}
    with pytest.raises(UserError, match="no --key value"):
        parse_overrides(["stray"])


def test_the_quickstarts_files_load_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guide's dataset list letter for letter, and a config.json with every key that it names."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "tests" / "data" / "quickstart", tmp_path / "config")
    loaded = load(tmp_path / "config" / "config.json", {}, environ={})
    assert [dataset.id for dataset in loaded.datasets] == [
        "pseudo-camera-10k-sana",
        "dreambooth-subject",
        "dreambooth-subject-512",
    ]
    first, second, third = loaded.datasets
    assert (first.crop, first.crop_style, first.crop_aspect, first.resolution) == (True, "center", "square", 512)
    assert (second.repeats, second.resolution, third.resolution) == (1000, 1024, 512)
    assert second.train_batch_size == 6 and second.instance_prompt == "the name of your subject goes here"
    assert loaded.text_cache.cache_dir == "cache/text/sana" and loaded.text_cache.write_batch_size == 128
    config = loaded.config
    assert [str(size) for size in config.validation.validation_resolution] == ["1024x1024", "1280x768", "2048x2048"]
    assert config.model.gradient_checkpointing_interval == 2 and config.flow.flow_schedule_auto_shift
    said = "\n".join(loaded.notes)
    for note in ("do nothing with crop: false", "auto_shift takes effect"):
        assert note in said
    assert config.watch.push_to_hub and config.watch.report_to == "wandb"


def test_the_examples_to_copy_load() -> None:
    """config.json.example and multidatabackend.json.example as they are."""
    folder = ROOT / "config"
    backends = str(folder / "multidatabackend.json.example")
    loaded = load(folder / "config.json.example", {"data_backend_config": backends}, environ={})
    assert len(loaded.datasets) >= 1


def test_simpletuners_sana_example_loads_with_notes(tmp_path: Path) -> None:
    """Its published LoKr settings: every key means something, or a note says why it means nothing."""
    lokr = {
        "model_type": "lora", "lora_type": "lycoris", "lycoris_config": "config/lycoris_config.json", "lora_rank": 16,
        "optimizer": "adamw_bf16", "learning_rate": 2e-5, "lr_scheduler": "constant_with_warmup",
        "lr_warmup_steps": 100, "train_batch_size": 4, "max_grad_norm": 1, "grad_clip_method": "value", "use_ema": True,
        "ema_update_interval": 25, "validation_guidance": 4.5, "validation_num_inference_steps": 20,
        "flow_schedule_shift": 3, "attention_mechanism": "diffusers", "base_model_precision": "no_change",
        "caption_dropout_probability": 0.1, "checkpointing_steps": 100, "checkpoints_total_limit": 5,
        "compress_disk_cache": True, "disable_benchmark": False, "gradient_checkpointing": "true",
        "hub_model_id": "sana-lokr", "minimum_image_size": 0, "num_train_epochs": 0, "max_train_steps": 400,
        "push_checkpoints_to_hub": True, "push_to_hub": True, "report_to": "none", "seed": 42,
        "resume_from_checkpoint": "latest", "tracker_project_name": "lokr", "validation_torch_compile": "false",
        "validation_negative_prompt": "blurry", "validation_seed": 42, "validation_steps": 50,
        "vae_batch_size": 1, "write_batch_size": 128,
    }  # fmt: skip
    loaded = load_with(tmp_path, lokr)
    config, notes = loaded.config, "\n".join(loaded.notes)
    assert (config.model.model_type, config.adapter.lora_type) == ("lora", "lycoris")
    assert config.adapter.lycoris_config == "config/lycoris_config.json"
    assert (config.optimizer.optimizer, config.optimizer.learning_rate) == ("adamw_bf16", 2e-5)
    assert (config.train.max_train_steps, config.ema.ema_update_interval) == (400, 25)
    print(notes)
    for note in (
        "lora_rank has no effect here: it is for lora_type standard", "attention_mechanism", "ema_update_interval",
        "defaults used here and (SimpleTuner's)",
    ):  # fmt: skip
        assert note in notes, notes
