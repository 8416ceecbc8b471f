"""What leaves a run: plain values. Observers may do with them as they like; they never see the trainer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from sana_tune.progress import Progress


@dataclass(frozen=True)
class CacheProgress:
    """One cache is being filled. done and total count items that had to be made (misses)."""

    cache: str  # "text" or "latents"
    done: int
    total: int
    finished: bool = False


@dataclass(frozen=True)
class Started:
    """Training begins at `progress` and is to end at `total_steps`."""

    progress: Progress
    total_steps: int
    steps_per_epoch: float
    resumed_from: str | None = None
    epochs: float | None = None  # None: as many as steps_per_epoch gives


@dataclass(frozen=True)
class Stepped:
    """One optimizer step is done (or was skipped because its numbers were not finite).

    loss: mean over the step's micro-batches. grad_norm: before clipping. Durations in seconds.
    losses: where there is regularisation data, "train" and "regularise" → mean over the micro-batches of that role.
    """

    progress: Progress
    loss: float
    learning_rate: float
    grad_norm: float
    step_s: float
    data_wait_s: float
    images: int
    skipped: bool = False
    losses: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Validated:
    """Pictures were drawn at `progress`; paths of the files, and prompts that failed with the reason."""

    progress: Progress
    files: tuple[str, ...]
    failed: tuple[str, ...] = ()
    duration_s: float = 0.0


@dataclass(frozen=True)
class Saved:
    """A checkpoint was written and is complete."""

    progress: Progress
    path: str
    duration_s: float
    removed: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class Finished:
    """The run reached its last step; `pipeline` is the exported folder."""

    progress: Progress
    pipeline: str | None = None


@dataclass(frozen=True)
class Stopped:
    """The run was asked to stop before its last step and has saved."""

    progress: Progress
    reason: str = ""


Event = CacheProgress | Started | Stepped | Validated | Saved | Finished | Stopped
