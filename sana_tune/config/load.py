"""Files + environment + command line → Config, with the origin of every value and every problem at once.

A value passes: raw file or flag → foreign keys sorted out (legacy.py) → pydantic's types and ranges → rules between
settings. Problems of all stages are collected before any is told.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sana_tune.config.arguments import parse_overrides
from sana_tune.config.backends import read_datasets
from sana_tune.config.build import build_config
from sana_tune.config.datasets import ConditioningDataset, ImageDataset, TextDataset
from sana_tune.config.differences import differences
from sana_tune.config.findings import Findings
from sana_tune.config.layers import flatten
from sana_tune.config.quantisation_rules import Prices
from sana_tune.config.rules import check_rules
from sana_tune.config.schema import Config
from sana_tune.errors import UserError

__all__ = ["Loaded", "load", "load_settings", "parse_overrides"]


@dataclass(frozen=True)
class Loaded:
    """What a run was asked to do.

    origins: flat key → where its value comes from ("default", "config.json: seed", "command line: seed" …).
    datasets: the pictures, held-out ones (EvalDataset) among them. text_cache: the default one of text_caches.
    notes:   lines to say at start: keys without effect, keys not built yet, differences in meaning.
    dataset_origins: dataset id → key → origin. secret: keys whose values must not be shown.
    """

    config: Config
    datasets: tuple[ImageDataset, ...]
    text_cache: TextDataset
    origins: Mapping[str, str]
    notes: tuple[str, ...]
    path: Path | None
    dataset_origins: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    secret: frozenset[str] = frozenset()
    masks: tuple[ConditioningDataset, ...] = ()
    text_caches: tuple[TextDataset, ...] = ()

    def text_cache_of(self, dataset: str) -> TextDataset:
        """The cache of a dataset's captions: the one that its text_embeds names, else the default one."""
        named = next((entry.text_embeds for entry in self.datasets if entry.id == dataset), None)
        return next((text for text in self.text_caches if text.id == named), self.text_cache)


def load(
    path: Path | None,
    overrides: Mapping[str, Any],
    environ: Mapping[str, str] | None = None,
    *,
    prices: Prices | None = None,
) -> Loaded:
    """Read the config at `path` (None: the flags alone) and its datasets. Raises UserError with all problems.

    path: JSON, TOML, YAML or a config.env. overrides: the flags, as `parse_overrides` reads them. prices: see
    `check_rules`.
    """
    environ = os.environ if environ is None else environ
    findings = Findings()
    flat = flatten(path, overrides, environ, findings)
    config = build_config(flat, findings)
    datasets = read_datasets(flat, config, environ, findings)
    if config is not None and datasets is not None:
        findings.problems += check_rules(config, datasets.images, findings.notes, datasets.masks, prices)
    if findings.problems or config is None or datasets is None:
        raise UserError(*dict.fromkeys(findings.problems))
    notes = [*findings.notes, *differences(flat, config, datasets.images)]
    return Loaded(
        config,
        datasets.images,
        datasets.text_cache,
        flat.origins,
        tuple(dict.fromkeys(notes)),
        path,
        datasets.origins,
        flat.secret,
        datasets.masks,
        datasets.texts,
    )


def load_settings(path: Path | None, overrides: Mapping[str, Any], environ: Mapping[str, str] | None = None) -> Config:
    """The settings as `load` reads them, for what needs no dataset: those need not be there.

    Raises UserError with all problems of the settings themselves.
    """
    findings = Findings()
    flat = flatten(path, overrides, os.environ if environ is None else environ, findings)
    config = build_config(flat, findings)
    if findings.problems or config is None:
        raise UserError(*dict.fromkeys(findings.problems))
    return config
