"""The hinge: what a run will do, worked out before any weight is loaded. Pure and torch-free.

Left of it is what was asked and what is there; right of it everything takes its numbers from here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sana_tune.config.schema import Config
from sana_tune.data.buckets import Bucket
from sana_tune.data.geometry import Size
from sana_tune.data.survey import Ledger
from sana_tune.model.facts import ModelFacts
from sana_tune.model.shift import shift_for
from sana_tune.progress import Every

LEFT_OUT_SHOWN = 5
TEXT_TOKENS_GUESS = 60  # a caption's tokens before it was ever counted; only for the disk estimate


@dataclass(frozen=True)
class CacheNeed:
    """One cache: how many entries the run needs, how many are there, and what making the rest takes on disk."""

    name: str
    folder: str
    needed: int
    hits: int
    bytes_to_make: int

    @property
    def misses(self) -> int:
        return self.needed - self.hits


@dataclass(frozen=True)
class BucketPlan:
    """One bucket of one dataset in one epoch; `filled` samples are repeated to complete the last micro-batch."""

    dataset: str
    width_px: int
    height_px: int
    pictures: int
    repeats: int
    batch_size: int
    micro_batches: int
    filled: int
    flow_shift: float


@dataclass(frozen=True)
class Plan:
    """What will happen. Steps are optimizer steps; an epoch may end inside a step (contracts §5)."""

    model: str
    parameters: int
    buckets: tuple[BucketPlan, ...]
    micro_batches_per_epoch: int
    micro_batches_per_step: int
    steps_per_epoch: float
    total_steps: int
    epochs: float
    images_seen: int
    first_step: int
    save_every: Every
    validate_every: Every
    caches: tuple[CacheNeed, ...]
    disk_needed_bytes: int
    disk_free_bytes: int
    flow_shift: float
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Everything as plain values, for plan.json."""
        return asdict(self)

    def shift_of(self, width_px: int, height_px: int) -> float:
        """The flow shift of a bucket."""
        for bucket in self.buckets:
            if (bucket.width_px, bucket.height_px) == (width_px, height_px):
                return bucket.flow_shift
        raise KeyError(f"no bucket has the size {width_px}x{height_px}")


def total_steps(config: Config, micro_batches_per_epoch: int, micro_batches_per_step: int) -> int:
    """Length of the run in optimizer steps: the first of max_train_steps and num_train_epochs; neither: 1 epoch."""
    steps, epochs = config.train.max_train_steps or 0, config.train.num_train_epochs or 0
    if not steps and not epochs:
        epochs = 1
    by_epochs = math.ceil(epochs * micro_batches_per_epoch / micro_batches_per_step)
    if steps and epochs:
        return min(steps, by_epochs)
    return steps or by_epochs


def base_shift(config: Config, facts: ModelFacts) -> float:
    """Flow shift of the run: the one asked for, else the model's, from which auto shift always starts."""
    asked, auto = config.flow.flow_schedule_shift, config.flow.flow_schedule_auto_shift
    return facts.flow_shift if auto or asked is None else asked


def flow_shift_of(config: Config, facts: ModelFacts, size: Size) -> float:
    """Flow shift of a bucket: the run's, grown with the tokens when auto shift is on."""
    tokens = (size.width // facts.vae_factor) * (size.height // facts.vae_factor)
    auto = config.flow.flow_schedule_auto_shift
    return shift_for(base_shift(config, facts), tokens, facts.native_tokens, facts.scheduler, auto=auto)


def make_plan(
    config: Config,
    facts: ModelFacts,
    buckets: Sequence[Bucket],
    caches: Sequence[CacheNeed],
    *,
    first_step: int,
    disk_free_bytes: int,
    other_model_bytes: int = 0,
    notes: Sequence[str] = (),
    ranks: int = 1,
) -> Plan:
    """Work out the whole run.

    first_step: where a resumed run stands (0 for a fresh one). other_model_bytes: VAE and text encoder on disk,
    which the exported pipeline holds a copy of.
    """
    per_epoch = sum(bucket.micro_batches for bucket in buckets)
    per_step = config.train.gradient_accumulation_steps * ranks
    steps = total_steps(config, per_epoch, per_step)
    mean_batch = sum(bucket.micro_batches * bucket.batch_size for bucket in buckets) / per_epoch
    bucket_plans = tuple(_bucket_plan(bucket, flow_shift_of(config, facts, bucket.size)) for bucket in buckets)
    return Plan(
        model=facts.name,
        parameters=facts.parameters,
        buckets=bucket_plans,
        micro_batches_per_epoch=per_epoch,
        micro_batches_per_step=per_step,
        steps_per_epoch=per_epoch / per_step,
        total_steps=steps,
        epochs=steps * per_step / per_epoch,
        images_seen=round(steps * per_step * mean_batch),
        first_step=first_step,
        save_every=Every(config.train.checkpoint_step_interval),
        validate_every=Every(config.validation.validation_step_interval),
        caches=tuple(caches),
        disk_needed_bytes=disk_needed(config, facts, steps, caches) + other_model_bytes,
        disk_free_bytes=disk_free_bytes,
        flow_shift=base_shift(config, facts),
        notes=tuple(dict.fromkeys((*notes, *_notes(config, facts)))),
    )


def _bucket_plan(bucket: Bucket, shift: float) -> BucketPlan:
    return BucketPlan(
        dataset=bucket.dataset,
        width_px=bucket.size.width,
        height_px=bucket.size.height,
        pictures=len(bucket.records),
        repeats=bucket.repeats,
        batch_size=bucket.batch_size,
        micro_batches=bucket.micro_batches,
        filled=bucket.filled,
        flow_shift=round(shift, 4),
    )


def _notes(config: Config, facts: ModelFacts) -> list[str]:
    notes = []
    if config.flow.flow_schedule_auto_shift and config.flow.flow_schedule_shift is not None:
        notes.append("flow_schedule_shift is not used: flow_schedule_auto_shift starts from the model's own shift")
    return [*notes, *facts.notes]


def checkpoint_bytes(config: Config, parameters: int) -> int:
    """Bytes of one checkpoint: fp32 weights, two fp32 states of AdamW, and the EMA."""
    return parameters * 4 * (3 + config.ema.use_ema)


def disk_needed(config: Config, facts: ModelFacts, steps: int, caches: Sequence[CacheNeed]) -> int:
    """Bytes the run will write: caches to come, checkpoints kept, and the exported pipeline."""
    parameters = facts.parameters
    every, limit = config.train.checkpoint_step_interval, config.train.checkpoints_total_limit
    written = max(1, steps // every + bool(steps % every)) if every else 1
    kept = min(written, limit) if limit else written
    pipeline = parameters * 4 * (1 + config.ema.use_ema)
    return sum(cache.bytes_to_make for cache in caches) + kept * checkpoint_bytes(config, parameters) + pipeline


def latent_bytes(size: Size, facts: ModelFacts) -> int:
    """Bytes of one fp32 latent of a bucket."""
    return (size.width // facts.vae_factor) * (size.height // facts.vae_factor) * facts.latent_channels * 4


def text_bytes(facts: ModelFacts, captions: int) -> int:
    """Estimated bytes of embeddings still to be made: nobody has counted their tokens yet."""
    return captions * TEXT_TOKENS_GUESS * facts.caption_dim * 2


def plan_lines(plan: Plan, ledger: Ledger) -> list[str]:
    """The plan in plain lines, for the screen and the log."""
    lines = [f"Model: {plan.model}, {plan.parameters / 1e6:,.1f} M parameters, flow shift {plan.flow_shift:g}"]
    for part in ledger.datasets:
        lines.append(
            f"Dataset {part.dataset}: {part.found} pictures found = {part.trained} trained + "
            f"{len(part.left_out)} left out; {part.not_pictures} other files, {part.caption_files} of them captions"
        )
        lines += [f"    left out: {key} ({reason})" for key, reason in part.left_out[:LEFT_OUT_SHOWN]]
        if len(part.left_out) > LEFT_OUT_SHOWN:
            lines.append(f"    … and {len(part.left_out) - LEFT_OUT_SHOWN} more, all in ledger.json")
        lines += [f"    {_bucket_line(bucket)}" for bucket in plan.buckets if bucket.dataset == part.dataset]
    for cache in plan.caches:
        bytes_text = f", about {human_bytes(cache.bytes_to_make)}" if cache.misses else ""
        lines.append(f"Cache {cache.name}: {cache.hits} of {cache.needed} there, {cache.misses} to make{bytes_text}")
    lines.append(
        f"Length: {plan.total_steps} steps of {plan.micro_batches_per_step} micro-batch(es), "
        f"{plan.steps_per_epoch:g} steps an epoch, {plan.epochs:.3g} epochs, {plan.images_seen:,} images"
        + (f"; going on from step {plan.first_step}" if plan.first_step else "")
    )
    lines.append(f"Disk: about {human_bytes(plan.disk_needed_bytes)} needed, {human_bytes(plan.disk_free_bytes)} free")
    return lines


def _bucket_line(bucket: BucketPlan) -> str:
    repeats = f" × {bucket.repeats + 1}" if bucket.repeats else ""
    filled = f" ({bucket.filled} filled in from the same bucket)" if bucket.filled else ""
    return (
        f"{bucket.width_px}x{bucket.height_px}: {bucket.pictures} pictures{repeats} = {bucket.micro_batches} "
        f"micro-batches of {bucket.batch_size}{filled}, shift {bucket.flow_shift:g}"
    )


def human_bytes(count: float) -> str:
    """Bytes for people: 512 B, 1.2 MB, 3.4 GB."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
