"""Which dataset comes when, as a function of position: the shares of an epoch, and datasets that start and end.

Pure, no torch, nothing laid out: a stretch of a million epochs alike is one entry. Datasets are numbers here.

An epoch is made of the datasets that are shown in it. One that starts at a step in the middle of an epoch is mixed,
whole, into what is left of that epoch: it ends when all that is shown in it was seen as often as it should, so that it
grows longer. One that ends at a step in the middle leaves out what was still to come of it. At each such step the rest
of the epoch is arranged anew, by the same weights, over what each dataset still has to give.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate
from math import ceil, floor

from sana_tune.data.position import permuted


@dataclass(frozen=True)
class Window:
    """When a dataset is shown: from the later of its starts to the earlier of its ends, both included.

    Epochs and optimizer steps are counted from 1; a start of 0 or 1 is the beginning, an end of None there is none.
    """

    start_epoch: int = 1
    start_step: int = 0
    end_epoch: int | None = None
    end_step: int | None = None

    @property
    def is_always(self) -> bool:
        """Whether it is shown from beginning to end."""
        return self.start_epoch <= 1 and self.start_step <= 1 and self.end_epoch is None and self.end_step is None

    def in_epoch(self, epoch: int) -> bool:
        """Whether it can be shown in an epoch, counted from 0."""
        return self.start_epoch <= epoch + 1 and (self.end_epoch is None or epoch < self.end_epoch)

    def begins(self, per_step: int) -> int:
        """The first micro-batch of the run that may be of it."""
        return max(0, self.start_step - 1) * per_step

    def ends(self, per_step: int) -> int | None:
        """The first micro-batch of the run that may not be of it any more."""
        return None if self.end_step is None else self.end_step * per_step


@dataclass(frozen=True)
class Stretch:
    """Micro-batches of the same datasets: `epochs` whole epochs that are alike, or a part of one epoch.

    first: its first micro-batch in the run. epoch: its first epoch, from 0. epochs: None = without end; 1 for a part.
    part: which part of its epoch, from 0. datasets: those that are shown. given, counts: micro-batches of each that
    came earlier in the epoch, and that are arranged here. taken: how many of those come before the datasets change.
    before, epoch_length: micro-batches of the epoch before this part, and in all.
    """

    first: int
    epoch: int
    epochs: int | None
    part: int
    datasets: tuple[int, ...]
    given: tuple[int, ...]
    counts: tuple[int, ...]
    taken: int
    before: int
    epoch_length: int


class Timeline:
    """Position → epoch, dataset, and which of the dataset's micro-batches of that epoch.

    counts: micro-batches of each dataset in an epoch, at least one. weights: their probabilities, above 0.
    mode: "auto-weighting": probability × micro-batches to come; "uniform": probability alone.
    windows: when each is shown; () = always. per_step: micro-batches of an optimizer step, over all ranks.
    """

    def __init__(
        self,
        counts: Sequence[int],
        weights: Sequence[Fraction],
        mode: str,
        seed: int,
        windows: Sequence[Window] = (),
        per_step: int = 1,
    ):
        if mode not in ("auto-weighting", "uniform"):
            raise ValueError(f"mode is auto-weighting or uniform; found {mode!r}")
        if any(weight <= 0 for weight in weights):
            raise ValueError("the weight of a dataset must be above 0")
        self._counts, self._weights, self._mode, self._seed = tuple(counts), tuple(weights), mode, seed
        self._windows = tuple(windows) or (Window(),) * len(self._counts)
        self._begins = [window.begins(per_step) for window in self._windows]
        self._ends = [window.ends(per_step) for window in self._windows]
        self._phases: dict[int, Phases] = {}
        self.stretches = tuple(self._laid_out())
        self._starts = [stretch.first for stretch in self.stretches]

    @property
    def end(self) -> int | None:
        """The first micro-batch for which there is no dataset; None when there always is one."""
        if not self.stretches:
            return 0
        last = self.stretches[-1]
        return None if last.epochs is None else last.first + last.epochs * last.taken

    def at(self, index: int) -> tuple[int, int, int]:
        """(epoch, dataset, k): micro-batch `index` of the run is number k of the dataset's epoch. Raises IndexError."""
        number, epoch, place = self._place(index)
        stretch = self.stretches[number]
        which, turn = self._phases_of(number).at(place, self._key(stretch, epoch))
        return epoch, stretch.datasets[which], stretch.given[which] + turn

    def epochs_at(self, index: int) -> float:
        """Epochs that are done before micro-batch `index`, the share of the one it is in counted."""
        if index == self.end:
            return float(self.stretches[-1].epoch + (self.stretches[-1].epochs or 0))
        number, epoch, place = self._place(index)
        stretch = self.stretches[number]
        return float(epoch + Fraction(stretch.before + place, stretch.epoch_length))

    def micro_batches_of(self, epochs: float) -> int:
        """Micro-batches of so many epochs, those of a part of the last one rounded up; `end` when it comes earlier."""
        wanted = Fraction(str(epochs))
        for stretch in self.stretches:
            if stretch.epochs is None or wanted <= stretch.epoch + stretch.epochs:
                place = (wanted - stretch.epoch) * stretch.epoch_length - stretch.before
                if stretch.epochs is None or place <= stretch.epochs * stretch.taken:
                    return stretch.first + ceil(place)
        return self.end or 0

    def given(self, index: int) -> list[int]:
        """Micro-batches of each dataset before micro-batch `index` of the run."""
        found = [0] * len(self._counts)
        for number, stretch in enumerate(self.stretches):
            if stretch.first >= index:
                break
            whole, rest = divmod(index - stretch.first, stretch.taken)
            if stretch.epochs is not None and whole >= stretch.epochs:
                whole, rest = stretch.epochs, 0
            phases = self._phases_of(number)
            of_one = phases.given(stretch.taken, self._key(stretch, stretch.epoch)) if whole else []
            of_part = phases.given(rest, self._key(stretch, stretch.epoch + whole)) if rest else []
            for counts, times in ((of_one, whole), (of_part, 1)):
                for dataset, count in zip(stretch.datasets, counts, strict=False):
                    found[dataset] += times * count
        return found

    def _place(self, index: int) -> tuple[int, int, int]:
        """(number of the stretch, epoch, place in the stretch's part of it)."""
        if index < 0 or (self.end is not None and index >= self.end):
            raise IndexError(f"no dataset is shown at micro-batch {index} of the run")
        number = bisect_right(self._starts, index) - 1
        stretch = self.stretches[number]
        epochs, place = divmod(index - stretch.first, stretch.taken)
        return number, stretch.epoch + epochs, place

    def _key(self, stretch: Stretch, epoch: int) -> tuple[object, ...]:
        return (self._seed, epoch, "part", stretch.part) if stretch.part else (self._seed, epoch)

    def _phases_of(self, number: int) -> Phases:
        if number not in self._phases:
            stretch = self.stretches[number]
            self._phases[number] = self._arranged(stretch.datasets, stretch.counts)
        return self._phases[number]

    def _arranged(self, datasets: Sequence[int], counts: Sequence[int]) -> Phases:
        shares = [self._weights[dataset] for dataset in datasets]
        if self._mode == "auto-weighting":
            shares = [share * count for share, count in zip(shares, counts, strict=True)]
        return Phases(counts, shares)

    # ---- laying out the stretches ----

    def _laid_out(self) -> Iterator[Stretch]:
        """All stretches, in order. There are at most a few for each start and end."""
        first = epoch = 0
        while True:
            shown = [dataset for dataset in range(len(self._counts)) if self._is_shown(dataset, epoch, first)]
            if not shown:
                return
            counts = tuple(self._counts[dataset] for dataset in shown)
            alike = self._epochs_alike(first, epoch, sum(counts))
            if alike == 0:
                parts = self._parts(first, epoch, shown)
                yield from parts
                first, epoch = parts[-1].first + parts[-1].taken, epoch + 1
                continue
            none = (0,) * len(shown)
            yield Stretch(first, epoch, alike, 0, tuple(shown), none, counts, sum(counts), 0, sum(counts))
            if alike is None:
                return
            first, epoch = first + alike * sum(counts), epoch + alike

    def _is_shown(self, dataset: int, epoch: int, index: int) -> bool:
        end = self._ends[dataset]
        in_steps = self._begins[dataset] <= index and (end is None or index < end)
        return in_steps and self._windows[dataset].in_epoch(epoch)

    def _epochs_alike(self, first: int, epoch: int, length: int) -> int | None:
        """How many epochs pass from here before any dataset starts or ends; None = all."""
        places = [place for place in (*self._begins, *self._ends) if place is not None and place > first]
        bounds = [(place - first) // length for place in places]
        for window in self._windows:
            changes = (window.start_epoch - 1, window.end_epoch)
            bounds += [change - epoch for change in changes if change is not None and change > epoch]
        return min(bounds, default=None)

    def _parts(self, first: int, epoch: int, shown: Sequence[int]) -> list[Stretch]:
        """The parts of an epoch in which a dataset starts or ends at a step."""
        given, to_come = dict.fromkeys(shown, 0), {dataset: self._counts[dataset] for dataset in shown}
        parts: list[Stretch] = []
        begin = first
        while to_come:
            datasets, counts = tuple(to_come), tuple(to_come.values())
            change = self._next_change(first, epoch)
            taken = sum(counts) if change is None else min(sum(counts), change - first)
            done = tuple(given[dataset] for dataset in datasets)
            parts.append(Stretch(first, epoch, 1, len(parts), datasets, done, counts, taken, first - begin, 0))
            came = self._arranged(datasets, counts).given(taken, self._key(parts[-1], epoch))
            for dataset, count in zip(datasets, came, strict=True):
                given[dataset] += count
                to_come[dataset] -= count
            first += taken
            for dataset in range(len(self._counts)):
                if dataset not in given and taken < sum(counts) and self._is_shown(dataset, epoch, first):
                    given[dataset], to_come[dataset] = 0, self._counts[dataset]
            to_come = {d: count for d, count in sorted(to_come.items()) if count and self._is_shown(d, epoch, first)}
        length = first - begin
        return [replace(part, epoch_length=length) for part in parts]

    def _next_change(self, index: int, epoch: int) -> int | None:
        """The next micro-batch at which a dataset of this epoch starts or ends by its steps."""
        found = []
        for window, begin, end in zip(self._windows, self._begins, self._ends, strict=True):
            if window.in_epoch(epoch):
                found += [place for place in (begin, end) if place is not None and place > index]
        return min(found, default=None)


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
        so_far, shuffled, place = self._slice(place, key)
        dataset = shuffled[place]
        return dataset, so_far[dataset] + shuffled[:place].count(dataset)

    def given(self, place: int, key: tuple[object, ...]) -> list[int]:
        """Micro-batches of each dataset before `place`."""
        if place == self.total:
            return list(self._given[-1])
        so_far, shuffled, place = self._slice(place, key)
        return [count + shuffled[:place].count(dataset) for dataset, count in enumerate(so_far)]

    def _slice(self, place: int, key: tuple[object, ...]) -> tuple[list[int], tuple[int, ...], int]:
        """(what each dataset gave before the slice in which `place` is, the slice, the place in it)."""
        phase = bisect_right(self._starts, place) - 1
        before = self._given[phase]
        turns = [b - a for a, b in zip(before, self._given[phase + 1], strict=True)]
        place -= self._starts[phase]
        slices = -(-sum(turns) // _SLICE)
        number = bisect_right(range(slices), place, key=lambda i: sum(_shares(turns, i, slices))) - 1
        so_far, next_ = _shares(turns, number, slices), _shares(turns, number + 1, slices)
        sizes = tuple(b - a for a, b in zip(so_far, next_, strict=True))
        shuffled = _shuffled(sizes, (*key, "slice", phase, number))
        return [a + b for a, b in zip(before, so_far, strict=True)], shuffled, place - sum(so_far)


_SLICE = 64  # micro-batches among which the datasets are shuffled


def _shares(turns: Sequence[int], number: int, slices: int) -> list[int]:
    """How often each dataset came before slice `number` of a phase: its even share, rounded."""
    return [(2 * n * number + slices) // (2 * slices) for n in turns]


@lru_cache(maxsize=16)
def _shuffled(sizes: tuple[int, ...], key: tuple[object, ...]) -> tuple[int, ...]:
    """The numbers 0, 1, …, each as often as `sizes` says, shuffled."""
    total = sum(sizes)
    return tuple(find(sizes, permuted(place, total, key))[0] for place in range(total))


def find(sizes: Sequence[int], place: int) -> tuple[int, int]:
    """(part, place inside it) when parts of these sizes lie end to end."""
    ends = list(accumulate(sizes))
    part = bisect_right(ends, place)
    return part, place - (ends[part] - sizes[part])
