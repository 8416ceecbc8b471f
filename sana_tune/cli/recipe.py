"""From a few answers to settings: the defaults that are offered, what is recommended and why, the files. Pure.

The wizard asks, this decides. Nothing here reads or writes a file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from sana_tune import memory
from sana_tune.cli import lokr
from sana_tune.cli.scan import Scan
from sana_tune.config.schema import section_of
from sana_tune.errors import Problem, UserError
from sana_tune.memory import Load
from sana_tune.model.facts import KNOWN, ModelFacts, known

NANO = "nano"
TINY_PARAMETERS = 50_000_000  # below, a CPU trains a model in minutes, and learning rates are others
VISITS = 100  # of each picture that a default length gives a small set
FEWEST_IMAGES, MOST_IMAGES = 2000, 40_000  # that a default length shows the model
TINY_IMAGES = 2400  # the same for a tiny model: half a minute on two cores
TINY_BATCH = 8
TYPED_BYTES = 1_000_000_000  # a GB, as everywhere in this program
ASSUMED_GB = 24.0  # where there is no GPU to ask
SHORT_WORDS, SHORT_LETTERS = 5, 10  # a prompt below draws badly; letters are those of scripts without blanks
LARGEST_RESOLUTION_PX = 8192
FIRST_CHOICE = "Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers"
STRATEGIES = ("textfile", "filename", "instanceprompt")
TRACKERS = ("none", "wandb", "tensorboard")
SCENE = ", outdoors in soft evening light, in front of a blurred garden"
# A prompt that has nothing to do with the pictures shows whether the model forgets what it knew.
CONTROL = ("control", "a mountain lake at dawn with fog over the water and pine trees on the shore, high detail")
TINY_CONTROL = ("control", "a red star on a blue background")


@dataclass(frozen=True)
class ModelChoice:
    """A model as it is named in the file. assumed: nothing is known of it yet, and 1.6B facts stand in."""

    name: str
    facts: ModelFacts
    assumed: bool = False

    @property
    def is_tiny(self) -> bool:
        """Whether a CPU can train it."""
        return self.facts.parameters < TINY_PARAMETERS


@dataclass(frozen=True)
class Target:
    """What will train: its memory in bytes, a GPU's or the machine's own. beside_gpu: a CPU though there is a GPU."""

    total_bytes: int
    on_cpu: bool = False
    beside_gpu: bool = False

    def __str__(self) -> str:
        amount = f"{self.total_bytes / TYPED_BYTES:.3g} GB"
        return f"a CPU with {amount} of memory" if self.on_cpu else f"a GPU with {amount}"


@dataclass(frozen=True)
class Length:
    """How long to train: steps, or passes over the pictures."""

    steps: int | None = None
    epochs: float | None = None

    def __str__(self) -> str:
        return f"{self.steps}" if self.steps is not None else f"{self.epochs:g} epoch{'s' * (self.epochs != 1)}"


@dataclass(frozen=True)
class Answers:
    """All that was answered.

    subject: the caption of instanceprompt, several as a list; None for other strategies. adapter: full or lokr.
    """

    model: ModelChoice
    pictures: Scan
    captions: str
    subject: str | tuple[str, ...] | None
    target: Target
    resolutions: tuple[int, ...]
    length: Length
    prompt: str
    tracking: str
    output: str
    adapter: str = "full"


# ---- what is offered ----


def offered_models() -> tuple[str, ...]:
    """Models to choose from, the usual ones first: those that train in bf16, the small ones, and nano."""
    found = [name for name, entry in KNOWN.items() if entry.bf16_safe or _facts(name).parameters < 1e9]

    def place(name: str) -> tuple[Any, ...]:
        facts = _facts(name)
        return (name != FIRST_CHOICE, facts.native_px != 1024, facts.parameters > 2e9, -facts.parameters, name)

    return (*sorted(found, key=place), NANO)


def _facts(name: str) -> ModelFacts:
    facts = known(name)
    if facts is None:
        raise KeyError(name)
    return facts


def assumed(name: str) -> ModelChoice:
    """A hub model of which nothing is known before it is downloaded."""
    return ModelChoice(name, _facts(FIRST_CHOICE), assumed=True)


def least_bytes(facts: ModelFacts) -> int:
    """The smallest device that trains a model whole at its own size: every block recomputed, one picture at a time."""
    smallest: dict[str, Any] = {"gradient_checkpointing": True, "use_ema": False, "optimizer": "optimi-adamw"}
    if facts.bf16_safe:
        smallest |= {"weights_dtype": "bf16", "optimizer": "bnb-adamw8bit", "optimizer_release_gradients": True}
    else:
        smallest |= {"mixed_precision": "no"}
    config = memory.changed(memory.default_config(), smallest)
    need = memory.memory_needed(config, facts, [Load(facts.native_px, facts.native_px, 1)])
    return math.ceil(need.total_bytes / (1 - memory.SPARE)) + 1


def default_model(target: Target) -> str:
    """The first of the models that fits, nano where none does (and on a CPU)."""
    fitting = (
        name for name in offered_models()[:-1] if not target.on_cpu and least_bytes(_facts(name)) <= target.total_bytes
    )
    return next(fitting, NANO)


def default_captions(scan: Scan) -> str:
    """Where the captions are, by what was found."""
    if scan.with_text * 2 >= scan.pictures:
        return "textfile"
    return "filename" if scan.with_name * 5 >= scan.pictures * 4 else "instanceprompt"


def default_subject(scan: Scan) -> str:
    """One caption for all, from the name of the folder where that says something."""
    generic = {*("pictures", "images", "photos", "dataset", "datasets", "data", "train", "training", "img", "imgs")}
    words = re.sub(r"[-_.\s]+", " ", PurePath(scan.folder).name).strip()
    return f"a photo of {words}" if words and words.lower() not in generic else "a photo of my subject"


def default_resolution(facts: ModelFacts, scan: Scan) -> int:
    """The model's own size, or a half or three quarters of it where most pictures are smaller."""
    native = facts.native_px
    edge = math.sqrt(scan.median.area)
    steps = [round(native * share / facts.vae_factor) * facts.vae_factor for share in (1, 0.75, 0.5)]
    return next((step for step in steps if step <= edge * 1.1), steps[-1])


def usable(scan: Scan, strategy: str) -> int:
    """Pictures that will be trained: those that can be read and, with textfile, have a caption file."""
    captioned = scan.with_text if strategy == "textfile" else scan.pictures
    return max(1, captioned - len(scan.broken))


def default_length(pictures: int, model: ModelChoice, settings: Mapping[str, Any]) -> Length:
    """About a hundred looks at each picture of a small set, fewer of a large one, at least one of each."""
    images = max(pictures, min(max(VISITS * pictures, FEWEST_IMAGES), MOST_IMAGES))
    images = TINY_IMAGES if model.is_tiny and pictures < TINY_IMAGES else images
    return Length(steps=max(10, rounded(images / batch_of(settings))))


def default_prompt(answers: Mapping[str, Any]) -> str:
    """What the pictures are called: the subject, in a new place where the model knows places; else a caption.

    answers: model, pictures, captions, and subject where there is one.
    """
    scan, subject = answers["pictures"], answers.get("subject")
    scene = "" if answers["model"].is_tiny else SCENE
    if subject:
        return (subject if isinstance(subject, str) else subject[0]) + scene
    found = captions_found(scan, answers["captions"])
    return found[0] if found else default_subject(scan) + scene


def captions_found(scan: Scan, strategy: str) -> tuple[str, ...]:
    """Captions of the pictures, as examples of how they are written."""
    return {"textfile": scan.texts, "filename": scan.names}.get(strategy, ())


def default_output(scan: Scan) -> str:
    """A folder of its own below output/, named after the pictures'."""
    return f"output/{slug(PurePath(scan.folder).name)}"


def slug(name: str) -> str:
    """A name that is safe in any file system; letters of every script stay."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-._").lower() or "pictures"


def rounded(number: float) -> int:
    """A number with two digits that count: 1234 → 1200."""
    if number < 10:
        return max(1, round(number))
    unit = 10 ** (int(math.log10(number)) - 1)
    return round(number / unit) * unit


# ---- what is understood ----


def parse_resolutions(text: str, facts: ModelFacts) -> tuple[int, ...]:
    """ "1024, 512" → (1024, 512). Raises UserError for what is no size."""
    found: list[int] = []
    for part in (part.strip() for part in text.replace("、", ",").replace("，", ",").split(",")):
        digits = part.lower().removesuffix("px").strip()
        smallest = 2 * facts.vae_factor
        if not digits.isdecimal() or not smallest <= int(digits) <= LARGEST_RESOLUTION_PX:
            what = f"a resolution is a whole number of px from {smallest} to {LARGEST_RESOLUTION_PX}; found {part!r}"
            fix = f"write one, or several with commas: {facts.native_px},{facts.native_px // 2}"
            raise UserError(Problem("--resolution", what, fix))
        if int(digits) not in found:
            found.append(int(digits))
    return tuple(found)


def parse_length(text: str) -> Length:
    """ "500" or "500 steps" → steps; "20 epochs" → epochs. Raises UserError for what is neither."""
    match = re.fullmatch(r"(\d[\d_,]*|\d*\.\d+)\s*(steps?|s|epochs?|e)?", text.strip().lower())
    number = float(match[1].replace(",", "").replace("_", "")) if match else 0.0
    in_epochs = bool(match and match[2] and match[2].startswith("e"))
    if number <= 0 or (not in_epochs and number != int(number)):
        what = f"a length is a number of steps, or of epochs; found {text!r}"
        raise UserError(Problem("--steps", what, 'write 500, or "20 epochs"'))
    return Length(epochs=number) if in_epochs else Length(steps=int(number))


def parse_memory(text: str) -> Target | None:
    """ "24", "24 GB" → a GPU; "cpu" → None. Raises UserError for what is neither."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:g|gb|gib)?", text.strip().lower())
    if text.strip().lower() == "cpu":
        return None
    if match is None or not 1 <= float(match[1]) <= 2000:
        what = f"the memory of a GPU is a number of GB, such as 24; found {text!r}"
        raise UserError(Problem("--vram", what, "write the GB of the GPU that will train, or cpu"))
    return Target(round(float(match[1]) * TYPED_BYTES))


def is_short(prompt: str) -> bool:
    """Whether Sana is likely to draw a prompt badly for being short."""
    without_blanks = len(re.findall(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\u0e00-\u0e7f]", prompt))
    return len(prompt.split()) < SHORT_WORDS and without_blanks < SHORT_LETTERS


# ---- what is recommended ----


def recommended(
    model: ModelChoice, target: Target, resolutions: Sequence[int], pictures: int, adapter: str = "full"
) -> dict[str, Any]:
    """Batch, checkpointing, precision, optimizer and EMA. Raises UserError when the model does not fit.

    resolutions: px. pictures: how many there are; a batch is not larger. adapter: full, or lokr, whose settings begin
    with the model_type.
    """
    facts, side = model.facts, max(resolutions)
    exact = target.on_cpu or not facts.bf16_safe
    if adapter == "lokr":
        settings = lokr.recommend(facts, target.total_bytes, side, on_cpu=target.on_cpu)
    else:
        settings = memory.recommend(facts, target.total_bytes, side, side, use_ema=True, on_cpu=exact)
    if model.is_tiny and side <= 4 * facts.native_px:
        batch = max(size for size in (1, 2, 4, TINY_BATCH) if size <= max(1, pictures))
        own = {"train_batch_size": batch, "gradient_accumulation_steps": 1, "gradient_checkpointing": False}
        dtype = {} if adapter == "lokr" else {"weights_dtype": "fp32"}
        return {**settings, **own, "mixed_precision": "no", **dtype}
    if adapter == "lokr" and not target.on_cpu:
        settings |= lokr.while_caching(facts, target.total_bytes, side)
    fewer = max(size for size in (1, 2, 4) if size <= max(1, pictures))
    return {**settings, "train_batch_size": min(settings["train_batch_size"], fewer)}


def estimated_bytes(settings: Mapping[str, Any], facts: ModelFacts, resolutions: Sequence[int]) -> int:
    """What training takes on the device with these settings."""
    homes = section_of()
    config = memory.changed(memory.default_config(), {key: value for key, value in settings.items() if key in homes})
    loads = [Load(side, side, settings["train_batch_size"]) for side in resolutions]
    return memory.memory_needed(config, facts, loads, adapter=lokr.FILE).total_bytes


RELEASED = "gradients: each is used and freed at once, since all of them do not fit; clipping takes a second pass"


def reasons(settings: Mapping[str, Any]) -> list[str]:
    """The recommended settings in words, a line each."""
    batch, accumulation = settings["train_batch_size"], settings["gradient_accumulation_steps"]
    several = f", {accumulation} times before each update" if accumulation > 1 else ""
    interval = settings["gradient_checkpointing_interval"]
    if not settings["gradient_checkpointing"]:
        blocks = "no block is recomputed: there is room, and it is fastest"
    elif interval == 1:
        blocks = "every block is recomputed in the backward pass, which saves the most memory"
    else:
        blocks = f"every {interval}. block is recomputed: there is room for the others"
    if settings.get("model_type") == "lora":
        precision = lokr.precision_in_words(settings)
    elif settings["weights_dtype"] == "bf16":
        kept = "what rounding loses is kept aside (Kahan)"
        if not settings["optimizer"].startswith("optimi"):
            kept = "rounded so that small changes add up (stochastic rounding)"
        precision = f"weights in bf16, {kept}: fp32 masters do not fit"
    elif settings["mixed_precision"] == "bf16":
        precision = "fp32 master weights, computed in bf16: the most exact that is fast"
    else:
        precision = "everything in fp32"
    average = "an average of the weights (EMA) is kept" if settings["use_ema"] else "no average (EMA): it does not fit"
    return [
        f"batch: {batch} {'picture' if batch == 1 else 'pictures'} at a time{several}",
        f"checkpointing: {blocks}",
        f"precision: {precision}",
        f"optimizer: {settings['optimizer']}; {average}",
        *lokr.caching_in_words(settings),
        *([RELEASED] if settings.get("optimizer_release_gradients") else []),
    ]


def batch_of(settings: Mapping[str, Any]) -> int:
    """Pictures per optimizer step."""
    return settings["train_batch_size"] * settings["gradient_accumulation_steps"]


def steps_per_epoch(pictures: int, resolutions: Sequence[int], settings: Mapping[str, Any]) -> float:
    """Optimizer steps of a pass over all pictures, as if all had one shape; `check` counts exactly."""
    micro_batches = len(resolutions) * math.ceil(pictures / settings["train_batch_size"])
    return micro_batches / settings["gradient_accumulation_steps"]


def steps_of(length: Length, per_epoch: float) -> int:
    """The steps of a length."""
    return length.steps if length.steps is not None else max(1, round((length.epochs or 1) * per_epoch))


# ---- the files ----


def asked_settings(answers: Answers, length_of: Length | None = None) -> dict[str, Any]:
    """What of config.json was asked for: key → value, None for what must not stand there."""
    length = length_of or answers.length
    return {
        "pretrained_model_name_or_path": answers.model.name,
        "output_dir": answers.output,
        "max_train_steps": length.steps,
        "num_train_epochs": None if length.epochs is None else _whole(length.epochs),
        "validation_prompt": answers.prompt,
        "report_to": answers.tracking,
    }


def learning(model: ModelChoice, steps: int, adapter: str = "full") -> dict[str, Any]:
    """Learning rate and what goes with it, for training every weight, or an adapter."""
    tiny = model.is_tiny
    settings: dict[str, Any] = {
        "learning_rate": learning_rate(model, adapter),
        "lr_scheduler": "constant_with_warmup",
        "lr_warmup_steps": min(20 if tiny else 100, steps // 10),
    }
    return {**settings, "max_grad_norm": 0.3, "ema_decay": 0.98} if tiny else settings


def learning_rate(model: ModelChoice, adapter: str) -> float:
    """The rate for AdamW. The few weights of an adapter move more than all of them do."""
    if adapter == "lokr":
        return lokr.TINY_LEARNING_RATE if model.is_tiny else lokr.LEARNING_RATE
    return 0.0004 if model.is_tiny else 1e-5


def new_config(answers: Answers, settings: Mapping[str, Any], places: Mapping[str, str | None]) -> dict[str, Any]:
    """config.json, whole.

    settings: what is recommended. places: data_backend_config, and user_prompt_library, $schema and lycoris_config
    where there are any.
    """
    per_epoch = steps_per_epoch(usable(answers.pictures, answers.captions), answers.resolutions, settings)
    steps = steps_of(answers.length, per_epoch)
    interval = max(10, min(500, rounded(steps / 4)))
    multiple = max(32, answers.model.facts.vae_factor)
    side = max(multiple, round(max(answers.resolutions) / multiple) * multiple)
    asked = {key: value for key, value in asked_settings(answers).items() if value is not None}
    found: dict[str, Any] = {
        "$schema": places.get("$schema"),
        "model_type": "full",
        "lora_type": "lycoris" if answers.adapter == "lokr" else None,
        "lycoris_config": places.get("lycoris_config"),
        "model_family": "sana",
        "pretrained_model_name_or_path": asked.pop("pretrained_model_name_or_path"),
        "data_backend_config": places["data_backend_config"],
        "output_dir": asked.pop("output_dir"),
        "max_train_steps": asked.pop("max_train_steps", None),
        "num_train_epochs": asked.pop("num_train_epochs", None),
        **settings,
        **learning(answers.model, steps, answers.adapter),
        "checkpoint_step_interval": interval,
        "checkpoints_total_limit": 2,
        "validation_prompt": asked.pop("validation_prompt"),
        "user_prompt_library": places.get("user_prompt_library"),
        "validation_resolution": f"{side}x{side}",
        "validation_guidance": 4.5,
        "validation_num_inference_steps": 20,
        "validation_step_interval": interval,
        "report_to": asked.pop("report_to"),
        "seed": 42,
    }
    if answers.target.beside_gpu:
        found["device"] = "cpu"
    return {key: value for key, value in found.items() if value is not None}


def new_datasets(answers: Answers) -> list[dict[str, Any]]:
    """The entries of multidatabackend.json: the folder once per resolution, and the text cache."""
    name = slug(PurePath(answers.pictures.folder).name)
    entries = []
    for side in answers.resolutions:
        entry = {
            "id": name if len(answers.resolutions) == 1 else f"{name}-{side}",
            "type": "local",
            "instance_data_dir": answers.pictures.folder,
            **caption_settings(answers),
            "crop": False,
            "resolution": side,
            "resolution_type": "pixel_area",
            "repeats": 0,
        }
        entries.append(entry)
    return [*entries, {"id": "text-embeds", "type": "local", "dataset_type": "text_embeds", "default": True}]


def caption_settings(answers: Answers) -> dict[str, Any]:
    """What of a dataset says where its captions are."""
    found: dict[str, Any] = {"caption_strategy": answers.captions}
    if answers.captions == "instanceprompt":
        found["instance_prompt"] = answers.subject if isinstance(answers.subject, str) else list(answers.subject or ())
    if answers.captions == "textfile" and answers.pictures.with_text < answers.pictures.pictures:
        found["missing_caption"] = "skip"
    return found


def prompt_library(answers: Answers) -> dict[str, str]:
    """Prompts worth a look besides the main one: another caption that was found, and one that must not change."""
    others = [text for text in captions_found(answers.pictures, answers.captions) if text != answers.prompt]
    found = {"another": others[0]} if others else {}
    nickname, prompt = TINY_CONTROL if answers.model.is_tiny else CONTROL
    return {**found, nickname: prompt}


def _whole(number: float) -> float | int:
    return int(number) if number == int(number) else number
