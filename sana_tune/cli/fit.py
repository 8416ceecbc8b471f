"""`sana_tune fit`: finds settings with which full-rank training fits a card, tells what they cost, and writes them."""

from __future__ import annotations

import json
import math
import os
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sana_tune.check import look_over
from sana_tune.cli.drafts import find_files, read_existing, schema_for, shown
from sana_tune.cli.fit_words import costs_told, nothing_fits, table, told
from sana_tune.cli.loading import load_asked
from sana_tune.cli.merge import Existing, canonical, merge_settings
from sana_tune.cli.recipe import CONTROL, TYPED_BYTES, ModelChoice, learning, parse_memory, slug
from sana_tune.config.schema import Config
from sana_tune.data.geometry import Size
from sana_tune.errors import Problem, UserError, gather
from sana_tune.fitting import Candidate, Tried, Wanted, choose, missing
from sana_tune.hardware import gpus
from sana_tune.memory import OVERHEAD_BYTES, TARGET_BATCH, Load, changed, default_config
from sana_tune.model import fetch
from sana_tune.model.facts import KNOWN, ModelFacts, assumed, check_size, estimated_bytes, from_folder, known
from sana_tune.prepare import drawing_sizes, encoded_at_once, facts_at_hand, model_bytes, on_disk, prompts_wanted
from sana_tune.prepare import vae_batch as encoded_by
from sana_tune.store import write_atomically

Say = Callable[[str], None]
STEPS = 2000  # of a config that is made from nothing
# What a run starts from that is made from nothing: as exact and as fast as there is, whatever it takes.
_UNLIMITED: Mapping[str, Any] = {
    "train_batch_size": TARGET_BATCH, "gradient_checkpointing": False, "weights_dtype": "fp32",
    "mixed_precision": "bf16", "optimizer": "optimi-adamw", "use_ema": True,
}  # fmt: skip


@dataclass(frozen=True)
class Asked:
    """The command line. tries: whether to try on the device; None = where there is a GPU. device: to try on."""

    vram: str | None = None
    config: str | None = None
    env: str | None = None
    model: str | None = None
    resolution: int | None = None
    output: str | None = None
    overwrite: bool = False
    tries: bool | None = None
    device: str = "auto"


@dataclass(frozen=True)
class Start:
    """Where the search starts: what is to fit, and the file that will hold it.

    content: of config.json as it is. path: where the result goes. also: further files, path → content.
    """

    wanted: Wanted
    content: Mapping[str, Any]
    path: Path
    also: Mapping[Path, Any]
    notes: tuple[str, ...] = ()
    is_new: bool = False


def fit_asked(asked: Asked, say: Say) -> int:
    """Search, tell, write and check. Answers the exit code; raises UserError with what is wrong, or missing."""
    problems: list[Problem] = []
    card = gather(problems, lambda: card_bytes(asked))
    start = gather(problems, lambda: start_of(asked, card or 0))
    if card is None or start is None:
        raise UserError(*problems)
    wanted = start.wanted
    in_the_way = [path for path in (start.path, *start.also) if os.path.lexists(path)]
    if asked.output is not None and in_the_way and not asked.overwrite:
        raise UserError(*map(_in_the_way, in_the_way))  # before minutes of trials
    for line in (*told(wanted), *start.notes):
        say(line)
    tries = bool(gpus()) if asked.tries is None else asked.tries
    if tries and wanted.facts.folder is None and known(wanted.facts.name) is None:
        tries = False
        say(f"Nothing is tried: what {wanted.facts.name} is made of is not known before it is downloaded")
    found = choose(wanted, trial_on(asked.device, wanted, say) if tries else None)
    if found.chosen is None:
        raise UserError(nothing_fits(wanted, missing(wanted), found.failed))
    for line in (*table(wanted, found.chosen), *costs_told(wanted, found)):
        say(line)
    if not found.chosen.changes and not start.is_new and asked.output is None:
        say("It fits as it is: nothing is changed, and nothing was written.")
        return 0
    if in_the_way and not asked.overwrite:
        raise UserError(*map(_in_the_way, in_the_way))
    content = merge_settings(start.content, found.chosen.changes)
    for path, what in {**start.also, start.path: content}.items():
        write_atomically(path, (json.dumps(what, ensure_ascii=False, indent=2, default=str) + "\n").encode("utf-8"))
        say(f"written: {path}")
    return _checked(start, say)


def _in_the_way(path: Path) -> Problem:
    fix = "replace it with --overwrite, or name another: --output PATH"
    return Problem(str(path), "the file is there already", fix)


def _checked(start: Start, say: Say) -> int:
    """Look the written files over, and say what comes next."""
    flag = f"--config {shlex.quote(str(start.path))}"
    if start.is_new:
        say(f"Put pictures with captions into datasets/pictures, then: sana_tune check {flag}")
        return 0
    loaded, notes = load_asked((), str(start.path))
    report = look_over(loaded, notes)
    if report.problems:
        raise UserError(*report.problems)
    say(f"sana_tune check accepts it. Next: sana_tune train {flag}")
    return 0


# ---- what is asked ----


def card_bytes(asked: Asked) -> int:
    """Memory of the card: as typed, else of the first GPU here. Raises UserError."""
    if asked.vram is None:
        found = gpus()
        if found:
            return found[0].total_bytes
        what = "no GPU is seen here, so that its memory must be given"
        raise UserError(Problem("--vram", what, "such as --vram 10, the GB of the card that will train"))
    target = parse_memory(asked.vram)
    if target is None:
        what = "fit is for the memory of GPUs; found cpu"
        raise UserError(Problem("--vram", what, "a CPU trains what main memory holds: see `sana_tune check`"))
    return target.total_bytes


def start_of(asked: Asked, card: int) -> Start:
    """A config that is there, or one made from nothing for --model. Raises UserError."""
    if asked.model is None:
        if asked.resolution is not None:
            what = "--resolution belongs to --model; with a config, the datasets say their sizes"
            raise UserError(Problem("--resolution", what, "leave it out, or name a --model instead of a config"))
        return _of_config(asked, card)
    if asked.config is not None or asked.env is not None:
        what = "--model makes a new config, and --config or --env names one that is there"
        raise UserError(Problem("--model", what, "keep one of them"))
    return _of_model(asked, asked.model, card)


def _of_config(asked: Asked, card: int) -> Start:
    cwd = Path.cwd()
    loaded, notes = load_asked((), asked.config, asked.env)
    read_from, _ = find_files(asked.config, asked.env, os.environ, cwd)
    if read_from is None:
        what = "the settings come from flags and environment alone"
        raise UserError(Problem("fit", what, "name a file: --config PATH, or a model: --model ID"))
    existing, config = read_existing(read_from, os.environ), loaded.config
    if str(config.model.model_type) != "full":
        what = f"fit is for full-rank training; found model_type {config.model.model_type}"
        raise UserError(Problem("model_type", what, "`sana_tune check` tells what an adapter takes"))
    report = look_over(loaded, notes)
    plan, name = report.plan, config.model.pretrained_model_name_or_path
    if plan is None or plan.memory is None:
        raise UserError(*report.problems)
    if not plan.memory.need.base_bytes:
        config = changed(config, {"regularisation_target": "data"})
    facts = facts_at_hand(config) or assumed(name)
    sizes = model_bytes(config, facts, on_disk(config))
    prompts = prompts_wanted(config)
    drawn = {*drawing_sizes(config, facts), *(tuple(size) for each in prompts.values() for size in each.sizes)}
    buckets = [(bucket, Size(bucket.width_px, bucket.height_px)) for bucket in (*plan.buckets, *plan.held_out)]
    wanted = Wanted(
        config,
        facts,
        tuple(dict.fromkeys(Load(each.width_px, each.height_px, each.batch_size) for each in plan.buckets)),
        tuple(dict.fromkeys(encoded_at_once(config, size, encoded_by(loaded, one.dataset)) for one, size in buckets)),
        tuple(sorted(drawn)) if prompts else (),
        card,
        sizes["text_encoder"],
        sizes["vae"],
        plan.memory.need.resident_bytes,
        _named_in(existing, "train_batch_size"),
        _named_in(existing, "vae_batch_size"),
    )
    own = [key for key in ("train_batch_size", "vae_batch_size") if _named_in(existing, key)]
    notes = tuple(f"{key} is left alone: a dataset has one of its own" for key in own)
    return Start(wanted, existing.config, _place(asked, read_from, card), {}, notes)


def _named_in(existing: Existing, key: str) -> bool:
    """Whether a dataset says this itself."""
    return any(canonical(name) == key for entry in existing.entries for name in entry)


def _place(asked: Asked, read_from: Path, card: int) -> Path:
    """Where the result goes: --output, else beside the config, under its name and the card's."""
    if asked.output is not None:
        return Path(asked.output)
    name = f"{read_from.stem}-{card / TYPED_BYTES:.3g}gb.json"
    whole = Path(os.path.abspath(read_from))
    return shown(whole.with_name(name), Path.cwd()) if whole.is_relative_to(Path.cwd()) else Path(name)


def _of_model(asked: Asked, name: str, card: int) -> Start:
    """A config from nothing: the model's own size, as exact as there is, with an average; less where it must be."""
    facts = _facts_of(name)
    side = asked.resolution or facts.native_px
    if problem := check_size(side, side, facts.vae_factor, "--resolution"):
        raise UserError(problem)
    exact = {} if facts.bf16_safe else {"mixed_precision": "no"}
    path = Path(asked.output or f"config/{slug(name.rpartition('/')[2])}-{card / TYPED_BYTES:.3g}gb/config.json")
    settings = {**_UNLIMITED, **exact, "resolution": side}
    choice = ModelChoice(name, facts)
    content, datasets = _new_files(choice, settings, path, side)
    rate = learning(choice, STEPS)
    config = changed(default_config(), {**settings, "learning_rate": rate["learning_rate"]})
    sizes = estimated_bytes(facts) if facts.folder is None else model_bytes(config, facts, facts.folder)
    load = Load(side, side, TARGET_BATCH)
    encoded = (encoded_at_once(config, Size(side, side), config.data.vae_batch_size),)
    wanted = Wanted(
        config, facts, (load,), encoded, ((side, side),), card, sizes["text_encoder"], sizes["vae"]
    )  # fmt: skip
    return Start(wanted, content, path, datasets, facts.notes, is_new=True)


def _facts_of(name: str) -> ModelFacts:
    """What is known of a model without a download. Raises UserError for what is none."""
    folder = fetch.local_folder(name)
    if folder is not None:
        return from_folder(fetch.locate(name), name)
    if (facts := known(name)) is not None:
        return facts
    guess = fetch.likely_meant(name)
    hint = f"did you mean {guess}? " if guess else ""
    what = f"nothing is known of {name!r} without its files"
    raise UserError(Problem("--model", what, f"{hint}name a folder in diffusers layout, nano, or {', '.join(KNOWN)}"))


def _new_files(
    choice: ModelChoice, settings: Mapping[str, Any], path: Path, side: int
) -> tuple[dict[str, Any], dict[Path, Any]]:
    """config.json whole, and a list of one dataset beside it."""
    cwd, datasets = Path.cwd(), path.with_name("multidatabackend.json")
    content: dict[str, Any] = {
        "$schema": schema_for("config", path, cwd),
        "model_type": "full",
        "model_family": "sana",
        "pretrained_model_name_or_path": choice.name,
        "data_backend_config": shown(datasets, cwd).as_posix(),
        "output_dir": f"output/{slug(choice.name.rpartition('/')[2])}",
        **settings,
        **learning(choice, STEPS),
        "max_train_steps": STEPS,
        "checkpoint_step_interval": 500,
        "checkpoints_total_limit": 2,
        "validation_prompt": CONTROL[1],
        "validation_resolution": f"{side}x{side}",
        "validation_step_interval": 500,
        "seed": 42,
    }
    pictures = {
        "id": "pictures", "type": "local", "instance_data_dir": "datasets/pictures", "caption_strategy": "textfile",
        "crop": False, "resolution": side, "resolution_type": "pixel_area", "repeats": 0,
    }  # fmt: skip
    texts = {"id": "text-embeds", "type": "local", "dataset_type": "text_embeds", "default": True}
    schema = schema_for("multidatabackend", datasets, cwd)
    return content, {datasets: {"$schema": schema, "datasets": [pictures, texts]}}


# ---- trying ----


def trial_on(device: str, wanted: Wanted, say: Say) -> Callable[[Candidate], Tried]:
    """Does steps of a candidate's largest micro-batch on the device, with random weights of the model's sizes."""

    def tried(one: Candidate) -> Tried:
        from sana_tune.bench import Asked as Measurement
        from sana_tune.bench import measure  # seconds of torch: only where something is tried
        from sana_tune.log import quiet_libraries

        quiet_libraries()
        config, load = changed(wanted.config, one.changes), one.largest
        facts, multiple = wanted.facts, max(32, wanted.facts.vae_factor)
        side = math.ceil(math.sqrt(load.width_px * load.height_px) / multiple) * multiple
        name = facts.name if known(facts.name) is not None or facts.folder is None else str(facts.folder)
        words, blocks = _as_measured(config)
        asked = Measurement(name, (load.batch_size,), ("eager",), (words,), (blocks,), side, steps=1, device=device)
        _, cases = measure(asked)
        found = next(iter(cases))
        result = _judged(found.problem, found.peak_bytes, found.step_s, wanted)
        say(f"tried: {words}, {load.batch_size} of {side}x{side} px: {_said(result)}")
        return result

    return tried


def _judged(problem: str, peak_bytes: int | None, step_s: float, wanted: Wanted) -> Tried:
    """What a measurement means for the card, which may be smaller than the device it was done on."""
    taken = None if peak_bytes is None else peak_bytes + OVERHEAD_BYTES
    if not problem and taken is not None and taken > wanted.card_bytes:
        problem = f"took {taken / 1e9:.1f} GB with CUDA's own, more than the card has"
    return Tried(problem, taken, step_s)


def _said(result: Tried) -> str:
    if result.problem:
        return result.problem
    took = "its memory is not counted here" if result.peak_bytes is None else f"{result.peak_bytes / 1e9:.1f} GB"
    return f"it goes, {took}, {result.step_s:.3g} s a step"


def _as_measured(config: Config) -> tuple[str, str]:
    """The settings in the words of `sana_tune bench`: the optimizer with what belongs to it, the blocks."""
    wanted, model = config.optimizer, config.model
    clipped = wanted.max_grad_norm > 0 and wanted.grad_clip_method == "norm"
    words = [wanted.optimizer, *["bf16"] * (model.weights_dtype == "bf16")]
    if wanted.optimizer_release_gradients:
        words += ["release", *["clip"] * clipped]
    if config.ema.use_ema:
        words.append("ema_cpu" if config.ema.is_on_cpu else "ema")
    if not model.gradient_checkpointing:
        return ":".join(words), "0"
    kind = "selective" if model.gradient_checkpointing_backend == "selective" else ""
    return ":".join(words), f"{kind}{model.gradient_checkpointing_interval}"
