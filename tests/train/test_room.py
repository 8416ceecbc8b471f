"""Room on the disk: what must be free, and the command that makes room."""

from __future__ import annotations

import errno
import shutil
import sys
import time
from pathlib import Path

import pytest

from sana_tune.train.room import Lack, Room, call_script, is_full, slices


def test_the_size_of_a_checkpoint_must_be_free_or_the_threshold_where_that_is_more(tmp_path: Path):
    disk = shutil.disk_usage(tmp_path)
    assert Room().lack(tmp_path, 1000) is None
    lack = Room().lack(tmp_path, disk.total * 2)
    assert lack is not None and lack.needed_bytes == disk.total * 2 and lack.why == "its size"
    assert Room().lack(tmp_path, disk.total * 2, freed_bytes=disk.total * 2) is None, "what goes before counts"
    lack = Room("99.999%").lack(tmp_path, 1000)
    assert lack is not None and lack.needed_bytes == round(disk.total * 0.99999)
    assert lack.why == "disk_low_threshold 99.999%" and 0 < lack.free_bytes <= disk.total
    assert Room("1 kB").lack(tmp_path, 1000) is None


def test_which_errors_mean_a_full_disk():
    assert is_full(OSError(errno.ENOSPC, "full")) and is_full(OSError(errno.EDQUOT, "quota"))
    assert not is_full(OSError(errno.EIO, "broken")) and not is_full(RuntimeError()) and not is_full(None)


LACK = Lack(5, 10, "its size")


def script(tmp_path: Path, text: str) -> str:
    (tmp_path / "make room.py").write_text(text, encoding="utf-8")
    return f"{sys.executable} '{tmp_path / 'make room.py'}'"


def test_the_command_sees_what_it_is_about(tmp_path: Path):
    text = "import os; open(os.environ['SANA_TUNE_OUTPUT_DIR'] + '/seen', 'w').write(" \
           "os.environ['SANA_TUNE_FREE_BYTES'] + ' of ' + os.environ['SANA_TUNE_NEEDED_BYTES'])"  # fmt: skip
    assert call_script(script(tmp_path, text), tmp_path, LACK, lambda: False) is None
    assert (tmp_path / "seen").read_text() == "5 of 10"


@pytest.mark.parametrize(
    ("command", "message"),
    [("no-such-command-here", "cannot be started"), ("'open quote", "cannot be started"), ("false", "exit code 1")],
)
def test_what_goes_wrong_with_it_is_told(tmp_path: Path, command: str, message: str):
    assert message in str(call_script(command, tmp_path, LACK, lambda: False))


def test_a_run_that_is_to_stop_ends_the_command(tmp_path: Path):
    began_s = time.monotonic()
    told = call_script(script(tmp_path, "import time; time.sleep(60)"), tmp_path, LACK, lambda: True)
    assert told == "was ended, since the run is to stop" and time.monotonic() < began_s + 20


def test_a_wait_gives_a_turn_every_moment():
    began_s = time.monotonic()
    assert len(list(slices(0.25))) >= 2 and time.monotonic() >= began_s + 0.25
    assert list(slices(0.0)) == []
