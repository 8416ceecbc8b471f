"""The learning rate as a pure function of the step (a resume needs no state of it), and its picture. Torch-free."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sana_tune.config.choices import LR_END_DEFAULTS, LR_SCHEDULERS
from sana_tune.config.schema import Config

# inverse_sqrt without warm-up falls as if it had had one of so many steps (transformers' default).
TIMESCALE = 10_000
BARS = "▁▂▃▄▅▆▇█"


def lr_at(
    name: str, step: int, total_steps: int, warmup: int, *, end: float = 0.0, power: float = 1.0, cycles: int = 1
) -> float:
    """The factor on the peak learning rate for the step that follows `step` done ones, 0..1.

    Warm-up rises 1/w, 2/w … 1 over the first w steps (never 0: no step is for nothing). Over the t = 0..1 of the
    steps that are left, `linear` falls as 1 - t, `cosine` as (1 + cos πt) / 2, `cosine_with_restarts` as the same of
    the fraction of cycles·t, and `polynomial` as (1 - t)^power; t is 1 right after the last step. `cosine`,
    `cosine_with_restarts` and `polynomial` fall to `end`, a factor too; `linear` falls to 0. `inverse_sqrt` is
    sqrt(w / step), w the warm-up or TIMESCALE (Vaswani et al. 2017; transformers' form).
    Raises KeyError for an unknown name.
    """
    if name not in LR_SCHEDULERS:
        raise KeyError(name)
    if step < warmup:
        return (step + 1) / warmup
    if name in ("constant", "constant_with_warmup"):
        return 1.0
    if name == "inverse_sqrt":
        scale = warmup or TIMESCALE
        return math.sqrt(scale / (scale + step - warmup))
    done = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    if name == "linear":
        return 1.0 - done
    if name == "polynomial":
        return end + (1.0 - end) * (1.0 - done) ** power
    turn = 1.0 if done >= 1.0 else (done * cycles) % 1.0 if name == "cosine_with_restarts" else done
    return end + (1.0 - end) * 0.5 * (1.0 + math.cos(math.pi * turn))


@dataclass(frozen=True)
class Schedule:
    """The learning rate over a run; no state but its settings.

    end_lr: where the schedules that have an end do so; None = the schedule's default. power: of `polynomial`.
    cycles: of `cosine_with_restarts`.
    """

    name: str
    peak_lr: float
    total_steps: int
    warmup_steps: int = 0
    end_lr: float | None = None
    power: float = 1.0
    cycles: int = 1

    def lr(self, step: int) -> float:
        """Learning rate of the step that follows `step` done ones."""
        end_lr = LR_END_DEFAULTS.get(self.name, 0.0) if self.end_lr is None else self.end_lr
        factor = lr_at(
            self.name,
            step,
            self.total_steps,
            self.warmup_steps,
            end=end_lr / self.peak_lr,
            power=self.power,
            cycles=self.cycles,
        )
        return self.peak_lr * factor

    def picture(self, width: int = 40) -> str:
        """The whole course as a line of bars from 0 to the peak, at most `width` of them."""
        columns = max(1, min(width, self.total_steps))
        last = max(0, self.total_steps - 1)
        steps = [round(place * last / max(1, columns - 1)) for place in range(columns)]
        heights = [self.lr(step) / self.peak_lr for step in steps]
        return "".join(BARS[min(len(BARS) - 1, int(height * len(BARS)))] for height in heights)

    @property
    def words(self) -> str:
        """The schedule in words: `cosine, peak 1e-05, 100 steps of warm-up, 2e-08 at the last step`."""
        warm = f", {self.warmup_steps} steps of warm-up" if self.warmup_steps else ""
        last = self.lr(max(0, self.total_steps - 1))
        end = "" if last == self.peak_lr else f", {last:.3g} at the last step"
        return f"{self.name}, peak {self.peak_lr:.4g}{warm}{end}"


def schedule_of(config: Config, total_steps: int, images_per_step: float) -> Schedule:
    """The schedule of a run. images_per_step: what lr_scale multiplies by, pictures of one optimizer step."""
    wanted, factor = config.optimizer, lr_factor(config, images_per_step)
    return Schedule(
        wanted.lr_scheduler,
        wanted.learning_rate * factor,
        total_steps,
        wanted.lr_warmup_steps,
        None if wanted.lr_end is None else wanted.lr_end * factor,
        wanted.lr_power,
        wanted.lr_num_cycles,
    )


def lr_factor(config: Config, images_per_step: float) -> float:
    """What the learning rate is multiplied by: the pictures of a step with lr_scale, their root with lr_scale_sqrt."""
    if config.optimizer.lr_scale_sqrt:
        return math.sqrt(images_per_step)
    return images_per_step if config.optimizer.lr_scale else 1.0
