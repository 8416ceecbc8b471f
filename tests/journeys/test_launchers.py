"""Several processes as users start them, from a shell: `sana_tune train`, `torchrun`, `accelerate launch`."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from sana_tune.cli.main import exit_code
from sana_tune.launch import GRACE_S
from sana_tune.train import folders
from tests.conftest import ROOT
from tests.journeys.test_ranks import MOST, alone, new_run, worst

TORCHRUN = ("-m", "torch.distributed.run", "--nproc_per_node", "2")
ACCELERATE = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2")


def start(words: Sequence[str], log: Path, **more: str) -> subprocess.Popen[bytes]:
    """`python …` in a process group of its own, what it says in a file. more: environment variables."""
    environ = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # sums then have one order
    environ |= more
    with open(log, "wb") as file:
        return subprocess.Popen([sys.executable, *words], cwd=log.parent, env=environ, stdout=file, stderr=file)


def wait_for(pattern: str, log: Path, program: subprocess.Popen[bytes]) -> None:
    end_s = time.monotonic() + 120
    while re.search(pattern, log.read_text()) is None:
        assert program.poll() is None and time.monotonic() < end_s, log.read_text()
        time.sleep(0.05)


def test_train_launches_them_and_ends_them_together(tmp_path: Path):
    """A killed process ends all, with a word why; Ctrl-C saves, and so does SIGTERM to every process of the job, as
    Slurm sends it, though it is handed on besides; nobody is left behind."""
    path = new_run(tmp_path / "run", num_processes=2, max_train_steps=100_000)

    def begin(name: str) -> tuple[subprocess.Popen[bytes], Path, list[int]]:
        log = tmp_path / name
        program = start(["-m", "sana_tune", "train", "--config", str(path)], log)
        wait_for(r"step \d+ of", log, program)  # the other may load yet when this one says that it trains
        return program, log, [child.pid for child in psutil.Process(program.pid).children()]

    program, log, pids = begin("killed")
    assert len(pids) == 2
    os.kill(pids[1], signal.SIGKILL)
    began_s = time.monotonic()
    assert program.wait(60) == 1 and time.monotonic() - began_s < 20
    said = log.read_text()
    assert "it was killed by SIGKILL" in said and "the run goes on from its newest checkpoint" in said
    assert "Traceback" not in said and said.count("error: ") == 1 and said.count("Model: nano") == 1

    for count, number in enumerate((signal.SIGINT, signal.SIGTERM), start=1):
        program, log, pids = begin(number.name)
        for pid in (program.pid, *(pids if number is signal.SIGTERM else ())):
            os.kill(pid, number)
        assert program.wait(60) == 128 + number
        said = log.read_text()
        assert "Traceback" not in said and said.count("asked to stop") == 1 and "Saved " in said
        assert f"stopped by signal {int(number)}" in said.splitlines()[-1]
        assert not any(psutil.pid_exists(pid) for pid in pids)
        assert len(folders.list_complete(path.parent / "output")) == count


def test_that_accelerate_asks_nvidia_smi_is_no_death(tmp_path: Path, full: bool):
    """Its end, seen by the launching process, must not end the run after the time of grace."""
    if not full:
        pytest.skip("--full waits for the time of grace; test_launch.py looks at the children")
    path, program = new_run(tmp_path / "run", num_processes=2, max_train_steps=100_000), tmp_path / "nvidia-smi"
    program.write_text('#!/bin/sh\nsleep 1\nprintf "count, name\\n2, a card\\n2, a card\\n"\n')
    program.chmod(0o755)
    log, places = tmp_path / "console.txt", f"{tmp_path}:{os.environ['PATH']}"
    running = start(["-m", "sana_tune", "train", "--config", str(path)], log, PATH=places)
    wait_for("Training: ", log, running)
    time.sleep(GRACE_S + 2)
    assert running.poll() is None, log.read_text()
    running.send_signal(signal.SIGINT)
    assert running.wait(60) == 128 + signal.SIGINT


@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate"])
def test_a_launcher_of_the_users_own(tmp_path: Path, launcher: Sequence[str], full: bool):
    """It trains what one process does; accelerate's is torch's in the end, and tried in full only."""
    if launcher is ACCELERATE and not full:
        pytest.skip("--full tries it")
    one, two = new_run(tmp_path / "one", gradient_accumulation_steps=2), new_run(tmp_path / "two")
    alone(one)
    log = tmp_path / "console.txt"
    assert start([*launcher, "-m", "sana_tune", "train", "--config", str(two)], log).wait(120) == 0, log.read_text()
    assert worst(one.parent / "output/checkpoint-4", two.parent / "output/checkpoint-4") <= MOST
    assert log.read_text().count("Model: nano") == 1


def test_under_a_launcher_the_first_of_a_machine_tells_a_mistake(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """All of them read the same files, and find the same."""
    path = new_run(tmp_path / "run")

    def said(rank: int, local: int) -> str:
        for name, number in {"RANK": rank, "LOCAL_RANK": local, "WORLD_SIZE": 4}.items():
            monkeypatch.setenv(name, str(number))
        assert exit_code(["train", "--config", str(path), "--learning_rat", "3"]) == 1
        return capsys.readouterr().err

    assert [said(rank, local).count("error: ") for rank, local in ((0, 0), (1, 1), (2, 0), (3, 1))] == [1, 0, 1, 0]
    monkeypatch.setenv("LOCAL_RANK", "many")
    assert exit_code(["train", "--config", str(path)]) == 1
    assert "a launcher must set numbers with LOCAL_RANK" in capsys.readouterr().err
