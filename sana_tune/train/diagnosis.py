"""Why a step was not finite: the step is done once more, looked at from inside, and what is found is told.

Position decides all randomness, so the very step that failed can be replayed. Nothing is moved: the run ends after it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from sana_tune.errors import Problem, UserError
from sana_tune.log import log
from sana_tune.store import write_atomically
from sana_tune.train.sharding import is_sharded, local
from sana_tune.train.step import Parts, clip, joined, micro_loss, summed

if TYPE_CHECKING:
    from sana_tune.data.batch import Batch
    from sana_tune.train.step import Sample

FILE = "diagnosis.json"
_SHOWN = 4


@dataclass(frozen=True)
class SampleFacts:
    """One sample of the step. loss: None where it is not finite."""

    id: str
    caption: str | None
    sigma: float
    loss: float | None


@dataclass(frozen=True)
class Finding:
    """What was found first, in the order in which a step computes.

    stage: inputs, weights, forward, loss, backward, gradient, nothing (the replay was finite) or memory (there was none
    for it). place: the sample,
    weight or module. exact: how the same forward pass was in fp32: "finite", "not finite", or why it is not known.
    """

    stage: str
    place: str
    exact: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """A step that was not finite. micro_batch: which of the step's, on rank `rank`."""

    step: int
    loss: float | None
    grad_norm: float | None
    finding: Finding
    micro_batch: int = 0
    rank: int = 0
    samples: tuple[SampleFacts, ...] = field(default=())

    @property
    def what(self) -> str:
        """What was found, in words."""
        where = f" on rank {self.rank}" if self.rank else ""
        return (
            f"{_FOUND[self.finding.stage].format(place=self.finding.place)}{where}{_EXACT.get(self.finding.exact, '')}"
        )

    @property
    def fix(self) -> str:
        """What to try."""
        if self.finding.stage == "forward" and self.finding.exact == "finite":
            return _PRECISION
        return _TRY[self.finding.stage]

    def lines(self) -> list[str]:
        """The samples, a line each: those that are not finite first, a few of them."""
        ordered = sorted(self.samples, key=lambda sample: sample.loss is not None)
        found = []
        for sample in ordered[:_SHOWN]:
            caption = "" if sample.caption is None else f", caption {sample.caption[:60]!r}"
            loss = "not finite" if sample.loss is None else f"{sample.loss:.4g}"
            found.append(f"{sample.id}: noise level {sample.sigma:.4f}, loss {loss}{caption}")
        more = len(ordered) - len(found)
        return [*found, f"… and {more} more in {FILE}"] if more > 0 else found


_FOUND = {
    "inputs": "the first that is not finite: {place}",
    "weights": "the weights themselves are not finite: {place}",
    "forward": "the first that is not finite: the output of {place}",
    "loss": "the model's output is finite, its loss is not: {place}",
    "backward": "the forward pass is finite; the first gradient that is not: that of the output of {place}",
    "gradient": "all gradients between the modules are finite; that of a weight is not: {place}",
    "nothing": "done once more, the same step is finite",
    "memory": "there was no memory to do the step once more and look inside",
}
_EXACT = {
    "finite": "; in fp32 the same pass is finite, so precision is the cause",
    "not finite": "; in fp32 it is not finite either, so precision is not the cause",
    "memory": "; there was no memory to repeat it in fp32",
}
_PRECISION = (
    "train with mixed_precision bf16 in place of fp16, or with --mixed_precision no; weights of the 1.0 repositories "
    "need those with BF16 in their name"
)
_LOWER = (
    "go on from an earlier checkpoint with a lower learning_rate (a half), a lower max_grad_norm or a longer "
    "lr_warmup_steps; look at the pictures named here"
)
_TRY = {
    "inputs": "`sana_tune cache verify` reads all caches; `sana_tune cache explain PICTURE` names the entry: remove "
    "its file, and the next run makes it again",
    "weights": "go on from a checkpoint before it (`--resume_from_checkpoint PATH`); if the base model has them, "
    "download it again",
    "forward": _LOWER,
    "loss": _LOWER + "; loss_type huber forgives outliers",
    "backward": _LOWER + "; --mixed_precision no tells whether precision is the cause",
    "gradient": _LOWER + "; --mixed_precision no tells whether precision is the cause",
    "memory": _LOWER + "; --mixed_precision no tells whether precision is the cause",
    "nothing": "what computes the same twice and differs is the machine: test its memory and the GPU (ECC errors, "
    "overclocking, heat), then start again: the run goes on from its newest checkpoint",
}


def diagnose(parts: Parts, micro_batches: Sequence[Sample], step: int, loss: float, grad_norm: float) -> Diagnosis:
    """Replay the step that follows `step` done ones and say what in it is not finite first. Weights stay.

    With several processes each looks at its own part; all answer the first finding of any. They go through the same
    passes, since those of a split model are collective.
    """
    # the others may be in a pass that this process left: it waits for nobody, and they are ended with it
    try:
        own = _diagnose(parts, micro_batches, step, loss, grad_norm)
    except torch.OutOfMemoryError:
        rank = parts.accelerator.process_index
        return Diagnosis(step + 1, _finite(loss), _finite(grad_norm), Finding("memory", ""), 0, rank)
    except _Left as left:
        return left.diagnosis
    if parts.accelerator.num_processes == 1:
        return own
    order = list(_FOUND)  # a bad weight of one process may be a bad output of another that uses it
    return min(joined(parts.accelerator, [own]), key=lambda each: order.index(each.finding.stage))


class _Left(Exception):
    """This process had no memory for a pass that the others are in. diagnosis: what it had found before."""

    def __init__(self, diagnosis: Diagnosis):
        super().__init__(diagnosis)
        self.diagnosis = diagnosis


def _diagnose(parts: Parts, micro_batches: Sequence[Sample], step: int, loss: float, grad_norm: float) -> Diagnosis:
    ranks, rank = parts.accelerator.num_processes, parts.accelerator.process_index
    count = len(micro_batches) * ranks
    numbers = _finite(loss), _finite(grad_norm)
    samples: tuple[SampleFacts, ...] = ()
    parts.optimizer.zero_grad(set_to_none=True)
    try:
        for number, (micro_batch, batch) in enumerate(micro_batches):
            micro = micro_batch.index % count
            finding, samples = _replay(parts, batch, step, micro, count, len(micro_batches))
            found = Diagnosis(step + 1, *numbers, finding or Finding("nothing", ""), number, rank, samples)
            if is_sharded(parts.bare) and "memory" in (found.finding.stage, found.finding.exact):
                raise _Left(found)
            if _any(parts, finding is not None):
                return found
        return Diagnosis(step + 1, *numbers, _gradients(parts) or Finding("nothing", ""), 0, rank, samples)
    finally:
        parts.optimizer.zero_grad(set_to_none=True)


def _replay(
    parts: Parts, batch: Batch, step: int, micro: int, count: int, own: int
) -> tuple[Finding | None, tuple[SampleFacts, ...]]:
    """One micro-batch of this rank's `own`: its inputs, the weights, forward and backward. None when all is finite."""
    named = _inputs(batch) or _weights(parts)
    watched = _Watched(parts.bare)
    alone = _alone(parts)
    with watched.listening():
        found = micro_loss(alone, batch, step, micro, count)
        watched.phase = "backward"
        is_bad = named is not None or watched.forward is not None or not bool(torch.isfinite(found.mean))
        if not _any(parts, is_bad):
            parts.accelerator.backward(parts.scale.scaled(found.mean / own))
    per_sample = found.per_sample.tolist()
    samples = tuple(
        SampleFacts(id, batch.captions[place] if batch.captions else None, level, _finite(per_sample[place]))
        for place, (id, level) in enumerate(zip(batch.ids, found.levels.tolist(), strict=True))
    )
    exact = _exact(alone, batch, step, micro, count) if _any(parts, is_bad and named is None) else ""
    if named is not None:
        return (replace(named, exact=exact) if exact == "memory" else named), samples
    if watched.forward is not None:
        return Finding("forward", watched.forward, exact), samples
    if is_bad:
        return Finding("loss", next(sample.id for sample in samples if sample.loss is None), exact), samples
    if exact == "memory":
        return Finding("memory", ""), samples
    return (None if watched.backward is None else Finding("backward", watched.backward)), samples


class _Watched:
    """Which module of a model is the first whose output, and the first whose output's gradient, is not finite."""

    def __init__(self, model: nn.Module):
        self.forward: str | None = None
        self.backward: str | None = None
        self.phase = "forward"
        self._names = {
            module: f"{name or 'the model'} ({type(module).__name__})" for name, module in model.named_modules()
        }

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hooks of all modules alike: a hook of its own would keep a layer from being computed as in training."""
        handle = register_module_forward_hook(self._seen)
        try:
            yield
        finally:
            handle.remove()

    def _seen(self, module: nn.Module, inputs: Any, output: Any) -> None:
        name = self._names.get(module)
        if name is None or self.phase != "forward":
            return
        for tensor in _tensors(output):
            if self.forward is None and not bool(torch.isfinite(tensor).all()):
                self.forward = name
            if tensor.requires_grad:
                tensor.register_hook(self._arrives(name))

    def _arrives(self, name: str) -> Callable[[Tensor], None]:
        def look(gradient: Tensor) -> None:
            if self.backward is None and not bool(torch.isfinite(gradient).all()):
                self.backward = name

        return look


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, (tuple, list)):
        return [tensor for part in output for tensor in _tensors(part)]
    return []


def _inputs(batch: Batch) -> Finding | None:
    for place, id in enumerate(batch.ids):
        if not bool(torch.isfinite(batch.latents[place]).all()):
            return Finding("inputs", f"the latent of {id}, as its cache holds it")
        if not bool(torch.isfinite(batch.text[place][batch.text_mask[place].bool()]).all()):
            return Finding("inputs", f"the embedding of the caption of {id}, as its cache holds it")
        if batch.loss_mask is not None and not bool(torch.isfinite(batch.loss_mask[place]).all()):
            return Finding("inputs", f"the mask of {id}, as its cache holds it")
    return None


def _weights(parts: Parts) -> Finding | None:
    return _first(parts, "weights", lambda weight: weight.detach())


def _any(parts: Parts, found: bool) -> bool:
    """Whether it is so on any process."""
    if parts.accelerator.num_processes == 1:
        return found
    return bool(summed(parts.accelerator, torch.tensor(float(found), device=parts.accelerator.device)))


def _gradients(parts: Parts) -> Finding | None:
    """The gradients of all micro-batches together, and their norm: it can overflow when no gradient has."""
    found = _first(parts, "gradient", lambda weight: weight.grad)
    if any(weight.grad is not None for weight in parts.trained):
        parts.scale.unscale(parts.trained)
        if not math.isfinite(float(clip(parts.trained, 0.0, "norm"))) and found is None:
            return Finding("gradient", "each of them is finite, their norm is not")
    return found


def _first(parts: Parts, stage: str, tensor_of: Callable[[nn.Parameter], Tensor | None]) -> Finding | None:
    bad = [
        name
        for name, weight in parts.bare.named_parameters()
        if (tensor := tensor_of(weight)) is not None and not bool(torch.isfinite(local(tensor)).all())
    ]
    more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
    return Finding(stage, f"{bad[0]}{more}") if bad else None


def _alone(parts: Parts) -> Parts:
    """The same parts without the wrapper that talks to other processes, and without compiled blocks."""
    parts.bare.disable_gradient_checkpointing()  # the compiled and recomputed blocks are run by it
    return replace(parts, transformer=parts.bare, release=None)


def _exact(parts: Parts, batch: Batch, step: int, micro: int, count: int) -> str:
    """How the same forward pass is in fp32. The weights stay fp32 after it: the run is over.

    A finite loss is not enough: torch's attention on a CPU answers 0 for queries that are NaN.
    """
    if parts.input_dtype == torch.float32 and parts.accelerator.mixed_precision == "no":
        return ""
    try:
        parts.bare.float()
        watched = _Watched(parts.bare)
        with torch.no_grad(), watched.listening():
            found = micro_loss(replace(parts), batch, step, micro, count, exact=True)
        return "finite" if watched.forward is None and bool(torch.isfinite(found.mean)) else "not finite"
    except torch.OutOfMemoryError:
        return "memory"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def diagnosed(diagnosis: Diagnosis, folder: Path, why: str, sound: str) -> UserError:
    """Write the diagnosis down in the run's folder and answer the error that ends the run. why: in words; sound: what
    there is to go on from."""
    path = folder / FILE
    content = {**asdict(diagnosis), "what": diagnosis.what, "fix": diagnosis.fix}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode("utf-8"))
    except OSError as error:
        log.warning("%s could not be written: %s", path, error)
    samples = "".join(f"\n  {line}" for line in diagnosis.lines())
    what = f"{why}. {diagnosis.what[0].upper()}{diagnosis.what[1:]}. {sound}; all of it is in {path}{samples}"
    return UserError(Problem(f"step {diagnosis.step}", what, diagnosis.fix))
