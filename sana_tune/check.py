"""A whole run looked over without torch: all that is wrong, and all that will happen.

The network is used for pictures that are far away alone: headers of a bucket's, and downloads that training needs too.
It reuses the parts of `prepare`, but goes on where that stops: problems are gathered, not raised. It hashes no weights
and reads no picture whole unless asked to, and writes nothing but what it remembers of files, below output_dir/cache.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from sana_tune.config.datasets import ImageDataset
from sana_tune.config.load import Loaded
from sana_tune.config.schema import SECTIONS, Config
from sana_tune.config.secrets import MASK, masked
from sana_tune.data.buckets import make_buckets
from sana_tune.data.duplicates import Looked, Picture, look_at_all
from sana_tune.data.memory import FileMemory
from sana_tune.data.quality import Captions, Shapes, has_placeholder, is_short, look_at_captions, look_at_shapes
from sana_tune.data.records import Keys, Record, Role
from sana_tune.data.stores import open_stores
from sana_tune.data.survey import Ledger, Survey, strict_problems
from sana_tune.errors import Problem, gather
from sana_tune.hardware import Device, device_for
from sana_tune.log import log
from sana_tune.memory import MemoryPlan
from sana_tune.model import fetch
from sana_tune.model.facts import ModelFacts, assumed, estimated_bytes, from_folder, known
from sana_tune.model.identity import is_remembered
from sana_tune.model.instruction import resolve_instruction
from sana_tune.model.tokens import TOKENIZER, TokenCounter
from sana_tune.output import Output
from sana_tune.plan import Plan, human_bytes, memory_warnings
from sana_tune.prepare import (
    cache_needs,
    check_adapter,
    check_decoder,
    check_drawing_sizes,
    check_gpus,
    check_quantisation,
    existing,
    finished,
    keys_of,
    needed_captions,
    no_room,
    on_disk,
    prompts_wanted,
    resumed,
    run_plan,
    scorer_at_hand,
    shared_out,
    survey_of,
    texts_of,
    weights_dtype,
)
from sana_tune.prompts import Prompt
from sana_tune.roles import held_out_copies, held_out_warning
from sana_tune.store import Store
from sana_tune.train.folders import Checkpoint
from sana_tune.watch.ready import watch_problems

# What is being looked at, how much of it is done, and how much there is.
Progress = Callable[[str, int, int], None]
DEFAULT = "default"  # the origin of a value that nobody gave


@dataclass(frozen=True)
class Setting:
    """A setting that differs from its default. value and default are plain and may be shown: secrets are masked."""

    key: str
    value: Any
    default: Any
    origin: str


@dataclass(frozen=True)
class Model:
    """The model as far as it is known here. folder: None = not on this machine, and fetch_bytes is what to download.

    assumed: nothing is known of it; the plan is that of the 1.6B model.
    """

    name: str
    folder: str | None
    fetch_bytes: int
    assumed: bool
    licence: str


@dataclass(frozen=True)
class Dataset:
    """What was found in one dataset. settings: `own_settings`."""

    id: str
    folder: str
    settings: Mapping[str, Any]
    captions: Captions
    shapes: Shapes


@dataclass(frozen=True)
class Report:
    """What a check found. plan and ledger: None when a problem stands in their way. images: only when asked for.

    left_out: paths of the pictures that no dataset trains, whatever the reason.
    """

    problems: tuple[Problem, ...] = ()
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    config: str = ""
    output: str = ""
    settings: tuple[Setting, ...] = ()
    model: Model | None = None
    datasets: tuple[Dataset, ...] = ()
    images: Looked | None = None
    plan: Plan | None = None
    ledger: Ledger | None = None
    left_out: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """Plain values under stable keys.

        ok: bool. problems: [{where, what, fix}]. warnings, notes: [text]. config, output: paths.
        settings: [{key, value, default, origin}]. model: {name, folder, fetch_bytes, assumed, licence} or null.
        datasets: [{id, folder, settings, captions: {variants, empty, missing, repeated, too_long, placeholder, …},
        shapes: {enlarged, largest_factor, extreme, cropped, …}}].
        images: null without --images, else {pictures, broken: {name: reason}, same: [[name]], alike: [[name]]}.
        plan: what plan.json of a run holds (buckets, caches, steps, disk, memory, step_s, left_s …) or null.
        ledger: what ledger.json holds, or null. left_out: [path]. seconds: how long the check took.
        """
        return {
            "ok": self.ok,
            **asdict(self),
            "plan": self.plan and self.plan.to_json(),
            "ledger": self.ledger and self.ledger.to_json(),
        }


@dataclass
class _Findings:
    """What is gathered on the way."""

    problems: list[Problem] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def _without_broken(
    loaded: Loaded,
    facts: ModelFacts,
    memory: FileMemory,
    stores: Mapping[str, Store],
    surveyed: Survey,
    looked: Any,
    found: _Findings,
) -> Survey:
    """The survey less the pictures that cannot be read whole, which are problems with `strict`."""
    if any(record.content_hash is None for record in surveyed.records):  # their hashes are known now
        surveyed = survey_of(loaded, facts, memory, stores, headers_only=True)
    if loaded.config.data.strict:
        found.problems += strict_problems(loaded.datasets, surveyed.records, looked.broken)
    return surveyed.without(looked.broken)


def look_over(
    loaded: Loaded, notes: Sequence[str] = (), *, images: bool = False, report: Progress | None = None
) -> Report:
    """Look over a whole run. notes: told before the config was read. images: read and compare every picture whole."""
    begun, config = time.monotonic(), loaded.config
    aside = ThreadPoolExecutor(1)
    device = aside.submit(device_for, config.train.device)  # nvidia-smi can take a second
    aside.shutdown(wait=False)
    found = _Findings(notes=[*notes, *loaded.notes])
    stores = open_stores(loaded.datasets)
    output = _output(config, found)
    writable = not found.problems
    found.problems += watch_problems(config.watch)
    with _told_to(found.warnings):
        checkpoint = gather(found.problems, lambda: resumed(config, output))
        loaded = gather(found.problems, lambda: shared_out(loaded, checkpoint)) or loaded
        config = loaded.config
        for look in (check_gpus, scorer_at_hand):
            gather(found.problems, partial(look, config))
        drawn = gather(found.problems, lambda: prompts_wanted(config)) or {}
        model, facts = _model(config, found)
        _fits_the_model(config, facts, drawn, device.result(), found)
        memory = FileMemory(output.file_memory if writable else None)
        surveyed = gather(
            found.problems, lambda: survey_of(loaded, facts, memory, stores, headers_only=True, report=report)
        )
    looked, datasets, plan = None, (), None
    if surveyed is not None:
        found.problems += surveyed.problems
        if images and surveyed.records:
            looked = _whole_pictures(stores, surveyed, memory, report, found)
            surveyed = _without_broken(loaded, facts, memory, stores, surveyed, looked, found)
        _held_out(surveyed, looked, found)
        long = _too_long(config, model, output if writable else None, surveyed, texts_of(drawn), found)
        datasets = _datasets(loaded, surveyed, long)
        if model is not None and surveyed.records:
            plan = gather(
                found.problems,
                lambda: _plan(loaded, output, model, facts, surveyed, drawn, checkpoint, device.result()),
            )
        _doubts(config, texts_of(drawn), datasets, long, found)
    if plan is not None:
        _of_the_plan(config, output, plan, checkpoint, found)
    return Report(
        problems=tuple(dict.fromkeys(found.problems)),
        warnings=tuple(dict.fromkeys(found.warnings)),
        notes=tuple(dict.fromkeys((*found.notes, *(plan.notes if plan else ())))),
        config=str(loaded.path or ""),
        output=config.train.output_dir,
        settings=settings_changed(loaded),
        model=model,
        datasets=datasets,
        images=looked,
        plan=plan,
        ledger=surveyed and surveyed.ledger,
        left_out=_left_out(stores, surveyed) if surveyed is not None else (),
        seconds=round(time.monotonic() - begun, 3),
    )


def _output(config: Config, found: _Findings) -> Output:
    """The folder of the run, which is not made. A problem when it, or the place for it, cannot be written."""
    root = Path(config.train.output_dir)
    reason, usable = None, root
    try:
        root.lstat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:  # no path at all: the rest goes on with one where nothing is
        reason, usable = error.strerror if isinstance(error, OSError) else error, Path(os.devnull) / "nothing"
    place = existing(usable)
    if reason is None and not place.is_dir():
        reason = f"{place} is not a folder"
    if reason is None and not os.access(place, os.W_OK | os.X_OK):
        reason = f"permission denied for {place}"
    if reason is not None:
        what = f"output_dir must be a folder that can be written: {reason}"
        found.problems.append(Problem(str(root), what, "name another one with --output_dir PATH"))
    return Output(usable)


@contextmanager
def _told_to(lines: list[str]) -> Iterator[None]:
    """The package's warnings go to `lines` in here, and nowhere else."""
    kept, propagated = list(log.handlers), log.propagate

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    log.handlers, log.propagate = [Lines(logging.WARNING)], False
    try:
        yield
    finally:
        log.handlers, log.propagate = kept, propagated


# ---- the settings and the model ----


def settings_changed(loaded: Loaded) -> tuple[Setting, ...]:
    """The settings of config.json, flags and environment that differ from the defaults, in the schema's order."""
    found = []
    for section, kind in SECTIONS.items():
        values = dict(vars(loaded.config)[section])
        for key, info in kind.model_fields.items():
            default = None if info.is_required() else info.default
            if loaded.origins.get(key, DEFAULT) == DEFAULT or values[key] == default:
                continue
            value = MASK if key in loaded.secret else masked(key, _plain(values[key]))
            found.append(Setting(key, value, _plain(default), loaded.origins[key]))
    return tuple(found)


def _plain(value: Any) -> Any:
    """A setting as JSON would hold it; sizes as the text they are written as."""
    if isinstance(value, tuple):
        named = all(hasattr(part, "_fields") for part in value)
        return ",".join(map(str, value)) if named else list(value)
    return value


def _model(config: Config, found: _Findings) -> tuple[Model | None, ModelFacts]:
    """The model and its facts. None, and the 1.6B model's facts to go on with, when something is wrong with it."""
    name, problems = config.model.pretrained_model_name_or_path, len(found.problems)
    folder = gather(found.problems, lambda: on_disk(config))
    if len(found.problems) > problems:
        return None, known(name) or assumed(name)
    if folder is not None:
        facts = gather(found.problems, lambda: from_folder(folder, name))
        return (None, assumed(name)) if facts is None else (_known_model(facts, folder, 0), facts)
    facts = known(name) or assumed(name)
    bytes_ = sum(estimated_bytes(facts, weights_dtype(config)).values())
    guess = fetch.likely_meant(name)
    hint = f"; did you mean {guess}?" if guess else ""
    found.notes.append(f"{name} is not on this machine: about {human_bytes(bytes_)} will be downloaded{hint}")
    if known(name) is None:
        found.notes += facts.notes
    if fetch.is_offline():
        found.warnings.append(f"offline mode is on (HF_HUB_OFFLINE): {name} cannot be downloaded with it")
    return _known_model(facts, None, bytes_), facts


def _fits_the_model(
    config: Config, facts: ModelFacts, drawn: Mapping[str, Prompt], device: Device | None, found: _Findings
) -> None:
    """Look at what the model and the device decide."""
    gather(found.problems, lambda: check_drawing_sizes(config, facts, drawn))
    gather(found.problems, lambda: check_decoder(config, facts))
    gather(found.problems, lambda: check_adapter(config, facts))
    gather(found.problems, lambda: check_quantisation(config, device))


def _known_model(facts: ModelFacts, folder: Path | None, fetch_bytes: int) -> Model:
    is_assumed = folder is None and known(facts.name) is None
    return Model(facts.name, folder and str(folder), fetch_bytes, is_assumed, facts.licence)


# ---- pictures and captions ----


def _left_out(stores: Mapping[str, Store], surveyed: Survey) -> tuple[str, ...]:
    """The paths, or addresses, of all pictures that are left out, each once; none that another dataset trains."""
    parts = surveyed.ledger.datasets
    paths = dict.fromkeys(stores[part.dataset].locate(key) for part in parts for key, _ in part.left_out)
    trained = {stores[record.dataset].locate(record.key) for record in surveyed.records} if paths else set()
    return tuple(path for path in paths if path not in trained)


def _whole_pictures(
    stores: Mapping[str, Store], surveyed: Survey, memory: FileMemory, report: Progress | None, found: _Findings
) -> Looked:
    """Every picture read whole. What is doubtful goes to the warnings."""
    pictures = [Picture(record.id, stores[record.dataset], record.key) for record in surveyed.records]

    def tell(done: int, total: int) -> None:
        if report is not None:
            report("Reading pictures", done, total)

    looked = look_at_all(pictures, memory, tell)
    if looked.broken:
        reasons = [f"{name} {reason}" for name, reason in looked.broken.items()]
        found.warnings.append(f"{_pictures(len(reasons))} cannot be decoded, to be left out: {_few(reasons)}")
    for title, groups, sign in (
        ("of the same bytes as another", looked.same, " = "),
        ("of the same looks as another", looked.alike, " ≈ "),
    ):
        if groups:
            names = _few([sign.join(group[:_NAMES]) + (" …" if len(group) > _NAMES else "") for group in groups])
            copies = sum(len(group) - 1 for group in groups)
            found.warnings.append(f"{_pictures(copies)} {title}: {names}")
    if len(looked.broken) == len(surveyed.records):
        found.problems.append(Problem("datasets", "not one of the pictures can be decoded", "see the reasons above"))
    return looked


def _held_out(surveyed: Survey, looked: Looked | None, found: _Findings) -> None:
    """Held-out pictures that are trained too: the same files, and with --images those that look the same."""
    found.warnings += held_out_copies(surveyed.records)
    roles = {record.id: record.role for record in surveyed.records}
    if Role.EVAL not in roles.values():
        return
    pairs = []
    for group in looked.alike if looked is not None else ():
        taught = [name for name in group if roles.get(name, Role.EVAL) is not Role.EVAL]
        pairs += [(name, taught[0]) for name in group if taught and roles.get(name) is Role.EVAL]
    found.warnings += held_out_warning(pairs, "much like")
    if any(record.content_hash is None for record in surveyed.records):
        found.notes.append(
            "held-out pictures that were not read yet are compared with the trained ones when the run starts, or now "
            "with --images, which finds those that only look the same too"
        )


def _too_long(
    config: Config,
    model: Model | None,
    output: Output | None,
    surveyed: Survey,
    prompts: Mapping[str, str],
    found: _Findings,
) -> frozenset[str] | None:
    """The captions and prompts that are cut; None when the tokenizer is not here. Counts are remembered in `output`."""
    if model is None or model.folder is None or not (Path(model.folder) / TOKENIZER).is_file():
        return None
    memory = None if output is None else output.file_memory.with_name("token_counts.json")
    instruction = resolve_instruction(config.model.sana_complex_human_instruction)
    counter = TokenCounter(Path(model.folder) / TOKENIZER, instruction, memory)
    cut = counter.too_long(needed_captions(surveyed, prompts))
    gather(found.problems, counter.save)
    return frozenset(cut)


def _datasets(loaded: Loaded, surveyed: Survey, too_long: frozenset[str] | None) -> tuple[Dataset, ...]:
    """What there is to say of each dataset."""
    by_dataset: dict[str, list[Record]] = {}
    for record in surveyed.records:
        by_dataset.setdefault(record.dataset, []).append(record)
    entries = {entry.id: entry for entry in loaded.datasets}
    datasets = []
    for ledger in surveyed.ledger.datasets:
        entry, records = entries[ledger.dataset], by_dataset.get(ledger.dataset, [])
        differ = entry.caption_strategy != "instanceprompt" and not entry.only_instance_prompt
        captions = look_at_captions(records, ledger, too_long, differ=differ)
        datasets.append(
            Dataset(entry.id, entry.source, own_settings(loaded.config, entry), captions, look_at_shapes(records))
        )
    return tuple(datasets)


def own_settings(config: Config, dataset: ImageDataset) -> dict[str, Any]:
    """The settings of a dataset that are neither the defaults nor what config.json says for all of them.

    Where it is stands elsewhere.
    """
    general = dict(config.data)
    found = {}
    for key, info in type(dataset).model_fields.items():
        value = dict(dataset)[key]
        if not info.is_required() and key != "instance_data_dir" and value != general.get(key, info.default):
            found[key] = masked(key, _plain(value))
    return found


def _doubts(
    config: Config,
    prompts: Mapping[str, str],
    datasets: Sequence[Dataset],
    too_long: frozenset[str] | None,
    found: _Findings,
) -> None:
    """Warnings of what can be trained and drawn, but is hardly meant."""
    for dataset in datasets:
        found.warnings += [f"dataset {dataset.id}: {text}" for text in _doubts_of(dataset)]
    marked = [name for name, text in prompts.items() if has_placeholder(name) or has_placeholder(text)]
    if marked:
        found.warnings.append(f"prompts still hold a placeholder for the subject: {_few(marked)}; put its name there")
    short = [f"{name} ({text!r})" for name, text in prompts.items() if text and is_short(text)]
    if short:
        found.warnings.append(f"prompts of a few words look bad with Sana: {_few(short)}; describe the picture")
    cut = [name for name, text in prompts.items() if too_long and text in too_long]
    if cut:
        found.warnings.append(f"prompts are longer than 300 tokens and are cut: {_few(cut)}")


def _doubts_of(dataset: Dataset) -> Iterator[str]:
    captions, shapes = dataset.captions, dataset.shapes
    if captions.placeholder:
        what = "with a placeholder for the subject in the caption"
        yield f"{_pictures(captions.placeholder)} {what} ({_few(captions.names_placeholder, captions.placeholder)})"
    if captions.too_long:
        names = _few(captions.names_too_long, captions.too_long)
        yield f"{_pictures(captions.too_long)} with a caption over 300 tokens, whose end is cut ({names})"
    if captions.empty:
        yield f"{_pictures(captions.empty)} trained without a caption"
    if shapes.enlarged:
        yield (
            f"{_pictures(shapes.enlarged)} enlarged to the size of training, up to {shapes.largest_factor:.2f} times "
            f"({_few(shapes.names_enlarged, shapes.enlarged)}); max_upscale_threshold leaves such out"
        )
    if shapes.extreme:
        names = _few(shapes.names_extreme, shapes.extreme)
        yield f"{_pictures(shapes.extreme)} wider than 4:1 or narrower than 1:4, which Sana never saw ({names})"
    if shapes.cropped:
        yield f"{_pictures(shapes.cropped)} cropped to less than half"


_NAMES = 3


def _pictures(count: int) -> str:
    return f"{count:,} picture{'s' * (count != 1)}"


def _few(names: Sequence[str], count: int | None = None) -> str:
    """The first names, and how many more there are of `count`."""
    count = len(names) if count is None else count
    more = f" and {count - _NAMES} more" if count > _NAMES else ""
    return "; ".join(names[:_NAMES]) + more


# ---- the plan ----


def _plan(
    loaded: Loaded,
    output: Output,
    model: Model,
    facts: ModelFacts,
    surveyed: Survey,
    prompts: Mapping[str, Prompt],
    checkpoint: Checkpoint | None,
    device: Device | None,
) -> Plan:
    """The plan of `train`, as far as it can be known without hashing weights."""
    folder = None if model.folder is None else Path(model.folder)
    keys = _keys(loaded.config, folder, output)
    buckets = make_buckets(surveyed.records, loaded.datasets)
    caches = cache_needs(loaded, output, facts, surveyed, texts_of(prompts), keys)
    return run_plan(loaded, output, facts, folder, buckets, caches, checkpoint, (), device, prompts)


def _keys(config: Config, folder: Path | None, output: Output) -> Keys | None:
    """The cache keys, where the hashes of the model's files are remembered."""
    if folder is None:
        return None
    parts = {"vae": config.model.variant, "text_encoder": config.model.variant, "tokenizer": None}
    if not all(is_remembered(folder, part, output.hash_memory, variant=variant) for part, variant in parts.items()):
        return None
    return keys_of(config, folder, output)[0]


def _of_the_plan(config: Config, output: Output, plan: Plan, checkpoint: Checkpoint | None, found: _Findings) -> None:
    """What the plan's numbers show to be wrong, doubtful or worth a note."""
    if (problem := no_room(output, plan)) is not None:
        found.problems.append(problem)
    if plan.memory is not None:
        found.warnings += memory_warnings(plan.memory)
        found.warnings += _device_warnings(config, plan.memory)
    warmup, steps = config.optimizer.lr_warmup_steps, plan.total_steps
    if warmup >= steps:
        reached = config.optimizer.learning_rate * min(1.0, steps / warmup)
        found.warnings.append(
            f"lr_warmup_steps {warmup} is as long as the run ({steps} steps): the learning rate gets to {reached:.2g} "
            f"of {config.optimizer.learning_rate:g}"
        )
    if checkpoint is not None:
        done = "is finished: raise max_train_steps to go on, or begin anew with --restart"
        where = done if finished(output, plan, checkpoint) else f"goes on from step {plan.first_step}"
        found.notes.append(f"the run in {output.root} {where}")
    intervals = {"checkpoint_step_interval": plan.save_every.steps}
    if not config.validation.validation_disable:
        intervals["validation_step_interval"] = plan.validate_every.steps
    longer = [f"{name} {every}" for name, every in intervals.items() if every > steps]
    if longer:
        verb = "is" if len(longer) == 1 else "are"
        found.notes.append(f"{' and '.join(longer)} {verb} longer than the run ({steps} steps): it is done at the end")


def _device_warnings(config: Config, memory: MemoryPlan) -> list[str]:
    device, need = memory.device, memory.need.total_bytes
    if device is None:
        return [f"device {config.train.device}: none was found here, so its memory is not known"]
    if device.free_bytes < need <= device.total_bytes:
        free = human_bytes(device.free_bytes)
        return [f"{device.name}: {free} are free now, other programs use the rest; training takes {human_bytes(need)}"]
    return []
