"""Put the parts together: transformer, scheduler, the pipeline's folder in diffusers layout."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel
from transformers import AutoTokenizer, Gemma2Model, GemmaTokenizer

from scripts.nano import autoencoder, draw, text

FLOW_SHIFT = 1.0  # 64 latent positions need no push towards noise, unlike the 1024 of the real models
LIMIT_BYTES = 8 * 1024**2


def build_transformer(seed: int = 0) -> SanaTransformer2DModel:
    """Random weights; every choice but the sizes is that of the published 600M-512 model."""
    torch.manual_seed(seed)
    return SanaTransformer2DModel(
        in_channels=autoencoder.LATENT_CHANNELS,
        out_channels=autoencoder.LATENT_CHANNELS,
        num_attention_heads=8,
        attention_head_dim=16,
        num_layers=6,
        num_cross_attention_heads=4,
        cross_attention_head_dim=32,
        cross_attention_dim=128,
        caption_channels=text.WIDTH,
        mlp_ratio=2.5,
        sample_size=draw.SIDE_PX // autoencoder.FACTOR,
        patch_size=1,
        interpolation_scale=None,
        qk_norm=None,
    )


def build_scheduler() -> DPMSolverMultistepScheduler:
    """As the published Sana repositories store it (their key is ``flow_shift``)."""
    return DPMSolverMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=FLOW_SHIFT,
        algorithm_type="dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
        final_sigmas_type="zero",
        timestep_spacing="linspace",
    )


def save(
    folder: Path,
    vae: AutoencoderDC,
    tokenizer: GemmaTokenizer,
    encoder: Gemma2Model,
    transformer: SanaTransformer2DModel,
) -> None:
    """Write the pipeline; the transformer is stored in bf16 (it would not fit in fp32), the rest in fp32."""
    pipeline = SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=vae.half(),  # a third less to ship; it is loaded, and encodes, in fp32
        transformer=transformer.bfloat16(),
        scheduler=build_scheduler(),
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    finish_files(folder)


def finish_files(folder: Path) -> None:
    """Make the files readable for all (safetensors writes 0600) and hold them to the size limit."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    for path in files:
        path.chmod(0o644)
    size = sum(path.stat().st_size for path in files)
    if size > LIMIT_BYTES:
        raise ValueError(f"{folder} must be at most {LIMIT_BYTES} bytes, it has {size}")


def check(folder: Path) -> None:
    """The stored folder makes a picture, and all loaders agree on the token ids."""
    pipeline = SanaPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    fresh, auto = text.build_tokenizer(), AutoTokenizer.from_pretrained(folder / "tokenizer")
    for words in [*text.PROBES, *text.captions(), text.instruction() + text.captions()[0]]:
        ids = [tokenizer(words)["input_ids"] for tokenizer in (fresh, auto, pipeline.tokenizer)]
        if not ids[0] == ids[1] == ids[2]:
            raise AssertionError(f"token ids differ between loaders for {words!r}: {ids}")
    caption = text.captions()[0]
    sampling = {"num_inference_steps": 2, "use_resolution_binning": False}
    image = pipeline(caption, height=64, width=64, return_dict=False, **sampling)[0][0]
    if image.size != (64, 64):
        raise AssertionError(f"the pipeline made a picture of {image.size}")


def install_transformer(base: Path, transformer: Path, out: Path) -> None:
    """Copy the base pipeline to ``out`` with the trained transformer in it, stored in bf16."""
    trained = SanaTransformer2DModel.from_pretrained(transformer)
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(base, out)
    trained.register_to_config(_name_or_path="")  # a path of this machine
    trained.bfloat16().save_pretrained(out / "transformer")
    finish_files(out)
