"""`sana_tune bench` from the command line."""

from __future__ import annotations

import json

import pytest

from sana_tune.cli.bench import listed, numbers
from sana_tune.cli.main import exit_code
from sana_tune.errors import UserError


def test_lists_of_numbers_and_names():
    assert numbers("1, 8,32", "--batch") == (1, 8, 32) and listed(" a,,b ") == ("a", "b")
    for text in ("", "0", "1,x", "-1", "1.5"):
        with pytest.raises(UserError, match="whole numbers from 1 on"):
            numbers(text, "--batch")


def test_nano_on_a_cpu_as_a_table_and_as_json(tmp_path, capsys):
    file = tmp_path / "numbers.json"
    command = "bench --batch 1,2 --variants diffusers,eager --intervals 0 --tokens 8 --steps 1 --device cpu --json"
    assert exit_code([*command.split(), str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("nano: 1,") and "64x64 px, 8 text tokens" in lines[0] and "cpu" in lines[1]
    assert lines[3].split()[0] == "batch" and len([line for line in lines if "optimi-adamw" in line]) == 4
    assert lines[-1] == f"written to {file}"
    values = json.loads(file.read_text())
    assert values["asked"]["model"] == "nano" and values["machine"]["precision"] == "no"
    assert [(case["variant"], case["batch"]) for case in values["cases"]] == [
        ("diffusers", 1), ("eager", 1), ("diffusers", 2), ("eager", 2),
    ]  # fmt: skip


def test_a_mistake_is_one_message(capsys):
    assert exit_code(["bench", "--model", "sana-2"]) == 1
    assert "error: --model: no model has the name 'sana-2'" in capsys.readouterr().err
