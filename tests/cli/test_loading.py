"""From words and variables to the loaded config."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sana_tune.cli.loading import load_asked
from tests.config.helpers import write_files


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path)
    (tmp_path / "config").mkdir()
    monkeypatch.setattr(os, "environ", dict(os.environ))
    return tmp_path


def test_words_are_laid_over_the_file(place: Path) -> None:
    loaded, notes = load_asked(["--seed", "5", "use_ema=true"])
    assert loaded.config.train.seed == 5 and loaded.config.ema.use_ema and notes == ()


def test_the_variables_of_config_env_join_the_environment(place: Path) -> None:
    (place / "config" / "config.env").write_text("MIXED_PRECISION=no\nHF_HOME=/cache\nLEARNING_RATE=1\n")
    loaded, notes = load_asked([])
    assert os.environ["HF_HOME"] == "/cache"
    assert loaded.origins["mixed_precision"] == "environment: MIXED_PRECISION"
    assert loaded.config.optimizer.learning_rate == 1e-5
    assert notes == ("config.env: LEARNING_RATE has no effect beside a config file: settings come from that",)


def test_processes_are_asked_for_by_the_environment_too(place: Path) -> None:
    (place / "config" / "config.env").write_text("TRAINING_NUM_PROCESSES=8\nMAIN_PROCESS_PORT=29\n")
    loaded, notes = load_asked([])
    assert loaded.config.launch.processes == 8 and loaded.origins["num_processes"].endswith("TRAINING_NUM_PROCESSES")
    assert notes == ()
