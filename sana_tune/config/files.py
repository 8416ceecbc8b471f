"""Finding the user's files: where the config is, what config.env adds to the environment, packaged examples."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from sana_tune.config.env_file import read_env
from sana_tune.config.formats import CONFIG_ENDINGS
from sana_tune.errors import Problem, UserError

EXAMPLES_PREFIX = "config/examples/"
NAMED_BY = ("SIMPLETUNER_ENVIRONMENT", "SIMPLETUNER_ENV", "ENV")
FORMAT_BY = ("SIMPLETUNER_CONFIG_BACKEND", "CONFIG_BACKEND", "CONFIG_TYPE")
ENDINGS = (*CONFIG_ENDINGS, ".env")  # in the order of search
FORMATS = {"json": (".json",), "toml": (".toml",), "yaml": (".yaml", ".yml"), "env": (".env",)}
FLAGS_ALONE = "cmd"


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


def read_environment_files(env: str | None, environ: Mapping[str, str], cwd: Path) -> dict[str, str]:
    """The variables of config/config.env and of config/<env>/config.env, which join the environment before all else.

    Raises UserError for lines that are no KEY=VALUE.
    """
    found = _read_if_there(cwd / "config" / "config.env", environ)
    settled = {**environ, **found}
    name = env or next((value for key in NAMED_BY if (value := settled.get(key))), "")
    return {**found, **_read_if_there(cwd / "config" / name / "config.env", settled)} if name else found


def _read_if_there(path: Path, environ: Mapping[str, str]) -> dict[str, str]:
    return read_env(path, environ) if path.is_file() else {}


def find_config(
    config: str | None, env: str | None, example: str | None, environ: Mapping[str, str], cwd: Path
) -> tuple[Path | None, tuple[str, ...]]:
    """Path of the config file to run (None: the flags alone), and notes about what was passed over.

    Order: --example, --config, --env, CONFIG_PATH, SIMPLETUNER_ENVIRONMENT / SIMPLETUNER_ENV / ENV, ./config.*,
    config/config.*; of several endings .json, .toml, .yaml, .env, unless CONFIG_BACKEND names one. A variable ENV that
    names nothing only gives a note, since containers set it for their own purposes.
    """
    if example is not None:
        return _example(example), ()
    if config is not None:
        return _existing(config, "--config", ENDINGS), ()
    endings, backend = _endings(environ)
    if env is not None:
        return _environment(env, cwd, endings, "--env"), ()
    if environ.get("CONFIG_PATH"):
        return _existing(environ["CONFIG_PATH"], "CONFIG_PATH", endings), ()
    notes: list[str] = []
    for name in NAMED_BY:
        value = environ.get(name)
        if not value or value == "default":
            continue
        if (found := _in_environment(value, cwd, endings)) is not None:
            return found, ()
        if name != "ENV":
            return _environment(value, cwd, endings, name), ()
        notes.append(f"the environment variable ENV={value} names no config in config/{value}; it is passed over")
    if backend == FLAGS_ALONE:
        return None, tuple(notes)
    for folder in (cwd, cwd / "config"):
        if (path := _first(folder / "config", endings)) is not None:
            return path, tuple(notes)
    raise UserError(_nothing_found(endings, notes))


def _nothing_found(endings: tuple[str, ...], notes: list[str]) -> Problem:
    passed_over = "".join(f" ({note})" for note in notes)
    names = "config.json" if endings == ENDINGS else f"config{endings[0]}"
    others = " (nor with the ending .toml, .yaml or .env)" if endings == ENDINGS else ""
    return Problem(
        "config",
        f"no config file was found; looked for ./{names} and config/{names}{others}{passed_over}",
        "answer a few questions: sana_tune configure; or copy config/config.json.example to config/config.json and "
        "edit it, name one with --config PATH, or try the built-in example: sana_tune train --example nano",
    )


def _endings(environ: Mapping[str, str]) -> tuple[tuple[str, ...], str]:
    """The endings to look for, and the backend that the environment asks for ("" = any)."""
    for name in FORMAT_BY:
        value = environ.get(name, "").lower()
        if value in FORMATS:
            return FORMATS[value], value
        if value and value != FLAGS_ALONE:
            known = ", ".join((*FORMATS, FLAGS_ALONE))
            raise UserError(Problem(name, f"must be one of {known}; found {value!r}", "unset it: any format is found"))
        if value:
            return ENDINGS, value
    return ENDINGS, ""


def _first(stem: Path, endings: tuple[str, ...]) -> Path | None:
    """The first file of this stem with one of the endings."""
    return next((path for end in endings if (path := stem.with_name(stem.name + end)).is_file()), None)


def _example(name: str) -> Path:
    path = examples_dir() / name / "config.json"
    if not path.is_file():
        known = ", ".join(list_examples()) or "none"
        raise UserError(Problem("--example", f"there is no example {name!r}; known: {known}", "name one of them"))
    return path


def _existing(path: str, where: str, endings: tuple[str, ...]) -> Path:
    found = resolve(path)
    if found.is_dir():
        inside = _first(found / "config", endings)
        if inside is None:
            raise UserError(
                Problem(where, f"the folder {found} must hold a config.json and does not", "check the path")
            )
        return inside
    if not found.is_file() and not found.suffix:
        found = _first(found, endings) or found
    if not found.is_file():
        looked = "" if found.is_absolute() else f" (looked in {Path.cwd()})"
        raise UserError(Problem(where, f"the config file must exist; {found} does not{looked}", "check the path"))
    return found


def _in_environment(name: str, cwd: Path, endings: tuple[str, ...]) -> Path | None:
    for folder in (cwd / "config" / name, cwd / name):
        if (found := _first(folder / "config", endings)) is not None:
            return found
    whole = cwd / name
    return whole if whole.is_file() and whole.suffix.lower() in endings else None


def _environment(name: str, cwd: Path, endings: tuple[str, ...], where: str) -> Path:
    found = _in_environment(name, cwd, endings)
    if found is None:
        known = sorted({path.parent.name for end in endings for path in (cwd / "config").glob(f"*/config{end}")})
        listed = f"; there are: {', '.join(known)}" if known else ""
        raise UserError(Problem(where, f"config/{name}/config.json must exist and does not{listed}", "check the name"))
    return found
