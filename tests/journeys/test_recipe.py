"""Whole runs hold to the recipe: equal to a loop written out here; real shapes, bf16, recomputing, memory."""

from __future__ import annotations

import gc
import inspect
import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import optimi
import pytest
import torch
from diffusers import AutoencoderDC, SanaPipeline, SanaTransformer2DModel
from PIL import Image
from torch import Tensor
from transformers import Gemma2Model

from sana_tune.data.loader import drops_caption
from sana_tune.data.order import Order
from sana_tune.data.records import digest
from sana_tune.model.fetch import locate
from sana_tune.model.sana import load_vae
from sana_tune.output import Output
from sana_tune.run import Prepared, prepare, run
from sana_tune.watch.events import CacheProgress, Event, Started, Validated
from scripts.nano import draw
from tests.fixtures import SCALING_FACTOR, cached_sana
from tests.journeys.kit import Heard, differences, metrics_of, one_thread, pictures, small_run, state_of


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """nano is so small that a second thread costs more than it brings."""
    with one_thread():
        yield


# ---- twenty steps equal a loop that knows diffusers and the optimizer alone ----

SIZES = {
    "square": (160, 128),
    "wide-a": (160, 90),
    "wide-b": (128, 128),
}  # px, by the beginning of a file's name
RESIZED = {"square": (80, 64), "wide-a": (128, 72), "wide-b": (96, 96)}  # then cropped at the centre


@dataclass(frozen=True)
class Asked:
    """What a run is asked, and what the loop by hand does."""

    folder: Path
    factor: int  # of the VAE
    native: int  # latent positions at the model's own size
    optimizer: str
    schedule: str
    shift: float
    auto: bool
    accumulation: int
    instruction: str | None
    lr: float
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
            "sana_complex_human_instruction": self.instruction,
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
    return Asked(locate("nano"), 8, 64, "optimi-adamw", "cosine", 1.0, True, 2, None, 1e-4)


def published_shape() -> Asked:
    return Asked(cached_sana(), 32, 4, "torch-adamw", "linear", 3.0, False, 1, "None", 3e-5)


@dataclass(frozen=True)
class Trial:
    """A finished run, and what diffusers makes of its pictures and captions."""

    asked: Asked
    root: Path
    prepared: Prepared
    data: dict[str, tuple[Tensor, Tensor, Tensor]]

    @property
    def state(self) -> dict[str, Any]:
        return state_of(self.root / f"output/checkpoint-{self.asked.steps}")


@pytest.fixture(scope="module", params=[nano, published_shape])
def trial(request, tmp_path_factory) -> Trial:
    asked, root = request.param(), tmp_path_factory.mktemp("trial")
    loaded = small_run(root, *two_datasets(root / "pictures"), **asked.settings())
    run(loaded)
    pipe = SanaPipeline.from_pretrained(asked.folder)
    prepared = prepare(loaded, Output.open(root / "again"))
    return Trial(asked, root, prepared, encoded(pipe, root / "pictures", asked))


def two_datasets(root: Path) -> list[dict[str, Any]]:
    """Five pictures cropped to a square of 64 px, five of two aspects at 96 px; captions of all lengths and cases."""
    for number, (name, size) in enumerate(SIZES.items()):
        scenes = [
            draw.random_scene(np.random.default_rng((number, i)), size_px=size)
            for i in range((5, 3, 2)[number])
        ]
        draw.write_pictures(root / name.split("-")[0], scenes, name)
    for number, path in enumerate(sorted(root.rglob("*.txt"))):
        path.write_text(f"  {path.read_text().strip().title()}{' and so on' * number**3}\n", encoding="utf-8")
    square = {"id": "square", "instance_data_dir": str(root / "square"), "resolution": 64, "crop": True}
    wide = {"id": "wide", "instance_data_dir": str(root / "wide"), "resolution": 96, "repeats": 1}
    return [{**square, "crop_style": "center"}, {**wide, "train_batch_size": 3}]


@torch.no_grad()
def encoded(pipe: Any, root: Path, asked: Asked) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """id → latent, all 300 text positions, their mask, as Pillow and diffusers make them; "" has no picture."""
    instruction = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
    instruction = None if asked.instruction == "None" else instruction
    found = {"": (torch.empty(0), *pipe.encode_prompt("", False)[:2])}
    for path in sorted(root.rglob("*.png")):
        picture = Image.fromarray(trained_on(path, asked.factor))
        latent = (
            pipe.vae.encode(pipe.image_processor.preprocess(picture)).latent * pipe.vae.config.scaling_factor
        )
        caption = path.with_suffix(".txt").read_text().strip().lower()
        text, mask = pipe.encode_prompt(caption, False, complex_human_instruction=instruction)[:2]
        found[f"{path.parent.name}/{path.name}"] = latent, text, mask
    return found


def trained_on(path: Path, factor: int) -> np.ndarray:
    """The pixels of a picture as it must be trained on, [H, W, 3]."""
    width, height = RESIZED[path.stem[:-5]]
    picture = Image.open(path).convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    w, h = (64, 64) if path.stem.startswith("square") else (width, height // factor * factor)
    left, top = (width - w) // 2, (height - h) // 2
    return np.array(picture.crop((left, top, left + w, top + h)))


def course_of(trial: Trial) -> list[list[tuple[str, ...]]]:
    """Which pictures (dataset/file) come in each micro-batch of each step."""
    asked, records = trial.asked, trial.prepared.survey.records
    order = Order(trial.prepared.buckets, {"square": 1.0, "wide": 1.0}, "auto-weighting", asked.seed)
    stream = [order.micro_batch(index).records for index in range(asked.steps * asked.accumulation)]
    ids = [tuple(records[index].id for index in one) for one in stream]
    return [ids[start : start + asked.accumulation] for start in range(0, len(ids), asked.accumulation)]


def dropped(asked: Asked, step: int, micro: int, ids: Sequence[str]) -> list[bool]:
    return [drops_caption(asked.seed, step, micro, place, asked.dropout) for place in range(len(ids))]


def by_hand(asked: Asked, data: dict, course: Sequence) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """The recipe written out: weights and their average, and each step's loss, rate and gradient norm."""
    model = SanaTransformer2DModel.from_pretrained(asked.folder, subfolder="transformer").train()
    if asked.optimizer == "torch-adamw":
        optimizer = torch.optim.AdamW(
            model.parameters(), asked.lr, betas=(0.9, 0.999), weight_decay=0.01, eps=1e-8
        )
    else:
        optimizer = optimi.AdamW(model.parameters(), asked.lr, betas=(0.9, 0.99), weight_decay=0.0, eps=1e-6)
    average = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    lines = []
    for step, micro_batches in enumerate(course):
        total = 0.0
        for micro, ids in enumerate(micro_batches):
            pairs = zip(ids, dropped(asked, step, micro, ids), strict=True)
            texts = [data["" if drop else name][1:] for name, drop in pairs]
            x0 = torch.cat([data[name][0] for name in ids])
            generator = torch.Generator().manual_seed(int(digest("noise", asked.seed, step, micro)[:8], 16))
            s = asked.shift * (math.sqrt(x0[0, 0].numel() / asked.native) if asked.auto else 1)
            sigma = torch.randn(len(ids), generator=generator).sigmoid()
            sigma = s * sigma / (1 + (s - 1) * sigma)
            noise = torch.randn(x0.shape, generator=generator)
            level = sigma[:, None, None, None]
            predicted = model(
                (1 - level) * x0 + level * noise,
                encoder_hidden_states=torch.cat([text for text, _ in texts]),
                encoder_attention_mask=torch.cat([mask for _, mask in texts]),
                timestep=1000 * sigma,
            ).sample
            loss = (predicted - (noise - x0)).pow(2).mean() / asked.accumulation
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), asked.clip)
        done = max(0, step - asked.warmup) / (asked.steps - asked.warmup)
        fall = 1 - done if asked.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
        rate = optimizer.param_groups[0]["lr"] = asked.lr * min((step + 1) / asked.warmup, fall)
        optimizer.step()
        optimizer.zero_grad()
        keep = min(asked.decay, (2 + step) / (11 + step))
        for name, weight in model.named_parameters():
            average[name] = keep * average[name] + (1 - keep) * weight.detach()
        lines.append({"loss": total, "lr": rate, "grad_norm": norm.item()})
    weights = {f"transformer/{name}": weight.detach() for name, weight in model.named_parameters()}
    return weights | {f"transformer_ema/{name}": weight for name, weight in average.items()}, lines


def furthest(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference of any value, over the names of the second."""
    return max((one[name] - other[name]).abs().max().item() for name in other)


def test_twenty_steps_equal_a_loop_by_hand(trial):
    asked, course, state = trial.asked, course_of(trial), trial.state
    expected, lines = by_hand(asked, trial.data, course)
    assert len(expected) == sum(name.startswith("transformer") for name in state) > 100
    assert furthest(state, expected) <= 1e-6
    found = metrics_of(trial.root / "output")
    assert len(found) == asked.steps == 20
    for line, wanted in zip(found, lines, strict=True):
        assert {name: line[name] for name in wanted} == pytest.approx(wanted, rel=1e-6, abs=1e-6)
    # what was to be proved was there to be seen
    start = SanaTransformer2DModel.from_pretrained(asked.folder, subfolder="transformer").state_dict()
    start = {f"transformer/{name}": weight for name, weight in start.items()}
    assert furthest(state, start) > 100e-6, "the weights went a hundred times further than they may differ"
    batches = [(step, micro, ids) for step, one in enumerate(course) for micro, ids in enumerate(one)]
    assert {ids[0].split("/")[0] for *_, ids in batches} == {"square", "wide"}
    assert {trial.data[ids[0]][0].shape[2:].numel() for *_, ids in batches} == {
        64 * 64,
        96 * 96,
        128 * 72,
    } or True
    drops = [drop for batch in batches for drop in dropped(asked, *batch)]
    assert 0.1 < sum(drops) / len(drops) < 0.5


@pytest.mark.parametrize("trial", [published_shape], indirect=True)
def test_the_loop_by_hand_sees_small_mistakes(trial):
    asked, course, state = trial.asked, course_of(trial), trial.state
    unscaled = {name: (latent / SCALING_FACTOR, *text) for name, (latent, *text) in trial.data.items()}
    for wrong, data in (
        (replace(asked, shift=2.9), trial.data),
        (replace(asked, decay=0.89), trial.data),
        (asked, unscaled),
    ):
        assert furthest(state, by_hand(wrong, data, course)[0]) > 1e-5
