"""The hinge: what a run will do, worked out before any weight is loaded. Pure and torch-free.

Left of it is what was asked and what is there; right of it everything takes its numbers from here.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from typing import Any, Literal

from sana_tune.config.lycoris import read_lycoris
from sana_tune.config.optimizers import saved_bytes
from sana_tune.config.rules import distribution_of
from sana_tune.config.schema import Config
from sana_tune.config.values import optimizer_options
from sana_tune.data.buckets import Bucket, trained
from sana_tune.data.geometry import Size
from sana_tune.data.order import names_of
from sana_tune.data.records import Role
from sana_tune.data.survey import DatasetLedger, Ledger
from sana_tune.data.timeline import Timeline, Window
from sana_tune.errors import Problem, UserError
from sana_tune.memory import Load, MemoryPlan, Weights, checkpointed_share, trained_parameters
from sana_tune.model.adapted import adapted
from sana_tune.model.facts import ModelFacts
from sana_tune.model.levels import Levels, picture
from sana_tune.model.shift import shift_for
from sana_tune.progress import Every
from sana_tune.saving import SavingPlan, decide_saving, keeping_of, most_at_once, saved_at
from sana_tune.schedule import Schedule, schedule_of

LEFT_OUT_SHOWN = 5
TEXT_TOKENS_GUESS = 60  # a caption's tokens before it was ever counted; only for the disk estimate


Mode = Literal["full", "ondemand", "none"]


@dataclass(frozen=True)
class CacheNeed:
    """One cache: how many entries the run needs, how many are there, and what making the rest takes on disk.

    unknown: entries of which nobody can say yet whether they are there, since what they are made of was never
    hashed; a check does not hash. bytes_to_make counts them as if they were to be made. mode: "ondemand" = made when
    training first needs them; "none" = nothing is kept.
    """

    name: str
    folder: str
    needed: int
    hits: int
    bytes_to_make: int
    unknown: int = 0
    mode: Mode = "full"

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
    role: str = Role.TRAIN.value


@dataclass(frozen=True)
class DatasetPlan:
    """What a dataset is for, and when it is shown.

    role: train, regularise or eval. starts and ends: the first and last epoch and optimizer step that show it, from 1;
    None = no end. text_cache: where its captions are. masks, mask_kind: the entry of its masks; None = none.
    target: what regularisation data teaches, "data" or "base"; None for other roles.
    """

    id: str
    role: str
    probability: float = 1.0
    start_epoch: int = 1
    start_step: int = 0
    end_epoch: int | None = None
    end_step: int | None = None
    text_cache: str | None = None
    masks: str | None = None
    mask_kind: str | None = None
    target: str | None = None

    @property
    def window(self) -> Window:
        """When it is shown."""
        return Window(self.start_epoch, self.start_step, self.end_epoch, self.end_step)


@dataclass(frozen=True)
class EpochsPlan:
    """Epochs, or a part of one, that show the same datasets.

    first_epoch, first_step: from 1; it begins in that step. epochs: how many the run comes to; a part counts as 1.
    micro_batches_per_epoch: of the whole epoch, of which this may be a part.
    """

    first_epoch: int
    first_step: int
    epochs: int
    micro_batches_per_epoch: int
    datasets: tuple[str, ...]


@dataclass(frozen=True)
class EvaluationPlan:
    """What is measured of held-out pictures: the start, the end, and `every` on the way.

    pictures: held-out ones, each at so many noise `levels`; compared: trained ones beside them. averaged: whether the
    EMA is measured too.
    """

    pictures: int
    levels: int
    compared: int
    averaged: bool
    every: Every

    @property
    def forwards(self) -> int:
        """Predictions that one measurement takes."""
        return self.levels * (self.pictures * (1 + self.averaged) + self.compared)


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

    With a schedule (`epochs_shown` not empty) epochs differ; micro_batches_per_epoch and steps_per_epoch are the
    first one's, and `epoch_after` knows all. held_out: buckets that no epoch shows.
    ranks: processes, which share the micro-batches of a step. memory: None where nobody worked it out. pace: all that
    decides how long a step takes; step_s: seconds that a step took here before at the same pace, None when that is not
    known.
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
    levels: Levels = field(default_factory=Levels)
    schedule: Schedule = field(default_factory=lambda: Schedule("constant", 1.0, 1))
    weights: Weights = field(default_factory=lambda: Weights("fp32", ""))
    datasets: tuple[DatasetPlan, ...] = ()
    held_out: tuple[BucketPlan, ...] = ()
    epochs_shown: tuple[EpochsPlan, ...] = ()
    ranks: int = 1
    adapter: tuple[str, ...] = ()
    saving: SavingPlan = field(default_factory=lambda: SavingPlan(0, False, ""))
    timeline: Timeline | None = field(default=None, compare=False, repr=False)
    pictures: tuple[str, ...] = ()  # what is drawn and when, in words
    evaluation: EvaluationPlan | None = None

    @property
    def evaluate_every(self) -> Every:
        """When held-out pictures are measured on the way."""
        return Every() if self.evaluation is None else self.evaluation.every

    @property
    def evaluation_s(self) -> float | None:
        """Seconds that one such measurement takes, about; None when no speed is known."""
        if self.evaluation is None or self.step_s is None or not self.images_per_step:
            return None
        # a step computes each picture forward, backward at twice the cost, and once more what is recomputed
        return self.evaluation.forwards * self.step_s / self.images_per_step / (3 + self.pace["checkpointed_share"])

    def epoch_after(self, step: int) -> float:
        """Epochs that are done after so many steps, the share of the one that it ends in counted."""
        if self.timeline is None:
            return step / self.steps_per_epoch
        return self.timeline.epochs_at(step * self.micro_batches_per_step)

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
        values = {
            **asdict(replace(self, timeline=None)),
            "memory": self.memory and self.memory.to_json(),
            "left_s": self.left_s,
        }
        for cache, told in zip(self.caches, values["caches"], strict=True):
            told["misses"] = cache.misses
        del values["timeline"]
        sums = {"disk_needed_bytes": self.disk_needed_bytes, "images_per_step": self.images_per_step}
        return {**values, **sums, "steps_left": self.steps_left}

    def shift_of(self, width_px: int, height_px: int) -> float:
        """The flow shift of a bucket."""
        for bucket in self.buckets:
            if (bucket.width_px, bucket.height_px) == (width_px, height_px):
                return bucket.flow_shift
        raise KeyError(f"no bucket has the size {width_px}x{height_px}")


def total_steps(
    config: Config, micro_batches_per_epoch: int, micro_batches_per_step: int, timeline: Timeline | None = None
) -> int:
    """Length of the run in optimizer steps: the first of max_train_steps and num_train_epochs; neither: 1 epoch.

    timeline: of datasets that start and end. Raises UserError when none is left to be shown before the end.
    """
    steps, epochs = config.train.max_train_steps or 0, config.train.num_train_epochs or 0
    if not steps and not epochs:
        epochs = 1
    if timeline is None:
        by_epochs = math.ceil(epochs * micro_batches_per_epoch / micro_batches_per_step)
    else:
        by_epochs = math.ceil(timeline.micro_batches_of(epochs) / micro_batches_per_step) if epochs else 0
    length = min(steps, by_epochs) if steps and epochs else steps or by_epochs
    if timeline is None or timeline.end is None:
        return length
    shown, last = timeline.end // micro_batches_per_step, timeline.epochs_at(timeline.end)
    by_steps = steps and length == steps
    if (by_steps and steps > shown) or (not by_steps and epochs > last):
        asked = f"max_train_steps {steps}" if by_steps else f"num_train_epochs {epochs:g}"
        what = f"after step {shown} (epoch {last:g}) there is no dataset to show, and the run goes on to {asked}"
        fix = "let a dataset end later (end_epoch, end_step) or start earlier, or make the run shorter"
        raise UserError(Problem("datasets", what, fix))
    return min(length, shown)


def base_shift(config: Config, facts: ModelFacts) -> float:
    """Flow shift of the run: the one asked for, else the model's, from which auto shift always starts."""
    asked, auto = config.flow.flow_schedule_shift, config.flow.flow_schedule_auto_shift
    return facts.flow_shift if auto or asked is None else asked


def levels_of(config: Config) -> Levels:
    """The distribution that noise levels are drawn from."""
    flow, scale = config.flow, config.flow.flow_sigmoid_scale
    return Levels(
        kind=distribution_of(config),
        mean=flow.flow_logit_mean * scale,
        std=flow.flow_logit_std * scale,
        alpha=flow.flow_beta_schedule_alpha,
        beta=flow.flow_beta_schedule_beta,
        mode_scale=flow.flow_mode_scale,
        table=flow.flow_custom_timesteps or (),
        stratified=flow.flow_stratified,
    )


def flow_shift_of(config: Config, facts: ModelFacts, size: Size) -> float:
    """Flow shift of a bucket: the run's, grown with the tokens when auto shift is on; 1 for levels that none moves."""
    if not levels_of(config).is_shifted:
        return 1.0
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
    weights: Weights | None = None,
    ranks: int = 1,
    datasets: Sequence[DatasetPlan] = (),
    timeline: Timeline | None = None,
    learns_from_base: bool = False,
) -> Plan:
    """Work out the whole run.

    datasets: what each is for. timeline: of datasets that start and end; None when all are always shown. ranks:
    processes. learns_from_base: whether the untrained model is asked too. first_step: where a resumed run stands (0 for
    a fresh one). other_model_bytes: VAE and text encoder on disk, which the exported pipeline holds a copy of.
    precision: as the run computes, where that is not mixed_precision.
    """
    all_buckets, buckets = buckets, trained(buckets)
    per_epoch = sum(b.micro_batches for b in buckets) if timeline is None else timeline.stretches[0].epoch_length
    per_step = config.train.gradient_accumulation_steps * ranks
    steps = total_steps(config, per_epoch, per_step, timeline)
    plans = [_bucket_plan(bucket, flow_shift_of(config, facts, bucket.size)) for bucket in all_buckets]
    bucket_plans = tuple(plan for plan in plans if plan.role != Role.EVAL.value)
    return Plan(
        model=facts.name,
        parameters=facts.parameters,
        buckets=bucket_plans,
        micro_batches_per_epoch=per_epoch,
        micro_batches_per_step=per_step,
        steps_per_epoch=per_epoch / per_step,
        total_steps=steps,
        epochs=(epochs := _epochs(steps * per_step, per_epoch, timeline)),
        images_seen=_images_seen(buckets, steps * per_step, timeline),
        first_step=first_step,
        save_every=saved_at(config),
        validate_every=validation_interval(config),
        caches=tuple(caches),
        disk=disk_need(config, facts, steps, caches, other_model_bytes, epochs=epochs),
        disk_free_bytes=disk_free_bytes,
        flow_shift=base_shift(config, facts),
        notes=tuple(dict.fromkeys((*notes, *_notes(config, facts)))),
        memory=memory,
        pace=pace_of(config, facts, buckets, per_step, memory, precision, learns_from_base=learns_from_base),
        levels=levels_of(config),
        schedule=schedule_of(config, steps, _mean_batch(buckets) * per_step),
        weights=weights or Weights("bf16" if config.model.weights_dtype == "bf16" else "fp32", ""),
        datasets=tuple(datasets),
        held_out=tuple(plan for plan in plans if plan.role == Role.EVAL.value),
        epochs_shown=_epochs_shown(buckets, timeline, steps, per_step),
        timeline=timeline,
        ranks=ranks,
    )


def adapter_lines(config: Config, facts: ModelFacts) -> tuple[str, ...]:
    """What the adapter is, and usual learning rates; () in full-rank training."""
    if config.model.model_type != "lora":
        return ()
    wanted, file = config.adapter, read_lycoris(config.adapter.lycoris_config)
    found = adapted(facts.transformer, file, wanted.lycoris_config)
    usual = usual_rate(config.optimizer.optimizer)
    lines = [f"{file.algo} of {wanted.lycoris_config} on {found}"]
    if config.model.base_model_precision != "no_change":
        lines[0] += f"; the base in {config.model.base_model_precision}"
    if wanted.init_lora:
        lines.append(f"begins with {wanted.init_lora}" + f", as of step {wanted.init_lora_step}" * bool(begun(config)))
    lines.append(
        f"learning rate {config.optimizer.learning_rate:g}; usual with {config.optimizer.optimizer}: {usual:g}"
    )
    return tuple(lines)


def begun(config: Config) -> int:
    """Optimizer steps that a fresh run counts as done: those of the adapter that it begins with."""
    return (config.adapter.init_lora_step or 0) if config.model.model_type == "lora" else 0


def usual_rate(optimizer: str) -> float:
    """Learning rate to begin with for LoKr: sign-based optimizers move every weight by it, others by less."""
    if "lion" in optimizer:
        return 2e-5
    return 1e-2 if optimizer.endswith("sgd") else 1e-4


def _epochs(micro_batches: int, per_epoch: int, timeline: Timeline | None) -> float:
    """Epochs that so many micro-batches come to."""
    return micro_batches / per_epoch if timeline is None else timeline.epochs_at(micro_batches)


def saving_plan(
    config: Config, facts: ModelFacts, memory: MemoryPlan | None, main_memory_bytes: int | None
) -> SavingPlan:
    """How checkpoints are written. main_memory_bytes: what is free of it now."""
    taken = 0  # main memory that training takes by itself: all that it takes on a CPU, what it takes beside a GPU
    if memory is not None:
        on_cpu = memory.device is not None and memory.device.kind == "cpu"
        taken = memory.need.total_bytes if on_cpu else memory.host_bytes
        taken *= config.launch.processes // (config.launch.num_machines or 1)  # those of this machine
    return decide_saving(config, checkpoint_bytes(config, trained_parameters(config, facts)), taken, main_memory_bytes)


def validation_interval(config: Config) -> Every:
    """When validation pictures are due on the way."""
    wanted = config.validation
    return Every(
        wanted.validation_step_interval,
        wanted.validation_epoch_interval or 0.0,
        wanted.validate_after_step,
        wanted.validate_after_epoch,
    )


def _mean_batch(buckets: Sequence[Bucket]) -> float:
    """Pictures in a micro-batch, over an epoch in which all buckets are shown."""
    pictures = sum(bucket.micro_batches * bucket.batch_size for bucket in buckets)
    return pictures / max(1, sum(bucket.micro_batches for bucket in buckets))


def _images_seen(buckets: Sequence[Bucket], micro_batches: int, timeline: Timeline | None) -> int:
    """Pictures in the first so many micro-batches of a run, fill-ins counted; in a part of an epoch about so many."""
    mean: dict[str, Fraction] = {}
    given: dict[str, int] = {}
    for name in names_of(buckets):
        own = [bucket for bucket in buckets if bucket.dataset == name]
        given[name] = sum(bucket.micro_batches for bucket in own)
        mean[name] = Fraction(sum(bucket.micro_batches * bucket.batch_size for bucket in own), given[name])
    if timeline is not None:
        shown = timeline.given(micro_batches)
        return round(sum(count * mean[name] for name, count in zip(given, shown, strict=True)))
    mean_batch = float(sum(given[name] * mean[name] for name in given)) / sum(given.values())
    return round(micro_batches * mean_batch)


def _epochs_shown(
    buckets: Sequence[Bucket], timeline: Timeline | None, steps: int, per_step: int
) -> tuple[EpochsPlan, ...]:
    """The stretches of a schedule that the run comes to."""
    if timeline is None:
        return ()
    names, end = names_of(buckets), steps * per_step
    return tuple(
        EpochsPlan(
            first_epoch=stretch.epoch + 1,
            first_step=stretch.first // per_step + 1,
            epochs=min(-(-(end - stretch.first) // stretch.taken), stretch.epochs or end),
            micro_batches_per_epoch=stretch.epoch_length,
            datasets=tuple(names[dataset] for dataset in stretch.datasets),
        )
        for stretch in timeline.stretches
        if stretch.first < end
    )


def pace_of(
    config: Config,
    facts: ModelFacts,
    buckets: Sequence[Bucket],
    per_step: int,
    memory: MemoryPlan | None,
    precision: str | None = None,
    *,
    learns_from_base: bool = False,
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
        "optimizer_release_gradients": _passes(config),
        "use_ema": config.ema.use_ema,
        "ema": [config.ema.is_on_cpu, config.ema.ema_update_interval] if config.ema.use_ema else None,
        "checkpointed_share": checkpointed_share(config, facts.layers),
        "gradient_checkpointing_backend": config.model.gradient_checkpointing_backend,
        "dynamo_backend": config.model.dynamo_backend,
        "micro_batches_per_step": per_step,
        "micro_batches": [[*size, count] for size, count in sorted(shares.items())],
        **({"learns_from_base": True} if learns_from_base else {}),
        **({"ranks": config.launch.processes} if config.launch.processes > 1 else {}),
    }


def _passes(config: Config) -> int:
    """Backward passes of a step with gradients released; 0 where they are not."""
    wanted = config.optimizer
    two = wanted.max_grad_norm > 0 and wanted.grad_clip_method == "norm"
    return (1 + two) * wanted.optimizer_release_gradients


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
        role=bucket.role.value,
    )


def _notes(config: Config, facts: ModelFacts) -> list[str]:
    notes = []
    if config.flow.flow_schedule_auto_shift and config.flow.flow_schedule_shift is not None:
        notes.append("flow_schedule_shift is not used: flow_schedule_auto_shift starts from the model's own shift")
    return [*notes, *facts.notes]


def checkpoint_bytes(config: Config, parameters: int) -> int:
    """Bytes of one checkpoint: the weights and the optimizer's states in their dtype, and the EMA in fp32."""
    wanted, dtype = config.optimizer, "bf16" if config.model.weights_dtype == "bf16" else "fp32"
    states = saved_bytes(wanted.optimizer, optimizer_options(wanted.optimizer_config), dtype)
    return round(parameters * ((2 if dtype == "bf16" else 4) + states + 4 * config.ema.use_ema))


def disk_need(
    config: Config,
    facts: ModelFacts,
    steps: int,
    caches: Sequence[CacheNeed],
    other_model_bytes: int = 0,
    *,
    epochs: float = 0,
) -> DiskNeed:
    """Bytes the run will write: caches to come, the most checkpoints there are at a time, and the exported pipeline."""
    parameters = trained_parameters(config, facts)
    kept = most_at_once(keeping_of(config), saved_at(config), steps, epochs)
    weights = 2 if config.model.weights_dtype == "bf16" else 4
    return DiskNeed(
        caches_bytes=sum(cache.bytes_to_make for cache in caches),
        checkpoints_bytes=kept * checkpoint_bytes(config, parameters),
        kept=kept,
        pipeline_bytes=parameters * (weights + 4 * config.ema.use_ema)
        + (0 if config.model.model_type == "lora" else other_model_bytes),
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
    lines += [f"Adapter: {line}" if number == 0 else f"    {line}" for number, line in enumerate(plan.adapter)]
    for part in ledger.datasets:
        first, *others = dataset_lines(part, plan)
        lines += [f"Dataset {part.dataset}: {first}", *others]
        buckets = (*plan.buckets, *plan.held_out)
        lines += [f"    {_bucket_line(bucket)}" for bucket in buckets if bucket.dataset == part.dataset]
    lines += [cache_line(cache) for cache in plan.caches]
    lines += [f"Noise: {line}" if number == 0 else f"    {line}" for number, line in enumerate(noise_lines(plan))]
    lines.append(f"Learning rate: {rate_line(plan)}")
    if plan.weights.why:
        lines.append(f"Weights: {plan.weights.dtype} ({plan.weights.why})")
    lines.append(f"Length: {length_line(plan)}")
    lines += schedule_lines(plan)
    lines += [f"Pictures: {line}" if number == 0 else f"    {line}" for number, line in enumerate(plan.pictures)]
    lines += [f"Held-out: {line}" for line in evaluation_lines(plan)]
    lines += [f"Time: {line}" for line in time_lines(plan)]
    lines += [f"Memory: {line}" if number == 0 else line for number, line in enumerate(memory_lines(plan))]
    lines.append(f"Checkpoints: {saving_line(plan)}")
    return [*lines, f"Disk: {disk_line(plan)}"]


def dataset_lines(part: DatasetLedger, plan: Plan | None = None) -> list[str]:
    """What became of the files of a dataset and what it is for; pictures that are left out follow, indented."""
    fate = "held out" if part.role == Role.EVAL.value else "trained"
    not_drawn = f" + {part.not_drawn} not drawn (max_num_samples)" if part.not_drawn else ""
    split = f" + {len(part.held_out)} held out (eval_split)" if part.held_out else ""
    lines = [
        f"{part.found} pictures found = {part.trained} {fate}{split} + {len(part.left_out)} left out{not_drawn}; "
        f"{part.not_pictures} other files, {part.caption_files} of them captions"
    ]
    lines += [f"    left out: {key} ({reason})" for key, reason in part.left_out[:LEFT_OUT_SHOWN]]
    if len(part.left_out) > LEFT_OUT_SHOWN:
        lines.append(f"    … and {len(part.left_out) - LEFT_OUT_SHOWN} more, all in ledger.json")
    moved = Counter((one, into) for _, one, into in part.merged)
    lines += [
        f"    merged: {count} picture{'s' * (count != 1)} of the small bucket {one} into {into}"
        for (one, into), count in moved.items()
    ]
    mine = next((each for each in plan.datasets if each.id == part.dataset), None) if plan else None
    return lines if mine is None else [*lines, *(f"    {line}" for line in role_lines(mine, part))]


def role_lines(dataset: DatasetPlan, part: DatasetLedger) -> list[str]:
    """What a dataset is for, when it is shown and what belongs to it, as far as that is not the usual."""
    lines = []
    if dataset.role == Role.EVAL.value:
        lines.append("held out: cached, never trained on")
    if dataset.role == Role.REGULARISE.value:
        learnt = "its pictures" if dataset.target == "data" else "what the model predicts before any training"
        lines.append(f"regularisation data: it teaches {learnt}; its loss is told apart as loss_regularisation")
    if dataset.masks:
        other = f", {part.masks_resized} of another size than the picture, resized to it" if part.masks_resized else ""
        lines.append(f"masks: {part.masks} found in {dataset.masks} ({dataset.mask_kind}){other}")
    if not dataset.window.is_always:
        begin = [f"{unit} {start}" for unit, start in (("epoch", dataset.start_epoch), ("step", dataset.start_step))
                 if start > 1]  # fmt: skip
        end = [f"{unit} {end}" for unit, end in (("epoch", dataset.end_epoch), ("step", dataset.end_step)) if end]
        since = f"from {' and '.join(begin)}" if begin else "from the start"
        lines.append(f"shown {since}{' to the end of ' + ' or '.join(end) if end else ''}")
    if dataset.text_cache:
        lines.append(f"captions are kept in the text cache {dataset.text_cache}")
    return lines


def schedule_lines(plan: Plan) -> list[str]:
    """Which datasets the epochs show, where that changes."""
    lines = []
    for shown in plan.epochs_shown:
        last = "" if shown.epochs == 1 else f" to {shown.first_epoch + shown.epochs - 1}"
        lines.append(
            f"    from step {shown.first_step}: epoch {shown.first_epoch}{last}, "
            f"{shown.micro_batches_per_epoch} micro-batches: {', '.join(shown.datasets)}"
        )
    return lines


def saving_line(plan: Plan) -> str:
    """When checkpoints are written, which stay, and whether training waits meanwhile."""
    every, saving = plan.save_every, plan.saving
    times = [f"every {every.steps} steps"] * bool(every.steps)
    times += [f"every {every.epochs:g} epochs" if every.epochs != 1 else "after every epoch"] * bool(every.epochs)
    how = "written in the background" if saving.background else "training waits while they are written"
    return (
        f"{', '.join([*times, 'at the end'])}: {human_bytes(saving.checkpoint_bytes)} each; kept: "
        f"{saving.keeping.words}; {how}{f' ({saving.why})' * bool(saving.why)}"
    )


def disk_line(plan: Plan) -> str:
    """What is written, and what is free."""
    disk, result = plan.disk, "adapter" if plan.adapter else "pipeline"
    return (
        f"about {human_bytes(plan.disk_needed_bytes)} needed (caches {human_bytes(disk.caches_bytes)}, "
        f"{disk.kept} checkpoint{'s' * (disk.kept != 1)} {human_bytes(disk.checkpoints_bytes)}, {result} "
        f"{human_bytes(disk.pipeline_bytes)}), {human_bytes(plan.disk_free_bytes)} free"
    )


def noise_lines(plan: Plan, most: int = 3) -> list[str]:
    """The distribution of noise levels, and for each shift its median, where 9 of 10 levels lie, and a picture."""
    levels, shifts = plan.levels, sorted({bucket.flow_shift for bucket in plan.buckets} or {plan.flow_shift})
    lines = []
    for shift in shifts[:most]:
        low, middle, high = (levels.at(share, shift) for share in (0.05, 0.5, 0.95))
        moved = f"shift {shift:g}: " if levels.is_shifted else ""
        lines.append(f"{moved}median {middle:.2f}, 9 of 10 in {low:.2f}-{high:.2f}  0{picture(levels, shift)}1")
    if len(shifts) > most:
        lines.append(f"… and {len(shifts) - most} more, up to shift {shifts[-1]:g}")
    if len(lines) == 1:
        return [f"{levels.told()}, {lines[0]}"]
    return [levels.told(), *lines]


def rate_line(plan: Plan) -> str:
    """The learning rate in words, and its course over the run as a picture."""
    return f"{plan.schedule.words}  {plan.schedule.picture()}"


def length_line(plan: Plan) -> str:
    """How long the run is."""
    going_on = f"; going on from step {plan.first_step}" if plan.first_step else ""
    first = " in the first" if plan.epochs_shown else ""
    shared = f" shared by {plan.ranks} processes" if plan.ranks > 1 else ""
    return (
        f"{plan.total_steps} steps of {plan.micro_batches_per_step} micro-batch(es){shared}, "
        f"{plan.steps_per_epoch:g} steps an epoch{first}, {plan.epochs:.3g} epochs, {plan.images_seen:,} images, "
        f"{plan.images_per_step:.3g} a step{going_on}"
    )


def evaluation_lines(plan: Plan) -> list[str]:
    """What is measured of held-out pictures and when, where any are."""
    wanted = plan.evaluation
    if wanted is None:
        return []
    every = [f"every {wanted.every.steps} steps"] if wanted.every.steps else []
    every += [f"every {wanted.every.epochs:g} epochs"] if wanted.every.epochs else []
    pictures = f"{wanted.pictures} picture{'s' * (wanted.pictures != 1)} × {wanted.levels} noise levels"
    beside = f", with {wanted.compared} trained ones beside them" if wanted.compared else ""
    weights = ", raw weights and EMA" if wanted.averaged else ""
    took = "" if plan.evaluation_s is None else f", about {human_time(plan.evaluation_s)} each"
    return [f"{pictures}{beside}{weights}; {', '.join(['at the start', *every])} and at the end{took}"]


def time_lines(plan: Plan) -> list[str]:
    """How long the steps left take, where a speed was measured."""
    if plan.step_s is None or plan.left_s is None or not plan.steps_left:
        return []
    return [
        f"about {human_time(plan.left_s)} for {plan.steps_left} steps at {plan.step_s:.3g} s a step, as "
        "measured in the last run here; caching, validation pictures and held-out ones come on top"
    ]


def memory_lines(plan: Plan) -> list[str]:
    """What the run takes on its device, and what would make it fit."""
    if plan.memory is None:
        return []
    need, caching, device = plan.memory.need, plan.memory.caching, plan.memory.device
    parts = {
        "weights": need.weights_bytes, "gradients": need.gradients_bytes, "optimizer": need.optimizer_bytes,
        "EMA": need.ema_bytes, "bf16 copies": need.copies_bytes, "base model": need.base_bytes,
        "activations": need.activations_bytes, "encoders": need.resident_bytes, "other": need.overhead_bytes,
    }  # fmt: skip
    told = ", ".join(f"{name} {human_bytes(size)}" for name, size in parts.items() if size)
    there = "" if device is None else f"; {device.name} has {human_bytes(device.total_bytes)}"
    lines = [
        f"about {human_bytes(need.total_bytes)} to train ({told}), {human_bytes(caching.total_bytes)} to "
        f"fill the caches{there}"
    ]
    if plan.memory.host_bytes:
        lines.append(f"    and {human_bytes(plan.memory.host_bytes)} of main memory for the EMA")
    return [*lines, *(f"    it would fit with {way}" for way in ways_told(plan.memory))]


def ways_told(memory: MemoryPlan, most: int = 3) -> list[str]:
    """The changes that would make it fit, in the words of config.json: `a 1, b false (12.3 GB)`."""
    return [f"{changes_told(way.changes)} ({human_bytes(way.total_bytes)})" for way in memory.ways[:most]]


def changes_told(changes: Mapping[str, Any]) -> str:
    """Settings in the words of config.json: `a 1, b false`."""
    words = {key: "unset" if value is None else str(value) for key, value in changes.items()}
    return ", ".join(f"{key} {word.lower() if isinstance(changes[key], bool) else word}" for key, word in words.items())


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


def cache_line(cache: CacheNeed) -> str:
    """What a cache has and lacks."""
    if cache.mode == "none":
        return f"Cache {cache.name}: not kept; encoded at every visit"
    bytes_text = f", about {human_bytes(cache.bytes_to_make)}" if cache.misses or cache.unknown else ""
    unknown = f", {cache.unknown} unknown (never hashed yet)" if cache.unknown else ""
    when = " when first needed" if cache.mode == "ondemand" else ""
    return (
        f"Cache {cache.name}: {cache.hits} of {cache.needed} there, {cache.misses} to make{when}{unknown}{bytes_text}"
    )


def _bucket_line(bucket: BucketPlan) -> str:
    if bucket.role == Role.EVAL.value:
        return f"{bucket.width_px}x{bucket.height_px}: {bucket.pictures} pictures, held out"
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
