"""Scaled latents → small pictures at next to no cost, to see a sample before it is finished.

Two ways: a small decoder whose weights others trained, or a linear map fitted to the run's own latents and pictures.
The decoder is built after TAESANA of madebyollin/taesd (MIT License, Copyright (c) 2023 Ollin Boer Bohan), so that its
published weights fit; diffusers' AutoencoderTiny cannot hold its widths.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from sana_tune.errors import Problem, UserError
from sana_tune.model.preview_file import CHANNELS, KEY

LARGEST_PX = 256  # the longer side of a preview
_CELL_PX = 8  # the linear map makes at most so many px a side of one latent position
_STAGES = ((256, 128), (128, 64), (64, 64), (64, 64), (64, 64))  # width of three blocks, and after doubling the size
_CLAMP = 3.0  # latents are softly kept within this, as TAESANA was trained

Pair = tuple[Tensor, np.ndarray]  # scaled latents [C, h, w], and their picture, uint8 [H, W, 3]


class Linear:
    """One matrix from the channels of a latent position to the p×p px that stand for it, fitted by least squares."""

    def __init__(self, weight: Tensor):
        self.weight = weight  # [C + 1, p * p * 3]

    @classmethod
    def fit(cls, pairs: Iterable[Pair]) -> Linear:
        """The map with the least squared error over the pairs. Raises ValueError without any.

        Slightly held towards 0 (ridge), so that few or plain pictures give a map too.
        """
        squares = products = None
        cell = 0
        for latent, picture in pairs:
            cell = cell or min(_CELL_PX, picture.shape[0] // latent.shape[1])
            inputs, wanted = _with_one(latent).double(), _cells(_pooled(_levels(picture), latent, cell), cell).double()
            squares = inputs.T @ inputs + (0 if squares is None else squares)
            products = inputs.T @ wanted + (0 if products is None else products)
        if squares is None or products is None:
            raise ValueError("a linear map needs at least one latent with its picture")
        held = 1e-4 * squares.diagonal().mean() * torch.eye(len(squares), dtype=squares.dtype)
        return cls(torch.linalg.solve(squares + held, products).float())

    def __call__(self, latents: Tensor) -> Tensor:
        """Levels 0..1 [3, h·p, w·p] of scaled latents [1, C, h, w], on their device."""
        height, width = latents.shape[-2:]
        cells = _with_one(latents[0].float()) @ self.weight.to(latents.device)
        cell = round((cells.shape[1] // 3) ** 0.5)
        levels = cells.reshape(height, width, cell, cell, 3).permute(4, 0, 2, 1, 3)
        return levels.reshape(3, height * cell, width * cell).clamp(0, 1)

    def release(self) -> None:
        """There is nothing on the device."""


class Tiny:
    """TAESANA's decoder. Its weights are in main memory, and on the device from the first picture to `release`."""

    def __init__(self, network: nn.Module, scale: float = 1.0):
        self.network = network
        self.scale = scale  # what scaled latents are multiplied by to get those that it was trained on

    @torch.no_grad()
    def __call__(self, latents: Tensor) -> Tensor:
        """Levels 0..1 [3, h·32, w·32] of scaled latents [1, 32, h, w], on their device."""
        network = self.network.to(latents.device)
        return network(latents.float() * self.scale)[0].clamp(0, 1)

    def release(self) -> None:
        """Give the device's memory back."""
        self.network.to("cpu")


class _Block(nn.Module):
    """Three convolutions beside a skip; the names are those of the published weights."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Sequential(_conv(width, width), nn.ReLU(), _conv(width, width), nn.ReLU(), _conv(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x) + x)


class _SoftClamp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / _CLAMP) * _CLAMP


def _conv(inputs: int, outputs: int, *, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias)


def tiny_network(channels: int = CHANNELS) -> nn.Sequential:
    """TAESANA's decoder with random weights: 32 channels in, pictures 32 times as large out."""
    parts: list[nn.Module] = [_SoftClamp(), _conv(channels, _STAGES[0][0]), nn.ReLU()]
    for width, after in _STAGES:
        parts += [_Block(width), _Block(width), _Block(width)]
        parts += [nn.Upsample(scale_factor=2), _conv(width, after, bias=False)]
    return nn.Sequential(*parts, _Block(_STAGES[-1][1]), _conv(_STAGES[-1][1], 3)).eval().requires_grad_(False)


def load_tiny(path: Path) -> Tiny:
    """The decoder with the weights of a file, .pth or .safetensors; nothing in it is run. Raises UserError."""
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
        state = {name.removeprefix("decoder."): tensor for name, tensor in state.items()}
        network = tiny_network()
        network.load_state_dict(state)
    except pickle.UnpicklingError as error:
        raise UserError(_not_a_decoder(path, "this file holds more than weights, and is not read")) from error
    except (OSError, RuntimeError, ValueError, KeyError, AttributeError, EOFError, SafetensorError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(_not_a_decoder(path, f"these are no weights of the TAESANA decoder: {reason}")) from error
    return Tiny(network)


def _not_a_decoder(path: Path, what: str) -> Problem:
    fix = "name taesana_decoder.pth of madebyollin/taesd, or leave the key out: a linear map is fitted then"
    return Problem(f"{KEY} {path}", what, fix)


def fitted(tiny: Tiny, pairs: Sequence[Pair], factor: float) -> Tiny:
    """The decoder with the latent scale that suits the run's latents: scaled ones, or raw ones (divided by `factor`).

    Raises UserError when its pictures are not much nearer to the run's than one plain colour: it is another model's.
    """
    plain = _plain_error(pairs)
    errors = {scale: mean_error(Tiny(tiny.network, scale), pairs) for scale in (1.0, 1 / factor)}
    scale = min(errors, key=lambda each: errors[each])
    if not errors[scale] < plain / 2:
        what = (
            f"this decoder is not for this model's latents: its mean squared error is {errors[1.0]:.3g} on scaled ones "
            f"and {errors[1 / factor]:.3g} on raw ones; that of their mean colour is {plain:.3g}"
        )
        raise UserError(Problem(KEY, what, "leave it out: a linear map is fitted then"))
    return Tiny(tiny.network, scale)


def _plain_error(pairs: Sequence[Pair]) -> float:
    """Mean squared error of the pictures' mean colour."""
    levels = torch.cat([_pooled(_levels(picture), latent, 1).flatten(1) for latent, picture in pairs], dim=1)
    return float((levels - levels.mean(dim=1, keepdim=True)).square().mean())


def mean_error(decode: Linear | Tiny, pairs: Sequence[Pair]) -> float:
    """Mean squared error of levels 0..1 over the pairs, on a grid of at most 8×8 px a latent position."""
    total = 0.0
    for latent, picture in pairs:
        cell = min(_CELL_PX, picture.shape[0] // latent.shape[1])
        made = nn.functional.adaptive_avg_pool2d(decode(latent[None]), (latent.shape[1] * cell, latent.shape[2] * cell))
        total += float((made.cpu() - _pooled(_levels(picture), latent, cell)).square().mean())
    return total / len(pairs)


def pixels(levels: Tensor) -> Tensor:
    """Levels 0..1 [3, H, W] as uint8 [H', W', 3] with sides of at most LARGEST_PX, on their device."""
    height, width = levels.shape[-2:]
    share = -(-max(height, width) // LARGEST_PX)
    if share > 1:
        levels = nn.functional.avg_pool2d(levels, share)
    return (levels * 255).round().to(torch.uint8).permute(1, 2, 0)


def _levels(picture: np.ndarray) -> Tensor:
    """A uint8 picture [H, W, 3] as levels 0..1 [3, H, W]."""
    return torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1).float() / 255


def _with_one(latent: Tensor) -> Tensor:
    """The positions of a latent [C, h, w] as rows, with a 1 at the end: [h·w, C + 1]."""
    rows = latent.flatten(1).T
    return torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)


def _pooled(levels: Tensor, latent: Tensor, cell: int) -> Tensor:
    """A picture's levels as means over cells of which `cell` a side stand for one latent position."""
    return nn.functional.adaptive_avg_pool2d(levels, (latent.shape[1] * cell, latent.shape[2] * cell))


def _cells(levels: Tensor, cell: int) -> Tensor:
    """Levels [3, h·p, w·p] as rows of one latent position each: [h·w, p·p·3]."""
    _, height, width = levels.shape
    parts = levels.reshape(3, height // cell, cell, width // cell, cell).permute(1, 3, 2, 4, 0)
    return parts.reshape((height // cell) * (width // cell), -1)
