"""nano's autoencoder: a small ``AutoencoderDC`` of factor 8, trained on flat figures of any colour."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderDC
from PIL import Image, ImageDraw
from torch import Tensor

from scripts.nano import draw

LATENT_CHANNELS = 8
FACTOR = 8
# The first stage has no layers: the 64 px level is a plain pixel (un)shuffle, which halves a step's time.
CHANNELS, LAYERS = (16, 32, 64, 64), (0, 2, 2, 1)
BLOCKS = ("ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock")
OTHER_SIZES_PX = ((48, 48), (56, 72), (72, 56), (96, 96))  # (width, height); so that attention knows them


def build(seed: int = 0) -> AutoencoderDC:
    """The autoencoder with random weights; ``scaling_factor`` stays 1 until ``finish`` measures it."""
    torch.manual_seed(seed)
    scales = ((), (), (), (5,))
    blocks: Any = BLOCKS  # diffusers annotates a tuple of one
    return AutoencoderDC(
        latent_channels=LATENT_CHANNELS,
        attention_head_dim=16,
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        encoder_block_out_channels=CHANNELS,
        decoder_block_out_channels=CHANNELS,
        encoder_layers_per_block=LAYERS,
        decoder_layers_per_block=LAYERS,
        encoder_qkv_multiscales=scales,
        decoder_qkv_multiscales=scales,
    )


def random_polygon_mask(rng: np.random.Generator, size_px: tuple[int, int]) -> Image.Image:
    """Three to eight corners anywhere: corners and edges the named figures lack."""
    mask = Image.new("L", size_px, 0)
    corners = [tuple(rng.uniform(0, size_px)) for _ in range(int(rng.integers(3, 9)))]
    ImageDraw.Draw(mask).polygon(corners, fill=255)
    return mask


def draw_masks(count: int, seed: int, size_px: tuple[int, int], polygons: float = 0.25) -> Tensor:
    """Soft masks [count, 1, height, width] in 0..255 (uint8): the known figures and some random polygons."""
    big = (size_px[0] * draw.SUPERSAMPLING, size_px[1] * draw.SUPERSAMPLING)
    masks = []
    for number in range(count):
        rng = np.random.default_rng((seed, number))
        if rng.random() < polygons:
            mask = random_polygon_mask(rng, big)
        else:
            scene = draw.random_scene(rng, size_px=size_px)
            centre = (scene.x * big[0], scene.y * big[1])
            mask = draw.draw_mask(scene.figure, centre, scene.radius * min(big), big)
        masks.append(np.asarray(mask.resize(size_px, Image.Resampling.LANCZOS)))
    return torch.from_numpy(np.stack(masks))[:, None]


def colour_in(masks: Tensor, generator: torch.Generator, any_colour: float = 0.3) -> Tensor:
    """Pictures [B, 3, H, W] in [-1, 1] from masks [B, 1, H, W]: palette colours, at times any colours."""
    palette = torch.tensor(list(draw.COLOURS.values())) / 127.5 - 1
    count = len(masks)
    first = torch.randint(len(palette), (count,), generator=generator)
    second = (first + torch.randint(1, len(palette), (count,), generator=generator)) % len(palette)
    named = torch.stack([palette[first], palette[second]])
    anything = torch.rand(2, count, 3, generator=generator) * 2 - 1
    use_any = torch.rand(count, 1, generator=generator) < any_colour
    ground, figure = torch.where(use_any, anything, named)[..., None, None]
    return torch.lerp(ground, figure, masks / 255.0)


def batches(batch: int, seed: int) -> Iterator[Tensor]:
    """Endless pictures [batch, 3, H, W] in [-1, 1]; one batch in eight has another size than 64 px."""
    generator = torch.Generator().manual_seed(seed)
    usual = draw_masks(12000, seed, (draw.SIDE_PX, draw.SIDE_PX))
    others = [draw_masks(500, seed + 1, size) for size in OTHER_SIZES_PX]
    step = 0
    while True:
        masks = others[step // 8 % len(others)] if step % 8 == 7 else usual
        chosen = masks[torch.randint(len(masks), (batch,), generator=generator)]
        if step % 2:
            chosen = chosen.flip(3)
        yield colour_in(chosen, generator)
        step += 1


def loss_of(vae: AutoencoderDC, pictures: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(loss, mean squared error): L1 + L2, noise on the latent so that decoding forgives the transformer."""
    with torch.autocast("cpu", dtype=torch.bfloat16):  # AMX: a third faster than fp32
        latent = vae.encode(pictures, return_dict=False)[0].float()
        noisy = latent + 0.05 * torch.randn(latent.shape, generator=generator)
        decoded = vae.decode(noisy, return_dict=False)[0].float()
    error = decoded - pictures
    mse = error.square().mean()
    return error.abs().mean() + mse + 1e-3 * latent.square().mean(), mse.detach()


def train(
    vae: AutoencoderDC, steps: int, seed: int = 0, batch: int = 16, peak: float = 2e-3, say: Callable = print
) -> None:
    """AdamW with a cosine down to 0; 4,500 steps are about 8 minutes on two cores with AMX."""
    generator = torch.Generator().manual_seed(seed + 1)
    supply = batches(batch, seed)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=1e-4)
    vae.train()
    start, total = time.monotonic(), 0.0
    for step in range(1, steps + 1):
        rate = peak * min(1, step / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss, mse = loss_of(vae, next(supply), generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        total += float(mse)
        if step % 200 == 0:
            say(f"vae step {step}/{steps} {time.monotonic() - start:.0f} s, mse {total / 200:.5f}", flush=True)
            total = 0.0


@torch.no_grad()
def finish(vae: AutoencoderDC, seed: int = 99) -> dict[str, float]:
    """Set ``scaling_factor`` = 1 / std of the latents of fresh drawings; return what was measured (fp32)."""
    vae.eval()
    array = np.stack([np.asarray(draw.draw(scene)) for scene in draw.random_scenes(512, seed)])
    pictures = torch.from_numpy(array).permute(0, 3, 1, 2) / 127.5 - 1
    latents = torch.cat([vae.encode(part, return_dict=False)[0] for part in pictures.split(64)])
    decoded = torch.cat([vae.decode(part, return_dict=False)[0] for part in latents.split(64)])
    std = float(latents.std())
    vae.register_to_config(scaling_factor=round(1 / std, 5))
    return {
        "mse": float((decoded - pictures).square().mean()),
        "latent_std": std,
        "latent_mean": float(latents.mean()),
    }
