"""The hinge: what a run will do, worked out before any weight is loaded. Pure and torch-free.

Left of it is what was asked and what is there; right of it everything takes its numbers from here.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from sana_tune.config.schema import Config
from sana_tune.data.buckets import Bucket
from sana_tune.data.geometry import Size
from sana_tune.data.survey import DatasetLedger, Ledger
from sana_tune.memory import Load, MemoryPlan, checkpointed_share
from sana_tune.model.facts import ModelFacts
from sana_tune.model.shift import shift_for
from sana_tune.progress import Every

LEFT_OUT_SHOWN = 5
TEXT_TOKENS_GUESS = 60  # a caption's tokens before it was ever counted; only for the disk estimate


@dataclass(frozen=True)
class CacheNeed:
    """One cache: how many entries the run needs, how many are there, and what making the rest takes on disk.

    unknown: entries of which nobody can say yet whether they are there, since what they are made of was never
    hashed; a check does not hash. bytes_to_make counts them as if they were to be made.
    """

    name: str
    folder: str
    needed: int
    hits: int
    bytes_to_make: int
    unknown: int = 0

    @property
    def misses(self) -> int:
        return self.needed - self.hits - self.unknown


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
class DiskNeed:
    """Bytes that a run writes: caches to come, the checkpoints that are kept (of `kept`), and the pipeline."""

    caches_bytes: int
    checkpoints_bytes: int
    kept: int
    pipeline_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.caches_bytes + self.checkpoints_bytes + self.pipeline_bytes


@dataclass(frozen=True)
class Plan:
    """What will happen. Steps are optimizer steps; an epoch may end inside a step (contracts §5).

    memory: None where nobody worked it out. pace: all that decides how long a step takes; step_s: seconds that a step
    took here before at the same pace, None when that is not known.
    """

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
    disk: DiskNeed
    disk_free_bytes: int
    flow_shift: float
    notes: tuple[str, ...]
    memory: MemoryPlan | None = None
    pace: Mapping[str, Any] = field(default_factory=dict)
    step_s: float | None = None

    @property
    def disk_needed_bytes(self) -> int:
        """Bytes that the run writes in all."""
        return self.disk.total_bytes

    @property
    def steps_left(self) -> int:
        """Steps from where the run stands to its end."""
        return max(0, self.total_steps - self.first_step)

    @property
    def left_s(self) -> float | None:
        """Seconds that the steps left take, without caching and drawing; None when no speed is known."""
        return None if self.step_s is None else self.step_s * self.steps_left

    @property
    def images_per_step(self) -> float:
        """Pictures that one optimizer step sees, on average over the buckets."""
        return self.images_seen / self.total_steps if self.total_steps else 0.0

    def to_json(self) -> dict[str, Any]:
        """Everything as plain values, for plan.json."""
        values = {**asdict(self), "memory": self.memory and self.memory.to_json(), "left_s": self.left_s}
        for cache, told in zip(self.caches, values["caches"], strict=True):
            told["misses"] = cache.misses
        sums = {"disk_needed_bytes": self.disk_needed_bytes, "images_per_step": self.images_per_step}
        return {**values, **sums, "steps_left": self.steps_left}

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
    memory: MemoryPlan | None = None,
    precision: str | None = None,
    ranks: int = 1,
) -> Plan:
    """Work out the whole run.

    first_step: where a resumed run stands (0 for a fresh one). other_model_bytes: VAE and text encoder on disk,
    which the exported pipeline holds a copy of. precision: as the run computes, where that is not mixed_precision.
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
        disk=disk_need(config, facts, steps, caches, other_model_bytes),
        disk_free_bytes=disk_free_bytes,
        flow_shift=base_shift(config, facts),
        notes=tuple(dict.fromkeys((*notes, *_notes(config, facts)))),
        memory=memory,
        pace=pace_of(config, facts, buckets, per_step, memory, precision),
    )


def pace_of(
    config: Config,
    facts: ModelFacts,
    buckets: Sequence[Bucket],
    per_step: int,
    memory: MemoryPlan | None,
    precision: str | None = None,
) -> dict[str, Any]:
    """All that decides how long a step takes: two runs of one pace are as fast. Plain values, as JSON gives them."""
    shares = Counter[tuple[int, int, int]]()
    for bucket in buckets:
        shares[bucket.size.width, bucket.size.height, bucket.batch_size] += bucket.micro_batches
    return {
        "parameters": facts.parameters,
        "device": None if memory is None or memory.device is None else memory.device.name,
        "precision": precision or config.model.mixed_precision,
        "weights_dtype": config.model.weights_dtype,
        "optimizer": config.optimizer.optimizer,
        "use_ema": config.ema.use_ema,
        "checkpointed_share": checkpointed_share(config, facts.layers),
        "micro_batches_per_step": per_step,
        "micro_batches": [[*size, count] for size, count in sorted(shares.items())],
    }


def loads_of(buckets: Sequence[Bucket]) -> list[Load]:
    """The micro-batches of the buckets, each size once."""
    sizes = {(bucket.size.width, bucket.size.height, bucket.batch_size) for bucket in buckets}
    return [Load(*size) for size in sorted(sizes)]


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
    """Bytes of one checkpoint: the weights and the optimizer's states in their dtype, and the EMA in fp32."""
    if config.model.weights_dtype == "bf16":
        return parameters * (2 * 4 + 4 * config.ema.use_ema)  # two states and Kahan's remainders
    return parameters * 4 * (3 + config.ema.use_ema)


def disk_need(
    config: Config, facts: ModelFacts, steps: int, caches: Sequence[CacheNeed], other_model_bytes: int = 0
) -> DiskNeed:
    """Bytes the run will write: caches to come, checkpoints kept, and the exported pipeline."""
    parameters = facts.parameters
    every, limit = config.train.checkpoint_step_interval, config.train.checkpoints_total_limit
    written = max(1, steps // every + bool(steps % every)) if every else 1
    kept = min(written, limit) if limit else written
    weights = 2 if config.model.weights_dtype == "bf16" else 4
    return DiskNeed(
        caches_bytes=sum(cache.bytes_to_make for cache in caches),
        checkpoints_bytes=kept * checkpoint_bytes(config, parameters),
        kept=kept,
        pipeline_bytes=parameters * (weights + 4 * config.ema.use_ema) + other_model_bytes,
    )


def latent_bytes(size: Size, facts: ModelFacts) -> int:
    """Bytes of one fp32 latent of a bucket."""
    return (size.width // facts.vae_factor) * (size.height // facts.vae_factor) * facts.latent_channels * 4


def text_bytes(facts: ModelFacts, captions: int) -> int:
    """Estimated bytes of embeddings still to be made: nobody has counted their tokens yet."""
    return captions * TEXT_TOKENS_GUESS * facts.caption_dim * 2


def plan_lines(plan: Plan, ledger: Ledger) -> list[str]:
    """The plan in plain lines, for the screen and the log; what belongs to a line above is indented."""
    lines = [f"Model: {plan.model}, {plan.parameters / 1e6:,.1f} M parameters, flow shift {plan.flow_shift:g}"]
    for part in ledger.datasets:
        lines.append(f"Dataset {part.dataset}: {dataset_lines(part)[0]}")
        lines += dataset_lines(part)[1:]
        lines += [f"    {_bucket_line(bucket)}" for bucket in plan.buckets if bucket.dataset == part.dataset]
    lines += [_cache_line(cache) for cache in plan.caches]
    lines.append(f"Length: {length_line(plan)}")
    lines += [f"Time: {line}" for line in time_lines(plan)]
    lines += [f"Memory: {line}" if number == 0 else line for number, line in enumerate(memory_lines(plan))]
    return [*lines, f"Disk: {disk_line(plan)}"]


def dataset_lines(part: DatasetLedger) -> list[str]:
    """What became of the files of a dataset; the pictures that are left out follow, indented."""
    lines = [
        f"{part.found} pictures found = {part.trained} trained + {len(part.left_out)} left out; "
        f"{part.not_pictures} other files, {part.caption_files} of them captions"
    ]
    lines += [f"    left out: {key} ({reason})" for key, reason in part.left_out[:LEFT_OUT_SHOWN]]
    if len(part.left_out) > LEFT_OUT_SHOWN:
        lines.append(f"    … and {len(part.left_out) - LEFT_OUT_SHOWN} more, all in ledger.json")
    return lines


def disk_line(plan: Plan) -> str:
    """What is written, and what is free."""
    disk = plan.disk
    return (
        f"about {human_bytes(plan.disk_needed_bytes)} needed (caches {human_bytes(disk.caches_bytes)}, "
        f"{disk.kept} checkpoint{'s' * (disk.kept != 1)} {human_bytes(disk.checkpoints_bytes)}, pipeline "
        f"{human_bytes(disk.pipeline_bytes)}), {human_bytes(plan.disk_free_bytes)} free"
    )


def length_line(plan: Plan) -> str:
    """How long the run is."""
    going_on = f"; going on from step {plan.first_step}" if plan.first_step else ""
    return (
        f"{plan.total_steps} steps of {plan.micro_batches_per_step} micro-batch(es), "
        f"{plan.steps_per_epoch:g} steps an epoch, {plan.epochs:.3g} epochs, {plan.images_seen:,} images, "
        f"{plan.images_per_step:.3g} a step{going_on}"
    )


def time_lines(plan: Plan) -> list[str]:
    """How long the steps left take, where a speed was measured."""
    if plan.step_s is None or plan.left_s is None or not plan.steps_left:
        return []
    return [
        f"about {human_time(plan.left_s)} for {plan.steps_left} steps at {plan.step_s:.3g} s a step, as "
        "measured in the last run here; caching and validation pictures come on top"
    ]


def memory_lines(plan: Plan) -> list[str]:
    """What the run takes on its device, and what would make it fit."""
    if plan.memory is None:
        return []
    need, caching, device = plan.memory.need, plan.memory.caching, plan.memory.device
    parts = {
        "weights": need.weights_bytes, "gradients": need.gradients_bytes, "optimizer": need.optimizer_bytes,
        "EMA": need.ema_bytes, "bf16 copies": need.copies_bytes, "activations": need.activations_bytes,
        "other": need.overhead_bytes,
    }  # fmt: skip
    told = ", ".join(f"{name} {human_bytes(size)}" for name, size in parts.items() if size)
    there = "" if device is None else f"; {device.name} has {human_bytes(device.total_bytes)}"
    lines = [
        f"about {human_bytes(need.total_bytes)} to train ({told}), {human_bytes(caching.total_bytes)} to "
        f"fill the caches{there}"
    ]
    return [*lines, *(f"    it would fit with {way}" for way in ways_told(plan.memory))]


def ways_told(memory: MemoryPlan, most: int = 3) -> list[str]:
    """The changes that would make it fit, in the words of config.json: `a 1, b false (12.3 GB)`."""
    told = []
    for way in memory.ways[:most]:
        changes = ", ".join(
            f"{key} {str(value).lower() if isinstance(value, bool) else value}" for key, value in way.changes.items()
        )
        told.append(f"{changes} ({human_bytes(way.total_bytes)})")
    return told


def memory_warnings(memory: MemoryPlan) -> list[str]:
    """What to say when the run does not fit its device: an estimate, so no mistake of the user's."""
    device = memory.device
    if device is None:
        return []
    has = f"{device.name} has {human_bytes(device.total_bytes)}"
    warnings = []
    if not memory.fits:
        ways = ways_told(memory, most=1)
        advice = f"it would fit with {ways[0]}" if ways else "no setting makes it fit: take a smaller model or size"
        warnings.append(f"training takes about {human_bytes(memory.need.total_bytes)} of memory; {has}: {advice}")
    if not memory.caching_fits:
        text, pictures = memory.caching.text_bytes, memory.caching.pictures_bytes
        what = f"the text encoder ({human_bytes(text)})" if text > device.total_bytes else "the VAE"
        advice = "" if text > device.total_bytes else f" ({human_bytes(pictures)}): lower vae_batch_size"
        warnings.append(f"filling the caches with {what} does not fit; {has}{advice}")
    return warnings


def _cache_line(cache: CacheNeed) -> str:
    bytes_text = f", about {human_bytes(cache.bytes_to_make)}" if cache.misses or cache.unknown else ""
    unknown = f", {cache.unknown} unknown (never hashed yet)" if cache.unknown else ""
    return f"Cache {cache.name}: {cache.hits} of {cache.needed} there, {cache.misses} to make{unknown}{bytes_text}"


def _bucket_line(bucket: BucketPlan) -> str:
    repeats = f" × {bucket.repeats + 1}" if bucket.repeats else ""
    filled = f" ({bucket.filled} filled in from the same bucket)" if bucket.filled else ""
    return (
        f"{bucket.width_px}x{bucket.height_px}: {bucket.pictures} pictures{repeats} = {bucket.micro_batches} "
        f"micro-batches of {bucket.batch_size}{filled}, shift {bucket.flow_shift:g}"
    )


def human_time(seconds: float) -> str:
    """A duration for people: 40 s, 12 min, 3 h 05 min, 2 d 4 h."""
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if seconds < 90:
        return f"{seconds:.0f} s"
    if minutes < 90:
        return f"{minutes} min"
    if hours < 48:
        return f"{minutes // 60} h {minutes % 60:02} min"
    return f"{hours // 24} d {hours % 24} h"


def human_bytes(count: float) -> str:
    """Bytes for people: 512 B, 1.2 MB, 3.4 GB."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
