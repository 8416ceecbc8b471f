"""A whole run, in order, in plain code: the one module that knows every part.

prepare (cheap, torch-free) → caches → batches → steps → checkpoints and previews → pipeline. Whatever brings torch is
imported where it is used, so that a mistake is told in tenths of a second.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sana_tune import log as logs
from sana_tune.config.load import Loaded
from sana_tune.config.schema import Config
from sana_tune.data.records import Record
from sana_tune.errors import Interrupted, Problem, UserError
from sana_tune.log import log
from sana_tune.output import Output
from sana_tune.prepare import (
    Prepared,
    drawing_sizes,
    finished_already,
    identity_of,
    plan_of,
    prepare,
    tell,
    tell_changes,
    weights_dtype,
    write_down,
    write_down_export,
)
from sana_tune.progress import Progress
from sana_tune.store import FolderStore
from sana_tune.train.signals import LeaveNow, Stop
from sana_tune.watch.card import model_card
from sana_tune.watch.events import CacheProgress
from sana_tune.watch.sinks import MetricsSink, Sink, Watcher, screen

if TYPE_CHECKING:
    import numpy as np
    import torch
    from accelerate import Accelerator
    from torch import Tensor

    from sana_tune.data.cache import TensorCache
    from sana_tune.data.loader import Batches
    from sana_tune.train.step import Parts
    from sana_tune.train.validate import NoValidator, Picture, Validator


@dataclass(frozen=True)
class Caches:
    """What training reads: embeddings, and latents by dataset."""

    text: TensorCache
    latents: Mapping[str, TensorCache]


def run(loaded: Loaded, *, notes: Sequence[str] = (), restart: bool = False, sinks: Sequence[Sink] = ()) -> Progress:
    """Do what was asked and answer where the run stands at the end. `sinks` hear the events besides screen and file.

    Raises UserError for mistakes and failures that were foreseen, Interrupted when a signal ended it.
    """
    logs.setup()
    logs.quiet_libraries()
    stop = Stop()
    try:
        with stop.listening():
            return _run(loaded, notes, restart, sinks, stop)
    except LeaveNow as left:
        raise Interrupted(left.signal_number) from None


def _run(loaded: Loaded, notes: Sequence[str], restart: bool, sinks: Sequence[Sink], stop: Stop) -> Progress:
    output = Output.open(Path(loaded.config.train.output_dir))
    handler = logs.add_file(output.log_file)
    try:
        prepared = prepare(loaded, output, notes, fresh=restart)
        tell(prepared)
        if (finished := finished_already(prepared)) is not None:
            return finished
        if restart:
            output.set_aside()
        before = output.read_json("plan.json") if prepared.checkpoint is not None else {}
        write_down(prepared)
        all_sinks = [screen(logs.console()), MetricsSink(output.metrics_file), *sinks]
        with Watcher(all_sinks) as watcher:
            return work(prepared, before, watcher, stop)
    finally:
        logs.remove(handler)


def work(prepared: Prepared, before: Mapping[str, Any], watcher: Watcher, stop: Stop) -> Progress:
    """Everything heavy: encode what the caches lack, then train. before: the plan.json of the run that is resumed."""
    from sana_tune.train.device import make_accelerator

    accelerator = make_accelerator(prepared.config.train.device, precision(prepared.loaded))
    caches = open_caches(prepared)
    encode_texts(prepared, caches.text, accelerator.device, watcher)
    broken = encode_pictures(prepared, caches, accelerator.device, watcher)
    if broken:
        prepared = without(prepared, broken)
    tell_changes(before, prepared)
    return train(prepared, caches, accelerator, watcher, stop)


def open_caches(prepared: Prepared) -> Caches:
    """The caches of the run, as they stand on the disk."""
    from sana_tune.data.cache import TensorCache

    config, output, text = prepared.config, prepared.output, prepared.loaded.text_cache
    latents = {
        dataset.id: TensorCache(output.latent_folder(config, dataset), dataset.write_batch_size)
        for dataset in prepared.loaded.datasets
    }
    return Caches(TensorCache(output.text_folder(config, text), text.write_batch_size), latents)


def encode_texts(prepared: Prepared, cache: TensorCache, device: torch.device, watcher: Watcher) -> None:
    """Fill the text cache; the encoder is loaded only if something is missing, and freed."""
    captions = prepared.captions
    negative = {prepared.plain_keys.text(prepared.negative): prepared.negative} if prepared.prompts else {}
    if not cache.missing([*captions, *negative]):
        return
    from sana_tune.data.filling import fill_text
    from sana_tune.model.sana import load_text_encoder

    model = prepared.config.model
    encoder = load_text_encoder(
        prepared.folder, device, instruction=model.sana_complex_human_instruction, variant=model.variant
    )
    size = prepared.config.data.text_encoder_batch_size
    try:
        cut = sum(encoder.is_cut(text) for text in captions.values())
        if cut:
            log.warning("%d captions are longer than 300 tokens with the instruction; their ends are cut", cut)
        fill_text(cache, captions, encoder.encode, size, reporter(watcher, "text"))
        fill_text(cache, negative, lambda texts: encoder.encode(texts, with_instruction=False), size, _silent)
    finally:
        encoder.free()


def encode_pictures(prepared: Prepared, caches: Caches, device: torch.device, watcher: Watcher) -> dict[str, str]:
    """Fill the latent caches; the VAE is loaded only if something is missing, and freed. Answers broken pictures."""
    lacking: dict[str, list[Record]] = {}
    for record in prepared.survey.records:
        if prepared.keys.latent(record) not in caches.latents[record.dataset]:
            lacking.setdefault(record.dataset, []).append(record)
    if not lacking:
        return {}
    from sana_tune.data.filling import fill_latents
    from sana_tune.model.sana import load_vae

    coder = load_vae(prepared.folder, device, variant=prepared.config.model.variant)
    datasets = {dataset.id: dataset for dataset in prepared.loaded.datasets}
    broken: dict[str, str] = {}
    try:
        for name, records in lacking.items():
            store = FolderStore(datasets[name].instance_data_dir)
            broken |= fill_latents(
                records,
                caches.latents[name],
                prepared.keys,
                lambda record, store=store: store.read(record.key),
                lambda pictures: encode_finite(coder.encode, pictures),
                datasets[name].vae_batch_size,
                reporter(watcher, f"latents of {name}"),
            )
    finally:
        coder.free()
    return broken


def encode_finite(encode: Callable[[np.ndarray], Tensor], pictures: np.ndarray) -> list[Tensor | None]:
    """Latents of pictures [B, H, W, 3]; None in the place of each that is not finite."""
    from sana_tune.model.sana import NotFinite

    try:
        return list(encode(pictures))
    except NotFinite as error:
        good = [index for index in range(len(pictures)) if index not in error.indices]
        latents = iter(encode(pictures[good]) if good else ())
        return [None if index in error.indices else next(latents) for index in range(len(pictures))]


def without(prepared: Prepared, broken: Mapping[str, str]) -> Prepared:
    """The run less the pictures that could not be encoded, told and planned again."""
    for name, reason in list(broken.items())[:10]:
        log.warning("left out: %s (%s)", name, reason)
    left = prepared.survey.without(broken)
    if not left.records:
        prepared.output.write_json("ledger.json", left.ledger.to_json())
        what = f"not one of {len(broken)} pictures could be encoded"
        raise UserError(Problem("datasets", what, "the reasons are above and in ledger.json"))
    again = plan_of(
        prepared.loaded,
        prepared.output,
        prepared.facts,
        prepared.folder,
        left,
        prepared.prompts,
        prepared.checkpoint,
        prepared.plan.notes,
        prepared.device,
    )
    write_down(again)
    log.warning("%d pictures were left out (ledger.json); the run has %d steps", len(broken), again.plan.total_steps)
    return again


def train(prepared: Prepared, caches: Caches, accelerator: Accelerator, watcher: Watcher, stop: Stop) -> Progress:
    """Build the parts and run the loop."""
    from sana_tune.train.checkpoint import Checkpoints
    from sana_tune.train.loop import fit

    config = prepared.config
    parts = build_parts(prepared, accelerator)
    return fit(
        prepared.plan,
        parts,
        batches_of(prepared, caches),
        validator_of(prepared, caches.text, parts, stop),
        Checkpoints(prepared.output.root, config.train.checkpoints_total_limit, identity_of(config)),
        watcher,
        stop,
        resume=prepared.checkpoint,
        export=lambda progress: export(prepared, parts, progress),
        max_bad_steps=config.train.max_bad_steps,
    )


def batches_of(prepared: Prepared, caches: Caches) -> Batches:
    """The run's batches, step by step."""
    from sana_tune.data.loader import Batches
    from sana_tune.data.order import Order

    config = prepared.config
    weights = {dataset.id: dataset.probability for dataset in prepared.loaded.datasets}
    return Batches(
        Order(prepared.buckets, weights, config.data.data_backend_sampling, config.train.seed),
        prepared.survey.records,
        lambda record: caches.latents[record.dataset],
        caches.text,
        prepared.keys,
        seed=config.train.seed,
        caption_dropout=config.data.caption_dropout_probability,
        accumulation=config.train.gradient_accumulation_steps,
    )


def build_parts(prepared: Prepared, accelerator: Accelerator) -> Parts:
    """Transformer, optimizer, schedule and EMA."""
    from sana_tune.model.shift import shift_for
    from sana_tune.train.ema import Ema, NoEma
    from sana_tune.train.optim import Schedule
    from sana_tune.train.step import Parts

    config, facts, wanted = prepared.config, prepared.facts, prepared.config.optimizer
    transformer, optimizer = transformer_and_optimizer(prepared, accelerator.device)
    auto, shift = config.flow.flow_schedule_auto_shift, prepared.plan.flow_shift
    ema: Ema | NoEma = NoEma()
    if config.ema.use_ema:
        ema = Ema(transformer.named_parameters(), config.ema.ema_decay, config.ema.ema_update_interval)
    return Parts(
        accelerator=accelerator,
        transformer=transformer,
        optimizer=optimizer,
        schedule=Schedule(
            wanted.lr_scheduler,
            wanted.learning_rate,
            prepared.plan.total_steps,
            wanted.lr_warmup_steps,
            wanted.lr_end,
            wanted.lr_power,
        ),
        ema=ema,
        shift_at=lambda tokens: shift_for(shift, tokens, facts.native_tokens, facts.scheduler, auto=auto),
        seed=config.train.seed,
        max_grad_norm=wanted.max_grad_norm,
        clip_method=wanted.grad_clip_method,
    )


def transformer_and_optimizer(prepared: Prepared, device: torch.device) -> tuple[Any, torch.optim.Optimizer]:
    """The trained model in the dtype of its weights, and its optimizer; with bf16 weights Kahan starts exact."""
    import torch

    from sana_tune.model.attention import install
    from sana_tune.model.sana import load_transformer, set_gradient_checkpointing
    from sana_tune.train.optim import build_optimizer, seed_kahan

    config, wanted = prepared.config, prepared.config.optimizer
    transformer: Any = load_transformer(prepared.folder, torch.float32, device, variant=config.model.variant)
    install(transformer)
    if config.model.gradient_checkpointing:
        set_gradient_checkpointing(transformer, config.model.gradient_checkpointing_interval)
    exact = None
    if weights_dtype(config) == "bf16":
        # In main memory: beside the optimizer's states they would take more of the device than training does.
        exact = [parameter.detach().to("cpu", copy=True) for parameter in transformer.parameters()]
        transformer.to(torch.bfloat16)
    optimizer = build_optimizer(
        wanted.optimizer,
        transformer.parameters(),
        wanted.learning_rate,
        (wanted.optimizer_beta1, wanted.optimizer_beta2),
        wanted.optimizer_weight_decay,
        wanted.optimizer_epsilon,
    )
    if exact is not None:
        seed_kahan(optimizer, list(transformer.parameters()), exact)
    return transformer, optimizer


def validator_of(prepared: Prepared, text: TensorCache, parts: Parts, stop: Stop) -> Validator | NoValidator:
    """The validator of the run. Its VAE is loaded when pictures are drawn and let go of afterwards."""
    from sana_tune.data.images import encode_png
    from sana_tune.model.generate import Painter
    from sana_tune.train.validate import NoValidator, Validator

    if not prepared.prompts:
        return NoValidator()
    settings, device = prepared.config.validation, parts.accelerator.device
    autocast = autocast_dtype(prepared.loaded) if device.type != "cpu" else None
    painter = Painter(prepared.folder, device, autocast=autocast, variant=prepared.config.model.variant)

    def draw(picture: Picture) -> np.ndarray:
        return painter.draw(
            parts.bare,
            text.get(prepared.keys.text(picture.prompt)),
            text.get(prepared.plain_keys.text(prepared.negative)),
            width=picture.width_px,
            height=picture.height_px,
            steps=settings.validation_num_inference_steps,
            guidance=settings.validation_guidance,
            seed=picture.seed,
        )

    return Validator(
        prepared.output.pictures,
        prepared.prompts,
        drawing_sizes(prepared.config, prepared.facts),
        draw,
        encode_png,
        images_per_prompt=settings.num_validation_images,
        seed=drawing_seed(prepared.config),
        base=not settings.disable_benchmark,
        stopped=lambda: stop.requested,
        release=painter.release,
    )


def export(prepared: Prepared, parts: Parts, progress: Progress) -> str:
    """Write the finished pipeline. Answers its folder."""
    from sana_tune.model.export import export_pipeline

    config, facts = prepared.config, prepared.facts
    (width, height), settings = drawing_sizes(config, facts)[0], config.validation
    sample = {
        "prompt": next(iter(prepared.prompts.values()), "a photo"),
        "width": width,
        "height": height,
        "steps": settings.validation_num_inference_steps,
        "guidance": settings.validation_guidance,
        "seed": drawing_seed(config),
        "dtype": str(parts.input_dtype).removeprefix("torch."),
    }
    training = {
        "Steps": progress.step,
        "Images seen": progress.images,
        "Optimizer": f"{config.optimizer.optimizer}, learning rate {config.optimizer.learning_rate:g}",
        "Flow shift": f"{prepared.plan.flow_shift:g}",
        "Datasets": ", ".join(f"{part.dataset} ({part.trained} pictures)" for part in prepared.survey.ledger.datasets),
    }
    average = parts.ema.state_dict()
    out = prepared.output.pipeline
    card = model_card(
        model=facts.name,
        licence=facts.licence,
        folder=str(out),
        sample=sample,
        training=training,
        has_ema=bool(average),
    )
    weights = parts.bare.state_dict()
    export_pipeline(prepared.folder, weights, average or None, out, card, variant=config.model.variant)
    write_down_export(prepared.output, progress)
    return str(out)


def drawing_seed(config: Config) -> int:
    """Seed of validation pictures."""
    asked = config.validation.validation_seed
    return config.train.seed if asked is None else asked


def precision(loaded: Loaded) -> str:
    """Accelerate's mixed_precision: what was asked for; where nobody asked, bf16 on an accelerator and no on a CPU."""
    asked = loaded.config.model.mixed_precision
    if loaded.origins["mixed_precision"] != "default":
        return asked
    from sana_tune.train.device import resolve_device

    return "no" if resolve_device(loaded.config.train.device) == "cpu" else asked


def autocast_dtype(loaded: Loaded) -> torch.dtype | None:
    """What drawing computes in beside fp32 masters; None = the weights' own dtype."""
    import torch

    return torch.bfloat16 if precision(loaded) == "bf16" and weights_dtype(loaded.config) == "fp32" else None


def reporter(watcher: Watcher, cache: str) -> Callable[[int, int], None]:
    """A function that tells a cache's progress as events."""
    return lambda done, total: watcher.emit(CacheProgress(cache, done, total, finished=done >= total))


def _silent(done: int, total: int) -> None:
    """For what is too little to tell."""
