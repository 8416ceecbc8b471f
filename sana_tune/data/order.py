"""The order of micro-batches, as a function of position: (buckets, seed, index) → pictures. Pure, no torch.

There is no sampler and no state: any micro-batch of any epoch is worked out on its own, in a time that does
not depend on how many there are. What is shuffled is never laid out; a keyed permutation is asked for one
place.

An epoch is arranged in three layers, each exact in its counts:

1. **Datasets** (timeline.py). Dataset d comes with weight w_d and has M_d micro-batches: it would run dry at M_d / w_d.
   These times cut the epoch into phases. In a phase every dataset that is not dry has its share by weight, at the
   end of every slice of about 64 micro-batches too; inside a slice the datasets are shuffled.
2. **Rounds of a dataset.** Its micro-batches come round by round, one pass over its pictures each; so with repeats,
   all pictures are seen once before any is seen again. Inside a round the buckets' micro-batches are shuffled.
3. **Pictures of a bucket.** Each pass is a shuffle of its own; micro-batches are cut from the passes one
   after another. The last one is filled up from a further pass, with pictures it does not have yet as far as
   there are any.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import count, islice

from sana_tune.data.buckets import Bucket
from sana_tune.data.position import permuted
from sana_tune.data.timeline import Timeline, Window, find


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch on its way.

    index:   its number in the run, from 0. epoch: the number of its epoch, from 0.
    bucket:  index into the order's buckets. records: indices into `Survey.records`, one per sample.
    """

    index: int
    epoch: int
    bucket: int
    records: tuple[int, ...]

    @property
    def batch_size(self) -> int:
        return len(self.records)


class Order:
    """The stream of micro-batches of a run.

    buckets: at least one, none of them held out. weights: dataset → probability, above 0; a dataset not named has 1.
    mode: "auto-weighting": probability × micro-batches per epoch, so that with equal probabilities all
    datasets are mixed evenly over the epoch; "uniform": probability alone, so that datasets take turns until
    they run dry.
    windows: dataset → when it is shown; one not named always is. per_step: micro-batches of an optimizer step, over
    all ranks, in which the windows' steps are counted.
    """

    def __init__(
        self,
        buckets: Sequence[Bucket],
        weights: Mapping[str, float],
        mode: str,
        seed: int,
        windows: Mapping[str, Window] | None = None,
        per_step: int = 1,
    ):
        self.buckets = tuple(buckets)
        self._seed = seed
        self.timeline = timeline_of(buckets, weights, mode, seed, windows, per_step)
        self._streams = [_Stream(name, buckets) for name in names_of(buckets)]

    @property
    def micro_batches_per_epoch(self) -> int:
        """M: micro-batches in the first epoch, over all datasets shown in it, filled ones included."""
        return self.timeline.stretches[0].epoch_length

    def micro_batch(self, index: int) -> MicroBatch:
        """Micro-batch number `index` of the run. Epochs follow each other without a gap."""
        epoch, dataset, turn = self.timeline.at(index)
        bucket, records = self._streams[dataset].batch(turn, (self._seed, epoch))
        return MicroBatch(index, epoch, bucket, records)


def names_of(buckets: Sequence[Bucket]) -> list[str]:
    """The datasets of the buckets, in order: the numbers of a timeline."""
    return list(dict.fromkeys(bucket.dataset for bucket in buckets))


def timeline_of(
    buckets: Sequence[Bucket],
    weights: Mapping[str, float],
    mode: str,
    seed: int,
    windows: Mapping[str, Window] | None = None,
    per_step: int = 1,
) -> Timeline:
    """When which dataset of these buckets comes; see `Order` for what is asked."""
    if not buckets:
        raise ValueError("an order needs at least one bucket")
    names = names_of(buckets)
    counts = [sum(bucket.micro_batches for bucket in buckets if bucket.dataset == name) for name in names]
    shares = [Fraction(str(weights.get(name, 1.0))) for name in names]
    shown = [(windows or {}).get(name, Window()) for name in names]
    return Timeline(counts, shares, mode, seed, shown, per_step)


class _Stream:
    """The micro-batches of one dataset, round by round."""

    def __init__(self, name: str, buckets: Sequence[Bucket]):
        self._name = name
        self._numbers = [number for number, bucket in enumerate(buckets) if bucket.dataset == name]
        self._buckets = [buckets[number] for number in self._numbers]
        self._rounds = max(bucket.passes for bucket in self._buckets)
        self.micro_batches = sum(bucket.micro_batches for bucket in self._buckets)

    def batch(self, turn: int, key: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
        """(number of the bucket, its records): micro-batch `turn` of this dataset's epoch."""
        number = bisect_right(range(self._rounds), turn, key=lambda r: sum(self._starts(r))) - 1
        starts = self._starts(number)
        sizes = [b - a for a, b in zip(starts, self._starts(number + 1), strict=True)]
        slot = permuted(turn - sum(starts), sum(sizes), (*key, self._name, "round", number))
        which, nth = find(sizes, slot)
        bucket = self._buckets[which]
        return self._numbers[which], pictures(bucket, starts[which] + nth, (*key, self._name, *bucket.size))

    def _starts(self, number: int) -> list[int]:
        """The first micro-batch of each bucket in round `number`: the one in which that pass begins."""
        return [
            bucket.micro_batches if number >= bucket.passes else number * len(bucket.records) // bucket.batch_size
            for bucket in self._buckets
        ]


def pictures(bucket: Bucket, nth: int, key: tuple[object, ...]) -> tuple[int, ...]:
    """The records of micro-batch `nth` of a bucket's epoch: always `batch_size` many."""
    first = nth * bucket.batch_size
    last = min(first + bucket.batch_size, bucket.visits)
    size = len(bucket.records)
    own = [permuted(visit % size, size, (*key, "pass", visit // size)) for visit in range(first, last)]
    fill = islice(_fill_ins(set(own), size, bucket.passes, key), bucket.batch_size - len(own))
    return tuple(bucket.records[item] for item in (*own, *fill))


def _fill_ins(taken: set[int], size: int, first_pass: int, key: tuple[object, ...]) -> Iterator[int]:
    """Pictures to fill a micro-batch with: first those not in it, then all of them, pass after pass."""
    for number in count(first_pass):
        shuffled = (permuted(place, size, (*key, "pass", number)) for place in range(size))
        yield from (item for item in shuffled if number > first_pass or item not in taken)
