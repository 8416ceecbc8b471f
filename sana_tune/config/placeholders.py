"""`{env:VAR}` in any text of the files, and `{output_dir}`, `{model_family}`, `{id}` in those of a dataset."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from sana_tune.config.findings import Findings

_ENV = re.compile(r"\{env:([^{}]*)\}")
_NAME = re.compile(r"\{(\w+)\}")


def expand_env(value: Any, where: str, environ: Mapping[str, str], findings: Findings) -> tuple[Any, tuple[str, ...]]:
    """`value` with every `{env:VAR}` replaced, and the variables that were used. An unset one is a problem.

    SimpleTuner puts nothing in the place of an unset variable; a path without its first half is worse than a stop.
    """
    used: list[str] = []

    def variable(match: re.Match[str]) -> str:
        name = match[1].strip()
        used.append(name)
        if name not in environ:
            findings.wrong(where, f"the environment variable {name!r} is not set", f"set it: export {name}=…")
        return environ.get(name, "")

    return _walk(value, lambda text: _ENV.sub(variable, text)), tuple(used)


def expand_names(value: Any, where: str, names: Mapping[str, str], findings: Findings, *, strict: bool) -> Any:
    """`value` with `{name}` replaced for each of `names`. strict: any other `{word}` is a problem, as in a path."""

    def name(match: re.Match[str]) -> str:
        if match[1] in names:
            return names[match[1]]
        if strict:
            known = ", ".join(f"{{{word}}}" for word in names)
            findings.wrong(where, f"there is no placeholder {match[0]}", f"known: {known}, {{env:VAR}}")
        return match[0]

    return _walk(value, lambda text: _NAME.sub(name, text))


def _walk(value: Any, change: Any) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_walk(part, change) for part in value]
    if isinstance(value, dict):
        return {key: _walk(part, change) for key, part in value.items()}
    return value
