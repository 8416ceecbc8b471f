"""CLIP score: how well a picture fits its prompt, by transformers' CLIP.

100 · cos(picture, prompt), never below 0: the definition of torchmetrics, and of Hessel et al. (arXiv 2104.08718) with
100 in place of their factor 2.5. Pictures are resized, cropped and normalised by the model's own settings with Pillow.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from sana_tune.errors import Problem, UserError
from sana_tune.model.sana import empty_device_cache, no_bars

BATCH = 8


class ClipScorer:
    """A CLIP model with its tokenizer and its way of preparing pictures. `free()` it."""

    def __init__(self, model: Any, tokenizer: Any, processor: Any):
        self.model = model
        self.tokenizer = tokenizer
        self.processor = processor

    @classmethod
    def load(cls, folder: Path, device: torch.device | str = "cpu") -> ClipScorer:
        """CLIP from its folder, in fp32. Raises UserError for files that are no CLIP model or are incomplete."""
        from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

        try:
            with no_bars():
                loaded: Any = CLIPModel.from_pretrained(
                    folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
                )
            model, info = loaded
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            processor = CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
            raise UserError(Problem(str(folder), f"CLIP cannot be loaded: {error}", _AGAIN)) from error
        if missing := sorted(info["missing_keys"]):
            raise UserError(
                Problem(str(folder), f"the weights lack {len(missing)} parts, such as {missing[0]}", _AGAIN)
            )
        return cls(model.to(device).eval(), tokenizer, processor)

    @property
    def longest(self) -> int:
        """Tokens that the model reads of a prompt; the rest is cut off."""
        return int(self.model.config.text_config.max_position_embeddings)

    def is_cut(self, prompt: str) -> bool:
        """Whether a prompt is longer than the model reads."""
        return len(self.tokenizer(prompt)["input_ids"]) > self.longest

    @torch.no_grad()
    def score(self, pictures: Sequence[Any], prompts: Sequence[str]) -> list[float]:
        """The score of each picture (PIL, RGB) with the prompt in its place."""
        found: list[float] = []
        for first in range(0, len(pictures), BATCH):
            pixels = self.processor(list(pictures[first : first + BATCH]), return_tensors="pt")["pixel_values"]
            tokens = self.tokenizer(
                list(prompts[first : first + BATCH]),
                padding=True,
                truncation=True,
                max_length=self.longest,
                return_tensors="pt",
            )
            device = self.model.device
            out = self.model(
                input_ids=tokens["input_ids"].to(device),
                attention_mask=tokens["attention_mask"].to(device),
                pixel_values=pixels.to(device, torch.float32),
            )
            found += score_of(out.image_embeds, out.text_embeds).tolist()
        return found

    def free(self) -> None:
        """Drop the model and give the device its memory back."""
        self.__dict__.clear()
        empty_device_cache()


def score_of(pictures: Tensor, prompts: Tensor) -> Tensor:
    """100 · cosine, not below 0, of embeddings [B, D] and [B, D]. [B]"""
    cosine = torch.nn.functional.cosine_similarity(pictures.double(), prompts.double(), dim=-1)
    return (100 * cosine).clamp_min(0)


_AGAIN = "name a CLIP model in transformers' layout, or download it again"
