"""A small valid pair of config files, and what loading a changed one says."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sana_tune.config.load import Loaded, load
from sana_tune.errors import UserError


def write_files(
    folder: Path, config: Mapping[str, Any] | None = None, dataset: Mapping[str, Any] | None = None
) -> Path:
    """Write config.json and multidatabackend.json; a value of None takes the key out. Answers config.json's path."""
    pictures = folder / "pictures"
    pictures.mkdir(exist_ok=True)
    settings = {
        "pretrained_model_name_or_path": "nano",
        "data_backend_config": str(folder / "multidatabackend.json"),
        "output_dir": str(folder / "output"),
        **(config or {}),
    }
    entry = {"id": "pictures", "instance_data_dir": str(pictures), "resolution": 64, **(dataset or {})}
    (folder / "multidatabackend.json").write_text(json.dumps([entry]))
    path = folder / "config.json"
    path.write_text(json.dumps({key: value for key, value in settings.items() if value != "REMOVE"}))
    return path


def write_list(folder: Path, config: Mapping[str, Any], entries: Sequence[Mapping[str, Any]]) -> Path:
    """As write_files, with these entries of multidatabackend.json in place of the one; folders are made."""
    path = write_files(folder, config)
    listed = [dict(entry) for entry in entries]
    for entry in listed:
        if "instance_data_dir" in entry:
            place = folder / entry["instance_data_dir"]
            place.mkdir(parents=True, exist_ok=True)
            entry["instance_data_dir"] = str(place)
    (folder / "multidatabackend.json").write_text(json.dumps(listed))
    return path


def load_with(
    folder: Path, config: Mapping[str, Any] | None = None, dataset: Mapping[str, Any] | None = None, **flags: Any
) -> Loaded:
    """Load the small pair with changes."""
    return load(write_files(folder, config, dataset), flags, environ={})


def problems_of(folder: Path, config: Mapping[str, Any] | None = None, dataset: Mapping[str, Any] | None = None) -> str:
    """All problems of the changed pair as one text."""
    try:
        load_with(folder, config, dataset)
    except UserError as error:
        return str(error)
    raise AssertionError("the files loaded, though they should not")
