"""Finding and reading the user's files: where config.json is, strict JSON with clear errors, packaged examples."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sana_tune.errors import Problem, UserError

EXAMPLES_PREFIX = "config/examples/"
COMMENTS = ("//", "#", "/*")  # as other languages begin them


def examples_dir() -> Path:
    """The packaged examples: beside the package in a wheel, in config/examples of a checkout."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "examples"
    return installed if installed.is_dir() else package.parent / "config" / "examples"


def resolve(path: str | Path) -> Path:
    """A path as the user means it: relative to the working directory; config/examples/… may be a packaged one."""
    local = Path(path).expanduser()
    text = str(path).replace("\\", "/").removeprefix("./")
    if not os.path.exists(local) and text.startswith(EXAMPLES_PREFIX):
        packaged = examples_dir() / text.removeprefix(EXAMPLES_PREFIX)
        if packaged.exists():
            return packaged
    return local


def list_examples() -> tuple[str, ...]:
    """Names of the packaged examples."""
    root = examples_dir()
    if not root.is_dir():
        return ()
    return tuple(sorted(path.parent.name for path in root.glob("*/config.json")))


def find_config(
    config: str | None, env: str | None, example: str | None, environ: Mapping[str, str], cwd: Path
) -> tuple[Path, tuple[str, ...]]:
    """Path of the config file to run, and notes about what was passed over.

    Order: --example, --config, --env, CONFIG_PATH, SIMPLETUNER_ENVIRONMENT / SIMPLETUNER_ENV / ENV,
    ./config.json, config/config.json. A variable ENV that names nothing only gives a note, since containers
    set it for their own purposes.
    """
    if example is not None:
        return _example(example), ()
    if config is not None:
        return _existing(config, "--config"), ()
    if env is not None:
        return _environment(env, cwd), ()
    if environ.get("CONFIG_PATH"):
        return _existing(environ["CONFIG_PATH"], "CONFIG_PATH"), ()
    notes: list[str] = []
    for name in ("SIMPLETUNER_ENVIRONMENT", "SIMPLETUNER_ENV", "ENV"):
        value = environ.get(name)
        if not value or value == "default":
            continue
        if (found := _in_environment(value, cwd)) is not None:
            return found, ()
        if name != "ENV":
            return _environment(value, cwd), ()
        notes.append(f"the environment variable ENV={value} names no config in config/{value}; it is passed over")
    for path in (cwd / "config.json", cwd / "config" / "config.json"):
        if path.is_file():
            return path, tuple(notes)
    passed_over = "".join(f" ({note})" for note in notes)
    raise UserError(
        Problem(
            "config",
            f"no config file was found; looked for ./config.json and config/config.json{passed_over}",
            "copy config/config.json.example to config/config.json and edit it, name one with --config PATH, "
            "or try the built-in example: sana_tune train --example nano",
        )
    )


def _example(name: str) -> Path:
    path = examples_dir() / name / "config.json"
    if not path.is_file():
        known = ", ".join(list_examples()) or "none"
        raise UserError(Problem("--example", f"there is no example {name!r}; known: {known}", "name one of them"))
    return path


def _existing(path: str, where: str) -> Path:
    found = resolve(path)
    if found.is_dir():
        found = found / "config.json"
    if not found.is_file():
        raise UserError(Problem(where, f"the config file must exist; {found} does not", "check the path"))
    return found


def _in_environment(name: str, cwd: Path) -> Path | None:
    for candidate in (cwd / "config" / name / "config.json", Path(name) / "config.json", Path(name)):
        if candidate.is_file() and candidate.suffix == ".json":
            return candidate
    return None


def _environment(name: str, cwd: Path) -> Path:
    found = _in_environment(name, cwd)
    if found is None:
        known = sorted(path.parent.name for path in (cwd / "config").glob("*/config.json"))
        listed = f"; there are: {', '.join(known)}" if known else ""
        raise UserError(
            Problem("--env", f"config/{name}/config.json must exist and does not{listed}", "check the name")
        )
    return found


def read_json(path: Path, what: str) -> Any:
    """Read strict JSON. A comment, a trailing comma, a duplicate key or bad bytes is a UserError with the place."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        looked = "" if path.is_absolute() else f" (looked in {Path.cwd()})"
        raise UserError(Problem(str(path), f"the {what} must exist and does not{looked}", "check the path")) from None
    except UnicodeDecodeError as error:
        raise UserError(
            Problem(str(path), f"the {what} must be UTF-8 text; byte {error.start} is not", "save it as UTF-8")
        ) from None
    except (OSError, ValueError) as error:  # a path can be none at all
        raise UserError(Problem(str(path), f"the {what} cannot be read: {error}", "check the path")) from None
    try:
        return json.loads(text, object_pairs_hook=lambda pairs: _unique(pairs, path))
    except json.JSONDecodeError as error:
        raise UserError(_json_problem(path, text, error)) from None
    except RecursionError:
        raise UserError(Problem(str(path), f"the {what} is nested too deeply to be one", "")) from None


def _unique(pairs: list[tuple[str, Any]], path: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise UserError(Problem(f"{path}: {key}", "the key stands twice", "keep one of the two"))
        found[key] = value
    return found


def _json_problem(path: Path, text: str, error: json.JSONDecodeError) -> Problem:
    lines = text.splitlines() or [""]
    line = lines[min(error.lineno, len(lines)) - 1].strip()
    around = [row.strip() for row in lines[max(0, error.lineno - 2) : error.lineno]]
    found = text[error.pos :].lstrip()
    if found.startswith(COMMENTS) or any(row.startswith(COMMENTS) or "//" in row.split('"')[-1] for row in around):
        fix = "JSON has no comments: remove them"
    elif any(row.endswith(",") for row in around) and line[:1] in "}]":
        fix = "remove the comma after the last entry"
    else:
        fix = f"near: {line[:80]}" if line else "the file ends too early"
    return Problem(f"{path}, line {error.lineno}", f"the file must be JSON: {error.msg.lower()}", fix)
