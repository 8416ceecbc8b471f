"""Reading one settings file: JSON, TOML or YAML, each strict, with the place of what is wrong.

Strict means: a key that stands twice is a mistake, not the last one wins; a comment in JSON is told as one. YAML is
read as YAML 1.2 means it: `1e-5` is a number and `no` a word (`mixed_precision: no`), unlike in PyYAML's own 1.1.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sana_tune.errors import Problem, UserError

LARGEST_BYTES = 1 << 19  # of a settings file; one that people write has some thousand bytes
DEEPEST = 100  # lists in lists
MOST_VALUES = 200_000  # lists and mappings in a file, aliases written out
CONFIG_ENDINGS = (".json", ".toml", ".yaml", ".yml")
COMMENTS = ("//", "#", "/*")  # as other languages begin them


def read(path: Path, what: str) -> Any:
    """The content of a settings file, by its ending; without a known one it is read as JSON.

    what: the file in the user's words, for messages. Raises UserError with the place of what is wrong.
    """
    text = _text(path, what)
    reader = {".toml": _toml, ".yaml": _yaml, ".yml": _yaml}.get(path.suffix.lower(), _json)
    try:
        content = reader(text, path)
        _check_nesting(content)
        return content
    except RecursionError:
        raise UserError(Problem(str(path), f"the {what} is nested too deeply to be one", "check the file")) from None


def read_text(path: Path, what: str) -> str:
    """The text of a settings file. Raises UserError when it is not there, too large, or no UTF-8."""
    return _text(path, what)


def _text(path: Path, what: str) -> str:
    try:
        size = path.stat().st_size
        if size > LARGEST_BYTES:
            message = f"the {what} is {size / 1e6:.1f} MB large; one that was written by people has some kilobytes"
            raise UserError(Problem(str(path), message, "check that it is the right file"))
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        looked = "" if path.is_absolute() else f" (looked in {Path.cwd()})"
        raise UserError(Problem(str(path), f"the {what} must exist and does not{looked}", "check the path")) from None
    except UnicodeDecodeError as error:
        raise UserError(
            Problem(str(path), f"the {what} must be UTF-8 text; byte {error.start} is not", "save it as UTF-8")
        ) from None
    except (OSError, ValueError) as error:  # a path can be none at all
        raise UserError(Problem(str(path), f"the {what} cannot be read: {error}", "check the path")) from None


def _check_nesting(content: Any) -> None:
    """Raise RecursionError for lists in lists that nobody who reads settings would follow down.

    A YAML alias can hold a list many times over, or within itself: each list is looked at once a level, and how much
    it would be when written out is counted.
    """
    sizes: dict[int, int] = {}
    levels = [[content]]
    while levels[-1]:
        if len(levels) > DEEPEST:
            raise RecursionError
        levels.append(list({id(inner): inner for value in levels[-1] for inner in _inside(value)}.values()))
    for level in reversed(levels):
        for value in level:
            sizes[id(value)] = 1 + sum(sizes.get(id(inner), 1) for inner in _inside(value))
    if sizes[id(content)] > MOST_VALUES:
        raise RecursionError


def _inside(value: Any) -> list[Any]:
    """The lists and mappings directly inside a value, as often as they stand there."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [part for part in inner if isinstance(part, (list, dict))]


def _twice(path: Path, key: str, line: int | None = None) -> UserError:
    place = f", line {line}" if line else ""
    return UserError(Problem(f"{path}{place}: {key}", "the key stands twice", "keep one of the two"))


# ---- JSON ----


def _json(text: str, path: Path) -> Any:
    try:
        return json.loads(text, object_pairs_hook=lambda pairs: _unique(pairs, path))
    except json.JSONDecodeError as error:
        raise UserError(_json_problem(path, text, error)) from None
    except ValueError as error:  # a number of thousands of digits
        raise UserError(Problem(str(path), f"the file must be JSON: {error}", "check the numbers")) from None


def _unique(pairs: list[tuple[str, Any]], path: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _twice(path, key)
        found[key] = value
    return found


def _json_problem(path: Path, text: str, error: json.JSONDecodeError) -> Problem:
    lines = text.splitlines() or [""]
    line = lines[min(error.lineno, len(lines)) - 1].strip()
    around = [row.strip() for row in lines[max(0, error.lineno - 2) : error.lineno]]
    found = text[error.pos :].lstrip()
    if found.startswith(COMMENTS) or any(row.startswith(COMMENTS) or "//" in row.split('"')[-1] for row in around):
        fix = "JSON has no comments: remove them (or use YAML, which has)"
    elif any(row.endswith(",") for row in around) and line[:1] in "}]":
        fix = "remove the comma after the last entry"
    elif error.msg.startswith("Invalid \\"):
        fix = "a backslash in JSON is written twice; in paths a slash does as well: C:/pictures"
    elif found.startswith("'"):
        fix = f"JSON has double quotes alone: write \"…\", not '…'; near: {line[:80]}"
    elif re.match(r"(True|False|None)\b", found):
        fix = f"JSON writes true, false and null; near: {line[:80]}"
    else:
        fix = f"near: {line[:80]}" if line else "the file ends too early"
    return Problem(f"{path}, line {error.lineno}", f"the file must be JSON: {error.msg.lower()}", fix)


# ---- TOML ----


def _toml(text: str, path: Path) -> Any:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        place = re.search(r"\(at line (\d+), column \d+\)", str(error))
        where = f"{path}, line {place[1]}" if place else str(path)
        what = str(error).split(" (at ")[0].lower()
        if "overwrite" in what or "twice" in what:
            raise UserError(Problem(where, "the key stands twice", "keep one of the two")) from None
        rows = text.splitlines()
        line = rows[int(place[1]) - 1].strip() if place and int(place[1]) <= len(rows) else ""
        fix = 'text stands in quotes: key = "text"' + (f"; near: {line[:80]}" if line else "")
        raise UserError(Problem(where, f"the file must be TOML: {what}", fix)) from None
    except ValueError as error:  # a number of thousands of digits
        raise UserError(Problem(str(path), f"the file must be TOML: {error}", "check the numbers")) from None


# ---- YAML ----

# Scalars of YAML 1.2's core schema: (tag, pattern, characters it can begin with).
_SCALARS: tuple[tuple[str, str, str], ...] = (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+0123456789."),
)


def _yaml(text: str, path: Path) -> Any:
    import yaml

    loader = _yaml_loader(lambda key, line: _twice(path, key, line))
    try:
        _check_depth(text, loader)
        return yaml.load(text, loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}, line {mark.line + 1}" if mark else str(path)
        what = (error.problem or error.context or "it cannot be read").replace("\n", " ")
        rows = text.splitlines()
        line = rows[mark.line].strip() if mark and mark.line < len(rows) else ""
        fix = ("indent with blanks, not tabs; quote text with ': ' or a leading special character"
               + (f"; near: {line[:80]}" if line else ""))  # fmt: skip
        raise UserError(Problem(where, f"the file must be YAML: {what}", fix)) from None
    except yaml.YAMLError as error:  # characters that YAML does not have
        first = str(error).splitlines()[0]
        raise UserError(Problem(str(path), f"the file must be YAML: {first}", "save it as plain UTF-8 text")) from None
    except ValueError as error:  # a number of thousands of digits
        raise UserError(Problem(str(path), f"the file must be YAML: {error}", "check the numbers")) from None


def _check_depth(text: str, loader: type[Any]) -> None:
    """Raise RecursionError for what would overflow the stack of the C parser, which nothing could catch."""
    import yaml

    depth = 0
    for event in yaml.parse(text, loader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > DEEPEST:
                raise RecursionError
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


def _yaml_loader(twice: Callable[[str, int], UserError]) -> type[Any]:
    """A safe loader with YAML 1.2's scalars, which raises `twice(key, line)` where a mapping has a key again."""
    import yaml

    base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the C parser where PyYAML was built with it

    class Loader(base):
        yaml_implicit_resolvers: dict[str, list] = {}

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            seen: set[str] = set()
            for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
                if isinstance(key, yaml.ScalarNode):
                    if key.value in seen:
                        raise twice(key.value, key.start_mark.line + 1)
                    seen.add(key.value)
            return super().construct_mapping(node, deep)

    for tag, pattern, first in _SCALARS:
        expression = re.compile(f"^(?:{pattern})$")
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", expression, None if first == "~nN\0" else list(first))
    Loader.add_constructor("tag:yaml.org,2002:int", lambda self, node: _whole(self.construct_scalar(node)))
    return Loader


def _whole(text: str) -> int:
    """An integer of YAML 1.2: decimal (leading zeros are nothing special), 0o… or 0x…."""
    return int(text, 0) if text.startswith(("0o", "0x")) else int(text)
