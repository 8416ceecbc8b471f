"""What leaves a run: plain values. Observers may do with them as they like; they never see the trainer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

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
    by_sigma: (noise level, loss) of each sample that this process saw. memory_bytes: the most that was in use so far:
    of the accelerator's memory, or of main memory on a CPU; None where nobody measured.
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
    by_sigma: tuple[tuple[float, float], ...] = ()
    memory_bytes: int | None = None


@dataclass(frozen=True)
class Validated:
    """Pictures were drawn at `progress`; paths of the files, and prompts that failed with the reason.

    sheet: path of the contact sheet with all of them beside those of the base model and before; "" = there is none.
    """

    progress: Progress
    files: tuple[str, ...]
    failed: tuple[str, ...] = ()
    duration_s: float = 0.0
    sheet: str = ""


@dataclass(frozen=True)
class Previewed:
    """A picture of a half-finished sample: after `sampler_step` of `sampler_steps`. picture: bytes of a PNG file.

    prompt: the slug of its prompt, as in the names of validation pictures.
    """

    progress: Progress
    prompt: str
    sampler_step: int
    sampler_steps: int
    picture: bytes = field(repr=False)


@dataclass(frozen=True)
class Measured:
    """Numbers about the model at `progress`, by flat names such as held_out/raw, held_out/ema/sigma_0.2 or clip/raw.

    advice: what they suggest to do, a line each.
    """

    progress: Progress
    values: Mapping[str, float]
    advice: tuple[str, ...] = ()


@dataclass(frozen=True)
class Noticed:
    """Something happened that whoever watches should know: the run went back, waits for room on the disk …"""

    progress: Progress
    message: str
    severity: Literal["info", "warning", "error"] = "warning"


@dataclass(frozen=True)
class Saved:
    """A checkpoint was written and is complete."""

    progress: Progress
    path: str
    duration_s: float
    removed: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class Finished:
    """The run reached its last step; `pipeline` is the exported folder. skipped: steps that were not finite."""

    progress: Progress
    pipeline: str | None = None
    skipped: int = 0


@dataclass(frozen=True)
class Stopped:
    """The run was asked to stop before its last step and has saved. skipped: as in Finished."""

    progress: Progress
    reason: str = ""
    skipped: int = 0


@dataclass(frozen=True)
class Failed:
    """The run ends with an error. The message is what the user is told."""

    message: str


Event = (
    CacheProgress | Started | Stepped | Validated | Previewed | Measured | Noticed | Saved | Finished | Stopped | Failed
)
