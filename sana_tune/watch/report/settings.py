"""Settings of runs side by side: groups, values as texts, where they come from, and which differ."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sana_tune.config.schema import SECTIONS, Config, section_of
from sana_tune.config.secrets import masked
from sana_tune.watch.report.reading import Run

ORIGINS = "__origins__"
UNSET = "not set"
_OTHER = "Other"


@dataclass(frozen=True)
class Setting:
    """One setting in each run: its values and where they come from.

    differs: whether the runs disagree. given: whether anybody set it in any of them.
    """

    name: str
    group: str
    values: tuple[str, ...]
    origins: tuple[str, ...]
    differs: bool
    given: bool


def settings_of(runs: Sequence[Run]) -> list[Setting]:
    """Every setting of the runs' config.json, in the order of the options' page; then what that does not know."""
    homes = section_of()
    titles = {name: Config.model_fields[name].description or name for name in SECTIONS}
    order = list(homes)
    known = {name for run in runs for name in (*run.config, *_origins(run)) if not name.startswith("__")}
    names = sorted(known, key=lambda name: (order.index(name) if name in homes else len(order), name))
    found = []
    for name in names:
        values = tuple(as_text(name, run.config.get(name)) for run in runs)
        origins = tuple(short_origin(_origins(run).get(name, "")) for run in runs)
        group = titles[homes[name]] if name in homes else _OTHER
        given = any(origin not in ("", "default") for origin in origins)
        found.append(Setting(name, group, values, origins, len(set(values)) > 1, given))
    return found


def as_text(name: str, value: Any) -> str:
    """A value as it stands in a file, without secrets and without the name of whoever's home it lies in."""
    value = masked(name, value)
    if value is None:
        return UNSET
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return at_home(text) if text else '""'


def at_home(text: str) -> str:
    """The text with ~ for the home folder."""
    home = str(Path.home())
    return text if len(home) < 2 else re.sub(re.escape(home) + r"(?=[/\\]|$)", "~", text)


def short_origin(origin: str) -> str:
    """Where a value comes from, without folders and the key: `/home/me/run/config.json: seed` is `config.json`."""
    return re.split(r"[/\\]", origin.partition(": ")[0])[-1]


def _origins(run: Run) -> Mapping[str, str]:
    found = run.config.get(ORIGINS)
    return {str(name): str(origin) for name, origin in found.items()} if isinstance(found, dict) else {}
