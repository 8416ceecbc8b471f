"""Which checkpoints are written, which of them stay, and whether training waits meanwhile. Pure and torch-free."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from sana_tune.config.schema import Config
from sana_tune.progress import Every

SPARE = 0.1  # share of the free main memory that is left alone: what a run takes is an estimate


@dataclass(frozen=True)
class Keeping:
    """Which checkpoints stay; 0 = no such rule, and with limit 0 all stay.

    limit: so many of the newest ordinary ones. every: multiples of so many steps, for ever. best: so many of the lowest
    held-out loss. rolling_every: steps between rolling ones, of which the newest rolling_limit stay.
    """

    limit: int = 0
    every: int = 0
    best: int = 0
    rolling_every: int = 0
    rolling_limit: int = 1

    @property
    def words(self) -> str:
        """What stays, in words."""
        parts = [f"the newest {self.limit}" if self.limit else "all"]
        if self.limit:
            parts += [f"every multiple of {self.every} steps"] * bool(self.every)
            parts += [f"the best {self.best} by held-out loss"] * bool(self.best)
        if self.rolling_every:
            parts.append(f"the newest {self.rolling_limit} of the rolling ones (every {self.rolling_every} steps)")
        return ", ".join(parts)


@dataclass(frozen=True)
class Stand:
    """What decides whether a checkpoint stays. loss: its held-out loss; None = nobody measured it."""

    step: int
    rolling: bool = False
    loss: float | None = None


def reasons(stands: Sequence[Stand], keeping: Keeping) -> list[tuple[str, ...]]:
    """Why each checkpoint stays, in words and in the order given, which is that of saving; () = it may go."""
    found: list[list[str]] = [[] for _ in stands]
    ordinary = [place for place, stand in enumerate(stands) if not stand.rolling]
    rolling = [place for place, stand in enumerate(stands) if stand.rolling]
    for place in ordinary[-keeping.limit :]:
        found[place].append(f"newest {keeping.limit}" if keeping.limit else "all are kept")
    for place in rolling[-keeping.rolling_limit :]:
        found[place].append(f"newest {keeping.rolling_limit} rolling")
    for place in ordinary:
        if keeping.every and stands[place].step % keeping.every == 0:
            found[place].append(f"multiple of {keeping.every}")
    for place in best(stands, keeping.best):
        found[place].append(f"best {keeping.best}")
    return [tuple(each) for each in found]


def best(stands: Sequence[Stand], count: int) -> list[int]:
    """Places of the `count` lowest held-out losses, the best first; of equal ones the later is better."""
    judged = [
        (stand.loss, -place)
        for place, stand in enumerate(stands)
        if stand.loss is not None and math.isfinite(stand.loss)
    ]
    return [-place for _, place in sorted(judged)[:count]]


def keeping_of(config: Config) -> Keeping:
    """What was asked for."""
    train = config.train
    return Keeping(
        train.checkpoints_total_limit,
        train.checkpoints_keep_every,
        train.checkpoints_keep_best,
        train.checkpointing_rolling_steps,
        train.checkpoints_rolling_total_limit,
    )


def saved_at(config: Config) -> Every:
    """When ordinary checkpoints are due."""
    return Every(config.train.checkpoint_step_interval, config.train.checkpoint_epoch_interval)


def most_at_once(keeping: Keeping, every: Every, steps: int, epochs: float) -> int:
    """The most checkpoints that are there at one time in a run of so many steps: those that stay, and with a limit of
    one the one before while its successor is written."""
    by_steps = math.ceil(steps / every.steps) if every.steps else 0
    by_epochs = math.floor(epochs / every.epochs) if every.epochs else 0
    written = min(steps, max(1, by_steps + by_epochs))
    newest = min(written, keeping.limit) if keeping.limit else written
    held = newest + (keeping.limit == 1 < written)
    if keeping.every and keeping.limit:
        meeting = math.lcm(keeping.every, every.steps) if every.steps else keeping.every
        held += min(written - newest, steps // meeting)
    held = min(written, held + keeping.best) if keeping.limit else written
    rolling = min(keeping.rolling_limit, steps // keeping.rolling_every) if keeping.rolling_every else 0
    return max(1, held) + rolling


@dataclass(frozen=True)
class SavingPlan:
    """How checkpoints are written.

    checkpoint_bytes: of one. background: a copy in main memory is written while training goes on; else training waits.
    """

    checkpoint_bytes: int
    background: bool
    why: str
    keeping: Keeping = field(default_factory=Keeping)


def decide_saving(config: Config, checkpoint_bytes: int, host_bytes: int, available_bytes: int | None) -> SavingPlan:
    """Whether training waits while a checkpoint is written.

    host_bytes: what training takes of main memory by itself. available_bytes: main memory that is free now; None where
    nobody can tell.
    """
    asked, keeping = config.train.checkpoint_writing, keeping_of(config)
    if asked != "auto":
        return SavingPlan(checkpoint_bytes, asked == "background", "as asked", keeping)
    if available_bytes is None:
        return SavingPlan(checkpoint_bytes, False, "how much main memory is free is not known", keeping)
    fits = host_bytes + checkpoint_bytes <= (1 - SPARE) * available_bytes
    taken = f" beside {_size(host_bytes)} of training" if host_bytes else ""
    why = f"a copy takes {_size(checkpoint_bytes)} of main memory{taken}, and {_size(available_bytes)} are"
    return SavingPlan(checkpoint_bytes, fits, f"{why} free", keeping)


def _size(count: int) -> str:
    return f"{count / 1e6:.0f} MB" if count < 1e9 else f"{count / 1e9:.1f} GB"
