"""List, measure and caption every picture: datasets → records, and a ledger that balances. No torch.

Reads headers and hashes bytes, or reads headers alone, and only of files it does not remember by path, size and
modification time. It decodes nothing, so a picture whose header is fine and whose body is torn shows when it is
encoded: `Survey.without` takes it out then.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

from sana_tune.config.datasets import ImageDataset
from sana_tune.data.captions import CaptionRules, Missing, caption_key, captions_of, reads_files
from sana_tune.data.geometry import Rules, Size, place, unfit
from sana_tune.data.memory import FileMemory
from sana_tune.data.records import Record, Role, chance_of, content_hash
from sana_tune.data.sources import PICTURE_ENDINGS, Listing, sort_out
from sana_tune.errors import Problem, UserError
from sana_tune.store import Entry, FolderStore

Report = Callable[[str, int, int], None]

_WORKERS = min(8, 2 * (os.cpu_count() or 1))
_CHUNK = 512  # pictures per hand-over to the workers
_SAVE_EVERY_S = 20.0
_NAMES_SHOWN = 5


@dataclass(frozen=True)
class DatasetLedger:
    """What became of the files of one dataset.

    found:        pictures. trained: those that are trained. left_out: (key, reason) of the others.
    not_pictures: the other files; caption_files of them are captions.
    """

    dataset: str
    found: int
    trained: int
    left_out: tuple[tuple[str, str], ...] = ()
    not_pictures: int = 0
    caption_files: int = 0

    def balances(self) -> bool:
        """found = trained + left out."""
        return self.found == self.trained + len(self.left_out)


@dataclass(frozen=True)
class Ledger:
    """What became of every file, dataset by dataset."""

    datasets: tuple[DatasetLedger, ...]

    def balances(self) -> bool:
        """Whether every picture is accounted for."""
        return all(dataset.balances() for dataset in self.datasets)

    def to_json(self) -> dict[str, Any]:
        """The ledger for ledger.json."""
        return {"datasets": [asdict(dataset) for dataset in self.datasets]}


@dataclass(frozen=True)
class Survey:
    """All pictures to be trained, ordered by dataset and key; what was left out; what is wrong."""

    records: tuple[Record, ...]
    ledger: Ledger
    problems: tuple[Problem, ...] = ()

    def without(self, broken: Mapping[str, str]) -> Survey:
        """The survey less the records of these ids (`Record.id` → reason), moved to the ledger's left_out."""
        gone = [record for record in self.records if record.id in broken]
        kept = tuple(record for record in self.records if record.id not in broken)

        def corrected(ledger: DatasetLedger) -> DatasetLedger:
            moved = [(record.key, broken[record.id]) for record in gone if record.dataset == ledger.dataset]
            left_out = tuple(sorted([*ledger.left_out, *moved]))
            return replace(ledger, trained=ledger.trained - len(moved), left_out=left_out)

        return replace(self, records=kept, ledger=Ledger(tuple(map(corrected, self.ledger.datasets))))


def survey(
    datasets: Sequence[ImageDataset],
    *,
    alignment: int,
    rounding: int,
    prompt_case: str,
    memory: FileMemory,
    report: Report | None = None,
    seed: int = 0,
    headers_only: bool = False,
) -> Survey:
    """Look at every picture of the datasets that are not disabled.

    alignment: bucket sides are multiples of this, px. rounding: decimals of aspect ratios. prompt_case: "lower" or
    "keep". seed: of random crops and aspects. headers_only: measure pictures without reading them whole; records of
    those that were never read whole have no content_hash. report(dataset, done, total) is called as pictures are
    looked at, from the calling thread. Mistakes come back as `problems`, all of them; only a file system that fails
    midway raises UserError.
    """
    active = [dataset for dataset in datasets if not dataset.disabled]
    problems = _repeated_ids(active)
    if not active:
        problems.append(Problem("datasets", "there is no picture dataset that is not disabled", "add or enable one"))
    first_of = {dataset.id: dataset for dataset in reversed(active)}
    parts = []
    try:
        for dataset in (dataset for dataset in active if dataset is first_of[dataset.id]):
            rules = rules_of(dataset, alignment, rounding)
            store = FolderStore(dataset.instance_data_dir)
            files = _Files(store, memory, _caption_rules(dataset, prompt_case), headers_only)
            parts.append(_survey_one(dataset, files, partial(_judge, dataset, rules, seed), report))
    finally:
        memory.save()
    return Survey(
        records=tuple(record for part in parts for record in part.records),
        ledger=Ledger(tuple(ledger for part in parts for ledger in part.ledger.datasets)),
        problems=(*problems, *(problem for part in parts for problem in part.problems)),
    )


def rules_of(dataset: ImageDataset, alignment: int, rounding: int) -> Rules:
    """The geometry of a dataset. Unless it says otherwise, it is cropped at random with `crop`, else at the center."""
    return Rules(
        resolution=dataset.resolution,
        resolution_type=dataset.resolution_type,
        crop=dataset.crop,
        crop_style=dataset.crop_style or ("random" if dataset.crop else "center"),
        crop_aspect=dataset.crop_aspect,
        crop_aspect_buckets=dataset.crop_aspect_buckets,
        alignment=alignment,
        rounding=rounding,
        minimum_image_size=dataset.minimum_image_size,
        maximum_image_size=dataset.maximum_image_size,
        target_downsample_size=dataset.target_downsample_size,
        minimum_aspect_ratio=dataset.minimum_aspect_ratio,
        maximum_aspect_ratio=dataset.maximum_aspect_ratio,
        max_upscale_threshold=dataset.max_upscale_threshold,
    )


def _caption_rules(dataset: ImageDataset, case: str) -> CaptionRules:
    prompts = dataset.instance_prompt
    return CaptionRules(
        strategy=dataset.caption_strategy,
        instance_prompts=() if prompts is None else (prompts,) if isinstance(prompts, str) else tuple(prompts),
        prepend=dataset.prepend_instance_prompt,
        only=dataset.only_instance_prompt,
        one_per_line=not dataset.disable_multiline_split,
        case=case,
    )


def _survey_one(
    dataset: ImageDataset,
    files: _Files,
    judge: Callable[[str, _Seen], Record | str],
    report: Report | None,
) -> Survey:
    """The survey of one dataset. judge(key, what was seen) → its record, or why it is left out."""
    try:
        listing = sort_out(files.store.list())
    except UserError as error:
        told = (replace(problem, where=f"dataset {dataset.id}: {problem.where}") for problem in error.problems)
        return Survey((), Ledger((DatasetLedger(dataset.id, 0, 0),)), tuple(told))
    files.captions.update({entry.key: entry for entry in listing.captions})
    records: list[Record] = []
    left_out: list[tuple[str, str]] = []
    uncaptioned: list[str] = []
    for done, (entry, seen) in enumerate(_looked_at(listing.pictures, files), start=1):
        outcome = judge(entry.key, seen)
        if isinstance(outcome, Record):
            records.append(outcome)
        else:
            left_out.append((_printable(entry.key), outcome))
            if dataset.missing_caption == "error" and seen.captions == Missing(outcome):
                uncaptioned.append(_printable(entry.key))
        if report is not None:
            report(dataset.id, done, len(listing.pictures))
    ledger = DatasetLedger(
        dataset=dataset.id,
        found=len(listing.pictures),
        trained=len(records),
        left_out=tuple(left_out),
        not_pictures=len(listing.captions) + len(listing.others),
        caption_files=len(listing.captions),
    )
    problems = _missing_captions(dataset, uncaptioned, dict(left_out)) or _nothing_to_train(dataset, ledger, listing)
    return Survey(tuple(records), Ledger((ledger,)), tuple(problems))


@dataclass(frozen=True)
class _Files:
    """The files of a dataset, each read at most once for as long as it does not change.

    captions: the caption files by key. headers_only: pictures are measured from their headers and not hashed.
    """

    store: FolderStore
    memory: FileMemory
    rules: CaptionRules
    headers_only: bool
    captions: dict[str, Entry] = field(default_factory=dict)

    def look(self, entry: Entry) -> _Seen:
        """What there is to know of a picture, read where it is not remembered."""
        if _printable(entry.key) != entry.key:
            return _Seen({"broken": "has a name that is not UTF-8; rename it"}, ())
        facts = self.remembered(entry) or self.read_picture(entry)
        return _Seen(facts, () if "broken" in facts else captions_of(entry.key, self.caption, self.rules))

    def is_new(self, entry: Entry) -> bool:
        """Whether a look at the picture reads a file."""
        if self.remembered(entry) is None:
            return True
        text = self.captions.get(caption_key(entry.key)) if reads_files(self.rules) else None
        return text is not None and self.memory.get(self.store.locate(text.key), text) is None

    def remembered(self, entry: Entry) -> Mapping[str, Any] | None:
        """hash (if it was ever read whole), width and height of a picture, or None when that is not known."""
        known = self.memory.get(self.store.locate(entry.key), entry)
        if known is None or "width" not in known or "height" not in known:
            return None
        return known if self.headers_only or "hash" in known else None

    def read_picture(self, entry: Entry) -> Mapping[str, Any]:
        """The same, read and remembered; or {"broken": reason}, which is not remembered."""
        from sana_tune.data.images import BrokenImage, measure  # Pillow and numpy: not before they are needed

        facts: dict[str, Any] = {}
        try:
            if self.headers_only:
                with self.store.open(entry.key) as file:
                    size = measure(file)
            else:
                data = self.store.read(entry.key)
                size = measure(data)
                facts["hash"] = content_hash(data)
        except BrokenImage as error:
            return {"broken": error.reason}
        except UserError as error:
            return {"broken": error.problems[0].what}
        facts.update(width=size.width, height=size.height)
        self.memory.put(self.store.locate(entry.key), entry, facts)
        return facts

    def caption(self, key: str) -> bytes | None:
        """The bytes of a caption file, or None when there is none."""
        entry = self.captions.get(key)
        if entry is None:
            return None
        path = self.store.locate(key)
        known = self.memory.get(path, entry)
        if known is not None and "text" in known:
            return known["text"].encode("utf-8")
        data = self.store.read(key)
        with suppress(UnicodeDecodeError):  # not remembered; the caption strategy says what is wrong with it
            self.memory.put(path, entry, {"text": data.decode("utf-8")})
        return data


@dataclass(frozen=True)
class _Seen:
    """What a look at one picture found: facts (or why it is broken) and captions (or why it has none)."""

    facts: Mapping[str, Any]
    captions: tuple[str, ...] | Missing


def _looked_at(pictures: Sequence[Entry], files: _Files) -> Iterator[tuple[Entry, _Seen]]:
    """Each picture with what is found, in order. A few threads read what is new, and it is remembered as it goes."""
    saved = time.monotonic()
    with ThreadPoolExecutor(_WORKERS, thread_name_prefix="survey") as workers:
        for start in range(0, len(pictures), _CHUNK):
            chunk = pictures[start : start + _CHUNK]
            new = [entry for entry in chunk if files.is_new(entry)]
            read = dict(zip(new, workers.map(files.look, new), strict=True)) if new else {}
            for entry in chunk:
                yield entry, read[entry] if entry in read else files.look(entry)
            if time.monotonic() - saved > _SAVE_EVERY_S:
                files.memory.save()
                saved = time.monotonic()


def _judge(dataset: ImageDataset, rules: Rules, seed: int, key: str, seen: _Seen) -> Record | str:
    """The record of a picture, or why it is left out."""
    facts, captions = seen.facts, seen.captions
    if "broken" in facts:
        return facts["broken"]
    size = Size(facts["width"], facts["height"])
    placement = place(size, rules, chance_of(seed, dataset.id, key) if rules.needs_chance else None)
    if reason := unfit(size, rules, placement):
        return reason
    if isinstance(captions, Missing):
        if dataset.missing_caption != "empty":
            return captions.reason
        captions = ("",)
    return Record(
        dataset=dataset.id,
        key=key,
        width_px=size.width,
        height_px=size.height,
        captions=captions,
        content_hash=facts.get("hash"),
        placement=placement,
        role=Role.REGULARISE if dataset.is_regularisation_data else Role.TRAIN,
    )


def _repeated_ids(datasets: Sequence[ImageDataset]) -> list[Problem]:
    counts = Counter(dataset.id for dataset in datasets)
    return [
        Problem(f"dataset {name}", f"every id must be unique; {count} datasets have it", "rename all but one")
        for name, count in counts.items()
        if count > 1
    ]


def _missing_captions(dataset: ImageDataset, uncaptioned: Sequence[str], reasons: Mapping[str, str]) -> list[Problem]:
    """One problem for all pictures without a caption."""
    if not uncaptioned:
        return []
    shown = "; ".join(f"{key}: {reasons[key]}" for key in uncaptioned[:_NAMES_SHOWN])
    more = f"; and {len(uncaptioned) - _NAMES_SHOWN} more" if len(uncaptioned) > _NAMES_SHOWN else ""
    count = f"{len(uncaptioned)} " + ("pictures have none" if len(uncaptioned) > 1 else "picture has none")
    return [
        Problem(
            f"dataset {dataset.id}: {dataset.instance_data_dir}",
            f"every picture needs a caption (caption_strategy {dataset.caption_strategy}); {count}: {shown}{more}",
            'add the captions, or set "missing_caption" to "skip" (leave these out) or "empty" (train without)',
        )
    ]


def _nothing_to_train(dataset: ImageDataset, ledger: DatasetLedger, listing: Listing) -> list[Problem]:
    """The problem of a dataset without a single usable picture."""
    if ledger.trained:
        return []
    where = f"dataset {dataset.id}: {dataset.instance_data_dir}"
    if not ledger.found:
        others = f"{ledger.not_pictures} other files" if ledger.not_pictures else "it is empty"
        endings = " ".join(sorted(PICTURE_ENDINGS))
        return [Problem(where, f"the folder holds no pictures ({others})", f"put pictures there: {endings}")]
    shown = "; ".join(f"{key}: {reason}" for key, reason in ledger.left_out[:_NAMES_SHOWN])
    more = f"; and {ledger.found - _NAMES_SHOWN} more" if ledger.found > _NAMES_SHOWN else ""
    return [Problem(where, f"all {ledger.found} pictures are left out: {shown}{more}", "see the reasons above")]


def _printable(key: str) -> str:
    """The key, with bytes that are no UTF-8 made visible."""
    return key if key.isascii() else key.encode("utf-8", "backslashreplace").decode("utf-8")
