"""The held-out loss on the way: against the base model, against trained pictures, and what to make of it.

The base model's losses are measured at step 0 and kept in held_out.json; all numbers are told against them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from sana_tune.data.records import content_hash, digest
from sana_tune.log import log
from sana_tune.progress import Progress
from sana_tune.store import write_atomically
from sana_tune.train.ema import NoEma
from sana_tune.train.paired import Drift, Paired, drift, labels, paired, standard_error
from sana_tune.train.probe import Item, Probe, Stopped
from sana_tune.train.step import summed
from sana_tune.watch.events import Measured

if TYPE_CHECKING:
    from sana_tune.train.step import Parts

FILE, VELOCITIES = "held_out.json", "held_out.safetensors"
DRIFT_ITEMS = 16
# Above these the advice is given. docs/evaluation.md says why; sure: that many standard errors.
GAP, DRIFT, GAINED, WORSE, SURE = 0.05, 0.3, 0.5, 0.01, 2.0


@dataclass(frozen=True)
class Base:
    """What the others are compared with: the model at `step`, which is 0 but where that was lost.

    held_out, trained: losses, fp64 [pictures, levels]. velocities: predictions, fp32, one after another. The last two
    are None without alarms.
    """

    step: int
    held_out: Tensor
    trained: Tensor | None = None
    velocities: Tensor | None = None


@dataclass(frozen=True)
class Best:
    """The lowest held-out loss of the run so far: where, how low, and the change of each picture against the base."""

    step: int
    value: float
    changes: tuple[float, ...] = field(repr=False)


@dataclass(frozen=True)
class Taken:
    """One measurement: losses of the held-out pictures with the weights and with their average, of the trained ones,
    and predictions. None: not measured."""

    raw: Tensor
    averaged: Tensor | None
    trained: Tensor | None
    velocities: Tensor | None


class Evaluator:
    """Measures held-out pictures, and with alarms as many trained ones and the drift of some predictions.

    folder: of the run, where the base's losses are kept. held_out, trained: what is measured; trained None = nothing to
    compare with. pooled: one number for all datasets alone. names: dataset → its name in numbers. alarms: see docs.
    stopped: asked on the way; a measurement that is stopped tells nothing.
    """

    def __init__(
        self,
        folder: Path,
        held_out: Probe,
        trained: Probe | None = None,
        *,
        pooled: bool = False,
        names: Mapping[str, str] | None = None,
        alarms: bool = True,
        stopped: Callable[[], bool] = lambda: False,
    ):
        self._folder, self._held_out, self._pooled, self._stopped = folder, held_out, pooled, stopped
        self._trained = trained if alarms else None
        self._alarms = alarms
        self._names = names or {subject.dataset: subject.dataset for subject in held_out.subjects}
        self._base: Base | None = None
        self._best: Best | None = None
        self._content: dict[str, Any] = {}  # of the file
        self._last: int | None = None  # the step that was measured last

    # ---- what the loop asks ----

    def start(self, parts: Parts, progress: Progress) -> Measured | None:
        """Measure the base model at the start of a run; on resuming, read what was measured then."""
        if progress.step and self._read(parts, progress):
            return None
        if progress.step:
            log.warning(
                "the held-out loss of the base model is not in %s, or of other pictures, captions or noise levels: "
                "from here on it is told against the model as it is at step %d",
                self._folder / FILE, progress.step,
            )  # fmt: skip
        return self.run(parts, progress)

    def run(self, parts: Parts, progress: Progress) -> Measured | None:
        """The numbers of the model as it is. None when it was stopped."""
        try:
            return self._measured(parts, progress)
        except Stopped:
            return None

    def finish(self, parts: Parts, progress: Progress) -> Measured | None:
        """The numbers at the end, unless this very step was just measured."""
        return None if self._last == progress.step else self.run(parts, progress)

    # ---- measuring ----

    def _measured(self, parts: Parts, progress: Progress) -> Measured:
        sigmas = self._held_out.sigmas(parts)
        taken = self._taken(parts, progress, drift_items(*sigmas.shape) if self._alarms else ())
        if self._base is None:
            self._base = Base(progress.step, taken.raw, taken.trained, taken.velocities)
            self._keep(parts, self._base)
        self._last = progress.step
        return self._told(parts, progress, self._base, labels(sigmas), taken)

    def _taken(self, parts: Parts, progress: Progress, keep: Sequence[Item]) -> Taken:
        found = self._held_out.measure(parts, keep=keep, stopped=self._stopped)
        trained = None if self._trained is None else self._trained.measure(parts, stopped=self._stopped).losses
        averaged = None
        if progress.step and not isinstance(parts.ema, NoEma):  # at the start the average is the base model
            with parts.ema.swapped():
                averaged = self._held_out.measure(parts, stopped=self._stopped).losses
        return Taken(found.losses, averaged, trained, found.velocities if keep else None)

    def _told(self, parts: Parts, progress: Progress, base: Base, names: Sequence[str], taken: Taken) -> Measured:
        """The numbers against the base's, and what they suggest."""
        held = paired(taken.raw, base.held_out)
        values = _values("held_out", "raw", held, names) | self._by_dataset("raw", taken.raw, base, names)
        best = held
        if taken.averaged is not None:
            best = paired(taken.averaged, base.held_out)
            values |= _values("held_out", "ema", best, names) | self._by_dataset("ema", taken.averaged, base, names)
        advice: list[str] = []
        if taken.trained is not None and base.trained is not None:
            taught = paired(taken.trained, base.trained)
            values |= _values("trained", "raw", taught, names) | gap_values(held, taught, names)
            advice += gap_advice(held, taught, names)
        if taken.velocities is not None and base.velocities is not None:  # both of the same items
            items = drift_items(*base.held_out.shape)
            gain = math.fsum(float(base.held_out[item] - taken.raw[item]) for item in items) / len(items)
            way = drift(taken.velocities, base.velocities, gain)
            values["drift"] = way.share
            advice += drift_advice(way)
        if self._alarms:
            advice += best_advice(best, self._best, progress.step)
        if math.isfinite(best.mean) and (self._best is None or best.mean < self._best.value):
            self._best = Best(progress.step, best.mean, best.changes)
            self._write(parts, {**self._content, "best": asdict(self._best)})
        if bad := [name for name, value in values.items() if not math.isfinite(value)]:
            advice.insert(0, f"not finite: {', '.join(bad[:3])}{' …' if len(bad) > 3 else ''}: the weights are spoiled")
        return Measured(progress, {name: value for name, value in values.items() if name not in bad}, tuple(advice))

    def _by_dataset(self, view: str, losses: Tensor, base: Base, names: Sequence[str]) -> dict[str, float]:
        """The numbers of each dataset, where there are several."""
        datasets = dict.fromkeys(subject.dataset for subject in self._held_out.subjects)
        if self._pooled or len(datasets) < 2:
            return {}
        values: dict[str, float] = {}
        for dataset in datasets:
            rows = [n for n, subject in enumerate(self._held_out.subjects) if subject.dataset == dataset]
            own = paired(losses[rows], base.held_out[rows])
            values |= _values(f"held_out/{self._names[dataset]}", view, own, names)
        return values

    # ---- what is kept ----

    def _mark(self, parts: Parts) -> dict[str, str]:
        """What the losses are of, in short: held-out pictures, trained ones."""
        probes = {"held_out": self._held_out, "trained": self._trained}
        return {
            name: digest(probe.seed, [subject.id for subject in probe.subjects],
                         [subject.made_of for subject in probe.subjects], probe.sigmas(parts).tolist())
            for name, probe in probes.items() if probe is not None
        }  # fmt: skip

    def _read(self, parts: Parts, progress: Progress) -> bool:
        """Read the base's losses. Whether all ranks could. The mark says that the rest is as this class writes it."""
        kept, mark = _json(self._folder / FILE), self._mark(parts)
        told = kept.get("of", {})
        there = told.get("held_out") == mark["held_out"]
        if parts.accelerator.num_processes > 1:
            count = torch.tensor(float(there), device=parts.accelerator.device)
            there = round(summed(parts.accelerator, count).item()) == parts.accelerator.num_processes
        if not there:
            return False
        self._content, values = kept, kept["base"]
        trained = _tensor(values.get("trained")) if told.get("trained") == mark.get("trained") else None
        velocities = self._velocities(told["velocities"]) if self._alarms else None
        self._base = Base(int(kept["step"]), torch.tensor(values["held_out"], dtype=torch.float64), trained, velocities)
        if self._alarms and (velocities is None or (self._trained is not None and trained is None)):
            log.warning(
                "%s does not hold all that the alarms compare with (they were off, or the trained pictures changed): "
                "the gap or the drift is not told", self._folder / FILE,
            )  # fmt: skip
        best = kept.get("best")
        if best and best["step"] <= progress.step:
            self._best = Best(int(best["step"]), float(best["value"]), tuple(best["changes"]))
        if self._base.step:
            log.warning("the held-out loss is told against the model of step %d", self._base.step)
        return True

    def _velocities(self, mark: str | None) -> Tensor | None:
        """The base's predictions; None when the file is not there, or not the one that was kept."""
        try:
            data = (self._folder / VELOCITIES).read_bytes()
        except OSError:
            return None
        return load(data)["velocities"] if content_hash(data) == mark else None

    def _keep(self, parts: Parts, base: Base) -> None:
        """Keep what was just measured of the base."""
        data = None if base.velocities is None else save({"velocities": base.velocities.contiguous()})
        if data is not None and parts.accelerator.is_main_process:
            write_atomically(self._folder / VELOCITIES, data)
        probes = (self._held_out, self._trained)
        content = {
            "step": base.step,
            "of": {**self._mark(parts), "velocities": None if data is None else content_hash(data)},
            "pictures": [[subject.id for subject in probe.subjects] if probe else [] for probe in probes],
            "sigmas": self._held_out.sigmas(parts).tolist(),
            "base": {"held_out": base.held_out.tolist(), "trained": _listed(base.trained)},
            "best": None,
        }
        self._write(parts, content)

    def _write(self, parts: Parts, content: dict[str, Any]) -> None:
        self._content = content
        if parts.accelerator.is_main_process:
            write_atomically(self._folder / FILE, (json.dumps(content) + "\n").encode("utf-8"))


class NoEvaluator:
    """Stands where nothing is held out."""

    def start(self, parts: Parts, progress: Progress) -> None:
        pass

    def run(self, parts: Parts, progress: Progress) -> None:
        pass

    def finish(self, parts: Parts, progress: Progress) -> None:
        pass


def judged(measured: Measured | None) -> float | None:
    """The number by which checkpoints are compared, the lower the better: of the average where there is one."""
    if measured is None:
        return None
    return measured.values.get("held_out/ema", measured.values.get("held_out/raw"))


def drift_items(subjects: int, levels: int) -> tuple[Item, ...]:
    """A few items, spread over pictures and levels."""
    return tuple(
        dict.fromkeys((number % subjects, number % levels) for number in range(min(DRIFT_ITEMS, subjects * levels)))
    )


# ---- numbers and advice ----


def _values(what: str, view: str, found: Paired, names: Sequence[str]) -> dict[str, float]:
    values = {f"{what}/{view}": found.mean, f"{what}/{view}/loss": found.loss}
    if found.se is not None:
        values[f"{what}/{view}/se"] = found.se
    return values | {f"{what}/{view}/sigma_{name}": value for name, value in zip(names, found.levels, strict=True)}


def gap_values(held: Paired, taught: Paired, names: Sequence[str]) -> dict[str, float]:
    """How much more the trained pictures gained than the held-out ones, in shares of the base's loss."""
    values = {"gap/raw": held.mean - taught.mean}
    if (error := _gap_error(held, taught)) is not None:
        values["gap/raw/se"] = error
    pairs = zip(names, held.levels, taught.levels, strict=True)
    return values | {f"gap/raw/sigma_{name}": one - other for name, one, other in pairs}


def _gap_error(held: Paired, taught: Paired) -> float | None:
    if held.se is None or taught.se is None:
        return None
    return math.hypot(held.se, taught.se)


def gap_advice(held: Paired, taught: Paired, names: Sequence[str]) -> list[str]:
    """A line when the trained pictures gained clearly more."""
    gap, error = held.mean - taught.mean, _gap_error(held, taught)
    if not gap > GAP or (error is not None and gap < SURE * error):
        return []
    widest = max(range(len(names)), key=lambda level: held.levels[level] - taught.levels[level])
    return [
        f"overfitting: trained pictures gained {100 * gap:.0f} % of the base model's loss more than held-out ones, "
        f"most at σ {names[widest]}: stop earlier, lower learning_rate, or add pictures"
    ]


def drift_advice(way: Drift) -> list[str]:
    """A line when the predictions have moved far, and mostly not to where held-out pictures are."""
    if not way.share > DRIFT or way.gained > GAINED:
        return []
    return [
        f"drift: predictions are {100 * way.share:.0f} % of their length away from the base model's, which may forget "
        "what it knew: lower learning_rate, stop earlier, or add regularisation data"
    ]


def best_advice(now: Paired, best: Best | None, step: int) -> list[str]:
    """A line when the held-out loss has clearly risen from its lowest, or is above the base model's."""
    if best is None or best.step >= step or len(best.changes) != len(now.changes):
        return []
    rises = [one - other for one, other in zip(now.changes, best.changes, strict=True)]
    rise, error = math.fsum(rises) / len(rises), standard_error(rises)
    if not rise > WORSE or (error is not None and rise < SURE * error):
        return []
    than = "the base model was better" if best.step == 0 else f"the model of step {best.step} was better"
    return [f"held-out loss: {than} ({best.value:.3f}, now {now.mean:.3f}): more steps like these make it worse"]


# ---- the file ----


def _json(path: Path) -> dict[str, Any]:
    """What the file holds; empty when there is none or it cannot be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _tensor(values: Any) -> Tensor | None:
    return None if values is None else torch.tensor(values, dtype=torch.float64)


def _listed(values: Tensor | None) -> list[Any] | None:
    return None if values is None else values.tolist()
