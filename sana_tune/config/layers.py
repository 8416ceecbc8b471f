"""File, environment and command line → one flat mapping of our own keys to raw values, each with its origin.

The command line wins over the file, the file over the environment, the environment over the default. For processes and
machines the environment wins over the file (launching.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sana_tune.config.arguments import parse_overrides, plain
from sana_tune.config.datasets import DATASET_KINDS
from sana_tune.config.env_file import extra_arguments, read_env, settings_of
from sana_tune.config.findings import Findings, is_of_the_file
from sana_tune.config.formats import read
from sana_tune.config.launching import FALLBACKS, given_by_variables, lay_the_rest
from sana_tune.config.legacy import known_foreign_keys
from sana_tune.config.placeholders import expand_env
from sana_tune.config.schema import SECTIONS, section_of
from sana_tune.config.secrets import is_masked, is_secret
from sana_tune.errors import Problem, UserError

DEFAULT = "default"
COMMAND_LINE = "command line"

# "" means something for these; for every other key it means "not set".
MAY_BE_EMPTY = ("resume_from_checkpoint", "validation_prompt", "validation_negative_prompt", "instance_prompt")


@dataclass(frozen=True)
class Flat:
    """What is asked for, before types.

    raw: our key → value as written. origins: our key → file and key, variable or flag; DEFAULT when not given.
    secret: keys whose value must not be shown. is_ours: the file was written for sana_tune (it names our schema).
    """

    raw: Mapping[str, Any]
    origins: Mapping[str, str]
    secret: frozenset[str] = frozenset()
    is_ours: bool = False


def flatten(path: Path | None, overrides: Mapping[str, Any], environ: Mapping[str, str], findings: Findings) -> Flat:
    """Read the file and lay the flags over it. Raises UserError for a file that cannot be read at all."""
    content = {} if path is None else _content(path, environ)
    raw: dict[str, Any] = {}
    origins: dict[str, str] = {}
    secret: set[str] = set()
    for name, key in FALLBACKS.items():
        if value := environ.get(name):
            raw[key], origins[key] = value, f"environment: {name}"
    for layer in (_from_file(path, content), _from_variables(environ), _from_flags(overrides)):
        _lay(layer, raw, origins, secret, environ, findings)
    lay_the_rest(raw, origins, environ, findings)
    ours = {key: origins.get(key, DEFAULT) for key in section_of()}
    return Flat(raw, ours, frozenset(secret), _is_ours(content))


def list_of_other_keys() -> tuple[str, ...]:
    """Every setting of a dataset."""
    return tuple(dict.fromkeys(key for kind in DATASET_KINDS.values() for key in kind.model_fields))


@dataclass(frozen=True)
class _Given:
    """One value as given: its place for messages and its key as written."""

    key: str
    value: Any
    where: str


def _content(path: Path, environ: Mapping[str, str]) -> dict[str, Any]:
    """The settings of a file, flat. A config.env gives its variables under their names as settings."""
    if path.suffix.lower() == ".env":
        return _env_content(path, environ)
    content = read(path, "config")
    if isinstance(content, dict):
        strange = [key for key in content if not isinstance(key, str)]
        if strange:
            found = ", ".join(map(repr, strange[:3]))
            raise UserError(Problem(str(path), f"the names of settings must be text; found {found}", "quote them"))
        return content
    is_list = isinstance(content, list)
    fix = "multidatabackend.json is a list; name it under data_backend_config" if is_list else "write { } around it"
    raise UserError(Problem(str(path), "the config must be one JSON object {…}", fix))


def _env_content(path: Path, environ: Mapping[str, str]) -> dict[str, Any]:
    variables = read_env(path, environ)
    known = frozenset((*section_of(), *known_foreign_keys()))
    found = {key: value for key, (_, value) in settings_of(variables, known).items()}
    return {**found, **parse_overrides(extra_arguments(variables, str(path)))}


def _from_file(path: Path | None, content: Mapping[str, Any]) -> list[_Given]:
    defaults = content.get("__origins__")
    return [
        _Given(plain(key), value, f"{path}: {key}")
        for key, value in content.items()
        if not is_of_the_file(key) and not _still_default(plain(key), value, defaults)
    ]


def _from_variables(environ: Mapping[str, str]) -> list[_Given]:
    return [_Given(key, value, f"environment: {name}") for name, key, value in given_by_variables(environ)]


def _from_flags(overrides: Mapping[str, Any]) -> list[_Given]:
    return [_Given(plain(key), value, f"{COMMAND_LINE}: {key}") for key, value in overrides.items()]


def _lay(
    layer: Sequence[_Given],
    raw: dict[str, Any],
    origins: dict[str, str],
    secret: set[str],
    environ: Mapping[str, str],
    findings: Findings,
) -> None:
    """Lay the given values over those so far."""
    ours, others = tuple(section_of()), list_of_other_keys()
    seen: dict[str, str] = {}
    for given in layer:
        key = findings.own_key(given.key, given.value, given.where, ours, others)
        if key is None or given.value is None or (given.value == "" and key not in MAY_BE_EMPTY):
            continue
        if key in seen:
            findings.wrong(given.where, f"means the same setting as {seen[key]}", "keep one of the two")
        seen[key] = given.where.rpartition(": ")[2]
        if is_masked(given.value):
            fix = "write the value itself, or {env:VAR}"
            findings.wrong(given.where, "the value is the mask that a run put in the place of a secret", fix)
        value, variables = expand_env(given.value, given.where, environ, findings)
        raw[key] = value
        origins[key] = given.where + "".join(f" ({{env:{name}}})" for name in dict.fromkeys(variables))
        secret.discard(key)
        if is_secret(key) or any(map(is_secret, variables)):
            secret.add(key)


def _still_default(key: str, value: Any, origins: Any) -> bool:
    """Whether the config.json of an earlier run holds a default here, unchanged: it is nobody's wish then either."""
    if not isinstance(origins, Mapping) or origins.get(key) != DEFAULT or key not in section_of():
        return False
    return value == SECTIONS[section_of()[key]].model_fields[key].default


def _is_ours(content: Mapping[str, Any]) -> bool:
    """Whether a file was written for sana_tune: by hand with our schema, by the wizard, or by a run."""
    return "sana_tune" in str(content.get("$schema", "")) or "__origins__" in content
