"""Records → buckets: pictures of one dataset and one size, which can share a micro-batch. Pure, no torch.

A bucket is small when its pictures, over all passes of an epoch, do not fill one micro-batch. What becomes of it is
settled before anything is cached: filled from itself, merged into the one of the nearest aspect, dropped, or an error.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import log

from sana_tune.config.datasets import EvalDataset, ImageDataset
from sana_tune.data.geometry import Rules, Size, place_into, unfit
from sana_tune.data.records import Record, Role, chance_of
from sana_tune.data.survey import DatasetLedger, Ledger, Survey, rules_of
from sana_tune.errors import Problem


@dataclass(frozen=True)
class Bucket:
    """The pictures of one dataset, size and role. A bucket smaller than a batch is filled from itself.

    records:    indices into `Survey.records`, at least one.
    batch_size: pictures per micro-batch. repeats: extra passes per epoch.
    """

    dataset: str
    size: Size
    records: tuple[int, ...]
    batch_size: int
    repeats: int = 0
    role: Role = Role.TRAIN

    @property
    def passes(self) -> int:
        """How often an epoch sees each picture."""
        return self.repeats + 1

    @property
    def visits(self) -> int:
        """Pictures per epoch that count: each one `passes` times."""
        return len(self.records) * self.passes

    @property
    def micro_batches(self) -> int:
        """Micro-batches per epoch, the last one filled up."""
        return -(-self.visits // self.batch_size)

    @property
    def filled(self) -> int:
        """Pictures per epoch shown once more to complete the last micro-batch."""
        return self.micro_batches * self.batch_size - self.visits


def make_buckets(records: Sequence[Record], datasets: Sequence[ImageDataset]) -> tuple[Bucket, ...]:
    """The buckets of all datasets: by dataset in the given order, then by width, height and role.

    Held-out pictures (Role.EVAL) have buckets too, which no epoch shows: see `trained`. They are never repeated.
    """
    by_place: dict[tuple[str, Size, Role], list[int]] = {}
    for index, record in enumerate(records):
        by_place.setdefault((record.dataset, record.placement.target, record.role), []).append(index)
    return tuple(
        Bucket(
            dataset.id,
            size,
            tuple(by_place[name, size, role]),
            dataset.train_batch_size,
            0 if role is Role.EVAL else dataset.repeats,
            role,
        )
        for dataset in datasets
        for name, size, role in sorted(by_place)
        if name == dataset.id
    )


def trained(buckets: Sequence[Bucket]) -> tuple[Bucket, ...]:
    """The buckets that an epoch shows: all but the held-out ones."""
    return tuple(bucket for bucket in buckets if bucket.role is not Role.EVAL)


# ---- small buckets ----


def settle(surveyed: Survey, datasets: Sequence[ImageDataset], *, alignment: int, rounding: int, seed: int) -> Survey:
    """The survey with what `small_buckets` asks for done: merged pictures placed anew, dropped ones in the ledger.

    alignment, rounding, seed: as the survey was made with. "fill" changes nothing, and held-out pictures are left
    alone. Problems of datasets with "error", and of those that lose all they have, are added.
    """
    for dataset in datasets:
        if isinstance(dataset, EvalDataset) or dataset.small_buckets == "fill":
            continue
        counts = Counter(record.placement.target for record in surveyed.records if _is_trained(record, dataset))
        small = {size: count for size, count in sorted(counts.items()) if _is_small(count, dataset)}
        if not small:
            continue
        if dataset.small_buckets == "merge":
            into = merged(counts, dataset)
            surveyed = _with_merged(surveyed, dataset, into, rules_of(dataset, alignment, rounding), seed)
        elif dataset.small_buckets == "drop":
            surveyed = _without_small(surveyed, dataset, small)
        else:
            surveyed = replace(surveyed, problems=(*surveyed.problems, _too_small(dataset, small)))
    return surveyed


def merged(counts: Mapping[Size, int], dataset: ImageDataset) -> dict[Size, Size]:
    """Size → the size that its pictures are put into, for every bucket that is merged away.

    The smallest of the small buckets goes first, into the one of the nearest aspect (by ratio; of two as near, the
    larger one), which may be small itself and goes further then; until none is small, or one is left.
    """
    left = dict(counts)
    home = {size: size for size in counts}
    while len(left) > 1:
        small = [size for size in left if _is_small(left[size], dataset)]
        if not small:
            break
        one = min(small, key=lambda size: (left[size], size))
        others = [size for size in left if size != one]
        nearest = min(others, key=lambda size: (round(_apart(size, one), 9), -left[size], size))
        left[nearest] += left.pop(one)
        home = {size: nearest if into == one else into for size, into in home.items()}
    return {size: into for size, into in home.items() if into != size}


def _is_trained(record: Record, dataset: ImageDataset) -> bool:
    """Whether a picture is of this dataset and not held out of it."""
    return record.dataset == dataset.id and record.role is not Role.EVAL


def _is_small(pictures: int, dataset: ImageDataset) -> bool:
    return pictures * (dataset.repeats + 1) < dataset.train_batch_size


def _apart(one: Size, other: Size) -> float:
    """How far two aspects are from each other: 2:1 is as far from 1:1 as 1:1 is from 1:2."""
    return abs(log(one.width * other.height / (one.height * other.width)))


def _with_merged(surveyed: Survey, dataset: ImageDataset, into: Mapping[Size, Size], rules: Rules, seed: int) -> Survey:
    """The survey with the pictures of small buckets placed anew; one that does not bear that is left out."""
    records: list[Record] = []
    moved: list[tuple[str, str, str]] = []
    unfit_now: dict[str, str] = {}
    for record in surveyed.records:
        target = into.get(record.placement.target) if _is_trained(record, dataset) else None
        if target is None:
            records.append(record)
            continue
        size = Size(record.width_px, record.height_px)
        chance = chance_of(seed, dataset.id, record.key) if rules.needs_chance else None
        placed = replace(record, placement=place_into(size, target, rules, chance))
        records.append(placed)
        if reason := unfit(size, rules, placed.placement):
            unfit_now[record.id] = f"{reason} (its bucket {record.placement.target} was merged into {target})"
        else:
            moved.append((record.key, str(record.placement.target), str(target)))

    def told(ledger: DatasetLedger) -> DatasetLedger:
        return replace(ledger, merged=tuple(moved)) if ledger.dataset == dataset.id else ledger

    ledger = Ledger(tuple(told(part) for part in surveyed.ledger.datasets))
    return replace(surveyed, records=tuple(records), ledger=ledger).without(unfit_now)


def _without_small(surveyed: Survey, dataset: ImageDataset, small: Mapping[Size, int]) -> Survey:
    """The survey less the pictures of small buckets."""
    gone = {
        record.id: f"its bucket {record.placement.target} has {_pictures(small[record.placement.target])}, fewer than "
        f"train_batch_size {dataset.train_batch_size} (small_buckets drop)"
        for record in surveyed.records
        if _is_trained(record, dataset) and record.placement.target in small
    }
    left = surveyed.without(gone)
    if any(_is_trained(record, dataset) for record in left.records):
        return left
    what = (
        f"every bucket is smaller than a batch of {dataset.train_batch_size}, and small_buckets is drop: {_few(small)}"
    )
    problem = Problem(f"dataset {dataset.id}", what, "nothing is left to train: set small_buckets to fill or merge")
    return replace(left, problems=(*left.problems, problem))


def _too_small(dataset: ImageDataset, small: Mapping[Size, int]) -> Problem:
    """All small buckets of a dataset whose small_buckets is error."""
    batch, passes = dataset.train_batch_size, dataset.repeats + 1
    needed = max(-(-batch // count) for count in small.values()) - 1
    times = f" shown {passes} times" if passes > 1 else ""
    what = f"every bucket must fill a batch of {batch} (small_buckets error); these do not: {_few(small)}{times}"
    fix = (
        f"add pictures of these shapes, set repeats to {needed} or train_batch_size to {min(small.values()) * passes}, "
        "or set small_buckets to fill, merge or drop"
    )
    return Problem(f"dataset {dataset.id}", what, fix)


def _few(small: Mapping[Size, int]) -> str:
    return ", ".join(f"{size} ({_pictures(count)})" for size, count in small.items())


def _pictures(count: int) -> str:
    return f"{count} picture{'s' * (count != 1)}"
