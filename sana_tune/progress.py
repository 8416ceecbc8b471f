"""Where a run stands, and what is due there. Pure and torch-free."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Progress:
    """Position of a run.

    step:   optimizer steps done (0 before the first one).
    epoch:  passes over the data done, as a fraction (2.5 = half of the third epoch is done).
    images: pictures seen, repeats counted.
    """

    step: int = 0
    epoch: float = 0.0
    images: int = 0

    def advance(self, images: int, epoch: float) -> Progress:
        """The position after one more optimizer step that saw `images` pictures and ended at `epoch`."""
        return replace(self, step=self.step + 1, images=self.images + images, epoch=epoch)

    def to_json(self) -> dict[str, Any]:
        """Plain values; `from_json` gives the same position back, bit for bit."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Progress:
        """Read `to_json`'s values; other keys are left alone. Raises KeyError, ValueError or TypeError."""
        return cls(step=int(values["step"]), epoch=float(values["epoch"]), images=int(values["images"]))


@dataclass(frozen=True)
class Every:
    """An interval in optimizer steps, and one in epochs. 0 = never."""

    steps: int = 0
    epochs: float = 0


def due(every: Every, progress: Progress, before: Progress | None = None) -> bool:
    """Whether something that happens every so many steps or epochs happens right after `progress`.

    before: where the run stood a step earlier; an epoch that ended between the two counts. None: epochs do not.
    """
    if every.steps > 0 and progress.step > 0 and progress.step % every.steps == 0:
        return True
    if before is None or every.epochs <= 0:
        return False
    return _whole(progress.epoch / every.epochs) > _whole(before.epoch / every.epochs)


def _whole(number: float) -> int:
    """The whole part, where 2.9999999999999996 is 3: epochs are quotients."""
    return math.floor(number + 1e-9)
