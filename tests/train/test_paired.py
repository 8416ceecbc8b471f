from __future__ import annotations

import math

import pytest
import torch

from sana_tune.train.paired import Drift, drift, labels, paired, standard_error


def test_levels_count_alike_whatever_their_size():
    """By hand: level 0 falls from a mean of 2 to 1, level 1 stays at 200: 0.5 and 1, together 0.75."""
    base = torch.tensor([[1.0, 100.0], [3.0, 300.0]], dtype=torch.float64)
    now = torch.tensor([[0.5, 100.0], [1.5, 300.0]], dtype=torch.float64)
    found = paired(now, base)
    assert found.levels == (0.5, 1.0) and found.mean == 0.75
    assert found.changes == (-0.125, -0.375) and sum(found.changes) / 2 == found.mean - 1
    assert found.se == pytest.approx(0.125) and found.loss == 100.5


def test_the_base_is_one():
    base = torch.rand(5, 3, dtype=torch.float64) + 0.1
    found = paired(base, base)
    assert found.mean == 1.0 and found.levels == (1.0, 1.0, 1.0) and found.se == 0.0


def test_pairs_cancel_what_pictures_differ_in():
    base = torch.tensor([[0.1], [10.0], [1.0]], dtype=torch.float64)
    found = paired(base - 0.05, base)
    assert found.se is not None and found.se < 1e-12 < 1 - found.mean


def test_one_picture_has_no_error():
    found = paired(torch.tensor([[1.0, 2.0]]).double(), torch.tensor([[2.0, 2.0]]).double())
    assert found.se is None and found.mean == 0.75


def test_pictures_of_which_nothing_counts_are_left_out():
    base = torch.tensor([[0.0, 0.0], [2.0, 4.0]], dtype=torch.float64)
    found = paired(base / 2, base)
    assert found.mean == 0.5 and len(found.changes) == 1
    nothing = paired(base[:1], base[:1])
    assert nothing.mean == 1.0, "and where that are all, nothing has changed"


def test_the_standard_error_by_hand():
    assert standard_error([1.0, 3.0]) == pytest.approx(1.0)
    assert standard_error([2.0, 4.0, 6.0, 8.0]) == pytest.approx(math.sqrt(20 / 3 / 4))
    assert standard_error([1.0]) is None and standard_error([]) is None


def test_drift_by_hand():
    base = torch.tensor([3.0, 4.0, 0.0, 0.0])
    assert drift(base, base, 0.0) == Drift(0.0, 0.0)
    assert drift(base + torch.tensor([0.0, 0.0, 5.0, 0.0]), base, 6.25) == Drift(1.0, 1.0)
    moved = drift(base * 1.5, base, 0.0)
    assert moved.share == pytest.approx(0.5) and moved.gained == 0.0
    assert math.isnan(drift(base * float("nan"), base, 0.0).share)


def test_labels_tell_levels_apart():
    assert labels(torch.tensor([[0.25, 0.5], [0.35, 0.7]])) == ("0.30", "0.60")
    assert labels(torch.tensor([[0.2501, 0.2504]])) == ("0.2501", "0.2504")
    assert len(set(labels(torch.tensor([[0.5, 0.5]])))) == 2
