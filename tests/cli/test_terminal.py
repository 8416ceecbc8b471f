"""The terminal itself: wrapped lines, answers that are no text, completed paths."""

from __future__ import annotations

import builtins

import pytest
from rich.console import Console

from sana_tune import log
from sana_tune.cli.terminal import Terminal, completions


@pytest.fixture
def narrow(monkeypatch) -> Console:
    console = Console(width=30, force_terminal=True, color_system=None, highlight=False, markup=False)
    console.soft_wrap = False
    monkeypatch.setattr(log, "_console", console)
    return console


def test_paragraphs_are_wrapped_in_columns(narrow, capsys):
    Terminal().say("a line that is much longer than thirty columns", indent=2)
    Terminal().say("この文章は三十桁の端末には長すぎるので折り返されます", indent=2)
    Terminal().say("[not markup]")
    Terminal().say()
    lines = capsys.readouterr().out.split("\n")
    assert lines[0].startswith("  a line") and lines[1].startswith("  ")
    from rich.cells import cell_len

    assert all(cell_len(line) <= 30 and line == line.rstrip() for line in lines)
    assert "[not markup]" in lines and lines[-2:] == ["", ""]


def test_lines_are_not_wrapped_in_a_file(monkeypatch, capsys):
    monkeypatch.setattr(log, "_console", None)
    Terminal().say("word " * 40, indent=2)
    assert len(capsys.readouterr().out.splitlines()) == 1


@pytest.mark.parametrize("typed, answer", [(" a b ", "a b"), ("猫の写真", "猫の写真"), ("a\tb", "a\tb")])
def test_an_answer(typed, answer, monkeypatch):
    monkeypatch.setattr(builtins, "input", lambda prompt: typed)
    assert Terminal().ask("> ", is_path=True) == answer


@pytest.mark.parametrize(
    "typed, reason", [("\x1b[A", "control characters"), ("a\udcffb", "UTF-8"), ("\x7f", "control")]
)
def test_what_is_no_text(typed, reason, monkeypatch):
    monkeypatch.setattr(builtins, "input", lambda prompt: typed)
    with pytest.raises(ValueError, match=reason):
        Terminal().ask("> ")


def test_paths_are_completed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "my photos").mkdir()
    (tmp_path / "my file[1]").write_text("")
    assert completions("my") == ["my file[1]", "my photos/"]
    assert completions("my file[") == ["my file[1]"] and completions("~/my p") == [f"{tmp_path}/my photos/"]
    assert completions("other") == []
