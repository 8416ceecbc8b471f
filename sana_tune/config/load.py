"""Files + command line → Config, with the origin of every value and every problem at once.

A value passes: raw file or flag → foreign keys sorted out (legacy.py) → pydantic's types and ranges → rules between
settings. Problems of all stages are collected before any is told.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from sana_tune.config import legacy
from sana_tune.config.datasets import DATASET_KINDS, ImageDataset, TextDataset, inherit
from sana_tune.config.files import read_json, resolve
from sana_tune.config.rules import check_rules
from sana_tune.config.schema import SECTIONS, Config, Section, section_of
from sana_tune.config.values import nearest
from sana_tune.errors import Problem, UserError

COMMAND_LINE = "command line"  # the origin of flags

# "" means something for these; for every other key it means "not set".
MAY_BE_EMPTY = ("resume_from_checkpoint", "validation_prompt", "validation_negative_prompt", "instance_prompt")


@dataclass(frozen=True)
class Loaded:
    """What a run was asked to do.

    origins: flat key → where its value comes from ("default", "config.json", "command line" …).
    notes:   lines to say at start: keys without effect, keys not built yet, differences in meaning.
    """

    config: Config
    datasets: tuple[ImageDataset, ...]
    text_cache: TextDataset
    origins: Mapping[str, str]
    notes: tuple[str, ...]
    path: Path | None


@dataclass
class _Findings:
    """Problems and notes on their way to the user."""

    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def load(path: Path | None, overrides: Mapping[str, Any], environ: Mapping[str, str] | None = None) -> Loaded:
    """Read config.json at `path` (None: the flags alone) and its datasets. Raises UserError with all problems."""
    environ = os.environ if environ is None else environ
    findings = _Findings()
    raw, origins = _flat(path, overrides, findings)
    _environment(raw, origins, environ)
    config = _config(raw, origins, findings)
    datasets, text_cache = _datasets(raw, config, findings)
    if config is not None:
        findings.problems += check_rules(config, datasets, findings.notes)
    if findings.problems or config is None or text_cache is None:
        raise UserError(*findings.problems)
    return Loaded(config, datasets, text_cache, origins, tuple(dict.fromkeys(findings.notes)), path)


def parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """Read `--key value`, `--key=value`, `key=value` and bare `--flag` (true) into a flat mapping."""
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
            found[_plain(name)] = value
        elif waiting and not waiting[0].startswith("--"):
            found[_plain(name)] = waiting.pop(0)
        else:
            found[_plain(name)] = True
    if problems:
        raise UserError(*problems)
    return found


def _plain(key: str) -> str:
    return key.strip().removeprefix("--").replace("-", "_")


def _flat(
    path: Path | None, overrides: Mapping[str, Any], findings: _Findings
) -> tuple[dict[str, Any], dict[str, str]]:
    """One flat mapping of our own keys to raw values, with origins. Foreign keys are sorted out here."""
    content = {} if path is None else read_json(path, "config")
    if not isinstance(content, dict):
        fix = "multidatabackend.json is a list; name it under data_backend_config" if isinstance(content, list) else ""
        raise UserError(Problem(str(path), "the config must be one JSON object {…}", fix))
    layers = ((str(path), content), (COMMAND_LINE, overrides))
    written_origins = content.get("__origins__")
    raw: dict[str, Any] = {}
    origins: dict[str, str] = {}
    ours = tuple(section_of())
    for origin, layer in layers:
        seen: dict[str, str] = {}
        for written, value in layer.items():
            key = _plain(written)
            if key.startswith("__") or key == "$schema" or key.endswith("disabled_fields__"):
                continue
            where = f"{origin}: {written}"
            named = _own_key(key, value, where, ours, findings)
            if named is None or value is None or (value == "" and named not in MAY_BE_EMPTY):
                continue
            if layer is content and _still_default(named, value, written_origins):
                continue
            if named in seen:
                findings.problems.append(
                    Problem(where, f"means the same setting as {seen[named]}", "keep one of the two")
                )
            seen[named] = written
            raw[named] = value
            origins[named] = f"{origin}: {written}"
    return raw, {key: origins.get(key, "default") for key in ours}


def _still_default(key: str, value: Any, origins: Any) -> bool:
    """Whether the config.json of an earlier run holds a default here, unchanged: it is nobody's wish then either."""
    known = isinstance(origins, Mapping) and origins.get(key) == "default"
    return known and value == SECTIONS[section_of()[key]].model_fields[key].default


def _own_key(key: str, value: Any, where: str, ours: Sequence[str], findings: _Findings) -> str | None:
    """Our name of `key`, or None when it is foreign; what is to be said of it goes to `findings`."""
    if key in ours:
        return key
    if key in legacy.RENAMED and legacy.RENAMED[key] in ours:
        return legacy.RENAMED[key]
    if key in legacy.REFUSED:
        if not legacy.is_off(key, value):
            findings.problems.append(Problem(where, "cannot be used", legacy.REFUSED[key]))
    elif key in legacy.NO_EFFECT:
        if not legacy.is_off(key, value):
            findings.notes.append(f"{key} has no effect here: {legacy.NO_EFFECT[key]}")
    elif key in legacy.LATER_TRAINING:
        if not legacy.is_off(key, value):
            fix = "remove the key, or keep to what `sana_tune train` does without it"
            findings.problems.append(
                Problem(where, f"changes what is trained and is not built yet; found {_short(value)}", fix)
            )
    elif key in legacy.LATER_OUTPUT:
        if not legacy.is_off(key, value):
            findings.notes.append(f"{key} is not built yet: no effect in this version")
    else:
        findings.problems.append(_unknown(key, where, ours))
    return None


def _unknown(key: str, where: str, ours: Sequence[str]) -> Problem:
    """A key that nobody knows, or one of the other file."""
    key = legacy.RENAMED.get(key, key)
    if key in section_of():
        return Problem(where, "is a setting of config.json, not of a dataset", "move it there")
    if any(key in kind.model_fields for kind in DATASET_KINDS.values()):
        return Problem(where, "is a setting of a dataset", "move it to the dataset in multidatabackend.json")
    guess = nearest(key, [*ours, *legacy.known_foreign_keys()])
    fix = f"did you mean {guess}?" if guess else "see the README for the settings there are"
    return Problem(where, "there is no such setting", fix)


def _environment(raw: dict[str, Any], origins: dict[str, str], environ: Mapping[str, str]) -> None:
    """MIXED_PRECISION of the environment serves where neither file nor flag names a precision."""
    value = environ.get("MIXED_PRECISION")
    if value and "mixed_precision" not in raw:
        raw["mixed_precision"] = value
        origins["mixed_precision"] = "environment: MIXED_PRECISION"


def _config(raw: Mapping[str, Any], origins: Mapping[str, str], findings: _Findings) -> Config | None:
    homes = section_of()
    sections: dict[str, Section] = {}
    for name, kind in SECTIONS.items():
        values = {key: value for key, value in raw.items() if homes[key] == name}
        section = _validated(kind, values, lambda key: origins[key] if origins.get(key) != "default" else key, findings)
        if section is not None:
            sections[name] = section
    return Config.model_validate(sections) if len(sections) == len(SECTIONS) else None


def _validated(kind: type[Section], values: Mapping[str, Any], where: Any, findings: _Findings) -> Section | None:
    """`values` as a frozen section, or None with its problems told."""
    values = {key: legacy.SAME_VALUE.get(key, {}).get(value, value) if isinstance(value, str) else value
              for key, value in values.items()}  # fmt: skip
    told = {key for key, value in values.items() if isinstance(value, bool) and not _takes_bool(kind.model_fields[key])}
    for key in sorted(told):
        flag = where(key).startswith(COMMAND_LINE)
        what = "needs a value; found none" if flag else f"must be no switch; found {str(values[key]).lower()}"
        findings.problems.append(Problem(where(key), what, _meaning(kind, key)))
    try:
        section = kind(**values)
    except ValidationError as errors:
        for error in errors.errors():
            key = str(error["loc"][0])
            if key not in told:  # a union tells one error per member; the first is enough
                told.add(key)
                findings.problems.append(_problem(kind, key, dict(error), values, where(key)))
        return None
    return None if told else section


def _takes_bool(info: FieldInfo) -> bool:
    return info.annotation is bool or bool in get_args(info.annotation)


def _meaning(kind: type[Section], key: str) -> str:
    return f"{key}: {kind.model_fields[key].description}"


def _problem(kind: type[Section], key: str, error: dict[str, Any], values: Mapping[str, Any], where: str) -> Problem:
    """One pydantic error in the house's words: what must hold, what was found, what to do."""
    if error["type"] == "missing":
        return Problem(where, "must be set and is not", _meaning(kind, key))
    value = values.get(key)
    later = legacy.LATER_VALUES.get(key, {})
    if isinstance(value, str) and value in later:
        return Problem(where, f"{value!r} is not built yet", later[value])
    if error["type"] == "literal_error":
        choices = [str(choice) for choice in get_args(kind.model_fields[key].annotation)]
        guess = nearest(str(value), choices)
        fix = f"did you mean {guess!r}?" if guess else _meaning(kind, key)
        return Problem(where, f"must be {' or '.join(choices)}; found {_short(value)}", fix)
    if error["type"] == "value_error":
        return Problem(where, str(error["ctx"]["error"]), _meaning(kind, key))
    must = str(error["msg"]).replace("Input should be ", "must be ").replace("Value error, ", "")
    must = must.split(", unable to")[0].split(", got a number")[0]
    return Problem(where, f"{must}; found {_short(value)}", _meaning(kind, key))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def _datasets(
    raw: Mapping[str, Any], config: Config | None, findings: _Findings
) -> tuple[tuple[ImageDataset, ...], TextDataset | None]:
    """The datasets of multidatabackend.json. Read even when config.json has problems, so that all are told at once."""
    name = raw.get("data_backend_config")
    if not isinstance(name, str):
        return (), None
    path = resolve(name)
    try:
        entries = read_json(path, "dataset list (data_backend_config)")
    except UserError as error:
        findings.problems += error.problems
        return (), None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        findings.problems.append(
            Problem(str(path), "must be a list of datasets: [ {…}, {…} ]", "put [ ] around the entries")
        )
        return (), None
    built: list[Section] = []
    for number, entry in enumerate(entries, start=1):
        section = _dataset(path, number, entry, config, findings)
        if section is not None:
            built.append(section)
    images = tuple(entry for entry in built if isinstance(entry, ImageDataset))
    texts = [entry for entry in built if isinstance(entry, TextDataset)]
    _check_together(path, images, texts, entries, findings)
    return images, texts[0] if texts else TextDataset(id="text-embeds", default=True)


def _dataset(
    path: Path, number: int, entry: Mapping[str, Any], config: Config | None, findings: _Findings
) -> Section | None:
    """One entry as a frozen model; None when it is disabled or has problems."""
    label = entry.get("id", f"entry {number}")
    dataset_type = entry.get("dataset_type", "image")
    kind = DATASET_KINDS.get(str(dataset_type))
    if kind is None:
        later = legacy.LATER_VALUES["dataset_type"].get(str(dataset_type))
        what = f"must be {' or '.join(DATASET_KINDS)}; found {_short(dataset_type)}"
        findings.problems.append(Problem(f"{path}: {label}: dataset_type", what, later or "use image or text_embeds"))
        return None
    ours = tuple(kind.model_fields)
    values: dict[str, Any] = {}
    for written, value in entry.items():
        named = _own_key(written, value, f"{path}: {label}: {written}", ours, findings)
        if named is not None and value is not None and (value != "" or named in MAY_BE_EMPTY):
            values[named] = value
    if str(values.get("disabled", False)).lower() in ("true", "1"):
        return None
    if isinstance(folder := values.get("instance_data_dir"), str):
        values["instance_data_dir"] = str(resolve(folder))  # of a packaged example, where there is no such folder here
    if kind is ImageDataset and config is not None:
        values = inherit(values, config.data)
    return _validated(kind, values, lambda key: f"{path}: {label}: {key}", findings)


def _check_together(
    path: Path,
    images: Sequence[ImageDataset],
    texts: Sequence[TextDataset],
    entries: Sequence[Any],
    findings: _Findings,
) -> None:
    """What must hold between datasets: unique ids, one text cache, at least one set of pictures."""
    ids = [str(entry["id"]) for entry in entries if entry.get("id")]
    for name in dict.fromkeys(name for name in ids if ids.count(name) > 1):
        findings.problems.append(Problem(f"{path}: {name}", "the id of a dataset must be unique", "rename one of them"))
    if len(texts) > 1:
        names = ", ".join(text.id for text in texts)
        findings.problems.append(
            Problem(str(path), f"several text caches are not built yet; found {names}", "keep one text_embeds entry")
        )
    if not images and not findings.problems:
        findings.problems.append(
            Problem(
                str(path), "at least one dataset of pictures must be enabled", 'add an entry with "instance_data_dir"'
            )
        )
