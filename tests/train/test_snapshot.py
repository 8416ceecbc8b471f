"""The copy that is written: equal, real, of the same form, in memory that is used again."""

from __future__ import annotations

import threading

import pytest
import torch

from sana_tune.progress import Progress
from sana_tune.train.fence import Fence
from sana_tune.train.snapshot import PAGE_BYTES, Memory, Snapshot, copied, snapshot
from sana_tune.train.step import Parts, train_step
from tests.train.test_checkpoint import trained
from tests.train.toys import ToyBatches, differences, make_parts, state_of


def copy_of(parts: Parts, progress: Progress, memory: Memory) -> Snapshot:
    made, fill = copied(snapshot(parts, progress), memory)
    fill()
    return made


def test_a_snapshot_is_a_copy_of_all_there_is():
    parts, progress = trained(2), Progress(2, 0.5, 7)
    live, copy = snapshot(parts, progress), copy_of(parts, progress, Memory())
    assert copy.progress == progress and copy.config == live.config and "_name_or_path" not in copy.config
    assert copy.size_bytes == live.size_bytes > 4 * 4 * sum(each.numel() for each in parts.trained) - 1
    for one, two in ((live.weights, copy.weights), (live.average, copy.average)):
        assert one.keys() == two.keys() and len(one) > 40
        assert all(torch.equal(one[name], two[name]) and one[name].data_ptr() != two[name].data_ptr() for name in one)
    (name, state), *_ = live.optimizer["state"].items()
    assert torch.equal(copy.optimizer["state"][name]["exp_avg"], state["exp_avg"])
    assert copy.optimizer["state"][name]["exp_avg"].data_ptr() != state["exp_avg"].data_ptr()
    assert live.weights["proj_out.weight"].data_ptr() == parts.bare.proj_out.weight.data_ptr(), "live"
    assert copy.optimizer["param_groups"] == live.optimizer["param_groups"]


def test_the_next_one_takes_no_new_memory():
    parts, memory = trained(1), Memory()
    first = copy_of(parts, Progress(1), memory)
    places = [tensor.data_ptr() for tensor in first.weights.values()]
    second = copy_of(parts, Progress(2), memory)
    assert [tensor.data_ptr() for tensor in second.weights.values()] == places


def test_what_stands_in_several_places_is_one_there_too():
    """bitsandbytes' map of 8-bit values: stored once, not for every weight."""
    parts = trained(1, optimizer="bnb-lion8bit")
    states = copy_of(parts, Progress(1), Memory()).optimizer["state"].values()
    maps = [held["qmap1"] for state in states if "qmap1" in (held := state["__bnb_optimizer_quant_state__"])]
    assert len(maps) == 4 and len({each.data_ptr() for each in maps}) == 1


def test_memory_keeps_dtype_shape_and_strides_apart_from_each_other():
    memory = Memory()
    wanted = [
        torch.arange(6, dtype=torch.float32).reshape(2, 3).t(), torch.ones(5, dtype=torch.bfloat16), torch.tensor(3),
        torch.zeros(0, 4), torch.ones(PAGE_BYTES + 1, dtype=torch.uint8), torch.tensor([True, False]),
    ]  # fmt: skip
    held = [memory.take(each).copy_(each) for each in wanted]
    for one, two in zip(wanted, held, strict=True):
        assert torch.equal(one, two) and one.dtype == two.dtype and one.stride() == two.stride()
        assert two.untyped_storage().nbytes() == one.numel() * one.element_size(), "torch.save writes whole storages"


@pytest.mark.parametrize("release", [False, True])
def test_nothing_moves_before_the_copy_is_there(release: bool):
    """The step computes while the event is not set, and waits before its first update."""
    parts = make_parts(release=release)
    before = state_of(parts)
    copied, done = threading.Event(), threading.Event()
    parts.fence.raise_until(copied)

    def step() -> None:
        (micro_batches,) = ToyBatches().steps(0, 1)
        train_step(parts, micro_batches, Progress())
        done.set()

    thread = threading.Thread(target=step)
    thread.start()
    assert not done.wait(0.3)
    assert differences(before, {name: value for name, value in state_of(parts).items() if name in before}) in (
        [],
        ["group/0/lr", "group/1/lr"],
    )
    copied.set()
    thread.join(20)
    assert done.is_set() and len(differences(before, state_of(parts))) > 40
    Fence().wait()
