"""Build nano, the tiny built-in Sana: ``python scripts/build_nano.py --stage all``.

Stages (each can be run alone; ``all`` runs them in this order):
  base      train the autoencoder (about 8 minutes), build tokenizer and text encoder, a random transformer
  data      draw the captioned training pictures
  train     train the transformer with sana_tune itself (about 40 minutes, continues when
            stopped) and put it into ``--out``
  score     draw the 64 fixed prompts with plain diffusers and judge the pictures
and ``example`` draws the pictures of both examples and the held-out ones (seconds; not part of ``all``).
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts.nano import draw  # noqa: E402  (the path must be set first)

MODEL = ROOT / "sana_tune" / "assets" / "nano" / "model"
EXAMPLE = ROOT / "config" / "examples" / "nano" / "pictures"
KNOWN = EXAMPLE.parent / "known"
MASKED = ROOT / "config" / "examples" / "nano-masked" / "pictures"
HELDOUT = ROOT / "tests" / "data" / f"{draw.NEW_FIGURE}_heldout"
PICTURES = 12_000


def build_base(out: Path, vae_steps: int, seed: int) -> None:
    """Everything but a trained transformer."""
    from scripts.nano import assemble, autoencoder, text

    vae = autoencoder.build(seed)
    if vae_steps:
        autoencoder.train(vae, vae_steps, seed)
    print("autoencoder on fresh drawings:", autoencoder.finish(vae), flush=True)
    tokenizer = text.build_tokenizer()
    text.check_reload(tokenizer)
    shutil.rmtree(out, ignore_errors=True)
    assemble.save(out, vae, tokenizer, text.build_encoder(tokenizer, seed), assemble.build_transformer(seed))
    assemble.check(out)
    print(f"base pipeline (random transformer): {out}", flush=True)


def draw_data(work: Path, seed: int) -> None:
    """The training pictures and the two configuration files of the transformer's run."""
    pictures = work / "pictures"
    shutil.rmtree(pictures, ignore_errors=True)
    draw.write_pictures(pictures, list(draw.random_scenes(PICTURES, seed)))
    print(f"{PICTURES} pictures: {pictures}", flush=True)


def write_config(work: Path, steps: int, seed: int) -> Path:
    """``config.json`` and ``multidatabackend.json`` for ``sana_tune train``."""
    backends = [
        {
            "id": "nano",
            "type": "local",
            "dataset_type": "image",
            "instance_data_dir": str(work / "pictures"),
            "cache_dir_vae": str(work / "cache" / "vae"),
            "resolution": draw.SIDE_PX,
            "resolution_type": "pixel_area",
            "crop": False,
            "caption_strategy": "textfile",
            "metadata_backend": "discovery",
        },
        {
            "id": "text",
            "type": "local",
            "dataset_type": "text_embeds",
            "default": True,
            "cache_dir": str(work / "cache" / "text"),
        },
    ]
    config = {
        "pretrained_model_name_or_path": str(work / "base"),
        "model_family": "sana",
        "model_type": "full",
        "data_backend_config": str(work / "multidatabackend.json"),
        "output_dir": str(work / "run"),
        "resume_from_checkpoint": "latest",
        "optimizer": "torch-adamw",
        "optimizer_beta1": 0.9,
        "optimizer_beta2": 0.95,
        "learning_rate": 2e-3,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 200,
        "max_train_steps": steps,
        "train_batch_size": 32,
        "vae_batch_size": 32,
        "mixed_precision": "no",
        "gradient_checkpointing": False,
        "max_grad_norm": 1.0,
        "use_ema": True,
        "ema_decay": 0.999,
        "caption_dropout_probability": 0.1,
        "resolution": draw.SIDE_PX,
        "resolution_type": "pixel_area",
        "caption_strategy": "textfile",
        "validation_step_interval": 0,
        "checkpoint_step_interval": 1000,
        "checkpoints_total_limit": 2,
        "seed": seed,
    }
    (work / "multidatabackend.json").write_text(json.dumps(backends, indent=2) + "\n", encoding="utf-8")
    path = work / "config.json"
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return path


def train_transformer(work: Path, out: Path, steps: int, seed: int) -> None:
    """Train with sana_tune from random weights; its EMA becomes nano's transformer."""
    from scripts.nano import assemble

    config = write_config(work, steps, seed)
    subprocess.run([sys.executable, "-m", "sana_tune", "train", "--config", str(config)], check=True, cwd=ROOT)
    assemble.install_transformer(work / "base", work / "run" / "pipeline" / "transformer_ema", out)
    assemble.check(out)
    print(f"nano: {out}", flush=True)


def draw_example(seed: int) -> None:
    """The example's 24 pictures and 12 held-out ones of the figure that nano does not know, and 36 of known ones; and
    the 16 with masks of the masked example."""
    new = f"{draw.NEW_FIGURE}_"
    sets = (
        (EXAMPLE, draw.example_scenes(), new),
        (HELDOUT, draw.heldout_scenes(), new),
        (KNOWN, draw.known_scenes(), ""),
    )
    for folder, scenes, prefix in sets:
        shutil.rmtree(folder, ignore_errors=True)
        draw.write_pictures(folder, scenes, prefix)
        print(f"{len(scenes)} pictures: {folder}", flush=True)
    masked = draw.masked_scenes()
    shutil.rmtree(MASKED, ignore_errors=True)
    shutil.rmtree(MASKED.with_name("masks"), ignore_errors=True)
    draw.write_masked(MASKED, MASKED.with_name("masks"), masked)
    print(f"{len(masked)} pictures with masks: {MASKED}", flush=True)


def print_scores(model: Path, guidance: float, save: Path | None) -> None:
    from scripts.nano import score

    for name, value in score.old_prompt_scores(model, guidance=guidance, sheet=save).items():
        print(f"{name:12} {value:.1%}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", required=True, choices=["all", "base", "data", "train", "score", "example"])
    parser.add_argument("--work", type=Path, default=ROOT / ".nano_work", help="pictures, base, caches and the run")
    parser.add_argument("--out", type=Path, help="where the pipeline goes (base: WORK/base; train: the package)")
    parser.add_argument("--model", type=Path, help="score: the pipeline folder (default: --out)")
    parser.add_argument("--vae-steps", type=int, default=4500)
    parser.add_argument("--train-steps", type=int, default=7500)
    parser.add_argument("--guidance", type=float, default=4.5)
    parser.add_argument("--sheet", type=Path, help="score: save the pictures as one contact sheet (PNG)")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    work, stages = (
        args.work.resolve(),
        ["base", "data", "train", "score"] if args.stage == "all" else [args.stage],
    )
    work.mkdir(parents=True, exist_ok=True)
    if "base" in stages:
        build_base(work / "base" if args.stage == "all" or not args.out else args.out, args.vae_steps, args.seed)
    if "data" in stages:
        draw_data(work, args.seed)
    if "train" in stages:
        train_transformer(work, args.out or MODEL, args.train_steps, args.seed)
    if "score" in stages:
        print_scores(args.model or args.out or MODEL, args.guidance, args.sheet)
    if "example" in stages:
        draw_example(args.seed)


if __name__ == "__main__":
    main()
