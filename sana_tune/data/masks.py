"""Masks of pictures: which file is whose, and what is wrong with them. No torch.

A mask has the name of its picture, folders included; the ending may differ. It is resized and cropped as its picture
is (images.mask_grid), whatever its own size.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

from sana_tune.config.datasets import ConditioningDataset, ImageDataset
from sana_tune.data.geometry import Size
from sana_tune.data.memory import FileMemory
from sana_tune.data.records import Record, content_hash
from sana_tune.data.sources import sort_out
from sana_tune.data.survey import Ledger, Survey
from sana_tune.errors import Problem, UserError
from sana_tune.store import Entry, FolderStore, StoreLost

_WORKERS = min(8, 2 * (os.cpu_count() or 1))
_NAMES_SHOWN = 5


def with_masks(
    surveyed: Survey,
    datasets: Sequence[ImageDataset],
    masks: Sequence[ConditioningDataset],
    memory: FileMemory,
    *,
    headers_only: bool = False,
) -> Survey:
    """The survey with each record's mask (mask_key, mask_hash, mask_kind), where its dataset has masks.

    headers_only: measure masks without reading them whole; those that were never read whole have no hash. Pictures
    without a usable mask are one problem for each dataset.
    """
    of = {mask.id: mask for mask in masks}
    try:
        for dataset in datasets:
            if dataset.conditioning_data is None:
                continue
            mine = of.get(dataset.conditioning_data)
            if mine is not None:
                surveyed = _with_masks_of(surveyed, dataset, mine, memory, headers_only)
    finally:
        memory.save()
    return surveyed


def _with_masks_of(
    surveyed: Survey, dataset: ImageDataset, mine: ConditioningDataset, memory: FileMemory, headers_only: bool
) -> Survey:
    store = FolderStore(mine.instance_data_dir)
    try:
        names = _Names(sort_out(store.list()).pictures)
    except UserError as error:
        told = (replace(problem, where=f"masks {mine.id}: {problem.where}") for problem in error.problems)
        return replace(surveyed, problems=(*surveyed.problems, *told))
    own = [record for record in surveyed.records if record.dataset == dataset.id]
    entries = {record.id: names.of(record.key) for record in own}
    found = {name: entry for name, entry in entries.items() if isinstance(entry, Entry)}
    with ThreadPoolExecutor(_WORKERS, thread_name_prefix="masks") as workers:
        looked = workers.map(lambda entry: _look(store, entry, memory, headers_only), found.values())
        facts = dict(zip(found, looked, strict=True))
    wrong = {record.key: str(entries[record.id]) for record in own if record.id not in found}
    wrong |= {record.key: f"{found[record.id].key} {facts[record.id]['broken']}" for record in own
              if "broken" in facts.get(record.id, {})}  # fmt: skip

    def masked(record: Record) -> Record:
        if record.id not in found:
            return record
        hash_ = facts[record.id].get("hash")
        return replace(record, mask_key=found[record.id].key, mask_hash=hash_, mask_kind=mine.conditioning_type)

    resized = sum(
        Size(facts[record.id]["width"], facts[record.id]["height"]) != Size(record.width_px, record.height_px)
        for record in own
        if "width" in facts.get(record.id, {})
    )
    ledgers = (
        replace(part, masks=len(own) - len(wrong), masks_resized=resized) if part.dataset == dataset.id else part
        for part in surveyed.ledger.datasets
    )
    problems = [_without_mask(dataset, mine, len(own), wrong)] if wrong else []
    return replace(
        surveyed,
        records=tuple(map(masked, surveyed.records)),
        ledger=Ledger(tuple(ledgers)),
        problems=(*surveyed.problems, *problems),
    )


class _Names:
    """Masks by the names of pictures."""

    def __init__(self, entries: Sequence[Entry]):
        self._exact = {entry.key: entry for entry in entries}
        self._stems: dict[str, list[Entry]] = {}
        for entry in entries:
            self._stems.setdefault(_stem(entry.key), []).append(entry)

    def of(self, key: str) -> Entry | str:
        """The mask of a picture, or why it has none: of several endings the picture's own is taken."""
        entry = self._exact.get(key)
        if entry is not None:
            return entry
        others = self._stems.get(_stem(key), [])
        if not others:
            return f"no {_stem(key)} with any picture's ending"
        return others[0] if len(others) == 1 else f"several: {', '.join(other.key for other in others)}"


def _stem(key: str) -> str:
    return PurePosixPath(key).with_suffix("").as_posix()


def _look(store: FolderStore, entry: Entry, memory: FileMemory, headers_only: bool) -> Mapping[str, Any]:
    """hash (if it was ever read whole), width and height of a mask, remembered; or {"broken": reason}."""
    from sana_tune.data.images import BrokenImage, measure  # Pillow and numpy: not before they are needed

    known = memory.get(store.locate(entry.key), entry) or {}
    if {"width", "height"} <= known.keys() and (headers_only or "hash" in known):
        return known
    facts: dict[str, Any] = dict(known)
    try:
        if headers_only:
            with store.open(entry.key) as file:
                size = measure(file)
        else:
            data = store.read(entry.key)
            size = measure(data)
            facts["hash"] = content_hash(data)
    except BrokenImage as error:
        return {"broken": error.reason}
    except StoreLost:
        raise
    except UserError as error:
        return {"broken": error.problems[0].what}
    facts.update(width=size.width, height=size.height)
    memory.put(store.locate(entry.key), entry, facts)
    return facts


def _without_mask(dataset: ImageDataset, mine: ConditioningDataset, pictures: int, wrong: Mapping[str, str]) -> Problem:
    """One problem for all pictures of a dataset without a usable mask."""
    shown = "; ".join(f"{key}: {reason}" for key, reason in list(wrong.items())[:_NAMES_SHOWN])
    more = f"; and {len(wrong) - _NAMES_SHOWN} more" if len(wrong) > _NAMES_SHOWN else ""
    return Problem(
        f"dataset {dataset.id}: {mine.instance_data_dir}",
        f"every picture needs a mask of its name (conditioning_data {mine.id}); {len(wrong)} of {pictures} have none "
        f"that can be used: {shown}{more}",
        "add these masks (white = counts, black = does not), move such pictures to a dataset without masks, or take "
        "conditioning_data out",
    )
