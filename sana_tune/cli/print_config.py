"""`train --print-config`: every setting, its value and where it comes from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sana_tune.config.load import Loaded
from sana_tune.config.schema import Config
from sana_tune.config.secrets import MASK, masked


def config_lines(loaded: Loaded) -> list[str]:
    """One line a setting, in groups: name = value, and its origin; secrets masked. Datasets follow."""
    lines = [f"# config: {_near(str(loaded.path)) if loaded.path else 'the command line alone'}"]
    for name, field in Config.model_fields.items():
        lines += ["", f"# {field.description}"]
        lines += _rows(dict(vars(loaded.config)[name]), loaded.origins, loaded.secret)
    for dataset in loaded.datasets:
        lines += ["", f"# Dataset {dataset.id}"]
        lines += _rows(dict(dataset), loaded.dataset_origins.get(dataset.id, {}))
    for masks in loaded.masks:
        lines += ["", f"# Masks {masks.id}", *_rows(dict(masks), loaded.dataset_origins.get(masks.id, {}))]
    for text in loaded.text_caches:
        lines += ["", f"# Text cache {text.id}", *_rows(dict(text), loaded.dataset_origins.get(text.id, {}))]
    return lines


def _rows(values: Mapping[str, Any], origins: Mapping[str, str], secret: frozenset[str] = frozenset()) -> list[str]:
    shown = {key: MASK if key in secret else _shown(masked(key, value)) for key, value in values.items()}
    width = max(len(f"{key} = {value}") for key, value in shown.items())
    width = min(width, 60)
    return [f"{f'{key} = {value}':{width}}  # {_near(origins.get(key, 'default'))}" for key, value in shown.items()]


def _shown(value: Any) -> str:
    if value is None:
        return "unset"
    if isinstance(value, tuple) and all(hasattr(part, "_fields") for part in value):
        return ",".join(map(str, value)) or "unset"
    return json.dumps(value, ensure_ascii=False, default=str)


def _near(origin: str) -> str:
    """An origin with its path as seen from the working directory."""
    return origin.removeprefix(f"{Path.cwd()}/")
