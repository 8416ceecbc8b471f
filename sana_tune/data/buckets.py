"""Records → buckets: pictures of one dataset and one size, which can share a micro-batch. Pure, no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sana_tune.config.datasets import ImageDataset
from sana_tune.data.geometry import Size
from sana_tune.data.records import Record, Role


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
    """The buckets of all datasets: by dataset in the given order, then by width, height and role."""
    by_place: dict[tuple[str, Size, Role], list[int]] = {}
    for index, record in enumerate(records):
        by_place.setdefault((record.dataset, record.placement.target, record.role), []).append(index)
    return tuple(
        Bucket(
            dataset.id,
            size,
            tuple(by_place[name, size, role]),
            dataset.train_batch_size,
            dataset.repeats,
            role,
        )
        for dataset in datasets
        for name, size, role in sorted(by_place)
        if name == dataset.id
    )
