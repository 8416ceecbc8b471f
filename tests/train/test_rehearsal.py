"""The rehearsal goes through the largest batch, changes nothing, and leaves nothing behind when memory runs out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sana_tune.data.records import Role
from sana_tune.memory import Load
from sana_tune.progress import Progress
from sana_tune.train import folders
from sana_tune.train.checkpoint import Checkpoints
from sana_tune.train.loop import fit
from sana_tune.train.rehearsal import Heaviest, batch_of, held_bytes, rehearse
from sana_tune.train.signals import Stop
from sana_tune.train.step import train_step
from sana_tune.train.validate import NoValidator
from sana_tune.watch.sinks import Watcher
from tests.train.toys import (
    CHANNELS,
    TEXT_WIDTH,
    Course,
    ToyBatches,
    differences,
    make_parts,
    state_of,
    tiny_transformer,
)

LOADS = {Role.TRAIN: Load(32, 16, 3)}


def heaviest(**changes: Any) -> Heaviest:
    return Heaviest(**{"loads": LOADS, "factor": 4, "tokens": 7, "states_bytes": 1000, **changes})


WAYS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16 weights with Kahan": {"dtype": torch.bfloat16},
    "bf16 weights, rounded": {"dtype": torch.bfloat16, "optimizer": "torch-adamw"},
    "autocast": {"mixed_precision": "bf16"},
    "released": {"release": True},
    "average aside": {"ema_options": {"place": "cpu"}},
    "base": {"regularised": True},
}


@pytest.mark.parametrize(("way", "accumulation"), [*((way, 1) for way in WAYS), ("fp32", 2)])
def test_the_steps_after_it_are_those_without(way: str, accumulation: int):
    drawn = []
    loads = {**LOADS, **({Role.REGULARISE: Load(16, 16, 2)} if way == "base" else {})}
    # as a sampler might draw, with torch's own generator
    wanted = heaviest(loads=loads, accumulation=accumulation, masked=True, draw=lambda: drawn.append(torch.randn(5)))
    states = []
    for rehearsed in (True, False):
        torch.manual_seed(5)
        parts = make_parts(base=tiny_transformer(3) if way == "base" else None, **WAYS[way])
        for step, batches in enumerate(ToyBatches(accumulation).steps(0, 3)):
            if rehearsed and step != 1:  # before the first one, and where the optimizer has states
                rehearse(parts, wanted, step)
            train_step(parts, batches, Progress(step))
        states.append({**state_of(parts), "generator": torch.get_rng_state()})
    assert differences(*states) == []
    assert len(drawn) == 2


def test_each_start_rehearses_when_all_is_restored(tmp_path: Path):
    seen = []

    def start(steps: int) -> None:
        parts, held = make_parts(), folders.find(tmp_path, "latest")
        with Watcher([]) as watcher:
            fit(
                Course(steps), parts, ToyBatches(), NoValidator(), Checkpoints(tmp_path), watcher, Stop(), resume=held,
                rehearse=lambda progress: seen.append((progress.step, len(parts.optimizer.state) > 0)),
            )  # fmt: skip

    start(1)
    start(2)
    assert seen == [(0, False), (1, True)]


def test_it_goes_through_the_largest_batch():
    parts, seen = make_parts(), []
    parts.transformer.eval()
    parts.bare.register_forward_pre_hook(
        lambda module, args, inputs: seen.append(
            (module.training, inputs["hidden_states"].shape, inputs["encoder_hidden_states"].shape)
        ),
        with_kwargs=True,
    )
    rehearse(parts, heaviest(tokens=8), 0)
    assert seen == [(True, (3, CHANNELS, 4, 8), (3, 8, TEXT_WIDTH))]
    assert not parts.transformer.training
    rehearse(parts, heaviest(accumulation=4), 0)
    assert len(seen) == 3, "the second of an accumulated step has gradients beside it; more take no more"


def test_a_batch_has_masks_where_the_run_may_have_some():
    batch = batch_of(make_parts(), heaviest(masked=True), Role.TRAIN, LOADS[Role.TRAIN])
    assert batch.loss_mask is not None and batch.loss_mask.shape == (3, 1, 4, 8)
    assert batch.text_mask.sum() == 3 * 7 - 1
    assert batch_of(make_parts(), heaviest(), Role.TRAIN, Load(4, 4, 1)).loss_mask is None


def test_states_count_once_they_are_there(tmp_path: Path):
    parts = make_parts()
    assert held_bytes(parts.optimizer, torch.device("cpu")) == 0
    with Watcher([]) as watcher:
        fit(Course(1), parts, ToyBatches(), NoValidator(), Checkpoints(tmp_path), watcher, Stop())
    weights = sum(parameter.nbytes for parameter in parts.trained)
    assert held_bytes(parts.optimizer, torch.device("cpu")) >= 2 * weights


def test_states_that_do_not_fit_are_known_before_the_first_step():
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        rehearse(make_parts(), heaviest(states_bytes=2**60), 0)


@pytest.mark.parametrize("release", [False, True])
def test_when_memory_runs_out_nothing_is_left(release: bool):
    parts = make_parts(release=release)
    before = state_of(parts)

    def full() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has …")

    with pytest.raises(torch.OutOfMemoryError):
        rehearse(parts, heaviest(draw=full), 0)
    target = parts.bare.get_submodule("transformer_blocks.1.ff")
    handle = target.register_full_backward_pre_hook(lambda module, gradients: full())
    with pytest.raises(torch.OutOfMemoryError):
        rehearse(parts, heaviest(), 0)
    handle.remove()
    assert all(parameter.grad is None for parameter in parts.trained)
    assert differences(before, state_of(parts)) == []
