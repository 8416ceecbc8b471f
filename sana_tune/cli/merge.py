"""Existing settings files and a few new answers → the files again, with all else kept as it was. Pure.

A key keeps its place and its spelling (`--learning_rate`, old names); what the wizard does not ask is never touched.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sana_tune.cli.recipe import Answers, Length, caption_settings, new_datasets
from sana_tune.config import legacy
from sana_tune.config.arguments import plain
from sana_tune.config.datasets import INHERITED, ImageDataset
from sana_tune.config.schema import SECTIONS, section_of

SIZES = ("minimum_image_size", "maximum_image_size", "target_downsample_size")  # that may go with a resolution
SEVERAL = " | "  # between the texts of a list, as they are typed


def canonical(key: str) -> str:
    """Our name of a key: without dashes, old names renamed."""
    name = plain(key)
    return legacy.RENAMED.get(name, name)


@dataclass(frozen=True)
class Existing:
    """Files that are there already.

    path: of the config. config: its content as written. datasets: the content of the file that data_backend_config
    names, a list or an object that holds one, and datasets_path its path; None when there is no such file.
    """

    path: Path
    config: Mapping[str, Any]
    datasets: Any = None
    datasets_path: Path | None = None

    def get(self, key: str) -> Any:
        """A setting of config.json as written, under whatever name; else its default; None when it has none."""
        found = [value for name, value in self.config.items() if canonical(name) == key and value not in (None, "")]
        if found:
            return found[0]
        home = section_of().get(key)
        default = SECTIONS[home].model_fields[key].get_default() if home else None
        return default if isinstance(default, (str, int, float)) else None

    def names(self, key: str) -> bool:
        """Whether config.json itself has a setting, under whatever name."""
        return any(canonical(name) == key and value not in (None, "") for name, value in self.config.items())

    @property
    def entries(self) -> list[dict[str, Any]]:
        """The entries of the dataset list; none when it cannot be one."""
        content = self.datasets.get("datasets") if isinstance(self.datasets, dict) else self.datasets
        return [entry for entry in content if isinstance(entry, dict)] if isinstance(content, list) else []

    @property
    def group(self) -> list[dict[str, Any]]:
        """The entries that the questions are about: the first folder of pictures, at each of its resolutions."""
        pictures = [entry for entry in self.entries if _is_pictures(entry)]
        subject = [entry for entry in pictures if not _is_on(entry.get("is_regularisation_data"))] or pictures
        return [entry for entry in pictures if entry.get("instance_data_dir") == subject[0].get("instance_data_dir")]

    def of_dataset(self, key: str, entry: Mapping[str, Any] | None = None) -> Any:
        """A setting of a dataset: its own, else config.json's, else the default. entry: None = the group's first."""
        entry = entry if entry is not None else next(iter(self.group), {})
        own = [value for name, value in entry.items() if canonical(name) == key and value not in (None, "")]
        if own:
            return own[0]
        if key in INHERITED:
            return self.get(key)
        return ImageDataset.model_fields[key].get_default()

    def length(self) -> Length:
        """How long the run is: steps where both are given, one epoch where neither is."""
        steps, epochs = _number(self.get("max_train_steps")), _number(self.get("num_train_epochs"))
        return Length(steps=int(steps)) if steps else Length(epochs=epochs or 1)

    def resolutions(self) -> tuple[int, ...]:
        """The sizes of the group in px; a size in megapixels as the edge of its square. () when one is no number."""
        found: list[int] = []
        for entry in self.group:
            size = _number(self.of_dataset("resolution", entry))
            if not size:
                return ()
            area = self.of_dataset("resolution_type", entry) == "area"
            found.append(round((size * 1e6) ** 0.5 if area else size))
        return tuple(dict.fromkeys(found))

    def adapter(self) -> str:
        """What is trained: full or lokr (any adapter)."""
        return "lokr" if self.get("model_type") == "lora" else "full"

    def says(self, question: str) -> bool:
        """Whether the files themselves answer the question `model` or `pictures`."""
        return bool(self.group) if question == "pictures" else self.get("pretrained_model_name_or_path") is not None

    def changed(self, answers: Answers) -> frozenset[str]:
        """The questions that were answered otherwise than the files say."""
        subject = self.of_dataset("instance_prompt")
        captions = self.of_dataset("caption_strategy")
        same = {
            "model": self.get("pretrained_model_name_or_path") == answers.model.name,
            "pictures": bool(self.group) and self.of_dataset("instance_data_dir") == answers.pictures.folder,
            "captions": legacy.SAME_VALUE["caption_strategy"].get(captions, captions) == answers.captions,
            "subject": (tuple(subject) if isinstance(subject, list) else subject) == answers.subject
            or answers.captions != "instanceprompt",
            "resolutions": self.resolutions() == answers.resolutions,
            "length": self.length() == answers.length,
            "prompt": self.get("validation_prompt") == answers.prompt,
            "tracking": (self.get("report_to") or "none") == answers.tracking,
            "output": self.get("output_dir") == answers.output,
            "adapter": self.adapter() == answers.adapter,
        }
        return frozenset(key for key, is_same in same.items() if not is_same)


def _is_pictures(entry: Mapping[str, Any]) -> bool:
    off = any(_is_on(entry.get(key)) for key in ("disabled", "disable"))
    return entry.get("dataset_type", "image") == "image" and "instance_data_dir" in entry and not off


def _is_text(entry: Mapping[str, Any]) -> bool:
    return entry.get("dataset_type") == "text_embeds"


def _is_on(value: Any) -> bool:
    return str(value).lower() in ("true", "1")


def _number(value: Any) -> float | None:
    """A number, or what a text says as one; None for 0 and for what is none."""
    try:
        return float(value) or None
    except (TypeError, ValueError):
        return None


def merge_settings(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """`old` with the values of `new` (our names): in place where a key stands, at the end where not; None removes."""
    found: dict[str, Any] = {}
    done: set[str] = set()
    for written, value in old.items():
        key = canonical(written)
        if key not in new:
            found[written] = value
        elif key not in done and new[key] is not None:
            found[written] = new[key]
        done.add(key)
    return {**found, **{key: value for key, value in new.items() if key not in done and value is not None}}


def merge_datasets(existing: Existing, answers: Answers, changed: frozenset[str]) -> Any:
    """The dataset list with the group's entries as answered, in the form it has.

    changed: which of pictures, captions, subject and resolutions are not what the files say.
    """
    group = existing.group
    if not group:
        kept = existing.entries
        new = [entry for entry in new_datasets(answers) if _is_pictures(entry) or not any(map(_is_text, kept))]
        entries = [*new, *kept]
    else:
        place = existing.entries.index(group[0])
        others = [entry for entry in existing.entries if not any(entry is old for old in group)]
        before = [entry for entry in existing.entries[:place] if not any(entry is old for old in group)]
        entries = [*before, *_group(existing, answers, changed), *others[len(before) :]]
    return {**existing.datasets, "datasets": entries} if isinstance(existing.datasets, dict) else entries


def _group(existing: Existing, answers: Answers, changed: frozenset[str]) -> list[dict[str, Any]]:
    """The group's entries, one per resolution."""
    new = existing.group if "resolutions" not in changed else _at_sizes(existing, answers.resolutions)
    if "pictures" in changed:
        new = [merge_settings(entry, {"instance_data_dir": answers.pictures.folder}) for entry in new]
    if changed & {"captions", "subject"}:
        captions = {"instance_prompt": None, **caption_settings(answers)}
        new = [merge_settings(entry, captions) for entry in new]
    return new


def _at_sizes(existing: Existing, resolutions: Sequence[int]) -> list[dict[str, Any]]:
    """The group at these sizes: the entries that have one of them, and copies of the first for the others."""
    by_size = {side: entry for entry in existing.group for side in _side_of(existing, entry)}
    first = existing.group[0]
    taken = {str(entry.get("id")) for entry in existing.entries}
    found = []
    for side in resolutions:
        entry = by_size.get(side)
        if entry is None:
            entry = _resized(existing, first, side)
            if len(resolutions) > 1:
                entry["id"] = _unique(f"{first.get('id', 'pictures')}-{side}", taken)
                taken.add(entry["id"])
        found.append(entry)
    return found


def _side_of(existing: Existing, entry: Mapping[str, Any]) -> tuple[int, ...]:
    return Existing(existing.path, existing.config, [entry]).resolutions()


def _resized(existing: Existing, entry: Mapping[str, Any], side: int) -> dict[str, Any]:
    """A dataset at another resolution: limits that were the old one follow; a cache folder of its own is not shared."""
    old = existing.of_dataset("resolution", entry)
    limits = {key: side for key in SIZES if key in entry and str(entry[key]) == str(old)}
    unit = "pixel" if existing.of_dataset("resolution_type", entry) == "pixel" else "pixel_area"
    new = {"resolution": side, "resolution_type": unit, "cache_dir_vae": None, **limits}
    return merge_settings(entry, new)


def _unique(name: str, taken: set[str]) -> str:
    number, found = 2, name
    while found in taken:
        number, found = number + 1, f"{name}-{number}"
    return found


def changes(old: Any, new: Any, where: str = "") -> list[str]:
    """What is different, a line each: `key: old → new`."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = dict.fromkeys((*old, *new))
        found = []
        for key in keys:
            place = f"{where}{key}"
            if key not in new:
                found.append(f"{place}: {_shown(old[key])} is taken out")
            elif key not in old:
                found.append(f"{place}: {_shown(new[key])} is added")
            elif old[key] != new[key]:
                found += changes(old[key], new[key], f"{place}: ") if _nested(old[key]) else [
                    f"{place}: {_shown(old[key])} → {_shown(new[key])}"
                ]  # fmt: skip
        return found
    if isinstance(old, Sequence) and isinstance(new, Sequence) and not isinstance(old, str):
        return changes(_by_id(old), _by_id(new), where)
    return [] if old == new else [f"{where}{_shown(old)} → {_shown(new)}"]


def _nested(value: Any) -> bool:
    return isinstance(value, dict) or (isinstance(value, list) and any(isinstance(part, dict) for part in value))


def _by_id(entries: Sequence[Any]) -> dict[str, Any]:
    named = ((entry.get("id") if isinstance(entry, dict) else None, entry) for entry in entries)
    return {str(name or f"entry {number}"): entry for number, (name, entry) in enumerate(named, start=1)}


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "…"
