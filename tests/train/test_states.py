"""Optimizer state by name: into any order of the same parameters, from the old form too; another's is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sana_tune.progress import Progress
from sana_tune.train import folders
from sana_tune.train.checkpoint import Checkpoints
from sana_tune.train.optim import build_optimizer, parameter_groups
from sana_tune.train.states import full_state, load_full_state, names_of
from sana_tune.train.step import train_step
from tests.train.toys import ToyBatches, differences, make_parts, state_of


class Layers(nn.Module):
    """Three layers, in the order given."""

    def __init__(self, *order: str):
        super().__init__()
        torch.manual_seed(0)
        for name in order:
            self.add_module(name, nn.Linear(4, 3))


def stepped(model: nn.Module, kind: str = "optimi-adamw") -> torch.optim.Optimizer:
    """An optimizer after a step whose gradients differ by name."""
    optimizer = build_optimizer(kind, parameter_groups(model.named_parameters()), 1e-3)
    for name, parameter in model.named_parameters():
        parameter.grad = torch.full_like(parameter, float(len(name) + ord(name[0])))
    optimizer.step()
    return optimizer


def by_name(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return full_state(optimizer, names_of(model.named_parameters()))


@pytest.mark.parametrize("kind", ["optimi-adamw", "torch-adamw", "bnb-adamw8bit", "came", "optimi-lion"])
def test_it_goes_by_name_whatever_the_order(kind: str):
    one, two = Layers("a", "b", "c"), Layers("c", "a", "b")
    saved = by_name(one, stepped(one, kind))
    assert set(saved["state"]) == {name for name, _ in one.named_parameters()}
    assert [group["params"] for group in saved["param_groups"]] == [
        ["a.weight", "b.weight", "c.weight"], ["a.bias", "b.bias", "c.bias"],
    ]  # fmt: skip
    other = build_optimizer(kind, parameter_groups(two.named_parameters()), 1e-3)
    load_full_state(other, names_of(two.named_parameters()), saved)
    found = by_name(two, other)
    assert found["param_groups"][0]["params"] == ["c.weight", "a.weight", "b.weight"]
    for name, state in saved["state"].items():
        flat = {**state, **state.get("__bnb_optimizer_quant_state__", {})}
        again = {**found["state"][name], **found["state"][name].get("__bnb_optimizer_quant_state__", {})}
        for key, value in flat.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, again[key]), (name, key)


def test_a_state_that_counts_its_parameters_is_read_too():
    """As checkpoints of before have it."""
    model = Layers("a", "b", "c")
    optimizer = stepped(model)
    other = build_optimizer("optimi-adamw", parameter_groups(model.named_parameters()), 1e-3)
    load_full_state(other, names_of(model.named_parameters()), optimizer.state_dict())
    one, two = by_name(model, optimizer)["state"], by_name(model, other)["state"]
    assert all(torch.equal(one[name]["exp_avg"], two[name]["exp_avg"]) for name in one)


@pytest.mark.parametrize(
    ("model", "message"), [(Layers("a", "b"), "2 parameters are on one side only, such as c.bias")]
)
def test_of_other_parameters_it_is_refused(model: nn.Module, message: str):
    saved = by_name(model, stepped(model))
    other = Layers("a", "b", "c")
    optimizer = build_optimizer("optimi-adamw", parameter_groups(other.named_parameters()), 1e-3)
    with pytest.raises(ValueError, match=message):
        load_full_state(optimizer, names_of(other.named_parameters()), saved)


def test_grouped_in_another_way_it_is_refused():
    model = Layers("a", "b")
    saved = by_name(model, stepped(model))
    optimizer = build_optimizer("optimi-adamw", list(model.parameters()), 1e-3)
    with pytest.raises(ValueError, match="grouped in another way"):
        load_full_state(optimizer, names_of(model.named_parameters()), saved)


def test_a_checkpoint_of_before_goes_on_bit_for_bit(tmp_path: Path):
    """optimizer.pt as it was: numbers in place of names."""
    parts, progress = make_parts(), Progress()
    for micro_batches in ToyBatches().steps(0, 2):
        progress = progress.advance(train_step(parts, micro_batches, progress).images, 0.0)
    Checkpoints(tmp_path).save(parts, progress)
    path = tmp_path / "checkpoint-2" / "optimizer.pt"
    assert all(isinstance(name, str) for name in torch.load(path, weights_only=True)["state"])
    torch.save(parts.optimizer.state_dict(), path)
    manifest = json.loads((path.parent / folders.MANIFEST).read_text(encoding="utf-8"))
    manifest["files"] |= folders.digest_files(path.parent, ["optimizer.pt"])
    (path.parent / folders.MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    other = make_parts()
    Checkpoints(tmp_path).restore(other, folders.find(tmp_path, "latest"))
    assert differences(state_of(parts), state_of(other)) == []
