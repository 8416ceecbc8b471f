"""What is done to captions before they are encoded: filters that remove or replace, shuffles of their parts. No torch.

A filter is a line of text: `s/pattern/replacement/` replaces what a regular expression finds, anything else is removed
wherever it stands, letter for letter.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from sana_tune.config.files import resolve

SPLITS: dict[str, str] = {"comma": ",", "space": " ", "period": "."}
MOST_SHUFFLES = 1000  # of one caption: each is encoded and kept
_REPLACES = re.compile(r"s/((?:[^/\\]|\\.)*)/((?:[^/\\]|\\.)*)/([a-z]*)", re.DOTALL)
_FLAGS = {"g": re.NOFLAG, "i": re.IGNORECASE}  # everything that is found is replaced anyway
_TOLD = 5


@dataclass(frozen=True)
class CaptionShuffle:
    """How variants of a caption are made: its parts, split at commas, blanks or periods, in other orders.

    count: other orders to be made. seed: with the caption it decides which. position_start: parts at the front that
    stay. include_original: the caption as it is written stays a variant too.
    """

    count: int = 1
    seed: int = 0
    split_on: str = "comma"
    position_start: int = 0
    include_original: bool = True

    def __str__(self) -> str:
        kept = f", the first {self.position_start} stay" if self.position_start else ""
        return f"{self.count} at each {self.split_on}{kept}"


def parse_caption_shuffle(value: Any) -> CaptionShuffle | None:
    """Read {"enable": true, "count": 3, …}; None when it is not enabled. Raises ValueError."""
    if isinstance(value, CaptionShuffle) or value is None or value == "":
        return value or None
    example = '{"enable": true, "count": 3, "split_on": "comma"}'
    if not isinstance(value, Mapping):
        raise ValueError(f"a caption shuffle is an object such as {example}; found {_shown(value)}")
    known = ("enable", *(field.name for field in fields(CaptionShuffle)))
    strange = [key for key in value if key not in known]
    if strange:
        raise ValueError(f"a caption shuffle has {', '.join(known)}; found {_shown(strange[0])}")
    if "enable" not in value and value:
        raise ValueError(f"a caption shuffle must say whether it is on, as in {example}; enable is not there")
    given = {key: entry for key, entry in value.items() if key != "enable" and entry is not None}
    split = given.get("split_on", "comma")
    if split not in SPLITS:
        raise ValueError(f"split_on must be {' or '.join(SPLITS)}; found {_shown(split)}")
    numbers = {"count": (1, MOST_SHUFFLES), "seed": (0, 2**63), "position_start": (0, 10**6)}
    found = {key: _whole(key, given[key], *numbers[key]) for key in numbers if key in given}
    original = _switch("include_original", given.get("include_original", True))
    enabled = _switch("enable", value.get("enable", False))
    return CaptionShuffle(**found, split_on=split, include_original=original) if enabled else None


def parse_caption_filters(value: Any) -> tuple[str, ...]:
    """Read a list of filters, or the path of a .txt file (one a line) or .json file (a list). Raises ValueError.

    Empty lines count for nothing. Every filter that is wrong is told with its line.
    """
    if value is None or value == "":
        return ()
    if isinstance(value, str):
        lines, place = _of_file(resolve(value)), f"{value}, "
        unit = "line" if value.lower().endswith(".txt") else "entry"
    elif isinstance(value, Sequence):
        lines, place, unit = value, "", "entry"
    else:
        raise ValueError(f"must be a list of filters, or the path of a .txt or .json file; found {_shown(value)}")
    found, wrong = [], []
    for number, line in enumerate(lines, start=1):
        reason = _reason_against(line)
        if reason:
            wrong.append(f"{place}{unit} {number}: {reason}")
        elif line.strip():
            found.append(line)
    if wrong:
        more = f"; and {len(wrong) - _TOLD} more" if len(wrong) > _TOLD else ""
        raise ValueError("; ".join(wrong[:_TOLD]) + more)
    return tuple(found)


def filtered(text: str, filters: Sequence[str]) -> str:
    """The text after all filters, in their order. Blanks that are left over are closed up."""
    before = text
    for line in filters:
        pattern, replacement = _compiled(line)
        text = pattern.sub(replacement, text)
    return text if text == before else re.sub(r" {2,}", " ", text)


@lru_cache(maxsize=4096)
def _compiled(line: str) -> tuple[re.Pattern[str], str]:
    """A filter as a pattern and what stands in its place. Raises re.error and IndexError."""
    found = _REPLACES.fullmatch(line.strip())
    if found is None:
        return re.compile(re.escape(line)), ""
    pattern, replacement, letters = found.groups()
    flags = re.NOFLAG
    for letter in letters:
        flags |= _FLAGS[letter]
    compiled = re.compile(pattern.replace(r"\/", "/"), flags)
    replacement = replacement.replace(r"\/", "/")
    compiled.sub(replacement, "")  # a replacement that names a group that is not there is told now
    return compiled, replacement


def _reason_against(line: Any) -> str | None:
    """What is wrong with a filter, or None."""
    if not isinstance(line, str):
        return f"a filter is a text; found {_shown(line)}"
    text = line.strip()
    parts = _REPLACES.fullmatch(text)
    if text.startswith("s/") and parts is None:
        return f"a replacement is written s/pattern/replacement/ (a slash inside as \\/); found {_shown(text)}"
    if parts is not None and not parts[1]:
        return f"the pattern is empty; found {_shown(text)}"
    if parts is not None and set(parts[3]) - set(_FLAGS):
        return f"behind the last slash stand {' and '.join(_FLAGS)} at most; found {_shown(text)}"
    try:
        _compiled(line)
    except (re.error, IndexError, OverflowError, RecursionError) as error:
        return f"is no regular expression: {error}; found {_shown(text)}"
    return None


def _of_file(path: Path) -> Sequence[Any]:
    """The lines of a .txt file or the list of a .json file."""
    ending = path.suffix.lower()
    if ending not in (".txt", ".json"):
        raise ValueError(f"must be a list of filters, or the path of a .txt or .json file; found {str(path)!r}")
    try:
        text = path.read_text(encoding="utf-8-sig")
        content = text.splitlines() if ending == ".txt" else json.loads(text)
    except OSError as error:
        raise ValueError(f"the file of filters cannot be read: {path}: {error.strerror or error}") from None
    except ValueError as error:  # not UTF-8, or not JSON
        raise ValueError(f"the file of filters cannot be read: {path}: {error}") from None
    if not isinstance(content, list):
        raise ValueError(f'the file of filters must hold a JSON list ["…", "…"]; {path} does not')
    return content


def _whole(key: str, value: Any, low: int, high: int) -> int:
    try:
        number = int(re.sub(r"\.0+$", "", str(value).strip()))
    except ValueError:
        number = low - 1
    if isinstance(value, bool) or not low <= number <= high:
        raise ValueError(f"{key} must be a whole number from {low} to {high}; found {_shown(value)}")
    return number


def _switch(key: str, value: Any) -> bool:
    words = {"true": True, "1": True, "false": False, "0": False}
    found = words.get(str(value).strip().lower())
    if found is None:
        raise ValueError(f"{key} must be true or false; found {_shown(value)}")
    return found


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"
