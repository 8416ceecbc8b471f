"""Everything of a run that is cheap: what is asked, what is there, what will happen. Torch-free.

Nothing heavy is loaded before all that can be known to be wrong has been told: the checkpoint to resume from, the
pictures and their captions, the prompts, the model's files, the room on the disk.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from sana_tune.config.datasets import ImageDataset
from sana_tune.config.launching import is_sharded, split
from sana_tune.config.load import Loaded
from sana_tune.config.lycoris import ADAPTER, LycorisFile, read_lycoris
from sana_tune.config.schema import Config
from sana_tune.data import shards
from sana_tune.data.buckets import Bucket, make_buckets, settle, trained
from sana_tune.data.captions import clean_caption
from sana_tune.data.geometry import Size
from sana_tune.data.held_out import with_split
from sana_tune.data.masks import with_masks
from sana_tune.data.memory import FileMemory
from sana_tune.data.records import Keys, Record
from sana_tune.data.stores import open_stores
from sana_tune.data.survey import Report, Survey, survey
from sana_tune.errors import Problem, UserError, gather
from sana_tune.hardware import Device, device_for, free_ram_bytes, gpus, no_fp16_on_cpu
from sana_tune.log import log
from sana_tune.memory import (
    TILE_PX,
    Load,
    MemoryPlan,
    Weights,
    caching_needed,
    changed,
    decide_weights,
    plan_memory,
    resident_needed,
)
from sana_tune.model import fetch, preview_file
from sana_tune.model.adapted import adapted
from sana_tune.model.facts import ModelFacts, check_bf16, check_size, estimated_bytes, from_folder, known
from sana_tune.model.fetch_scorer import scorer_on_disk
from sana_tune.model.identity import latent_identity, text_identity
from sana_tune.model.instruction import resolve_instruction
from sana_tune.model.layout import component_weights, read_json
from sana_tune.model.packing import GEMMA, cannot, encoder_bytes
from sana_tune.output import Output, free_bytes
from sana_tune.plan import (
    CacheNeed,
    Mode,
    Plan,
    adapter_lines,
    begun,
    cache_line,
    latent_bytes,
    loads_of,
    make_plan,
    memory_warnings,
    plan_lines,
    saving_plan,
    text_bytes,
)
from sana_tune.progress import Progress
from sana_tune.prompts import Prompt, drawing_lines, prompts_of
from sana_tune.roles import dataset_plans, evaluation_of, held_out_copies, learns_from_base, priced, timeline_for
from sana_tune.share import kept_batch
from sana_tune.store import FolderStore, Store
from sana_tune.train.folders import Checkpoint, check_identity, find, folder_name, list_complete, read
from sana_tune.watch.metrics import last_lines

LOOKING_TOLD_EVERY_S = 20.0
STEPS_TIMED = 50  # the last steps of a run, whose median tells the speed of the next one


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
    drawn: Mapping[str, Prompt]  # nickname → what is to be drawn; in the order of the pictures
    checkpoint: Checkpoint | None
    plan: Plan
    stores: Mapping[str, Store]  # where the pictures of each dataset are

    @property
    def config(self) -> Config:
        """What was asked, with the dtype of the weights decided."""
        return settled(self.loaded.config, self.plan.weights)

    @property
    def prompts(self) -> dict[str, str]:
        """Nickname → final text of every prompt to be drawn."""
        return texts_of(self.drawn)

    @property
    def captions(self) -> dict[str, str]:
        """Cache key → every text that is encoded with the instruction, and the empty one; in a fixed order."""
        return {self.keys.text(text): text for text in needed_captions(self.survey, self.prompts)}

    @property
    def captions_by_cache(self) -> dict[str, dict[str, str]]:
        """Id of a text cache → its `captions`."""
        wanted = texts_wanted(self.loaded, self.survey, self.prompts)
        return {name: {self.keys.text(text): text for text in texts} for name, texts in wanted.items()}

    @property
    def negatives(self) -> dict[str, str]:
        """Cache key → text that never has the instruction: the negative prompts of what is drawn."""
        texts = dict.fromkeys(prompt.negative for prompt in self.drawn.values())
        return {self.plain_keys.text(text): text for text in texts}

    @property
    def device(self) -> Device | None:
        """Where the run is to take place, if that is known."""
        return self.plan.memory and self.plan.memory.device


def prepare(
    loaded: Loaded,
    output: Output,
    notes: Sequence[str] = (),
    *,
    fresh: bool = False,
    also: Sequence[Problem] = (),
) -> Prepared:
    """Everything that is cheap: the checkpoint, the pictures, the prompts, the model's files, the plan.

    fresh: begin anew whatever there is. also: problems found before, to be told with the others. Writes nothing but
    what is remembered of files. Raises UserError: first with all that is found wrong at once, then with what a look at
    every picture finds, then with what the hub says.
    """
    config, name = loaded.config, loaded.config.model.pretrained_model_name_or_path
    memory = FileMemory(output.file_memory)
    stores = open_stores(loaded.datasets)
    problems = list(also)
    checkpoint = gather(problems, lambda: None if fresh else resumed(config, output))
    loaded = gather(problems, lambda: shared_out(loaded, checkpoint)) or loaded
    config = loaded.config
    gather(problems, lambda: check_gpus(config))
    prompts = gather(problems, lambda: prompts_wanted(config))
    gather(problems, lambda: check_folders(loaded, stores))
    gather(problems, lambda: scorer_at_hand(config))
    expected = gather(problems, lambda: facts_at_hand(config))
    if expected is not None:
        gather(problems, lambda: check_drawing_sizes(config, expected, prompts or {}))
        gather(problems, lambda: check_decoder(config, expected))
    device = device_for(config.train.device)
    gather(problems, lambda: check_quantisation(config, device))
    gather(problems, lambda: check_adapter(config, expected))
    if problems:
        raise UserError(*problems)
    surveyed = None
    if expected is not None:  # the pictures come before a download
        check_precision(loaded, expected, device)
        surveyed = look(loaded, expected, memory, stores)
        buckets = make_buckets(surveyed.records, loaded.datasets)
        config = settled(config, weights_of(loaded, expected, on_disk(config), buckets, device, checkpoint))
    folder = located(config)
    facts = from_folder(folder, name)
    if surveyed is None or expected is None or expected.vae_factor != facts.vae_factor:
        surveyed = look(loaded, facts, memory, stores)
    check_drawing_sizes(config, facts, prompts or {})
    check_decoder(config, facts)
    return plan_of(loaded, output, facts, folder, surveyed, prompts or {}, checkpoint, notes, device, stores)


def resumed(config: Config, output: Output) -> Checkpoint | None:
    """The checkpoint to go on from. Raises UserError when it is not there or of another run."""
    checkpoint = find(output.root, config.train.resume_from_checkpoint)
    if checkpoint is not None:
        check_identity(checkpoint, identity_of(config))
    return checkpoint


def shared_out(loaded: Loaded, checkpoint: Checkpoint | None) -> Loaded:
    """The settings, less what a checkpoint of another number of processes decides. UserError when it does not fit."""
    return loaded if checkpoint is None else kept_batch(loaded, Output(checkpoint.path.parent).read_json("plan.json"))


def check_gpus(config: Config) -> None:
    """Raise UserError when this machine shows fewer GPUs than it is to have processes, one each."""
    wanted = config.launch
    here = wanted.processes // (wanted.num_machines or 1)
    if here < 2 or config.train.device == "cpu" or not (found := gpus()) or len(found) >= here:
        return
    what = f"{here} processes on this machine need as many GPUs; it shows {len(found)}"
    raise UserError(Problem("num_processes", what, "lower it, or see CUDA_VISIBLE_DEVICES and nvidia-smi"))


def identity_of(config: Config) -> dict[str, str]:
    """What a run is: a checkpoint of a run that was something else is refused.

    While the dtype of the weights is `auto` it is no part of it: the run goes on in that of the checkpoint.
    """
    dtype = config.model.weights_dtype
    return {
        "model": config.model.pretrained_model_name_or_path,
        "model_type": config.model.model_type,
        **({"adapter": adapter_file(config).digest_text()} if config.model.model_type == "lora" else {}),
        "optimizer": config.optimizer.optimizer,
        **({} if dtype == "auto" else {"weights_dtype": dtype}),
    }


def check_adapter(config: Config, facts: ModelFacts | None) -> None:
    """Raise UserError when the adapter that is asked for cannot be: no library, no layer, a file that is not there."""
    wanted, problems = config.adapter, list[Problem]()
    if config.model.model_type != "lora":
        return
    gather(problems, check_library)
    if facts is not None:
        file = gather(problems, lambda: adapter_file(config))
        if file is not None:
            gather(problems, lambda: adapted(facts.transformer, file, wanted.lycoris_config))
    for key in ("init_lora", "init_lora_ema"):
        if (path := vars(wanted)[key]) and not Path(path).is_file():
            problems.append(Problem(key, f"there is no file {path}", "name an adapter's .safetensors file"))
    if problems:
        raise UserError(*problems)


def check_library() -> None:
    """Raise UserError when the library of adapters is not installed."""
    if importlib.util.find_spec("lycoris") is None:
        what = "an adapter needs the library lycoris-lora, which is not installed"
        fix = "pip install 'sana_tune[lokr]', or pip install lycoris-lora"
        raise UserError(Problem("model_type lora", what, fix))


def adapter_file(config: Config) -> LycorisFile:
    """What describes the adapter. Raises UserError with what is wrong in it."""
    return read_lycoris(config.adapter.lycoris_config)


def weights_of(
    loaded: Loaded,
    facts: ModelFacts,
    folder: Path | None,
    buckets: Sequence[Bucket],
    device: Device | None,
    checkpoint: Checkpoint | None,
) -> Weights:
    """The dtype of the trained weights, and why. folder: None for a model that is not on this machine yet."""
    launch = loaded.config.launch
    if loaded.config.model.model_type == "lora":
        return Weights("fp32", "an adapter's always are")
    if launch.processes > 1 and loaded.config.model.weights_dtype == "auto":
        if is_sharded(launch.accelerate_config, split(launch.accelerate_extra_args or "")):
            return Weights("fp32", "FSDP2 splits them over the processes")
    held = checkpoint.header().get("run", {}).get("weights_dtype") if checkpoint else None
    return decide_weights(
        priced(loaded.config, buckets),
        facts,
        loads_of(trained(buckets)),
        device,
        precision=precision_on(loaded, device),
        held=held,
        resident_bytes=resident(loaded, placed_bytes(loaded.config, facts, folder), buckets),
    )


def settled(config: Config, weights: Weights) -> Config:
    """The settings with the dtype of the weights decided."""
    return changed(config, {"weights_dtype": weights.dtype})


def check_precision(loaded: Loaded, facts: ModelFacts, device: Device | None) -> None:
    """Raise UserError when the model or the device cannot be computed with as asked."""
    precision, problem = precision_on(loaded, device), None
    if precision == "fp16" and device is not None and device.kind == "cpu":
        problem = no_fp16_on_cpu()
    elif precision == "bf16" or loaded.config.model.weights_dtype == "bf16" or has_bf16_parts(loaded.config):
        problem = check_bf16(facts)
    if problem is not None:
        raise UserError(problem)


def has_bf16_parts(config: Config) -> bool:
    """Whether the base is quantised, with bf16 for the rest of it."""
    model = config.model
    return model.base_model_precision != "no_change" and model.base_model_default_dtype == "bf16"


def check_quantisation(config: Config, device: Device | None) -> None:
    """Raise UserError when weights cannot be quantised here as asked."""
    model, kind = config.model, None if device is None else device.kind
    asked = {key: vars(model)[key] for key in ("base_model_precision", "text_encoder_1_precision")}
    problems = [problem for key, value in asked.items() if (problem := cannot(key, value, kind))]
    if problems:
        raise UserError(*problems)


def prompts_wanted(config: Config) -> dict[str, Prompt]:
    """Nickname → every prompt to be drawn; none for validation_disable."""
    clean = partial(clean_caption, case=config.model.prompt_case)
    return {} if config.validation.validation_disable else prompts_of(config.validation, clean)


def scorer_at_hand(config: Config) -> Path | None:
    """The folder of the model that scores pictures, if it is on this machine and pictures are scored.

    Raises UserError for one that cannot be had.
    """
    wanted = config.evaluation
    if wanted.evaluation_type == "none" or config.validation.validation_disable:
        return None
    return scorer_on_disk(wanted.pretrained_evaluation_model_name_or_path)


def check_folders(loaded: Loaded, stores: Mapping[str, Store]) -> None:
    """Raise UserError for every dataset whose folder, bucket or table is not there."""
    problems: list[Problem] = []
    for dataset in loaded.datasets:
        found: list[Problem] = []
        gather(found, stores[dataset.id].check)
        problems += [replace(problem, where=f"dataset {dataset.id}: {problem.where}") for problem in found]
    for masks in loaded.masks:
        found = []
        gather(found, FolderStore(masks.instance_data_dir).check)
        problems += [replace(problem, where=f"masks {masks.id}: {problem.where}") for problem in found]
    if problems:
        raise UserError(*problems)


def facts_at_hand(config: Config) -> ModelFacts | None:
    """What is known of the model without a download: of a folder, or of a published model. None for another hub id."""
    name = config.model.pretrained_model_name_or_path
    return known(name) if fetch.local_folder(name) is None else from_folder(located(config), name)


def located(config: Config) -> Path:
    """The model's folder on this machine, downloaded if need be."""
    model = config.model
    dtype = weights_dtype(config)
    return fetch.locate(
        model.pretrained_model_name_or_path, revision=model.revision, variant=model.variant, dtype=dtype
    )


def on_disk(config: Config) -> Path | None:
    """The model's folder if it is on this machine, in whichever dtype `weights_dtype` may come to; else None."""
    model = config.model
    dtypes = ("fp32", "bf16") if model.weights_dtype == "auto" else (weights_dtype(config),)
    name, revision, variant = model.pretrained_model_name_or_path, model.revision, model.variant
    found = (fetch.on_disk(name, revision=revision, variant=variant, dtype=dtype) for dtype in dtypes)
    return next((folder for folder in found if folder is not None), None)


def look(loaded: Loaded, facts: ModelFacts, memory: FileMemory, stores: Mapping[str, Store]) -> Survey:
    """Survey the datasets. Raises UserError with all their problems."""
    found = survey_of(loaded, facts, memory, stores, report=Looking())
    if found.problems:
        raise UserError(*found.problems)
    return found


def survey_of(
    loaded: Loaded,
    facts: ModelFacts,
    memory: FileMemory,
    stores: Mapping[str, Store],
    *,
    headers_only: bool = False,
    report: Report | None = None,
) -> Survey:
    """The survey of the datasets, with what is wrong in it. Raises UserError when the VAE cannot have such buckets."""
    data = loaded.config.data
    alignment = data.aspect_bucket_alignment or facts.vae_factor
    if alignment % facts.vae_factor:
        what = f"must be a multiple of the VAE's factor {facts.vae_factor}; found {alignment}"
        raise UserError(Problem("aspect_bucket_alignment", what, f"use {facts.vae_factor}, or leave it out"))
    rounding, seed = data.aspect_bucket_rounding, loaded.config.train.seed
    found = survey(
        loaded.datasets,
        alignment=alignment,
        rounding=rounding,
        prompt_case=loaded.config.model.prompt_case,
        memory=memory,
        report=report,
        seed=seed,
        headers_only=headers_only,
        filters={dataset.id: loaded.text_cache_of(dataset.id).caption_filter_list for dataset in loaded.datasets},
        strict=data.strict,
        stores=stores,
    )
    found = with_split(found, loaded.datasets, seed)
    settled = settle(found, loaded.datasets, alignment=alignment, rounding=rounding, seed=seed)
    return with_masks(settled, loaded.datasets, loaded.masks, memory, headers_only=headers_only)


class Looking:
    """Says how far a survey is, when it takes long: pictures that are far away are downloaded by it."""

    def __init__(self) -> None:
        self._dataset, self._begun_s, self._told_s = "", 0.0, 0.0

    def __call__(self, dataset: str, done: int, total: int) -> None:
        now = time.monotonic()
        if dataset != self._dataset:
            self._dataset, self._begun_s, self._told_s = dataset, now, now
        elif now - self._told_s > LOOKING_TOLD_EVERY_S and done < total:
            self._told_s = now
            pace = done / (now - self._begun_s)
            text = "Looking at the pictures of %s: %d of %d, %.1f a second, about %.0f min left"
            log.info(text, dataset, done, total, pace, (total - done) / pace / 60)


def texts_of(prompts: Mapping[str, Prompt]) -> dict[str, str]:
    """Nickname → final text."""
    return {name: prompt.text for name, prompt in prompts.items()}


def check_drawing_sizes(config: Config, facts: ModelFacts, prompts: Mapping[str, Prompt]) -> None:
    """Raise UserError for validation sizes that the pipeline cannot draw."""
    sizes = [*drawing_sizes(config, facts), *(size for prompt in prompts.values() for size in prompt.sizes)]
    problems = [check_size(width, height, facts.vae_factor) for width, height in dict.fromkeys(sizes)]
    if any(problems):
        raise UserError(*(problem for problem in problems if problem))


def check_decoder(config: Config, facts: ModelFacts) -> None:
    """Raise UserError for a decoder of previews that is not there, or cannot be this model's."""
    wanted = config.validation
    if wanted.validation_preview and wanted.validation_preview_decoder and not wanted.validation_disable:
        preview_file.check(wanted.validation_preview_decoder, facts)


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
    prompts: Mapping[str, Prompt],
    checkpoint: Checkpoint | None,
    notes: Sequence[str],
    device: Device | None,
    stores: Mapping[str, Store],
) -> Prepared:
    """Buckets, keys, caches and the plan from what was found. device: where it is to run, if that is known."""
    keys, plain_keys = keys_of(loaded.config, folder, output)
    buckets = make_buckets(surveyed.records, loaded.datasets)
    caches = cache_needs(loaded, output, facts, surveyed, texts_of(prompts), keys)
    told = (*notes, *held_out_copies(surveyed.records))
    plan = run_plan(loaded, output, facts, folder, buckets, caches, checkpoint, told, device, prompts)
    return Prepared(
        loaded, output, facts, folder, surveyed, buckets, keys, plain_keys, prompts, checkpoint, plan, stores
    )


def run_plan(
    loaded: Loaded,
    output: Output,
    facts: ModelFacts,
    folder: Path | None,
    buckets: Sequence[Bucket],
    caches: Sequence[CacheNeed],
    checkpoint: Checkpoint | None,
    notes: Sequence[str],
    device: Device | None,
    prompts: Mapping[str, Prompt],
) -> Plan:
    """The plan, with memory and speed. folder: None for a model that is not on this machine yet.

    Raises UserError when it cannot be computed as asked.
    """
    check_precision(loaded, facts, device)
    weights = weights_of(loaded, facts, folder, buckets, device, checkpoint)
    config = settled(loaded.config, weights)
    sizes, precision = model_bytes(config, facts, folder), precision_on(loaded, device)
    placed = placed_bytes(config, facts, folder)
    batches = [encoded_at_once(config, bucket.size, vae_batch(loaded, bucket.dataset)) for bucket in buckets]
    plan = make_plan(
        config,
        facts,
        buckets,
        caches,
        first_step=checkpoint.progress().step if checkpoint else begun(config),
        disk_free_bytes=free_bytes(existing(output.root)),
        other_model_bytes=sum(sizes.values()) - sizes["transformer"],
        notes=(*notes, *loaded.notes),
        memory=memory_of(
            priced(config, buckets),
            facts,
            buckets,
            batches,
            placed,
            device,
            precision,
            resident(loaded, placed, buckets),
        ),
        precision=precision,
        weights=weights,
        ranks=config.launch.processes,
        datasets=dataset_plans(loaded),
        timeline=timeline_for(loaded, buckets),
        learns_from_base=learns_from_base(config, buckets),
    )
    drawn = drawing_lines(config, prompts, drawing_sizes(config, facts))
    held = evaluation_of(loaded, buckets)
    saving = saving_plan(config, facts, plan.memory, free_ram_bytes())
    timed = measured_step_s(output, plan)
    adapter = adapter_lines(config, facts)
    return replace(plan, step_s=timed, pictures=drawn, evaluation=held, saving=saving, adapter=adapter)


def memory_of(
    config: Config,
    facts: ModelFacts,
    buckets: Sequence[Bucket],
    batches: Sequence[Load],
    sizes: Mapping[str, int],
    device: Device | None,
    precision: str,
    resident_bytes: int = 0,
) -> MemoryPlan:
    """Memory for caching and training. batches: as the VAE gets them. sizes: of the networks in memory, by component.

    resident_bytes: what encoders take beside training.
    """
    caching = caching_needed(sizes["text_encoder"], sizes["vae"], batches)
    loads = loads_of(trained(buckets))
    return plan_memory(config, facts, loads, caching, device, precision=precision, resident_bytes=resident_bytes)


def resident(loaded: Loaded, sizes: Mapping[str, int], buckets: Sequence[Bucket]) -> int:
    """Bytes of the encoders that are on the device while training, with what they work in: those of caches that are
    filled on demand or not kept, and the VAE that encodes each epoch's new crops."""
    loads: list[Load] = []
    for dataset in loaded.datasets:
        at_once = 1 if vae_mode(dataset) != "full" else dataset.vae_batch_size
        if vae_mode(dataset) != "full" or dataset.vae_cache_clear_each_epoch:
            own = [bucket.size for bucket in buckets if bucket.dataset == dataset.id]
            loads += [encoded_at_once(loaded.config, size, at_once) for size in own]
    captions = any(text_mode(loaded, text.id) != "full" for text in (loaded.text_cache, *loaded.text_caches))
    return resident_needed(sizes["text_encoder"] if captions else 0, sizes["vae"] if loads else 0, loads)


def encoded_at_once(config: Config, size: Size, pictures: int) -> Load:
    """What the VAE works on at one time: so many pictures, or a tile of each."""
    most = TILE_PX if config.data.vae_tiled_encoding else max(size)
    return Load(min(size.width, most), min(size.height, most), pictures)


def vae_batch(loaded: Loaded, dataset: str) -> int:
    """Pictures of a dataset that the VAE encodes at once."""
    return next(entry.vae_batch_size for entry in loaded.datasets if entry.id == dataset)


def model_bytes(config: Config, facts: ModelFacts, folder: Path | None) -> dict[str, int]:
    """Bytes of a model's files by component; about, for a model that is not on this machine."""
    if folder is None:
        return estimated_bytes(facts, weights_dtype(config))
    sizes = {}
    for part in ("transformer", "vae", "text_encoder"):
        dtype = weights_dtype(config) if part == "transformer" else "fp32"
        weights = component_weights(folder, part, variant=config.model.variant, dtype=dtype)
        sizes[part] = sum((folder / file).stat().st_size for file in weights.files)
    return {**sizes, "tokenizer": sum(path.stat().st_size for path in (folder / "tokenizer").iterdir())}


def placed_bytes(config: Config, facts: ModelFacts, folder: Path | None) -> dict[str, int]:
    """Bytes of a model's networks in memory: those of its files, but for a text encoder that is quantised."""
    sizes, precision = model_bytes(config, facts, folder), config.model.text_encoder_1_precision
    if precision == "no_change":
        return sizes
    kind = GEMMA if folder is None else read_json(folder / "text_encoder" / "config.json")
    return {**sizes, "text_encoder": encoder_bytes(sizes["text_encoder"], precision, kind)}


def precision_on(loaded: Loaded, device: Device | None) -> str:
    """Accelerate's mixed_precision on a device: a CPU casts nothing unless it is asked to."""
    unasked = loaded.origins["mixed_precision"] == "default"
    return "no" if unasked and device is not None and device.kind == "cpu" else loaded.config.model.mixed_precision


def measured_step_s(output: Output, plan: Plan) -> float | None:
    """Median time of the last steps that were done here at the plan's pace, in seconds; None when there are none."""
    before = output.read_json("plan.json")
    if before.get("pace") != json.loads(json.dumps(plan.pace)):
        return None
    begun = before.get("first_step", 0)
    lines = [line for line in last_lines(output.metrics_file, STEPS_TIMED + 1) if line["step"] > begun + 1]
    times = [line["step_s"] for line in lines if isinstance(line.get("step_s"), (int, float))]
    return median(times) if times else None


def existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if os.path.exists(place))


def keys_of(config: Config, folder: Path, output: Output) -> tuple[Keys, Keys]:
    """The cache keys of the run, and those of texts that never have the instruction (negative prompts)."""
    model, memory = config.model, output.hash_memory
    images = latent_identity(folder, memory=memory, variant=model.variant, tiled=config.data.vae_tiled_encoding)

    quantised = model.text_encoder_1_precision
    dtype = "stored" if quantised == "no_change" else f"stored, {quantised}"

    def keys(instruction: str) -> Keys:
        text = text_identity(folder, instruction=instruction, dtype=dtype, memory=memory, variant=model.variant)
        return Keys(images, text)

    return keys(resolve_instruction(model.sana_complex_human_instruction)), keys("")


def vae_mode(dataset: ImageDataset) -> Mode:
    """How a dataset's latents are kept: all before training, each when it is first needed, or not at all."""
    return "none" if dataset.vae_cache_disable else "ondemand" if dataset.vae_cache_ondemand else "full"


def text_mode(loaded: Loaded, name: str) -> Mode:
    """How the embeddings of a text cache are kept."""
    data = loaded.config.data
    entry = next((text for text in loaded.text_caches if text.id == name), loaded.text_cache)
    none, later = entry.text_cache_disable, entry.text_cache_ondemand
    if data.text_cache_disable if none is None else none:
        return "none"
    return "ondemand" if (data.text_cache_ondemand if later is None else later) else "full"


def cache_needs(
    loaded: Loaded,
    output: Output,
    facts: ModelFacts,
    surveyed: Survey,
    prompts: Mapping[str, str],
    keys: Keys | None,
) -> list[CacheNeed]:
    """What each cache must hold and what it lacks. keys: None while the model's files were never hashed."""
    entries = {text.id: text for text in (loaded.text_cache, *loaded.text_caches)}
    needs = []
    for name, captions in texts_wanted(loaded, surveyed, prompts).items():
        folder, mode = output.text_folder(loaded.config, entries[name]), text_mode(loaded, name)
        title = "text" if name == loaded.text_cache.id else f"text of {name}"
        needs.append(text_need(title, folder, facts, captions, keys, mode))
    by_dataset: dict[str, list[Record]] = {dataset.id: [] for dataset in loaded.datasets}
    for record in surveyed.records:
        by_dataset[record.dataset].append(record)
    for dataset in loaded.datasets:
        folder = output.latent_folder(loaded.config, dataset)
        records, mode = by_dataset[dataset.id], vae_mode(dataset)
        needs.append(latent_need(dataset.id, folder, facts, records, keys, mode))
        masked = [record for record in records if record.mask_key is not None]
        if masked and keeps_masks(dataset):
            needs.append(mask_need(dataset.id, folder, facts, masked, keys))
    return needs


def keeps_masks(dataset: ImageDataset) -> bool:
    """Whether the masks of a dataset are kept beside its latents; those that change, or come with none, are not."""
    return vae_mode(dataset) != "none" and not dataset.vae_cache_clear_each_epoch


def mask_need(name: str, folder: Path, facts: ModelFacts, records: Sequence[Record], keys: Keys | None) -> CacheNeed:
    """What the cache of a dataset must hold of masks, one number for each place of a latent, and what it lacks."""
    there = shards.scan(folder).items
    hashed = [record for record in records if record.mask_hash is not None and keys is not None]
    sizes = {keys.mask(record): record.placement.target for record in hashed} if keys else {}
    others = [record.placement.target for record in records if record.mask_hash is None or keys is None]
    hits = sizes.keys() & there.keys()
    lacking = [*(size for key, size in sizes.items() if key not in hits), *others]
    to_make = sum(latent_bytes(size, facts) for size in lacking) // facts.latent_channels
    unknown = len(others) if there else 0
    return CacheNeed(f"masks of {name}", str(folder), len(sizes) + len(others), len(hits), to_make, unknown)


def text_need(
    title: str, folder: Path, facts: ModelFacts, captions: Collection[str], keys: Keys | None, mode: Mode = "full"
) -> CacheNeed:
    """What a text cache must hold and what it lacks."""
    if mode == "none":
        return CacheNeed(title, str(folder), 0, 0, 0, mode=mode)
    there = shards.scan(folder).items
    hits = len({keys.text(caption) for caption in captions}.intersection(there)) if keys and there else 0
    unknown = len(captions) if there and not keys else 0
    return CacheNeed(title, str(folder), len(captions), hits, text_bytes(facts, len(captions) - hits), unknown, mode)


def latent_need(
    name: str, folder: Path, facts: ModelFacts, records: Sequence[Record], keys: Keys | None, mode: Mode = "full"
) -> CacheNeed:
    """What the latent cache of a dataset must hold and what it lacks; equal pictures count once where that is known."""
    title = f"latents of {name}"
    if mode == "none":
        return CacheNeed(title, str(folder), 0, 0, 0, mode=mode)
    there = shards.scan(folder).items
    hashed = [record for record in records if record.content_hash is not None]

    def key(record: Record) -> object:
        return keys.latent(record) if keys else (record.content_hash, record.placement)

    sizes = {key(record): record.placement.target for record in hashed}
    hits = sizes.keys() & there.keys() if keys else set()
    others = [record.placement.target for record in records if record.content_hash is None]
    to_make = sum(latent_bytes(size, facts) for one, size in sizes.items() if one not in hits)
    to_make += sum(latent_bytes(size, facts) for size in others)
    unknown = (len(others) if keys else len(sizes) + len(others)) if there else 0
    needed = len(sizes) + len(others)
    return CacheNeed(title, str(folder), needed, len(hits), to_make, unknown, mode)


def texts_wanted(loaded: Loaded, surveyed: Survey, prompts: Mapping[str, str]) -> dict[str, dict[str, None]]:
    """Id of a text cache → every text that it holds with the instruction, each once, in a fixed order.

    The captions are in the cache of their dataset, the prompts in the default one, the empty caption in all.
    """
    of_dataset = {dataset.id: loaded.text_cache_of(dataset.id).id for dataset in loaded.datasets}
    names = dict.fromkeys((loaded.text_cache.id, *of_dataset.values()))
    wanted: dict[str, dict[str, None]] = {name: {"": None} for name in names}
    for record in surveyed.records:
        wanted[of_dataset[record.dataset]].update(dict.fromkeys(record.captions))
    wanted[loaded.text_cache.id].update(dict.fromkeys(prompts.values()))
    return wanted


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
    for note in (*plan.notes, *(memory_warnings(plan.memory) if plan.memory else ())):
        log.warning("%s", note)
    if prepared.checkpoint is not None:
        log.info("Resuming from step %d (%s)", plan.first_step, prepared.checkpoint.path)
    if (problem := no_room(prepared.output, plan)) is not None:
        raise UserError(problem)


def tell_caches(prepared: Prepared) -> None:
    """Say what the caches lack. Raises UserError when the disk has no room for it."""
    plan = prepared.plan
    for cache in plan.caches:
        log.info("%s", cache_line(cache))
    for note in plan.notes:
        log.warning("%s", note)
    by_disk: dict[int, list[CacheNeed]] = {}
    for cache in plan.caches:
        by_disk.setdefault(existing(Path(cache.folder)).stat().st_dev, []).append(cache)
    for caches in by_disk.values():
        needed, free = sum(cache.bytes_to_make for cache in caches), free_bytes(existing(Path(caches[0].folder)))
        if needed > free:
            what = f"the caches take about {needed / 1e9:.1f} GB more; {free / 1e9:.1f} GB are free"
            raise UserError(Problem(caches[0].folder, what, "make room, or choose another place with cache_dir"))


def no_room(output: Output, plan: Plan) -> Problem | None:
    """What is wrong when the disk is too small for what is still to be written."""
    needed = plan.disk_needed_bytes
    if plan.first_step:  # checkpoints that are there make room for those that come
        there = sum(each.size_bytes for each in list_complete(output.root))
        needed -= min(there, plan.disk.checkpoints_bytes)
    if needed <= plan.disk_free_bytes or not plan.steps_left:
        return None
    what = f"the run writes about {needed / 1e9:.1f} GB; {plan.disk_free_bytes / 1e9:.1f} GB are free"
    return Problem(str(output.root), what, "make room, or lower checkpoints_total_limit")


def tell_changes(before: Mapping[str, Any], prepared: Prepared) -> None:
    """Say when a resumed run goes on with other pictures or batches than the plan `before` (plan.json) had."""
    now = json.loads(json.dumps(prepared.plan.to_json()))
    if before and _order_settings({"datasets": now["datasets"], **before}) != _order_settings(now):
        log.warning("the pictures or batch settings changed since then: the order from here on is the new plan's")


def _order_settings(plan: Mapping[str, Any]) -> list[Any]:
    """What of a plan.json decides the order of the pictures."""
    buckets = [{"role": "train", **bucket} for bucket in plan.get("buckets", ())]
    told = ("id", "role", "probability", "start_epoch", "start_step", "end_epoch", "end_step")
    return [buckets, plan.get("micro_batches_per_step"), [[each.get(key) for key in told] for each in plan["datasets"]]]


def write_down(prepared: Prepared) -> None:
    """Write down what the run is: config.json, plan.json and ledger.json."""
    prepared.output.write_config(prepared.loaded)
    prepared.output.write_json("plan.json", prepared.plan.to_json())
    prepared.output.write_json("ledger.json", prepared.survey.ledger.to_json())


def digest_of(prepared: Prepared) -> str:
    """A short text that is the same for processes that found the same pictures and work out the same plan."""
    plan, told = prepared.plan, hashlib.blake2b(digest_size=16)
    for record in prepared.survey.records:
        told.update(repr(record).encode())
    numbers = (plan.first_step, plan.total_steps, plan.micro_batches_per_step, plan.ranks, plan.weights.dtype)
    told.update(repr((numbers, plan.buckets, plan.levels, prepared.keys, sorted(prepared.prompts))).encode())
    return told.hexdigest()


def finished_already(prepared: Prepared) -> Progress | None:
    """Where a finished run stands, having said how to go on; None when there is still something to do."""
    plan, checkpoint = prepared.plan, prepared.checkpoint
    if checkpoint is None or not finished(prepared.output, plan, checkpoint):
        return None
    log.info(
        "This run is finished: step %d of %d, its result is in %s. To go on, raise max_train_steps (or "
        "num_train_epochs); to begin anew, add --restart",
        plan.first_step, plan.total_steps, prepared.output.result(prepared.config),
    )  # fmt: skip
    return checkpoint.progress()


def finished(output: Output, plan: Plan, checkpoint: Checkpoint) -> bool:
    """Whether all steps are done and the pipeline is written."""
    return not plan.steps_left and is_exported(output, checkpoint)


def is_exported(output: Output, checkpoint: Checkpoint) -> bool:
    """Whether the pipeline that stands there was made of this checkpoint, and not at the end of a shorter run."""
    result = output.adapter if checkpoint.layout is ADAPTER else output.pipeline
    return result.is_dir() and output.read_json("pipeline.json") == weight_hashes(checkpoint)


def write_down_export(output: Output, progress: Progress) -> None:
    """Write down of which checkpoint the pipeline was made: the one at `progress`."""
    checkpoint = read(output.root / folder_name(progress.step))
    if checkpoint is not None:
        output.write_json("pipeline.json", weight_hashes(checkpoint))


def weight_hashes(checkpoint: Checkpoint) -> dict[str, str]:
    """What the weights of a checkpoint are: file → SHA-256."""
    return {name: entry["sha256"] for name, entry in checkpoint.files.items() if name.endswith(".safetensors")}


def weights_dtype(config: Config) -> str:
    """Dtype of the trained weights, "fp32" or "bf16"; auto, while it is not decided, counts as fp32 masters."""
    return "bf16" if config.model.weights_dtype == "bf16" else "fp32"
