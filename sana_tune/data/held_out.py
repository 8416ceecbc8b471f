"""Pictures that are held out: those that `eval_split` takes out of training, and those that are measured. Pure.

Which ones is a function of the seed, the dataset and the picture's name: pictures that are added or taken away change
little, and a look at headers alone comes to the same.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from sana_tune.config.datasets import ImageDataset
from sana_tune.data.records import Record, Role, sampled
from sana_tune.data.survey import Ledger, Survey, role_of
from sana_tune.errors import Problem


def with_split(surveyed: Survey, datasets: Sequence[ImageDataset], seed: int) -> Survey:
    """The survey with the pictures of each dataset that eval_split holds out. Too large a split is a problem."""
    held: set[str] = set()
    problems: list[Problem] = []
    for dataset in datasets:
        if not dataset.eval_split or role_of(dataset) is not Role.TRAIN:
            continue
        own = [record for record in surveyed.records if record.dataset == dataset.id]
        if not own:
            continue
        count = split_of(dataset.eval_split, len(own))
        if count >= len(own):
            problems.append(_nothing_left(dataset, count, len(own)))
        else:
            held |= {record.id for record in sampled(own, lambda each: each.key, count, seed, f"eval {dataset.id}")}
    if not held:
        return replace(surveyed, problems=(*surveyed.problems, *problems))
    records = tuple(replace(each, role=Role.EVAL) if each.id in held else each for each in surveyed.records)
    keys: dict[str, list[str]] = {}
    for record in records:
        if record.id in held:
            keys.setdefault(record.dataset, []).append(record.key)
    ledger = Ledger(
        tuple(
            replace(part, trained=part.trained - len(own), held_out=tuple(own))
            if (own := keys.get(part.dataset))
            else part
            for part in surveyed.ledger.datasets
        )
    )
    return replace(surveyed, records=records, ledger=ledger, problems=(*surveyed.problems, *problems))


def split_of(split: float, pictures: int) -> int:
    """How many of so many pictures a split holds out: its number, or its share, at least one."""
    return int(split) if split >= 1 else max(1, round(split * pictures))


def measured(records: Sequence[Record], most: int, seed: int, only: Collection[str] = ()) -> tuple[Record, ...]:
    """The held-out pictures whose loss is measured: at most so many of each dataset (0 = all), in their order.

    only: ids of the datasets that count; () = all.
    """
    found: list[Record] = []
    for name in dict.fromkeys(record.dataset for record in records if record.role is Role.EVAL):
        if not only or name in only:
            own = [record for record in records if record.dataset == name and record.role is Role.EVAL]
            found += sampled(own, lambda each: each.key, most, seed, f"measured {name}")
    return tuple(found)


def companions(records: Sequence[Record], count: int, seed: int, changing: Collection[str] = ()) -> tuple[Record, ...]:
    """As many trained pictures to compare held-out ones with, in their order; fewer where there are not so many.

    changing: datasets whose crops are drawn anew in each epoch: no picture of theirs stays the same.
    """
    own = [record for record in records if record.role is Role.TRAIN and record.dataset not in changing]
    return tuple(sampled(own, lambda each: each.id, count, seed, "companions")) if count else ()


def _nothing_left(dataset: ImageDataset, count: int, there: int) -> Problem:
    pictures = "1 picture" if there == 1 else f"{there} pictures"
    what = f"must leave pictures to train on; eval_split {dataset.eval_split:g} would hold out {count} of {pictures}"
    return Problem(f"dataset {dataset.id}: eval_split", what, "lower it, or add pictures")
