"""Optimizers of our own: AdamW for bf16 weights with stochastically rounded states, and CAME."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from sana_tune.train.rounding import round_stochastically
from sana_tune.train.single import Group, PerParameter


class AdamWBf16(PerParameter):
    """AdamW (Loshchilov & Hutter 2019) whose moments are kept in `state_dtype`, None = that of the weights.

    bf16 moments are rounded stochastically: with beta2 = 0.999 a step changes the second moment by at most 2^-10 of
    its size, which rounding to the nearest (2^-9) would never add.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        state_dtype: torch.dtype | None = None,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.state_dtype = state_dtype

    def update_one(self, group: Group, parameter: nn.Parameter, generator: torch.Generator | None) -> None:
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        if not state:
            kind = self.state_dtype or parameter.dtype
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(parameter, dtype=kind)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=kind)
        state["step"] += 1
        (beta1, beta2), lr = group["betas"], group["lr"]
        first, second = state["exp_avg"].float(), state["exp_avg_sq"].float()
        first.lerp_(gradient, 1 - beta1)
        second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        for name, moment in (("exp_avg", first), ("exp_avg_sq", second)):
            if state[name] is not moment:
                state[name].copy_(round_stochastically(moment, generator))
        if group["weight_decay"]:
            parameter.mul_(1 - lr * group["weight_decay"])
        size = (second / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])
        parameter.addcdiv_(first, size, value=-lr / (1 - beta1 ** state["step"]))


class Came(PerParameter):
    """CAME (Luo et al. 2023, arXiv 2307.02047, algorithm 2): Adafactor's factored second moment, a first moment, and
    a factored estimate of how much the update can be trusted.

    As NVIDIA trains Sana with it, linear layers and 1x1 convolutions are factored (the latter as matrices); all other
    parameters have a whole second moment and no measure of trust. States are fp32.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        eps: tuple[float, float] = (1e-30, 1e-16),
        clip_threshold: float = 1.0,
        weight_decay: float = 0.0,
    ):
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "clip_threshold": clip_threshold,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults)

    def update_one(self, group: Group, parameter: nn.Parameter, generator: torch.Generator | None) -> None:
        assert parameter.grad is not None
        state, weight = self.state[parameter], _matrix(parameter)
        gradient = _matrix(parameter.grad)
        if not state:
            _begin(state, gradient)
        (beta1, beta2, beta3), lr = group["betas"], group["lr"]
        update = _whitened(state, "sq", gradient.square().add_(group["eps"][0]), beta2).mul_(gradient)
        # As a tensor: no wait for the device.
        update.div_((_rms(update) / group["clip_threshold"]).clamp_(min=1.0))
        mean = state["exp_avg"].lerp_(update, 1 - beta1)
        if "exp_avg_res_row" in state:
            distrust = (update - mean).square_().add_(group["eps"][1])
            step = _whitened(state, "res", distrust, beta3).mul_(mean)
        else:
            step = mean
        if group["weight_decay"]:
            weight.mul_(1 - lr * group["weight_decay"])
        weight.add_(step, alpha=-lr)


def _matrix(tensor: Tensor) -> Tensor:
    """A 1x1 convolution's weight [O, I, 1, 1] as the matrix [O, I] (a view); others as they are."""
    return tensor[:, :, 0, 0] if tensor.ndim == 4 and tensor.shape[2:] == (1, 1) else tensor


def _begin(state: dict[str, Any], gradient: Tensor) -> None:
    state["exp_avg"] = torch.zeros_like(gradient)
    if gradient.ndim == 2:
        for kind in ("sq", "res"):
            state[f"exp_avg_{kind}_row"] = gradient.new_zeros(gradient.shape[0])
            state[f"exp_avg_{kind}_col"] = gradient.new_zeros(gradient.shape[1])
    else:
        state["exp_avg_sq"] = torch.zeros_like(gradient)


def _whitened(state: dict[str, Any], kind: str, squares: Tensor, beta: float) -> Tensor:
    """1 / sqrt of the moving average of `squares`: of rows and columns where the state is factored."""
    if f"exp_avg_{kind}" in state:
        return state[f"exp_avg_{kind}"].lerp_(squares, 1 - beta).rsqrt()
    row = state[f"exp_avg_{kind}_row"].lerp_(squares.mean(1), 1 - beta)
    column = state[f"exp_avg_{kind}_col"].lerp_(squares.mean(0), 1 - beta)
    return torch.outer((row / row.mean()).rsqrt(), column.rsqrt())


def _rms(tensor: Tensor) -> Tensor:
    return tensor.norm(2) / tensor.numel() ** 0.5
