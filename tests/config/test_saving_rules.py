"""What contradicts itself in the settings of checkpoints, and what does nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sana_tune.config.load import load
from sana_tune.errors import UserError
from tests.config.helpers import write_files


def notes(tmp_path: Path, **settings: Any) -> str:
    return "\n".join(load(write_files(tmp_path, settings), {}, {}).notes)


def test_the_action_script_needs_a_script(tmp_path: Path):
    with pytest.raises(UserError, match="needs disk_low_script, the command that makes room") as caught:
        notes(tmp_path, disk_low_action="script")
    assert "use wait" in caught.value.problems[0].fix
    assert "disk_low_script" not in notes(tmp_path, disk_low_action="script", disk_low_script="true")
    assert "disk_low_script has no effect" in notes(tmp_path, disk_low_script="true")


@pytest.mark.parametrize(("interval", "said"), [(500, "use 1000"), (0, "set checkpoint_step_interval")])
def test_kept_multiples_must_be_saved(tmp_path: Path, interval: int, said: str):
    with pytest.raises(UserError, match="since others are not saved; found 750") as caught:
        notes(tmp_path, checkpoints_keep_every=750, checkpoint_step_interval=interval)
    assert caught.value.problems[0].fix == said
    notes(tmp_path, checkpoints_keep_every=1500, checkpoint_step_interval=500)


def test_what_does_nothing_is_said(tmp_path: Path):
    assert "checkpoints_keep_best has no effect: no dataset is held out" in notes(tmp_path, checkpoints_keep_best=2)
    told = notes(tmp_path, checkpoints_keep_best=2, checkpoints_keep_every=500, checkpoints_total_limit=0)
    assert "checkpoints_keep_best has no effect: checkpoints_total_limit 0" in told and "keep_every has no" in told
    assert "without checkpointing_rolling_steps" in notes(tmp_path, checkpoints_rolling_total_limit=3)
    assert "saves there anyway" in notes(tmp_path, checkpointing_rolling_steps=1000)
    assert "rolling" not in notes(tmp_path, checkpointing_rolling_steps=100, checkpoints_rolling_total_limit=3)
