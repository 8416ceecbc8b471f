"""`python -m sana_tune` and the two console scripts are the same program."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import sana_tune

ROOT = Path(__file__).resolve().parent.parent


def test_the_package_runs_as_a_module(tmp_path):
    command = [sys.executable, "-m", "sana_tune", "--version"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout.split(), ran.stderr) == (0, ["sana_tune", sana_tune.__version__], "")


def test_the_exit_code_is_the_programs():
    ran = subprocess.run([sys.executable, "-m", "sana_tune", "no-such-command"], cwd=ROOT, capture_output=True)
    assert ran.returncode == 1


def test_the_console_scripts_name_what_the_module_runs():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["scripts"]
    assert scripts == {"sana_tune": "sana_tune.cli.main:main", "sana-tune": "sana_tune.cli.main:main"}
