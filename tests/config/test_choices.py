"""The tables of names agree with one another."""

from __future__ import annotations

from sana_tune.config.choices import (
    LR_CYCLES_USED_BY,
    LR_END_DEFAULTS,
    LR_POWER_USED_BY,
    LR_SCHEDULERS,
    OPTIMIZER_DEFAULTS,
    OPTIMIZERS,
    REFUSED_LR_SCHEDULERS,
    REFUSED_SAMPLERS,
    SAMPLERS,
)


def test_every_optimizer_has_its_defaults() -> None:
    assert set(OPTIMIZERS) == set(OPTIMIZER_DEFAULTS)
    assert OPTIMIZER_DEFAULTS["optimi-adamw"] == {"beta1": 0.9, "beta2": 0.99, "weight_decay": 0.0, "eps": 1e-6}


def test_names_are_described() -> None:
    assert all(LR_SCHEDULERS.values()) and all(OPTIMIZERS.values())


def test_schedules_are_named_alike_everywhere() -> None:
    assert LR_END_DEFAULTS == {"polynomial": 4e-7, "cosine": 0.0, "cosine_with_restarts": 0.0}
    assert {*LR_END_DEFAULTS, *LR_POWER_USED_BY, *LR_CYCLES_USED_BY} <= set(LR_SCHEDULERS)
    assert not set(REFUSED_LR_SCHEDULERS) & set(LR_SCHEDULERS)


def test_samplers_are_used_or_refused() -> None:
    assert all(SAMPLERS.values()) and not set(SAMPLERS) & set(REFUSED_SAMPLERS)
