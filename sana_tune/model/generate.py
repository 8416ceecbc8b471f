"""Embeddings → pictures, through diffusers' own SanaPipeline and the model's published sampler.

A picture drawn here is, to the pixel, the one that `SanaPipeline.from_pretrained` makes of the exported model
with the same prompt, size, steps, guidance and `torch.Generator("cpu").manual_seed(seed)`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from sana_tune.errors import UserError
from sana_tune.model.attention import published
from sana_tune.model.facts import check_size, read_shift
from sana_tune.model.layout import CONFIGS, read_json
from sana_tune.model.sana import MAX_TOKENS, ImageCoder, load_vae

if TYPE_CHECKING:
    from diffusers import DPMSolverMultistepScheduler, SanaTransformer2DModel


def load_scheduler(folder: Path) -> DPMSolverMultistepScheduler:
    """The sampler of a model folder: its own DPM-Solver++, or, if it stores another one, Sana's with its shift.

    Sana is published with DPM-Solver++ for flows; FlowMatchEuler shifts its last sigma twice.
    """
    from diffusers import DPMSolverMultistepScheduler

    config = read_json(folder / CONFIGS["scheduler"])
    if config.get("_class_name") == "DPMSolverMultistepScheduler":
        return DPMSolverMultistepScheduler(**{key: config[key] for key in config if not key.startswith("_")})
    shift, _, _ = read_shift(config)
    return DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)


class Painter:
    """Draws pictures from embeddings. The VAE is loaded at the first picture and stays until `release()`.

    folder: the model folder of the VAE and the scheduler. autocast: dtype to compute in when the weights are
    fp32 masters on an accelerator; None = the weights' own, and pictures equal the exported pipeline's.
    """

    def __init__(
        self,
        folder: Path,
        device: torch.device | str = "cpu",
        *,
        autocast: torch.dtype | None = None,
        vae_dtype: torch.dtype = torch.float32,
        variant: str | None = None,
    ):
        self.folder = folder
        self.device = torch.device(device)
        self.autocast = autocast
        self.vae_dtype = vae_dtype
        self.variant = variant
        self.coder: ImageCoder | None = None

    def draw(
        self,
        transformer: SanaTransformer2DModel,
        text: Tensor,
        negative: Tensor,
        *,
        width: int,
        height: int,
        steps: int = 20,
        guidance: float = 4.5,
        seed: int = 0,
    ) -> np.ndarray:
        """One uint8 RGB picture [height, width, 3]. text, negative: real tokens [T, D] from `TextEncoder.encode`."""
        if self.coder is None:
            self.coder = load_vae(self.folder, self.device, self.vae_dtype, variant=self.variant)
        return draw(
            transformer,
            self.coder,
            load_scheduler(self.folder),
            text,
            negative,
            width=width,
            height=height,
            steps=steps,
            guidance=guidance,
            seed=seed,
            autocast=self.autocast,
        )

    def release(self) -> None:
        """Let go of the VAE's memory; the next picture loads it again."""
        if self.coder is not None:
            self.coder.free()
        self.coder = None


@torch.no_grad()
def draw(
    transformer: SanaTransformer2DModel,
    coder: ImageCoder,
    scheduler: DPMSolverMultistepScheduler,
    text: Tensor,
    negative: Tensor,
    *,
    width: int,
    height: int,
    steps: int = 20,
    guidance: float = 4.5,
    seed: int = 0,
    autocast: torch.dtype | None = None,
) -> np.ndarray:
    """One uint8 RGB picture [height, width, 3] for one prompt. The scheduler is used up: give a fresh one.

    text, negative: embeddings of the real tokens [T, D], T <= 300. The transformer draws in eval mode and, without
    autocast, with diffusers' own attention; both are restored afterwards. Raises UserError for a size that
    cannot be drawn.
    """
    problem = check_size(width, height, coder.vae.spatial_compression_ratio)
    if problem:
        raise UserError(problem)
    device = transformer.device
    positive, mask = pad(text, device)
    opposite, opposite_mask = pad(negative, device)
    guided: dict[str, Any] = {}
    if guidance > 1:
        guided = {"negative_prompt_embeds": opposite, "negative_prompt_attention_mask": opposite_mask}
    with _drawing(transformer, autocast):
        latents = _pipeline(transformer, coder, scheduler)(
            prompt_embeds=positive,
            prompt_attention_mask=mask,
            negative_prompt=None,
            **guided,
            width=width,
            height=height,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=torch.Generator("cpu").manual_seed(seed),
            use_resolution_binning=False,
            output_type="latent",
            return_dict=False,
        )[0]
    return coder.decode(latents)[0]


def pad(text: Tensor, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Embeddings of real tokens [T, D] → [1, 300, D] filled up with zeros, and the mask [1, 300] of ones and zeros."""
    padded = text.new_zeros(1, MAX_TOKENS, text.shape[1])
    padded[0, : len(text)] = text
    mask = torch.zeros(1, MAX_TOKENS, dtype=torch.long)
    mask[0, : len(text)] = 1
    return padded.to(device), mask.to(device)


def _pipeline(transformer: Any, coder: ImageCoder, scheduler: Any) -> Any:
    from diffusers import SanaPipeline

    pipeline = SanaPipeline(
        tokenizer=None,  # type: ignore[arg-type]
        text_encoder=None,  # type: ignore[arg-type]
        vae=coder.vae,
        transformer=transformer,
        scheduler=scheduler,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@contextmanager
def _drawing(transformer: Any, autocast: torch.dtype | None) -> Iterator[None]:
    """Eval mode, and diffusers' attention or autocast; what was is restored."""
    was_training = transformer.training
    transformer.eval()
    own = published(transformer) if autocast is None else nullcontext()
    precision = nullcontext() if autocast is None else torch.autocast(transformer.device.type, dtype=autocast)
    try:
        with own, precision:
            yield
    finally:
        transformer.train(was_training)
