"""Everything of a run that is cheap: what is asked, what is there, what will happen. Torch-free.

Nothing heavy is loaded before all that can be known to be wrong has been told: the checkpoint to resume from, the
pictures and their captions, the prompts, the model's files, the room on the disk.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from sana_tune.config.load import Loaded
from sana_tune.config.schema import Config
from sana_tune.data import shards
from sana_tune.data.buckets import Bucket, make_buckets
from sana_tune.data.captions import clean_caption
from sana_tune.data.memory import FileMemory
from sana_tune.data.records import Keys
from sana_tune.data.survey import Survey, survey
from sana_tune.errors import Problem, UserError, gather
from sana_tune.log import log
from sana_tune.model import fetch
from sana_tune.model.facts import ModelFacts, check_size, from_folder, known
from sana_tune.model.identity import latent_identity, text_identity
from sana_tune.model.instruction import resolve_instruction
from sana_tune.output import Output, free_bytes
from sana_tune.plan import CacheNeed, Plan, latent_bytes, make_plan, plan_lines, text_bytes
from sana_tune.progress import Progress
from sana_tune.prompts import prompts_of
from sana_tune.store import FolderStore
from sana_tune.train.folders import Checkpoint, check_identity, find, folder_name, read


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
    prompts: Mapping[str, str]
    checkpoint: Checkpoint | None
    plan: Plan

    @property
    def config(self) -> Config:
        return self.loaded.config

    @property
    def captions(self) -> dict[str, str]:
        """Cache key → every text that is encoded with the instruction, and the empty one; in a fixed order."""
        return {self.keys.text(text): text for text in needed_captions(self.survey, self.prompts)}

    @property
    def negative(self) -> str:
        """The final negative prompt."""
        return clean_caption(self.config.validation.validation_negative_prompt, self.config.model.prompt_case)


def prepare(loaded: Loaded, output: Output, notes: Sequence[str] = (), *, fresh: bool = False) -> Prepared:
    """Everything that is cheap: the checkpoint, the pictures, the prompts, the model's files, the plan.

    fresh: begin anew whatever there is. Writes nothing but what is remembered of files. Raises UserError: first with
    all that is found wrong at once, then with what a look at every picture finds, then with what the hub says.
    """
    config, name = loaded.config, loaded.config.model.pretrained_model_name_or_path
    memory = FileMemory(output.file_memory)
    problems: list[Problem] = []
    checkpoint = gather(problems, lambda: None if fresh else resumed(config, output))
    prompts = gather(problems, lambda: prompts_wanted(config))
    gather(problems, lambda: check_folders(loaded))
    expected = gather(problems, lambda: facts_at_hand(config))
    if expected is not None:
        gather(problems, lambda: check_drawing_sizes(config, expected))
    if problems:
        raise UserError(*problems)
    surveyed = None
    if expected is not None:  # the pictures come before a download
        surveyed = look(loaded, expected, memory)
    folder = located(config)
    facts = from_folder(folder, name)
    if surveyed is None or expected is None or expected.vae_factor != facts.vae_factor:
        surveyed = look(loaded, facts, memory)
    check_drawing_sizes(config, facts)
    return plan_of(loaded, output, facts, folder, surveyed, prompts or {}, checkpoint, notes)


def resumed(config: Config, output: Output) -> Checkpoint | None:
    """The checkpoint to go on from. Raises UserError when it is not there or of another run."""
    checkpoint = find(output.root, config.train.resume_from_checkpoint)
    if checkpoint is not None:
        check_identity(checkpoint, identity_of(config))
    return checkpoint


def identity_of(config: Config) -> dict[str, str]:
    """What a run is: a checkpoint of a run that was something else is refused."""
    return {
        "model": config.model.pretrained_model_name_or_path,
        "model_type": config.model.model_type,
        "optimizer": config.optimizer.optimizer,
        "weights_dtype": weights_dtype(config),
    }


def prompts_wanted(config: Config) -> dict[str, str]:
    """Nickname → final text of every prompt to be drawn."""
    clean = partial(clean_caption, case=config.model.prompt_case)
    return {} if config.validation.validation_disable else prompts_of(config.validation, clean)


def check_folders(loaded: Loaded) -> None:
    """Raise UserError for every dataset whose folder is not there."""
    problems: list[Problem] = []
    for dataset in loaded.datasets:
        found: list[Problem] = []
        gather(found, FolderStore(dataset.instance_data_dir).check)
        problems += [replace(problem, where=f"dataset {dataset.id}: {problem.where}") for problem in found]
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
    problems = [check_size(width, height, facts.vae_factor) for width, height in sizes]
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
    keys, plain_keys = keys_of(config, folder, output)
    buckets = make_buckets(surveyed.records, loaded.datasets)
    copied = [path for part in ("vae", "text_encoder", "tokenizer") for path in (folder / part).iterdir()]
    plan = make_plan(
        config,
        facts,
        buckets,
        cache_needs(loaded, output, facts, surveyed, prompts, keys),
        first_step=checkpoint.progress().step if checkpoint else 0,
        disk_free_bytes=free_bytes(output.root),
        other_model_bytes=sum(path.stat().st_size for path in copied),
        notes=(*notes, *loaded.notes),
    )
    prepared = Prepared(loaded, output, facts, folder, surveyed, buckets, keys, plain_keys, prompts, checkpoint, plan)
    return prepared


def keys_of(config: Config, folder: Path, output: Output) -> tuple[Keys, Keys]:
    """The cache keys of the run, and those of texts that never have the instruction (negative prompts)."""
    model, memory = config.model, output.hash_memory
    images = latent_identity(folder, memory=memory, variant=model.variant)

    def keys(instruction: str) -> Keys:
        text = text_identity(folder, instruction=instruction, dtype="stored", memory=memory, variant=model.variant)
        return Keys(images, text)

    return keys(resolve_instruction(model.sana_complex_human_instruction)), keys("")


def cache_needs(
    loaded: Loaded, output: Output, facts: ModelFacts, surveyed: Survey, prompts: Mapping[str, str], keys: Keys
) -> list[CacheNeed]:
    """What each cache must hold and what it lacks."""
    captions = {keys.text(caption) for caption in needed_captions(surveyed, prompts)}
    folder = output.text_folder(loaded.config, loaded.text_cache)
    absent = len(captions.difference(shards.scan(folder).items))
    needs = [CacheNeed("text", str(folder), len(captions), len(captions) - absent, text_bytes(facts, absent))]
    for dataset in loaded.datasets:
        folder = output.latent_folder(loaded.config, dataset)
        records = [record for record in surveyed.records if record.dataset == dataset.id]
        sizes = {keys.latent(record): record.placement.target for record in records}
        missing = set(sizes).difference(shards.scan(folder).items)
        to_make = sum(latent_bytes(sizes[key], facts) for key in missing)
        need = CacheNeed(f"latents of {dataset.id}", str(folder), len(sizes), len(sizes) - len(missing), to_make)
        needs.append(need)
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
        what = (
            f"the run writes about {plan.disk_needed_bytes / 1e9:.1f} GB; {plan.disk_free_bytes / 1e9:.1f} GB are free"
        )
        raise UserError(Problem(str(prepared.output.root), what, "make room, or lower checkpoints_total_limit"))


def tell_changes(before: Mapping[str, Any], prepared: Prepared) -> None:
    """Say when a resumed run goes on with other pictures or batches than the plan `before` (plan.json) had."""
    now = json.loads(json.dumps(prepared.plan.to_json()))
    if before and any(before.get(key) != now[key] for key in ("buckets", "micro_batches_per_step")):
        log.warning("the pictures or batch settings changed since then: the order from here on is the new plan's")


def write_down(prepared: Prepared) -> None:
    """Write down what the run is: config.json, plan.json and ledger.json."""
    prepared.output.write_config(prepared.loaded)
    prepared.output.write_json("plan.json", prepared.plan.to_json())
    prepared.output.write_json("ledger.json", prepared.survey.ledger.to_json())


def finished_already(prepared: Prepared) -> Progress | None:
    """Where a finished run stands, having said how to go on; None when there is still something to do."""
    plan, checkpoint = prepared.plan, prepared.checkpoint
    if checkpoint is None or plan.first_step < plan.total_steps or not is_exported(prepared.output, checkpoint):
        return None
    log.info(
        "This run is finished: step %d of %d, its pipeline is in %s. To go on, raise max_train_steps (or "
        "num_train_epochs); to begin anew, add --restart",
        plan.first_step, plan.total_steps, prepared.output.pipeline,
    )  # fmt: skip
    return checkpoint.progress()


def is_exported(output: Output, checkpoint: Checkpoint) -> bool:
    """Whether the pipeline that stands there was made of this checkpoint, and not at the end of a shorter run."""
    return output.pipeline.is_dir() and output.read_json("pipeline.json") == weight_hashes(checkpoint)


def write_down_export(output: Output, progress: Progress) -> None:
    """Write down of which checkpoint the pipeline was made: the one at `progress`."""
    checkpoint = read(output.root / folder_name(progress.step))
    if checkpoint is not None:
        output.write_json("pipeline.json", weight_hashes(checkpoint))


def weight_hashes(checkpoint: Checkpoint) -> dict[str, str]:
    """What the weights of a checkpoint are: file → SHA-256."""
    return {name: entry["sha256"] for name, entry in checkpoint.files.items() if name.startswith("transformer")}


def weights_dtype(config: Config) -> str:
    """Dtype of the trained weights, "fp32" or "bf16"; auto is fp32 masters."""
    return "bf16" if config.model.weights_dtype == "bf16" else "fp32"
