"""`sana_tune bench`: what was asked for as values, the table as it grows, and the JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from sana_tune.bench import Asked, Measured, lines_of, measure
from sana_tune.errors import Problem, UserError
from sana_tune.log import quiet_libraries
from sana_tune.store import write_atomically


def numbers(text: str, where: str) -> tuple[int, ...]:
    """ "1,8,32" → (1, 8, 32). Raises UserError for anything but whole numbers from 1 on."""
    words = listed(text)
    if not words or not all(word.isdecimal() and int(word) > 0 for word in words):
        raise UserError(Problem(where, f"whole numbers from 1 on, with commas between; found {text!r}", "such as 1,8"))
    return tuple(int(word) for word in words)


def listed(text: str) -> tuple[str, ...]:
    """ "a, b" → ("a", "b")"""
    return tuple(word.strip() for word in text.split(",") if word.strip())


def bench_asked(asked: Asked, say: Callable[[str], None], json_file: Path | None) -> None:
    """Measure and say it line by line; write all of it to the file. Raises UserError."""
    quiet_libraries()
    machine, cases = measure(asked)
    found: list[Measured] = []
    for line in lines_of(asked, machine, ()):
        say(line)
    for one in cases:
        found.append(one)
        say(lines_of(asked, machine, found)[-1])
    if json_file is not None:
        values = {"asked": asdict(asked), "machine": asdict(machine), "cases": [one.to_json() for one in found]}
        write_atomically(json_file, (json.dumps(values, indent=2) + "\n").encode())
        say(f"\nwritten to {json_file}")
