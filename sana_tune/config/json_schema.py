"""JSON Schemas (draft 2020-12) of config.json and multidatabackend.json, for editors. No torch.

They accept what the loader accepts: numbers and switches written as text, `{env:VAR}`, null and "" for "not set", keys
with leading dashes, SimpleTuner's keys. Those of ours are `properties`, which editors offer while one types; every
other spelling and key is a pattern, which they explain and mark as deprecated, but do not offer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_origin

from pydantic.fields import FieldInfo

from sana_tune.config import legacy
from sana_tune.config.caption_edits import MOST_SHUFFLES, SPLITS, parse_caption_filters, parse_caption_shuffle
from sana_tune.config.datasets import DATASET_KINDS, ConditioningDataset, EvalDataset, ImageDataset, TextDataset
from sana_tune.config.describe import Foreign, Option, choices_of, foreign_keys, limits, members, options, told
from sana_tune.config.findings import OF_THE_FILE
from sana_tune.config.schema import SECTIONS, Section
from sana_tune.config.source_rules import NEEDED
from sana_tune.config.sources import HUB_KEYS, TABLE_KEYS, parse_hub, parse_table
from sana_tune.config.values import (
    NARROWEST,
    WIDEST,
    parse_aspect_buckets,
    parse_colour,
    parse_disk_size,
    parse_ids,
    parse_instruction,
    parse_levels,
    parse_optimizer_config,
    parse_resolutions,
)
from sana_tune.config.watching import (
    WEBHOOK_KEYS,
    parse_comment,
    parse_hub_id,
    parse_script,
    parse_trackers,
    parse_webhooks,
)

Schema = dict[str, Any]

DRAFT = "https://json-schema.org/draft/2020-12/schema"
PLACEHOLDER: Schema = {"type": "string", "pattern": r"\{env:[^{}]*\}"}
NOT_SET: Schema = {"enum": [None, ""]}
_DIGITS = r"[0-9]+(_[0-9]+)*"
WHOLE = rf"^\s*[+-]?{_DIGITS}(\.0+)?\s*$"
NUMBER = rf"^\s*[+-]?({_DIGITS}(\.({_DIGITS})?)?|\.{_DIGITS})([eE][+-]?[0-9]+)?\s*$"
NUMBERS = rf"{NUMBER[:-1]}(,{NUMBER[1:-1]})*$"
SIZE = r"^(\s*[0-9]+(\.0+)?\s*([xX×]\s*[0-9]+)?\s*(,|$))+$"
SWITCHES = ("true", "false", "t", "f", "yes", "no", "y", "n", "on", "off", "1", "0")
OR_TEXT = {
    parse_ids: "array",
    parse_instruction: "array",
    parse_optimizer_config: "object",
    parse_comment: "array",
    parse_trackers: "array",
}  # text, or this kind of value
TRUE: Schema = {"enum": [True, 1, "true", "True", "TRUE", "1"]}
BOUNDS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}
OFF = [*legacy.OFF, [], {}]  # what asks for nothing, for every key
FILE_MARKS: Schema = {"description": "about the file, not about the run"}


def json_schema(name: str) -> Schema:
    """The schema of "config" or "multidatabackend". Raises KeyError for another name."""
    return {"config": _config, "multidatabackend": _datasets}[name]()


def _config() -> Schema:
    fields = {key: info for kind in SECTIONS.values() for key, info in kind.model_fields.items()}
    return {
        "$schema": DRAFT,
        "title": "config.json of sana_tune",
        "description": "What a run does. `sana_tune options NAME` explains a setting.",
        **_object(fields, "config", "#", dashes="[-_]"),
        "allOf": [_given(key, dashed=True) for key, info in fields.items() if info.is_required()],
        "$defs": {"off": {"enum": _unique(OFF)}},
    }


def _datasets() -> Schema:
    entries = {"type": "array", "items": {"$ref": "#/$defs/entry"}, "minItems": 1}
    around = {
        "type": "object",
        "required": ["datasets"],
        "properties": {**dict.fromkeys(OF_THE_FILE, FILE_MARKS), "datasets": {"$ref": "#/$defs/entries"}},
        "additionalProperties": False,
    }
    ignored = list(legacy.IGNORED_DATASET_TYPES)
    return {
        "$schema": DRAFT,
        "title": "multidatabackend.json of sana_tune",
        "description": "The datasets of a run: a list, or an object that holds it beside $schema.",
        "if": {"type": "array"},
        "then": {"$ref": "#/$defs/entries"},
        "else": around,
        "$defs": {
            "entries": entries,
            "entry": {
                "type": "object",
                "properties": {"dataset_type": {"enum": [*DATASET_KINDS, *ignored], "default": "image"}},
                "if": _type_is(*ignored),
                "else": _one_of_the_kinds([kind for kind in DATASET_KINDS if kind != "image"]),
            },
            "image": _entry(ImageDataset, "dataset", "#/$defs/image"),
            "eval": _entry(EvalDataset, "dataset", "#/$defs/eval"),
            "conditioning": _masks(),
            "text_embeds": _entry(TextDataset, "text_embeds", "#/$defs/text_embeds"),
            "off": {"enum": _unique(OFF)},
        },
    }


def _one_of_the_kinds(kinds: list[str]) -> Schema:
    """The entry of the first kind whose dataset_type it has; pictures where it has none of them."""
    if not kinds:
        return {"$ref": "#/$defs/image"}
    first, *rest = kinds
    return {"if": _type_is(first), "then": {"$ref": f"#/$defs/{first}"}, "else": _one_of_the_kinds(rest)}


def _masks() -> Schema:
    """An entry of masks, which may also say what their pictures say."""
    shape = _entry(ConditioningDataset, "conditioning", "#/$defs/conditioning")
    idle = {"description": "no effect: masks are resized and cropped as their pictures are", "deprecated": True}
    others = [key for key in ImageDataset.model_fields if key not in ConditioningDataset.model_fields]
    shape["patternProperties"] |= {f"^(--)?{key}$": idle for key in others}
    return shape


def _type_is(*names: str) -> Schema:
    return {"properties": {"dataset_type": {"enum": list(names)}}, "required": ["dataset_type"]}


def _entry(kind: type[Section], home: str, place: str) -> Schema:
    """One entry; a disabled one needs nothing."""
    fields = dict(kind.model_fields)
    needed = [_given(key, dashed=False) for key, info in fields.items() if info.is_required()]
    off = [{"properties": {key: TRUE}, "required": [key]} for key in ("disabled", "disable")]
    shape = _object(fields, home, place, dashes="_")
    if issubclass(kind, ImageDataset):
        needed.append(_needs_of_the_type([name for name in NEEDED if name != "local"]))
    return {**shape, "if": {"anyOf": off}, "else": {"allOf": needed}}


def _needs_of_the_type(types: list[str]) -> Schema:
    """What an entry of the first type that it has must say of where its pictures are; a folder where it has none."""
    name, *rest = types or ["local"]
    needs = {"allOf": [_given(key, dashed=False) for key in NEEDED[name]]}
    if not types:
        return needs
    is_it = {"anyOf": [{"properties": {key: {"const": name}}, "required": [key]} for key in ("type", "--type")]}
    return {"if": is_it, "then": needs, "else": _needs_of_the_type(rest)}


def _given(key: str, *, dashed: bool) -> Schema:
    """That a key is there, in one of its spellings."""
    spellings = [key, f"--{key}"]
    if dashed and "_" in key:
        spellings += [spelling.replace("_", "-") for spelling in spellings]
    return {"anyOf": [{"required": [spelling]} for spelling in spellings]}


def _object(fields: Mapping[str, FieldInfo], home: str, place: str, *, dashes: str) -> Schema:
    """An object of these settings, of what is about the file, and of SimpleTuner's other keys.

    place: where in the schema this object stands. dashes: what can stand for an underscore in other spellings of keys.
    """
    described = {option.name: option for option in options() if option.home == home or option.shared}
    properties = {key: _property(described[key], info) for key, info in fields.items()}
    bare = "(--)?" if dashes != "_" else "--"  # with other dashes a key differs also without its leading ones
    other = {f"^(?!{key}$){bare}{key.replace('_', dashes)}$": {"$ref": f"{place}/properties/{key}"} for key in fields}
    foreign = {f"^(--)?{key.name.replace('_', dashes)}$": _foreign(key, place) for key in foreign_keys()
               if key.fate != "renamed" or key.text in fields}  # fmt: skip
    return {
        "type": "object",
        "properties": {**dict.fromkeys(OF_THE_FILE, FILE_MARKS), **properties},
        "patternProperties": {"disabled_fields__$": FILE_MARKS, **other, **foreign},
        "additionalProperties": False,
    }


def _property(option: Option, info: FieldInfo) -> Schema:
    text = f"{option.meaning} [{option.type_words}; default: {option.default_words}]"
    default = {} if option.default in (None, ()) else {"default": option.default}
    return {"description": text, **default, **_value(option.name, info)}


def _foreign(key: Foreign, place: str) -> Schema:
    """A key of SimpleTuner's: what becomes of it; one that is refused unless it is off takes only the off values."""
    found: Schema = {"description": told(key), "deprecated": True}
    if key.fate == "renamed":
        found["$ref"] = f"{place}/properties/{key.text}"
    elif key.fate in ("later", "refused"):
        found |= {"enum": _unique([*OFF, *key.off])} if key.off else {"$ref": "#/$defs/off"}
    return found


def _unique(values: Iterable[Any]) -> list[Any]:
    """The values without repeats; 1, 1.0 and true are told apart as JSON tells them: 1 is 1.0, and no true."""
    found: list[Any] = []
    for value in values:
        if not any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in found):
            found.append(value)
    return found


def _value(key: str, info: FieldInfo) -> Schema:
    """What a setting can be: its types, a placeholder, and null or "" for "not set"."""
    ways = [way for member in members(info) for way in _ways(key, info, member)]
    text = any(way.get("type") == "string" and "pattern" not in way for way in ways)
    ways += [] if text else [PLACEHOLDER]
    if not info.is_required():
        ways += [{"type": "null"}] if text else [NOT_SET]
    return ways[0] if len(ways) == 1 else {"anyOf": ways}


def _ways(key: str, info: FieldInfo, member: Any) -> list[Schema]:
    """The ways to write a value of one type."""
    names = choices_of(info)
    if names and (member is str or get_origin(member) is Literal):
        return [{"enum": [*names, *legacy.SAME_VALUE.get(key, {})]}]
    bounds = {BOUNDS[name]: value for name, value in limits(info).items()}
    if member is bool:
        return [{"type": "boolean"}, {"enum": [0, 1]}, {"type": "string", "pattern": _any_case(SWITCHES)}]
    if member is int:
        return [{"type": "integer", **bounds}, {"type": "string", "pattern": WHOLE}]
    if member is float:
        return [{"type": "number", **bounds}, {"type": "string", "pattern": NUMBER}]
    if member is parse_resolutions:
        one: list[Schema] = [{"type": "integer", "minimum": 1}, {"type": "string", "pattern": SIZE}]
        return [*one, {"type": "array", "items": {"anyOf": one}}]
    if member is parse_levels:
        one = [{"type": "number", "exclusiveMinimum": 0, "maximum": 1000}, {"type": "string", "pattern": NUMBER}]
        return [one[0], {"type": "string", "pattern": NUMBERS}, {"type": "array", "items": {"anyOf": one}}]
    if member is parse_aspect_buckets:
        return [{"type": "array", "items": _aspect_bucket()}]
    if member in OR_TEXT:
        return [{"type": "string"}, {"type": OR_TEXT[member]}]
    if member is parse_caption_shuffle:
        return [_caption_shuffle(), {"enum": [{}]}]
    if member is parse_caption_filters:
        return [{"type": "array", "items": {"type": "string"}}, {"type": "string"}]
    if member in (parse_colour, parse_hub_id, parse_script):
        return [{"type": "string"}]
    if member is parse_webhooks:
        one = [_block(WEBHOOK_KEYS, ["webhook_type"])]
        return [*one, {"enum": [{}]}, {"type": "array", "items": one[0]}, {"type": "string"}]
    if member is parse_disk_size:
        return [{"type": "number", "minimum": 0}, {"type": "string"}]
    if member is parse_table:
        return [_block(TABLE_KEYS, ["path"])]
    if member is parse_hub:
        return [_block(HUB_KEYS, [])]
    if get_origin(member) is tuple:
        return [{"type": "array", "items": {"type": "string"}}]
    return [{"type": "string", **({"minLength": 1} if info.is_required() else {})}]


def _block(keys: Iterable[str], needed: list[str]) -> Schema:
    """A block of settings; what each takes is told by the loader."""
    shape: Schema = {"type": "object", "properties": {key: {} for key in keys}, "additionalProperties": False}
    return {**shape, "required": needed, "patternProperties": {"^[$]": {}}}


def _aspect_bucket() -> Schema:
    text: Schema = {"type": "string", "pattern": NUMBER}
    aspect = {"anyOf": [{"type": "number", "minimum": NARROWEST, "maximum": WIDEST}, text]}
    weight = {"anyOf": [{"type": "number", "exclusiveMinimum": 0}, text]}
    pair = {"type": "object", "properties": {"aspect": aspect, "weight": weight}, "required": ["aspect"]}
    return {"anyOf": [*aspect["anyOf"], {**pair, "additionalProperties": False}]}


def _caption_shuffle() -> Schema:
    whole, switch = {"type": "string", "pattern": WHOLE}, {"enum": [True, False, 0, 1, *("true", "false", "1", "0")]}
    properties: Schema = {
        "enable": switch,
        "count": {"anyOf": [{"type": "integer", "minimum": 1, "maximum": MOST_SHUFFLES}, whole]},
        "seed": {"anyOf": [{"type": "integer", "minimum": 0}, whole, {"type": "null"}]},
        "split_on": {"enum": [*SPLITS]},
        "position_start": {"anyOf": [{"type": "integer", "minimum": 0}, whole]},
        "include_original": switch,
    }
    return {"type": "object", "properties": properties, "required": ["enable"], "additionalProperties": False}


def _any_case(words: Iterable[str]) -> str:
    """A pattern of words in any case; the regular expressions of JSON Schema have no flag for that."""
    spelt = ("".join(f"[{c}{c.upper()}]" if c.isalpha() else c for c in word) for word in words)
    return f"^({'|'.join(spelt)})$"
