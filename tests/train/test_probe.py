from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from sana_tune.data.records import digest
from sana_tune.model.levels import Levels
from sana_tune.progress import Progress
from sana_tune.train.probe import Look, Probe, Stopped, Subject
from sana_tune.train.step import Parts, train_step
from tests.train.toys import CHANNELS, TEXT_WIDTH, ToyBatches, differences, make_parts, state_of

SIZES = ((4, 4), (2, 6), (4, 4), (4, 4), (2, 6))  # latent positions of the subjects


def subject(number: int) -> Subject:
    height, width = SIZES[number]
    return Subject(f"d/{number}", "d", height, width, f"made of {number}")


def look(number: int, mask: bool = False) -> Look:
    generator = torch.Generator().manual_seed(number)
    height, width = SIZES[number]
    latents = torch.randn(CHANNELS, height, width, generator=generator)
    text = torch.randn(3 + number, TEXT_WIDTH, generator=generator)
    return Look(latents, text, torch.ones(1, height, width) if mask else None)


def probe(count: int = len(SIZES), *, load: Any = look, levels: int = 4, positions: int = 48, seed: int = 7) -> Probe:
    return Probe([subject(number) for number in range(count)], load, levels=levels, positions=positions, seed=seed)


@pytest.fixture
def parts() -> Parts:
    return make_parts(ema_decay=None)


def test_a_loss_by_hand(parts: Parts):
    """Noise and level of one item worked out from what is promised: seed, id, number of the level."""
    found, (shown, level) = probe().measure(parts), (look(1), 2)
    sigma = torch.tensor(parts.levels.at((level + 0.5) / 4, 2.0), dtype=torch.float32)  # toys' shift of 2x6
    seed = int(digest("probe", 7, "d/1", level)[:8], 16)
    noise = torch.randn(CHANNELS, 2, 6, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        said = parts.bare(
            hidden_states=((1 - sigma) * shown.latents + sigma * noise)[None],
            encoder_hidden_states=shown.text[None],
            timestep=1000 * sigma[None],
            return_dict=False,
        )[0]
    assert found.losses[1, level].item() == pytest.approx(
        (said - (noise - shown.latents)).square().mean().item(), rel=1e-5
    )
    assert found.losses.shape == (5, 4) and found.losses.dtype == torch.float64
    assert len(set(found.losses.flatten().tolist())) == 20


def test_the_same_every_time(parts: Parts):
    mine, keep = probe(), [(0, 1), (4, 3)]
    first = mine.measure(parts, keep=keep)
    torch.manual_seed(99)
    again = mine.measure(parts, keep=keep)
    assert first.losses.equal(again.losses) and first.velocities.equal(again.velocities)
    assert len(first.velocities) == CHANNELS * (16 + 12) and bool(first.velocities.any())
    other = probe(seed=8).measure(parts).losses
    assert not bool((other == first.losses).any())


@pytest.mark.parametrize("ranks", [2, 3, 7])
def test_the_same_on_any_number_of_processes(parts: Parts, ranks: int):
    """Each share alone, and their sum, to the bit: batches do not depend on how many share them."""
    mine, keep = probe(), [(0, 0), (1, 1), (4, 3)]
    whole = mine.measure(parts, keep=keep)
    shares = [mine.measure(parts, keep=keep, share=(rank, ranks)) for rank in range(ranks)]
    assert sum(share.losses for share in shares).equal(whole.losses)  # pyright: ignore[reportAttributeAccessIssue]
    assert torch.stack([share.velocities for share in shares]).sum(0).equal(whole.velocities)
    assert all(int((share.losses != 0).sum()) < 20 for share in shares)


def test_all_processes_ask_the_model_equally_often(parts: Parts, monkeypatch: pytest.MonkeyPatch):
    """A model that is shared out would wait for ever for the one that has nothing left to do."""
    mine, calls, forward = probe(), [], Probe._forward

    def counting(self: Probe, *args: Any) -> Any:
        calls.append(1)
        return forward(self, *args)

    monkeypatch.setattr(Probe, "_forward", counting)
    counts = []
    for rank in range(4):
        calls.clear()
        mine.measure(parts, share=(rank, 4))
        counts.append(len(calls))
    assert len(mine.batches(4)) == 6 and counts == [2] * 4


def test_one_picture_is_enough_and_the_others_do_not_matter(parts: Parts):
    alone = probe(1).measure(parts).losses
    assert alone.shape == (1, 4)
    assert probe().measure(parts).losses[:1].tolist() == [pytest.approx(alone[0].tolist(), rel=1e-5)]


def test_batches_are_of_one_size_and_no_larger_than_asked():
    batches = probe(positions=33).batches(4)
    assert sorted(item for batch in batches for item in batch) == [(n, level) for n in range(5) for level in range(4)]
    for batch in batches:
        (size,) = {SIZES[number] for number, _ in batch}
        assert len(batch) <= max(1, 33 // math.prod(size))
    assert max(map(len, batches)) == 2 and {len(batch) for batch in probe(positions=1).batches(4)} == {1}


def test_masks_are_honoured(parts: Parts):
    plain = probe(2).measure(parts).losses
    assert probe(2, load=lambda n: look(n, mask=True)).measure(parts).losses.tolist() == [
        pytest.approx(row.tolist()) for row in plain
    ]

    def half(number: int) -> Look:
        shown = look(number)
        mask = torch.zeros(1, *shown.latents.shape[1:])
        if number == 0:
            mask[:, :, :2] = 1
        return replace(shown, mask=mask)

    masked = probe(2, load=half).measure(parts).losses
    assert not bool((masked[0] == plain[0]).any()) and masked[1].tolist() == [0.0] * 4
    mixed = probe(3, load=lambda n: half(n) if n == 0 else look(n)).measure(parts).losses
    assert mixed[2].tolist() == pytest.approx(probe(3).measure(parts).losses[2].tolist())


def test_levels_are_spread_over_the_runs_own(parts: Parts):
    sigmas = probe(2, levels=3).sigmas(parts)
    expected = [[parts.levels.at((n + 0.5) / 3, shift) for n in range(3)] for shift in (3.0, 2.0)]
    assert sigmas.tolist() == expected
    table = replace(parts, levels=Levels("custom", table=(0.2, 0.9)))
    assert probe(2, levels=8).sigmas(table).tolist() == [[0.2, 0.9]] * 2, "each level of a table once"


def test_nothing_of_the_training_changes():
    """Weights, modes, gradients, random numbers: a run that measured is the same to the bit."""
    plain, measuring = make_parts(), make_parts()
    batches = ToyBatches()
    states = []
    for parts in (plain, measuring):
        torch.manual_seed(5)
        parts.bare.train()
        parts.bare.patch_embed.eval()
        progress = Progress()
        for micro_batches in batches.steps(0, 3):
            if parts is measuring:
                probe().measure(parts)
            train_step(parts, micro_batches, progress)
            progress = progress.advance(1, 0.0)
        assert parts.bare.training and not parts.bare.patch_embed.training
        states.append({**state_of(parts), "random": torch.get_rng_state()})
    assert differences(*states) == []


def test_all_is_restored_when_it_fails(parts: Parts):
    def broken(number: int) -> Look:
        torch.rand(3)
        raise OSError("gone")

    parts.bare.train()
    before = torch.get_rng_state()
    with pytest.raises(OSError, match="gone"):
        probe(load=broken).measure(parts)
    assert parts.bare.training and torch.is_grad_enabled() and torch.get_rng_state().equal(before)


def test_it_can_be_stopped(parts: Parts):
    answers = iter([False, False, True])
    with pytest.raises(Stopped):
        probe().measure(parts, stopped=lambda: next(answers))


def test_the_model_answers_in_eval_mode_without_gradients(parts: Parts):
    seen = []
    handle = parts.bare.register_forward_hook(
        lambda model, args, out: seen.append((model.training, out[0].requires_grad))
    )
    try:
        parts.bare.train()
        probe(1).measure(parts)
    finally:
        handle.remove()
    assert seen and set(seen) == {(False, False)}
