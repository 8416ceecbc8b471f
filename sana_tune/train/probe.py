"""The loss of fixed pictures at fixed noise levels with fixed noise: a number that repeats.

Caption, noise and noise level follow from the seed, the picture's id and the number of the level alone; nothing is
dropped, no gradient is kept, and nothing of the training changes. Ranks share the work by position, in batches that do
not depend on how many they are, so every number is the same on one and on several.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sana_tune.data.loader import padded
from sana_tune.data.records import digest
from sana_tune.model import flow
from sana_tune.model.attention import trimmed
from sana_tune.model.levels import spread
from sana_tune.train.step import summed, to_device

if TYPE_CHECKING:
    from sana_tune.train.step import Parts

Item = tuple[int, int]  # number of a subject, number of a noise level


@dataclass(frozen=True)
class Subject:
    """One picture that is looked at again and again.

    id: unique in the run. dataset: whose it is. height, width: of its latent. made_of: changes with its pixels, its
    crop or its caption.
    """

    id: str
    dataset: str
    height: int
    width: int
    made_of: str


@dataclass(frozen=True)
class Look:
    """What a subject is for the model: latents [C, h, w], embeddings of its caption [T, D], mask [1, h, w] or None."""

    latents: Tensor
    text: Tensor
    mask: Tensor | None = None


@dataclass(frozen=True)
class Found:
    """losses: mean squared error of the velocity, fp64 on the CPU, [subjects, levels].

    velocities: what the model said of the items that were asked for, fp32 on the CPU, one after another.
    """

    losses: Tensor
    velocities: Tensor


class Stopped(Exception):
    """Somebody asked the run to stop while it measured: there is no whole result."""


class Probe:
    """Measures subjects. load: a subject's number → its look. levels: noise levels at most. positions: most latent
    positions in a batch, which holds one picture at least. seed: of the noise.
    """

    def __init__(
        self, subjects: Sequence[Subject], load: Callable[[int], Look], *, levels: int, positions: int, seed: int
    ):
        self.subjects = tuple(subjects)
        self._load = load
        self._levels = levels
        self._positions = positions
        self.seed = seed
        self._looks: dict[int, Look] = {}  # of the last batch: the next one often shows the same picture

    def sigmas(self, parts: Parts) -> Tensor:
        """The noise levels of each subject, fp64, [subjects, levels]."""
        each = [
            spread(parts.levels, parts.shift_at(subject.height * subject.width), self._levels)
            for subject in self.subjects
        ]
        return torch.tensor(each, dtype=torch.float64).reshape(len(each), -1)

    def batches(self, levels: int) -> list[list[Item]]:
        """All items, in batches of one size of picture."""
        found: list[list[Item]] = []
        by_size: dict[tuple[int, int], list[int]] = {}
        for number, subject in enumerate(self.subjects):
            by_size.setdefault((subject.height, subject.width), []).append(number)
        for (height, width), numbers in by_size.items():
            items = [(number, level) for number in numbers for level in range(levels)]
            size = max(1, self._positions // (height * width))
            found += [items[first : first + size] for first in range(0, len(items), size)]
        return found

    def measure(
        self,
        parts: Parts,
        *,
        keep: Sequence[Item] = (),
        share: tuple[int, int] | None = None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> Found:
        """Measure everything with the weights that the model holds now.

        keep: items whose velocities are wanted. share: (rank, ranks), to measure that share alone, with zeros for the
        rest; None = this process's, and what all found. stopped: asked between batches of a run of one process;
        Stopped is raised when it is true.
        """
        own, all_ = share or (parts.accelerator.process_index, parts.accelerator.num_processes)
        sigmas = self.sigmas(parts)
        losses = torch.zeros_like(sigmas)
        kept = {item: torch.zeros(0) for item in keep}
        batches = self.batches(sigmas.shape[1])
        with _looking(parts):
            for turn in range(-(-len(batches) // all_)):  # all ranks take as many turns: the model may be shared out
                if all_ == 1 and stopped():
                    raise Stopped
                number = turn * all_ + own
                items = batches[min(number, len(batches) - 1)]
                velocities, per_sample = self._forward(parts, items, sigmas)
                if number >= len(batches):
                    continue
                for place, item in enumerate(items):
                    losses[item] = float(per_sample[place])
                    if item in kept:
                        kept[item] = velocities[place].float().cpu().flatten()
        flat = [kept[item] if len(kept[item]) else torch.zeros(self._elements(item, parts)) for item in keep]
        found = Found(losses, torch.cat(flat) if flat else torch.zeros(0))
        return found if share else _together(parts, found)

    def _elements(self, item: Item, parts: Parts) -> int:
        subject = self.subjects[item[0]]
        return int(parts.bare.config["out_channels"]) * subject.height * subject.width

    def _forward(self, parts: Parts, items: Sequence[Item], sigmas: Tensor) -> tuple[Tensor, list[float]]:
        """The velocities [B, C, h, w] of a batch of items, and their losses."""
        numbers = dict.fromkeys(number for number, _ in items)
        self._looks = {number: self._looks.get(number) or self._load(number) for number in numbers}
        shown = [self._looks[number] for number, _ in items]
        device, dtype = parts.accelerator.device, parts.input_dtype
        sigma = torch.stack([sigmas[item] for item in items]).float()
        x0 = torch.stack([look.latents for look in shown]).float()
        noise = torch.stack([self._noise(item, look.latents) for item, look in zip(items, shown, strict=True)])
        text, text_mask = trimmed(*padded([look.text for look in shown]))
        level = to_device(sigma, device)
        with parts.accelerator.autocast():
            velocity = parts.bare(
                hidden_states=flow.noised(to_device(x0, device), to_device(noise, device), level).to(dtype),
                encoder_hidden_states=to_device(text, device).to(dtype),
                encoder_attention_mask=None if text_mask is None else to_device(text_mask, device),
                timestep=flow.timestep(level),
                return_dict=False,
            )[0]
        mask = None
        if any(look.mask is not None for look in shown):
            places = [torch.ones(1, *look.latents.shape[1:]) if look.mask is None else look.mask for look in shown]
            mask = to_device(torch.stack(places).float(), device)
        wanted = flow.target(to_device(x0, device), to_device(noise, device))
        return velocity, flow.loss(velocity, wanted, mask).per_sample.tolist()

    def _noise(self, item: Item, like: Tensor) -> Tensor:
        number, level = item
        seed = int(digest("probe", self.seed, self.subjects[number].id, level)[:8], 16)
        return torch.randn(tuple(like.shape), generator=torch.Generator().manual_seed(seed))


@contextmanager
def _looking(parts: Parts) -> Iterator[None]:
    """Eval mode, no gradients; mode and random numbers are as before afterwards, whatever happens in here."""
    model, device = parts.bare, parts.accelerator.device
    modes = [(module, module.training) for module in model.modules()]
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            model.eval()
            yield
    finally:
        for module, training in modes:
            module.training = training


def _together(parts: Parts, found: Found) -> Found:
    """What all ranks found: each number is one rank's, and zero on the others, so that sums change none."""
    if parts.accelerator.num_processes == 1:
        return found
    device = parts.accelerator.device
    losses = summed(parts.accelerator, found.losses.to(device)).cpu()
    velocities = summed(parts.accelerator, found.velocities.to(device)).cpu()
    return Found(losses, velocities)
