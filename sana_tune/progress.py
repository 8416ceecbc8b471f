"""Where a run stands, and what is due there. Pure and torch-free."""

from __future__ import annotations

from collections.abc import Callable
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
    """An interval in optimizer steps, one in epochs, or both. 0 = never.

    after_step, after_epoch: nothing is due before so many steps and epochs are done.
    """

    steps: int = 0
    epochs: float = 0.0
    after_step: int = 0
    after_epoch: float = 0.0


def due(every: Every, progress: Progress, epoch_after: Callable[[int], float] | None = None) -> bool:
    """Whether something that happens at an interval happens right after `progress`.

    An interval of epochs is due at the step that ends them, or, where a step goes on into the next epoch, at that one.
    epoch_after: epochs that are done after so many steps; needed for intervals in epochs alone.
    """
    if progress.step <= 0 or progress.step < every.after_step or progress.epoch < every.after_epoch - _ROUNDING:
        return False
    if every.steps > 0 and progress.step % every.steps == 0:
        return True
    if every.epochs <= 0 or epoch_after is None:
        return False
    ended = (int(epoch_after(step) / every.epochs + _ROUNDING) for step in (progress.step - 1, progress.step))
    return next(ended) < next(ended)


_ROUNDING = 1e-9  # epochs are fractions
