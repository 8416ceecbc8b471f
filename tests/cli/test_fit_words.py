"""What fit says of a change, of memory by part, and of what is missing; every change has its reason."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sana_tune.cli.fit_words import costs_told, nothing_fits, table, told
from sana_tune.fitting import Found, Tried, candidates, choose, missing
from tests.test_fitting import wanted


def test_every_change_has_a_reason():
    seen: set[str] = set()
    for asked in (wanted(8), wanted(10, train_batch_size=1, gradient_accumulation_steps=4), wanted(24)):
        for one in candidates(asked):
            lines = list(costs_told(asked, Found(one)))
            seen |= one.changes.keys()
            assert all(line.count(": ") >= 1 for line in lines[1:-1])
    assert len(seen) >= 10


def test_memory_by_part_adds_up():
    asked = wanted(10)
    one = choose(asked).chosen
    assert one is not None
    lines = list(table(asked, one))
    assert lines[0].split() == ["memory,", "estimated", "before", "after"]
    assert any(line.split() == ["training", "51.0", "GB", "9.1", "GB"] for line in lines)
    assert any(line.split() == ["EMA", "6.4", "GB", "0", "B"] for line in lines)
    assert "9.5 GB to use" in next(iter(told(asked)))


@pytest.mark.parametrize("tried", [None, Tried("", 9 * 10**9, 0.7)])
def test_estimates_are_called_so_unless_they_were_tried(tried):
    asked = wanted(10)
    said = "\n".join(costs_told(asked, replace(Found(choose(asked).chosen), tried=tried)))
    assert ("nothing was tried on a GPU" in said) == (tried is None)
    assert "learning_rate" not in said and "optimizer optimi-adamw → bnb-adamw8bit" in said


def test_what_failed_when_tried_is_told():
    asked = wanted(80)
    found = choose(asked, lambda one: Tried("out of memory"))
    problem = nothing_fits(asked, missing(asked), found.failed)
    assert "settings that should fit were tried, and none does" in problem.what and "out of memory" in problem.what
