"""A run's heaviest moments, rehearsed before step 1, and what is told when memory runs out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from sana_tune.caching import Caches
from sana_tune.data.buckets import trained
from sana_tune.data.records import Role
from sana_tune.drawing import picture_at_worst
from sana_tune.errors import Problem
from sana_tune.log import log
from sana_tune.memory import GIB, Load, reliefs
from sana_tune.model.instruction import MAX_TOKENS
from sana_tune.plan import changes_told, human_bytes, loads_of
from sana_tune.prepare import Prepared, identity_of
from sana_tune.progress import Progress
from sana_tune.roles import priced
from sana_tune.train import folders

if TYPE_CHECKING:
    import torch

    from sana_tune.train.rehearsal import Heaviest
    from sana_tune.train.step import Parts


# ---- the rehearsal ----


def rehearsal_of(prepared: Prepared, caches: Caches, parts: Parts) -> Callable[[Progress], None]:
    """What is done before the first step of this start; nothing where no rehearsal is wanted or no step is left."""
    wanted, device = prepared.config.train.rehearsal, parts.accelerator.device
    if wanted == "off" or (wanted == "auto" and device.type == "cpu") or not prepared.plan.steps_left:
        return lambda progress: None

    def rehearsal(progress: Progress) -> None:
        from sana_tune.train.rehearsal import rehearse

        heaviest = heaviest_of(prepared, caches, parts)
        load = max(heaviest.loads.values(), key=_size)
        with out_of_memory(prepared, device, "the rehearsal before the first step"):
            taken = rehearse(parts, heaviest, progress.step)
        memory = "" if taken.peak_bytes is None else f" and {human_bytes(taken.peak_bytes)} of memory at most"
        picture = " and a validation picture" if heaviest.draw is not None else ""
        log.info(
            "Rehearsed the largest micro-batch (%d of %dx%d px, %d text tokens)%s: it took %.1f s%s",
            load.batch_size, load.width_px, load.height_px, heaviest.tokens, picture, taken.duration_s, memory,
        )  # fmt: skip

    return rehearsal


def heaviest_of(prepared: Prepared, caches: Caches, parts: Parts) -> Heaviest:
    """The heaviest moments of a run."""
    from sana_tune.train.rehearsal import Heaviest

    config, memory = prepared.config, prepared.plan.memory
    return Heaviest(
        loads=largest_loads(prepared, by_role=parts.base is not None),
        factor=prepared.facts.vae_factor,
        tokens=longest_text(prepared, caches),
        accumulation=config.train.gradient_accumulation_steps,
        masked=bool(prepared.loaded.masks),
        states_bytes=memory.need.optimizer_bytes if memory is not None else 0,
        draw=picture_at_worst(prepared, parts),
    )


def largest_loads(prepared: Prepared, *, by_role: bool) -> dict[Role, Load]:
    """The largest micro-batch of each role; by_role: whether regularisation data takes another way than the rest."""
    buckets = trained(prepared.buckets)
    kinds = {role: [bucket for bucket in buckets if bucket.role is role] for role in (Role.TRAIN, Role.REGULARISE)}
    groups = kinds if by_role else {Role.TRAIN: list(buckets)}
    return {role: max(loads_of(group), key=_size) for role, group in groups.items() if group}


def _size(load: Load) -> int:
    return load.width_px * load.height_px * load.batch_size


def longest_text(prepared: Prepared, caches: Caches) -> int:
    """Tokens of the longest caption, or all that there may be where not every one is encoded yet."""
    longest = 1
    for name, captions in prepared.captions_by_cache.items():
        for key in captions:
            shape = caches.texts[name].shape(key)
            longest = max(longest, MAX_TOKENS if shape is None else shape[0])
    return longest


# ---- out of memory ----


@contextmanager
def out_of_memory(prepared: Prepared, device: torch.device, doing: str) -> Iterator[None]:
    """Where memory runs out in here, one message: what was expected, what there is, and what each setting frees."""
    from sana_tune.train.shortage import told

    with told(lambda error: problem_of(prepared, device, doing, error)):
        yield


def problem_of(prepared: Prepared, device: torch.device, doing: str, error: str) -> Problem:
    """What is told of memory that ran out while `doing`."""
    what = f"there was not enough memory for {doing}: {error}; {_expected(prepared, device)}"
    held = folders.list_complete(prepared.output.root)
    lines = [f"  {human_bytes(freed):>9}  {changes}" for changes, freed in _freed(prepared, device, bool(held))]
    if lines:
        advice = ["each of these frees alone about", *lines, "or use smaller pictures, or a device with more memory"]
    else:
        advice = ["use smaller pictures or a smaller model, or a device with more memory"]
    if prepared.drawn:
        advice.append("smaller validation pictures (validation_resolution), or none, free what drawing takes")
    if held:
        advice.append(f"{held[-1].path.name} is whole: started again, the run goes on from it")
    return Problem("memory", what, "\n    ".join(advice))


def _expected(prepared: Prepared, device: torch.device) -> str:
    """What the plan expected and what there is, in words."""
    from sana_tune.train.shortage import in_use

    memory = prepared.plan.memory
    said = [] if memory is None else [f"the plan expected about {human_bytes(memory.need.total_bytes)}"]
    found = in_use(device)
    if found is not None:
        said.append(
            f"the device has {human_bytes(found.total_bytes)}, of which this run took {human_bytes(found.peak_bytes)}"
        )
        if found.others_bytes > GIB:  # CUDA's own context of this run is among them
            said.append(f"other programs hold {human_bytes(found.others_bytes)}: end them, if they are yours")
    elif memory is not None and memory.device is not None:
        said.append(f"{memory.device.name} has {human_bytes(memory.device.total_bytes)}")
    return "; ".join(said)


def _freed(prepared: Prepared, device: torch.device, resumed: bool) -> list[tuple[str, int]]:
    """Settings, each alone, and the bytes it frees, the most first. resumed: those of the checkpoint stay."""
    from sana_tune.drawing import precision

    fixed = set(identity_of(prepared.config)) if resumed else set()
    found = reliefs(
        priced(prepared.config, prepared.buckets),
        prepared.facts,
        loads_of(trained(prepared.buckets)),
        precision=precision(prepared.loaded),
        on_cpu=device.type == "cpu",
        fixed=fixed,
    )
    return [(changes_told(relief.changes), relief.freed_bytes) for relief in found]
