"""The copy that is written: equal, real, of the same form, in memory that is used again."""

from __future__ import annotations

import torch

from sana_tune.progress import Progress
from sana_tune.train.snapshot import PAGE_BYTES, Memory, snapshot
from tests.train.test_checkpoint import trained


def test_a_snapshot_is_a_copy_of_all_there_is():
    parts, progress = trained(2), Progress(2, 0.5, 7)
    live, copy = snapshot(parts, progress), snapshot(parts, progress, Memory())
    assert copy.progress == progress and copy.config == live.config and "_name_or_path" not in copy.config
    assert copy.size_bytes == live.size_bytes > 4 * 4 * sum(each.numel() for each in parts.trained) - 1
    for one, two in ((live.weights, copy.weights), (live.average, copy.average)):
        assert one.keys() == two.keys() and len(one) > 40
        assert all(torch.equal(one[name], two[name]) and one[name].data_ptr() != two[name].data_ptr() for name in one)
    (name, state), *_ = live.optimizer["state"].items()
    assert torch.equal(copy.optimizer["state"][name]["exp_avg"], state["exp_avg"])
    assert copy.optimizer["state"][name]["exp_avg"].data_ptr() != state["exp_avg"].data_ptr()
    assert live.weights["proj_out.weight"].data_ptr() == parts.bare.proj_out.weight.data_ptr(), "no memory, no copy"
    assert copy.optimizer["param_groups"] == live.optimizer["param_groups"]


def test_the_next_one_takes_no_new_memory():
    parts, memory = trained(1), Memory()
    first = snapshot(parts, Progress(1), memory)
    places = [tensor.data_ptr() for tensor in first.weights.values()]
    second = snapshot(parts, Progress(2), memory)
    assert [tensor.data_ptr() for tensor in second.weights.values()] == places


def test_what_stands_in_several_places_is_one_there_too():
    """bitsandbytes' map of 8-bit values: stored once, not for every weight."""
    parts = trained(1, optimizer="bnb-lion8bit")
    states = snapshot(parts, Progress(1), Memory()).optimizer["state"].values()
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
