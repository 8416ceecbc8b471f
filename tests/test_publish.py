"""Who listens to a run, what scripts and cards are told, and that no path and no secret is published."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from sana_tune.data.survey import DatasetLedger
from sana_tune.model.facts import known
from sana_tune.output import Output
from sana_tune.prepare import Prepared, prepare
from sana_tune.progress import Progress
from sana_tune.publish import (
    about,
    checkpoint_card,
    comment_of,
    dataset_line,
    is_first_process,
    licence_of,
    listeners,
    pipeline_card,
    prompt_texts,
    repository_of,
    script_values,
    shown_settings,
)
from sana_tune.watch.card import Seen
from sana_tune.watch.events import Validated
from sana_tune.watch.hub import Repository
from sana_tune.watch.names import ID_FILE
from tests.journeys.kit import pictures, small_run

HOOK = {"webhook_type": "raw", "callback_url": "http://127.0.0.1:9/s3cr3t", "auth_token": "t0k3n"}
REPOSITORY = Repository("me/rex", True, "http://127.0.0.1:9")


def prepared(folder: Path, **settings: Any) -> Prepared:
    pictures(folder / "pictures", 3)
    return prepare(small_run(folder, **settings), Output.open(folder / "output"))


DRAWN = {"validation_disable": False, "validation_prompt": "A red zib.", "validation_resolution": 32}


def names(sinks: list[Any]) -> list[str]:
    return [type(sink).__name__ for sink in sinks]


def test_a_run_that_asks_for_nothing_has_no_listeners(tmp_path: Path):
    assert listeners(prepared(tmp_path), None) == [] and repository_of(prepared(tmp_path).config) is None


def test_listeners_are_closed_uploads_before_scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = prepared(
        tmp_path, webhook_config=[HOOK, HOOK], report_to="all", push_to_hub=True, post_upload_script="true",
    )  # fmt: skip
    sinks = listeners(run, REPOSITORY)
    assert names(sinks) == ["Webhooks", "TrackerSink", "TrackerSink", "HubSink", "Scripts"]
    assert json.loads((tmp_path / "output" / ID_FILE).read_text())["id"]
    for sink in sinks:
        sink.close()
    monkeypatch.setenv("RANK", "1")
    assert listeners(run, REPOSITORY) == [] and repository_of(run.config) is None and not is_first_process()


def test_trackers_are_told_the_settings_without_secrets(tmp_path: Path):
    shown = shown_settings(prepared(tmp_path, webhook_config=HOOK, **DRAWN))
    assert shown["learning_rate"] == 1e-3 and shown["validation_prompt"] == "A red zib."
    assert "s3cr3t" not in json.dumps(shown) and "t0k3n" not in json.dumps(shown)


def test_scripts_are_told_the_documented_values(tmp_path: Path):
    values = script_values(prepared(tmp_path, tracker_run_name="rex", **DRAWN).config, REPOSITORY)
    assert {key: values[key] for key in ("tracker_run_name", "tracker_project_name", "model_family", "model_type")} == {
        "tracker_run_name": "rex", "tracker_project_name": "sana_tune", "model_family": "sana", "model_type": "full",
    }  # fmt: skip
    assert values["huggingface_path"] == "me/rex" and values["validation_prompt"] == "A red zib."
    assert values["validation_resolution"] == "32x32" and values["validation_disable"] == "false"


def test_the_card_of_a_pipeline_tells_the_run_and_shows_its_last_pictures(tmp_path: Path):
    run = prepared(tmp_path, model_card_note="Mine.", loss_type="huber", **DRAWN)
    file = tmp_path / "step_4_validation_0_32x32.png"
    file.write_bytes(b"png")
    seen = Seen()
    seen.emit(Validated(Progress(4), (str(file), str(tmp_path / "gone.png"))))
    card = pipeline_card(run, Progress(4, 2.0, 8), "float32", seen)
    assert card.pictures == {f"images/{file.name}": file}
    values = yaml.safe_load(card.text.split("---\n")[1])
    assert values["license"] == "apache-2.0" and "base_model" not in values
    assert values["widget"][0]["text"] == "a red zib."
    for words in ("# output\n", "Mine.", "- Steps: 4 of 4, 2 epochs", "- Images seen: 8", "| loss_type | huber |",
                  "- d0: 3 pictures trained, of 3", "image = pipe(\n    'a red zib.'"):  # fmt: skip
        assert words in card.text, words
    body = card.text.replace(json.dumps(str(tmp_path / "output" / "pipeline")), "")
    assert str(tmp_path) not in body, "the snippet alone names a folder"


def test_the_card_of_a_checkpoint_names_the_repository_and_no_folder(tmp_path: Path):
    text = checkpoint_card(prepared(tmp_path, use_ema=True), REPOSITORY)("checkpoint-2", 2)
    assert '"me/rex", subfolder="checkpoint-2/transformer"' in text and "- Steps: 2 of 4" in text
    assert str(tmp_path) not in text and "checkpoint-2/transformer_ema" in text


def test_published_models_have_their_licence_and_their_link(tmp_path: Path):
    name = "Efficient-Large-Model/Sana_600M_512px_diffusers"
    facts = known(name)
    assert facts is not None
    licence = licence_of(facts, is_folder=False)
    assert licence.front_matter() == {
        "license": "other",
        "license_name": "nscl-v2-custom",
        "license_link": f"https://huggingface.co/{name}/blob/main/LICENSE.txt",
    }
    assert licence.is_gemma and "non-commercial" in licence.text
    assert about(prepared(tmp_path), "float32").base_model is None


def test_a_dataset_in_a_line():
    left = (("a.png", "too small (31 px)"), ("b.png", "too small (12 px)"), ("c.png", "is damaged"))
    line = dataset_line(DatasetLedger("dog", 12, 8, left, not_drawn=1))
    assert line == "dog: 8 pictures trained, of 12; left out: 2 (too small (n px)), 1 (is damaged); 1 not drawn"
    assert dataset_line(DatasetLedger("cat", 2, 2, role="eval")) == "cat: 2 pictures held out, of 2"


def test_prompts_are_found_by_the_names_of_files(tmp_path: Path):
    text = prompt_texts(prepared(tmp_path, **DRAWN))
    assert text(Path("step_4_validation_0_32x32.png")) == "a red zib."
    assert text(Path("step_4_validation_0_32x32_ema.webp")) == "a red zib. (moving average of the weights)"
    assert text(Path("step_4_sheet.png")) == "sheet"


def test_the_comment_in_the_weights(tmp_path: Path):
    config = prepared(
        tmp_path, modelspec_comment=["step {current_step}, epoch {current_epoch}", "{timestamp} {x}"]
    ).config
    moment = datetime(2030, 1, 2, 3, 4, 5, tzinfo=UTC)
    assert comment_of(config, Progress(4, 2.0), moment) == "step 4, epoch 2\n2030-01-02T03:04:05+00:00 {x}"
    assert comment_of(prepared(tmp_path).config, Progress(4)) is None
