"""What every setting is, as values: for `sana_tune options`, docs/options.md and the JSON Schemas of editors. No torch.

Everything is read from where it is decided: schema.py and datasets.py (type, default, range, help), choices.py (names),
legacy.py (keys of SimpleTuner's files). Nothing is said twice, so nothing can disagree.
"""

from __future__ import annotations

import re
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BeforeValidator
from pydantic.fields import FieldInfo

from sana_tune.config import legacy, sources
from sana_tune.config.caption_edits import parse_caption_filters, parse_caption_shuffle
from sana_tune.config.choices import (
    CAPTION_STRATEGIES,
    CHECKPOINTING_BACKENDS,
    DRAWING_METHODS,
    DYNAMO_BACKENDS,
    HUBER_SCHEDULES,
    LOSS_TYPES,
    LOSS_WEIGHTINGS,
    LR_SCHEDULERS,
    NOISE_DISTRIBUTIONS,
    OPTIMIZERS,
    SAMPLERS,
)
from sana_tune.config.datasets import INHERITED, ConditioningDataset, ImageDataset, TextDataset
from sana_tune.config.schema import (
    SECTIONS,
    CaptionStrategy,
    CheckpointingBackend,
    Config,
    Distribution,
    DrawingMethod,
    DynamoBackend,
    HuberSchedule,
    LossType,
    LossWeighting,
    OptimizerName,
    Sampler,
    SchedulerName,
    Section,
)
from sana_tune.config.values import (
    parse_aspect_buckets,
    parse_colour,
    parse_disk_size,
    parse_ids,
    parse_instruction,
    parse_levels,
    parse_optimizer_config,
    parse_resolutions,
)
from sana_tune.config.watching import parse_comment, parse_hub_id, parse_script, parse_trackers, parse_webhooks

Home = Literal["config", "dataset", "conditioning", "text_embeds"]

SCHEMAS = ("config", "multidatabackend")
FILES: Mapping[Home, str] = {
    "config": "config.json",
    "dataset": "multidatabackend.json: a dataset of pictures",
    "conditioning": "multidatabackend.json: the entry of a dataset's masks",
    "text_embeds": "multidatabackend.json: the text_embeds entry",
}
DATASET_TITLES: Mapping[Home, str] = {
    "dataset": "A dataset of pictures",
    "conditioning": "The masks of a dataset",
    "text_embeds": "A cache of text embeddings",
}

TYPES: Mapping[type, str] = {bool: "true/false", int: "whole number", float: "number", str: "text"}
# Types whose values are read by a function of values.py: the function says what it takes.
READ_BY: Mapping[Any, str] = {
    parse_resolutions: "size or list of sizes",
    parse_ids: "text or list of ids",
    parse_instruction: "text or list of lines",
    parse_levels: "number or list of numbers",
    parse_optimizer_config: "text of name=value, or an object",
    parse_aspect_buckets: "list of numbers or of {aspect, weight}",
    **sources.READERS,
    parse_colour: "colour",
    parse_disk_size: "bytes, size or share",
    parse_caption_shuffle: "object",
    parse_caption_filters: "list of filters, or a file",
    parse_trackers: "names",
    parse_webhooks: "object, list of objects, or a file",
    parse_hub_id: "repository",
    parse_comment: "text or list of lines",
    parse_script: "command",
}
# Types whose values are names of a table.
TABLES = (
    (OptimizerName, OPTIMIZERS), (SchedulerName, LR_SCHEDULERS), (CaptionStrategy, CAPTION_STRATEGIES),
    (Distribution, NOISE_DISTRIBUTIONS), (LossType, LOSS_TYPES), (HuberSchedule, HUBER_SCHEDULES),
    (LossWeighting, LOSS_WEIGHTINGS), (CheckpointingBackend, CHECKPOINTING_BACKENDS), (DynamoBackend, DYNAMO_BACKENDS),
    (Sampler, SAMPLERS), (DrawingMethod, DRAWING_METHODS),
)  # fmt: skip


@dataclass(frozen=True)
class Option:
    """One setting, in the user's words.

    group, title: its section and what that is called. type: "number", "one of" …. default: as in a file, None when
    there is none. range: "1 or more", "0 to 1"; None without bounds. choices: value → meaning ("" = says it itself).
    home: the file it stands in. aliases: other names it is read under. required: must be set.
    shared: config.json gives it for all datasets and a dataset's own wins.
    """

    name: str
    group: str
    title: str
    type: str
    default: Any
    unit: str | None
    range: str | None
    choices: Mapping[str, str]
    help: str
    home: Home
    aliases: tuple[str, ...] = ()
    required: bool = False
    shared: bool = False

    @property
    def default_words(self) -> str:
        """The default as it is told: a value, "required", or what stands behind "unset =" in the help line."""
        if self.required:
            return "required"
        if self.default not in (None, ()):
            return plain(self.default)
        told = re.search(r"unset = ([^;]+)", self.help)
        return told[1].strip() if told else "unset"

    @property
    def meaning(self) -> str:
        """The help line without what `default_words` tells."""
        return re.sub(r"; unset = [^;]+", "", self.help)

    @property
    def type_words(self) -> str:
        """Type, range and unit in one phrase; for a choice its values."""
        if self.choices:
            return ", ".join(self.choices)
        words = self.type + (f" of {self.unit}" if self.unit and self.type == "whole number" else "")
        words += f" ({self.unit})" if self.unit and self.type != "whole number" else ""
        return words + (f", {self.range}" if self.range else "")


@dataclass(frozen=True)
class Foreign:
    """A key of SimpleTuner's files that is no setting here. fate: what becomes of it; text: the reason, or what to use.

    off: the values that ask for nothing, beside those that mean "off" for every key.
    """

    name: str
    fate: Literal["renamed", "refused", "later", "later output", "no effect"]
    text: str
    off: tuple[Any, ...] = field(default=())


def options() -> tuple[Option, ...]:
    """Every setting: of config.json by section, then those that only a dataset has, then the text cache's."""
    found: list[Option] = []
    for group, kind in SECTIONS.items():
        title = Config.model_fields[group].description or group
        found += [_option(key, info, group, title, "config") for key, info in kind.model_fields.items()]
    kinds: tuple[tuple[Home, type[Section]], ...] = (
        ("dataset", ImageDataset),
        ("conditioning", ConditioningDataset),
        ("text_embeds", TextDataset),
    )
    for home, kind in kinds:
        own = {key: info for key, info in kind.model_fields.items() if home != "dataset" or key not in INHERITED}
        found += [_option(key, info, home, DATASET_TITLES[home], home) for key, info in own.items()]
    return tuple(found)


def groups() -> dict[str, str]:
    """Name of a group → its title, in the order of `options`."""
    return {option.group: option.title for option in options()}


def foreign_keys() -> tuple[Foreign, ...]:
    """Every key of SimpleTuner's files that is no setting here, with what becomes of it."""
    found = [Foreign(key, "renamed", new) for key, new in legacy.RENAMED.items()]
    found += [Foreign(key, "refused", text) for key, text in legacy.REFUSED.items()]
    found += [Foreign(key, "later", LATER, off) for key, off in legacy.LATER_TRAINING.items()]
    found += [Foreign(key, "later output", LATER_OUTPUT, off) for key, off in legacy.LATER_OUTPUT.items()]
    found += [Foreign(key, "no effect", text) for key, text in legacy.NO_EFFECT.items()]
    return tuple(sorted(found, key=lambda key: key.name))


LATER = "not built yet, and it changes what is trained: refused unless it is off"
LATER_OUTPUT = "not built yet: accepted with a note, no effect in this version"


def told(foreign: Foreign) -> str:
    """What becomes of a foreign key, in one line."""
    return {
        "renamed": f"renamed: read as {foreign.text}",
        "refused": f"refused unless it is off: {foreign.text}",
        "no effect": f"no effect here: {foreign.text}",
    }.get(foreign.fate, foreign.text)


def schema_path(name: str) -> Path:
    """The JSON Schema of "config" or "multidatabackend" as a file, in a checkout as in an installation.

    Its text is made by json_schema.py; scripts/build_docs.py writes it there.
    """
    if name not in SCHEMAS:
        raise ValueError(f"there are schemas of {' and '.join(SCHEMAS)}, none of {name}")
    return Path(__file__).resolve().parent.parent / "assets" / "schemas" / f"{name}.schema.json"


def plain(value: Any) -> str:
    """A value as it is written in a file: true, 1e-5, text without quotes, "" for the empty text."""
    if value is None or isinstance(value, bool):
        return str(value).lower() if value is not None else "unset"
    if isinstance(value, float):
        return re.sub(r"e([+-])0", r"e\1", f"{value:g}")
    return str(value) if value != "" else '""'


# ---- from a field of pydantic's ----


def _option(key: str, info: FieldInfo, group: str, title: str, home: Home) -> Option:
    required = info.is_required()
    extra = info.json_schema_extra
    unit = extra.get("unit") if isinstance(extra, dict) else None
    choices = choices_of(info)
    return Option(
        name=key,
        group=group,
        title=title,
        type="one of" if choices else type_of(info),
        default=None if required else info.default,
        unit=str(unit) if unit else None,
        range=range_of(info),
        choices=choices,
        help=info.description or "",
        home=home,
        aliases=tuple(old for old, new in legacy.RENAMED.items() if new == key),
        required=required,
        shared=home == "config" and key in INHERITED,
    )


def choices_of(info: FieldInfo) -> dict[str, str]:
    """Value → meaning of a setting that takes one of some names; empty for others."""
    for kind, table in TABLES:
        if any(entry in get_args(kind) for entry in info.metadata):
            return dict(table)
    return {str(choice): "" for member in members(info) if get_origin(member) is Literal for choice in get_args(member)}


def members(info: FieldInfo) -> tuple[Any, ...]:
    """The types that a field takes, None left out; a type that has a reader in values.py as that function."""
    annotation = Annotated[(info.annotation, *info.metadata)] if info.metadata else info.annotation  # type: ignore[valid-type]
    return tuple(dict.fromkeys(_members(annotation)))


def _members(annotation: Any) -> Iterator[Any]:
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *metadata = get_args(annotation)
        readers = [entry.func for entry in metadata if isinstance(entry, BeforeValidator) and entry.func in READ_BY]
        yield from readers or _members(inner)
    elif origin in (Union, types.UnionType):
        for member in get_args(annotation):
            yield from _members(member)
    elif annotation is not type(None):
        yield annotation


def type_of(info: FieldInfo) -> str:
    """The type of a field in words. Raises KeyError for one that has no words yet."""
    words = []
    for member in members(info):
        if member in READ_BY:
            words.append(READ_BY[member])
        elif get_origin(member) is tuple:
            words.append(f"list of {TYPES[get_args(member)[0]]}s")
        else:
            words.append(TYPES[member])
    return " or ".join(words)


def limits(info: FieldInfo) -> dict[str, Any]:
    """The bounds of a number: ge, gt, le, lt → value."""
    bounds = (annotated_types.Ge, annotated_types.Gt, annotated_types.Le, annotated_types.Lt)
    names = {kind: kind.__name__.lower() for kind in bounds}
    return {names[type(entry)]: getattr(entry, names[type(entry)]) for entry in info.metadata if type(entry) in names}


def range_of(info: FieldInfo) -> str | None:
    """The bounds of a number in words."""
    found = {name: plain(value) for name, value in limits(info).items()}
    low = found.get("ge") or (f"above {found['gt']}" if "gt" in found else None)
    high = found.get("le") or (f"below {found['lt']}" if "lt" in found else None)
    if low and high:
        return f"{low} to {high}"
    if low:
        return low if "gt" in found else f"{low} or more"
    return high if high is None or "lt" in found else f"at most {high}"
