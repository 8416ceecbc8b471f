"""Embeddings → pictures, by the model's published sampler.

A picture drawn here is, to the pixel, the one that `SanaPipeline.from_pretrained` makes of the exported model with the
same prompt, size, steps, guidance, sampler and `torch.Generator("cpu").manual_seed(seed)`. The loop is our own, so that
half-finished pictures can be seen and guidance can be rescaled, which that pipeline does not offer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from sana_tune.errors import UserError
from sana_tune.log import log
from sana_tune.model import flow
from sana_tune.model.attention import published
from sana_tune.model.facts import check_size, read_shift
from sana_tune.model.layout import CONFIGS, read_json
from sana_tune.model.sana import MAX_TOKENS, ImageCoder, empty_device_cache, load_vae

if TYPE_CHECKING:
    from diffusers import SanaTransformer2DModel

# Called after each sampler step (from 1) with a function that gives the picture which the step points to, as scaled
# latents [1, C, h, w] in fp32.
Watch = Callable[[int, Callable[[], Tensor]], None]


def load_scheduler(folder: Path, sampler: str = "dpm++") -> Any:
    """The scheduler of a sampler (config.choices.SAMPLERS) with the flow shift of a model folder.

    dpm++ is the folder's own DPM-Solver++, or, if it stores another one, Sana's with its shift.
    """
    from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

    config = read_json(folder / CONFIGS["scheduler"])
    shift, _, _ = read_shift(config)
    if sampler == "euler":
        return FlowMatchEulerDiscreteScheduler(shift=shift)
    flows: dict[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
    if sampler == "unipc":
        return UniPCMultistepScheduler(**flows)
    if config.get("_class_name") == "DPMSolverMultistepScheduler":
        return DPMSolverMultistepScheduler(**{key: config[key] for key in config if not key.startswith("_")})
    return DPMSolverMultistepScheduler(**flows)


def set_steps(scheduler: Any, steps: int, device: torch.device | str = "cpu") -> None:
    """Have a scheduler of `load_scheduler` take so many steps.

    FlowMatchEuler's own levels are shifted when it is made and once more here: its last one would be 8.93 / 1000 at
    shift 3 and 20 steps. It gets levels that were never shifted: 2.99 / 1000.
    """
    if type(scheduler).__name__ == "FlowMatchEulerDiscreteScheduler":
        least = 1 / scheduler.config.num_train_timesteps
        scheduler.set_timesteps(sigmas=np.linspace(1.0, least, steps).tolist(), device=device)
    else:
        scheduler.set_timesteps(steps, device=device)


class Painter:
    """Draws pictures from embeddings. The VAE is loaded at the first picture and stays until `release()`.

    folder: the model folder of the VAE and the scheduler. autocast: dtype to compute in when the weights are
    fp32 masters on an accelerator; None = the weights' own, and pictures equal the exported pipeline's.
    tiled: decode in tiles, see `ImageCoder`.
    """

    def __init__(
        self,
        folder: Path,
        device: torch.device | str = "cpu",
        *,
        autocast: torch.dtype | None = None,
        vae_dtype: torch.dtype = torch.float32,
        variant: str | None = None,
        tiled: bool = False,
    ):
        self.folder = folder
        self.device = torch.device(device)
        self.autocast = autocast
        self.vae_dtype = vae_dtype
        self.variant = variant
        self.tiled = tiled
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
        sampler: str = "dpm++",
        rescale: float = 0.0,
        watch: Watch | None = None,
    ) -> np.ndarray:
        """One uint8 RGB picture [height, width, 3]. text, negative: real tokens [T, D] from `TextEncoder.encode`."""
        coder = self._loaded()
        latents = sample(
            transformer,
            load_scheduler(self.folder, sampler),
            text,
            negative,
            self._grid(width, height, coder),
            steps=steps,
            guidance=guidance,
            rescale=rescale,
            seed=seed,
            autocast=self.autocast,
            watch=watch,
        )
        return self._decoded(coder, latents)

    def latent(self, picture: np.ndarray) -> Tensor:
        """The scaled latent [C, h, w] of a uint8 picture [H, W, 3], fp32 on the CPU."""
        return self._loaded().encode(picture[None])[0]

    def release(self) -> None:
        """Let go of the VAE's memory; the next picture loads it again."""
        if self.coder is not None:
            self.coder.free()
        self.coder = None

    def _loaded(self) -> ImageCoder:
        if self.coder is None:
            wanted = {"variant": self.variant, "tiled_decoding": self.tiled}
            self.coder = load_vae(self.folder, self.device, self.vae_dtype, **wanted)
        return self.coder

    def _grid(self, width: int, height: int, coder: ImageCoder) -> tuple[int, int, int]:
        """Channels, height and width of the latents. Raises UserError for a size that cannot be drawn."""
        factor = coder.vae.spatial_compression_ratio
        if (problem := check_size(width, height, factor)) is not None:
            raise UserError(problem)
        return coder.vae.config["latent_channels"], height // factor, width // factor

    def _decoded(self, coder: ImageCoder, latents: Tensor) -> np.ndarray:
        """The picture of latents; where the device has no room for it beside the training, in main memory."""
        try:
            return coder.decode(latents)[0]
        except torch.OutOfMemoryError:
            if coder.vae.device.type == "cpu":
                raise
        log.warning("the device has no room to decode pictures beside the training: they are decoded in main memory")
        coder.vae.to("cpu")  # type: ignore[call-overload]
        empty_device_cache()
        return coder.decode(latents)[0]


@torch.no_grad()
def sample(
    transformer: SanaTransformer2DModel,
    scheduler: Any,
    text: Tensor,
    negative: Tensor,
    grid: tuple[int, int, int],
    *,
    steps: int = 20,
    guidance: float = 4.5,
    rescale: float = 0.0,
    seed: int = 0,
    autocast: torch.dtype | None = None,
    watch: Watch | None = None,
) -> Tensor:
    """Scaled latents [1, C, h, w] in fp32 for one prompt. The scheduler is used up: give a fresh one.

    text, negative: embeddings of the real tokens [T, D], T <= 300. grid: (C, h, w). The transformer draws in eval mode
    and, without autocast, with diffusers' own attention; both are restored afterwards. Source: diffusers'
    SanaPipeline.__call__, step by step.
    """
    device, dtype = transformer.device, transformer.dtype
    texts, masks = _prompted(text, negative if guidance > 1 else None, device)
    texts = texts.to(dtype)
    generator = torch.Generator("cpu").manual_seed(seed)
    latents = torch.randn((1, *grid), generator=generator, dtype=torch.float32).to(device)
    set_steps(scheduler, steps, device)
    with _drawing(transformer, autocast):
        for number, level in enumerate(scheduler.timesteps):
            found = transformer(
                latents.repeat(len(texts), 1, 1, 1).to(dtype),
                encoder_hidden_states=texts,
                encoder_attention_mask=masks,
                timestep=level.expand(len(texts)) * transformer.config["timestep_scale"],
                return_dict=False,
            )[0].float()
            velocity = found if len(texts) == 1 else flow.guided(found[:1], found[1:], guidance, rescale)
            if transformer.config["out_channels"] // 2 == grid[0]:  # a learned spread beside it, which is not used
                velocity = velocity.chunk(2, dim=1)[0]
            before, sigma = latents, scheduler.sigmas[number]
            latents = scheduler.step(velocity, level, latents, return_dict=False)[0]
            if watch is not None:
                watch(number + 1, partial(flow.predicted, before, velocity, float(sigma)))
    return latents


def _prompted(text: Tensor, negative: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """Texts [B, 300, D] and masks [B, 300] of a forward: the prompt's, after the negative one's if there is any."""
    pairs = [pad(each, device) for each in (negative, text) if each is not None]
    return torch.cat([each for each, _ in pairs]), torch.cat([mask for _, mask in pairs])


def pad(text: Tensor, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Embeddings of real tokens [T, D] → [1, 300, D] filled up with zeros, and the mask [1, 300] of ones and zeros."""
    padded = text.new_zeros(1, MAX_TOKENS, text.shape[1])
    padded[0, : len(text)] = text
    mask = torch.zeros(1, MAX_TOKENS, dtype=torch.long)
    mask[0, : len(text)] = 1
    return padded.to(device), mask.to(device)


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
