"""Scheduled sampling in the step: the model itself leads some samples to the states they are trained at."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sana_tune.model import flow, rollout
from sana_tune.model.solvers import Velocity, walk


@dataclass(frozen=True)
class Mixture:
    """A micro-batch before it is rolled in. x0, noise, noisy: [B, C, h, w] fp32 on the device; noisy is their mixture.

    levels: [B] noise levels, fp32 on the CPU.
    """

    x0: Tensor
    noise: Tensor
    noisy: Tensor
    levels: Tensor


@dataclass(frozen=True)
class RolledIn:
    """What the model is shown. states: [B, C, h, w], fp32; places: [n] the samples that were rolled in.

    clean: what the model predicts at their mixtures, [n, C, h, w] fp32; None without ReflexFlow.
    """

    states: Tensor
    places: Tensor
    x0: Tensor
    clean: Tensor | None
    reflex: rollout.Reflex | None

    def loss(
        self,
        plain: Tensor,
        prediction: Tensor,
        wanted: Tensor,
        mask: Tensor | None,
        sigma: Tensor,
        objective: flow.Objective,
    ) -> Tensor:
        """The losses of all samples, [B]: `plain`, with ReflexFlow's in place of those that were rolled in."""
        if self.reflex is None or self.clean is None or not len(self.places):
            return plain
        some = self.places
        own = rollout.loss(
            prediction[some], wanted[some], self.states[some], self.x0[some], self.clean,
            None if mask is None else mask[some], sigma[some], objective, self.reflex,
        )  # fmt: skip
        return plain.index_put((some,), own)


def roll_in(settings: rollout.Rollout, velocity: Velocity, mixture: Mixture, lengths: Tensor, shift: float) -> RolledIn:
    """Begin each sample so many sampler steps nearer to the noise and let the model walk it back to its level.

    lengths: [B] ints on the CPU, 0 = the mixture stays. Where there is no room for all steps below pure noise, there
    are fewer. The model gets no gradient of it.
    """
    device = mixture.x0.device
    levels, steps = rollout.levels_of(mixture.levels, lengths, settings.steps, shift)
    begun = flow.noised(mixture.x0, mixture.noise, levels[:, 0].float().to(device, non_blocking=True))
    here = torch.nonzero(steps > 0).flatten()
    places = here.to(device)
    states, clean = mixture.noisy.clone(), None
    if len(here):
        order = 1 if settings.sampler == "euler" else settings.order
        states[places] = walk(begun, levels, steps, velocity, settings.sampler, order)[places]
        if settings.reflex is not None:
            clean = velocity(mixture.noisy[places], mixture.levels[here], here)
    return RolledIn(states, places, mixture.x0, clean, settings.reflex)


def velocity_of(model: Any, autocast: Callable[..., Any], inputs: Mapping[str, Any], size: int | None) -> Velocity:
    """The model's velocity at states of some samples of a micro-batch, in fp32 and without a graph.

    inputs: the model's for all samples, of which the texts are taken. size: samples of each call, the missing ones
    repeated (compiled blocks would be compiled anew for another number); None = as many as there are.
    """
    text, mask = inputs["encoder_hidden_states"], inputs["encoder_attention_mask"]

    def velocity(states: Tensor, levels: Tensor, here: Tensor) -> Tensor:
        count = len(here)
        if size is not None and count < size:
            filled = torch.cat([torch.arange(count), torch.zeros(size - count, dtype=torch.int64)])
            states, levels, here = states[filled.to(states.device)], levels[filled], here[filled]
        places = here.to(text.device)
        with torch.no_grad(), autocast():
            found = model(
                hidden_states=states.to(inputs["hidden_states"].dtype),
                encoder_hidden_states=text[places],
                encoder_attention_mask=None if mask is None else mask[places],
                timestep=flow.timestep(levels).to(text.device, non_blocking=True),
                return_dict=False,
            )[0]
        return found[:count].float()

    return velocity
