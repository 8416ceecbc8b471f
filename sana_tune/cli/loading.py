"""From the words of a command line to the loaded config: what `train`, `check` and `configure` have in common."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sana_tune.config.arguments import parse_overrides
from sana_tune.config.env_file import settings_of
from sana_tune.config.files import find_config, read_environment_files
from sana_tune.config.launching import FALLBACKS, VARIABLES
from sana_tune.config.legacy import known_foreign_keys
from sana_tune.config.load import Loaded, load, load_settings
from sana_tune.config.schema import Config, section_of
from sana_tune.memory import small_card_bytes


def load_asked(
    words: Sequence[str], config: str | None = None, env: str | None = None, example: str | None = None
) -> tuple[Loaded, tuple[str, ...]]:
    """The config that the flags and the environment name, with `words` (--key value …) laid over it, and notes.

    The variables of config.env join this process's environment first. Raises UserError with all problems.
    """
    path, overrides, notes = _found(words, config, env, example)
    return load(path, overrides, prices=small_card_bytes), notes


def settings_asked(
    words: Sequence[str], config: str | None = None, env: str | None = None, example: str | None = None
) -> Config:
    """The same settings for what needs no dataset. Raises UserError with all problems."""
    path, overrides, _ = _found(words, config, env, example)
    return load_settings(path, overrides)


def _found(
    words: Sequence[str], config: str | None, env: str | None, example: str | None
) -> tuple[Path | None, dict[str, Any], tuple[str, ...]]:
    """The config's path, what is laid over it, and notes."""
    overrides = parse_overrides(words)
    env, example = overrides.pop("env", env), overrides.pop("example", example)
    variables = read_environment_files(env, os.environ, Path.cwd())
    os.environ.update(variables)
    path, notes = find_config(config, env, example, os.environ, Path.cwd())
    if path is not None and path.suffix != ".env":
        notes = (*notes, *_idle(variables))
    return path, overrides, notes


def _idle(variables: dict[str, str]) -> list[str]:
    """A note on settings in config.env that another config file makes idle."""
    known = frozenset((*section_of(), *known_foreign_keys())) - {*FALLBACKS.values(), *VARIABLES.values()}
    names = [name for name, _ in settings_of(variables, known).values()]
    return [f"config.env: {', '.join(names)} has no effect beside a config file: settings come from that"] * bool(names)
