"""Measure nano and the example with plain diffusers: nothing here uses sana_tune's own code.

``python -m scripts.nano.score --base DIR --tuned DIR`` measures the example's bar (see ``compare``).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import SanaPipeline, SanaTransformer2DModel
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from scripts.nano import draw, text
from tests import judge

SIGMAS = (0.1, 0.3, 0.5, 0.7, 0.9)
NOISES = 4
LOW_PASS_PX = 16  # pictures are reduced to this side before they are compared
HELDOUT = Path(__file__).resolve().parents[2] / "tests" / "data" / f"{draw.NEW_FIGURE}_heldout"


def load(folder: Path, ema: bool = False) -> SanaPipeline:
    """The pipeline in fp32; ``ema`` takes the weights in ``transformer_ema`` instead of ``transformer``."""
    extra = {"transformer": SanaTransformer2DModel.from_pretrained(folder / "transformer_ema")} if ema else {}
    pipeline = SanaPipeline.from_pretrained(folder, **extra)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(
    pipeline: SanaPipeline, prompts: Sequence[str], seeds: Sequence[int], guidance: float, steps: int = 20
) -> list[Image.Image]:
    """One 64 px picture for each prompt; a picture depends on its own prompt and seed alone."""
    pictures: list[Image.Image] = []
    for start in range(0, len(prompts), 16):
        part = slice(start, start + 16)
        pictures += pipeline(
            list(prompts[part]),
            height=draw.SIDE_PX,
            width=draw.SIDE_PX,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds[part]],
            use_resolution_binning=False,
            return_dict=False,
        )[0]
    return pictures


def save_sheet(pictures: Sequence[Image.Image], path: Path, columns: int = 8) -> None:
    """All pictures on one, row by row."""
    side = draw.SIDE_PX
    sheet = Image.new("RGB", (columns * side, -(-len(pictures) // columns) * side))
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * side, i // columns * side))
    sheet.save(path)


def old_prompt_scores(
    model: Path | SanaPipeline, guidance: float, seed: int = 1000, sheet: Path | None = None
) -> dict[str, float]:
    """Shares (0..1) right on the 64 fixed prompts: ground, colour, figure, all three."""
    pipeline = model if isinstance(model, SanaPipeline) else load(model)
    asked = draw.old_prompts()
    pictures = generate(pipeline, [s.caption for s in asked], [seed + i for i in range(len(asked))], guidance)
    if sheet:
        save_sheet(pictures, sheet)
    return judge.score(pictures, asked)


@torch.no_grad()
def heldout_losses(pipeline: SanaPipeline, folder: Path = HELDOUT) -> NDArray[np.float64]:
    """Loss of each held-out picture, the mean over fixed sigmas and noises: [pictures].

    The same noise for every model, so that two models can be compared picture by picture.
    """
    losses = []
    for number, path in enumerate(sorted(folder.glob("*.png"))):
        clean = latent(pipeline, path)
        embeds, mask = caption_embeds(pipeline, path.with_suffix(".txt").read_text(encoding="utf-8"))
        count = len(SIGMAS) * NOISES
        generator = torch.Generator().manual_seed(number)
        noise = torch.randn((count, *clean.shape[1:]), generator=generator)
        sigma = torch.tensor(SIGMAS).repeat(NOISES).view(-1, 1, 1, 1)
        velocity = pipeline.transformer(
            (1 - sigma) * clean + sigma * noise,
            encoder_hidden_states=embeds.expand(count, -1, -1),
            encoder_attention_mask=mask.expand(count, -1),
            timestep=1000 * sigma.flatten(),
            return_dict=False,
        )[0]
        losses.append(float((velocity - (noise - clean)).square().mean()))
    return np.array(losses)


def latent(pipeline: SanaPipeline, path: Path) -> Tensor:
    """The latent of a picture as the model is trained on it: [1, C, h, w]."""
    pixels = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)[None]
    return pipeline.vae.encode(pixels / 127.5 - 1).latent * pipeline.vae.config.scaling_factor


def caption_embeds(pipeline: SanaPipeline, caption: str) -> tuple[Tensor, Tensor]:
    """(embeddings [1, 300, D], mask [1, 300]) as the pipeline makes them at generation."""
    return pipeline.encode_prompt(
        caption.strip(),
        do_classifier_free_guidance=False,
        complex_human_instruction=text.instruction().split("\n"),
    )[:2]


def low_pass(picture: Image.Image) -> NDArray[np.float64]:
    """[16, 16, 3] in 0..1: means over boxes."""
    small = picture.convert("RGB").resize((LOW_PASS_PX, LOW_PASS_PX), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float64) / 255


def reference_distances(picture: Image.Image, scene: draw.Scene, count: int = 64) -> tuple[float, float]:
    """(mean, nearest) low-pass RMSE to ``count`` drawings of the same caption at other places and sizes."""
    rng = np.random.default_rng(5)
    pair = (scene.colour, scene.ground)
    references = [draw.random_scene(rng, (scene.figure,), colours=pair) for _ in range(count)]
    seen = low_pass(picture)
    distances = [float(np.sqrt(np.square(seen - low_pass(draw.draw(r))).mean())) for r in references]
    return float(np.mean(distances)), min(distances)


def paired(before: NDArray[np.float64], after: NDArray[np.float64], flips: int = 20_000) -> dict[str, float]:
    """Means, relative change, share of pairs that fell, one-sided sign-flip p that "after" is smaller."""
    fall = before - after
    signs = np.random.default_rng(0).choice((-1.0, 1.0), (flips, len(fall)))
    p = (1 + int(((signs * fall).mean(1) >= fall.mean()).sum())) / (flips + 1)
    return {
        "before": float(before.mean()),
        "after": float(after.mean()),
        "change": float(after.mean() / before.mean() - 1),
        "fell": float((fall > 0).mean()),
        "p": p,
    }


def compare(
    base: Path,
    tuned: Path,
    guidance: float = 4.5,
    ema: bool = True,
    sheet: Path | None = None,
    seeds: int = 32,
) -> dict[str, dict[str, float]]:
    """The example's bar: held-out loss, distance to references, share of new figures seen, old prompts."""
    scenes = [draw.new_prompts()[i % 16] for i in range(seeds)]
    prompts, numbers = [scene.caption for scene in scenes], [500 + i for i in range(seeds)]
    losses, distances, result = [], [], {}
    for name, pipeline in (("base", load(base)), ("tuned", load(tuned, ema))):
        losses.append(heldout_losses(pipeline))
        pictures = generate(pipeline, prompts, numbers, guidance)
        distances.append(np.array([reference_distances(p, s) for p, s in zip(pictures, scenes, strict=True)]))
        result[f"{name}: new figure"] = judge.score(pictures, scenes, judge.TAUGHT_FIGURES)
        result[f"{name}: old prompts"] = old_prompt_scores(pipeline, guidance)
        if sheet:
            save_sheet(pictures, sheet.with_stem(f"{sheet.stem}_{name}"))
    result["held-out loss"] = paired(losses[0], losses[1])
    result["low-pass RMSE, mean reference"] = paired(distances[0][:, 0], distances[1][:, 0])
    result["low-pass RMSE, nearest reference"] = paired(distances[0][:, 1], distances[1][:, 1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure a fine-tuned nano against the base model.")
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--tuned", type=Path, required=True)
    parser.add_argument("--guidance", type=float, default=4.5)
    parser.add_argument("--raw", action="store_true", help="the last weights instead of their average (EMA)")
    parser.add_argument("--sheet", type=Path, help="save the new figure's pictures here (PNG)")
    args = parser.parse_args()
    result = compare(args.base, args.tuned, args.guidance, not args.raw, args.sheet)
    for name, values in result.items():
        print(f"{name:34} " + json.dumps({key: round(value, 4) for key, value in values.items()}))


if __name__ == "__main__":
    main()
