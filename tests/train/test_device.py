"""Where a run computes."""

from __future__ import annotations

import pytest
import torch

from sana_tune.errors import UserError
from sana_tune.train.device import make_accelerator, resolve_device


def test_the_cpu_is_always_there():
    assert resolve_device("cpu") == "cpu"
    assert resolve_device("auto") in ("cuda", "mps", "cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_told():
    with pytest.raises(UserError, match="finds no cuda"):
        resolve_device("cuda")


def test_each_run_of_a_process_has_its_own_precision():
    for precision, dtype in (("no", torch.float32), ("bf16", torch.bfloat16), ("no", torch.float32)):
        accelerator = make_accelerator("cpu", precision)
        assert accelerator.device.type == "cpu" and accelerator.num_processes == 1
        with accelerator.autocast():
            assert torch.nn.functional.linear(torch.ones(1, 2), torch.ones(2, 2)).dtype == dtype
