"""The log: console lines, the file, and quiet libraries."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from sana_tune import log as logs
from sana_tune.log import log


@pytest.fixture(autouse=True)
def _log_as_found() -> Iterator[None]:
    handlers, level, propagate = list(log.handlers), log.level, log.propagate
    yield
    log.handlers[:] = handlers
    log.setLevel(level)
    log.propagate = propagate


def captured() -> tuple[Console, io.StringIO]:
    text = io.StringIO()
    return Console(file=text, width=40), text


def test_lines_are_whole_and_levels_are_told():
    console, text = captured()
    logs.setup(target=console)
    log.info("a line of [brackets] that is longer than the forty columns of this console")
    log.warning("mind %s", "the gap")
    log.error("broken")
    log.debug("not shown")
    assert text.getvalue().splitlines() == [
        "a line of [brackets] that is longer than the forty columns of this console",
        "warning: mind the gap",
        "error: broken",
    ]


def test_setting_up_twice_does_not_print_twice():
    console, text = captured()
    logs.setup(target=console)
    logs.setup(target=console)
    log.info("once")
    assert text.getvalue() == "once\n"


def test_the_file_gets_debug_and_times_and_is_closed(tmp_path: Path):
    logs.setup(target=captured()[0])
    handler = logs.add_file(tmp_path / "new" / "log.txt")
    log.debug("a detail")
    log.info("a line")
    logs.remove(handler)
    log.info("too late")
    lines = (tmp_path / "new" / "log.txt").read_text(encoding="utf-8").splitlines()
    assert [line.split(" ", 2)[2].split(None, 1) for line in lines] == [["DEBUG", "a detail"], ["INFO", "a line"]]


def test_a_file_appends(tmp_path: Path):
    for word in ("one", "two"):
        handler = logs.add_file(tmp_path / "log.txt")
        log.info(word)
        logs.remove(handler)
    assert len((tmp_path / "log.txt").read_text(encoding="utf-8").splitlines()) == 2


def test_libraries_are_quiet_and_the_user_has_the_last_word(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "info")
    monkeypatch.delenv("DIFFUSERS_VERBOSITY", raising=False)
    levels = {name: logging.getLogger(name).level for name in logs.NOISY_LIBRARIES}
    try:
        logs.quiet_libraries()
        assert all(logging.getLogger(name).level == logging.ERROR for name in logs.NOISY_LIBRARIES)
        import os

        assert os.environ["TRANSFORMERS_VERBOSITY"] == "info"
        assert os.environ["DIFFUSERS_VERBOSITY"] == "error"
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def test_importing_the_log_is_cheap():
    code = "import sys, sana_tune.log; print(*{'rich', 'torch', 'diffusers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device that is always full is Linux's")
def test_a_full_disk_stops_the_file_and_nothing_else(tmp_path, capsys):
    (tmp_path / "log.txt").symlink_to("/dev/full")
    handler = logs.add_file(tmp_path / "log.txt")
    logs.log.warning("a line")
    logs.remove(handler)
    assert "Logging error" not in capsys.readouterr().err
