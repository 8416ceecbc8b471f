"""Whole runs hold to the recipe: equal to a loop written out here, precision, checkpointing, memory, real shapes."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import optimi
import pytest
import torch
from diffusers import SanaPipeline
from PIL import Image
from torch import Tensor

from sana_tune.data.loader import drops_caption
from sana_tune.data.order import Order
from sana_tune.data.records import digest
from sana_tune.model.fetch import locate
from sana_tune.output import Output
from sana_tune.run import Prepared, prepare, run
from tests.fixtures import cached_sana
from tests.journeys.kit import metrics_of, one_thread, pictures, small_run, state_of


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """nano is so small that a second thread costs more than it brings."""
    with one_thread():
        yield


# ---- twenty steps equal a loop that knows diffusers and the optimizer alone ----

SIZES = {"square": (160, 128), "wide-a": (160, 90), "wide-b": (128, 128)}  # px, by the beginning of a file's name
RESIZED = {"square": (80, 64), "wide-a": (128, 72), "wide-b": (96, 96)}  # then cropped at the centre


@dataclass(frozen=True)
class Asked:
    """One trial: what the run is asked, and what the loop by hand does."""

    folder: Path
    factor: int  # of the VAE
    native: int  # latent positions at the model's own size
    optimizer: str
    schedule: str
    shift: float
    auto: bool
    accumulation: int
    lr: float = 1e-4
    steps: int = 20
    warmup: int = 3
    seed: int = 11
    dropout: float = 0.3
    clip: float = 0.1
    decay: float = 0.9

    def settings(self) -> dict[str, Any]:
        shift = {"flow_schedule_auto_shift": True} if self.auto else {"flow_schedule_shift": self.shift}
        return {
            "pretrained_model_name_or_path": str(self.folder),
            "optimizer": self.optimizer,
            "lr_scheduler": self.schedule,
            "gradient_accumulation_steps": self.accumulation,
            "learning_rate": self.lr,
            "max_train_steps": self.steps,
            "lr_warmup_steps": self.warmup,
            "seed": self.seed,
            "caption_dropout_probability": self.dropout,
            "max_grad_norm": self.clip,
            "use_ema": True,
            "ema_decay": self.decay,
            **shift,
        }


def nano() -> Asked:
    return Asked(locate("nano"), 8, 64, "optimi-adamw", "cosine", 1.0, True, 2)


def published_shape() -> Asked:
    return Asked(cached_sana(), 32, 4, "torch-adamw", "linear", 3.0, False, 1)


def two_datasets(root: Path) -> list[dict[str, Any]]:
    """Five pictures cropped to a square of 64 px, and five of two aspects at 96 px; captions of all lengths and cases."""
    for number, (name, size) in enumerate(SIZES.items()):
        pictures(root / name.split("-")[0], 5 if name == "square" else 3 - number % 2, size, seed=number, name=name)
    for number, path in enumerate(sorted(root.rglob("*.txt"))):
        path.write_text(f"  {path.read_text().strip().title()}{' and so on' * number}\n", encoding="utf-8")
    square = {"id": "square", "instance_data_dir": str(root / "square"), "resolution": 64, "crop": True, "crop_style": "center"}
    wide = {"id": "wide", "instance_data_dir": str(root / "wide"), "resolution": 96, "train_batch_size": 3, "repeats": 1}
    return [square, wide]


def course_of(prepared: Prepared, asked: Asked) -> list[list[tuple[str, ...]]]:
    """Which pictures (dataset/file) come in each micro-batch of each step."""
    order = Order(prepared.buckets, {"square": 1.0, "wide": 1.0}, "auto-weighting", asked.seed)
    records = prepared.survey.records
    stream = [order.micro_batch(index).records for index in range(asked.steps * asked.accumulation)]
    ids = [tuple(records[index].id for index in one) for one in stream]
    return [ids[start : start + asked.accumulation] for start in range(0, len(ids), asked.accumulation)]


@torch.no_grad()
def encoded(pipe: Any, root: Path, asked: Asked) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """id → latent, all 300 text positions and their mask, as Pillow and diffusers make them; "" has no picture."""
    instruction = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
    found = {"": (torch.empty(0), *pipe.encode_prompt("", False)[:2])}
    for path in sorted(root.rglob("*.png")):
        width, height = resized = RESIZED[path.stem[:-2]]
        picture = Image.open(path).convert("RGB").resize(resized, Image.Resampling.LANCZOS)
        w, h = (64, 64) if path.stem.startswith("square") else (width, height // asked.factor * asked.factor)
        left, top = (width - w) // 2, (height - h) // 2
        pixels = torch.from_numpy(np.array(picture.crop((left, top, left + w, top + h)))).permute(2, 0, 1)[None]
        latent = pipe.vae.encode(pixels / 127.5 - 1).latent * pipe.vae.config.scaling_factor
        caption = path.with_suffix(".txt").read_text().strip().lower()
        text, mask = pipe.encode_prompt(caption, False, complex_human_instruction=instruction)[:2]
        found[f"{path.parent.name}/{path.name}"] = latent, text, mask
    return found


def by_hand(pipe: Any, asked: Asked, data: dict, course: Sequence) -> tuple[dict, dict, list[float], list[float]]:
    """The recipe written out: weights, their average, losses and learning rates after the course."""
    model = pipe.transformer.train()
    if asked.optimizer == "torch-adamw":
        optimizer = torch.optim.AdamW(model.parameters(), asked.lr, betas=(0.9, 0.999), weight_decay=0.01, eps=1e-8)
    else:
        optimizer = optimi.AdamW(model.parameters(), asked.lr, betas=(0.9, 0.99), weight_decay=0.0, eps=1e-6)
    average = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    losses, rates = [], []
    for step, micro_batches in enumerate(course):
        total = 0.0
        for micro, ids in enumerate(micro_batches):
            x0 = torch.cat([data[name][0] for name in ids])
            dropped = [drops_caption(asked.seed, step, micro, place, asked.dropout) for place in range(len(ids))]
            texts = [data["" if drop else name] for name, drop in zip(ids, dropped, strict=True)]
            generator = torch.Generator().manual_seed(int(digest("noise", asked.seed, step, micro)[:8], 16))
            s = asked.shift * (math.sqrt(x0[0, 0].numel() / asked.native) if asked.auto else 1)
            sigma = torch.randn(len(ids), generator=generator).sigmoid()
            sigma = s * sigma / (1 + (s - 1) * sigma)
            noise = torch.randn(x0.shape, generator=generator)
            level = sigma[:, None, None, None]
            predicted = model(
                (1 - level) * x0 + level * noise,
                encoder_hidden_states=torch.cat([text for _, text, _ in texts]),
                encoder_attention_mask=torch.cat([mask for _, _, mask in texts]),
                timestep=1000 * sigma,
            ).sample
            loss = (predicted - (noise - x0)).pow(2).mean() / asked.accumulation
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), asked.clip)
        done = max(0, step - asked.warmup) / (asked.steps - asked.warmup)
        fall = 1 - done if asked.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
        rates.append(asked.lr * min((step + 1) / asked.warmup, fall))
        optimizer.param_groups[0]["lr"] = rates[-1]
        optimizer.step()
        optimizer.zero_grad()
        keep = min(asked.decay, (2 + step) / (11 + step))
        for name, weight in model.named_parameters():
            average[name] = keep * average[name] + (1 - keep) * weight.detach()
        losses.append(total)
    return {name: weight.detach() for name, weight in model.named_parameters()}, average, losses, rates


@pytest.mark.parametrize("trial", [nano, published_shape])
def test_twenty_steps_equal_a_loop_by_hand(trial, tmp_path):
    asked = trial()
    datasets = two_datasets(tmp_path / "pictures")
    loaded = small_run(tmp_path, *datasets, **asked.settings())
    run(loaded)

    prepared = prepare(loaded, Output.open(tmp_path / "again"))
    pipe = SanaPipeline.from_pretrained(asked.folder)
    start = {name: weight.detach().clone() for name, weight in pipe.transformer.named_parameters()}
    data, course = encoded(pipe, tmp_path / "pictures", asked), course_of(prepared, asked)
    weights, average, losses, rates = by_hand(pipe, asked, data, course)

    lines, state = metrics_of(tmp_path / "output"), state_of(tmp_path / "output/checkpoint-20")
    def worst(a, b, pre=""): return max((a[pre+n]-b[n]).abs().max().item() for n in b)
    print("W", worst(state, weights, "transformer/"), "E", worst(state, average, "transformer_ema/"), "L", max(abs(l["loss"]-x) for l, x in zip(lines, losses)), "moved", worst(start, weights))
    print([len(set(i[0].split('/')[0] for i in m)) for m in course], {tuple(data[i[0]][0].shape) for m in course for i in m})
