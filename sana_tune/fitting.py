"""Settings with which a run fits a card: all that could be changed, tried by the plan's estimates. Pure, torch-free.

What is given up counts as a cost, and of all that fits the least costly is taken; the table COSTS is the order. The
pictures of an optimizer step stay as many as they were while anything fits with them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sana_tune.config.optimizers import OPTIMIZER_FACTS, keeps_bf16
from sana_tune.config.schema import Config
from sana_tune.config.values import optimizer_options
from sana_tune.memory import (
    SPARE,
    TILE_PX,
    CachingNeed,
    Load,
    MemoryNeed,
    caching_needed,
    changed,
    memory_needed,
    rounding_bytes,
)
from sana_tune.model.facts import KNOWN, ModelFacts, known

# What a change costs, the least first: speed before exactness, exactness before another optimizer. (key of the change,
# cost, what it means). The sum decides.
COSTS: Mapping[str, tuple[float, str]] = {
    "recompute": (1, "more blocks recomputed: up to a third more time, the same result"),
    "smaller": (2, "fewer pictures at a time, accumulated to as many a step: a little more time, the same result"),
    "ema_cpu": (3, "the average in main memory: the same result"),
    "bf16": (8, "bf16 weights whose rounding is made good (Kahan, or stochastic rounding): less exact"),
    "release": (10, "gradients released one by one: up to twice the time where the norm is clipped, the same result"),
    "eight": (12, "optimizer states of 8 bits: less exact"),
    "lion": (24, "8-bit Lion whose states are paged to main memory: another optimizer with a lower learning rate"),
    "fewer": (28, "fewer pictures in an optimizer step: noisier steps"),
}
LION = "bnb-lion8bit-paged"
LION_RATE = 0.2  # of AdamW's learning rate, as the quickstart has it: 2e-5 beside 1e-4
MOST_TRIALS = 8
# Optimizer, or the beginning of its name → the one with states of 8 bits that computes the same.
_EIGHT_BITS = {"lion": "bnb-lion8bit", "adamw": "bnb-adamw8bit", "adam": "bnb-adam8bit", "ademamix": "bnb-ademamix8bit"}


@dataclass(frozen=True)
class Wanted:
    """What is to fit, and into how much.

    loads: what is trained. encoded: what the VAE encodes, `vae_batch_size` at a time. drawn: sizes of validation
    pictures, px. resident_bytes: of encoders beside training. fixed_batches, fixed_encoding: datasets have a
    train_batch_size, or a vae_batch_size, of their own, which is left alone.
    """

    config: Config
    facts: ModelFacts
    loads: tuple[Load, ...]
    encoded: tuple[Load, ...]
    drawn: tuple[tuple[int, int], ...]
    card_bytes: int
    encoder_bytes: int
    vae_bytes: int
    resident_bytes: int = 0
    fixed_batches: bool = False
    fixed_encoding: bool = False

    @property
    def room_bytes(self) -> int:
        """What may be taken: some is left free, since all of this is estimated."""
        return int(self.card_bytes * (1 - SPARE))

    @property
    def per_step(self) -> int:
        """Pictures of an optimizer step, of the largest micro-batches."""
        return max(load.batch_size for load in self.loads) * self.config.train.gradient_accumulation_steps


@dataclass(frozen=True)
class Footprint:
    """Bytes on the card: while training, while the caches are filled, and while a picture is drawn (0 = none is)."""

    training: MemoryNeed
    caching: CachingNeed
    drawing_bytes: int

    @property
    def most_bytes(self) -> int:
        """The most at any time."""
        return max(self.training.total_bytes, self.caching.total_bytes, self.drawing_bytes)


@dataclass(frozen=True)
class Candidate:
    """Settings to change, by name; what is given up, as keys of COSTS; and what the run takes then."""

    changes: Mapping[str, Any]
    given_up: tuple[str, ...]
    cost: float
    footprint: Footprint
    largest: Load  # the micro-batch that decides


@dataclass(frozen=True)
class Tried:
    """What trying a candidate on the card came to. peak_bytes: None where nobody counts. problem: "" when it went."""

    problem: str = ""
    peak_bytes: int | None = None
    step_s: float = 0.0


Trial = Callable[[Candidate], Tried]


def footprint(wanted: Wanted, config: Config, loads: Sequence[Load]) -> Footprint:
    """What the run takes with other settings and micro-batches."""
    need = memory_needed(config, wanted.facts, loads)
    need = replace(need, resident_bytes=wanted.resident_bytes)
    caching = caching_needed(wanted.encoder_bytes, wanted.vae_bytes, _encoded(wanted, config))
    stays = replace(need, optimizer_bytes=need.optimizer_bytes - rounding_bytes(config, wanted.facts))
    return Footprint(need, caching, drawing_needed(stays, wanted.vae_bytes, wanted.drawn, _is_tiled(config)))


def _is_tiled(config: Config) -> bool:
    return config.validation.vae_enable_tiling


def _encoded(wanted: Wanted, config: Config) -> list[Load]:
    """What the VAE works on at one time, where fewer pictures are to be encoded at once."""
    most = config.data.vae_batch_size
    if wanted.fixed_encoding or most == wanted.config.data.vae_batch_size:
        return list(wanted.encoded)
    return [replace(load, batch_size=min(load.batch_size, most)) for load in wanted.encoded]


def drawing_needed(need: MemoryNeed, vae_bytes: int, sizes: Sequence[tuple[int, int]], tiled: bool) -> int:
    """Bytes on the card while the VAE decodes a validation picture: all that stays of training, and its own.

    Gradients are freed by then, and the sampler's predictions take less than this. 0 when nothing is drawn.
    """
    if not sizes:
        return 0
    stays = need.weights_bytes + need.optimizer_bytes + need.ema_bytes + need.base_bytes + need.resident_bytes
    most = TILE_PX if tiled else max(map(max, sizes))
    pieces = [Load(min(width, most), min(height, most), 1) for width, height in sizes]
    return stays + caching_needed(0, vae_bytes, pieces).pictures_bytes


# ---- all that could be changed ----


@dataclass(frozen=True)
class _Choice:
    """One way to have one thing: what is changed, what is given up, and what it costs."""

    changes: Mapping[str, Any]
    given_up: tuple[str, ...] = ()
    cost: float = 0.0


def candidates(wanted: Wanted) -> Iterator[Candidate]:
    """Every way to train, whether it fits or not, the least costly first; the first is as it is asked."""
    found = [
        ((weights, average, batch, blocks), loads)
        for weights in _weights(wanted)
        for average in _averages(wanted.config)
        for batch, loads in _batches(wanted, bool(weights.changes.get("optimizer_release_gradients")))
        for blocks in _blocks(wanted)
    ]
    for chosen, loads in sorted(found, key=lambda each: _sum(each[0])):
        yield _candidate(wanted, chosen, loads)


def _sum(chosen: Sequence[_Choice]) -> float:
    return sum(choice.cost for choice in chosen)


def _candidate(wanted: Wanted, chosen: Sequence[_Choice], loads: tuple[Load, ...]) -> Candidate:
    changes = {key: value for choice in chosen for key, value in choice.changes.items()}
    changes |= _besides(wanted, changed(wanted.config, changes), loads)
    return Candidate(
        changes,
        tuple(word for choice in chosen for word in choice.given_up),
        _sum(chosen),
        footprint(wanted, changed(wanted.config, changes), loads),
        max(loads, key=lambda load: load.width_px * load.height_px * load.batch_size),
    )


def _besides(wanted: Wanted, config: Config, loads: Sequence[Load]) -> dict[str, Any]:
    """What else must change and changes nothing that is trained: pictures encoded at once, drawing in tiles."""
    found: dict[str, Any] = {}
    size = 1 if wanted.fixed_encoding else max((load.batch_size for load in wanted.encoded), default=1)
    while size > 1 and footprint(wanted, changed(config, found), loads).caching.pictures_bytes > wanted.room_bytes:
        size //= 2
        found["vae_batch_size"] = size
    if not _is_tiled(config) and footprint(wanted, config, loads).drawing_bytes > wanted.room_bytes:
        if any(max(size) > TILE_PX for size in wanted.drawn):
            found["vae_enable_tiling"] = True
    return found


def _cost(*words: str) -> float:
    return sum(COSTS[word][0] for word in words)


def _weights(wanted: Wanted) -> Iterator[_Choice]:
    """Dtype of the weights, optimizer, and whether gradients are released."""
    for choice in _optimizers(wanted):
        yield choice
        config = wanted.config
        if config.model.mixed_precision != "fp16" and not config.optimizer.optimizer_release_gradients:
            changes = {**choice.changes, "optimizer_release_gradients": True}
            cost = _cost("release") if _is_clipped(config) else 4.0
            yield _Choice(changes, (*choice.given_up, "release"), choice.cost + cost)


def _is_clipped(config: Config) -> bool:
    """Whether released gradients take two passes."""
    return config.optimizer.max_grad_norm > 0 and config.optimizer.grad_clip_method == "norm"


def _optimizers(wanted: Wanted) -> Iterator[_Choice]:
    """The dtype of the weights and the optimizer, as asked first."""
    config, given = wanted.config, wanted.config.optimizer
    yield _Choice({})
    if config.model.mixed_precision == "fp16" or not wanted.facts.bf16_safe:
        return
    dtype: dict[str, Any] = {} if config.model.weights_dtype == "bf16" else {"weights_dtype": "bf16"}
    dtype |= {"mixed_precision": "bf16"} if config.model.mixed_precision != "bf16" else {}
    if not keeps_bf16(given.optimizer, optimizer_options(given.optimizer_config)):
        dtype["optimizer_config"] = None
    words = ("bf16",) if dtype else ()
    if dtype:
        yield _Choice(dtype, words, _cost(*words))
    plain = {"optimizer_config": None} if given.optimizer_config else {}
    facts = OPTIMIZER_FACTS[given.optimizer]
    if facts.keeps == "kahan" or (facts.state_bytes or 0) > 3.1:
        changes = {**dtype, **plain, "optimizer": _eight_bits(given.optimizer)}
        yield _Choice(changes, (*words, "eight"), _cost(*words, "eight"))
    if not facts.paged:
        rate = given.learning_rate * (1.0 if "lion" in given.optimizer else LION_RATE)
        changes = {**dtype, **plain, "optimizer": LION, "learning_rate": float(f"{rate:.3g}")}
        yield _Choice(changes, (*words, "lion"), _cost(*words, "lion"))


def _eight_bits(optimizer: str) -> str:
    """The optimizer with states of 8 bits that is nearest to one."""
    kind = optimizer.partition("-")[2].removesuffix("-paged").removesuffix("8bit")
    return _EIGHT_BITS.get(kind, "bnb-adamw8bit")


def _averages(config: Config) -> Iterator[_Choice]:
    """Where the average is kept."""
    yield _Choice({})
    if config.ema.use_ema and not config.ema.is_on_cpu:
        yield _Choice({"ema_device": "cpu"}, ("ema_cpu",), _cost("ema_cpu"))


def _batches(wanted: Wanted, released: bool) -> Iterator[tuple[_Choice, tuple[Load, ...]]]:
    """Pictures at a time and how often: as many a step as asked, then fewer. Released gradients cannot be added up."""
    released = released or wanted.config.optimizer.optimizer_release_gradients
    accumulated, whole = wanted.config.train.gradient_accumulation_steps, wanted.per_step
    largest = whole // accumulated
    if wanted.fixed_batches:
        if accumulated == 1 or not released:
            yield _Choice({}), wanted.loads
        return
    kept = [size for size in range(whole, 0, -1) if whole % size == 0 and (size == whole or size <= largest)]
    for size in kept:
        count = whole // size
        if (released and count > 1) or (not released and size > largest):
            continue
        changes = _changes_of_batch(wanted, size, count)
        cost = 0.0 if size >= largest else _cost("smaller") + 0.1 * math.log2(largest / size)
        yield _Choice(changes, ("smaller",) if size < largest else (), cost), _at_most(wanted, size)
    for size in kept[1:] if released else ():
        cost = _cost("fewer") + math.log2(whole / size)
        yield _Choice(_changes_of_batch(wanted, size, 1), ("fewer",), cost), _at_most(wanted, size)


def _changes_of_batch(wanted: Wanted, size: int, count: int) -> dict[str, Any]:
    accumulated = wanted.config.train.gradient_accumulation_steps
    changes = {"train_batch_size": size} if size != wanted.per_step // accumulated else {}
    return {**changes, "gradient_accumulation_steps": count} if count != accumulated else changes


def _at_most(wanted: Wanted, size: int) -> tuple[Load, ...]:
    """The micro-batches with so many pictures in the largest of them."""
    largest = max(load.batch_size for load in wanted.loads)
    if size > largest:  # what was accumulated comes at once
        return tuple(replace(load, batch_size=load.batch_size * size // largest) for load in wanted.loads)
    return tuple(replace(load, batch_size=min(load.batch_size, size)) for load in wanted.loads)


def _blocks(wanted: Wanted) -> Iterator[_Choice]:
    """Which blocks are recomputed: as asked, then more of them, to all."""
    yield _Choice({})
    model, layers = wanted.config.model, wanted.facts.layers
    if model.gradient_checkpointing and model.gradient_checkpointing_segment_stride is not None:
        return
    now = model.gradient_checkpointing_interval if model.gradient_checkpointing else layers + 1
    for share, interval in sorted({-(-layers // n): n for n in range(layers, 0, -1)}.items()):
        if interval < now:
            on = {} if model.gradient_checkpointing else {"gradient_checkpointing": True}
            cost = _cost("recompute") * (1 + share / layers) / 2
            yield _Choice({**on, "gradient_checkpointing_interval": interval}, ("recompute",), cost)


# ---- what fits ----


def fitting(wanted: Wanted) -> Iterator[Candidate]:
    """The candidates that fit, the least costly first."""
    return (one for one in candidates(wanted) if one.footprint.most_bytes <= wanted.room_bytes)


def _fits(wanted: Wanted) -> bool:
    """Whether anything fits."""
    return next(fitting(wanted), None) is not None


@dataclass(frozen=True)
class Missing:
    """Why nothing fits: the candidate that takes least, what is missing in bytes, and what would fit, in words."""

    least: Candidate
    missing_bytes: int
    instead: tuple[str, ...]


def missing(wanted: Wanted) -> Missing:
    """How far the smallest candidate is from the card, and smaller sizes and models that fit."""
    least = min(candidates(wanted), key=lambda one: one.footprint.most_bytes)
    instead = []
    if least.footprint.caching.text_bytes > wanted.room_bytes:
        instead.append("caches that are filled on a larger card (`sana_tune cache warm`) and copied here")
    if wanted.fixed_encoding and least.footprint.caching.pictures_bytes > wanted.room_bytes:
        instead.append("vae_batch_size 1 in the datasets that name one of their own")
    side = round(math.sqrt(max(load.width_px * load.height_px for load in wanted.loads)))
    for smaller in (768, 512, 256):
        if smaller < side and _fits(at_size(wanted, wanted.facts, smaller)):
            instead.append(f"pictures of {smaller} px (resolution {smaller})")
            break
    for name in KNOWN:
        facts = known(name)
        if facts is None or facts.parameters >= wanted.facts.parameters:
            continue
        exact = {} if facts.bf16_safe else {"mixed_precision": "no", "weights_dtype": "fp32"}
        smaller = at_size(replace(wanted, config=changed(wanted.config, exact)), facts, facts.native_px)
        if facts.native_px <= side and _fits(smaller):
            instead.append(f"the smaller model {name}")
    return Missing(least, least.footprint.most_bytes - wanted.room_bytes, tuple(instead))


def at_size(wanted: Wanted, facts: ModelFacts, side_px: int) -> Wanted:
    """The same with another model, and square pictures of another size."""
    loads = tuple(Load(side_px, side_px, load.batch_size) for load in wanted.loads)
    encoded = tuple(Load(side_px, side_px, load.batch_size) for load in wanted.encoded)
    drawn = ((side_px, side_px),) if wanted.drawn else ()
    return replace(wanted, facts=facts, loads=loads, encoded=encoded, drawn=drawn)


@dataclass(frozen=True)
class Found:
    """What was chosen, what trying it came to (None = it was not tried), and what was tried in vain before."""

    chosen: Candidate | None
    tried: Tried | None = None
    failed: tuple[tuple[Candidate, Tried], ...] = ()


def choose(wanted: Wanted, trial: Trial | None = None) -> Found:
    """The least costly candidate that fits; with a trial, the first that goes through it.

    After one that fails, only those that are estimated to take less are tried.
    """
    if trial is None:
        return Found(next(fitting(wanted), None))
    failed: list[tuple[Candidate, Tried]] = []
    for one in fitting(wanted):
        if failed and one.footprint.training.total_bytes >= failed[-1][0].footprint.training.total_bytes:
            continue
        tried = trial(one)
        if not tried.problem:
            return Found(one, tried, tuple(failed))
        failed.append((one, tried))
        if len(failed) == MOST_TRIALS:
            break
    return Found(None, None, tuple(failed))
