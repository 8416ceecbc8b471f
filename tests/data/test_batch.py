from __future__ import annotations

import dataclasses

import pytest
import torch

from sana_tune.data.batch import Batch
from sana_tune.data.records import Role


def test_a_batch_is_a_frozen_value():
    batch = Batch(torch.zeros(1, 4, 2, 2), torch.zeros(1, 3, 5), torch.ones(1, 3), None, Role.TRAIN, ("cats/a.png",))
    assert batch.latents.shape[0] == batch.text.shape[0] == len(batch.ids)
    with pytest.raises(dataclasses.FrozenInstanceError):
        batch.role = Role.EVAL  # type: ignore[misc]
