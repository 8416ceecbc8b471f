"""A whole run, in order, in plain code: the one module that knows every part.

prepare (cheap, torch-free) → caches → batches → steps → checkpoints and previews → pipeline. Whatever brings torch is
imported where it is used, so that a mistake is told in tenths of a second.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sana_tune import log as logs
from sana_tune.caching import (
    Caches,
    Reading,
    Supply,
    encode_masks,
    encode_pictures,
    encode_texts,
    masks_of,
    open_caches,
    redraw_of,
    together,
)
from sana_tune.config.load import Loaded
from sana_tune.config.schema import Config, EmaConfig, LossConfig, ModelConfig, OptimizerConfig
from sana_tune.config.values import optimizer_options
from sana_tune.data.buckets import Bucket, trained
from sana_tune.data.records import Record
from sana_tune.data.survey import Survey, strict_problems
from sana_tune.drawing import frozen_base, precision, validator_of
from sana_tune.errors import Interrupted, Problem, UserError, gather
from sana_tune.log import log
from sana_tune.measuring import evaluator_of, scored, scorer_folder
from sana_tune.output import Output
from sana_tune.plan import begun
from sana_tune.prepare import (
    Prepared,
    adapter_file,
    digest_of,
    finished_already,
    identity_of,
    plan_of,
    prepare,
    tell,
    tell_caches,
    tell_changes,
    weights_dtype,
    write_down,
    write_down_export,
)
from sana_tune.progress import Progress
from sana_tune.publish import comment_of, listeners, pipeline_card, repository_of
from sana_tune.ranks import Rank, own_rank, wants_shards
from sana_tune.rehearsing import out_of_memory, rehearsal_of
from sana_tune.reporting import keepers, show_first_batches, write_down_surroundings
from sana_tune.roles import is_regularised, learns_from_base, windows
from sana_tune.train.crew import ALONE, Crew
from sana_tune.train.room import Room
from sana_tune.train.signals import LeaveNow, Stop
from sana_tune.watch.card import Seen
from sana_tune.watch.events import Failed
from sana_tune.watch.ready import watch_problems
from sana_tune.watch.sinks import MetricsSink, Sink, Watcher, screen

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from torch import Tensor, nn

    from sana_tune.data.loader import Batches
    from sana_tune.data.order import Order
    from sana_tune.model.flow import Objective
    from sana_tune.model.rollout import Rollout
    from sana_tune.train.adapt import Adapter
    from sana_tune.train.checkpoint import Checkpoints
    from sana_tune.train.ema import Ema, NoEma
    from sana_tune.train.release import Release
    from sana_tune.train.scale import LossScale, NoLossScale
    from sana_tune.train.step import Parts


def run(loaded: Loaded, *, notes: Sequence[str] = (), restart: bool = False, sinks: Sequence[Sink] = ()) -> Progress:
    """Do what was asked and answer where the run stands at the end. `sinks` hear the events besides screen and file.

    Raises UserError for mistakes and failures that were foreseen, Interrupted when a signal ended it.
    """
    logs.setup(logging.INFO if (own_rank() or Rank()).is_main else logging.ERROR)
    logs.quiet_libraries()
    stop = Stop()
    try:
        with stop.listening():
            return _run(loaded, notes, restart, sinks, stop)
    except LeaveNow as left:
        raise Interrupted(left.signal_number) from None


def _run(loaded: Loaded, notes: Sequence[str], restart: bool, sinks: Sequence[Sink], stop: Stop) -> Progress:
    output = Output.open(Path(loaded.config.train.output_dir))
    handler = logs.add_file(output.log_of((own_rank() or Rank()).rank))
    try:
        crew = meet(loaded)
        try:
            progress = _live(loaded, output, notes, restart, sinks, stop, crew)
            crew.close()
            return progress
        except Interrupted:
            crew.close()  # all have saved: a process that leaves before the others takes them with it
            raise
        finally:
            crew.leave()
    finally:
        logs.remove(handler)


def _live(
    loaded: Loaded, output: Output, notes: Sequence[str], restart: bool, sinks: Sequence[Sink], stop: Stop, crew: Crew
) -> Progress:
    problems = watch_problems(loaded.config.watch)
    repository = None if problems else gather(problems, lambda: repository_of(loaded.config))
    prepared = crew.first_main(
        "the look at the pictures", lambda: prepare(loaded, output, notes, fresh=restart, also=problems)
    )
    # before anything is written: it may be a download
    scorer = crew.first_main("the model that scores", lambda: scorer_folder(prepared))
    crew.agree("plan", digest_of(prepared) if crew.ranks > 1 else "")
    if crew.is_main:
        tell(prepared)
    else:
        logs.setup(logging.WARNING, prefix=f"rank {crew.rank.rank}: ")
    if (finished := finished_already(prepared)) is not None:
        return finished
    if restart and crew.is_main:
        output.set_aside()
    before = output.read_json("plan.json") if prepared.checkpoint is not None else {}
    if crew.is_main:
        write_down(prepared)
        write_down_surroundings(prepared, precision(loaded), crew.ranks)
    all_sinks: list[Sink] = []
    if crew.is_main:
        told = [*keepers(prepared), *listeners(prepared, repository)]
        all_sinks = [screen(logs.console()), MetricsSink(output.metrics_file), *told, *sinks]
    with Watcher(all_sinks) as watcher:
        try:
            with crew.told_of_losses():
                return work(prepared, before, watcher, stop, scorer, crew)
        except UserError as error:
            watcher.emit(Failed("\n".join(str(problem) for problem in error.problems)))
            raise


def meet(loaded: Loaded) -> Crew:
    """The processes of this run; where a launcher started several, they are connected now."""
    rank, wanted = own_rank() or Rank(), loaded.config.launch.processes
    if rank.ranks != wanted:
        what = f"the run is to have {wanted} processes; found {rank.ranks}"
        raise UserError(Problem("num_processes", what, "start it with `sana_tune train`, which launches them"))
    if rank.ranks == 1:
        return ALONE
    from sana_tune.train.device import make_accelerator

    with Crew(rank).told_of_losses():
        make_accelerator(loaded.config.train.device, precision(loaded))
        return Crew.connected(rank)


def work(
    prepared: Prepared,
    before: Mapping[str, Any],
    watcher: Watcher,
    stop: Stop,
    scorer: Path | None = None,
    crew: Crew = ALONE,
) -> Progress:
    """Everything heavy: encode what the caches lack, then train. before: the plan.json of the run that is resumed.

    scorer: folder of the model that scores pictures, if any does.
    """
    from sana_tune.train.device import make_accelerator

    accelerator = make_accelerator(prepared.config.train.device, precision(prepared.loaded))
    caches = crew.first_main("the look at the caches", lambda: open_caches(prepared))
    with out_of_memory(prepared, accelerator.device, "filling the caches"):
        prepared = filled(prepared, caches, accelerator.device, watcher, crew)
    if crew.is_main:
        tell_changes(before, prepared)
        show_first_batches(prepared, caches, batches_of(prepared, caches, caches), accelerator.device)
    return train(prepared, caches, accelerator, scored(prepared, watcher, scorer, accelerator), stop, crew)


def warm(loaded: Loaded, *, notes: Sequence[str] = (), sinks: Sequence[Sink] = ()) -> None:
    """Fill the caches as `run` would, those that are filled on demand too, and end; nothing is trained.

    Raises as `run`. Nothing of the run's folder is changed but its caches and its log.
    """
    logs.setup()
    logs.quiet_libraries()
    stop = Stop()
    try:
        with stop.listening():
            _warm(loaded, notes, sinks)
    except LeaveNow as left:
        raise Interrupted(left.signal_number) from None


def _warm(loaded: Loaded, notes: Sequence[str], sinks: Sequence[Sink]) -> None:
    from sana_tune.train.device import make_accelerator

    output = Output.open(Path(loaded.config.train.output_dir))
    handler = logs.add_file(output.log_file)
    try:
        prepared = prepare(loaded, output, notes)
        tell_caches(prepared)
        device = make_accelerator(loaded.config.train.device, precision(loaded)).device
        caches = open_caches(prepared)
        with Watcher([screen(logs.console()), *sinks]) as watcher:
            if broken := fill(prepared, caches, device, watcher, also=(*caches.texts, *caches.latents)):
                without_broken(prepared, broken)
                log.warning("%d pictures were left out; a run trains without them", len(broken))
        log.info("The caches hold all that can be kept before training")
    finally:
        logs.remove(handler)


def filled(prepared: Prepared, caches: Caches, device: torch.device, watcher: Watcher, crew: Crew = ALONE) -> Prepared:
    """Encode what the caches lack before the first step. The run less the pictures that could not be encoded."""
    broken = fill(prepared, caches, device, watcher, crew=crew)
    return without(prepared, broken, crew) if broken else prepared


def fill(
    prepared: Prepared,
    caches: Caches,
    device: torch.device,
    watcher: Watcher,
    *,
    also: Collection[str] = (),
    crew: Crew = ALONE,
) -> dict[str, str]:
    """Encode what the caches lack, each process its share. also: ids of caches that would be filled on demand. Answers
    the pictures that cannot be encoded: `Record.id` → reason."""
    encode_texts(prepared, caches, device, watcher, also=also, crew=crew)
    together(crew, "the captions", caches, {})
    now = at_start(prepared, caches)
    broken = encode_pictures(now, caches, device, watcher, also=also, crew=crew)
    broken = together(crew, "the latents", caches, broken)
    masks = encode_masks(now, caches, broken, watcher, crew)
    return broken | together(crew, "the masks", caches, masks)


def at_start(prepared: Prepared, caches: Caches) -> Prepared:
    """The run with the pictures of the epoch in which it goes on."""
    redraw, step = redraw_of(prepared), prepared.plan.first_step
    if not redraw.datasets or not step or not prepared.plan.steps_left:
        return prepared
    epoch, _ = batches_of(prepared, caches, caches).epochs(step)
    return replace(prepared, survey=replace(prepared.survey, records=tuple(redraw.records(epoch))))


def without_broken(prepared: Prepared, broken: Mapping[str, str], crew: Crew = ALONE) -> Survey:
    """The survey less the pictures that could not be encoded, which are told. UserError when a run cannot be without.

    The ledger is written then.
    """
    for name, reason in list(broken.items())[: 10 * crew.is_main]:
        log.warning("left out: %s (%s)", name, reason)
    left = prepared.survey.without(broken)
    if not left.records:
        prepared.output.write_json("ledger.json", left.ledger.to_json())
        what = f"not one of {len(broken)} pictures could be encoded"
        raise UserError(Problem("datasets", what, "the reasons are above and in ledger.json"))
    if prepared.config.data.strict:
        prepared.output.write_json("ledger.json", left.ledger.to_json())
        raise UserError(*strict_problems(prepared.loaded.datasets, prepared.survey.records, broken))
    return left


def without(prepared: Prepared, broken: Mapping[str, str], crew: Crew = ALONE) -> Prepared:
    """The run less the pictures that could not be encoded, told and planned again."""
    left = without_broken(prepared, broken, crew)
    again = plan_of(
        prepared.loaded,
        prepared.output,
        prepared.facts,
        prepared.folder,
        left,
        prepared.drawn,
        prepared.checkpoint,
        prepared.plan.notes,
        prepared.device,
        prepared.stores,
    )
    if crew.is_main:
        write_down(again)
        text = "%d pictures were left out (ledger.json); the run has %d steps"
        log.warning(text, len(broken), again.plan.total_steps)
    return again


def train(
    prepared: Prepared, caches: Caches, accelerator: Accelerator, watcher: Watcher, stop: Stop, crew: Crew = ALONE
) -> Progress:
    """Build the parts and run the loop."""
    from sana_tune.train.loop import fit

    config = prepared.config
    with out_of_memory(prepared, accelerator.device, "the model and its optimizer"):
        parts = build_parts(prepared, accelerator)
    # Each process looked at its own memory; they save together, so that one decides.
    background: bool = crew.gather("how checkpoints are written", prepared.plan.saving.background)[0]
    shortage = out_of_memory(prepared, accelerator.device, "training")
    with shortage, closing(Supply(prepared, caches, redraw_of(prepared), accelerator.device, watcher, crew)) as supply:
        validator = validator_of(prepared, caches, supply.reading.text, parts, stop, watcher.emit, crew)
        try:
            return fit(
                prepared.plan,
                parts,
                supply.steps(batches_of(prepared, caches, supply.reading, supply.records, crew.rank)),
                validator,
                checkpoints_of(prepared, background=background),
                watcher,
                stop,
                resume=prepared.checkpoint,
                export=lambda progress: exported(prepared, parts, progress, watcher.seen, crew),
                evaluator=evaluator_of(prepared, caches, supply.reading, lambda: stop.requested),
                max_bad_steps=config.train.max_bad_steps,
                rehearse=rehearsal_of(prepared, caches, parts),
            )
        finally:  # the last word: a line of hours ago is read by nobody
            for notice in validator.lost():
                watcher.emit(notice)


def checkpoints_of(prepared: Prepared, *, background: bool) -> Checkpoints:
    """Where the run saves to, how, and what stays. background: whether training goes on meanwhile."""
    from sana_tune.train.checkpoint import Checkpoints

    config, saving = prepared.config, prepared.plan.saving
    return Checkpoints(
        prepared.output.root,
        saving.keeping,
        identity_of(config),
        background=background,
        room=Room(config.train.disk_low_threshold, config.train.disk_low_action, config.train.disk_low_script),
        begun=Progress(begun(config), prepared.plan.epoch_after(begun(config))),
    )


def batches_of(
    prepared: Prepared,
    caches: Caches,
    reading: Caches | Reading,
    records: Callable[[int], Sequence[Record]] | None = None,
    rank: Rank | None = None,
) -> Batches:
    """The run's batches, step by step. records: what each epoch shows, where that is not always the same. rank: of the
    process whose part of each step it is; None = the whole step, its micro-batches one after another."""
    from sana_tune.data.loader import Batches

    config, loaded = prepared.config, prepared.loaded
    texts = {dataset.id: reading.texts[loaded.text_cache_of(dataset.id).id] for dataset in loaded.datasets}
    return Batches(
        order_of(prepared),
        records or prepared.survey.records,
        lambda record: reading.latents[record.dataset],
        lambda record: texts[record.dataset],
        prepared.keys,
        seed=config.train.seed,
        caption_dropout=config.data.caption_dropout_probability,
        masks=masks_of(prepared, caches) if loaded.masks else None,
        segmentation_share=config.train.masked_loss_probability,
        rank=rank.rank if rank else 0,
        ranks=rank.ranks if rank else 1,
        accumulation=config.train.gradient_accumulation_steps * (1 if rank else config.launch.processes),
    )


def order_of(prepared: Prepared) -> Order:
    """Which pictures come when."""
    from sana_tune.data.order import Order

    config = prepared.config
    return Order(
        trained(prepared.buckets),
        {dataset.id: dataset.probability for dataset in prepared.loaded.datasets},
        config.data.data_backend_sampling,
        config.train.seed,
        windows(prepared.loaded),
        config.train.gradient_accumulation_steps * config.launch.processes,
    )


def build_parts(prepared: Prepared, accelerator: Accelerator) -> Parts:
    """Transformer, optimizer, schedule and EMA."""
    from sana_tune.model.flow import Perturbation
    from sana_tune.model.shift import shift_for
    from sana_tune.train.ema import NoEma
    from sana_tune.train.sharding import replicated
    from sana_tune.train.step import Parts

    config, facts, wanted = prepared.config, prepared.facts, prepared.config.optimizer
    adapter = None
    if config.model.model_type == "lora":
        adapter = adapter_of(prepared, accelerator.device)
        transformer = adapter.transformer
        optimizer = optimizer_of(config, transformer, accelerator.device, bf16=False)
    else:
        transformer, optimizer = transformer_and_optimizer(prepared, accelerator.device)
    run_blocks(config.model, transformer, accelerator, prepared.buckets, facts.vae_factor)
    base = base_of(prepared, accelerator.device, adapter) if learns_from_base(config, prepared.buckets) else None
    auto, shift = config.flow.flow_schedule_auto_shift, prepared.plan.flow_shift
    averaged = transformer.named_parameters() if adapter is None else adapter.named_parameters()
    ema: Ema | NoEma = average_of(config.ema, averaged) if config.ema.use_ema else NoEma()
    if adapter is not None:
        begin(config, adapter, ema)
    return Parts(
        accelerator=accelerator,
        transformer=replicated(transformer, accelerator),
        optimizer=optimizer,
        schedule=prepared.plan.schedule,
        ema=ema,
        shift_at=lambda tokens: shift_for(shift, tokens, facts.native_tokens, facts.scheduler, auto=auto),
        seed=config.train.seed,
        max_grad_norm=wanted.max_grad_norm,
        clip_method=wanted.grad_clip_method,
        scale=loss_scale(precision(prepared.loaded), optimizer),
        release=release_of(wanted, accelerator, transformer, optimizer),
        levels=prepared.plan.levels,
        objective=objective_of(config.loss),
        perturbation=Perturbation(config.loss.input_perturbation, config.loss.input_perturbation_steps),
        rollout=rollout_of(config),
        base=base,
        regularised=is_regularised(prepared.buckets),
        compiled=config.model.dynamo_backend != "no",
        adapter=adapter,
    )


def run_blocks(
    settings: ModelConfig, transformer: Any, accelerator: Accelerator, buckets: Sequence[Bucket], factor: int
) -> None:
    """Have the blocks recomputed and compiled as asked; compile for the smallest and the largest bucket at once."""
    from sana_tune.model.blocks import arrange, sample
    from sana_tune.model.facts import recomputed_blocks

    recomputed = ()
    if settings.gradient_checkpointing:
        layers, interval = len(transformer.transformer_blocks), settings.gradient_checkpointing_interval
        recomputed = recomputed_blocks(layers, interval, settings.gradient_checkpointing_segment_stride)
    compiler = None if settings.dynamo_backend == "no" else settings.dynamo_backend
    selective = settings.gradient_checkpointing_backend == "selective"
    shapes = sorted({(bucket.batch_size, *bucket.size) for bucket in buckets}, key=math.prod)
    blocks = arrange(transformer, recomputed, selective=selective, compiler=compiler, sizes=len(shapes))
    if blocks is None or compiler is None:
        return
    log.info("Compiling the blocks with %s, for each of %d size(s): some minutes, once", compiler, len(shapes))
    blocks.warm_up(
        lambda shape: sample(transformer, accelerator.autocast, shape[0], shape[2] // factor, shape[1] // factor),
        dict.fromkeys((shapes[0], shapes[-1])),
        list(transformer.parameters()),
    )


def loss_scale(precision: str, optimizer: torch.optim.Optimizer) -> LossScale | NoLossScale:
    """What the loss is multiplied by before the backward pass: fp16 alone needs it."""
    from sana_tune.train.scale import LossScale, NoLossScale

    return LossScale(optimizer) if precision == "fp16" else NoLossScale()


def release_of(
    settings: OptimizerConfig, accelerator: Accelerator, transformer: Any, optimizer: torch.optim.Optimizer
) -> Release | None:
    """The updates inside the backward pass, where they are asked for. Raises UserError for several processes."""
    from sana_tune.train.release import Release

    if not settings.optimizer_release_gradients:
        return None
    if accelerator.num_processes > 1:
        what = f"needs one process: several sum their gradients before a step; found {accelerator.num_processes}"
        raise UserError(Problem("optimizer_release_gradients", what, "train with one process, or switch it off"))
    limit, by_norm = settings.max_grad_norm, settings.grad_clip_method == "norm"
    trained = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    return Release(optimizer, trained, max_norm=limit * by_norm, max_value=limit * (not by_norm))


def objective_of(settings: LossConfig) -> Objective:
    """What is minimised."""
    from sana_tune.model.flow import Objective

    return Objective(
        kind=settings.loss_type,
        huber_c=settings.huber_c,
        huber_schedule=settings.huber_schedule,
        weighting=settings.loss_weighting,
        snr_gamma=settings.snr_gamma or 0.0,
        soft=settings.use_soft_min_snr,
    )


def rollout_of(config: Config) -> Rollout:
    """Which samples are rolled in, and how: with steps as long as those that draw the validation pictures."""
    from sana_tune.model.rollout import OFF, Reflex, Rollout

    asked = {key.removeprefix("scheduled_sampling_"): value for key, value in config.rollout}
    if not asked["max_step_offset"]:
        return OFF
    reflex = Reflex(asked["reflexflow_alpha"], asked["reflexflow_beta1"], asked["reflexflow_beta2"])
    return Rollout(
        max_offset=asked["max_step_offset"],
        steps=config.validation.validation_num_inference_steps,
        reflex=None if asked["reflexflow"] is False else reflex,
        **{key: value for key, value in asked.items() if key != "max_step_offset" and not key.startswith("reflexflow")},
    )


def average_of(settings: EmaConfig, named: Iterable[tuple[str, nn.Parameter]]) -> Ema:
    """The average of the weights."""
    from sana_tune.train.ema import Ema

    return Ema(
        named,
        settings.ema_decay,
        settings.ema_update_interval,
        warmup=settings.ema_warmup_steps,
        place="cpu" if settings.is_on_cpu else "accelerator",
        shown=settings.ema_validation,
    )


def transformer_and_optimizer(prepared: Prepared, device: torch.device) -> tuple[Any, torch.optim.Optimizer]:
    """The trained model in the dtype of its weights, and its optimizer.

    fp32 weights that become bf16 stay in main memory: on the device they would take more than training does.
    """
    import torch

    from sana_tune.model.attention import install
    from sana_tune.model.half import keep_captions_fp32
    from sana_tune.model.sana import load_transformer
    from sana_tune.train.sharding import shard

    config = prepared.config
    place = "cpu" if weights_dtype(config) == "bf16" else device
    transformer: Any = load_transformer(prepared.folder, torch.float32, place, variant=config.model.variant)
    install(transformer)
    if precision(prepared.loaded) == "fp16":
        keep_captions_fp32(transformer)
    if wants_shards() and config.launch.processes > 1:
        shard(transformer, device, config.launch.processes)
    return transformer, optimizer_of(config, transformer, device, bf16=weights_dtype(config) == "bf16")


def optimizer_of(config: Config, transformer: Any, device: torch.device, *, bf16: bool) -> torch.optim.Optimizer:
    """The optimizer of fp32 weights; or these made bf16 and put on the device, and Kahan started exact."""
    import torch

    from sana_tune.train.optim import build_optimizer, parameter_groups, seed_kahan

    wanted = config.optimizer
    exact = [parameter.data for parameter in transformer.parameters()] if bf16 else []
    if bf16:
        transformer.to(torch.bfloat16).to(device)
    optimizer = build_optimizer(
        wanted.optimizer,
        parameter_groups(transformer.named_parameters()),
        wanted.learning_rate,
        (wanted.optimizer_beta1, wanted.optimizer_beta2),
        wanted.optimizer_weight_decay,
        wanted.optimizer_epsilon,
        options=optimizer_options(wanted.optimizer_config),
        release=wanted.optimizer_release_gradients,
        seed=config.train.seed,
    )
    if exact:
        seed_kahan(optimizer, list(transformer.parameters()), exact)
    return optimizer


def adapter_of(prepared: Prepared, device: torch.device) -> Adapter:
    """The adapter of the run, on its frozen base."""
    from sana_tune.train.adapt import Adapter

    base = frozen_base(prepared.loaded, prepared.folder, device, weights_dtype(prepared.config))
    return Adapter(base, adapter_file(prepared.config), prepared.config.train.seed)


def begin(config: Config, adapter: Adapter, ema: Ema | NoEma) -> None:
    """Have a fresh adapter, and its average, begin as asked; a checkpoint that is restored later takes their place."""
    from sana_tune.train.adapt import load_average

    wanted = config.adapter
    if wanted.init_lora is not None:
        adapter.load(Path(wanted.init_lora))
        ema.reset()
        if wanted.init_lora_ema is not None:
            load_average(Path(wanted.init_lora_ema), adapter, ema.state_dict())
    elif wanted.init_lokr_norm is not None:
        adapter.start_with_noise(wanted.init_lokr_norm, config.train.seed)
        ema.reset()


def base_of(prepared: Prepared, device: torch.device, adapter: Adapter | None) -> Any:
    """What regularisation data learns from: the untrained model, or the trained one without its adapter."""
    from sana_tune.train.adapt import AdapterOff

    return (
        frozen_base(prepared.loaded, prepared.folder, device, weights_dtype(prepared.config))
        if adapter is None
        else AdapterOff(adapter)
    )


def exported(prepared: Prepared, parts: Parts, progress: Progress, seen: Seen, crew: Crew) -> str:
    """Have the main process write the finished pipeline, and wait for it. Answers its folder."""
    from sana_tune.train.sharding import gathered

    weights, average = gathered(parts.kept()), gathered(parts.kept_average())
    if crew.is_main:
        export(prepared, parts, progress, seen, weights, average)
    crew.gather("the finished pipeline")
    return str(prepared.output.result(prepared.config))


def export(
    prepared: Prepared,
    parts: Parts,
    progress: Progress,
    seen: Seen,
    weights: Mapping[str, Tensor],
    average: Mapping[str, Tensor],
) -> str:
    """Write the finished pipeline, or the adapter. Answers its folder.

    seen: the last pictures and numbers, for its model card. average: {} = none.
    """
    from sana_tune.model.export import export_adapter, export_pipeline

    config, out = prepared.config, prepared.output.result(prepared.config)
    card = pipeline_card(prepared, progress, str(parts.input_dtype).removeprefix("torch."), seen)
    if parts.adapter is not None:
        comment = comment_of(config, progress)
        export_adapter(
            parts.adapter.file, weights, average or None, out, card.text, beside=card.pictures, comment=comment
        )
        write_down_export(prepared.output, progress)
        return str(out)
    export_pipeline(
        prepared.folder,
        weights,
        average or None,
        out,
        card.text,
        variant=config.model.variant,
        beside=card.pictures,
        comment=comment_of(config, progress),
    )
    write_down_export(prepared.output, progress)
    return str(out)
