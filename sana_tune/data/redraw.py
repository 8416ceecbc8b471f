"""Random crops and aspects drawn anew for each epoch (vae_cache_clear_each_epoch). Pure, no torch.

An epoch's plan must not change with what is drawn: the buckets keep their sizes. So pictures whose aspect is drawn
change places in pairs that chance makes, each taking the other's aspect; where the crop lies is drawn for each
picture. What an epoch shows is a function of the seed and its number; epoch 0 is as if nothing were drawn anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache

from sana_tune.data.geometry import Chance, Rules, Size, place, place_into, unfit
from sana_tune.data.position import permuted
from sana_tune.data.records import Record, Role, chance_of

_EPOCHS_KEPT = 2  # a step may belong to two


class Redraw:
    """The pictures of a run, epoch by epoch.

    records: as the survey placed them. rules: the geometry of each dataset that is drawn anew, by id. seed: of crops.
    """

    def __init__(self, records: Sequence[Record], rules: Mapping[str, Rules], seed: int):
        self._records = records
        self._seed = seed
        self._rules = {name: rule for name, rule in rules.items() if rule.needs_chance}
        self._places: dict[str, list[int]] = {name: [] for name in self._rules}
        for number, record in enumerate(records):
            if record.dataset in self._rules and record.role is not Role.EVAL:
                self._places[record.dataset].append(number)
        self._of = lru_cache(maxsize=_EPOCHS_KEPT)(self._drawn)

    @property
    def datasets(self) -> frozenset[str]:
        """The datasets of which anything is drawn anew."""
        return frozenset(name for name, places in self._places.items() if places)

    def records(self, epoch: int) -> Sequence[Record]:
        """What stands at each place in an epoch, counted from 0: of the size that the survey gave the place."""
        return self._records if epoch == 0 or not self.datasets else self._of(epoch)

    def _drawn(self, epoch: int) -> tuple[Record, ...]:
        found = list(self._records)
        for name, places in self._places.items():
            for here, there in self._partners(name, places, epoch):
                found[here] = self._at(here, there, epoch)
        return tuple(found)

    def _partners(self, name: str, places: Sequence[int], epoch: int) -> list[tuple[int, int]]:
        """(place, place of the picture that stands there): pairs change places where both fit the other's size."""
        rules = self._rules[name]
        if not (rules.crop and rules.crop_aspect == "random"):
            return [(here, here) for here in places]
        key = (self._seed, name, "aspects", epoch)
        order = [places[permuted(number, len(places), key)] for number in range(len(places))]
        found = []
        for one, other in zip(order[::2], order[1::2], strict=False):
            if self._fits(one, other, epoch) and self._fits(other, one, epoch):
                found += [(one, other), (other, one)]
            else:
                found += [(one, one), (other, other)]
        return found + [(here, here) for here in order[len(found) :]]

    def _fits(self, here: int, there: int, epoch: int) -> bool:
        moved = self._at(here, there, epoch)
        mine, other = self._records[here], self._records[there]
        size = Size(moved.width_px, moved.height_px)
        return mine.role is other.role and unfit(size, self._rules[moved.dataset], moved.placement) is None

    def _at(self, here: int, there: int, epoch: int) -> Record:
        """The picture of the place `there` as it is cropped for the place `here`."""
        mine, other = self._records[here], self._records[there]
        aspect = chance_of(self._seed, mine.dataset, mine.key).aspect
        drawn = chance_of(self._seed, other.dataset, other.key, epoch)
        rules, size, target = self._rules[mine.dataset], Size(other.width_px, other.height_px), mine.placement.target
        placement = place(size, rules, Chance(aspect, drawn.left, drawn.top))
        if placement.target != target:  # the place's bucket was merged into another one
            placement = place_into(size, target, rules, drawn)
        return replace(other, placement=placement)
