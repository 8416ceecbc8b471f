"""Optimizers by name, their parameter groups, Kahan's remainders, and their states in and out of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import optimi
import torch
from optimi.optimizer import OptimiOptimizer
from optimi.utils import HAS_TRITON
from torch import Tensor, nn

from sana_tune.config.optimizers import OPTIMIZER_FACTS, keeps_bf16, options_of
from sana_tune.log import log
from sana_tune.train.own import AdamWBf16, Came
from sana_tune.train.rounding import Rounded
from sana_tune.train.sharding import is_split, like

# Sana's tables that are added to modulations: biases of more than one dimension.
_TABLES = ("scale_shift_table",)


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]]) -> list[dict[str, Any]]:
    """The trained parameters in two groups: weights of layers, and norms, biases and tables, which never decay."""
    decays: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in named:
        if parameter.requires_grad:
            bias = parameter.ndim <= 1 or name.endswith(_TABLES)
            (others if bias else decays).append(parameter)
    groups: list[dict[str, Any]] = [{"params": decays}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(
    name: str,
    params: Iterable[nn.Parameter] | Sequence[dict[str, Any]],
    lr: float,
    betas: tuple[float | None, float | None] = (None, None),
    weight_decay: float | None = None,
    eps: float | None = None,
    *,
    options: Mapping[str, Any] | None = None,
    release: bool = False,
    seed: int = 0,
) -> torch.optim.Optimizer:
    """The optimizer of that name over parameters, or over the groups of `parameter_groups`.

    None = the optimizer's default (config.optimizers). options: of `optimizer_config`. release: single parameters are
    to be updated. seed: of stochastic rounding, which is put around the update of bf16 weights where the optimizer
    itself keeps nothing. Raises KeyError for a name that is not in config.choices.OPTIMIZERS.
    """
    facts = OPTIMIZER_FACTS[name]
    given = {"beta1": betas[0], "beta2": betas[1], "weight_decay": weight_decay, "eps": eps}
    chosen = {**options_of(name), **{key: value for key, value in given.items() if value is not None}}
    chosen |= options or {}
    wanted: list[Any] = [part for part in params if isinstance(part, dict) or part.requires_grad]
    first: nn.Parameter = wanted[0]["params"][0] if isinstance(wanted[0], dict) else wanted[0]
    settings = _settings(name, chosen, lr)
    rounded = first.dtype == torch.bfloat16 and facts.keeps == "stochastic rounding"
    if name.startswith("optimi-"):
        optimizer = _optimi(name, wanted, settings, release=release or rounded)
    elif name.startswith("bnb-"):
        optimizer = _bitsandbytes(name, wanted, settings, on_cpu=first.device.type == "cpu")
    else:
        optimizer = _others(name, wanted, settings, first.dtype)
    return Rounded(optimizer, seed) if rounded else optimizer


def _settings(name: str, chosen: Mapping[str, Any], lr: float) -> dict[str, Any]:
    """The arguments of the optimizer's class."""
    count = len(OPTIMIZER_FACTS[name].betas)
    betas = {"betas": tuple(chosen[f"beta{place}"] for place in range(1, count + 1))} if count else {}
    rest = {key: value for key, value in chosen.items() if key not in ("beta1", "beta2", "beta3")}
    return {"lr": lr, **betas, **rest}


def _optimi(name: str, wanted: list[Any], settings: dict[str, Any], release: bool) -> torch.optim.Optimizer:
    names = {"adamw": "AdamW", "stableadamw": "StableAdamW", "radam": "RAdam", "sgd": "SGD"}
    short = name.removeprefix("optimi-")
    kind: Any = SeededAdan if short == "adan" else vars(optimi)[names.get(short, short.capitalize())]
    # None: for bf16 weights alone, whatever the class's own default is.
    settings["kahan_sum"] = None if OPTIMIZER_FACTS[name].keeps == "kahan" and keeps_bf16(name, settings) else False
    optimizer = kind(wanted, **settings, gradient_release=release)
    optimizer.state.clear()  # with gradient_release: the groups, which have no place in a state (train.single)
    for group in optimizer.param_groups:
        if release or any(map(is_split, group["params"])):
            group["triton"] = _triton_runs(group["params"])
    return optimizer


def _bitsandbytes(name: str, wanted: list[Any], settings: dict[str, Any], *, on_cpu: bool) -> torch.optim.Optimizer:
    from bitsandbytes import optim

    paged, short = name.endswith("-paged"), name.removeprefix("bnb-").removesuffix("-paged")
    if paged and on_cpu:
        log.warning("%s: on a CPU there is nothing to page; %s is used", name, name.removesuffix("-paged"))
    short, eight = short.removesuffix("8bit"), short.endswith("8bit")
    title = {"adam": "Adam", "adamw": "AdamW", "lion": "Lion", "ademamix": "AdEMAMix"}[short]
    kind: Any = vars(optim)[f"{'Paged' if paged and not on_cpu else ''}{title}{'8bit' if eight else ''}"]
    for key in ("t_alpha", "t_beta3"):
        if key in settings:
            settings[key] = settings[key] or None
    return kind(wanted, **settings)


def _others(name: str, wanted: list[Any], settings: dict[str, Any], dtype: torch.dtype) -> torch.optim.Optimizer:
    if name == "came":
        return Came(wanted, **settings)
    if name == "adamw_bf16":
        return AdamWBf16(wanted, **settings, state_dtype=dtype)
    kinds = {"adamw": "AdamW", "adam": "Adam", "sgd": "SGD", "adafactor": "Adafactor"}
    kind: Any = vars(torch.optim)[kinds[name.removeprefix("torch-")]]
    return kind(wanted, **settings) if name == "torch-adafactor" else kind(wanted, **settings, fused=True)


class SeededAdan(optimi.Adan):
    """optimi's Adan, whose states begin with the first gradient; Kahan's seed waits for it in the state."""

    def _init_state(self, group: Any, state: Any, param: Any, gradient_release: bool = False) -> None:
        seed = state.pop("kahan_seed", None)
        super()._init_state(group, state, param, gradient_release)
        if seed is not None:
            state["kahan_comp"] = seed


def seed_kahan(optimizer: torch.optim.Optimizer, params: Sequence[nn.Parameter], exact: Sequence[Tensor]) -> None:
    """Start Kahan's buffers with what rounding to bf16 lost: kahan_comp = exact - parameter.

    params: the bf16 parameters; exact: the same weights in fp32, in the same order. An optimizer that is not optimi's
    has no such buffers and is left alone. optimi makes all of a parameter's state or none (a lone kahan_comp is a
    KeyError), so all is made here, by its own function.
    """
    if not isinstance(optimizer, OptimiOptimizer):
        return
    weights = {id(parameter): full for parameter, full in zip(params, exact, strict=True)}
    for group in optimizer.param_groups:
        group["kahan_sum"] = True
        group["triton"] = _triton_runs(group["params"])  # what some states are made of depends on it
        for parameter in group["params"]:
            full, state = weights[id(parameter)].to(parameter.device), optimizer.state[parameter]
            lost = (full - parameter.float()).to(parameter.dtype)
            if isinstance(optimizer, SeededAdan):
                state["kahan_seed"] = lost
                continue
            optimizer._init_state(group, state, parameter)  # pyright: ignore[reportAttributeAccessIssue]
            state["kahan_comp"] = lost


# Settings by which optimizers are told apart.
_MARKS = ("betas", "beta1", "beta3", "momentum", "kahan_sum", "clip_threshold", "t_alpha", "amsgrad", "d")
# What belongs to the course of a run; every other entry of a group is a setting, and today's holds.
_COURSE = ("step", "setup", "kahan_sum", "loss_scale")


@torch.no_grad()
def load_optimizer_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load `state_dict()`'s value, also one from another kind of device. The state is taken over, not copied.

    Every tensor keeps its dtype (torch's own loading would round fp32 states to the weights' bf16). Settings of the
    groups stay what they are now, so that a changed weight decay takes effect. Raises ValueError when the parameters
    do not match.
    """
    saved_groups = state["param_groups"]
    sizes = [[len(group["params"]) for group in groups] for groups in (saved_groups, optimizer.param_groups)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"its groups hold {sizes[0]} parameters, this run's {sizes[1]}")
    marks = [{key for key in _MARKS if key in group} for group in (saved_groups[0], optimizer.param_groups[0])]
    if marks[0] != marks[1]:
        raise ValueError(f"it has {', '.join(sorted(marks[0]))}, this run's {', '.join(sorted(marks[1]))}")
    inner = optimizer.inner if isinstance(optimizer, Rounded) else optimizer
    moved: dict[int, Tensor] = {}  # a map that all parameters share is one tensor here too
    for saved, group in zip(saved_groups, optimizer.param_groups, strict=True):
        for number, parameter in zip(saved["params"], group["params"], strict=True):
            held = _unwrapped(state["state"].get(number, {}))
            inner.state[parameter] = {name: _moved(name, value, parameter, moved) for name, value in held.items()}
        group.update({key: saved[key] for key in _COURSE if key in saved})
    _fit_device(inner)


def _unwrapped(held: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter's state; bitsandbytes puts its own part of it into a mapping of its own."""
    flat: dict[str, Any] = {}
    for name, value in held.items():
        flat.update(value if isinstance(value, dict) else {name: value})
    return flat


def _moved(name: str, value: Any, parameter: nn.Parameter, moved: dict[int, Tensor]) -> Any:
    if not isinstance(value, Tensor) or (name == "step" and value.dtype == torch.int32):  # optimi's stays on the CPU
        return value
    device = parameter.device
    if id(value) not in moved:
        moved[id(value)] = like(parameter, value.to(device))
    return moved[id(value)]


def _fit_device(optimizer: torch.optim.Optimizer) -> None:
    """What depends on the device: optimi's kernels and placeholders, steps of torch's, bitsandbytes' pages."""
    for group in optimizer.param_groups:
        if isinstance(optimizer, OptimiOptimizer):
            group["triton"] = _triton_runs(group["params"])
        for parameter in group["params"]:
            held = optimizer.state[parameter]
            if isinstance(optimizer, OptimiOptimizer):
                _fit_optimi(group, held, parameter)
            elif optimizer.defaults.get("fused") is None and isinstance(held.get("step"), Tensor):
                held["step"] = held["step"].cpu()  # only the fused kernels take a step on the device
            _page(optimizer, held, parameter)


def _fit_optimi(group: Mapping[str, Any], held: dict[str, Any], parameter: nn.Parameter) -> None:
    """optimi's Triton kernels are given a tensor where others are given None: a placeholder of one element."""
    if "kahan_comp" in held and not _is_kahan(held["kahan_comp"], parameter):
        held["kahan_comp"] = _placeholder(parameter, torch.uint8) if group["triton"] else None
    if "momentum" in group and not group["momentum"] and "exp_avg" in held:
        held["exp_avg"] = _placeholder(parameter, parameter.dtype) if group["triton"] else None
    if "eps_sq" in held and group["triton"]:
        held.setdefault("mean_square", _placeholder(parameter, torch.float32))


def _page(optimizer: torch.optim.Optimizer, held: dict[str, Any], parameter: nn.Parameter) -> None:
    """Move large states of a paged optimizer into memory that CUDA pages, where they were before they were saved."""
    if not vars(optimizer).get("is_paged") or parameter.device.type != "cuda" or parameter.numel() < PAGED_FROM:
        return
    from bitsandbytes import functional

    for name in ("state1", "state2"):
        if name in held:
            tensor: Tensor = held[name]
            pages = functional.get_paged(*tensor.shape, dtype=tensor.dtype, device=parameter.device)
            pages.copy_(tensor)
            vars(optimizer)["page_mng"].paged_tensors.append(pages)
            held[name] = pages


PAGED_FROM = 100_000  # elements; bitsandbytes' own limit


def _triton_runs(params: Sequence[Tensor]) -> bool:
    """Whether optimi's kernel is used. It takes a tensor for what lies in memory, of which a split one is a part."""
    return bool(HAS_TRITON and params and params[0].is_cuda and not is_split(params[0]))


def _is_kahan(held: Tensor | None, parameter: Tensor) -> bool:
    return held is not None and held.shape == parameter.shape and parameter.dtype in (torch.bfloat16, torch.float16)


def _placeholder(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(1, dtype=dtype, device=parameter.device)
