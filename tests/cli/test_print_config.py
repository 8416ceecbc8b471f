"""--print-config: every setting with its origin, and no secret."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from sana_tune.cli.main import exit_code
from sana_tune.config.datasets import ImageDataset
from sana_tune.config.schema import section_of
from tests.config.helpers import write_files


def test_every_setting_is_shown_with_its_origin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnopqrstu")
    monkeypatch.setenv("RATE", "1e-4")
    write_files(tmp_path, {"learning_rate": "{env:RATE}", "revision": "{env:HF_TOKEN}", "train_batch_size": 2})
    assert exit_code(["train", "--print-config", "--seed", "5", "--validation_resolution=64x32,96"]) == 0
    lines = capsys.readouterr().out.splitlines()

    def row(key: str) -> list[str]:
        return [" ".join(line.split()) for line in lines if line.startswith(f"{key} = ")]

    assert [key for key in section_of() if not row(key)] == []
    assert [key for key in ImageDataset.model_fields if not row(key)] == []
    assert row("seed") == ["seed = 5 # command line: seed"]
    assert row("learning_rate") == ["learning_rate = 0.0001 # config.json: learning_rate ({env:RATE})"]
    assert row("validation_resolution") == ["validation_resolution = 64x32,96x96 # command line: validation_resolution"]
    of_model, of_dataset = row("revision")
    assert (
        of_model == "revision = ••• # config.json: revision ({env:HF_TOKEN})"
        and of_dataset == "revision = unset # default"
    )
    assert row("train_batch_size") == ["train_batch_size = 2 # config.json: train_batch_size"] * 2, "and the dataset's"
    assert row("instance_data_dir")[0].endswith("# multidatabackend.json: pictures: instance_data_dir")
    assert not any("hf_abc" in line for line in lines)
    assert not os.path.exists(tmp_path / "output"), "nothing is begun"


def test_a_mistake_is_told_all_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_files(tmp_path, {"sed": 1})
    assert exit_code(["train", "--print-config", "--config", str(path)]) == 1
    assert "did you mean seed?" in capsys.readouterr().err
    assert json.loads(path.read_text())["sed"] == 1
