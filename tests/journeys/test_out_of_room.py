"""Memory that runs out anywhere in a run is told in one message: what was expected, what helps, where it goes on."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook

from sana_tune.cli.main import exit_code
from sana_tune.config.load import Loaded
from sana_tune.errors import UserError
from sana_tune.run import run
from sana_tune.train import folders
from sana_tune.watch.events import Failed, Stepped
from tests.journeys.kit import Child, Heard, differences, output_of, pictures, small_run, state_of

SAID = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB"


class Full:
    """A device that runs full at the nth time that a module of a kind is called."""

    def __init__(self, kind: str, nth: int):
        self.kind, self.left = kind, nth

    def __call__(self, module: Any, inputs: Any) -> None:
        if type(module).__name__ == self.kind:
            self.left -= 1
            if self.left == 0:
                raise torch.OutOfMemoryError(SAID)

    def during(self, work: Callable[[], object]) -> None:
        handle = register_module_forward_pre_hook(self)
        try:
            work()
        finally:
            handle.remove()
        assert self.left <= 0, "it was never reached"


def failed(loaded: Loaded, full: Full) -> tuple[str, Heard]:
    """The one message of a run that runs out of memory, and what it told."""
    heard = Heard()
    with pytest.raises(UserError) as caught:
        full.during(lambda: run(loaded, sinks=[heard]))
    assert caught.value.__cause__ is None and caught.value.__suppress_context__
    (problem,) = caught.value.problems
    assert problem.where == "memory"
    assert [event.message for event in heard.of(Failed)] == [str(problem)]
    return str(problem), heard


def test_in_the_rehearsal_nothing_has_begun(tmp_path: Path):
    pictures(tmp_path / "pictures", 4)
    said, heard = failed(small_run(tmp_path, rehearsal="on", use_ema=True), Full("SanaTransformer2DModel", 1))
    assert "there was not enough memory for the rehearsal before the first step: tried to allocate 2.00 GiB" in said
    assert "the plan expected about 1." in said and " GB; CPU has " in said
    assert "gradient_checkpointing true, gradient_checkpointing_interval 1" in said and "use_ema false" in said
    assert "train_batch_size 1, gradient_accumulation_steps 2" in said and "goes on" not in said
    assert heard.of(Stepped) == [] and folders.list_complete(tmp_path / "output") == []


def test_in_a_step_it_goes_on_from_the_checkpoint(tmp_path: Path):
    pictures(tmp_path / "pictures", 4)
    loaded = small_run(tmp_path, rehearsal="off", checkpoint_step_interval=2)
    said, heard = failed(loaded, Full("SanaTransformer2DModel", 4))
    assert "not enough memory for training: " in said
    assert "checkpoint-2 is whole: started again, the run goes on from it" in said
    assert len(heard.of(Stepped)) == 3
    run(loaded)
    once = small_run(tmp_path / "once", {"instance_data_dir": str(tmp_path / "pictures")})
    run(once)
    ended = [state_of(output_of(each) / "checkpoint-4") for each in (loaded, once)]
    assert differences(*ended) == []
    assert "Rehearsed" not in (tmp_path / "once/output/log.txt").read_text(encoding="utf-8"), "auto on a CPU is off"


def test_a_validation_picture_is_rehearsed_too(tmp_path: Path):
    pictures(tmp_path / "pictures", 4)
    drawing = {"validation_disable": False, "validation_prompt": "a dot", "validation_resolution": "64x32,32"}
    loaded = small_run(tmp_path, rehearsal="on", **drawing)
    said, heard = failed(loaded, Full("SanaTransformer2DModel", 2))
    assert "for the rehearsal before the first step" in said and "validation_resolution" in said
    assert heard.of(Stepped) == [] and not (tmp_path / "output/validation_images").exists()
    run(loaded)
    log = (tmp_path / "output/log.txt").read_text(encoding="utf-8")
    assert "Rehearsed the largest micro-batch (2 of 32x32 px, " in log and " and a validation picture: it took " in log


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux'")
def test_real_memory_that_runs_out(tmp_path: Path):
    """A run whose address space ends shortly above what it has: the CPU's own allocator fails."""
    pictures(tmp_path / "pictures", 2)
    small_run(tmp_path, rehearsal="on", train_batch_size=100_000, max_train_steps=1)

    def life() -> int:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        limit = pages * resource.getpagesize() + 2**30
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        return exit_code(["train", "--config", str(tmp_path / "config.json")])

    child = Child(life, tmp_path / "console.txt")
    assert child.wait() == 1, child
    told = str(child)
    assert told.count("error: memory: there was not enough memory for the rehearsal before the first step: tried") == 1
    assert "Traceback" not in told and "each of these frees alone about" in told
