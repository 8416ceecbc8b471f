"""A run that goes on with another number of processes keeps its step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sana_tune.config.load import Loaded, load
from sana_tune.errors import UserError
from sana_tune.share import kept_batch
from tests.config.helpers import write_files

BEFORE = {"micro_batches_per_step": 8, "ranks": 4}


def asked(folder: Path, **settings: Any) -> Loaded:
    return load(write_files(folder, settings), {}, {})


@pytest.mark.parametrize("ranks, accumulation", [(1, 8), (2, 4), (8, 1)])
def test_the_accumulation_is_derived(tmp_path: Path, ranks: int, accumulation: int):
    kept = kept_batch(asked(tmp_path, num_processes=ranks, gradient_accumulation_steps=2), BEFORE)
    assert kept.config.train.gradient_accumulation_steps == accumulation
    assert kept.origins["gradient_accumulation_steps"].startswith("derived")
    assert f"gradient_accumulation_steps is {accumulation} instead of 2: a step stays 8" in kept.notes[-1]


def test_nothing_changes_where_nothing_must(tmp_path: Path):
    for settings, before in (
        ({"num_processes": 4, "gradient_accumulation_steps": 3}, BEFORE),  # an edit, on as many processes
        ({"num_processes": 2, "gradient_accumulation_steps": 4}, BEFORE),
        ({"num_processes": 2}, {}),
        ({"gradient_accumulation_steps": 2}, {"micro_batches_per_step": 4}),  # from before there were several
    ):
        loaded = asked(tmp_path, **settings)
        assert kept_batch(loaded, before) is loaded


def test_what_cannot_be_shared_evenly_is_refused_with_the_numbers(tmp_path: Path):
    with pytest.raises(UserError, match="8 micro-batches a step, which 3 processes cannot share evenly") as error:
        kept_batch(asked(tmp_path, num_processes=3), BEFORE)
    assert "go on with 1, 2, 4, 8 processes" in str(error.value)
    with pytest.raises(UserError, match="needs gradient_accumulation_steps 1"):
        kept_batch(asked(tmp_path, optimizer_release_gradients=True), BEFORE)
