"""How much memory a run takes on its device, from its settings alone; and which settings would take less. Torch-free.

The numbers are those measured for the 1.6B model (reference, "Cost"): parameters, gradients and states by their
bytes, activations per picture. Other sizes are scaled by latent positions × width × layers.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from typing import Any

from sana_tune.config.launch_rules import LAUNCH_RULES, shards
from sana_tune.config.lycoris import LycorisFile, read_lycoris
from sana_tune.config.optimizers import OPTIMIZER_FACTS, keeps_bf16, saved_bytes, state_bytes
from sana_tune.config.quantisation_rules import FULL_RANK, ON_QUANTISED
from sana_tune.config.schema import Config, section_of
from sana_tune.config.values import optimizer_options
from sana_tune.errors import Problem, UserError
from sana_tune.hardware import Device
from sana_tune.model import fetch
from sana_tune.model.adapted import adapted
from sana_tune.model.facts import ModelFacts, from_folder, known, recomputed_blocks
from sana_tune.model.packing import network_bytes

GIB = 2**30
# Activations of one picture of 1024 px in bf16, the 1.6B model (width 2240, 20 layers, 1024 latent positions, 300 text
# tokens), counted tensor by tensor as autograd keeps them with our attention and feed-forward (diffusers': 3.66 GiB).
ACTIVATIONS_BYTES = 2.86 * GIB  # nothing recomputed
KEPT_BYTES = 0.11 * GIB  # every block recomputed: what stays besides the one block that is live
# A selectively recomputed block keeps besides its input 13 times the width of every position: q, k, v and output of the
# linear attention, q, mixture and output of the cross-attention, 5 + 1 of the feed-forward. In bf16, beside fp32
# weights too, where autocast makes them.
SELECTIVE_WIDTHS = 13
# The same beside fp32 weights, counted tensor by tensor: what passes from block to block is fp32 then, so that twice
# is kept of it, and of all activations 1.2 times as much (3.43 GiB); without bf16 it is twice.
_AUTOCAST, _FP32, _FP32_KEPT = 1.2, 2.0, 2.0
_MEASURED = 1024 * 2240 * 20  # positions × width × layers of that measurement
# The CUDA context, the libraries' workspaces and what the allocator cannot use: about this much on any GPU.
OVERHEAD_BYTES = 1_000_000_000
SPARE = 0.05  # share of a device that a recommendation leaves free: the numbers above are estimates
TARGET_BATCH = 4  # pictures per optimizer step that is recommended
# Encoding: Gemma-2's layers over a batch of texts; DC-AE's first stage, 128 channels at full size, a few at a time.
_TEXT_WORK_BYTES = 500_000_000
_VAE_CHANNELS, _VAE_TENSORS = 128, 5
TILE_PX = 512  # the largest side that the VAE takes in one piece where it is tiled


@dataclass(frozen=True)
class Load:
    """One micro-batch: the size of its pictures, px, and how many there are."""

    width_px: int
    height_px: int
    batch_size: int


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes on the device while training. copies: the bf16 weights that autocast makes of fp32 ones.

    base: the untrained model that regularisation data learns from, in the dtype that is computed in.
    resident: encoders that stay there, or come back, because not everything is cached before training.
    """

    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    ema_bytes: int
    copies_bytes: int
    activations_bytes: int
    overhead_bytes: int
    resident_bytes: int = 0
    base_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """All of it together."""
        return sum(asdict(self).values())


@dataclass(frozen=True)
class CachingNeed:
    """Bytes on the device while the caches are filled, before training: the text encoder, then the VAE."""

    text_bytes: int
    pictures_bytes: int

    @property
    def total_bytes(self) -> int:
        """The most at one time: one network is freed before the next is loaded."""
        return max(self.text_bytes, self.pictures_bytes)


@dataclass(frozen=True)
class Way:
    """Settings to change, by name, and the bytes that training takes then."""

    changes: dict[str, Any]
    total_bytes: int


@dataclass(frozen=True)
class MemoryPlan:
    """What a run takes, and what there is.

    device: None when it is not known. ways: changes that would make training fit; () while it fits. host_bytes: main
    memory that training takes beside a GPU's.
    """

    need: MemoryNeed
    caching: CachingNeed
    device: Device | None = None
    ways: tuple[Way, ...] = ()
    host_bytes: int = 0

    @property
    def fits(self) -> bool:
        """Whether training fits the device, or the device is not known."""
        return self.device is None or self.need.total_bytes <= self.device.total_bytes

    @property
    def caching_fits(self) -> bool:
        """Whether filling the caches fits the device, or the device is not known."""
        return self.device is None or self.caching.total_bytes <= self.device.total_bytes

    def to_json(self) -> dict[str, Any]:
        """Plain values, the sums among them."""
        values = asdict(self)
        values["need"]["total_bytes"] = self.need.total_bytes
        values["caching"]["total_bytes"] = self.caching.total_bytes
        return {**values, "fits": self.fits, "caching_fits": self.caching_fits}


def plan_memory(
    config: Config,
    facts: ModelFacts,
    loads: Sequence[Load],
    caching: CachingNeed,
    device: Device | None,
    *,
    precision: str | None = None,
    resident_bytes: int = 0,
) -> MemoryPlan:
    """What a run takes on its device, with the ways to make it fit when it does not.

    resident_bytes: of encoders beside training.
    """
    on_cpu = device is not None and device.kind == "cpu"
    need = memory_needed(config, facts, loads, precision=precision, on_cpu=on_cpu)
    need = replace(need, resident_bytes=resident_bytes)
    plan = MemoryPlan(need, caching, device, host_bytes=0 if on_cpu else host_needed(config, facts, need))
    if device is None or plan.fits:
        return plan
    room = device.total_bytes - resident_bytes
    found = ways_to_fit(config, facts, loads, room, precision=precision, on_cpu=on_cpu) if room > 0 else ()
    ways = tuple(replace(way, total_bytes=way.total_bytes + resident_bytes) for way in found)
    return replace(plan, ways=ways)


def host_needed(config: Config, facts: ModelFacts, need: MemoryNeed) -> int:
    """Main memory beside a GPU's: an average that is kept there, and the copies of the weights it is made from."""
    if not (config.ema.use_ema and config.ema.is_on_cpu):
        return 0
    average = 4 * trained_parameters(config, facts)
    weights = need.weights_bytes if config.model.model_type == "full" and shards(config) == 1 else average
    return (weights + average) // shards(config)


def memory_needed(
    config: Config,
    facts: ModelFacts,
    loads: Sequence[Load],
    *,
    precision: str | None = None,
    on_cpu: bool = False,
    adapter: LycorisFile | None = None,
) -> MemoryNeed:
    """What training takes; the largest of the loads decides. regularisation_target base is taken at its word.

    precision: "bf16" or "no" where the run computes otherwise than mixed_precision says (a CPU, unasked: "no").
    on_cpu: the device's memory is main memory. adapter: what lycoris_config holds, where it is not a file yet.
    """
    bf16_weights = config.model.weights_dtype == "bf16"
    autocast = (precision or config.model.mixed_precision) != "no" and not bf16_weights
    each = 2 if bf16_weights else 4
    parameters = facts.parameters
    whole, kept = (1.0, 1.0) if bf16_weights else (_AUTOCAST if autocast else _FP32, _FP32_KEPT)
    pictures = max((_positions(load, facts) * load.batch_size for load in loads), default=0)
    if config.model.model_type == "lora":
        return _frozen_needed(config, facts, pictures, autocast, trained_parameters(config, facts, adapter), on_cpu)
    need = MemoryNeed(
        weights_bytes=each * parameters,
        gradients_bytes=_gradients_bytes(config, facts, each),
        optimizer_bytes=round(_state_bytes(config, on_cpu) * parameters) + rounding_bytes(config, facts),
        ema_bytes=_ema_bytes(config, on_cpu, each) * parameters,
        copies_bytes=2 * parameters if autocast else 0,
        activations_bytes=round(pictures * _bytes_per_position(config, facts, whole, kept)),
        overhead_bytes=OVERHEAD_BYTES,
        base_bytes=(2 if bf16_weights or autocast else 4) * parameters * (config.train.regularisation_target == "base"),
    )
    return need if (parts := shards(config)) == 1 else _split(need, parts, facts.layers)


def _split(need: MemoryNeed, parts: int, layers: int) -> MemoryNeed:
    """What a process takes whose tensors are split block by block (FSDP2): its part of all, and whole weights and
    gradients of two blocks, one that computes and one that is on its way."""
    return replace(
        need,
        weights_bytes=need.weights_bytes // parts + 2 * need.weights_bytes // layers,
        gradients_bytes=need.gradients_bytes // parts + 2 * need.gradients_bytes // layers,
        optimizer_bytes=need.optimizer_bytes // parts,
        ema_bytes=need.ema_bytes // parts,
    )


def _frozen_needed(
    config: Config, facts: ModelFacts, pictures: int, autocast: bool, adapter: int, on_cpu: bool
) -> MemoryNeed:
    """What a frozen base takes, without gradients and states, and the fp32 adapter on it, with them.

    pictures: latent positions of a micro-batch. adapter: its parameters. Every product unpacks its matrix: of
    the largest there are two, one coming while the other goes.
    """
    model = config.model
    quantised = model.base_model_precision != "no_change"
    dtype = model.base_model_default_dtype if quantised else "bf16" if autocast else "fp32"
    computed = 2 if autocast or dtype == "bf16" else 4
    whole = 1.0 if quantised and dtype == "bf16" else _AUTOCAST if autocast else _FP32
    kept = 1.0 if whole == 1.0 else _FP32_KEPT
    unpacked = 2 * computed * largest_layer(facts) if quantised else 0
    return MemoryNeed(
        weights_bytes=base_weights_bytes(facts, model.base_model_precision, dtype) + 4 * adapter,
        gradients_bytes=4 * adapter,
        optimizer_bytes=round(_state_bytes(config, on_cpu) * adapter),
        ema_bytes=_ema_bytes(config, on_cpu, 4) * adapter,
        copies_bytes=unpacked,
        activations_bytes=round(pictures * _bytes_per_position(config, facts, whole, kept)),
        overhead_bytes=OVERHEAD_BYTES,
    )


def trained_parameters(config: Config, facts: ModelFacts, adapter: LycorisFile | None = None) -> int:
    """How many are trained: all of the model's, or the adapter's. 0 for an adapter of which nothing is known yet.

    adapter: what lycoris_config holds, where it is not a file yet.
    """
    if config.model.model_type != "lora":
        return facts.parameters
    try:
        file = read_lycoris(config.adapter.lycoris_config) if adapter is None else adapter
        return adapted(facts.transformer, file).parameters
    except UserError:  # told where the adapter is looked at
        return 0


def base_weights_bytes(facts: ModelFacts, precision: str, default_dtype: str) -> int:
    """Bytes of a frozen transformer. precision: as `base_model_precision`. default_dtype: of what is not quantised."""
    each = 2 if default_dtype == "bf16" else 4
    return network_bytes(facts.parameters, facts.layers, facts.matrices, precision, each)


def largest_layer(facts: ModelFacts) -> int:
    """Parameters of the largest weight: the first convolution of a block's feed-forward, width → 2 × 2.5 × width."""
    return 5 * facts.width**2


def _gradients_bytes(config: Config, facts: ModelFacts, each: int) -> int:
    """Gradients of all weights; where they are released, of two at a time: one arrives while one is used."""
    if config.optimizer.optimizer_release_gradients:
        return each * min(facts.parameters, 2 * largest_layer(facts))
    return each * facts.parameters


def _state_bytes(config: Config, on_cpu: bool) -> float:
    """Bytes of optimizer state for each parameter on the device. On a CPU nothing is paged out of it."""
    wanted, dtype = config.optimizer, "bf16" if config.model.weights_dtype == "bf16" else "fp32"
    of = saved_bytes if on_cpu else state_bytes
    return of(wanted.optimizer, optimizer_options(wanted.optimizer_config), dtype)


def rounding_bytes(config: Config, facts: ModelFacts) -> int:
    """What stochastic rounding holds of one weight: it, its gradient, the random bits and the rounded, 4 bytes each."""
    rounded = config.model.weights_dtype == "bf16" and OPTIMIZER_FACTS[config.optimizer.optimizer].keeps != "kahan"
    return 16 * largest_layer(facts) if rounded else 0


@dataclass(frozen=True)
class Weights:
    """The dtype of the trained weights, "fp32" or "bf16", and why."""

    dtype: str
    why: str


def decide_weights(
    config: Config,
    facts: ModelFacts,
    loads: Sequence[Load],
    device: Device | None,
    *,
    precision: str | None = None,
    held: str | None = None,
    resident_bytes: int = 0,
) -> Weights:
    """What `weights_dtype` comes to: auto takes fp32 masters where they fit, else bf16 where that is sound.

    held: dtype of the weights in the checkpoint that the run goes on from; auto follows it. resident_bytes: of encoders
    beside training.
    """
    asked, wanted = config.model.weights_dtype, config.optimizer
    if asked != "auto":
        return Weights(asked, "as asked")
    if shards(config) > 1:
        return Weights("fp32", "FSDP2 splits them over the processes")
    if held is not None:
        return Weights(held, "as in the checkpoint")
    if device is None:
        return Weights("fp32", "the device's memory is not known")
    if device.kind == "cpu" or (precision or config.model.mixed_precision) != "bf16":
        return Weights("fp32", "nothing is computed in bf16")
    in_fp32 = memory_needed(changed(config, {"weights_dtype": "fp32"}), facts, loads, precision=precision)
    need = in_fp32.total_bytes + resident_bytes
    takes = f"about {need / 1e9:.1f} GB with fp32 weights, and {device.name} has {device.total_bytes / 1e9:.1f} GB"
    if need <= device.total_bytes:
        return Weights("fp32", f"they fit: {takes}")
    if not keeps_bf16(wanted.optimizer, optimizer_options(wanted.optimizer_config)):
        return Weights("fp32", f"without Kahan summation bf16 weights would not move; it takes {takes}")
    keeper = OPTIMIZER_FACTS[wanted.optimizer].keeps.replace("kahan", "Kahan summation")
    return Weights("bf16", f"it takes {takes}; {keeper} keeps what rounding loses")


def _ema_bytes(config: Config, on_cpu: bool, each: int) -> int:
    """Bytes of the average for each parameter on the device. each: those of a weight."""
    if not config.ema.use_ema:
        return 0
    if config.ema.is_on_cpu:
        return 4 + each if on_cpu else 0  # with the copies that it is made from
    return 4


def checkpointed_share(config: Config, layers: int) -> float:
    """Share of the blocks that are recomputed in the backward pass: blocks 0, n, 2n … or by the stride."""
    model = config.model
    if not model.gradient_checkpointing:
        return 0.0
    interval, stride = model.gradient_checkpointing_interval, model.gradient_checkpointing_segment_stride
    return sum(recomputed_blocks(layers, interval, stride)) / layers


def _positions(load: Load, facts: ModelFacts) -> int:
    return (load.width_px // facts.vae_factor) * (load.height_px // facts.vae_factor)


def _bytes_per_position(config: Config, facts: ModelFacts, whole: float, kept: float) -> float:
    """Activations per latent position; linear in the share of blocks that is recomputed.

    whole, kept: how many times what bf16 takes, of all activations and of those that stay.
    """
    size = facts.width * facts.layers / _MEASURED
    everything = whole * ACTIVATIONS_BYTES * size
    recomputed = kept * KEPT_BYTES * size + everything / facts.layers  # and one block that is live
    if config.model.gradient_checkpointing_backend == "selective":
        each = 4 if whole == _FP32 else 2
        recomputed = min(everything, recomputed + each * SELECTIVE_WIDTHS * facts.width * facts.layers)
    return everything + checkpointed_share(config, facts.layers) * (recomputed - everything)


def caching_needed(encoder_bytes: int, vae_bytes: int, loads: Sequence[Load]) -> CachingNeed:
    """What filling the caches takes: networks by the bytes of their weights (text encoder bf16, VAE fp32).

    loads: as the VAE gets its pictures, `vae_batch_size` at a time; it computes in fp32.
    """
    pixels = max((load.width_px * load.height_px * load.batch_size for load in loads), default=0)
    return CachingNeed(
        text_bytes=encoder_bytes + _TEXT_WORK_BYTES + OVERHEAD_BYTES,
        pictures_bytes=vae_bytes + pixels * _VAE_CHANNELS * _VAE_TENSORS * 4 + OVERHEAD_BYTES,
    )


def resident_needed(encoder_bytes: int, vae_bytes: int, loads: Sequence[Load]) -> int:
    """What encoders take beside training; 0 bytes of weights = it is not there. loads: as `caching_needed`."""
    text = encoder_bytes + _TEXT_WORK_BYTES if encoder_bytes else 0
    return text + (caching_needed(0, vae_bytes, loads).pictures_bytes - OVERHEAD_BYTES if vae_bytes else 0)


# ---- settings that take less ----


@dataclass(frozen=True)
class _Lever:
    """One thing that can be changed: its variants, the least costly first, and how much anyone minds the change."""

    harm: int
    variants: tuple[dict[str, Any], ...]


def ways_to_fit(
    config: Config,
    facts: ModelFacts,
    loads: Sequence[Load],
    device_bytes: int,
    *,
    precision: str | None = None,
    on_cpu: bool = False,
) -> tuple[Way, ...]:
    """Changes that make training fit into so many bytes, what costs least first; () when nothing does.

    What is computed stays the same with blocks recomputed, with smaller batches accumulated and with the EMA in main
    memory; precision and giving up the EMA come after them. A way that only adds a change to another one is left out.
    """
    levers = _levers(config, facts, max((load.batch_size for load in loads), default=1), precision, on_cpu)
    sets = [chosen for count in range(len(levers) + 1) for chosen in combinations(range(len(levers)), count)]
    sets.sort(key=lambda chosen: sum(levers[place].harm for place in chosen))
    found: list[tuple[frozenset[int], Way]] = []
    for chosen in sets:
        if any(known <= set(chosen) for known, _ in found):
            continue
        for changes in _combined([levers[place].variants for place in chosen]):
            if changes.get("optimizer_release_gradients") and changes.get("gradient_accumulation_steps", 1) > 1:
                continue
            if not _can_be_launched(config, changes):
                continue
            total = _total(config, facts, loads, changes, precision, on_cpu)
            if total <= device_bytes:
                found.append((frozenset(chosen), Way(changes, total)))
                break
    return tuple(way for _, way in found)


@dataclass(frozen=True)
class Relief:
    """Settings to change, by name, and the bytes that training takes less with them alone."""

    changes: dict[str, Any]
    freed_bytes: int


def reliefs(
    config: Config,
    facts: ModelFacts,
    loads: Sequence[Load],
    *,
    precision: str | None = None,
    on_cpu: bool = False,
    fixed: Collection[str] = (),
) -> tuple[Relief, ...]:
    """What each lever frees alone, the most first; of its variants the one that frees most. Estimates, as all here.

    fixed: settings that cannot be changed (those of a checkpoint).
    """
    now = _total(config, facts, loads, {}, precision, on_cpu)
    found = []
    for lever in _levers(config, facts, max((load.batch_size for load in loads), default=1), precision, on_cpu):
        variants = [
            changes
            for changes in lever.variants
            if not changes.keys() & set(fixed) and _can_be_launched(config, changes)
        ]
        freed = [now - _total(config, facts, loads, changes, precision, on_cpu) for changes in variants]
        if freed and (most := max(freed)) > 0:
            found.append(Relief(variants[freed.index(most)], most))
    return tuple(sorted(found, key=lambda relief: -relief.freed_bytes))


def _can_be_launched(config: Config, changes: Mapping[str, Any]) -> bool:
    """Whether the settings go together with several processes, where there are any."""
    return config.launch.processes == 1 or not any(rule(changed(config, changes)) for rule in LAUNCH_RULES)


def _levers(config: Config, facts: ModelFacts, batch: int, precision: str | None, on_cpu: bool) -> list[_Lever]:
    """What can be changed from these settings."""
    model, accumulation = config.model, config.train.gradient_accumulation_steps
    now = model.gradient_checkpointing_interval if model.gradient_checkpointing else facts.layers + 1
    shares = {-(-facts.layers // n): n for n in range(facts.layers, 0, -1)}  # the smallest n of each share
    intervals = sorted((n for n in shares.values() if n < now), reverse=True)
    on = {} if model.gradient_checkpointing else {"gradient_checkpointing": True}
    recompute = tuple({**on, "gradient_checkpointing_interval": n} for n in intervals)
    smaller = tuple(
        {"train_batch_size": size, "gradient_accumulation_steps": accumulation * batch // size}
        for size in range(batch - 1, 0, -1)
        if batch % size == 0
    )
    levers = [_Lever(1, recompute), _Lever(2, smaller)]
    on_gpu = precision is None or precision == model.mixed_precision
    if model.mixed_precision == "no" and on_gpu:
        levers.append(_Lever(4, ({"mixed_precision": "bf16"},)))
    if model.weights_dtype != "bf16" and on_gpu:
        levers.append(_Lever(8, _bf16_variants(config)))
    if on_gpu:
        levers += _optimizer_levers(config)
    if config.ema.use_ema:
        if not config.ema.is_on_cpu and not on_cpu:
            levers.append(_Lever(3, ({"ema_device": "cpu"},)))
        levers.append(_Lever(16, ({"use_ema": False},)))
    if config.train.regularisation_target == "base":
        levers.append(_Lever(32, ({"regularisation_target": "data"},)))
    return [lever for lever in levers if lever.variants]


def _bf16_variants(config: Config) -> tuple[dict[str, Any], ...]:
    """bf16 weights with the optimizer that is there, where it keeps what rounding loses; with Kahan's AdamW."""
    wanted = config.optimizer
    kahan = {"weights_dtype": "bf16", "optimizer": "optimi-adamw"}
    if not keeps_bf16(wanted.optimizer, optimizer_options(wanted.optimizer_config)):
        return ({"weights_dtype": "bf16", "optimizer_config": None},)
    return ({"weights_dtype": "bf16"},) if wanted.optimizer == "optimi-adamw" else ({"weights_dtype": "bf16"}, kahan)


def _optimizer_levers(config: Config) -> list[_Lever]:
    """Gradients released, which costs a second pass where the norm is clipped; states of 8 bits."""
    levers, wanted = [], config.optimizer
    alone = config.train.gradient_accumulation_steps == 1 and config.model.mixed_precision != "fp16"
    if alone and not wanted.optimizer_release_gradients:
        levers.append(_Lever(10, ({"optimizer_release_gradients": True},)))
    if _state_bytes(config, on_cpu=False) > 2.5:
        none = {"optimizer_config": None} if wanted.optimizer_config else {}
        levers.append(_Lever(12, ({"optimizer": "bnb-adamw8bit", **none},)))
    return levers


def _combined(variants: Sequence[tuple[dict[str, Any], ...]]) -> Iterator[dict[str, Any]]:
    """One variant of each, those of the first running fastest."""
    if not variants:
        yield {}
        return
    for rest in _combined(variants[1:]):
        for first in variants[0]:
            yield {**first, **rest}


def _total(
    config: Config,
    facts: ModelFacts,
    loads: Sequence[Load],
    changes: Mapping[str, Any],
    precision: str | None,
    on_cpu: bool,
) -> int:
    largest = changes.get("train_batch_size")
    if largest is not None:
        loads = [Load(load.width_px, load.height_px, min(load.batch_size, largest)) for load in loads]
    precision = changes.get("mixed_precision", precision)
    return memory_needed(changed(config, changes), facts, loads, precision=precision, on_cpu=on_cpu).total_bytes


def changed(config: Config, changes: Mapping[str, Any]) -> Config:
    """The settings with other values, by their flat names. The values are not validated."""
    homes = section_of()
    sections = {homes[key] for key in changes}
    updates = {
        name: vars(config)[name].model_copy(update={key: value for key, value in changes.items() if homes[key] == name})
        for name in sections
    }
    return config.model_copy(update=updates)


def small_card_bytes(config: Config, side_px: int, batch: int) -> tuple[int, int] | None:
    """What an adapter on the quantised base takes, and what full rank with little beside the weights does, in bytes.

    None for a model of which nothing is known. An adapter's own weights are no part of it.
    """
    name = config.model.pretrained_model_name_or_path
    try:
        folder = fetch.local_folder(name)
        facts = known(name) if folder is None else from_folder(folder, name)
    except UserError:  # told where the model is looked for
        return None
    if facts is None:
        return None
    loads = [Load(side_px, side_px, batch)]
    ways = ({**ON_QUANTISED}, {**FULL_RANK, "optimizer_config": None})
    adapter, whole = (memory_needed(changed(config, way), facts, loads).total_bytes for way in ways)
    return adapter, whole


# ---- settings for somebody who has none yet ----


def recommend(
    facts: ModelFacts, device_bytes: int, width_px: int, height_px: int, *, use_ema: bool, on_cpu: bool = False
) -> dict[str, Any]:
    """Settings that fit a device with a little to spare: as exact as possible, then as fast as possible.

    fp32 masters before bf16 weights with Kahan summation, the EMA as wished for as long as anything fits with it,
    a large batch before blocks that are not recomputed; last of all, for small cards, gradients that are released and
    states of 8 bits. on_cpu: device_bytes is main memory, nothing is cast.
    Raises UserError when nothing fits, with the smallest need.
    """
    room = device_bytes * (1 - SPARE)
    smallest: int | None = None
    for settings in _candidates(facts, use_ema, on_cpu):
        need = _need_of(settings, facts, Load(width_px, height_px, settings["train_batch_size"])).total_bytes
        if need <= room:
            return settings
        smallest = need if smallest is None else min(smallest, need)
    what = (
        f"full-rank training of {facts.name} on pictures of {width_px}x{height_px} px needs about "
        f"{(smallest or 0) / 1e9:.1f} GB; the device has {device_bytes / 1e9:.1f} GB, of which "
        f"{100 * SPARE:.0f} % are left free"
    )
    raise UserError(Problem("memory", what, "take a smaller model or smaller pictures, or a device with more memory"))


def _candidates(facts: ModelFacts, use_ema: bool, on_cpu: bool) -> Iterator[dict[str, Any]]:
    """All settings that could be recommended, the best first."""
    precisions = ["fp32"] if on_cpu else ["fp32", "bf16"]
    averages = [True, False] if use_ema else [False]
    batches = [size for size in range(TARGET_BATCH, 0, -1) if TARGET_BATCH % size == 0]
    for average in averages:
        for dtype in precisions:
            for batch in batches:
                for interval in (0, *(n for n in (4, 3, 2, 1) if n <= facts.layers)):
                    yield {
                        "train_batch_size": batch,
                        "gradient_accumulation_steps": TARGET_BATCH // batch,
                        "gradient_checkpointing": interval > 0,
                        "gradient_checkpointing_interval": max(1, interval),
                        "weights_dtype": dtype,
                        "mixed_precision": "no" if on_cpu else "bf16",
                        "optimizer": "optimi-adamw",
                        "use_ema": average,
                    }
    if not on_cpu:
        yield from _frugal(facts)


# What small cards change, the least harm first: gradients released (a second pass, since the norm is clipped), states
# of 8 bits, both. Released gradients cannot be accumulated.
_FRUGAL: tuple[dict[str, Any], ...] = (
    {"gradient_accumulation_steps": 1, "optimizer_release_gradients": True, "optimizer": "optimi-adamw"},
    {"gradient_accumulation_steps": TARGET_BATCH, "optimizer": "bnb-adamw8bit"},
    {"gradient_accumulation_steps": 1, "optimizer_release_gradients": True, "optimizer": "bnb-adamw8bit"},
)


def _frugal(facts: ModelFacts) -> Iterator[dict[str, Any]]:
    """Settings for cards on which nothing else fits."""
    for changes in _FRUGAL:
        for interval in (n for n in (4, 3, 2, 1) if n <= facts.layers):
            yield {
                "train_batch_size": 1,
                "gradient_checkpointing": True,
                "gradient_checkpointing_interval": interval,
                "weights_dtype": "bf16",
                "mixed_precision": "bf16",
                "use_ema": False,
                **changes,
            }


def _need_of(settings: Mapping[str, Any], facts: ModelFacts, load: Load) -> MemoryNeed:
    """What training takes with these settings and defaults for the rest."""
    return memory_needed(changed(default_config(), settings), facts, [load])


def default_config() -> Config:
    """The defaults of every setting; the two that have none get a name of nothing."""
    model, data = {"pretrained_model_name_or_path": "-"}, {"data_backend_config": "-"}
    others = {name: {} for name in Config.model_fields if name not in ("model", "data")}
    return Config.model_validate({"model": model, "data": data, **others})
