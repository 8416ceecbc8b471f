"""From `configure` to a trained model: the files that the wizard writes run as they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sana_tune.cli.main import exit_code
from sana_tune.config.load import load
from tests.data.pictures import put
from tests.journeys.kit import metrics_of

CONFIG = "my settings/config.json"


@pytest.fixture(autouse=True)
def _there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory with photographs of two shapes, one of them without a caption."""
    monkeypatch.chdir(tmp_path)
    for number in range(9):
        size, caption = ((90, 60), (60, 90))[number % 2], f"a pattern of colours, the {number}" if number else None
        put(tmp_path / "holiday", f"IMG_{number}.png", *size, seed=number, caption=caption)


def test_what_configure_writes_trains_and_goes_on(tmp_path, capsys):
    flags = ["--model", "nano", "--images", "holiday", "--resolution", "64,32", "--steps", "3", "--config", CONFIG]
    assert exit_code(["configure", "--yes", *flags]) == 0
    said = capsys.readouterr().out
    assert "sana_tune train --config 'my settings/config.json'" in said and "1 picture has no .txt" in said
    assert exit_code(["train", "--config", CONFIG, "--validation_num_inference_steps", "2"]) == 0, capsys.readouterr()
    output = tmp_path / "output" / "holiday"
    assert [line["step"] for line in metrics_of(output)] == [1, 2, 3]
    drawn = {path.name for path in (output / "validation_images").iterdir()}
    assert {"validation", "another", "control", "unconditional", "contact"} <= {name.split("_")[2] for name in drawn}, (
        drawn
    )
    assert (output / "pipeline" / "model_index.json").is_file()
    ledger = json.loads((output / "ledger.json").read_text(encoding="utf-8"))
    assert [(part["dataset"], part["trained"]) for part in ledger["datasets"]] == [("holiday-64", 8), ("holiday-32", 8)]

    assert exit_code(["configure", "--yes", "--config", CONFIG, "--steps", "5", "--overwrite"]) == 0
    assert exit_code(["train", "--config", CONFIG, "--validation_num_inference_steps", "2"]) == 0
    assert [line["step"] for line in metrics_of(output)] == [1, 2, 3, 4, 5]
    assert load(Path(CONFIG), {}, {}).config.train.max_train_steps == 5


def test_what_configure_writes_for_a_lokr_trains(tmp_path, capsys):
    flags = ["--model", "nano", "--adapter", "lokr", "--images", "holiday", "--resolution", "32", "--steps", "2"]
    assert exit_code(["configure", "--yes", *flags, "--config", CONFIG]) == 0
    said = capsys.readouterr().out
    assert "LoKr on 60 layers" in said and "ok: nothing is wrong" in said
    assert exit_code(["train", "--config", CONFIG, "--validation_disable", "true"]) == 0, capsys.readouterr()
    output = tmp_path / "output" / "holiday"
    assert [line["step"] for line in metrics_of(output)] == [1, 2]
    assert (output / "adapter" / "pytorch_lora_weights.safetensors").is_file()
