"""Sana's three networks: load them, encode prompts, encode and decode pictures.

Prompts are encoded exactly as diffusers' SanaPipeline does it (`pipeline_sana.py`, `encode_prompt`), so that what
is trained on is what a user of the exported pipeline asks with.
"""

from __future__ import annotations

import gc
import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from sana_tune.errors import Problem, UserError
from sana_tune.log import log
from sana_tune.model.half import CAPTION_PATH
from sana_tune.model.instruction import MAX_TOKENS, resolve_instruction
from sana_tune.model.layout import INDEX, component_weights, read_json
from sana_tune.model.quantise import quantise

if TYPE_CHECKING:
    from diffusers import AutoencoderDC, SanaTransformer2DModel

_DTYPES: Mapping[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


class NotFinite(Exception):
    """Some pictures of a batch gave latents with NaN or infinity; `indices` says which."""

    def __init__(self, indices: tuple[int, ...]):
        self.indices = indices
        super().__init__(f"the VAE gave non-finite latents for the pictures {indices} of the batch")


class TextEncoder:
    """Gemma-2 with its tokenizer: final texts → embeddings of their real tokens. `free()` lets go of the memory."""

    def __init__(self, tokenizer: Any, model: Any, instruction: str):
        self.tokenizer = tokenizer
        self.model = model
        self.instruction = instruction
        self.tokenizer.padding_side = "right"

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    def count_tokens(self, text: str) -> int:
        """Tokens of a text with the beginning-of-sequence token, without instruction and without cutting."""
        return len(self.tokenizer.encode(text))

    def is_cut(self, text: str) -> bool:
        """Whether a text with the instruction is longer than what is kept of it."""
        before = self.instruction if text else ""
        return len(self.tokenizer.encode(before + text)) > self._length(before)

    def encode(self, texts: Sequence[str], with_instruction: bool = True) -> list[Tensor]:
        """Last hidden states of the texts' real tokens: one [T, D] each, T <= 300, in the encoder's dtype, on the CPU.

        texts are final (stripped, case chosen). with_instruction puts the instruction before every text but "".
        The instruction's n tokens and the text are cut at n + 300 - 2 and positions [0] + the last 299 are kept,
        of the padded sequence; of these the real tokens remain. Padding is to the full length, and on a CPU texts
        are encoded one by one, so that an embedding's bits depend on its text alone.
        """
        befores = [self.instruction if with_instruction and text else "" for text in texts]
        found: list[Tensor | None] = [None] * len(texts)
        for before in sorted(set(befores)):
            places = [place for place, own in enumerate(befores) if own == before]
            size = 1 if self.model.device.type == "cpu" else max(1, len(places))
            whole = [before + texts[place] for place in places]
            parts = [whole[start : start + size] for start in range(0, len(whole), size)]
            encoded = [state for part in parts for state in self._encode(part, self._length(before))]
            for place, embedding in zip(places, encoded, strict=True):
                found[place] = embedding
        return [embedding for embedding in found if embedding is not None]

    def free(self) -> None:
        """Drop the networks and give the device its memory back. The encoder is of no use afterwards."""
        self.__dict__.clear()
        empty_device_cache()

    def _length(self, before: str) -> int:
        return MAX_TOKENS if not before else len(self.tokenizer.encode(before)) + MAX_TOKENS - 2

    @torch.no_grad()
    def _encode(self, texts: list[str], length: int) -> list[Tensor]:
        inputs = self.tokenizer(
            texts,
            padding="max_length",
            max_length=length,
            truncation=True,
            add_special_tokens=True,
            return_tensors="pt",
        )
        device = self.model.device
        mask = inputs.attention_mask.to(device)
        states = self.model(inputs.input_ids.to(device), attention_mask=mask)[0]
        kept = [0, *range(length - MAX_TOKENS + 1, length)]
        states, mask = states[:, kept].cpu(), mask[:, kept].bool().cpu()
        return [state[real].clone() for state, real in zip(states, mask, strict=True)]


class ImageCoder:
    """DC-AE: pictures ↔ scaled latents. `free()` lets go of the memory.

    tiled_encoding, tiled_decoding: in overlapping tiles of diffusers' size, 512 px for Sana, one at a time, what is
    larger than one of them. Its attention then sees a tile and not the picture, so that the result is another one.
    """

    def __init__(self, vae: AutoencoderDC, *, tiled_encoding: bool = False, tiled_decoding: bool = False):
        self.vae = vae
        self.tiled_encoding, self.tiled_decoding = tiled_encoding, tiled_decoding

    @property
    def scaling_factor(self) -> float:
        return self.vae.config["scaling_factor"]

    @property
    def in_fp32(self) -> bool:
        """Whether it computes in full precision."""
        return self.vae.dtype == torch.float32

    @contextmanager
    def exact(self) -> Iterator[None]:
        """In here it computes in fp32, with the weights it has."""
        before, module = self.vae.dtype, cast(torch.nn.Module, self.vae)
        module.to(torch.float32)
        try:
            yield
        finally:
            module.to(before)

    @torch.no_grad()
    def encode(self, pictures: np.ndarray) -> Tensor:
        """Scaled latents, fp32 on the CPU: [B, C, h, w] from uint8 RGB pictures [B, H, W, 3] of one size.

        x0 = encode(picture in [-1, 1]).latent * scaling_factor; DC-AE draws nothing. Sides must be multiples of
        the VAE's factor. On a CPU pictures are encoded one by one: a latent's bits then do not depend on its
        batch, and batching would gain nothing. Raises NotFinite.
        """
        pixels = torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2)
        size = 1 if self.vae.device.type == "cpu" else len(pixels)
        latents = torch.cat([self._encode(part) for part in pixels.split(size)])
        bad = (~torch.isfinite(latents).flatten(1).all(1)).nonzero().flatten().tolist()
        if bad:
            raise NotFinite(tuple(bad))
        return latents

    @torch.no_grad()
    def decode(self, latents: Tensor) -> np.ndarray:
        """uint8 RGB pictures [B, H, W, 3] from scaled latents [B, C, h, w], as diffusers' pipeline makes them."""
        raw = latents.to(self.vae.device, self.vae.dtype) / self.scaling_factor
        self.vae.use_tiling = self.tiled_decoding
        pixels = (self.vae.decode(raw, return_dict=False)[0] * 0.5 + 0.5).clamp(0, 1)
        pixels = pixels.permute(0, 2, 3, 1).float().cpu().numpy()
        return (pixels * 255).round().astype("uint8")

    def free(self) -> None:
        """Drop the network and give the device its memory back. The coder is of no use afterwards."""
        self.__dict__.clear()
        empty_device_cache()

    def _encode(self, pixels: Tensor) -> Tensor:
        scaled = pixels.to(self.vae.device).float() / 255 * 2 - 1
        self.vae.use_tiling = self.tiled_encoding
        latent = self.vae.encode(scaled.to(self.vae.dtype), return_dict=False)[0]
        return latent.float().cpu() * self.scaling_factor


def load_text_encoder(
    folder: Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    *,
    instruction: str | None = None,
    variant: str | None = None,
    quantised: str = "no_change",
    via: str = "cpu",
) -> TextEncoder:
    """Gemma-2 and its tokenizer from a model folder, in eval mode.

    dtype: None = as its files are stored. instruction: see `resolve_instruction`. quantised, via: precision of its
    matrices and where they are packed, see `quantise`. Raises UserError for files that are missing or incomplete.
    """
    weights = component_weights(folder, "text_encoder", variant=variant)
    model = _load(
        _pipeline_class(folder, "text_encoder", "Gemma2Model"),
        folder / "text_encoder",
        weights.variant,
        dtype=dtype or "auto",
        attn_implementation="eager",  # Gemma-2 caps its logits, which SDPA cannot
    )
    tokenizer = _pipeline_class(folder, "tokenizer", "GemmaTokenizerFast").from_pretrained(folder / "tokenizer")
    if not tokenizer.encode(""):
        raise UserError(
            Problem(
                str(folder / "tokenizer"),
                "a Gemma tokenizer begins every text with a token of its own; this one adds none, so that an empty "
                "caption would be nothing at all",
                "set add_bos_token in tokenizer_config.json, or use the model's own tokenizer",
            )
        )
    if quantised != "no_change":
        log.info("Text encoder: %s", quantise(model, quantised, device=device, via=via).told())
    return TextEncoder(tokenizer, model.to(device).eval(), resolve_instruction(instruction))


def load_vae(
    folder: Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    variant: str | None = None,
    tiled_encoding: bool = False,
    tiled_decoding: bool = False,
) -> ImageCoder:
    """DC-AE from a model folder, in eval mode; tiled: see `ImageCoder`. Raises UserError as `load_text_encoder`."""
    from diffusers import AutoencoderDC

    weights = component_weights(folder, "vae", variant=variant)
    vae = _load(AutoencoderDC, folder / "vae", weights.variant, dtype=dtype)
    # Its weights keep requires_grad, though nothing asks for gradients: without it torch picks other convolution
    # kernels on a CPU, and pictures would differ in the last bit from those of the pipeline.
    return ImageCoder(vae.to(device).eval(), tiled_encoding=tiled_encoding, tiled_decoding=tiled_decoding)


def load_transformer(
    folder: Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    *,
    variant: str | None = None,
    subfolder: str = "transformer",
) -> SanaTransformer2DModel:
    """The diffusion transformer in train mode, every weight trainable and in `dtype`.

    folder: a model's, or a checkpoint's, which holds nothing else. subfolder: "transformer_ema" reads an average.
    Raises UserError as `load_text_encoder`.
    """
    from diffusers import SanaTransformer2DModel

    name = next(short for short, torch_dtype in _DTYPES.items() if torch_dtype == dtype)
    chosen = None
    if subfolder == "transformer" and (folder / INDEX).is_file():
        chosen = component_weights(folder, "transformer", variant=variant, dtype=name).variant
    transformer = _load(SanaTransformer2DModel, folder / subfolder, chosen, dtype=dtype)
    return transformer.to(device).train().requires_grad_(True)


def freeze(transformer: Any, dtype: torch.dtype, *, autocast: torch.dtype | None) -> Any:
    """A SanaTransformer2DModel, in place, as a frozen reference beside one that trains with weights in `dtype`.

    autocast: what both compute in beside fp32 weights; None = fp32. Matrices and convolutions are kept in it then:
    autocast casts them at every use, so that half the memory gives the very same predictions. fp16 leaves the caption
    path in fp32 (model.half).
    """
    transformer.eval().requires_grad_(False)
    transformer.disable_gradient_checkpointing()
    if dtype != torch.float32:
        return transformer.to(dtype)
    if autocast is not None:
        spared = CAPTION_PATH if autocast == torch.float16 else ()
        for name, module in transformer.named_modules():
            if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)) and not name.startswith(spared):
                module.to(autocast)
    return transformer


def empty_device_cache() -> None:
    """Collect what is no longer referenced and hand the accelerator's unused memory back."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _pipeline_class(folder: Path, component: str, default: str) -> Any:
    """The transformers class that model_index.json names for a component, as SanaPipeline would load it."""
    entry = read_json(folder / INDEX).get(component) or ["transformers", default]
    transformers = importlib.import_module("transformers")
    name = str(entry[1])
    if entry[0] != "transformers" or not hasattr(transformers, name):
        raise UserError(
            Problem(
                str(folder / INDEX),
                f"{component} must be a class of transformers such as {default}; found {'.'.join(map(str, entry))}",
                "use a Sana model in diffusers layout",
            )
        )
    return getattr(transformers, name)


def _load(kind: Any, folder: Path, variant: str | None, **options: Any) -> Any:
    """`from_pretrained` that refuses weights which do not fill the network exactly."""
    try:
        with no_bars():
            model, info = kind.from_pretrained(
                folder,
                variant=variant,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                **options,
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            Problem(str(folder), f"{kind.__name__} cannot be loaded: {error}", "download or copy the model again")
        ) from error
    wrong = {what: info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys") if info.get(what)}
    if wrong:
        found = "; ".join(f"{what.replace('_', ' ')}: {_few(names)}" for what, names in wrong.items())
        raise UserError(
            Problem(str(folder), f"the weights do not fit {kind.__name__}: {found}", "use the model's own files")
        )
    return model


@contextmanager
def no_bars() -> Iterator[None]:
    """Keep the libraries' own progress bars off the screen; what the user had set is restored."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    shown = [library for library in (diffusers_logging, transformers_logging) if library.is_progress_bar_enabled()]
    for library in shown:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()


def _few(names: Any) -> str:
    names = sorted(str(name) for name in names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
