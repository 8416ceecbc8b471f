"""The command line: what it answers at once, its exit codes, and how mistakes are told."""

from __future__ import annotations

import signal

import pytest

import sana_tune
from sana_tune.cli.main import app, exit_code, main
from sana_tune.errors import Interrupted, Problem, UserError
from tests.config.helpers import write_files


def test_version_and_help_answer(capsys):
    assert exit_code(["--version"]) == 0
    assert capsys.readouterr().out == f"sana_tune {sana_tune.__version__}\n"
    assert exit_code(["--help"]) == 0
    said = capsys.readouterr().out
    assert "train" in said and "examples" in said
    assert exit_code(["train", "--help"]) == 0
    said = capsys.readouterr().out
    assert all(flag in said for flag in ("--config", "--env", "--example", "--restart", "--key value"))


@pytest.mark.parametrize("arguments", [["tain"], ["train", "--config"], ["examples", "copy"], ["examples", "bin"]])
def test_a_wrong_command_line_ends_with_1(arguments, capsys):
    assert exit_code(arguments) == 1
    said = capsys.readouterr()
    assert "Traceback" not in said.err and said.err.strip()


def test_main_ends_the_process_with_the_code():
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0


def test_one_problem_is_an_error_and_several_are_counted(tmp_path, capsys):
    path = write_files(tmp_path, {"sed": 1})
    assert exit_code(["train", "--config", str(path)]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "did you mean seed?" in said
    assert exit_code(["train", "--config", str(path), "--max_train_step=4"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("2 things are wrong; nothing was started\n") and said.count("error: ") == 2


@pytest.mark.parametrize("flags", [["--env", "mine"], ["env=mine"], ["--env=mine"]])
def test_a_config_by_the_name_of_its_folder(flags, tmp_path, monkeypatch, capsys):
    """Found, since what is told is wrong in it; with either spelling of the flag."""
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path, {"sed": 1}).rename(tmp_path / "config.txt")
    (tmp_path / "config" / "mine").mkdir(parents=True)
    (tmp_path / "config.txt").rename(tmp_path / "config" / "mine" / "config.json")
    assert exit_code(["train", *flags]) == 1
    assert "config/mine/config.json: sed" in capsys.readouterr().err


def test_names_are_not_abbreviated(tmp_path, capsys):
    path = write_files(tmp_path)
    assert exit_code(["train", "--conf", str(path)]) == 1
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_has_the_signals_code(number, code, capsys):
    def stopped() -> None:
        raise Interrupted(number)

    assert with_command(stopped) == code
    assert f"signal {number.value}" in capsys.readouterr().err


def test_a_failure_of_several_problems_and_one_of_ours(capsys):
    def wrong() -> None:
        raise UserError(Problem("here", "is wrong", "mend it"), Problem("there", "too"))

    def broken() -> None:
        raise ZeroDivisionError

    assert with_command(wrong) == 1
    assert "error: here: is wrong\n  → mend it\nerror: there: too\n" in capsys.readouterr().err
    with pytest.raises(ZeroDivisionError):  # a mistake of ours is not dressed up as the user's
        with_command(broken)


def with_command(function) -> int:
    """The exit code when a command of the program does that."""
    app.command("for-a-test")(function)
    try:
        return exit_code(["for-a-test"])
    finally:
        app.registered_commands.pop()
