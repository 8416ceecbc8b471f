"""What the wizard will write: which files, with which content, and what of it replaces something. Writes nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sana_tune.cli import lokr, recipe
from sana_tune.cli.merge import Existing, changes, merge_datasets, merge_settings
from sana_tune.cli.questions import State, clean_path
from sana_tune.cli.recipe import Answers
from sana_tune.config.arguments import parse_overrides
from sana_tune.config.describe import schema_path
from sana_tune.config.env_file import extra_arguments, read_env, settings_of
from sana_tune.config.files import NAMED_BY, find_config, resolve
from sana_tune.config.findings import Findings
from sana_tune.config.formats import read
from sana_tune.config.placeholders import expand_env
from sana_tune.config.schema import section_of
from sana_tune.errors import Problem, UserError

DEFAULT_PLACE = Path("config") / "config.json"


@dataclass(frozen=True)
class Draft:
    """Files to write, config.json last.

    files: path → bytes, those that are new or different. lines: what to say of them. in_the_way: those of them that
    are there already; not_read: those of these that nobody read, so that replacing them loses something.
    elsewhere: a place for config.json where nothing is in the way.
    """

    config_path: Path
    files: tuple[tuple[Path, bytes], ...]
    lines: tuple[str, ...]
    in_the_way: tuple[Path, ...]
    not_read: tuple[Path, ...]
    elsewhere: Path


def shown(path: Path, cwd: Path) -> Path:
    """A path as people write it: relative when it is below the working directory."""
    whole = Path(os.path.abspath(cwd / path))
    return whole.relative_to(cwd) if whole.is_relative_to(cwd) else whole


# ---- what is there ----


def find_files(config: str | None, env: str | None, environ: Mapping[str, str], cwd: Path) -> tuple[Path | None, Path]:
    """The config that is to be changed, None for a new one; and where the result goes, always JSON.

    config, env: the flags. Without them the file that `train` would take, else config/config.json.
    """
    asked = config or (None if env else environ.get("CONFIG_PATH")) or None
    if asked is not None:
        path = Path(clean_path(asked))
        is_folder = asked.rstrip().endswith("/") or path.is_dir()
        new = path / "config.json" if is_folder else path.with_suffix(".json")
    else:
        name = env or next((value for key in NAMED_BY[:2] if (value := environ.get(key))), None)
        path = Path()
        new = DEFAULT_PLACE if name in (None, "default") else Path("config") / str(name) / "config.json"
    try:
        found, _ = find_config(str(path) if asked is not None else None, env, None, environ, cwd)
    except UserError:
        return None, new
    if found is None:
        return None, new
    is_local = asked is None or (cwd / path).exists() or (cwd / path).with_suffix(found.suffix).exists()
    return found, shown(found.with_suffix(".json"), cwd) if is_local else new


def read_existing(path: Path, environ: Mapping[str, str]) -> Existing:
    """The files as they are. Raises UserError for those that cannot be read: they are not to be replaced blindly."""
    if path.suffix == ".env":
        variables = read_env(path, environ)
        settings = {key: value for key, (_, value) in settings_of(variables, frozenset(section_of())).items()}
        content: Any = {**settings, **parse_overrides(extra_arguments(variables, str(path)))}
    else:
        content = read(path, "config")
    if not isinstance(content, dict):
        raise UserError(Problem(str(path), "the config must be one object of settings", "name another: --config PATH"))
    existing = Existing(path, content)
    name = existing.get("data_backend_config")
    if not isinstance(name, str):
        return existing
    place = resolve(str(expand_env(name, str(path), environ, Findings())[0]))
    return Existing(path, content, read(place, "dataset list"), place) if place.is_file() else existing


def settings_for(state: State, answers: Answers) -> dict[str, Any]:
    """What is recommended; with the learning rate where an existing file is to train something else than it did."""
    settings = state.settings()
    if state.existing is not None and state.existing.adapter() != answers.adapter:
        settings["learning_rate"] = recipe.learning_rate(answers.model, answers.adapter)
    return settings


def other_settings(existing: Existing, recommended: Mapping[str, Any]) -> dict[str, Any]:
    """The recommended settings that the existing file has otherwise."""
    same = {"auto": "fp32"}
    found = {
        key: value
        for key, value in recommended.items()
        if key != "model_type" and str(same.get(str(was := existing.get(key)), was)).lower() != str(value).lower()
    }
    if not recommended["gradient_checkpointing"]:
        found.pop("gradient_checkpointing_interval", None)
    return found


# ---- what will be there ----


def draft(state: State, answers: Answers, write_to: Path, take: bool) -> Draft:
    """The files to write. take: with the recommended settings (new files always have them)."""
    places, existing = _places(state, write_to), state.existing
    contents = _new(state, answers, places) if existing is None else _changed(state, existing, answers, places, take)
    was_read = (
        {os.path.abspath(path) for path in (existing.path, existing.datasets_path) if path} if existing else set()
    )
    files, lines, in_the_way, not_read = [], [], [], []
    for path, content in contents.items():
        name, before = shown(path, state.cwd), _content(state.cwd / path)
        if before is not None and before == content:
            lines.append(f"{name}: nothing to change")
            continue
        data = (json.dumps(content, ensure_ascii=False, indent=2, default=str) + "\n").encode("utf-8")
        files.append((path, data))
        if not os.path.lexists(state.cwd / path):
            lines.append(f"{name}: new")
            continue
        in_the_way.append(path)
        lines.append(f"{name}: will be replaced")
        if os.path.abspath(state.cwd / path) in was_read:
            lines += [f"    {line}" for line in changes(before, content)]
        else:
            not_read.append(path)
            lines.append("    it is not one of the files that were read: what stands in it would be lost")
    used = ("user_prompt_library",) * (existing is None) + ("lycoris_config",) * (answers.adapter == "lokr")
    lines += [
        f"{shown(places[name], state.cwd)}: is there already and is used as it is"
        for name in used
        if places[name] not in contents
    ]
    elsewhere = _elsewhere(answers, state.cwd)
    return Draft(write_to, tuple(files), tuple(lines), tuple(in_the_way), tuple(not_read), elsewhere)


def _places(state: State, write_to: Path) -> dict[str, Path]:
    """Where the files go: beside config.json, under its name if it has one of its own; datasets where they are."""
    prefix = "" if write_to.stem == "config" else f"{write_to.stem}-"
    names = ("multidatabackend", "user_prompt_library", "lycoris_config")
    places = {"config": write_to, **{name: write_to.with_name(f"{prefix}{name}.json") for name in names}}
    if state.existing is None:
        return places
    if isinstance(named := state.existing.get("data_backend_config"), str):
        places["multidatabackend"] = _path_of(named, state).with_suffix(".json")
    if state.existing.adapter() == "lokr" or state.existing.names("lycoris_config"):
        places["lycoris_config"] = _path_of(str(state.existing.get("lycoris_config")), state)
    return places


def _path_of(named: str, state: State) -> Path:
    """The path that a setting names."""
    return Path(os.path.expanduser(str(expand_env(named, "", state.environ, Findings())[0])))


def _adapter(state: State, answers: Answers, places: Mapping[str, Path]) -> dict[Path, Any]:
    """The file of the adapter where one is asked for; one that is there already is used as it is."""
    place = places["lycoris_config"]
    return {place: lokr.CONTENT} if answers.adapter == "lokr" and not os.path.lexists(state.cwd / place) else {}


def _new(state: State, answers: Answers, places: Mapping[str, Path]) -> dict[Path, Any]:
    """New files, whole. A prompt library that is there already is used as it is."""
    datasets, prompts = places["multidatabackend"], places["user_prompt_library"]
    named = {
        "$schema": schema_for("config", places["config"], state.cwd),
        "data_backend_config": shown(datasets, state.cwd).as_posix(),
        "user_prompt_library": shown(prompts, state.cwd).as_posix(),
    }
    if answers.adapter == "lokr":
        named["lycoris_config"] = shown(places["lycoris_config"], state.cwd).as_posix()
    content = {"$schema": schema_for("multidatabackend", datasets, state.cwd), "datasets": recipe.new_datasets(answers)}
    library = {} if os.path.lexists(state.cwd / prompts) else {prompts: recipe.prompt_library(answers)}
    config = recipe.new_config(answers, state.settings(), named)
    return {**library, **_adapter(state, answers, places), datasets: content, places["config"]: config}


def _changed(
    state: State, existing: Existing, answers: Answers, places: Mapping[str, Path], take: bool
) -> dict[Path, Any]:
    """The existing files with what was answered otherwise."""
    changed = existing.changed(answers)
    asked = recipe.asked_settings(answers)
    homes = {"max_train_steps": "length", "num_train_epochs": "length", "pretrained_model_name_or_path": "model"}
    homes |= {"output_dir": "output", "validation_prompt": "prompt", "report_to": "tracking"}
    new = {key: value for key, value in asked.items() if homes[key] in changed}
    if take:
        new |= other_settings(existing, settings_for(state, answers))
    new |= _for_adapter(existing, answers.adapter, shown(places["lycoris_config"], state.cwd).as_posix())
    datasets = places["multidatabackend"]
    named = existing.get("data_backend_config")
    if not isinstance(named, str) or Path(named).suffix != datasets.suffix:
        new["data_backend_config"] = shown(datasets, state.cwd).as_posix()
    content = existing.datasets
    if content is None:
        content = {
            "$schema": schema_for("multidatabackend", datasets, state.cwd),
            "datasets": recipe.new_datasets(answers),
        }
    elif changed & {"pictures", "captions", "subject", "resolutions"}:
        content = merge_datasets(existing, answers, changed)
    adapter = _adapter(state, answers, places)
    return {**adapter, datasets: content, places["config"]: merge_settings(existing.config, new)}


def _for_adapter(existing: Existing, adapter: str, place: str) -> dict[str, Any]:
    """Changes without which an existing config would not train so: key → value, None for what must not stand there.

    place: of the adapter's file.
    """
    if adapter == existing.adapter() and (adapter == "full" or existing.get("lora_type") == "lycoris"):
        return {}
    if adapter == "full":
        gone = dict.fromkeys(("lora_type", "lycoris_config", "init_lora", "init_lora_step", "init_lora_ema"))
        return {"model_type": "full", "base_model_precision": None, "init_lokr_norm": None, **gone}
    named = {} if existing.names("lycoris_config") else {"lycoris_config": place}
    refused = {"weights_dtype": None, "dynamo_backend": None}
    return {"model_type": "lora", "lora_type": "lycoris", **named, **refused}


def schema_for(name: str, written: Path, cwd: Path) -> str:
    """The JSON Schema of a file for its `$schema`: from the file's own folder in a checkout, else the whole path."""
    schema = schema_path(name)
    if schema.is_relative_to(cwd) and (cwd / written).is_relative_to(cwd):
        return Path(os.path.relpath(schema, (cwd / written).parent)).as_posix()
    return schema.as_posix()


def _content(path: Path) -> Any:
    """What stands in a file now; None when it is not there or cannot be read."""
    try:
        return read(path, "file") if path.is_file() else None
    except UserError:
        return None


def _elsewhere(answers: Answers, cwd: Path) -> Path:
    """A place for config.json where nothing is yet."""
    name = recipe.slug(Path(answers.output).name)
    number, found = 2, name
    while os.path.lexists(cwd / "config" / found):
        number, found = number + 1, f"{name}-{number}"
    return Path("config") / found / "config.json"
