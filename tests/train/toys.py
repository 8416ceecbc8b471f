"""A tiny real Sana with everything around it that training needs, and batches that depend on position alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import SanaTransformer2DModel

from sana_tune.data.batch import Batch
from sana_tune.data.order import MicroBatch
from sana_tune.data.records import Role
from sana_tune.progress import Every
from sana_tune.schedule import Schedule
from sana_tune.train.device import make_accelerator
from sana_tune.train.ema import Ema, NoEma
from sana_tune.train.optim import build_optimizer, parameter_groups, seed_kahan
from sana_tune.train.release import Release
from sana_tune.train.step import Parts

CHANNELS, TEXT_WIDTH = 4, 16


def tiny_transformer(seed: int = 0, **changes: Any) -> SanaTransformer2DModel:
    """A Sana of two blocks and about 30,000 parameters."""
    torch.manual_seed(seed)
    config = {
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "num_attention_heads": 4,
        "attention_head_dim": 8,
        "num_layers": 2,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 16,
        "cross_attention_dim": 32,
        "caption_channels": TEXT_WIDTH,
        "sample_size": 4,
    }
    return SanaTransformer2DModel(**{**config, **changes})


@dataclass(frozen=True)
class Course:
    """The few numbers of a plan that the loop reads."""

    total_steps: int
    steps_per_epoch: float = 3.0
    save_every: Every = Every(0)
    validate_every: Every = Every(0)
    evaluate_every: Every = Every(0)

    def epoch_after(self, step: int) -> float:
        return step / self.steps_per_epoch


class ToyBatches:
    """Two datasets of different size take turns; every tensor follows from the micro-batch's number.

    bad_steps: steps whose latents are not finite.
    """

    def __init__(self, accumulation: int = 1, bad_steps: tuple[int, ...] = ()):
        self.accumulation = accumulation
        self.bad_steps = bad_steps
        self.closed = 0

    def steps(self, first_step: int, total_steps: int) -> Iterator[list[tuple[MicroBatch, Batch]]]:
        try:
            for step in range(first_step, total_steps):
                yield [self.micro_batch(step, step * self.accumulation + turn) for turn in range(self.accumulation)]
        finally:
            self.closed += 1

    def micro_batch(self, step: int, index: int) -> tuple[MicroBatch, Batch]:
        generator = torch.Generator().manual_seed(1000 + index)
        height, width, size, tokens = (4, 4, 2, 5) if index % 3 else (2, 6, 3, 3)
        latents = torch.randn(size, CHANNELS, height, width, generator=generator)
        if step in self.bad_steps:
            latents[0, 0, 0, 0] = float("nan")
        text = torch.randn(size, tokens, TEXT_WIDTH, generator=generator)
        mask = torch.ones(size, tokens, dtype=torch.int64)
        mask[0, tokens - 1] = 0
        ids = tuple(f"toy/{index}-{sample}" for sample in range(size))
        micro = MicroBatch(index, 0, 0, tuple(range(size)))
        return micro, Batch(latents, text, mask, None, Role.TRAIN, ids)


def make_parts(
    *,
    optimizer: str = "optimi-adamw",
    lr: float = 1e-3,
    scheduler: str = "constant",
    total_steps: int = 20,
    ema_decay: float | None = 0.9,
    ema_interval: int = 1,
    dtype: torch.dtype = torch.float32,
    mixed_precision: str = "no",
    seed: int = 7,
    max_grad_norm: float = 0.1,
    clip_method: Any = "norm",
    transformer: SanaTransformer2DModel | None = None,
    base: SanaTransformer2DModel | None = None,
    regularised: bool = False,
    ema_options: dict[str, Any] | None = None,
    options: dict[str, Any] | None = None,
    release: bool = False,
    **recipe: Any,
) -> Parts:
    """Parts as run.py builds them, on the CPU. recipe: levels, objective, perturbation."""
    model = transformer if transformer is not None else tiny_transformer()
    exact = [parameter.data for parameter in model.parameters()]
    if dtype != torch.float32:
        model.to(dtype)
    built = build_optimizer(
        optimizer, parameter_groups(model.named_parameters()), lr, options=options, release=release, seed=seed
    )
    if dtype == torch.bfloat16:
        seed_kahan(built, list(model.parameters()), exact)
    by_norm = max_grad_norm * (clip_method == "norm")
    trained = list(model.parameters())
    ema = (
        NoEma() if ema_decay is None else Ema(model.named_parameters(), ema_decay, ema_interval, **(ema_options or {}))
    )
    return Parts(
        accelerator=make_accelerator("cpu", mixed_precision),
        transformer=model,
        optimizer=built,
        schedule=Schedule(scheduler, lr, total_steps, warmup_steps=2),
        ema=ema,
        shift_at=lambda tokens: 3.0 if tokens == 16 else 2.0,
        seed=seed,
        max_grad_norm=max_grad_norm,
        clip_method=clip_method,
        base=base,
        regularised=regularised,
        release=Release(built, trained, max_norm=by_norm, max_value=max_grad_norm - by_norm) if release else None,
        **recipe,
    )


def state_of(parts: Parts) -> dict[str, Any]:
    """Copies of everything a checkpoint holds, flat: name → tensor or number."""
    found: dict[str, Any] = {f"weights/{name}": tensor.clone() for name, tensor in parts.bare.state_dict().items()}
    found |= {f"ema/{name}": tensor.clone() for name, tensor in parts.ema.state_dict().items()}
    state = parts.optimizer.state_dict()
    for number, values in state["state"].items():
        for key, value in values.items():  # bitsandbytes has a mapping in the mapping
            inner = value if isinstance(value, dict) else {"": value}
            found |= {f"optimizer/{number}/{key}/{part}": _copy(held) for part, held in inner.items()}
    for number, group in enumerate(state["param_groups"]):
        found |= {f"group/{number}/{key}": _copy(value) for key, value in group.items()}
    return found


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The names whose values are not the same bytes."""
    names = one.keys() | other.keys()
    return sorted(name for name in names if not _same(one.get(name), other.get(name)))


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        if one.dtype != other.dtype or one.shape != other.shape:
            return False
        return one.contiguous().view(-1).view(torch.uint8).equal(other.contiguous().view(-1).view(torch.uint8))
    return type(one) is type(other) and one == other


def files_of(folder: Path) -> dict[str, bytes]:
    """Relative path → content of every file below a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
