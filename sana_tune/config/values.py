"""How single values are read: booleans and numbers from strings, sizes, names with a nearest guess. Pure."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple


class Resolution(NamedTuple):
    """Width and height of a validation picture, in px."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


class AspectBucket(NamedTuple):
    """One of the aspect ratios (width / height) that pictures may be cropped to, and its weight in a random draw."""

    aspect: float
    weight: float = 1.0


WHITE = "#ffffff"

MOST_LISTED = 12  # names beside a guess: a longer list would hide it
# Aspect ratios beyond these are slips (pixels, or a percentage) and no shapes of pictures.
NARROWEST, WIDEST = 0.05, 20.0


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The name most like `name`, or None when nothing comes near."""
    found = difflib.get_close_matches(name.lower(), list(names), n=1, cutoff=0.6)
    return found[0] if found else None


def named(table: Mapping[str, str], kind: str, refused: Mapping[str, str] | None = None) -> Callable[[str], str]:
    """A validator that accepts the names of `table` and otherwise tells the nearest one.

    refused: names that users may have from elsewhere, with the reason and what to use instead.
    """

    def check(value: str) -> str:
        if value is None or value in table:  # a setting that may be unset
            return value
        if refused and value in refused:
            raise ValueError(f"the {kind} {value!r} cannot be used: {refused[value]}")
        guess = nearest(value, table)
        hint = f"did you mean {guess!r}? " if guess else ""
        listed = "" if guess and len(table) > MOST_LISTED else f"known: {', '.join(table)}"
        raise ValueError(f"no {kind} has the name {value!r}; {hint}{listed}".rstrip())

    return check


OptionValue = bool | int | float | str | None


def parse_optimizer_config(value: Any) -> Any:
    """Read "k=v,k=v" or an object of them: a text of that form, in which `optimizer_options` finds the values.

    An empty value is none. Raises ValueError for what is neither.
    """
    if value is None or value == "" or value == {}:
        return None
    if isinstance(value, Mapping):
        value = ",".join(f"{key}={_option_text(part)}" for key, part in value.items())
    if not isinstance(value, str):
        raise ValueError(f'must be text of the form "name=value,name=value"; found {_shown(value)}')
    optimizer_options(value)
    return value


def optimizer_options(text: str | None) -> dict[str, OptionValue]:
    """The values of `optimizer_config`: true, false and none as such, whole numbers, fractions, else text.

    Raises ValueError for a part that is no name=value, and for a name that stands there twice.
    """
    found: dict[str, OptionValue] = {}
    for part in (text or "").split(","):
        name, equals, told = (piece.strip() for piece in part.partition("="))
        if not part.strip():
            continue
        if not equals or not name or not told:
            raise ValueError(f'must be "name=value,name=value"; found {_shown(part.strip())}')
        if name in found:
            raise ValueError(f"{name} stands there twice")
        found[name] = _option_value(told)
    return found


def _option_value(text: str) -> OptionValue:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


_WORDS: Mapping[str, bool | None] = {"true": True, "false": False, "none": None, "null": None}


def _option_text(value: Any) -> str:
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def parse_resolutions(value: Any) -> tuple[Resolution, ...]:
    """Read "1024", "1024x768,512" or a list of them. An empty value is no resolution (the model's own)."""
    if value is None or value == "" or value == ():
        return ()
    parts = value if isinstance(value, (list, tuple)) else str(value).split(",")
    found = []
    for part in parts:
        if isinstance(part, Resolution):
            found.append(part)
            continue
        match = re.fullmatch(r"\s*(\d+)(?:\.0+)?\s*(?:[xX×]\s*(\d+))?\s*", str(part))
        if not match or int(match[1]) == 0 or int(match[2] or 1) == 0:
            raise ValueError(f"a size is N or WxH in px, such as 1024 or 1280x768; found {str(part)!r}")
        found.append(Resolution(int(match[1]), int(match[2] or match[1])))
    return tuple(found)


def parse_aspect_buckets(value: Any) -> tuple[AspectBucket, ...]:
    """Read [0.75, 1.0, {"aspect": 1.5, "weight": 2}]. None and an empty list are none. Raises ValueError."""
    if value is None or value == "":
        return ()
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"must be a list of aspect ratios, such as [0.75, 1.0, 1.5]; found {_shown(value)}")
    found = tuple(_aspect_bucket(part) for part in value)
    seen = [bucket.aspect for bucket in found]
    twice = next((aspect for aspect in seen if seen.count(aspect) > 1), None)
    if twice is not None:
        raise ValueError(f"every aspect ratio must stand there once; {twice:g} stands there {seen.count(twice)} times")
    return found


def _aspect_bucket(value: Any) -> AspectBucket:
    if isinstance(value, AspectBucket):
        return value
    if not isinstance(value, Mapping):
        return AspectBucket(_aspect(value))
    strange = [key for key in value if key not in AspectBucket._fields]
    if strange or "aspect" not in value:
        raise ValueError(f'an entry is a number or {{"aspect": 1.5, "weight": 2}}; found {_shown(dict(value))}')
    weight = _number(value.get("weight", 1.0))
    if weight is None or not 0 < weight < math.inf:
        raise ValueError(f"a weight must be a number greater than 0; found {_shown(value['weight'])}")
    return AspectBucket(_aspect(value["aspect"]), weight)


def _aspect(value: Any) -> float:
    number = _number(value)
    if number is not None and NARROWEST <= number <= WIDEST:
        return number
    must = f"an aspect ratio is width / height, a number from {NARROWEST:g} to {WIDEST:g}"
    sides = re.fullmatch(r"\s*(\d+)\s*[:/xX×]\s*(\d+)\s*", value) if isinstance(value, str) else None
    hint = f" (write {int(sides[1]) / int(sides[2]):.4g})" if sides and int(sides[2]) else ""
    raise ValueError(f"{must}; found {_shown(value)}{hint}")


def parse_colour(value: Any) -> Any:
    """A colour as "#rrggbb": so written, as "#rgb", or by one of the names of CSS. Raises ValueError."""
    if value is None or value == "":
        return WHITE
    text = str(value).strip().lower()
    digits = re.fullmatch(r"#([0-9a-f]{3}|[0-9a-f]{6})", text)
    if digits is not None:
        return text if len(text) == 7 else "#" + "".join(2 * digit for digit in digits[1])
    from PIL.ImageColor import colormap  # a tenth of a second: for names alone

    found = colormap.get(text)
    if isinstance(found, tuple):  # Pillow keeps it so from the first time that the colour was drawn with
        found = "#" + "".join(f"{part:02x}" for part in found[:3])
    if found is not None:
        return found
    guess = nearest(text, colormap)
    hint = f" (did you mean {guess}?)" if guess else ""
    raise ValueError(f"a colour is #rrggbb or a name such as white or grey; found {_shown(value)}{hint}")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def _number(value: Any) -> float | None:
    """A number, or the number that a text says; None when it is neither."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def parse_levels(value: Any) -> tuple[float, ...] | None:
    """Read "0.25,0.5,1", "250,500,1000" or a list of them as rising noise levels in 0..1.

    If one of them is above 1, all are timesteps of 0 to 1000. An empty value is none. Raises ValueError.
    """
    if value is None or value in ("", [], ()):
        return None
    parts = value if isinstance(value, (list, tuple)) else str(value).split(",")
    found = []
    for part in parts:
        number = _number(part)
        if number is None or not 0 < number <= 1000:
            must = "noise levels are numbers above 0 and at most 1, or timesteps up to 1000, such as 0.25,0.5,0.75"
            raise ValueError(f"{must}; found {_shown(part)}")
        found.append(number)
    scale = 1000 if max(found) > 1 else 1
    return tuple(sorted(number / scale for number in found))


def parse_ids(value: Any) -> Any:
    """Ids of datasets, comma separated or a list of them, as "a,b"; an empty value is none."""
    parts = value if isinstance(value, (list, tuple)) else str(value or "").split(",")
    return ",".join(str(part).strip() for part in parts if str(part).strip()) or None


def whole_or_share(value: float) -> float:
    """A whole number, or a share below 1. Raises ValueError for 1.5."""
    if value >= 1 and value != int(value):
        raise ValueError(f"must be a share below 1, such as 0.1, or a whole number of pictures; found {value:g}")
    return value


_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_DISK_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(?:(%)|([kmgt]?)(i?)b?)\s*", re.IGNORECASE)


def parse_disk_size(value: Any) -> Any:
    """Read bytes, "20 GB", "500M", "1.5 TiB" or "5%" as such a text. An empty value and "none" are none. ValueError."""
    if value is None or value == "" or str(value).lower() == "none":
        return None
    match = None if isinstance(value, bool) else _DISK_SIZE.fullmatch(str(value))
    if match is None or len(match[1]) > 18:
        raise ValueError(
            f"must be bytes, a size such as 20 GB, or a share of the disk such as 5%; found {_shown(value)}"
        )
    if match[2] and float(match[1]) >= 100:
        raise ValueError(f"a share of the disk must be below 100%; found {_shown(value)}")
    return str(value).strip()


def disk_bytes(text: str, disk_total_bytes: int) -> int:
    """The bytes of a size that `parse_disk_size` let pass. A share is one of the whole disk."""
    match = _DISK_SIZE.fullmatch(text)
    if match is None:
        raise ValueError(f"no size: {text!r}")
    number, letter = float(match[1]), match[3] or ""
    if match[2]:
        return round(number / 100 * disk_total_bytes)
    unit = _UNITS[letter.lower()]
    return round(number * (1024 ** "_kmgt".index(letter.lower()) if match[4] and letter else unit))


def parse_instruction(value: Any) -> Any:
    """The complex human instruction: a text, a list of lines, a JSON list as text, or the path of a text file."""
    if isinstance(value, (list, tuple)):
        return "\n".join(str(line) for line in value)
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            lines = json.loads(value)
        except json.JSONDecodeError:
            return value
        return "\n".join(str(line) for line in lines) if isinstance(lines, list) else value
    if isinstance(value, str) and "\n" not in value and value.endswith((".txt", ".md")):
        path = Path(value)
        if not path.is_file():
            raise ValueError(f"the instruction names a text file that does not exist: {value}")
        return path.read_text(encoding="utf-8")
    return value
