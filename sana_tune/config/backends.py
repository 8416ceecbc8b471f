"""multidatabackend.json → the datasets, with what each inherits from config.json and where every value comes from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sana_tune.config import legacy
from sana_tune.config.build import build_section
from sana_tune.config.datasets import DATASET_KINDS, INHERITED, ImageDataset, TextDataset, inherit
from sana_tune.config.files import resolve
from sana_tune.config.findings import Findings, is_of_the_file, short
from sana_tune.config.formats import read
from sana_tune.config.layers import DEFAULT, MAY_BE_EMPTY, Flat
from sana_tune.config.placeholders import expand_env, expand_names
from sana_tune.config.schema import Config, Section, section_of
from sana_tune.errors import UserError

PATHS = ("instance_data_dir", "cache_dir_vae", "cache_dir")  # where a stray {word} is surely a mistake


@dataclass(frozen=True)
class Datasets:
    """The entries that are not disabled. origins: dataset id → key → where its value comes from."""

    images: tuple[ImageDataset, ...]
    text_cache: TextDataset
    origins: Mapping[str, Mapping[str, str]]


def read_datasets(flat: Flat, config: Config | None, environ: Mapping[str, str], findings: Findings) -> Datasets | None:
    """The datasets that data_backend_config names, or None with every problem found.

    They are read even when config.json has problems (config is None then), so that all are told at once.
    """
    name = flat.raw.get("data_backend_config")
    if not isinstance(name, str):
        return None
    path = resolve(name)
    try:
        entries = _entries(path, findings)
    except UserError as error:
        findings.problems += error.problems
        return None
    if entries is None:
        return None
    names = {"model_family": "sana", "output_dir": str(config.train.output_dir) if config else ""}
    built: list[Section] = []
    origins: dict[str, Mapping[str, str]] = {}
    for number, entry in enumerate(entries, start=1):
        reader = _Entry(path, number, entry, config, flat.origins, findings)
        section = reader.build(environ, names)
        if section is not None:
            built.append(section)
            origins[str(vars(section)["id"])] = reader.origins
    images = tuple(entry for entry in built if isinstance(entry, ImageDataset))
    texts = [entry for entry in built if isinstance(entry, TextDataset)]
    _check_together(path, images, texts, entries, findings)
    return Datasets(images, texts[0] if texts else TextDataset(id="text-embeds", default=True), origins)


def _entries(path: Path, findings: Findings) -> list[dict[str, Any]] | None:
    """The entries of the file: a bare list, or an object that holds it beside its "$schema"."""
    content = read(path, "dataset list (data_backend_config)")
    if isinstance(content, dict) and "datasets" in content:
        strange = [key for key in content if key != "datasets" and not is_of_the_file(str(key))]
        if strange:
            fix = 'the file is a list of datasets, or {"$schema": …, "datasets": [ … ]}'
            findings.wrong(f"{path}: {strange[0]}", "does not belong beside datasets", fix)
        content = content["datasets"]
    if not isinstance(content, list) or not all(isinstance(entry, dict) for entry in content):
        findings.wrong(str(path), "must be a list of datasets: [ {…}, {…} ]", "put [ ] around the entries")
        return None
    return content


class _Entry:
    """One entry of the list on its way to a frozen model."""

    def __init__(
        self,
        path: Path,
        number: int,
        entry: Mapping[str, Any],
        config: Config | None,
        config_origins: Mapping[str, str],
        findings: Findings,
    ):
        self.label = f"{path}: {entry.get('id') or f'entry {number}'}"
        self.entry, self.config, self.config_origins, self.findings = entry, config, config_origins, findings
        self.origins: dict[str, str] = {}

    def build(self, environ: Mapping[str, str], names: Mapping[str, str]) -> Section | None:
        """The entry as a frozen model; None when it is disabled, not needed, or has problems."""
        kind = self._kind()
        if kind is None:
            return None
        values = self._own_values(tuple(kind.model_fields), environ, names)
        if str(values.get("disabled", False)).lower() in ("true", "1"):
            return None
        if isinstance(folder := values.get("instance_data_dir"), str):
            values["instance_data_dir"] = str(resolve(folder))  # of a packaged example, where there is none here
        given = frozenset(values)
        if kind is ImageDataset and self.config is not None:
            values = inherit(values, self.config.data)
        self.origins = {key: self._origin(key, given) for key in kind.model_fields}
        return build_section(kind, values, lambda key: f"{self.label}: {key}", self.findings)

    def _kind(self) -> type[Section] | None:
        name = str(self.entry.get("dataset_type", "image"))
        kind = DATASET_KINDS.get(name)
        if kind is None and name in legacy.IGNORED_DATASET_TYPES:
            self.findings.notes.append(f"{self.label}: {legacy.IGNORED_DATASET_TYPES[name]}")
        elif kind is None:
            what = f"must be {' or '.join(DATASET_KINDS)}; found {short(name)}"
            later = legacy.LATER_VALUES["dataset_type"].get(name)
            self.findings.wrong(f"{self.label}: dataset_type", what, later or "use image or text_embeds")
        return kind

    def _own_values(self, ours: Sequence[str], environ: Mapping[str, str], names: Mapping[str, str]) -> dict[str, Any]:
        """The entry's own values under our names, placeholders filled in."""
        others = tuple(section_of())
        names = {**names, "id": str(self.entry.get("id", ""))}
        values: dict[str, Any] = {}
        seen: dict[str, str] = {}
        for written, value in self.entry.items():
            where = f"{self.label}: {written}"
            if is_of_the_file(written):
                continue
            key = self.findings.own_key(written.strip().removeprefix("--"), value, where, ours, others)
            if key is None or value is None or (value == "" and key not in MAY_BE_EMPTY):
                continue
            if key in seen:
                self.findings.wrong(where, f"means the same setting as {seen[key]}", "keep one of the two")
            seen[key] = written
            value, _ = expand_env(value, where, environ, self.findings)
            strict = key in PATHS
            values[key] = expand_names(value, where, names, self.findings, strict=strict) if strict else value
        return values

    def _origin(self, key: str, given: frozenset[str]) -> str:
        if key in given:
            return f"{self.label}: {key}"
        return self.config_origins.get(key, DEFAULT) if key in INHERITED else DEFAULT


def _check_together(
    path: Path,
    images: Sequence[ImageDataset],
    texts: Sequence[TextDataset],
    entries: Sequence[Mapping[str, Any]],
    findings: Findings,
) -> None:
    """What must hold between datasets: unique ids, one text cache, at least one set of pictures."""
    ids = [str(entry["id"]) for entry in entries if entry.get("id")]
    for name in dict.fromkeys(name for name in ids if ids.count(name) > 1):
        findings.wrong(f"{path}: {name}", "the id of a dataset must be unique", "rename one of them")
    if len(texts) > 1:
        names = ", ".join(text.id for text in texts)
        what = f"several text caches are not built yet; found {names}"
        findings.wrong(str(path), what, "keep one text_embeds entry")
    if not images and not findings.problems:
        what = "at least one dataset of pictures must be enabled"
        findings.wrong(str(path), what, 'add an entry with "instance_data_dir"')
