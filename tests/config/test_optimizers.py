"""The table of optimizers: complete, consistent, with the figures that plans are made of."""

from __future__ import annotations

import pytest

from sana_tune.config.optimizers import (
    OPTIMIZER_FACTS,
    REFUSED_OPTIMIZERS,
    SAME_OPTIMIZER,
    keeps_bf16,
    options_of,
    own_settings,
    saved_bytes,
    state_bytes,
    stuck_share,
)

# Names of the trainer that users come from, as its options reference lists them.
THEIRS = [
    *("adamw_bf16", "adamw_schedulefree", "adamw_schedulefree+aggressive", "adamw_schedulefree+no_kahan"),
    *(f"torch-{name}" for name in ("adam", "adamw", "sgd", "radam", "nadam", "rmsprop", "adagrad", "adadelta",
                                   "adafactor", "adamax", "asgd", "sparseadam")),
    *("ao-adamw8bit", "ao-adamw4bit", "ao-adamfp8", "ao-adamwfp8", "soap", "muon", "prodigy"),
    *(f"optimi-{name}" for name in ("stableadamw", "adamw", "lion", "radam", "adam", "ranger", "adan", "sgd")),
    *("bnb-adam", "bnb-adam8bit", "bnb-adagrad", "bnb-adagrad8bit"),
    *(f"bnb-{name}{kind}" for name in ("adamw", "lion", "ademamix")
      for kind in ("", "-8bit", "8bit", "-paged", "-8bit-paged", "8bit-paged")),
    *("sdnq-adamw", "sdnq-adamw+no_quant", "sdnq-adafactor", "sdnq-came", "sdnq-lion", "sdnq-muon",
      "sdnq-muon+quantized_matmul"),
]  # fmt: skip


def test_every_name_of_theirs_is_there_or_refused_with_the_nearest() -> None:
    assert len(THEIRS) == 60
    known = {*OPTIMIZER_FACTS, *SAME_OPTIMIZER, *REFUSED_OPTIMIZERS}
    assert [name for name in THEIRS if name not in known] == []
    assert not set(REFUSED_OPTIMIZERS) & set(OPTIMIZER_FACTS)
    assert set(SAME_OPTIMIZER.values()) <= set(OPTIMIZER_FACTS)
    for reason in REFUSED_OPTIMIZERS.values():
        assert reason.rpartition(" ")[2] in OPTIMIZER_FACTS


def test_defaults_are_those_of_the_reference() -> None:
    assert len(OPTIMIZER_FACTS) == 28
    assert own_settings("optimi-adamw") == {"beta1": 0.9, "beta2": 0.99, "weight_decay": 0.0, "eps": 1e-6}
    assert own_settings("adamw_bf16") == {"beta1": 0.9, "beta2": 0.999, "weight_decay": 0.01, "eps": 1e-6}
    assert own_settings("torch-adamw") == {"beta1": 0.9, "beta2": 0.999, "weight_decay": 0.01, "eps": 1e-8}
    assert own_settings("optimi-lion") == {"beta1": 0.9, "beta2": 0.99, "weight_decay": 0.0}
    assert own_settings("bnb-lion8bit-paged") == own_settings("optimi-lion")
    assert options_of("optimi-adan")["beta3"] == 0.999 and own_settings("optimi-adan")["weight_decay"] == 0.02
    assert options_of("came")["beta3"] == 0.9999 and options_of("bnb-ademamix")["alpha"] == 5.0
    assert own_settings("optimi-sgd") == {"weight_decay": 0.0} and options_of("optimi-sgd")["momentum"] == 0.0


@pytest.mark.parametrize(
    ("name", "fp32", "bf16"),
    [
        ("optimi-adamw", 8, 6), ("optimi-lion", 4, 4), ("adamw_bf16", 8, 4), ("came", 4, 4),
        ("bnb-adamw8bit", 2.03125, 2.03125), ("bnb-lion8bit", 1.015625, 1.015625), ("bnb-lion8bit-paged", 0, 0),
        ("optimi-sgd", 0, 2), ("torch-sgd", 0, 0), ("torch-adam", 8, 8),
    ],
)  # fmt: skip
def test_bytes_of_state(name: str, fp32: float, bf16: float) -> None:
    assert (state_bytes(name, {}, "fp32"), state_bytes(name, {}, "bf16")) == (fp32, bf16)


def test_bytes_that_depend_on_more() -> None:
    assert state_bytes("optimi-sgd", {"momentum": 0.9}, "bf16") == 4
    assert saved_bytes("bnb-lion8bit-paged", {}, "bf16") == 1.015625, "what is paged is saved all the same"
    assert saved_bytes("optimi-adamw", {}, "bf16") == 6


def test_only_kahan_can_be_switched_off() -> None:
    assert keeps_bf16("optimi-adamw", {}) and not keeps_bf16("optimi-adamw", {"kahan_sum": False})
    assert keeps_bf16("torch-adamw", {"kahan_sum": False}) and keeps_bf16("bnb-lion8bit", {})


def test_the_share_of_weights_that_would_not_move() -> None:
    assert stuck_share(1e-5) == pytest.approx(0.85, abs=0.01)
    shares = [stuck_share(rate) for rate in (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)]
    assert shares == sorted(shares, reverse=True) and shares[0] > 0.99 and shares[-1] == 0


def test_the_share_is_what_rounding_does() -> None:
    import torch

    weights = (0.02 * torch.randn(200_000, generator=torch.Generator().manual_seed(0))).to(torch.bfloat16)
    for rate in (1e-6, 1e-5, 3e-5, 1e-4):
        moved = (weights.float() - rate).to(torch.bfloat16)
        assert (moved == weights).float().mean().item() == pytest.approx(stuck_share(rate), abs=0.06)
