"""What a run is called outside: its name, its repository, the folder of its trackers, and the id that it keeps."""

from __future__ import annotations

import json
import re
import secrets
from pathlib import Path

from sana_tune.config.schema import Config, WatchConfig
from sana_tune.store import write_atomically

ID_FILE = "run_id.json"


def run_name(config: Config) -> str:
    """tracker_run_name, else the name of output_dir."""
    return config.watch.tracker_run_name or Path(config.train.output_dir).resolve().name or "run"


def hub_name(config: Config) -> str:
    """The repository as asked for: hub_model_id, else tracker_project_name if it was given, else the run's name."""
    watch = config.watch
    default = WatchConfig.model_fields["tracker_project_name"].default
    project = watch.tracker_project_name if watch.tracker_project_name != default else None
    return watch.hub_model_id or as_hub_name(project or run_name(config))


def as_hub_name(text: str) -> str:
    """A text with what the hub does not take in a name replaced."""
    name = re.sub(r"-{2,}|\.{2,}", "-", re.sub(r"[^A-Za-z0-9._-]+", "-", text)).strip("-._")
    return name[:96].removesuffix(".git").rstrip("-.") or "run"


def logging_folder(config: Config) -> Path:
    """Where trackers write: logging_dir, else logs in output_dir."""
    return Path(config.watch.logging_dir or Path(config.train.output_dir) / "logs")


def run_id(output_dir: Path, *, resumed: bool) -> str:
    """The id under which trackers and messages know the run: kept in its folder, so that a resumed run goes on.

    A run that begins anew gets a new one. Without a folder to keep it in, it lasts as long as the process.
    """
    path = output_dir / ID_FILE
    if resumed and (found := _kept(path)) is not None:
        return found
    made = secrets.token_hex(6)
    try:
        write_atomically(path, (json.dumps({"id": made}) + "\n").encode())
    except OSError:  # a full disk is told by what needs it
        pass
    return made


def _kept(path: Path) -> str | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["id"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, str) and re.fullmatch(r"[A-Za-z0-9_-]{1,64}", found) else None
