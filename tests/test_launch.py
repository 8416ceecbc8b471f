"""What the launcher asks Accelerate for, and what it says of how the processes ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import yaml

from sana_tune.config.load import Loaded, load
from sana_tune.errors import Interrupted, Problem, UserError
from sana_tune.launch import Crowd, is_wanted, launcher_words, ranks_among
from sana_tune.ranks import Ending
from tests.config.helpers import write_files


def asked(folder: Path, **settings: Any) -> Loaded:
    return load(write_files(folder, settings), {}, {})


def test_it_is_wanted_where_several_are_asked_for_and_this_is_none_of_them(tmp_path: Path, monkeypatch):
    assert is_wanted(asked(tmp_path, num_processes=2)) and not is_wanted(asked(tmp_path, num_processes=1))
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert not is_wanted(asked(tmp_path, num_processes=2))


def test_the_words_are_ones_that_accelerate_takes(tmp_path: Path):
    """Its own parser reads them, and its own launcher the file: nothing of a default file is left to chance."""
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    loaded = asked(tmp_path, num_processes=2, accelerate_extra_args="--gpu_ids '0,1'")
    words = launcher_words(loaded, tmp_path, ["train", "--config", "c.json", "--seed", "5"])
    parsed = launch_command_parser().parse_args(words)
    assert parsed.gpu_ids == "0,1" and parsed.module and parsed.training_script == "sana_tune"
    assert parsed.training_script_args == ["train", "--config", "c.json", "--seed", "5"]
    file = load_config_from_file(parsed.config_file)
    assert (file.num_processes, file.num_machines, file.main_process_port) == (2, 1, 0)
    assert str(file.distributed_type).endswith("MULTI_GPU") and not file.use_cpu


def test_what_stands_in_accelerates_file_stays_as_it_is(tmp_path: Path):
    content = {"distributed_type": "FSDP", "num_processes": 8, "fsdp_config": {"fsdp_version": 2}, "gpu_ids": "0,1,2,3"}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content))
    two = {"num_machines": 2, "machine_rank": 1, "main_process_ip": "10.0.0.1", "main_process_port": 29500}
    launcher_words(asked(tmp_path, accelerate_config=str(tmp_path / "mine.yaml"), num_processes=4, **two), tmp_path, [])
    written = json.loads((tmp_path / "launch.yaml").read_text())
    assert written["distributed_type"] == "FSDP" and written["fsdp_config"] == {"fsdp_version": 2}
    assert written["gpu_ids"] == "0,1,2,3" and written["num_processes"] == 4
    assert {key: written[key] for key in two} == two


def crowd(*endings: Ending, asked: tuple[int, ...] = (), codes: dict[int, int] | None = None) -> Crowd:
    """Processes that have ended so. codes: rank → exit code, of those that the launcher saw fail."""
    found = Crowd(list(asked))
    found._endings = list(endings)
    if codes:
        error = RuntimeError("failed")
        vars(error)["failures"] = {rank: SimpleNamespace(pid=100 + rank, exitcode=code) for rank, code in codes.items()}
        found._error = error
    return found


def said(found: Crowd) -> str:
    with pytest.raises(UserError) as error:
        found.conclude()
    assert len(error.value.problems) == 1
    return str(error.value)


FULL = Problem("disk", "is full", "make room")
LOST = Ending(0, 1, (Problem("rank 0", "the connection is lost"),), lost=True)


def test_all_went_well():
    assert crowd(Ending(0, 0), Ending(1, 0)).conclude() is None


def test_what_all_say_is_said_once_and_what_one_says_names_it():
    assert said(crowd(Ending(0, 1, (FULL,)), Ending(1, 1, (FULL,)), codes={0: 1})) == str(FULL)
    assert said(crowd(LOST, Ending(1, 1, (FULL,)), codes={0: 1, 1: 1})) == str(FULL)
    both = crowd(Ending(0, 1, (FULL,)), Ending(1, 1, (Problem("picture", "is gone"),)))
    with pytest.raises(UserError, match="rank 1: picture: is gone"):
        both.conclude()


def test_one_that_died_without_a_word_is_named_and_those_that_suffered_are_not():
    told = said(crowd(LOST, codes={0: 1, 1: -signal.SIGKILL}))
    assert told.startswith("rank 1: it was killed by SIGKILL (process 101), and the others were ended")
    assert "dmesg" in told and "the connection" not in told
    told = said(crowd(codes={0: -signal.SIGTERM, 1: 3}))
    assert told.startswith("rank 1: it failed (process 101, exit code 3); why is said above")
    assert "the connection is lost" in said(crowd(LOST)), "the other one is on another machine"


def test_where_all_only_lost_the_others_it_is_told_what_they_saw():
    assert "the connection is lost" in said(crowd(LOST, codes={0: 1})), "NCCL that cannot start, say"
    assert "it failed (process 100, exit code 2)" in said(crowd(Ending(0, 2), codes={0: 2})), "it told nothing"


def test_other_programs_that_the_launcher_asks_are_none_of_the_run():
    """accelerate runs nvidia-smi: that it ends is no death."""
    wait = [sys.executable, "-c", "input()"]
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
    rank = subprocess.Popen(wait, stdin=subprocess.PIPE, env={**os.environ, **place})
    other = subprocess.Popen(wait, stdin=subprocess.PIPE)
    children = psutil.Process().children()
    assert {rank.pid, other.pid} <= {child.pid for child in children}
    try:
        assert ranks_among(children) == {rank.pid}
        rank.kill()
        rank.wait()
        assert ranks_among(children) == set(), "it ended between two looks"
    finally:
        for program in (rank, other):
            program.kill()
            program.wait()


def test_a_signal_is_what_ended_it_unless_something_went_wrong():
    with pytest.raises(Interrupted) as error:
        crowd(Ending(0, 130), Ending(1, 130), asked=(signal.SIGINT,)).conclude()
    assert error.value.exit_code == 130
    with pytest.raises(Interrupted):
        crowd(codes={0: -signal.SIGTERM}, asked=(signal.SIGTERM,)).conclude()
    with pytest.raises(Interrupted) as error:
        crowd(Ending(0, 143), Ending(1, 143)).conclude()
    assert error.value.exit_code == 143, "another sent it to the processes themselves"
    assert said(crowd(Ending(0, 1, (FULL,)), asked=(signal.SIGINT,))) == str(FULL)
