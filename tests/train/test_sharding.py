"""FSDP2 by hand, on two processes over gloo: split, step, gather, and split again into another number of parts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState

from sana_tune.train.checkpoint import Checkpoints
from sana_tune.train.folders import list_complete
from sana_tune.train.sharding import gathered, is_sharded, like, local, put, replicated, shard, whole_norm
from sana_tune.train.step import train_step
from tests.journeys.kit import Child, all_well, one_thread, ranks, state_of
from tests.train.toys import ToyBatches, make_parts, tiny_transformer

STEPS = 2
CPU = torch.device("cpu")


def life(folder: Path, count: int, first: int) -> None:
    """Go on from step `first`, do STEPS, save, and see what is split."""
    from sana_tune.train.device import make_accelerator

    AcceleratorState._reset_state(True)
    model: Any = tiny_transformer()
    if count > 1:
        make_accelerator("cpu", "no")
        shard(model, CPU, count)
    parts = make_parts(transformer=model, max_grad_norm=0.01)
    if count > 1:
        assert {group["triton"] for group in parts.optimizer.param_groups} == {False}, "its kernel knows no parts"
    assert is_sharded(parts.bare) == (count > 1) and replicated(model, parts.accelerator) is model
    checkpoints = Checkpoints(folder)
    found = list_complete(folder)
    progress = checkpoints.restore(parts, found[-1] if found else None)
    assert progress.step == first
    for _ in range(STEPS):
        ((micro, batch),) = next(ToyBatches().steps(progress.step, progress.step + 1))
        # all see the same batch with the same noise: the mean over them is its own
        result = train_step(parts, [(replace(micro, index=0), batch)], progress)
        assert not result.skipped and result.grad_norm > 0.01, "it is clipped"
        progress = progress.advance(result.images, 0.0)
    weight = parts.trained[0]
    assert local(weight).numel() * count == weight.numel()
    with parts.ema.swapped():
        averaged = gathered(parts.bare.state_dict())
    average = gathered(parts.ema.state_dict())
    if count == 1 or torch.distributed.get_rank() == 0:
        assert all(torch.equal(averaged[name], average[name]) for name in average)
    else:
        assert {each.device.type for each in (*averaged.values(), *average.values())} == {"meta"}, "one holds it all"
    checkpoints.save(parts, progress)


def test_two_parts_and_one_and_two_again_train_as_one_whole(tmp_path: Path):
    with one_thread():
        for count, first in ((2, 0), (1, STEPS), (2, 2 * STEPS)):
            if count == 1:
                all_well([Child(lambda: life(tmp_path / "split", 1, STEPS), tmp_path / "one.txt")])
            else:
                all_well(ranks(count, lambda rank, first=first: life(tmp_path / "split", 2, first), tmp_path))
        for first in (0, STEPS, 2 * STEPS):
            life(tmp_path / "whole", 1, first)
    one, other = (state_of(tmp_path / name / f"checkpoint-{3 * STEPS}") for name in ("split", "whole"))
    assert one.keys() == other.keys() and len(one) > 100
    for name, value in one.items():
        if isinstance(value, torch.Tensor):
            assert value.shape == other[name].shape and torch.allclose(value, other[name], atol=1e-6, rtol=1e-5), name


def test_plain_tensors_pass_through():
    plain = torch.arange(4.0)
    norm = plain.norm()
    assert local(plain) is plain and like(plain, plain) is plain and whole_norm(norm, [plain]) is norm
    state = {"a": [plain, 3], "b": {"c": (plain,)}}
    assert gathered(state) == state and gathered(state)["a"][0] is plain
    put(plain, torch.ones(4))
    assert plain.tolist() == [1.0] * 4


def test_one_process_is_wrapped_in_nothing():
    parts = make_parts()
    assert replicated(parts.bare, parts.accelerator) is parts.bare
