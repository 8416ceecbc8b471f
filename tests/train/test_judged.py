"""Held-out losses beside the checkpoints: kept, forgotten with the course they are of, and no reason to end a run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sana_tune.saving import Stand
from sana_tune.train.folders import Checkpoint
from sana_tune.train.judged import FILE, Judged, stands_of


def test_they_are_there_in_the_next_run(tmp_path: Path):
    Judged(tmp_path).add(500, 0.5)
    Judged(tmp_path).add(1000, 0.25)
    again = Judged(tmp_path)
    assert again.losses == {500: 0.5, 1000: 0.25}
    again.forget_after(700)
    assert Judged(tmp_path).losses == {500: 0.5}
    assert Judged(tmp_path / "absent").losses == {}


@pytest.mark.parametrize("text", ["", "[]", '{"held_out": [1]}', '{"held_out": {"x": 1}}', '{"held_out": {"1": "?"}}'])
def test_a_garbled_file_is_as_good_as_none(tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture):
    (tmp_path / FILE).write_text(text, encoding="utf-8")
    with caplog.at_level("WARNING", "sana_tune"):
        assert Judged(tmp_path).losses == {}
    assert "cannot be read" in caplog.text


def test_a_disk_that_takes_no_more_is_told_and_the_loss_is_known_all_the_same(tmp_path: Path, caplog):
    (tmp_path / "file").touch()
    judged = Judged(tmp_path / "file")  # a folder cannot be made there
    with caplog.at_level("WARNING", "sana_tune"):
        judged.add(5, 0.5)
    assert judged.losses == {5: 0.5} and "cannot be written" in caplog.text
    assert os.listdir(tmp_path) == ["file"]


def test_what_decides_is_the_step_the_kind_and_the_loss(tmp_path: Path):
    complete = [Checkpoint(tmp_path / "a", 5, 1, {}), Checkpoint(tmp_path / "b", 7, 2, {}, rolling=True)]
    assert stands_of(complete, {5: 0.5, 6: 0.1}) == [Stand(5, False, 0.5), Stand(7, True, None)]
