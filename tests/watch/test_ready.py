"""What stands in the way of telling others is told before the run, all at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from sana_tune.cli.main import exit_code
from sana_tune.config.schema import WatchConfig
from sana_tune.watch.ready import watch_problems
from tests.journeys.kit import pictures, small_run


def test_all_of_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for name in ("WANDB_MODE", "WANDB_API_KEY", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    asked = WatchConfig(report_to="wandb", push_to_hub=True, post_upload_script="no-such-program")
    assert [problem.where for problem in watch_problems(asked)] == ["report_to", "push_to_hub", "post_upload_script"]
    assert watch_problems(WatchConfig()) == []


@pytest.mark.parametrize("command", ["check", "train"])
def test_check_and_train_tell_it_beside_the_rest(command: str, tmp_path: Path, capsys):
    pictures(tmp_path / "pictures", 2)
    small_run(tmp_path, push_to_hub=True, post_checkpoint_script="no-such-program", validation_resolution=40)
    words = ["--config", str(tmp_path / "config.json"), "--validation_disable", "false"]
    assert exit_code([command, *words]) == 1
    said = " ".join("".join(capsys.readouterr()).split())
    assert "push_to_hub: uploads need the network, and offline mode is on" in said
    assert "the program no-such-program must exist" in said and "40x40" in said
