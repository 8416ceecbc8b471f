"""Where a run computes."""

from __future__ import annotations

import os
from typing import Any

import accelerate
import pytest
import torch

from sana_tune.errors import UserError
from sana_tune.train.device import MemoryMeter, make_accelerator, resolve_device


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


def test_the_most_memory_is_told_and_does_not_fall():
    meter = MemoryMeter(torch.device("cpu"))
    before = meter.most_bytes()
    held = torch.ones(50 * 2**18)  # 50 MiB, all of it touched
    with_it = meter.most_bytes()
    del held
    assert before is not None and with_it is not None and with_it - before > 30 * 2**20
    assert meter.most_bytes() == with_it
    assert MemoryMeter(torch.device("meta")).most_bytes() is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_of_a_gpu_it_is_what_torch_handed_out():
    meter = MemoryMeter(torch.device("cuda"))
    held = torch.ones(50 * 2**18, device="cuda")
    assert meter.most_bytes() == torch.cuda.max_memory_allocated() >= held.numel() * 4


def test_accelerate_takes_split_processes_for_those_of_ddp(monkeypatch: pytest.MonkeyPatch):
    """It would want a plugin of its own, and that the model is its own too."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    heard: list[str | None] = []
    made = accelerate.Accelerator.__init__

    def init(self: accelerate.Accelerator, *arguments: Any, **words: Any) -> None:
        heard.append(os.environ.get("ACCELERATE_USE_FSDP"))
        made(self, *arguments, **words)

    monkeypatch.setattr(accelerate.Accelerator, "__init__", init)
    assert str(make_accelerator("cpu", "no").distributed_type) == "DistributedType.NO"
    assert heard == [None] and os.environ["ACCELERATE_USE_FSDP"] == "true"
