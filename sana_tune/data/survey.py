"""List, measure and caption every picture: datasets → records, and a ledger that balances. No torch.

Reads headers and hashes bytes, or reads headers alone, and only of files it does not remember by path, size and
modification time. It decodes nothing, so a picture whose header is fine and whose body is torn shows when it is
encoded: `Survey.without` takes it out then.
"""

from __future__ import annotations

import os
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING, Any, BinaryIO

from sana_tune.config.datasets import EvalDataset, ImageDataset
from sana_tune.config.values import WHITE
from sana_tune.data.captions import CaptionRules, Missing, caption_key, captions_of, reads_files
from sana_tune.data.geometry import Placement, Rules, Size, place, unfit
from sana_tune.data.memory import FileMemory
from sana_tune.data.records import Record, Role, chance_of, content_hash, sampled
from sana_tune.data.remote import Resting
from sana_tune.data.sources import PICTURE_ENDINGS, Listing
from sana_tune.data.stores import listing_of, open_store, table_of
from sana_tune.data.tables import TableCaptions
from sana_tune.errors import Problem, UserError
from sana_tune.log import log
from sana_tune.store import Entry, FolderStore, Store, StoreLost

if TYPE_CHECKING:
    from sana_tune.data.images import BrokenImage, Header

Report = Callable[[str, int, int], None]

_WORKERS = min(8, 2 * (os.cpu_count() or 1))
_WORKERS_FAR = 16  # where a read waits for a network
_CHUNK = 512  # pictures per hand-over to the workers
_FEW = 16  # headers that are read one by one before it is asked how long they were waited for
_WAIT_S, _PATIENCE_S = 0.001, 0.03  # waiting for a header, on the average and in all, above which threads read them
_SAVE_EVERY_S = 20.0
_NAMES_SHOWN = 5
_FAULTS_SHOWN = 20  # of a strict run
_HEADER = frozenset({"width", "height", "alpha"})
_NO_FILTERS: Mapping[str, Sequence[str]] = {}
_NO_STORES: Mapping[str, Store] = {}


@dataclass(frozen=True)
class DatasetLedger:
    """What became of the files of one dataset.

    found:        pictures. trained: those that are trained, or held out (role "eval"). left_out: (key, reason) of the
    others. not_drawn: those that max_num_samples passes over, which were not looked at. held_out: keys of those that
    eval_split takes out of training.
    merged:       (key, its own size, size of the bucket that it was put into) of pictures of small buckets.
    masks:        masks found; masks_resized: those of another size than their picture.
    not_pictures: the other files; caption_files of them are captions.
    """

    dataset: str
    found: int
    trained: int
    left_out: tuple[tuple[str, str], ...] = ()
    not_pictures: int = 0
    caption_files: int = 0
    role: str = Role.TRAIN.value
    not_drawn: int = 0
    merged: tuple[tuple[str, str, str], ...] = ()
    masks: int = 0
    masks_resized: int = 0
    held_out: tuple[str, ...] = ()

    def balances(self) -> bool:
        """found = trained + held out + left out + not drawn."""
        return self.found == self.trained + len(self.held_out) + len(self.left_out) + self.not_drawn


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
            left_out, lost = tuple(sorted([*ledger.left_out, *moved])), {key for key, _ in moved}
            held_out = tuple(key for key in ledger.held_out if key not in lost)
            trained = ledger.trained - len(moved) + len(ledger.held_out) - len(held_out)
            return replace(ledger, trained=trained, left_out=left_out, held_out=held_out)

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
    filters: Mapping[str, Sequence[str]] = _NO_FILTERS,
    strict: bool = False,
    stores: Mapping[str, Store] = _NO_STORES,
) -> Survey:
    """Look at every picture of the datasets that are not disabled.

    alignment: bucket sides are multiples of this, px. rounding: decimals of aspect ratios. prompt_case: "lower" or
    "keep". seed: of random crops and aspects. headers_only: measure pictures without reading them whole; records of
    those that were never read whole have no content_hash. filters: of captions, by dataset. strict: a picture that is
    left out for damage or for want of a caption is a problem. stores: by dataset, those that
    are open already. report(dataset, done, total) is called as pictures are
    looked at, from the calling thread. Mistakes come back as `problems`, all of them; only a place that is lost midway
    (a file system, a bucket, a server) raises UserError.
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
            store = stores.get(dataset.id) or open_store(dataset)
            files = _Files(
                store, memory, _caption_rules(dataset, prompt_case, filters.get(dataset.id, ())), headers_only
            )
            parts.append(_survey_one(dataset, files, _Judge(dataset, rules, seed), report, strict, seed))
    finally:
        memory.save()
    return Survey(
        records=tuple(record for part in parts for record in part.records),
        ledger=Ledger(tuple(ledger for part in parts for ledger in part.ledger.datasets)),
        problems=(*problems, *(problem for part in parts for problem in part.problems)),
    )


def role_of(dataset: ImageDataset) -> Role:
    """What the pictures of a dataset are for."""
    if isinstance(dataset, EvalDataset):
        return Role.EVAL
    return Role.REGULARISE if dataset.is_regularisation_data else Role.TRAIN


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


def _caption_rules(dataset: ImageDataset, case: str, filters: Sequence[str]) -> CaptionRules:
    prompts = dataset.instance_prompt
    return CaptionRules(
        strategy=dataset.caption_strategy,
        instance_prompts=() if prompts is None else (prompts,) if isinstance(prompts, str) else tuple(prompts),
        prepend=dataset.prepend_instance_prompt,
        only=dataset.only_instance_prompt,
        one_per_line=not dataset.disable_multiline_split,
        case=case,
        filters=tuple(filters),
        shuffle=dataset.caption_shuffle,
    )


def _survey_one(
    dataset: ImageDataset,
    files: _Files,
    judge: Callable[[str, _Seen], Record | str],
    report: Report | None,
    strict: bool,
    seed: int,
) -> Survey:
    """The survey of one dataset. judge(key, what was seen) → its record, or why it is left out."""
    try:
        listing = listing_of(files.store)
        files = files.with_table(dataset, listing)
    except UserError as error:
        told = (replace(problem, where=f"dataset {dataset.id}: {problem.where}") for problem in error.problems)
        return Survey((), Ledger((DatasetLedger(dataset.id, 0, 0),)), tuple(told))
    files.captions.update({entry.key: entry for entry in listing.captions})
    records: list[Record] = []
    left_out: list[tuple[str, str]] = []
    uncaptioned: list[str] = []
    faulty: list[tuple[str, str]] = []
    pictures = sampled(listing.pictures, lambda entry: entry.key, dataset.max_num_samples, seed, dataset.id)
    for done, (entry, seen) in enumerate(_looked_at(pictures, files), start=1):
        outcome = judge(entry.key, seen)
        if isinstance(outcome, Record):
            records.append(outcome)
        else:
            left_out.append((_printable(entry.key), outcome))
            if dataset.missing_caption == "error" and seen.captions == Missing(outcome):
                uncaptioned.append(_printable(entry.key))
            elif strict and ("broken" in seen.facts or seen.captions == Missing(outcome)):
                faulty.append(left_out[-1])
        if report is not None:
            report(dataset.id, done, len(pictures))
    ledger = DatasetLedger(
        dataset=dataset.id,
        found=len(listing.pictures),
        trained=len(records),
        left_out=tuple(left_out),
        not_pictures=len(listing.captions) + len(listing.others),
        caption_files=len(listing.captions),
        role=role_of(dataset).value,
        not_drawn=len(listing.pictures) - len(pictures),
    )
    problems = [*_missing_captions(dataset, uncaptioned, dict(left_out)), *faults(dataset, faulty)]
    problems = problems or _nothing_to_train(dataset, ledger, listing)
    return Survey(tuple(records), Ledger((ledger,)), tuple(problems))


@dataclass(frozen=True)
class _Files:
    """The files of a dataset, each read at most once for as long as it does not change.

    captions: the caption files by key. headers_only: pictures are measured from their headers and not hashed.
    sizes: of pictures, as a table tells them.
    """

    store: Store
    memory: FileMemory
    rules: CaptionRules
    headers_only: bool
    captions: dict[str, Entry] = field(default_factory=dict)
    sizes: Mapping[str, Size] = field(default_factory=dict)

    def with_table(self, dataset: ImageDataset, listing: Listing) -> _Files:
        """The same with the table of captions and sizes that the dataset asks for. UserError when it cannot be read."""
        table = table_of(dataset, self.store, [entry.key for entry in listing.pictures])
        if table is None:
            return self
        _tell_orphans(dataset, table)
        sizes = table.sizes if self.headers_only and dataset.metadata_backend == "parquet" else {}
        return replace(self, rules=replace(self.rules, table=table), sizes=sizes)

    def look(self, entry: Entry) -> _Seen:
        """What there is to know of a picture, read where it is not remembered."""
        if _printable(entry.key) != entry.key:
            return _Seen({"broken": "has a name that is not UTF-8; rename it"}, ())
        facts = self.remembered(entry) or self.read_picture(entry)
        return _Seen(facts, () if "broken" in facts else captions_of(entry.key, self.caption, self.rules))

    def is_new(self, entry: Entry) -> bool:
        """Whether a look at the picture reads a file."""
        if self.remembered(entry) is None:
            return entry.key not in self.sizes
        text = self.captions.get(caption_key(entry.key)) if reads_files(self.rules) else None
        return text is not None and self.memory.get(self.store.locate(text.key), text) is None

    def remembered(self, entry: Entry) -> Mapping[str, Any] | None:
        """hash (if it was ever read whole), width, height and alpha of a picture, or None when that is not known."""
        known = self.memory.get(self.store.locate(entry.key), entry)
        if known is None or not _HEADER <= known.keys():
            return None
        return known if self.headers_only or "hash" in known else None

    def read_picture(self, entry: Entry) -> Mapping[str, Any]:
        """The same, read and remembered; or {"broken": reason}, which is not remembered."""
        read_header, broken = _header_reader()
        if (size := self.sizes.get(entry.key)) is not None:
            return {"width": size.width, "height": size.height, "alpha": False}
        facts: dict[str, Any] = {}
        try:
            if self.headers_only:
                with self.store.open(entry.key) as file:
                    header = read_header(file)
            else:
                data = self.store.read(entry.key)
                header = read_header(data)
                facts["hash"] = content_hash(data)
            if entry.size_bytes < 0:  # it was downloaded just now
                entry = self.store.entry(entry.key)
        except broken as error:
            return {"broken": error.reason}
        except StoreLost:
            raise
        except UserError as error:
            return {"broken": error.problems[0].what}
        facts.update(width=header.size.width, height=header.size.height, alpha=header.alpha)
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
    """Each picture with what is found, in order. What is new is read, and remembered as it goes."""
    saved = time.monotonic()
    with _Readers(files) as readers:
        for start in range(0, len(pictures), _CHUNK):
            chunk = pictures[start : start + _CHUNK]
            new = [entry for entry in chunk if files.is_new(entry)]
            read = dict(zip(new, readers.look(new), strict=True)) if new else {}
            for entry in chunk:
                yield entry, read[entry] if entry in read else files.look(entry)
            if time.monotonic() - saved > _SAVE_EVERY_S:
                files.memory.save()
                saved = time.monotonic()


@cache
def _header_reader() -> tuple[Callable[[bytes | BinaryIO], Header], type[BrokenImage]]:
    """What reads headers, and what it raises: Pillow and numpy are not loaded before they are needed."""
    from sana_tune.data.images import BrokenImage, read_header

    return read_header, BrokenImage


class _Readers:
    """Looks at new files, by a few threads where that is faster; a context.

    A header that the system has in its cache is a matter of some Python, in which threads only hinder each other: so
    headers in a folder are read one by one until it is the disk that is waited for.
    """

    def __init__(self, files: _Files):
        self._files = files
        self._patience_s = _PATIENCE_S if files.headers_only and isinstance(files.store, FolderStore) else -1.0
        count = _WORKERS_FAR if files.store.far_away else _WORKERS
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="survey")

    def __enter__(self) -> _Readers:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and isinstance(self._files.store, Resting):
            self._files.store.rest.hurry()  # who waits to try again must not be waited for
        self._threads.shutdown(wait=True, cancel_futures=True)

    def look(self, entries: Sequence[Entry]) -> Iterator[_Seen]:
        """What is found of each entry, in order."""
        done = 0
        while self._patience_s >= 0 and done < len(entries):
            few = entries[done : done + _FEW]
            began, worked, waits = time.perf_counter(), time.thread_time(), _waits()
            yield from [self._files.look(entry) for entry in few]
            waited = (time.perf_counter() - began) - (time.thread_time() - worked)
            waited = 0.0 if _waits() == waits else waited  # other programs had the processor
            self._patience_s = min(_PATIENCE_S, self._patience_s + _WAIT_S * len(few) - waited)
            done += len(few)
        yield from self._threads.map(self._files.look, entries[done:])


def _waits() -> float:
    """How often this thread gave way because it had to wait; where that is not known, always another number."""
    if sys.platform != "linux":
        return time.perf_counter()
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw


class _Judge:
    """What becomes of each picture of a dataset. Pictures of one size are placed once, unless chance has a say."""

    def __init__(self, dataset: ImageDataset, rules: Rules, seed: int):
        self._dataset, self._rules, self._seed = dataset, rules, seed
        self._role = role_of(dataset)
        self._ground = dataset.alpha_ground if dataset.alpha_ground != WHITE else None
        self._placed: dict[Size, tuple[Placement, str | None]] = {}

    def __call__(self, key: str, seen: _Seen) -> Record | str:
        """The record of a picture, or why it is left out."""
        facts, captions = seen.facts, seen.captions
        if "broken" in facts:
            return facts["broken"]
        size = Size(facts["width"], facts["height"])
        if reason := _too_small(self._dataset, size):
            return reason
        placement, reason = self._place(size, key)
        if reason:
            return reason
        if isinstance(captions, Missing):
            if self._dataset.missing_caption != "empty":
                return captions.reason
            captions = ("",)
        return Record(
            dataset=self._dataset.id,
            key=key,
            width_px=size.width,
            height_px=size.height,
            captions=captions,
            content_hash=facts.get("hash"),
            placement=placement,
            role=self._role,
            ground=self._ground if facts.get("alpha") else None,
        )

    def _place(self, size: Size, key: str) -> tuple[Placement, str | None]:
        """Where a picture goes, and why it does not fit there."""
        if self._rules.needs_chance:
            placement = place(size, self._rules, chance_of(self._seed, self._dataset.id, key))
            return placement, unfit(size, self._rules, placement)
        if (known := self._placed.get(size)) is None:
            placement = place(size, self._rules)
            known = self._placed[size] = placement, unfit(size, self._rules, placement)
        return known


def _too_small(dataset: ImageDataset, size: Size) -> str | None:
    """Why a picture of a Hugging Face dataset does not pass its filter_func, or None."""
    least = dataset.huggingface
    if least is None or dataset.type != "huggingface":
        return None
    if size.width >= least.min_width and size.height >= least.min_height:
        return None
    return f"is {size} px, smaller than filter_func's {least.min_width}x{least.min_height}"


def _tell_orphans(dataset: ImageDataset, table: TableCaptions) -> None:
    """Say which rows of a table belong to no picture."""
    if table.orphans:
        count, few = len(table.orphans), ", ".join(table.orphans[:_NAMES_SHOWN])
        text = "dataset %s: %d rows of %s belong to no picture: %s%s"
        log.warning(text, dataset.id, count, table.table, few, " …" if count > _NAMES_SHOWN else "")


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
            f"dataset {dataset.id}: {dataset.source}",
            f"every picture needs a caption (caption_strategy {dataset.caption_strategy}); {count}: {shown}{more}",
            'add the captions, or set "missing_caption" to "skip" (leave these out) or "empty" (train without)',
        )
    ]


def strict_problems(
    datasets: Sequence[ImageDataset], records: Sequence[Record], broken: Mapping[str, str]
) -> list[Problem]:
    """The problems of a strict run with pictures that cannot be decoded or encoded (`Record.id` → reason)."""
    gone = [record for record in records if record.id in broken]
    return [
        problem
        for dataset in datasets
        for problem in faults(dataset, [(each.key, broken[each.id]) for each in gone if each.dataset == dataset.id])
    ]


def faults(dataset: ImageDataset, faulty: Sequence[tuple[str, str]]) -> list[Problem]:
    """The problem of a strict run whose pictures (key, reason) would be left out for damage or want of a caption."""
    if not faulty:
        return []
    shown = "; ".join(f"{key}: {reason}" for key, reason in faulty[:_FAULTS_SHOWN])
    more = f"; and {len(faulty) - _FAULTS_SHOWN} more" if len(faulty) > _FAULTS_SHOWN else ""
    count = f"{len(faulty)} pictures" if len(faulty) > 1 else "1 picture"
    return [
        Problem(
            f"dataset {dataset.id}: {dataset.source}",
            f"strict is on, and {count} would be left out: {shown}{more}",
            "mend or remove them (`sana_tune check --left-out` lists the files), or set strict to false",
        )
    ]


def _nothing_to_train(dataset: ImageDataset, ledger: DatasetLedger, listing: Listing) -> list[Problem]:
    """The problem of a dataset without a single usable picture."""
    if ledger.trained:
        return []
    where = f"dataset {dataset.id}: {dataset.source}"
    if not ledger.found:
        others = f"{ledger.not_pictures} other files" if ledger.not_pictures else "it is empty"
        endings = " ".join(sorted(PICTURE_ENDINGS))
        places = {"local": "the folder", "aws": "the bucket's folder", "csv": "the table"}
        place = places.get(dataset.type, "the dataset")
        return [Problem(where, f"{place} holds no pictures ({others})", f"put pictures there: {endings}")]
    shown = "; ".join(f"{key}: {reason}" for key, reason in ledger.left_out[:_NAMES_SHOWN])
    more = f"; and {ledger.found - _NAMES_SHOWN} more" if ledger.found > _NAMES_SHOWN else ""
    return [Problem(where, f"all {ledger.found} pictures are left out: {shown}{more}", "see the reasons above")]


def _printable(key: str) -> str:
    """The key, with bytes that are no UTF-8 made visible."""
    return key if key.isascii() else key.encode("utf-8", "backslashreplace").decode("utf-8")
