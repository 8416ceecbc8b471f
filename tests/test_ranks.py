"""Which process this is, and how it says how it ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sana_tune import ranks
from sana_tune.errors import Problem, UserError
from sana_tune.ranks import LAUNCHER, TOLD_IN, Ending, Rank, Repeats, endings, own_rank, told_in, wants_shards
from tests.conftest import ROOT

LAUNCHED = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}


def test_a_process_knows_its_place_when_a_launcher_says_it():
    assert own_rank(LAUNCHED) == Rank(3, 4, 1) and not Rank(3, 4, 1).is_main
    assert own_rank({}) is None and Rank().is_main
    assert wants_shards({"ACCELERATE_USE_FSDP": "true"}) and not wants_shards({})
    assert own_rank({**LAUNCHED, "LOCAL_RANK": ""}) is None, "a scheduler counts machines so"


@pytest.mark.parametrize("change", [{"RANK": "4"}, {"RANK": "x"}, {"LOCAL_RANK": "-1"}, {"WORLD_SIZE": "0"}])
def test_numbers_that_are_none_are_told(change):
    with pytest.raises(UserError, match="LOCAL_RANK ≤ RANK < WORLD_SIZE; found RANK="):
        own_rank({**LAUNCHED, **change})


def test_an_ending_is_read_as_it_was_written(tmp_path: Path):
    first = Ending(0, 1, (Problem("a", "b", "c"),), lost=True)
    first.write(tmp_path)
    (tmp_path / "77.json").write_text(json.dumps({"rank": 1, "code": 143, "problems": []}))
    (tmp_path / ".88").touch()
    assert endings(tmp_path) == [(os.getpid(), first), (77, Ending(1, 143))]
    assert told_in({TOLD_IN: str(tmp_path)}) == tmp_path and told_in({}) is None


def test_a_process_whose_launcher_is_gone_ends(tmp_path: Path):
    code = "import time; from sana_tune.ranks import live_with_launcher; live_with_launcher(); time.sleep(30)"
    environ = {**os.environ, LAUNCHER: "1", "PYTHONPATH": str(ROOT)}
    ran = subprocess.run([sys.executable, "-c", code], env=environ, timeout=20)
    assert ran.returncode == -signal.SIGTERM


def test_a_sigterm_that_was_heard_or_is_expected_is_no_second_wish(monkeypatch: pytest.MonkeyPatch):
    repeats = Repeats()
    assert [repeats.has(signal.SIGINT) for _ in range(2)] == [False, False]
    assert [repeats.has(signal.SIGTERM) for _ in range(3)] == [False, True, True]
    repeats.expect(signal.SIGINT)
    assert [repeats.has(signal.SIGINT) for _ in range(2)] == [True, False]
    monkeypatch.setattr(ranks, "REPEATED_S", 0.0)
    later = Repeats()
    assert [later.has(signal.SIGTERM) for _ in range(2)] == [False, False]
