"""multidatabackend.json → the datasets, with what each inherits from config.json and where every value comes from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sana_tune.config import legacy
from sana_tune.config.build import build_section
from sana_tune.config.datasets import (
    DATASET_KINDS,
    INHERITED,
    ConditioningDataset,
    EvalDataset,
    ImageDataset,
    TextDataset,
    inherit,
)
from sana_tune.config.files import resolve
from sana_tune.config.findings import Findings, is_of_the_file, short
from sana_tune.config.formats import read
from sana_tune.config.layers import DEFAULT, MAY_BE_EMPTY, Flat
from sana_tune.config.placeholders import expand_env, expand_names
from sana_tune.config.schema import Config, Section, section_of
from sana_tune.errors import UserError

# Where a stray {word} is surely a mistake.
PATHS = ("instance_data_dir", "cache_dir_vae", "cache_dir", "csv_file", "csv_cache_dir")


@dataclass(frozen=True)
class Datasets:
    """The entries that are not disabled. origins: dataset id → key → where its value comes from.

    images: those with a probability above 0, held-out ones (EvalDataset) among them. masks: those that a picture
    dataset names. texts: the caches of captions, one of them the default.
    """

    images: tuple[ImageDataset, ...]
    masks: tuple[ConditioningDataset, ...]
    texts: tuple[TextDataset, ...]
    origins: Mapping[str, Mapping[str, str]]

    @property
    def text_cache(self) -> TextDataset:
        """The cache of all captions whose dataset names none, and of the prompts."""
        return next(text for text in self.texts if text.default)


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
    faulty: set[str] = set()
    for number, entry in enumerate(entries, start=1):
        reader = _Entry(path, number, entry, config, flat.origins, findings)
        problems = len(findings.problems)
        section = reader.build(environ, names)
        if section is None and len(findings.problems) > problems:
            faulty.add(str(entry.get("id")))
        if section is not None:
            built.append(section)
            origins[str(vars(section)["id"])] = reader.origins
    images = [entry for entry in built if isinstance(entry, ImageDataset)]
    masks = [entry for entry in built if isinstance(entry, ConditioningDataset)]
    texts = [entry for entry in built if isinstance(entry, TextDataset)]
    _check_together(path, images, entries, findings)
    _check_links(path, images, masks, texts, faulty, findings)
    drawn = tuple(image for image in images if image.probability > 0 or isinstance(image, EvalDataset))
    named = {image.conditioning_data for image in drawn}
    return Datasets(drawn, tuple(mask for mask in masks if mask.id in named), _with_default(texts), origins)


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
        self._tell_of_pictures_alone(tuple(kind.model_fields))
        if str(values.get("disabled", False)).lower() in ("true", "1"):
            return None
        away = kind is not ConditioningDataset and str(values.get("type", "local")) != "local"
        if isinstance(folder := values.get("instance_data_dir"), str) and not away:
            values["instance_data_dir"] = str(resolve(folder))  # of a packaged example, where there is none here
        given = frozenset(values)
        if issubclass(kind, ImageDataset) and self.config is not None:
            values = {**self._strategy_of(values), **values}
            values = inherit(values, self.config.data)
        self.origins = {key: self._origin(key, given) for key in kind.model_fields}
        return build_section(kind, values, lambda key: f"{self.label}: {key}", self.findings)

    def _strategy_of(self, values: Mapping[str, Any]) -> dict[str, str]:
        """The caption strategy of a table or a Hugging Face dataset, where nobody named one: its own."""
        kind = values.get("type")
        unasked = self.config_origins.get("caption_strategy", DEFAULT) == DEFAULT
        return {"caption_strategy": kind} if unasked and kind in ("csv", "huggingface") else {}

    def _kind(self) -> type[Section] | None:
        name = str(self.entry.get("dataset_type", "image"))
        kind = DATASET_KINDS.get(name)
        if kind is None and name in legacy.IGNORED_DATASET_TYPES:
            self.findings.notes.append(f"{self.label}: {legacy.IGNORED_DATASET_TYPES[name]}")
        elif kind is None:
            what = f"must be {' or '.join(DATASET_KINDS)}; found {short(name)}"
            later = legacy.REFUSED_VALUES["dataset_type"].get(name)
            self.findings.wrong(
                f"{self.label}: dataset_type", what, later or "use image, eval, conditioning or text_embeds"
            )
        return kind

    def _own_values(self, ours: Sequence[str], environ: Mapping[str, str], names: Mapping[str, str]) -> dict[str, Any]:
        """The entry's own values under our names, placeholders filled in."""
        others = tuple(section_of())
        names = {**names, "id": str(self.entry.get("id", ""))}
        values: dict[str, Any] = {}
        seen: dict[str, str] = {}
        for written, value in self.entry.items():
            where = f"{self.label}: {written}"
            if is_of_the_file(written) or self._is_of_pictures_alone(written, ours):
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

    def _is_of_pictures_alone(self, written: str, ours: Sequence[str]) -> bool:
        """Whether a key of masks says what their pictures say: sizes, crops, captions, the cache."""
        key = written.strip().removeprefix("--")
        masks = self.entry.get("dataset_type") == "conditioning"
        return masks and key not in ours and key in ImageDataset.model_fields

    def _tell_of_pictures_alone(self, ours: Sequence[str]) -> None:
        """One note on all such keys."""
        found = [written for written in self.entry if self._is_of_pictures_alone(written, ours)]
        if found:
            verb = "has" if len(found) == 1 else "have"
            what = "masks are resized, cropped and cached as their pictures are"
            self.findings.notes.append(f"{self.label}: {', '.join(found)} {verb} no effect: {what}")

    def _origin(self, key: str, given: frozenset[str]) -> str:
        if key in given:
            return f"{self.label}: {key}"
        return self.config_origins.get(key, DEFAULT) if key in INHERITED else DEFAULT


def _with_default(texts: Sequence[TextDataset]) -> tuple[TextDataset, ...]:
    """The text caches, one of them the default: the first where none says so. Where there is none, one is made up."""
    if not texts:
        return (TextDataset(id="text-embeds", default=True),)
    if any(text.default for text in texts):
        return tuple(texts)
    return (texts[0].model_copy(update={"default": True}), *texts[1:])


def _check_together(
    path: Path, images: Sequence[ImageDataset], entries: Sequence[Mapping[str, Any]], findings: Findings
) -> None:
    """What must hold between datasets: unique ids, and at least one set of pictures to train on."""
    ids = [str(entry["id"]) for entry in entries if entry.get("id")]
    for name in dict.fromkeys(name for name in ids if ids.count(name) > 1):
        findings.wrong(f"{path}: {name}", "the id of a dataset must be unique", "rename one of them")
    trained = [image for image in images if not isinstance(image, EvalDataset)]
    if not trained and not findings.problems:
        what = "at least one dataset of pictures must be enabled"
        findings.wrong(str(path), what, 'add an entry with "instance_data_dir"')
    elif trained and all(image.probability == 0 for image in trained):
        what = "at least one dataset of pictures must have a probability above 0; found none"
        findings.wrong(str(path), what, "probability 0 leaves a dataset out: raise it where pictures are to be trained")
    for image in trained:
        if image.probability == 0:
            findings.notes.append(f"dataset {image.id}: its probability is 0: it is left out, and not counted")


def _check_links(
    path: Path,
    images: Sequence[ImageDataset],
    masks: Sequence[ConditioningDataset],
    texts: Sequence[TextDataset],
    faulty: Set[str],
    findings: Findings,
) -> None:
    """What must hold of the ids that entries name: masks and text caches that are there, and one default cache.

    faulty: ids of entries with problems of their own, of which nothing else is said.
    """
    defaults = [text.id for text in texts if text.default]
    if len(defaults) > 1:
        what = f"one text cache at most can be the default; found {', '.join(defaults)}"
        findings.wrong(str(path), what, 'keep "default": true at one of them; text_embeds names the others')
    for key, kind, there in (
        ("conditioning_data", "an entry with dataset_type conditioning", {mask.id for mask in masks}),
        ("text_embeds", "an entry with dataset_type text_embeds", {text.id for text in texts}),
    ):
        for image in images:
            name = vars(image)[key]
            if name is not None and name not in there | faulty:
                known = f"there are {', '.join(sorted(there))}" if there else "there is none"
                what = f"must be the id of {kind} that is not disabled; found {short(name)}, {known}"
                findings.wrong(f"{path}: {image.id}: {key}", what, "name one of these, or add the entry")
    named = {image.conditioning_data for image in images}
    for mask in masks:
        if mask.id not in named:
            findings.notes.append(f"masks {mask.id}: no dataset names them as its conditioning_data: they are not used")
