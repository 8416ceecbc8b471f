"""The optimizers by name: what each one is, its defaults, its further options, and the memory of its states. No torch.

Defaults are those of the options reference where it names some, else the library's. What a name stands for in torch is
built in train/optim.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

# The weights of Sana's layers are about normal with this standard deviation.
WEIGHTS_STD = 0.02


@dataclass(frozen=True)
class OptimizerFacts:
    """One optimizer.

    betas, weight_decay, eps: where the user names none; eps None = it has none.
    options: what `optimizer_config` takes beside them, with the default (its type is what a value is checked against).
    states: buffers of a parameter's size, in the dtype of the weights (`own`) or in fixed bytes (`state_bytes` a
    parameter). factored: two of its buffers are vectors.
    keeps: how bf16 weights keep what rounding loses. paged: the states lie in memory that CUDA moves in and out.
    """

    help: str
    betas: tuple[float, ...] = (0.9, 0.999)
    weight_decay: float = 0.0
    eps: float | None = 1e-8
    options: Mapping[str, Any] = field(default_factory=dict)
    states: float = 2
    state_bytes: float | None = None
    keeps: Literal["kahan", "stochastic rounding"] = "stochastic rounding"
    paged: bool = False


_OPTIMI: Mapping[str, Any] = {"kahan_sum": True, "decouple_lr": False}
_DECOUPLE: Mapping[str, Any] = {**_OPTIMI, "decouple_wd": False}
_SUM = "; Kahan summation for bf16 weights"


def _optimi(help: str, **changes: Any) -> OptimizerFacts:
    given = {"betas": (0.9, 0.99), "eps": 1e-6, "options": _OPTIMI, "keeps": "kahan", **changes}
    return OptimizerFacts(f"{help} of torch-optimi{_SUM}", **given)


def _bnb(help: str, states: int, *, eight: bool, paged: bool, **changes: Any) -> OptimizerFacts:
    """states of one byte hold a 4-byte scale for every 256 of them (bitsandbytes, block-wise)."""
    kind = f"{'8-bit states' if eight else '32-bit states'}{', paged out when memory runs short' if paged else ''}"
    options = {**changes.pop("options", {}), **({"min_8bit_size": 4096} if eight else {})}
    return OptimizerFacts(
        f"{help} of bitsandbytes, {kind}",
        state_bytes=states * (1 + 4 / 256 if eight else 4),
        options=options,
        paged=paged,
        **changes,
    )


def _bnb_family() -> dict[str, OptimizerFacts]:
    found: dict[str, OptimizerFacts] = {}
    kinds = ((False, False, ""), (True, False, "8bit"), (False, True, "-paged"), (True, True, "8bit-paged"))
    mixed = {"alpha": 5.0, "t_alpha": 0, "t_beta3": 0}
    for eight, paged, ending in kinds:
        if not paged:
            found[f"bnb-adam{ending}"] = _bnb("Adam", 2, eight=eight, paged=paged)
        found[f"bnb-adamw{ending}"] = _bnb("AdamW", 2, eight=eight, paged=paged, weight_decay=0.01, eps=1e-6)
        found[f"bnb-lion{ending}"] = _bnb("Lion", 1, eight=eight, paged=paged, betas=(0.9, 0.99), eps=None)
        found[f"bnb-ademamix{ending}"] = _bnb(
            "AdEMAMix", 3, eight=eight, paged=paged, betas=(0.9, 0.999, 0.9999), weight_decay=0.01, options=mixed
        )
    return dict(sorted(found.items()))


OPTIMIZER_FACTS: Mapping[str, OptimizerFacts] = {
    "optimi-adamw": _optimi("AdamW"),
    "optimi-stableadamw": _optimi("StableAdamW (AdamW whose step is clipped tensor by tensor)", weight_decay=0.01),
    "optimi-lion": _optimi("Lion", states=1, eps=None),
    "optimi-adam": _optimi("Adam", options=_DECOUPLE),
    "optimi-radam": _optimi("RAdam", options=_DECOUPLE),
    # Kahan's sum does not help it: its slow weights, rounded to the nearest, draw the others back every k steps (run
    # for 3000 steps of 1e-5 at weights of 1, it moves a fiftieth of the way that fp32 does).
    "optimi-ranger": OptimizerFacts(
        "Ranger of torch-optimi", betas=(0.9, 0.99), eps=1e-6, state_bytes=12,
        options={"decouple_lr": False, "decouple_wd": True, "k": 6, "alpha": 0.5},
    ),
    "optimi-adan": _optimi(
        "Adan", states=4, betas=(0.98, 0.92, 0.999), weight_decay=0.02, options={**_OPTIMI, "adam_wd": False}
    ),
    "optimi-sgd": _optimi(
        "SGD", states=1, betas=(), eps=None, options={**_DECOUPLE, "momentum": 0.0, "dampening": False}
    ),
    "torch-adamw": OptimizerFacts("AdamW of torch.optim", weight_decay=0.01, options={"amsgrad": False}, state_bytes=8),
    "torch-adam": OptimizerFacts("Adam of torch.optim", options={"amsgrad": False}, state_bytes=8),
    "torch-sgd": OptimizerFacts(
        "SGD of torch.optim", betas=(), eps=None, state_bytes=4,
        options={"momentum": 0.0, "dampening": 0.0, "nesterov": False},
    ),
    # Convolutions of 1x1, about half of Sana's weights, are not factored by it: two fp32 buffers for half of them.
    "torch-adafactor": OptimizerFacts(
        "Adafactor of torch.optim", betas=(), eps=None, state_bytes=4, options={"beta2_decay": -0.8, "d": 1.0}
    ),
    "adamw_bf16": OptimizerFacts(
        "AdamW whose weights and states are rounded stochastically where they are bf16", weight_decay=0.01, eps=1e-6
    ),
    "came": OptimizerFacts(
        "CAME, the recipe's optimizer: AdamW's memory less one state", betas=(0.9, 0.999, 0.9999), eps=None,
        options={"clip_threshold": 1.0}, state_bytes=4,
    ),
    **_bnb_family(),
}  # fmt: skip

# Names of the trainer that users come from, and what to use instead.
_NEAREST: Mapping[str, str] = {
    "adamw_schedulefree": "optimi-adamw", "adamw_schedulefree+aggressive": "optimi-adamw",
    "adamw_schedulefree+no_kahan": "optimi-adamw", "prodigy": "optimi-adamw", "muon": "optimi-stableadamw",
    "soap": "optimi-stableadamw", "torch-radam": "optimi-radam", "torch-nadam": "torch-adam",
    "torch-rmsprop": "torch-adam", "torch-adagrad": "torch-adam", "torch-adadelta": "torch-adam",
    "torch-adamax": "torch-adam", "torch-asgd": "torch-sgd", "torch-sparseadam": "torch-adam",
    "ao-adamw8bit": "bnb-adamw8bit", "ao-adamw4bit": "bnb-adamw8bit", "ao-adamfp8": "bnb-adam8bit",
    "ao-adamwfp8": "bnb-adamw8bit", "bnb-adagrad": "bnb-adam", "bnb-adagrad8bit": "bnb-adam8bit",
    "sdnq-adamw": "bnb-adamw8bit", "sdnq-adamw+no_quant": "torch-adamw", "sdnq-adafactor": "torch-adafactor",
    "sdnq-came": "came", "sdnq-lion": "bnb-lion8bit", "sdnq-muon": "optimi-stableadamw",
    "sdnq-muon+quantized_matmul": "optimi-stableadamw", "adamw8bit": "bnb-adamw8bit", "adafactor": "torch-adafactor",
    "dadaptation": "optimi-adamw", "dadaptsgd": "optimi-sgd", "dadaptlion": "optimi-lion",
    "adam_bfloat16": "adamw_bf16", "lion8bit": "bnb-lion8bit", "stableadamw": "optimi-stableadamw",
    "adagrad": "torch-adam", "adamw": "optimi-adamw", "adam": "optimi-adam", "lion": "optimi-lion", "sgd": "optimi-sgd",
}  # fmt: skip

REFUSED_OPTIMIZERS: Mapping[str, str] = {
    name: f"there is none of this name here; the nearest is {near}" for name, near in _NEAREST.items()
}

# Other spellings of the same.
SAME_OPTIMIZER: Mapping[str, str] = {
    f"bnb-{name}-8bit{ending}": f"bnb-{name}8bit{ending}"
    for name in ("adam", "adamw", "lion", "ademamix")
    for ending in ("", "-paged")
    if f"bnb-{name}8bit{ending}" in OPTIMIZER_FACTS
}


def own_settings(name: str) -> dict[str, float]:
    """The defaults that settings of their own can change: beta1, beta2, weight_decay, eps, as far as it has them."""
    facts = OPTIMIZER_FACTS[name]
    betas = {f"beta{place}": beta for place, beta in enumerate(facts.betas[:2], start=1)}
    eps = {} if facts.eps is None else {"eps": facts.eps}
    return {**betas, "weight_decay": facts.weight_decay, **eps}


def options_of(name: str) -> dict[str, Any]:
    """What `optimizer_config` takes for an optimizer, with the defaults: its own options, and the settings above."""
    facts = OPTIMIZER_FACTS[name]
    third = {"beta3": facts.betas[2]} if len(facts.betas) == 3 else {}
    return {**own_settings(name), **third, **facts.options}


def keeps_bf16(name: str, options: Mapping[str, Any]) -> bool:
    """Whether bf16 weights keep what rounding loses: always, unless Kahan summation is switched off."""
    return OPTIMIZER_FACTS[name].keeps != "kahan" or options.get("kahan_sum", True) is not False


def state_bytes(name: str, options: Mapping[str, Any], weights_dtype: str) -> float:
    """Bytes of optimizer state for each parameter, on the device; weights_dtype "fp32" or "bf16".

    Kahan's remainders are counted; paged states are not: they may lie in main memory.
    """
    facts, each = OPTIMIZER_FACTS[name], 2 if weights_dtype == "bf16" else 4
    if facts.paged:
        return 0.0
    states = facts.states
    if "momentum" in facts.options and not options.get("momentum", 0.0):
        states = 0
    if facts.state_bytes is not None:
        return facts.state_bytes if states else 0.0
    return (states + (facts.keeps == "kahan" and weights_dtype == "bf16")) * each


def saved_bytes(name: str, options: Mapping[str, Any], weights_dtype: str) -> float:
    """Bytes of optimizer state for each parameter in a checkpoint: `state_bytes`, and what is paged."""
    facts = OPTIMIZER_FACTS[name]
    return facts.state_bytes or 0.0 if facts.paged else state_bytes(name, options, weights_dtype)


def stuck_share(learning_rate: float) -> float:
    """Share of bf16 weights that a step of one learning rate does not move when rounded to the nearest.

    bf16 keeps 8 bits: a weight in 2^e … 2^(e+1) moves only by steps of 2^(e-7), and a change below half of that is
    rounded away. Weights are taken as normal with WEIGHTS_STD, a step as the learning rate (that of Adam and Lion).
    At 1e-5: every weight above 2^-8, 85 %.
    """
    moved_below = 2.0 ** (math.floor(math.log2(learning_rate)) + 9)
    return 1.0 - math.erf(moved_below / (WEIGHTS_STD * math.sqrt(2)))
