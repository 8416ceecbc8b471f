"""Tiny random Sana models in diffusers layout, with the real thing's shape: f32c32 autoencoder, Gemma-2 text side.

`tiny_sana` writes one in well under two seconds; `cached_sana` writes each kind once per process, for tests that
only read it. nano, the trained built-in model, is `sana_tune.model.fetch.locate("nano")`.
"""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from sana_tune.model.instruction import INSTRUCTION

if TYPE_CHECKING:
    from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaTransformer2DModel
    from transformers import Gemma2Model, GemmaTokenizer

NATIVE_PX = 64
CAPTION_DIM = 32
SCALING_FACTOR = 0.41407


def tiny_sana(
    folder: Path, *, qk_norm: bool = False, pos_embed: bool = False, flow_shift: float = 3.0, seed: int = 0
) -> Path:
    """Write a random Sana to `folder` and return it. Random numbers of the caller are left alone."""
    import torch
    from diffusers import SanaPipeline

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = tiny_tokenizer()
        pipeline = SanaPipeline(
            tokenizer=tokenizer,
            text_encoder=tiny_text_encoder(tokenizer),
            vae=tiny_vae(),
            transformer=tiny_transformer(qk_norm=qk_norm, pos_embed=pos_embed),
            scheduler=published_scheduler(flow_shift),
        )
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


@functools.cache
def cached_sana(qk_norm: bool = False, pos_embed: bool = False) -> Path:
    """A tiny Sana that is written once per process. For reading only: copy it to change it."""
    home = Path(tempfile.mkdtemp(prefix="sana_tune-tiny-"))
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    return tiny_sana(home / "tiny", qk_norm=qk_norm, pos_embed=pos_embed)


def tiny_transformer(*, qk_norm: bool = False, pos_embed: bool = False, layers: int = 3) -> SanaTransformer2DModel:
    """Random weights, 32 latent channels, width 64, heads of 32 as in every published Sana."""
    from diffusers import SanaTransformer2DModel

    return SanaTransformer2DModel(
        in_channels=32,
        out_channels=32,
        num_attention_heads=2,
        attention_head_dim=32,
        num_layers=layers,
        num_cross_attention_heads=2,
        cross_attention_head_dim=32,
        cross_attention_dim=64,
        caption_channels=CAPTION_DIM,
        sample_size=NATIVE_PX // 32,
        interpolation_scale=1.0 if pos_embed else None,
        qk_norm="rms_norm_across_heads" if qk_norm else None,
    )


def tiny_vae() -> AutoencoderDC:
    """Random weights, factor 32, 32 latent channels, the block types of DC-AE f32c32."""
    from diffusers import AutoencoderDC

    widths = (8, 8, 16, 16, 32, 32)
    kinds = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
    scales = ((), (), (), (5,), (5,), (5,))
    return AutoencoderDC(
        latent_channels=32,
        attention_head_dim=8,
        encoder_block_types=kinds,
        decoder_block_types=kinds,
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        encoder_layers_per_block=(0, 1, 1, 1, 1, 1),
        decoder_layers_per_block=(0, 1, 1, 1, 1, 1),
        encoder_qkv_multiscales=scales,
        decoder_qkv_multiscales=scales,
        scaling_factor=SCALING_FACTOR,
    )


def tiny_text_encoder(tokenizer: GemmaTokenizer) -> Gemma2Model:
    """Random weights, two layers: one with a sliding window, one without, as Gemma-2 alternates."""
    from transformers import Gemma2Config, Gemma2Model

    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=CAPTION_DIM,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        query_pre_attn_scalar=16,
        max_position_embeddings=8192,
        sliding_window=4096,
        initializer_range=0.2,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        attn_implementation="eager",
    )
    return Gemma2Model(config).eval()


def tiny_tokenizer() -> GemmaTokenizer:
    """A byte-pair tokenizer in Gemma's own form (it reloads to the same ids), trained on the instruction alone."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import GemmaTokenizer

    specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern="▁", behavior="merged_with_next", invert=False)
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=specials + bytes_, show_progress=False)
    tokenizer.train_from_iterator([INSTRUCTION, "a red star on a blue background"] * 5, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return GemmaTokenizer(
        vocab=model["vocab"],
        merges=[tuple(merge) for merge in model["merges"]],
        add_bos_token=True,
        padding_side="right",
        model_max_length=8192,
    )


def published_scheduler(flow_shift: float = 3.0) -> DPMSolverMultistepScheduler:
    """The scheduler as the published Sana repositories store it: DPM-Solver++ for flows, key `flow_shift`."""
    from diffusers import DPMSolverMultistepScheduler

    return DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=flow_shift, algorithm_type="dpmsolver++"
    )
