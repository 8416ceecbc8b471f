"""config.env: a shell's notation, parsed and never run."""

from __future__ import annotations

from pathlib import Path

import pytest

from sana_tune.config.env_file import extra_arguments, parse_env, read_env, settings_of
from sana_tune.errors import UserError


def test_the_notation(tmp_path: Path) -> None:
    path = tmp_path / "config.env"
    path.write_bytes(
        b"\xef\xbb\xbf# ours\r\n\r\nexport A=1\n  B=\"two words $A\"  # why\nC='no $A'\nD=${A}/x\nA+=2\n"
        b'E="lines \\\nthat go on"\nF=${NONE:-fallback}$HOME\nG=\nH=a\\ b\nI=x#y\nJ="say \\"so\\" \\$A"\n'
    )
    assert read_env(path, {"HOME": "/h"}) == {
        "A": "12", "B": "two words 1", "C": "no $A", "D": "1/x", "E": "lines that go on", "F": "fallback/h", "G": "",
        "H": "a b", "I": "x#y", "J": 'say "so" $A',
    }  # fmt: skip


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("source other.env", "line 1: must be KEY=VALUE; found 'source other.env'"),
        ("if [ -f x ]; then", "must be KEY=VALUE"),
        ("A=$(rm -rf x)", "A: a command is not run"),
        ('A="`rm x`"', "a command is not run"),
        ("A=two words", "something stands after the value: 'words'"),
        ("A='open", "the quote ' is not closed"),
        ('A="open\nB=1', 'the quote " is not closed'),
        ("A=(1 2)", "lists in brackets"),
        ("A=b\\", "backslash"),
    ],
)
def test_what_a_shell_would_have_to_run_is_told(line: str, expected: str) -> None:
    with pytest.raises(UserError) as told:
        parse_env(line, {}, "config.env")
    assert expected in str(told.value) and "config.env, line 1" in str(told.value)


def test_all_lines_are_told_at_once() -> None:
    with pytest.raises(UserError) as told:
        parse_env("A=1\nb c\nD=`x`\nE=2\nf\n", {}, "config.env")
    assert [problem.where.split(":")[0] for problem in told.value.problems] == [
        f"config.env, line {number}" for number in (2, 3, 5)
    ]


def test_old_names_are_settings_and_others_are_not() -> None:
    variables = {"MODEL_NAME": "m", "LEARNING_RATE": "1", "HF_HOME": "h", "learning_rate": "2", "Seed": "3"}
    known = frozenset({"pretrained_model_name_or_path", "learning_rate", "seed"})
    assert settings_of({key: variables[key] for key in list(variables)[:3]}, known) == {
        "pretrained_model_name_or_path": ("MODEL_NAME", "m"),
        "learning_rate": ("LEARNING_RATE", "1"),
    }


def test_extra_arguments_are_split_as_a_shell_does() -> None:
    assert extra_arguments({"TRAINER_EXTRA_ARGS": " --a 'b c' --d=1"}, "x") == ["--a", "b c", "--d=1"]
    with pytest.raises(UserError, match="TRAINER_EXTRA_ARGS: cannot be split"):
        extra_arguments({"TRAINER_EXTRA_ARGS": "--a 'b"}, "config.env")
