"""Files and flags → Config: types from strings, origins, and every mistake with its message, all at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sana_tune.config.files import examples_dir
from sana_tune.config.load import load, parse_overrides
from sana_tune.errors import UserError
from tests.config.helpers import load_with, problems_of, write_files


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
    "unknown optimizer": ({"optimizer": "adamv"}, {}, "known: optimi-adamw, torch-adamw"),
    "optimizer nearly right": ({"optimizer": "torch-adam"}, {}, "did you mean 'torch-adamw'"),
    "lora": ({"model_type": "lora"}, {}, "not built yet"),
    "quantised base": ({"base_model_precision": "nf4-bnb"}, {}, "base_model_precision: changes what is trained"),
    "deletes files": ({"delete_unwanted_images": True}, {}, "nothing is ever deleted"),
    "bad size": ({"validation_resolution": "1024 by 768"}, {}, "N or WxH"),
    "random crop": ({}, {"crop_style": "random"}, "'random' is not built yet"),
    "cloud dataset": ({}, {"type": "aws"}, "'aws' is not built yet"),
    "mask dataset": ({}, {"dataset_type": "conditioning"}, "masks are not built yet"),
    "no instance prompt": ({}, {"caption_strategy": "instanceprompt"}, "needs an instance_prompt"),
    "half of two": ({}, {"crop": True, "maximum_image_size": 64}, "must be given together"),
    "no model": ({"pretrained_model_name_or_path": "REMOVE"}, {}, "must be set and is not"),
    "plain bf16": ({"weights_dtype": "bf16", "optimizer": "torch-adamw"}, {}, "would not move"),
    "two spellings": ({"--seed": 1, "seed": 2}, {}, "means the same setting"),
    "old and new name": ({"validation_steps": 1, "validation_step_interval": 2}, {}, "means the same setting"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_gets_its_message(name: str, tmp_path: Path) -> None:
    config, dataset, expected = MISTAKES[name]
    assert expected in problems_of(tmp_path, config, dataset)


NOTED = {
    "report_to": "wandb",
    "push_to_hub": True,
    "validation_preview": True,
    "webhook_config": "config/webhook.json",
    "compress_disk_cache": True,
}


@pytest.mark.parametrize("key", NOTED)
def test_what_only_adds_output_is_a_note(key: str, tmp_path: Path) -> None:
    loaded = load_with(tmp_path, {key: NOTED[key]})
    assert [note for note in loaded.notes if note.startswith(key)], loaded.notes


def test_what_is_off_passes_without_a_word(tmp_path: Path) -> None:
    loaded = load_with(tmp_path, {"push_to_hub": "false", "report_to": "none", "base_model_precision": "no_change"})
    assert loaded.notes == ()


def test_inert_sizes_are_said_once(tmp_path: Path) -> None:
    loaded = load_with(tmp_path, {}, {"maximum_image_size": 64, "target_downsample_size": 64})
    assert len([note for note in loaded.notes if "do nothing with crop: false" in note]) == 1


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


def test_the_quickstarts_files_load() -> None:
    """config.json.example and multidatabackend.json.example are the quickstart's, less what is not built yet."""
    folder = Path(__file__).resolve().parents[2] / "config"
    backends = str(folder / "multidatabackend.json.example")
    loaded = load(folder / "config.json.example", {"data_backend_config": backends}, environ={})
    assert [dataset.id for dataset in loaded.datasets] == [
        "pseudo-camera-10k-sana",
        "dreambooth-subject",
        "dreambooth-subject-512",
    ]
    assert loaded.text_cache.cache_dir == "cache/text/sana"
    said = "\n".join(loaded.notes)
    assert "is_regularisation_data is not built yet" in said and "do nothing with crop: false" in said
    assert len(loaded.notes) == 2, loaded.notes
