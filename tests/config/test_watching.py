"""Settings of trackers, webhooks, the hub and scripts: what they take, and all that is wrong at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sana_tune.config.load import load
from sana_tune.config.secrets import MASK
from sana_tune.config.watching import (
    Webhook,
    parse_comment,
    parse_hub_id,
    parse_script,
    parse_trackers,
    parse_webhooks,
    script_words,
)
from sana_tune.errors import UserError
from sana_tune.output import Output
from tests.config.helpers import load_with, problems_of, write_files

URL = "https://discord.com/api/webhooks/123/s3cr3t"
DISCORD = {"webhook_type": "discord", "webhook_url": URL}
RAW = {"webhook_type": "raw", "callback_url": "http://127.0.0.1:8001/callback", "auth_token": "t0k3n"}


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("wandb", "wandb"), ("tensorboard, WandB", "wandb,tensorboard"), ("all", "wandb,tensorboard"), ("none", "none"),
        ("", "none"), (None, "none"), (["tensorboard"], "tensorboard"), ("none,wandb", "wandb"),
    ],
)  # fmt: skip
def test_trackers(value: Any, found: str):
    assert parse_trackers(value) == found


def test_trackers_that_there_are_none_of():
    with pytest.raises(ValueError, match="did you mean wandb") as told:
        parse_trackers("wandbb,comet_ml")
    assert "comet_ml cannot be used: use wandb or tensorboard" in str(told.value)


def test_a_report_of_simpletuners_own_kind_is_what_a_run_writes_anyway(tmp_path: Path):
    assert load_with(tmp_path, {"report_to": "simpletuner"}).config.watch.report_to == "none"


def test_webhooks_inline_as_a_list_as_text_and_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    both = (
        Webhook("discord", URL, "dog", "warning"),
        Webhook("raw", RAW["callback_url"], ssl_no_verify=True, auth_token="t0k3n"),
    )
    asked = [{**DISCORD, "message_prefix": "dog", "log_level": "warning"}, {**RAW, "ssl_no_verify": "true"}]
    file = tmp_path / "hooks.json"
    monkeypatch.setenv("HOOK_TOKEN", "t0k3n")
    file.write_text(json.dumps([asked[0], {**asked[1], "auth_token": "{env:HOOK_TOKEN}"}]))
    for value in (asked, json.dumps(asked), str(file)):
        assert load_with(tmp_path, {"webhook_config": value}).config.watch.webhook_config == both
    assert load_with(tmp_path, {"webhook_config": asked[0]}).config.watch.webhook_config == both[:1]
    flags = {"webhook_config": json.dumps(asked[0])}
    assert load(write_files(tmp_path), flags, {}).config.watch.webhook_config == both[:1]
    assert parse_webhooks(None) is parse_webhooks("") is parse_webhooks([]) is None


def test_everything_that_is_wrong_with_webhooks_is_told_at_once_and_no_secret(tmp_path: Path):
    wrong = [
        {"webhook_type": "discrod", "webhook_url": URL},
        {"webhook_type": "raw", "webhook_url": URL, "log_level": "warn"},
        {**DISCORD, "webhook_url": f"ftp://{URL}", "mesage_prefix": "x", "ssl_no_verify": "maybe"},
        {**RAW, "auth_token": "two\nlines"},
        "nothing",
    ]
    said = problems_of(tmp_path, {"webhook_config": wrong})
    for words in (
        "webhook 1: webhook_type must be discord or raw; found 'discrod'; did you mean discord?",
        "webhook 2: webhook_type raw needs callback_url; found webhook_url, which is of another type",
        "webhook 2: log_level must be one of debug, info, warning, error, critical; found 'warn'; did you mean",
        "webhook 3: there is no key 'mesage_prefix'; did you mean message_prefix?",
        "webhook 3: webhook_url must be an address",
        "webhook 3: ssl_no_verify must be true or false; found 'maybe'",
        "webhook 4: auth_token goes into a header",
        "webhook 5: a webhook is an object",
    ):
        assert words in said, said
    assert "s3cr3t" not in said and "two" not in said


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (
            URL,
            'an address alone does not say what to send there; write {"webhook_type": "discord", "webhook_url": "…"}',
        ),
        ("{oops", "must be JSON"),
        ("nowhere.json", "the file of webhooks must exist and does not"),
        (3, "a webhook is an object"),
        ({**RAW, "callback_url": "http://host:port/x"}, "callback_url must be an address"),
    ],
)
def test_webhooks_that_are_none(tmp_path: Path, value: Any, words: str):
    said = problems_of(tmp_path, {"webhook_config": value})
    assert words in said and "s3cr3t" not in said


def test_secrets_of_webhooks_are_neither_shown_nor_written(tmp_path: Path):
    loaded = load_with(tmp_path, {"webhook_config": [DISCORD, RAW]})
    assert "s3cr3t" not in repr(loaded.config) and "t0k3n" not in repr(loaded.config)
    output = Output.open(tmp_path / "output")
    output.write_config(loaded)
    text = (output.root / "config.json").read_text()
    assert "s3cr3t" not in text and "t0k3n" not in text and json.loads(text)["webhook_config"] == MASK
    with pytest.raises(UserError, match="the value is the mask"):
        load(output.root / "config.json", {}, {})
    names = [hook.name for hook in loaded.config.watch.webhook_config or ()]
    assert names == ["discord webhook at discord.com", "raw webhook at 127.0.0.1:8001"]


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("me/rex", "me/rex"), ("rex_1.5", "rex_1.5"), ("https://huggingface.co/me/rex/tree/main/x", "me/rex"),
        ("huggingface.co/me/rex", "me/rex"), ("", None), ("https://hub.example.com/me/rex/", "me/rex"),
    ],
)  # fmt: skip
def test_repositories_of_the_hub(value: Any, found: str | None):
    assert parse_hub_id(value) == found


@pytest.mark.parametrize("value", ["a/b/c", "a--b", "../x", "me rex", "x.git", "x" * 97, "ä"])
def test_what_is_no_repository(value: str):
    with pytest.raises(ValueError, match="a repository of the hub is owner/name or name"):
        parse_hub_id(value)


def test_a_comment_is_text_or_lines():
    assert parse_comment(["one", "two"]) == "one\ntwo" and parse_comment("x") == "x" and parse_comment("") is None
    with pytest.raises(ValueError, match="must be text, or a list of lines"):
        parse_comment({"a": 1})


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("copy.sh {local_checkpoint}", "did you mean {local_checkpoint_path}?"),
        ("copy.sh 'open", "cannot be split into words"),
        ("{local_checkpoint_path} x", "must begin with the program to run"),
        ("'' ''", None),
        ("copy.sh {validation_promt}", "did you mean {validation_prompt}?"),
        (["copy.sh"], "must be a command such as"),
    ],
)
def test_scripts_that_are_none(tmp_path: Path, value: Any, words: str | None):
    if words is None:
        assert parse_script(value) == value
        return
    assert words in problems_of(tmp_path, {"post_checkpoint_script": value})


def test_a_placeholder_is_filled_inside_its_word():
    words = script_words(
        "run 'a b' --to={global_step} {validation_prompt}{lora_type}", {"validation_prompt": "x; y 'z"}
    )
    assert words == ["run", "a b", "--to=", "x; y 'z"]


def test_settings_of_uploads_without_one_are_noted(tmp_path: Path):
    notes = load_with(tmp_path, {"hub_model_id": "rex", "push_optimizer_to_hub": True}).notes
    assert any(note.startswith("hub_model_id has no effect: push_to_hub and push_checkpoints_to_hub") for note in notes)
    notes = load_with(tmp_path, {"push_to_hub": True, "push_optimizer_to_hub": True, "hub_model_id": "rex"}).notes
    assert [note for note in notes if "has no effect" in note] == [
        "push_optimizer_to_hub has no effect: push_checkpoints_to_hub is off"
    ]
