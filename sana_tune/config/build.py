"""Raw values → frozen sections, with pydantic's errors in the house's words."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, get_args

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from sana_tune.config import legacy
from sana_tune.config.findings import Findings, short
from sana_tune.config.layers import COMMAND_LINE, DEFAULT, Flat
from sana_tune.config.schema import SECTIONS, Config, Section, section_of
from sana_tune.config.values import nearest
from sana_tune.errors import Problem


def build_config(flat: Flat, findings: Findings) -> Config | None:
    """The sections of config.json, or None with every problem found."""
    homes = section_of()
    sections: dict[str, Section] = {}
    for name, kind in SECTIONS.items():
        values = {key: value for key, value in flat.raw.items() if homes[key] == name}
        section = build_section(kind, values, lambda key: _place(flat.origins, key), findings)
        if section is not None:
            sections[name] = section
    return Config.model_validate(sections) if len(sections) == len(SECTIONS) else None


def build_section(
    kind: type[Section], values: Mapping[str, Any], where: Callable[[str], str], findings: Findings
) -> Section | None:
    """`values` as a frozen section, or None with its problems found. where: key → its place in the user's words."""
    values = {key: legacy.SAME_VALUE.get(key, {}).get(value, value) if isinstance(value, str) else value
              for key, value in values.items()}  # fmt: skip
    told = {key for key, value in values.items() if isinstance(value, bool) and not _takes_bool(kind.model_fields[key])}
    for key in sorted(told):
        flag = where(key).startswith(COMMAND_LINE)
        what = "needs a value; found none" if flag else f"must be no switch; found {str(values[key]).lower()}"
        findings.wrong(where(key), what, _meaning(kind, key))
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


def _place(origins: Mapping[str, str], key: str) -> str:
    origin = origins.get(key, DEFAULT)
    return key if origin == DEFAULT else origin


def _takes_bool(info: FieldInfo) -> bool:
    return info.annotation is bool or bool in get_args(info.annotation)


def _meaning(kind: type[Section], key: str) -> str:
    return f"{key}: {kind.model_fields[key].description}"


def _choices(info: FieldInfo) -> list[str]:
    """The words that a setting of fixed choices takes, also when it may be unset."""
    found: list[str] = []
    for part in get_args(info.annotation):
        found += [str(choice) for choice in (get_args(part) or (part,)) if isinstance(choice, str)]
    return found


def _problem(kind: type[Section], key: str, error: dict[str, Any], values: Mapping[str, Any], where: str) -> Problem:
    """One pydantic error in the house's words: what must hold, what was found, what to do."""
    if error["type"] == "missing":
        return Problem(where, "must be set and is not", _meaning(kind, key))
    value = values.get(key)
    refused, later = legacy.REFUSED_VALUES.get(key, {}), legacy.LATER_VALUES.get(key, {})
    if isinstance(value, str) and value in refused:
        return Problem(where, f"{value!r} cannot be used here", refused[value])
    if isinstance(value, str) and value in later:
        return Problem(where, f"{value!r} is not built yet", later[value])
    if error["type"] == "literal_error":
        choices = _choices(kind.model_fields[key])
        guess = nearest(str(value), choices)
        fix = f"did you mean {guess!r}?" if guess else _meaning(kind, key)
        return Problem(where, f"must be {' or '.join(choices)}; found {short(value, key)}", fix)
    if error["type"] == "value_error":
        return Problem(where, str(error["ctx"]["error"]), _meaning(kind, key))
    must = str(error["msg"]).replace("Input should be ", "must be ").replace("Value error, ", "")
    must = must.split(", unable to")[0].split(", got a number")[0]
    return Problem(where, f"{must}; found {short(value, key)}", _meaning(kind, key))
