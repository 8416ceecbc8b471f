"""The order of micro-batches, as a function of position: (buckets, seed, index) → pictures. Pure, no torch.

There is no sampler and no state: any micro-batch of any epoch is worked out on its own, in a time that does
not depend on how many there are. What is shuffled is never laid out; a keyed permutation is asked for one
place.

An epoch is arranged in three layers, each exact in its counts:

1. **Datasets.** Dataset d comes with weight w_d and has M_d micro-batches, so it would run dry at time M_d / w_d.
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
from functools import lru_cache
from itertools import accumulate, count, islice
from math import floor

from sana_tune.data.buckets import Bucket
from sana_tune.data.records import digest


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
    """The endless stream of micro-batches of a run.

    buckets: at least one. weights: dataset → probability, above 0; a dataset not named has 1.
    mode: "auto-weighting": probability × micro-batches per epoch, so that with equal probabilities all
    datasets are mixed evenly over the epoch; "uniform": probability alone, so that datasets take turns until
    they run dry.
    """

    def __init__(self, buckets: Sequence[Bucket], weights: Mapping[str, float], mode: str, seed: int):
        if not buckets:
            raise ValueError("an order needs at least one bucket")
        self.buckets = tuple(buckets)
        self._seed = seed
        names = list(dict.fromkeys(bucket.dataset for bucket in buckets))
        self._streams = [_Stream(name, buckets) for name in names]
        counts = [stream.micro_batches for stream in self._streams]
        shares = [Fraction(str(weights.get(name, 1.0))) for name in names]
        if mode == "auto-weighting":
            shares = [share * n for share, n in zip(shares, counts, strict=True)]
        elif mode != "uniform":
            raise ValueError(f"mode is auto-weighting or uniform; found {mode!r}")
        self._phases = Phases(counts, shares)

    @property
    def micro_batches_per_epoch(self) -> int:
        """M: micro-batches in an epoch, over all datasets, filled ones included."""
        return self._phases.total

    def micro_batch(self, index: int) -> MicroBatch:
        """Micro-batch number `index` of the run. Epochs follow each other without a gap."""
        epoch, place = divmod(index, self.micro_batches_per_epoch)
        dataset, turn = self._phases.at(place, (self._seed, epoch))
        bucket, records = self._streams[dataset].batch(turn, (self._seed, epoch))
        return MicroBatch(index, epoch, bucket, records)


class Phases:
    """How datasets share an epoch: exact counts, shares by weight, nobody starved.

    counts: micro-batches of each dataset. weights: their weights, above 0.
    """

    def __init__(self, counts: Sequence[int], weights: Sequence[Fraction]):
        if any(weight <= 0 for weight in weights):
            raise ValueError("the weight of a dataset must be above 0")
        self.total = sum(counts)
        ends = sorted({n / weight for n, weight in zip(counts, weights, strict=True)})
        # How many micro-batches each dataset has given by the end of each phase; before the first one, none.
        self._given = [[0] * len(counts)] + [
            [min(n, floor(weight * end + Fraction(1, 2))) for n, weight in zip(counts, weights, strict=True)]
            for end in ends
        ]
        self._starts = [sum(given) for given in self._given[:-1]]

    def at(self, place: int, key: tuple[object, ...]) -> tuple[int, int]:
        """(dataset, k): at `place` of an epoch comes the dataset's micro-batch k. `key` decides the shuffles.

        Each dataset's k count up from 0 as `place` does.
        """
        phase = bisect_right(self._starts, place) - 1
        before = self._given[phase]
        turns = [b - a for a, b in zip(before, self._given[phase + 1], strict=True)]
        place -= self._starts[phase]
        slices = -(-sum(turns) // _SLICE)
        number = bisect_right(range(slices), place, key=lambda i: sum(_shares(turns, i, slices))) - 1
        so_far, next_ = _shares(turns, number, slices), _shares(turns, number + 1, slices)
        sizes = tuple(b - a for a, b in zip(so_far, next_, strict=True))
        shuffled = _shuffled(sizes, (*key, "slice", phase, number))
        place -= sum(so_far)
        dataset = shuffled[place]
        return dataset, before[dataset] + so_far[dataset] + shuffled[:place].count(dataset)


_SLICE = 64  # micro-batches among which the datasets are shuffled


def _shares(turns: Sequence[int], number: int, slices: int) -> list[int]:
    """How often each dataset came before slice `number` of a phase: its even share, rounded."""
    return [(2 * n * number + slices) // (2 * slices) for n in turns]


@lru_cache(maxsize=16)
def _shuffled(sizes: tuple[int, ...], key: tuple[object, ...]) -> tuple[int, ...]:
    """The numbers 0, 1, …, each as often as `sizes` says, shuffled."""
    total = sum(sizes)
    return tuple(_find(sizes, permuted(place, total, key))[0] for place in range(total))


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
        which, nth = _find(sizes, slot)
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


def _find(sizes: Sequence[int], place: int) -> tuple[int, int]:
    """(part, place inside it) when parts of these sizes lie end to end."""
    ends = list(accumulate(sizes))
    part = bisect_right(ends, place)
    return part, place - (ends[part] - sizes[part])


# ---- randomness from position ----


def unit_float(*parts: object) -> float:
    """A number in [0, 1) that depends on the parts and on nothing else (53 bits of `digest`)."""
    return (int(digest(*parts)[:16], 16) >> 11) / (1 << 53)


def permuted(place: int, size: int, key: tuple[object, ...]) -> int:
    """Where a pseudo-random permutation of 0 … size−1, chosen by `key`, puts `place`. Constant time and
    memory.

    A Feistel network permutes the next power of 4; walking its cycle until the value is below `size` makes
    that a permutation of the range asked for (Black and Rogaway, "Ciphers with Arbitrary Finite Domains",
    2002).
    """
    if size == 1:
        return 0
    half_bits = ((size - 1).bit_length() + 1) // 2
    keys = _round_keys(key)
    while True:
        place = _feistel(place, half_bits, keys)
        if place < size:
            return place


_ROUNDS = 8
_WORD = (1 << 64) - 1


def _feistel(value: int, half_bits: int, keys: Sequence[int]) -> int:
    """A permutation of 0 … 4^half_bits − 1."""
    mask = (1 << half_bits) - 1
    left, right = value >> half_bits, value & mask
    for key in keys:
        mixed = ((right ^ key) * 0x9E3779B97F4A7C15) & _WORD
        mixed ^= mixed >> 32
        left, right = right, left ^ ((mixed * 0xD6E8FEB86659FD93 & _WORD) >> 40) & mask
    return left << half_bits | right


@lru_cache(maxsize=1024)
def _round_keys(key: tuple[object, ...]) -> tuple[int, ...]:
    """The Feistel network's 64-bit round keys."""
    hashed = "".join(digest(*key, half) for half in range(_ROUNDS // 2))
    return tuple(int(hashed[16 * i : 16 * i + 16], 16) for i in range(_ROUNDS))
