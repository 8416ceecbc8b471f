"""A whole run, in order, in plain code: the one module that knows every part.

config → survey → plan → caches → batches → steps → checkpoints and previews. Cheap checks come first: nothing heavy
is loaded before everything that can be known to be wrong has been told.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sana_tune import log as logs
from sana_tune.config.load import Loaded
from sana_tune.config.schema import Config
from sana_tune.data.buckets import Bucket, make_buckets
from sana_tune.data.captions import clean_caption
from sana_tune.data.cache import TensorCache
from sana_tune.data.filling import fill_latents, fill_text
from sana_tune.data.loader import Batches
from sana_tune.data.order import Order
from sana_tune.data.records import Keys, Record
from sana_tune.data.survey import FileMemory, Survey, survey
from sana_tune.errors import Interrupted, Problem, UserError
from sana_tune.log import log
from sana_tune.model import facts as model_facts
from sana_tune.model import fetch
from sana_tune.model.facts import ModelFacts
from sana_tune.model.instruction import resolve_instruction
from sana_tune.model.identity import latent_identity, text_identity
from sana_tune.output import Output, free_bytes
from sana_tune.plan import CacheNeed, Plan, latent_bytes, make_plan, plan_lines, text_bytes
from sana_tune.progress import Progress
from sana_tune.prompts import prompts_of
from sana_tune.store import FolderStore
from sana_tune.train.folders import Checkpoint, find
from sana_tune.train.signals import LeaveNow, Stop
from sana_tune.watch.card import model_card
from sana_tune.watch.events import CacheProgress
from sana_tune.watch.sinks import MetricsSink, Sink, Watcher, screen

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

    from sana_tune.train.step import Parts
    from sana_tune.train.validate import NoValidator, Picture, Validator


@dataclass(frozen=True)
class Prepared:
    """All that is known before any weight is loaded."""

    loaded: Loaded
    output: Output
    facts: ModelFacts
    folder: Path
    survey: Survey
    buckets: tuple[Bucket, ...]
    keys: Keys
    plain_keys: Keys  # of texts that never have the instruction: negative prompts
    latents: Mapping[str, TensorCache]  # by dataset
    text: TensorCache
    prompts: Mapping[str, str]
    checkpoint: Checkpoint | None
    plan: Plan

    @property
    def config(self) -> Config:
        return self.loaded.config

    @property
    def negative(self) -> str:
        """The final negative prompt."""
        return clean_caption(self.config.validation.validation_negative_prompt, self.config.model.prompt_case)


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
        if restart:
            output.set_aside()
        output.write_config(loaded)
        prepared = prepare(loaded, output, notes)
        tell(prepared)
        if (finished := finished_already(prepared)) is not None:
            return finished
        all_sinks = [screen(logs.console()), MetricsSink(output.metrics_file), *sinks]
        with Watcher(all_sinks) as watcher:
            return work(prepared, watcher, stop)
    finally:
        logs.remove(handler)


def prepare(loaded: Loaded, output: Output, notes: Sequence[str] = ()) -> Prepared:
    """Everything that is cheap: the checkpoint, the pictures, the prompts, the model's files, the plan."""
    config = loaded.config
    checkpoint = find(output.root, config.train.resume_from_checkpoint)
    clean = lambda text: clean_caption(text, config.model.prompt_case)  # noqa: E731
    prompts = {} if config.validation.validation_disable else prompts_of(config.validation, clean)
    name = config.model.pretrained_model_name_or_path
    fetch.local_folder(name)  # a folder that is not there is told before the pictures are read
    memory = FileMemory(output.file_memory)
    expected = model_facts.known(name)
    surveyed = None
    if expected is not None:  # a published model: look at the pictures before downloading it
        surveyed = look(loaded, expected, memory)
    folder = fetch.locate(name, revision=config.model.revision, variant=config.model.variant, dtype=weights_dtype(config))
    facts = model_facts.from_folder(folder, name)
    if surveyed is None or expected is None or expected.vae_factor != facts.vae_factor:
        surveyed = look(loaded, facts, memory)
    check_drawing_sizes(config, facts)
    return plan_of(loaded, output, facts, folder, surveyed, prompts, checkpoint, notes)


def look(loaded: Loaded, facts: ModelFacts, memory: FileMemory) -> Survey:
    """Survey the datasets. Raises UserError with all their problems."""
    alignment = loaded.config.data.aspect_bucket_alignment or facts.vae_factor
    if alignment % facts.vae_factor:
        what = f"must be a multiple of the VAE's factor {facts.vae_factor}; found {alignment}"
        raise UserError(Problem("aspect_bucket_alignment", what, f"use {facts.vae_factor}, or leave it out"))
    found = survey(
        loaded.datasets,
        alignment=alignment,
        rounding=loaded.config.data.aspect_bucket_rounding,
        prompt_case=loaded.config.model.prompt_case,
        memory=memory,
    )
    if found.problems:
        raise UserError(*found.problems)
    return found


def check_drawing_sizes(config: Config, facts: ModelFacts) -> None:
    """Raise UserError for validation sizes that the pipeline cannot draw."""
    sizes = drawing_sizes(config, facts)
    problems = [model_facts.check_size(width, height, facts.vae_factor) for width, height in sizes]
    if any(problems):
        raise UserError(*(problem for problem in problems if problem))


def drawing_sizes(config: Config, facts: ModelFacts) -> list[tuple[int, int]]:
    """Sizes of validation pictures, px; the model's own where none is asked for."""
    asked = config.validation.validation_resolution
    return [(size.width, size.height) for size in asked] or [(facts.native_px, facts.native_px)]


def plan_of(
    loaded: Loaded,
    output: Output,
    facts: ModelFacts,
    folder: Path,
    surveyed: Survey,
    prompts: Mapping[str, str],
    checkpoint: Checkpoint | None,
    notes: Sequence[str],
) -> Prepared:
    """Buckets, keys, caches and the plan from what was found. Raises UserError when the disk is too small."""
    config = loaded.config
    identity: dict[str, Any] = {"memory": output.hash_memory, "variant": config.model.variant}
    instruction = resolve_instruction(config.model.sana_complex_human_instruction)
    images = latent_identity(folder, **identity)
    keys = Keys(images, text_identity(folder, instruction=instruction, dtype="stored", **identity))
    plain_keys = Keys(images, text_identity(folder, instruction="", dtype="stored", **identity))
    latents = {dataset.id: TensorCache(output.latent_folder(config, dataset), dataset.write_batch_size)
               for dataset in loaded.datasets}  # fmt: skip
    text = TensorCache(output.text_folder(config, loaded.text_cache), loaded.text_cache.write_batch_size)
    buckets = make_buckets(surveyed.records, loaded.datasets)
    needs = cache_needs(config, facts, surveyed, prompts, keys, latents, text)
    plan = make_plan(
        config,
        facts,
        buckets,
        needs,
        first_step=checkpoint.progress().step if checkpoint else 0,
        disk_free_bytes=free_bytes(output.root),
        other_model_bytes=sum(path.stat().st_size for part in ("vae", "text_encoder", "tokenizer")
                              for path in (folder / part).iterdir()),  # fmt: skip
        notes=(*notes, *loaded.notes),
    )
    prepared = Prepared(
        loaded, output, facts, folder, surveyed, buckets, keys, plain_keys, latents, text, prompts, checkpoint, plan
    )
    output.write_json("plan.json", plan.to_json())
    output.write_json("ledger.json", surveyed.ledger.to_json())
    return prepared


def cache_needs(
    config: Config,
    facts: ModelFacts,
    surveyed: Survey,
    prompts: Mapping[str, str],
    keys: Keys,
    latents: Mapping[str, TensorCache],
    text: TensorCache,
) -> list[CacheNeed]:
    """What each cache must hold and what it lacks."""
    captions = {keys.text(caption) for caption in needed_captions(surveyed, prompts)}
    absent = len(text.missing(captions))
    needs = [CacheNeed("text", str(text.folder), len(captions), len(captions) - absent, text_bytes(facts, absent))]
    for dataset, cache in latents.items():
        targets = {keys.latent(record): record.placement.target for record in surveyed.records if record.dataset == dataset}
        missing = cache.missing(targets)
        to_make = sum(latent_bytes(targets[key], facts) for key in missing)
        needs.append(CacheNeed(f"latents of {dataset}", str(cache.folder), len(targets), len(targets) - len(missing), to_make))
    return needs


def needed_captions(surveyed: Survey, prompts: Mapping[str, str]) -> dict[str, None]:
    """Every text that is encoded with the instruction, each once, and the empty caption; in a fixed order."""
    captions = (caption for record in surveyed.records for caption in record.captions)
    return dict.fromkeys(("", *captions, *prompts.values()))


def tell(prepared: Prepared) -> None:
    """Say what will happen. Raises UserError when it cannot: no room on the disk."""
    plan = prepared.plan
    for line in plan_lines(plan, prepared.survey.ledger):
        log.info("%s", line)
    log.info("Output: %s (plan.json, ledger.json, log.txt)", prepared.output.root)
    log.info("Licence: %s", prepared.facts.licence)
    for note in plan.notes:
        log.warning("%s", note)
    if prepared.checkpoint is not None:
        log.info("Resuming from step %d (%s)", plan.first_step, prepared.checkpoint.path)
    if plan.disk_needed_bytes > plan.disk_free_bytes and plan.first_step < plan.total_steps:
        what = f"the run writes about {plan.disk_needed_bytes / 1e9:.1f} GB; {plan.disk_free_bytes / 1e9:.1f} GB are free"
        raise UserError(Problem(str(prepared.output.root), what, "make room, or lower checkpoints_total_limit"))


def finished_already(prepared: Prepared) -> Progress | None:
    """Where a finished run stands, having said how to go on; None when there is still something to do."""
    plan, checkpoint = prepared.plan, prepared.checkpoint
    if checkpoint is None or plan.first_step < plan.total_steps or not prepared.output.pipeline.is_dir():
        return None
    log.info(
        "This run is finished: step %d of %d, its pipeline is in %s. To go on, raise max_train_steps (or "
        "num_train_epochs); to begin anew, add --restart",
        plan.first_step, plan.total_steps, prepared.output.pipeline,
    )  # fmt: skip
    return checkpoint.progress()


def work(prepared: Prepared, watcher: Watcher, stop: Stop) -> Progress:
    """Everything heavy: encode what the caches lack, then train."""
    from sana_tune.train.device import make_accelerator

    accelerator = make_accelerator(prepared.config.train.device, precision(prepared.loaded))
    encode_texts(prepared, accelerator.device, watcher)
    broken = encode_pictures(prepared, accelerator.device, watcher)
    if broken:
        prepared = without(prepared, broken)
    return train(prepared, accelerator, watcher, stop)


def encode_texts(prepared: Prepared, device: torch.device, watcher: Watcher) -> None:
    """Fill the text cache; the encoder is loaded only if something is missing, and freed."""
    captions = {prepared.keys.text(text): text for text in needed_captions(prepared.survey, prepared.prompts)}
    negative = {prepared.plain_keys.text(prepared.negative): prepared.negative} if prepared.prompts else {}
    if not prepared.text.missing([*captions, *negative]):
        return
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
        fill_text(prepared.text, captions, encoder.encode, size, reporter(watcher, "text"))
        fill_text(prepared.text, negative, lambda texts: encoder.encode(texts, with_instruction=False), size, _silent)
    finally:
        encoder.free()


def encode_pictures(prepared: Prepared, device: torch.device, watcher: Watcher) -> dict[str, str]:
    """Fill the latent caches; the VAE is loaded only if something is missing, and freed. Answers broken pictures."""
    by_dataset = {dataset.id: [record for record in prepared.survey.records if record.dataset == dataset.id]
                  for dataset in prepared.loaded.datasets}  # fmt: skip
    lacking = {
        name for name, records in by_dataset.items() if prepared.latents[name].missing(map(prepared.keys.latent, records))
    }
    if not lacking:
        return {}
    from sana_tune.model.sana import load_vae

    coder = load_vae(prepared.folder, device, variant=prepared.config.model.variant)
    broken: dict[str, str] = {}
    try:
        for dataset in prepared.loaded.datasets:
            if dataset.id in lacking:
                store = FolderStore(dataset.instance_data_dir)
                broken |= fill_latents(
                    by_dataset[dataset.id],
                    prepared.latents[dataset.id],
                    prepared.keys,
                    lambda record, store=store: store.read(record.key),
                    lambda pictures: encode_finite(coder.encode, pictures),
                    dataset.vae_batch_size,
                    reporter(watcher, f"latents of {dataset.id}"),
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
        raise UserError(Problem("datasets", "not one picture could be encoded", "see the reasons above"))
    again = plan_of(
        prepared.loaded, prepared.output, prepared.facts, prepared.folder, left, prepared.prompts, prepared.checkpoint,
        prepared.plan.notes,
    )  # fmt: skip
    log.warning("%d pictures were left out (ledger.json); the run has %d steps", len(broken), again.plan.total_steps)
    return again


def train(prepared: Prepared, accelerator: Any, watcher: Watcher, stop: Stop) -> Progress:
    """Build the parts and run the loop."""
    from sana_tune.train.checkpoint import Checkpoints
    from sana_tune.train.loop import fit

    config, plan = prepared.config, prepared.plan
    parts = build_parts(prepared, accelerator)
    batches = Batches(
        Order(
            prepared.buckets,
            {dataset.id: dataset.probability for dataset in prepared.loaded.datasets},
            config.data.data_backend_sampling,
            config.train.seed,
        ),
        prepared.survey.records,
        lambda record: prepared.latents[record.dataset],
        prepared.text,
        prepared.keys,
        seed=config.train.seed,
        caption_dropout=config.data.caption_dropout_probability,
        accumulation=config.train.gradient_accumulation_steps,
    )
    identity = {
        "model": config.model.pretrained_model_name_or_path,
        "model_type": config.model.model_type,
        "optimizer": config.optimizer.optimizer,
    }
    checkpoints = Checkpoints(prepared.output.root, config.train.checkpoints_total_limit, identity)
    with drawing(prepared, parts, stop) as validator:
        return fit(
            plan,
            parts,
            batches,
            validator,
            checkpoints,
            watcher,
            stop,
            resume=prepared.checkpoint,
            export=lambda progress: export(prepared, parts, progress),
            max_bad_steps=config.train.max_bad_steps,
        )


def build_parts(prepared: Prepared, accelerator: Any) -> Parts:
    """Transformer, optimizer, schedule and EMA."""
    import torch

    from sana_tune.model.attention import install
    from sana_tune.model.sana import load_transformer, set_gradient_checkpointing
    from sana_tune.model.shift import shift_for
    from sana_tune.train.ema import Ema, NoEma
    from sana_tune.train.optim import Schedule, build_optimizer, seed_kahan
    from sana_tune.train.step import Parts

    config, facts = prepared.config, prepared.facts
    transformer = load_transformer(prepared.folder, torch.float32, accelerator.device, variant=config.model.variant)
    install(transformer)
    if config.model.gradient_checkpointing:
        set_gradient_checkpointing(transformer, config.model.gradient_checkpointing_interval)
    exact = None
    if weights_dtype(config) == "bf16":
        exact = [parameter.detach().clone() for parameter in transformer.parameters()]
        transformer.to(torch.bfloat16)
    wanted = config.optimizer
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
    ema = Ema(transformer.named_parameters(), config.ema.ema_decay, config.ema.ema_update_interval)
    auto = config.flow.flow_schedule_auto_shift
    shift = facts.flow_shift if auto or config.flow.flow_schedule_shift is None else config.flow.flow_schedule_shift
    return Parts(
        accelerator=accelerator,
        transformer=transformer,
        optimizer=optimizer,
        schedule=Schedule(wanted.lr_scheduler, wanted.learning_rate, prepared.plan.total_steps, wanted.lr_warmup_steps),
        ema=ema if config.ema.use_ema else NoEma(),
        shift_at=lambda tokens: shift_for(shift, tokens, facts.native_tokens, facts.scheduler, auto=auto),
        seed=config.train.seed,
        max_grad_norm=wanted.max_grad_norm,
        clip_method=wanted.grad_clip_method,
    )


def drawing(prepared: Prepared, parts: Parts, stop: Stop) -> AbstractContextManager[Validator | NoValidator]:
    """The validator of the run, within which it can draw."""
    from contextlib import contextmanager

    from sana_tune.data.images import encode_png
    from sana_tune.model.generate import Painter
    from sana_tune.train.validate import NoValidator, Validator

    @contextmanager
    def context():
        if not prepared.prompts:
            yield NoValidator()
            return
        settings = prepared.config.validation
        device = parts.accelerator.device
        autocast = autocast_dtype(prepared.loaded) if device.type != "cpu" else None
        painter = Painter(prepared.folder, device, autocast=autocast, variant=prepared.config.model.variant)

        def draw(picture: Picture) -> np.ndarray:
            return painter.draw(
                parts.bare,
                prepared.text.get(prepared.keys.text(picture.prompt)),
                prepared.text.get(prepared.plain_keys.text(prepared.negative)),
                width=picture.width_px,
                height=picture.height_px,
                steps=settings.validation_num_inference_steps,
                guidance=settings.validation_guidance,
                seed=picture.seed,
            )

        yield Validator(
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

    return context()


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
    card = model_card(
        model=facts.name, licence=facts.licence, folder=str(prepared.output.pipeline), sample=sample, training=training,
        has_ema=bool(average),
    )  # fmt: skip
    export_pipeline(
        prepared.folder, parts.bare.state_dict(), average or None, prepared.output.pipeline, card,
        variant=config.model.variant,
    )  # fmt: skip
    return str(prepared.output.pipeline)


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


def weights_dtype(config: Config) -> str:
    """Dtype of the trained weights, "fp32" or "bf16"; auto is fp32 masters."""
    return "bf16" if config.model.weights_dtype == "bf16" else "fp32"


def reporter(watcher: Watcher, cache: str) -> Callable[[int, int], None]:
    """A function that tells a cache's progress as events."""
    return lambda done, total: watcher.emit(CacheProgress(cache, done, total, finished=done >= total))


def _silent(done: int, total: int) -> None:
    """For what is too little to tell."""
