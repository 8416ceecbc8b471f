"""Settings given on a command line: `--key value`, `--key=value`, `key=value` and bare `--flag`. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sana_tune.errors import Problem, UserError


def parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """Read the words of a command line into a flat mapping; a bare flag is true. Raises UserError for stray words."""
    found: dict[str, Any] = {}
    problems = []
    waiting = list(arguments)
    while waiting:
        word = waiting.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") and not equals:
            problems.append(
                Problem("command line", f"{word!r} is no --key value and no key=value", "check the quoting")
            )
        elif equals:
            found[plain(name)] = value
        elif waiting and not waiting[0].startswith("--"):
            found[plain(name)] = waiting.pop(0)
        else:
            found[plain(name)] = True
    if problems:
        raise UserError(*problems)
    return found


def plain(key: str) -> str:
    """A key without leading dashes, and with underscores: `--learning-rate` → `learning_rate`."""
    return key.strip().removeprefix("--").replace("-", "_")
