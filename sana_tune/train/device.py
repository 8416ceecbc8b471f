"""Where a run computes: the device by name, and the Accelerator that everything heavy goes through."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import psutil
import torch

from sana_tune.errors import Problem, UserError
from sana_tune.hardware import no_fp16_on_cpu
from sana_tune.ranks import own_rank

if TYPE_CHECKING:
    from accelerate import Accelerator

# Of a collective operation. Nobody waits in one for caching or drawing (train.crew), but a rank may have to mend a
# cache or compile its blocks while the others are at their step already.
COLLECTIVE_S = 5400


def resolve_device(wanted: str) -> str:
    """ "cuda", "mps" or "cpu" for the setting `device`; auto takes the first there is. Raises UserError."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if wanted == "auto":
        return next(name for name, found in there.items() if found)
    if not there[wanted]:
        found = ", ".join(name for name, is_there in there.items() if is_there)
        raise UserError(
            Problem("device", f"torch finds no {wanted} device on this machine; it finds {found}", "use auto")
        )
    return wanted


def make_accelerator(wanted: str, mixed_precision: str) -> Accelerator:
    """The Accelerator of a run. mixed_precision: "bf16", "fp16" (not on a CPU: UserError) or "no".

    Accelerate keeps its settings once per process; they are forgotten first, so that a second run in one process
    may have another precision. Where this process is one of several it is connected to the others afterwards, or
    UserError says that it is not.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import InitProcessGroupKwargs

    device = resolve_device(wanted)
    if device == "cpu" and mixed_precision == "fp16":
        raise UserError(no_fp16_on_cpu())
    AcceleratorState._reset_state()
    patience = InitProcessGroupKwargs(timeout=timedelta(seconds=COLLECTIVE_S))
    with _splitting_left_to_us():
        accelerator = Accelerator(cpu=device == "cpu", mixed_precision=mixed_precision, kwargs_handlers=[patience])
    accelerator.scaler = None  # the step scales the loss itself (train.scale)
    check_connected(accelerator)
    return accelerator


@contextmanager
def _splitting_left_to_us() -> Iterator[None]:
    """Accelerate does not hear in here that FSDP2 is wanted (train.sharding does that), so that it takes the processes
    for those of DDP, on a GPU as on a CPU."""
    asked = os.environ.pop("ACCELERATE_USE_FSDP", None)
    try:
        yield
    finally:
        if asked is not None:
            os.environ["ACCELERATE_USE_FSDP"] = asked


def check_connected(accelerator: Accelerator) -> None:
    """Raise UserError when a launcher started several processes and this one is not connected to all of them."""
    launched = own_rank()
    if launched is None or (accelerator.num_processes, accelerator.process_index) == (launched.ranks, launched.rank):
        return
    kind = str(accelerator.distributed_type).rpartition(".")[2]
    what = (
        f"rank {launched.rank} of {launched.ranks} processes must be connected to the others; accelerate made it "
        f"number {accelerator.process_index} of {accelerator.num_processes} (distributed type {kind})"
    )
    raise UserError(Problem("processes", what, "train on CUDA GPUs or with --device cpu; on others in one process"))


class MemoryMeter:
    """The most memory in use on a device since the meter was made; asking takes microseconds and waits for nothing.

    Of a CUDA device: what torch's allocator handed out. Of a CPU: the process's share of main memory. Of others, what
    was in use whenever somebody asked.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._process = psutil.Process()
        self._most = 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def most_bytes(self) -> int | None:
        """Bytes; None for a device that does not tell."""
        if self._device.type == "cuda":
            told: Any = torch.cuda.memory.memory_stats_as_nested_dict(self._device)
            return int(told["allocated_bytes"]["all"]["peak"]) if told else None
        if self._device.type == "cpu":
            now = self._process.memory_info().rss
        elif self._device.type == "mps":
            now = torch.mps.driver_allocated_memory()
        else:
            return None
        self._most = max(self._most, now)
        return self._most
