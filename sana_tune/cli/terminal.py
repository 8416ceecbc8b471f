"""Saying and asking on a terminal: wrapped lines out, one edited line in, paths completed by Tab. No torch."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol

from sana_tune.log import console


class Asker(Protocol):
    """Who says and asks: a terminal, or a script in a test."""

    def say(self, text: str = "", *, style: str | None = None, indent: int = 0) -> None:
        """Print a paragraph."""
        ...

    def ask(self, prompt: str, *, is_path: bool = False) -> str:
        """One line of answer. Raises EOFError and KeyboardInterrupt as `input` does; ValueError for what is no text."""
        ...


class Terminal:
    """Standard input and output: over ssh, in tmux, in any script; readline edits the line where there is one."""

    def say(self, text: str = "", *, style: str | None = None, indent: int = 0) -> None:
        """Print a paragraph, wrapped at the terminal's width."""
        from rich.text import Text

        out = console()
        if out.soft_wrap:
            return out.print(" " * indent + text)
        lines = Text(text, style=style or "").wrap(out, out.width - indent) if text else [Text()]
        for line in lines:
            line.rstrip()
            out.print(Text(" " * indent) + line)

    def ask(self, prompt: str, *, is_path: bool = False) -> str:
        """One line. Raises ValueError when it is not text that a file can hold: control characters, broken UTF-8."""
        with _completing(is_path):
            try:
                text = input(prompt)
                text.encode("utf-8")
            except UnicodeError:
                raise ValueError("the answer is not UTF-8 text") from None
        if any((ord(letter) < 32 and letter != "\t") or ord(letter) == 127 for letter in text):
            raise ValueError("the answer has control characters in it")
        return text.strip()


@contextmanager
def _completing(paths: bool) -> Iterator[None]:
    """Tab completes paths in here, where readline is there; elsewhere Tab does nothing. No history is kept."""
    readline: Any = None
    with suppress(ImportError):
        import readline
    if readline is None:
        yield
        return
    is_libedit = "libedit" in (readline.__doc__ or "")
    readline.set_completer(_complete if paths else lambda text, state: None)
    readline.set_completer_delims("")
    readline.parse_and_bind("bind ^I rl_complete" if is_libedit else "tab: complete")
    readline.set_auto_history(False)
    try:
        yield
    finally:
        readline.set_completer(None)


def _complete(text: str, state: int) -> str | None:
    found = completions(text)
    return found[state] if state < len(found) else None


def completions(text: str) -> list[str]:
    """The paths that begin with `text`, folders with a slash at the end."""
    start = os.path.expanduser(text) if text.startswith("~") else text
    found = sorted(glob.glob(glob.escape(start) + "*"))
    return [path + "/" if os.path.isdir(path) else path for path in found]
