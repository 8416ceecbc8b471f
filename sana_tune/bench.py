"""How fast training steps of a model are on this machine: random weights of the real sizes, nothing is downloaded.

Each case is the step of a run (train.step) with everything in it but the loader: noise from position, clip, the finite
check, the optimizer. What it is compared with, `diffusers`, is the shortest loop over the plain model that trains the
same, its text padded to 300 tokens as diffusers' own training script pads it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sana_tune.config.choices import OPTIMIZERS
from sana_tune.config.schema import Config
from sana_tune.errors import Problem, UserError
from sana_tune.memory import OVERHEAD_BYTES, Load, changed, default_config, memory_needed
from sana_tune.model import facts as models
from sana_tune.model.facts import ModelFacts, recomputed_blocks
from sana_tune.progress import Progress

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from sana_tune.data.batch import Batch
    from sana_tune.model.blocks import Blocks
    from sana_tune.train.step import Parts

MODELS: dict[str, str] = {
    "sana-600m-512": "Efficient-Large-Model/Sana_600M_512px_diffusers",
    "sana-600m-1024": "Efficient-Large-Model/Sana_600M_1024px_diffusers",
    "sana-1.6b-512": "Efficient-Large-Model/Sana_1600M_512px_diffusers",
    "sana-1.6b-1024": "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers",
    "sana-1.6b-2048": "Efficient-Large-Model/Sana_1600M_2Kpx_BF16_diffusers",
    "sana1.5-1.6b-1024": "Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers",
    "sana1.5-4.8b-1024": "Efficient-Large-Model/SANA1.5_4.8B_1024px_diffusers",
}
VARIANTS: dict[str, str] = {
    "diffusers": "the plain model in the shortest loop",
    "eager": "ours",
    "compiled": "ours, dynamo_backend inductor",
}
# What may stand behind an optimizer's name, with colons between.
WORDS: dict[str, str] = {
    "bf16": "bf16 weights",
    "release": "gradients released inside the backward pass, not clipped",
    "clip": "with release: clipped by norm, in two passes",
    "ema": "an average of the weights beside them",
    "ema_cpu": "an average in main memory",
}
MAX_TOKENS = 300
WARM_UP_STEPS = 3
OPTIMIZER_COLUMN = 34
_PRODUCT = {"cuda": 8192, "cpu": 1024}  # side of the matrices whose product says what the device can do


@dataclass(frozen=True)
class Asked:
    """What to measure. optimizers: a name, with what WORDS say behind it. intervals: of recomputed blocks, 0 = none,
    "selective"."""

    model: str
    batches: tuple[int, ...] = (1,)
    variants: tuple[str, ...] = tuple(VARIANTS)
    optimizers: tuple[str, ...] = ("optimi-adamw",)
    intervals: tuple[str, ...] = ("0", "1")
    resolution: int | None = None
    tokens: int = MAX_TOKENS
    steps: int = 10
    device: str = "auto"


@dataclass(frozen=True)
class Case:
    """One way to train."""

    variant: str
    batch: int
    optimizer: str
    bf16: bool = False
    release: bool = False
    interval: int = 1
    selective: bool = False
    clip: bool = False
    ema: Literal["", "accelerator", "cpu"] = ""

    @property
    def weights(self) -> str:
        """The optimizer with what belongs to it, as it is asked for."""
        average = {"": [], "accelerator": ["ema"], "cpu": ["ema_cpu"]}[self.ema]
        words = [*["bf16"] * self.bf16, *["release"] * self.release, *["clip"] * self.clip, *average]
        return ":".join([self.optimizer, *words])

    @property
    def recomputed(self) -> str:
        """Which blocks are recomputed, in a word."""
        if not self.interval:
            return "none"
        which = "all" if self.interval == 1 else f"1 of {self.interval}"
        return f"{which}, selective" if self.selective else which


@dataclass(frozen=True)
class Measured:
    """What a case came to. step_s: median. tflops: 10¹² operations of the model (3 × forward) a second.

    share: of what a matrix product reaches on the device. peak_bytes, planned_bytes: on a GPU, what torch took at most
    and what the plan says of it (CUDA's own not counted). problem: why there is nothing, or "".
    """

    case: Case
    step_s: float = 0.0
    images_s: float = 0.0
    tflops: float = 0.0
    share: float = 0.0
    peak_bytes: int | None = None
    planned_bytes: int | None = None
    problem: str = ""

    @property
    def memory_ratio(self) -> float | None:
        """What the plan says over what was taken: within 0.9 and 1.1 is the aim. None where nothing was seen."""
        return self.planned_bytes / self.peak_bytes if self.planned_bytes and self.peak_bytes else None

    def to_json(self) -> dict[str, Any]:
        """Plain values in one level."""
        values = {key: value for key, value in asdict(self).items() if key != "case"}
        return {**asdict(self.case), **values, "memory_ratio": self.memory_ratio}


@dataclass(frozen=True)
class Machine:
    """Where it was measured, as far as it was seen. product_tflops: of a matrix product in `precision`."""

    device: str
    torch: str
    precision: str
    product_tflops: float


@dataclass(frozen=True)
class Subject:
    """The model that is measured: its sizes, and the config of its transformer."""

    facts: ModelFacts
    transformer: Mapping[str, Any]


def subject_of(model: str) -> Subject:
    """nano, a name of MODELS, a published repository, or a folder in diffusers layout. Raises UserError."""
    from sana_tune.model import fetch
    from sana_tune.model.layout import CONFIGS, read_json

    if model == "nano" or Path(model).is_dir():
        folder = fetch.locate("nano") if model == "nano" else Path(model)
        return Subject(models.from_folder(folder), read_json(folder / CONFIGS["transformer"]))
    name = MODELS.get(model, model)
    found = models.known(name)
    if found is None:
        what = f"no model has the name {model!r}; there are {', '.join(('nano', *MODELS))}"
        raise UserError(Problem("--model", what, "take one of these, or a folder in diffusers layout"))
    return Subject(found, models.known_transformer(name))


def cases_of(asked: Asked) -> tuple[Case, ...]:
    """All that is asked for, what cannot be left out. Raises UserError for names that are none."""
    found = []
    for name in asked.variants:
        if name not in VARIANTS:
            raise UserError(Problem("--variants", f"{name!r} is none of {', '.join(VARIANTS)}", "name some of these"))
    for batch in asked.batches:
        for optimizer in asked.optimizers:
            for interval in asked.intervals:
                found += [_case(variant, batch, optimizer, interval) for variant in asked.variants]
    return tuple(case for case in found if _is_possible(case))


def _case(variant: str, batch: int, optimizer: str, interval: str) -> Case:
    name, *more = optimizer.split(":")
    wrong = set(more) - set(WORDS) or len(set(more)) < len(more) or {"ema", "ema_cpu"} <= set(more)
    if name not in OPTIMIZERS or wrong:
        words = "; ".join(f":{word}, {meaning}" for word, meaning in WORDS.items())
        what = f"an optimizer's name, and where wanted {words}; found {optimizer!r}"
        raise UserError(Problem("--optimizers", what, "`sana_tune options optimizer` lists the names"))
    if "clip" in more and "release" not in more:
        what = f":clip belongs to :release, all others are clipped anyway; found {optimizer!r}"
        raise UserError(Problem("--optimizers", what, "leave it out, or add :release"))
    number = interval.removeprefix("selective") or "1"
    if not number.isdecimal():
        what = f"0 for none, n for blocks 0, n, 2n …, or selective; found {interval!r}"
        raise UserError(Problem("--intervals", what, "such as --intervals 0,1,2,selective"))
    return Case(
        variant,
        batch,
        name,
        bf16="bf16" in more,
        release="release" in more,
        interval=int(number),
        selective=interval.startswith("selective"),
        clip="clip" in more,
        ema="cpu" if "ema_cpu" in more else "accelerator" if "ema" in more else "",
    )


def _is_possible(case: Case) -> bool:
    """Whether there is such a thing: the plain loop releases nothing, and selective blocks are not compiled."""
    return (case.variant, case.release) != ("diffusers", True) and (case.variant, case.selective) != ("compiled", True)


def measure(asked: Asked) -> tuple[Machine, Iterator[Measured]]:
    """Where, and then case by case what. Nothing is measured before the first is asked for. Raises UserError."""
    from sana_tune.train.device import make_accelerator, resolve_device

    subject, cases = subject_of(asked.model), cases_of(asked)
    facts = subject.facts
    if not cases:
        raise UserError(Problem("bench", "nothing of what is asked for exists", "ask for other --variants"))
    side = asked.resolution or facts.native_px
    if problem := models.check_size(side, side, facts.vae_factor, "--resolution"):
        raise UserError(problem)
    precision = "bf16" if resolve_device(asked.device) != "cpu" else "no"
    accelerator = make_accelerator(asked.device, precision)
    machine = _machine(accelerator.device, precision)
    tflop = flops_of_picture(subject, side, asked.tokens) / 1e12

    def each() -> Iterator[Measured]:
        for case in cases:
            found = _measured(case, asked, subject, side, accelerator, precision)
            speed = 0.0 if found.problem else case.batch / found.step_s
            share = speed * tflop / machine.product_tflops
            yield replace(found, images_s=speed, tflops=speed * tflop, share=share)

    return machine, each()


def flops_of_picture(subject: Subject, side_px: int, tokens: int) -> float:
    """Operations to train on one picture: three times those of a forward pass (a multiplication and an addition are
    two), by counting on tensors without content."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    side = side_px // subject.facts.vae_factor
    plain = {**subject.transformer, "interpolation_scale": None}  # the embedding of positions costs nothing of it
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model = random_model(plain)
        config = model.config
        latents = torch.empty(1, config["in_channels"], side, side)
        model(latents, torch.empty(1, tokens, config["caption_channels"]), torch.empty(1), return_dict=False)
    return 3.0 * counter.get_total_flops()


def random_model(transformer: Mapping[str, Any]) -> Any:
    """The model of these sizes with random weights, on torch's current default device."""
    from diffusers import SanaTransformer2DModel

    return SanaTransformer2DModel(**{key: transformer[key] for key in transformer if not key.startswith("_")}).train()


def _machine(device: torch.device, precision: str) -> Machine:
    import platform

    import torch

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()}, {device.type}"
    if device.type == "cpu":
        name += f", {torch.get_num_threads()} threads"
    side = _PRODUCT.get(device.type, 4096)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    one, other = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    times = [_timed(lambda: torch.mm(one, other), device) for _ in range(10)]
    return Machine(name, torch.__version__, precision, 2 * side**3 / min(times[3:]) / 1e12)


def _timed(work: Callable[[], object], device: torch.device) -> float:
    import torch

    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _measured(
    case: Case, asked: Asked, subject: Subject, side: int, accelerator: Accelerator, precision: str
) -> Measured:
    """One case, and the device as empty as before afterwards."""
    import torch

    from sana_tune.model.sana import empty_device_cache

    device = accelerator.device
    config = _config(case, precision)
    planned = memory_needed(config, subject.facts, [Load(side, side, case.batch)], precision=precision).total_bytes
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        step, blocks = _stepper(case, config, asked, subject, side, accelerator)
        for number in range(WARM_UP_STEPS):
            step(number)
        if case.variant == "compiled" and (blocks is None or not blocks.compiled):
            return Measured(case, planned_bytes=planned - OVERHEAD_BYTES, problem="could not be compiled")
        times = sorted(_timed(partial(step, WARM_UP_STEPS + number), device) for number in range(asked.steps))
    except torch.OutOfMemoryError:
        return Measured(case, planned_bytes=planned - OVERHEAD_BYTES, problem="out of memory")
    finally:
        step = blocks = None
        if case.variant == "compiled":
            torch._dynamo.reset()
        empty_device_cache()
    found = Measured(case, step_s=times[len(times) // 2])
    if device.type != "cuda":
        return found
    peak = torch.cuda.max_memory_allocated(device)
    return replace(found, peak_bytes=peak, planned_bytes=planned - OVERHEAD_BYTES)


def _config(case: Case, precision: str) -> Config:
    changes: dict[str, Any] = {
        "mixed_precision": precision,
        "weights_dtype": "bf16" if case.bf16 else "fp32",
        "optimizer": case.optimizer,
        "optimizer_release_gradients": case.release,
        "max_grad_norm": 0.0 if case.release and not case.clip else 0.1,
        "use_ema": bool(case.ema),
        "ema_device": case.ema or "accelerator",
        "gradient_checkpointing": case.interval > 0,
        "gradient_checkpointing_interval": max(1, case.interval),
        "gradient_checkpointing_backend": "selective" if case.selective else "torch",
        "train_batch_size": case.batch,
    }
    return changed(default_config(), changes)


def _stepper(
    case: Case, config: Config, asked: Asked, subject: Subject, side: int, accelerator: Accelerator
) -> tuple[Callable[[int], None], Blocks | None]:
    """A function that does the step of that number, and how the model's blocks are run."""
    import torch

    from sana_tune.model.attention import install
    from sana_tune.model.blocks import arrange, sample
    from sana_tune.run import average_of, optimizer_of, release_of
    from sana_tune.schedule import Schedule
    from sana_tune.train.ema import NoEma
    from sana_tune.train.step import Parts, train_step

    torch.manual_seed(0)
    with torch.device("cpu" if case.bf16 else accelerator.device):
        model = random_model(subject.transformer)
    if case.variant != "diffusers":
        install(model)
    optimizer = optimizer_of(config, model, accelerator.device, bf16=case.bf16)
    recomputed = recomputed_blocks(len(model.transformer_blocks), case.interval) if case.interval else ()
    compiler = "inductor" if case.variant == "compiled" else None
    blocks = arrange(model, recomputed, selective=case.selective, compiler=compiler)
    if blocks is not None and compiler is not None:  # as a run does: what cannot be compiled shows here, and is told
        size = (case.batch, *[side // subject.facts.vae_factor] * 2)
        blocks.warm_up(lambda size: sample(model, accelerator.autocast, *size), [size], list(model.parameters()))
    parts = Parts(
        accelerator=accelerator,
        transformer=model,
        optimizer=optimizer,
        schedule=Schedule("constant", config.optimizer.learning_rate, 1_000_000),
        ema=average_of(config.ema, model.named_parameters()) if case.ema else NoEma(),
        shift_at=lambda tokens: subject.facts.flow_shift,
        seed=0,
        max_grad_norm=config.optimizer.max_grad_norm,
        release=release_of(config.optimizer, accelerator, model, optimizer),
        compiled=case.variant == "compiled",
    )
    if case.variant == "diffusers":
        return _bare(parts, _batch(case, subject, side, asked.tokens, padded=True)), blocks
    from sana_tune.data.order import MicroBatch

    batch = _batch(case, subject, side, asked.tokens, padded=False)

    def step(number: int) -> None:
        train_step(parts, [(MicroBatch(number, 0, 0, tuple(range(case.batch))), batch)], Progress(number))

    return step, blocks


def _batch(case: Case, subject: Subject, side: int, tokens: int, *, padded: bool) -> Batch:
    """Random pictures with captions of half as many tokens up to as many."""
    import torch

    from sana_tune.data.batch import Batch
    from sana_tune.data.records import Role

    config, edge = subject.transformer, side // subject.facts.vae_factor
    length = MAX_TOKENS if padded else tokens
    lengths = torch.linspace(tokens, (tokens + 1) // 2, case.batch).round()
    mask = (torch.arange(length) < lengths[:, None]).to(torch.int64)
    latents = torch.randn(case.batch, config["in_channels"], edge, edge)
    text = torch.randn(case.batch, length, config["caption_channels"]) * mask[..., None]
    ids = tuple(str(number) for number in range(case.batch))
    return Batch(latents, text, mask, None, Role.TRAIN, ids)


def _bare(parts: Parts, batch: Batch) -> Callable[[int], None]:
    """The shortest loop that trains the same, its batch on the device."""
    import torch
    import torch.nn.functional as F

    device, weights = parts.accelerator.device, parts.trained
    x0, text, mask = (each.to(device) for each in (batch.latents, batch.text, batch.text_mask))

    def step(number: int) -> None:
        shift, sigma = parts.shift_at(0), torch.randn(len(x0), device=device).sigmoid()
        sigma = shift * sigma / (1 + (shift - 1) * sigma)
        noise, level = torch.randn_like(x0), sigma[:, None, None, None]
        noised = ((1 - level) * x0 + level * noise).to(parts.input_dtype)
        with parts.accelerator.autocast():
            predicted = parts.transformer(
                noised, text.to(parts.input_dtype), 1000 * sigma, encoder_attention_mask=mask, return_dict=False
            )[0]
        loss = F.mse_loss(predicted.float(), noise - x0)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, parts.max_grad_norm)
        parts.ema.fence()
        parts.optimizer.step()
        parts.optimizer.zero_grad()
        parts.ema.update(number + 1)
        loss.item()

    return step


def lines_of(asked: Asked, machine: Machine, found: Sequence[Measured]) -> list[str]:
    """All of it as text: where, and a table with the speed-up over diffusers' loop of the same settings."""
    subject = subject_of(asked.model)
    facts = subject.facts
    side = asked.resolution or facts.native_px
    lines = [
        f"{asked.model}: {facts.parameters:,} parameters, random; {side}x{side} px, "
        f"{asked.tokens} text tokens, {flops_of_picture(subject, side, asked.tokens) / 1e12:.3g} TFLOP a picture",
        f"{machine.device}, torch {machine.torch}, computing in {'fp32' if machine.precision == 'no' else 'bf16'}; "
        f"a matrix product reaches {machine.product_tflops:.3g} TFLOP/s here",
        "",
        f"{'batch':>5}  {'variant':<9}  {'optimizer':<{OPTIMIZER_COLUMN}}  {'recomputed':<16}  {'ms/step':>8}  "
        f"{'images/s':>8}  {'TFLOP/s':>8}  {'of product':>10}  {'peak GB':>8}  {'planned':>8}  {'plan/peak':>9}  "
        f"{'speed-up':>8}",
    ]
    return lines + [_line(one, found) for one in found]


def _line(one: Measured, found: Sequence[Measured]) -> str:
    case = one.case
    start = f"{case.batch:>5}  {case.variant:<9}  {case.weights:<{OPTIMIZER_COLUMN}}  {case.recomputed:<16}"
    if one.problem:
        return f"{start}  {one.problem}"
    plain = next((other for other in found if other.case == replace(case, variant="diffusers")), None)
    ratio = "" if plain is None or plain.problem else f"{plain.step_s / one.step_s:.2f}"
    peak, planned = ("" if size is None else f"{size / 1e9:.1f}" for size in (one.peak_bytes, one.planned_bytes))
    memory = "" if one.memory_ratio is None else f"{one.memory_ratio:.2f}"
    return (
        f"{start}  {1000 * one.step_s:>8.1f}  {one.images_s:>8.3g}  {one.tflops:>8.3g}  {one.share:>10.0%}  "
        f"{peak:>8}  {planned:>8}  {memory:>9}  {ratio:>8}"
    )
