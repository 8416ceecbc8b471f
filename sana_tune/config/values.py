"""How single values are read: booleans and numbers from strings, sizes, names with a nearest guess. Pure."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple


class Resolution(NamedTuple):
    """Width and height of a validation picture, in px."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The name most like `name`, or None when nothing comes near."""
    found = difflib.get_close_matches(name.lower(), list(names), n=1, cutoff=0.6)
    return found[0] if found else None


def named(table: Mapping[str, str], kind: str) -> Callable[[str], str]:
    """A validator that accepts the names of `table` and otherwise tells the nearest one."""

    def check(value: str) -> str:
        if value in table:
            return value
        guess = nearest(value, table)
        hint = f"did you mean {guess!r}? " if guess else ""
        raise ValueError(f"no {kind} has the name {value!r}; {hint}known: {', '.join(table)}")

    return check


def parse_resolutions(value: Any) -> tuple[Resolution, ...]:
    """Read "1024", "1024x768,512" or a list of them. An empty value is no resolution (the model's own)."""
    if value is None or value == "" or value == ():
        return ()
    parts = value if isinstance(value, (list, tuple)) else str(value).split(",")
    found = []
    for part in parts:
        if isinstance(part, Resolution):
            found.append(part)
            continue
        match = re.fullmatch(r"\s*(\d+)(?:\.0+)?\s*(?:[xX×]\s*(\d+))?\s*", str(part))
        if not match or int(match[1]) == 0 or int(match[2] or 1) == 0:
            raise ValueError(f"a size is N or WxH in px, such as 1024 or 1280x768; found {str(part)!r}")
        found.append(Resolution(int(match[1]), int(match[2] or match[1])))
    return tuple(found)


def parse_instruction(value: Any) -> Any:
    """The complex human instruction: a text, a list of lines, a JSON list as text, or the path of a text file."""
    if isinstance(value, (list, tuple)):
        return "\n".join(str(line) for line in value)
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            lines = json.loads(value)
        except json.JSONDecodeError:
            return value
        return "\n".join(str(line) for line in lines) if isinstance(lines, list) else value
    if isinstance(value, str) and "\n" not in value and value.endswith((".txt", ".md")):
        path = Path(value)
        if not path.is_file():
            raise ValueError(f"the instruction names a text file that does not exist: {value}")
        return path.read_text(encoding="utf-8")
    return value
