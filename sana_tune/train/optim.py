"""Optimizers by name, and the learning rate as a pure function of the step (a resume needs no state of it)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sana_tune.config.choices import LR_END_DEFAULTS, LR_SCHEDULERS, OPTIMIZER_DEFAULTS


def build_optimizer(
    name: str,
    params: Iterable[nn.Parameter],
    lr: float,
    betas: tuple[float | None, float | None] = (None, None),
    weight_decay: float | None = None,
    eps: float | None = None,
) -> torch.optim.Optimizer:
    """The optimizer of that name over `params`. None = the optimizer's default (config.choices).

    `optimi-adamw` uses Kahan summation for bf16 weights, and its Triton kernels on CUDA.
    Raises KeyError for a name that is not in config.choices.OPTIMIZERS.
    """
    defaults = OPTIMIZER_DEFAULTS[name]
    given = {"beta1": betas[0], "beta2": betas[1], "weight_decay": weight_decay, "eps": eps}
    chosen = {key: defaults[key] if value is None else value for key, value in given.items()}
    both = (chosen["beta1"], chosen["beta2"])
    wanted = [parameter for parameter in params if parameter.requires_grad]
    if name == "optimi-adamw":
        import optimi

        return optimi.AdamW(wanted, lr, betas=both, weight_decay=chosen["weight_decay"], eps=chosen["eps"])
    if name == "torch-adamw":
        return torch.optim.AdamW(
            wanted, lr, betas=both, weight_decay=chosen["weight_decay"], eps=chosen["eps"], fused=True
        )
    raise KeyError(name)


def seed_kahan(optimizer: torch.optim.Optimizer, params: Sequence[nn.Parameter], exact: Sequence[Tensor]) -> None:
    """Start Kahan's buffers with what rounding to bf16 lost: kahan_comp = exact - parameter.

    params: the bf16 parameters; exact: the same weights in fp32, in the same order.
    optimi makes all of a parameter's state or none (a lone kahan_comp is a KeyError), so all is made here.
    """
    for group in optimizer.param_groups:
        group["kahan_sum"] = True
    for parameter, full in zip(params, exact, strict=True):
        optimizer.state[parameter].update(
            exp_avg=torch.zeros_like(parameter),
            exp_avg_sq=torch.zeros_like(parameter),
            kahan_comp=(full.to(parameter.device) - parameter.float()).to(parameter.dtype),
        )


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load `state_dict()`'s value, also one from another kind of device.

    optimi remembers whether it ran Triton kernels, and holds a placeholder byte per parameter for them; both
    are set to what this device needs. Raises ValueError when the parameters do not match.
    """
    optimizer.load_state_dict(state)
    for group in optimizer.param_groups:
        if not group.get("setup"):
            continue
        group["triton"] = _triton_runs(group["params"])
        for parameter in group["params"]:
            held = optimizer.state[parameter]
            if "kahan_comp" in held and not _is_kahan(held["kahan_comp"], parameter):
                held["kahan_comp"] = _placeholder(parameter) if group["triton"] else None


def _triton_runs(params: Sequence[Tensor]) -> bool:
    from optimi.utils import HAS_TRITON

    return bool(HAS_TRITON and params and params[0].is_cuda)


def _is_kahan(held: Tensor | None, parameter: Tensor) -> bool:
    return held is not None and held.shape == parameter.shape and parameter.dtype in (torch.bfloat16, torch.float16)


def _placeholder(parameter: Tensor) -> Tensor:
    return torch.zeros(1, dtype=torch.uint8, device=parameter.device)


def lr_at(name: str, step: int, total_steps: int, warmup: int, *, end: float = 0.0, power: float = 1.0) -> float:
    """The factor on the peak learning rate for the step that follows `step` done ones, 0..1.

    Warm-up rises 1/w, 2/w … 1 over the first w steps (never 0: no step is for nothing). Over the t = 0..1 of the
    steps that are left, `linear` falls as 1 - t, `cosine` as (1 + cos πt) / 2 and `polynomial` as (1 - t)^power; t is
    1 right after the last step. `cosine` and `polynomial` fall to `end`, a factor too; `linear` falls to 0.
    Raises KeyError for an unknown name.
    """
    if name not in LR_SCHEDULERS:
        raise KeyError(name)
    if step < warmup:
        return (step + 1) / warmup
    if name in ("constant", "constant_with_warmup"):
        return 1.0
    done = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    if name == "linear":
        return 1.0 - done
    left = (1.0 - done) ** power if name == "polynomial" else 0.5 * (1.0 + math.cos(math.pi * done))
    return end + (1.0 - end) * left


@dataclass(frozen=True)
class Schedule:
    """The learning rate over a run; no state but its settings.

    end_lr: where `cosine` and `polynomial` end; None = the schedule's default. power: of `polynomial`.
    """

    name: str
    peak_lr: float
    total_steps: int
    warmup_steps: int = 0
    end_lr: float | None = None
    power: float = 1.0

    def lr(self, step: int) -> float:
        """Learning rate of the step that follows `step` done ones."""
        end_lr = LR_END_DEFAULTS.get(self.name, 0.0) if self.end_lr is None else self.end_lr
        end = end_lr / self.peak_lr
        return self.peak_lr * lr_at(self.name, step, self.total_steps, self.warmup_steps, end=end, power=self.power)

    def apply(self, optimizer: torch.optim.Optimizer, step: int) -> float:
        """Set that rate on every group of the optimizer, and return it."""
        rate = self.lr(step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        return rate
