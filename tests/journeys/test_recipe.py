"""Whole runs hold to the recipe: equal to a loop written out here; real shapes, bf16, recomputing, memory."""

from __future__ import annotations

import gc
import inspect
import math
import shutil
from collections.abc import Callable, Sequence
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
from sana_tune.data.records import digest
from sana_tune.model.fetch import locate
from sana_tune.model.sana import load_vae
from sana_tune.output import Output
from sana_tune.prepare import Prepared, prepare
from sana_tune.run import batches_of, open_caches, run
from sana_tune.watch.events import CacheProgress, Event, Started, Validated
from scripts.nano import draw
from tests.fixtures import SCALING_FACTOR, cached_sana
from tests.journeys.kit import Heard, differences, metrics_of, pictures, small_run, state_of

# ---- twenty steps equal a loop that knows diffusers and the optimizer alone ----

SIZES = {"square": (160, 128), "wide-a": (160, 90), "wide-b": (128, 128)}  # px, by the beginning of a file's name
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
    decay: float = 0.5  # reached by its ramp after eight steps

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
    return Asked(locate("nano"), 8, 64, "optimi-adamw", "cosine", 1.0, True, 2, None, 5e-5)


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
    prepared = prepare(loaded, Output(root / "output"))
    return Trial(asked, root, prepared, encoded(pipe, root / "pictures", asked))


def two_datasets(root: Path) -> list[dict[str, Any]]:
    """Five pictures cropped to a square of 64 px, five of two aspects at 96 px; captions of all lengths and cases."""
    for number, (name, size) in enumerate(SIZES.items()):
        scenes = [draw.random_scene(np.random.default_rng((number, i)), size_px=size) for i in range((5, 3, 2)[number])]
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
        latent = pipe.vae.encode(pipe.image_processor.preprocess(picture)).latent * pipe.vae.config.scaling_factor
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
    caches = open_caches(trial.prepared)
    batches = batches_of(trial.prepared, caches, caches)
    return [[batch.ids for _, batch in batches.load(step)] for step in range(trial.asked.steps)]


def dropped(asked: Asked, step: int, micro: int, ids: Sequence[str]) -> list[bool]:
    return [drops_caption(asked.seed, step, micro, place, asked.dropout) for place in range(len(ids))]


def by_hand(asked: Asked, data: dict, course: Sequence) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """The recipe written out: weights and their average, and each step's loss, rate and gradient norm."""
    model = SanaTransformer2DModel.from_pretrained(asked.folder, subfolder="transformer").train()
    if asked.optimizer == "torch-adamw":
        tables = {id(weight) for name, weight in model.named_parameters() if "scale_shift_table" in name}
        decays = [weight for weight in model.parameters() if weight.ndim > 1 and id(weight) not in tables]
        others = [weight for weight in model.parameters() if weight.ndim <= 1 or id(weight) in tables]
        groups = [{"params": decays}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, asked.lr, betas=(0.9, 0.999), weight_decay=0.01, eps=1e-8)
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
        rate = asked.lr * min((step + 1) / asked.warmup, fall)
        for group in optimizer.param_groups:
            group["lr"] = rate
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


def beyond(one: dict[str, Tensor], other: dict[str, Tensor], limit: float = 1e-6) -> float:
    """The share of all values that differ by more than `limit`, over the names of the second."""
    apart = torch.cat([(one[name] - other[name]).abs().flatten() for name in other])
    return (apart > limit).float().mean().item()


def test_twenty_steps_equal_a_loop_by_hand(trial):
    asked, course, state = trial.asked, course_of(trial), trial.state
    expected, lines = by_hand(asked, trial.data, course)
    assert len(expected) == sum(name.startswith("transformer") for name in state) > 100
    # 1e-6, but for single weights: Adam divides what rounding leaves of a tiny gradient by itself, so that these differ
    # from processor to processor.
    assert beyond(state, expected) <= 1e-4 and furthest(state, expected) <= 1e-5
    found = metrics_of(trial.root / "output")
    assert len(found) == asked.steps == 20
    for line, wanted in zip(found, lines, strict=True):
        assert line["loss"] == pytest.approx(wanted["loss"], abs=1e-6)
        assert line["lr"] == pytest.approx(wanted["lr"], rel=1e-12)
        # By hand all 300 text positions are fed; where that rounds a ReLU to the other side, the norm tells it.
        assert line["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-3)
    # what was to be proved was there to be seen
    start = SanaTransformer2DModel.from_pretrained(asked.folder, subfolder="transformer").state_dict()
    start = {f"transformer/{name}": weight for name, weight in start.items()}
    assert furthest(state, start) > 100e-6, "the weights went a hundred times further than they may differ"
    batches = [(step, micro, ids) for step, one in enumerate(course) for micro, ids in enumerate(one)]
    assert {ids[0].split("/")[0] for *_, ids in batches} == {"square", "wide"}
    assert len({trial.data[ids[0]][0].shape for *_, ids in batches}) == 3, "three sizes"
    drops = [drop for batch in batches for drop in dropped(asked, *batch)]
    assert 0.1 < sum(drops) / len(drops) < 0.5


@pytest.mark.parametrize("trial", [published_shape], indirect=True)
def test_the_loop_by_hand_sees_small_mistakes(trial):
    asked, data, course, state = trial.asked, trial.data, course_of(trial), trial.state
    unscaled = {name: (latent / SCALING_FACTOR, *text) for name, (latent, *text) in data.items()}
    mistakes = [(replace(asked, shift=2.9), data), (replace(asked, decay=0.9), data), (asked, unscaled)]
    apart = [by_hand(wrong, given, course)[0] for wrong, given in mistakes]
    assert all(beyond(state, other) > 0.1 for other in apart)


def test_auto_shift_follows_the_bucket(trial):
    shifts = {(bucket.width_px, bucket.height_px): bucket.flow_shift for bucket in trial.prepared.plan.buckets}
    if trial.asked.auto:
        assert shifts == {(64, 64): 1.0, (96, 96): 1.5, (128, 72): 1.5}, "sqrt(tokens / 64)"
    else:
        assert shifts == {(64, 64): 3.0, (96, 96): 3.0, (128, 64): 3.0}


# ---- caches ----


def test_cached_latents_are_the_vaes_scaled_and_decode_to_the_pictures(trial):
    prepared, caches = trial.prepared, open_caches(trial.prepared)
    cached = {
        record.id: caches.latents[record.dataset].get(prepared.keys.latent(record))
        for record in prepared.survey.records
    }
    assert len(cached) == 10
    for name, latent in cached.items():
        assert latent.dtype == torch.float32 and torch.equal(latent[None], trial.data[name][0])
    if trial.asked.folder != locate("nano"):
        return  # a random autoencoder: nothing to see
    coder = load_vae(trial.asked.folder)
    for name, latent in cached.items():
        picture = trained_on(trial.root / "pictures" / name, trial.asked.factor)
        error = (coder.decode(latent[None])[0].astype(float) - picture) ** 2
        assert 10 * math.log10(255**2 / error.mean()) > 25, f"{name}: PSNR"


def test_cached_captions_are_the_pipelines(trial):
    prepared, texts, lengths = trial.prepared, open_caches(trial.prepared).text, []
    captions = {record.id: record.captions[0] for record in prepared.survey.records} | {"": ""}
    for name, caption in captions.items():
        cached = texts.get(prepared.keys.text(caption))
        _, text, mask = trial.data[name]
        assert torch.equal(cached, text[0, mask[0].bool()])
        lengths.append(len(cached))
    assert lengths[-1] == 1 and max(lengths) == 300, "the empty caption is one token, the longest is cut"


# ---- the published shapes, with random weights ----


@pytest.mark.parametrize("kind", [{"qk_norm": True}, {"pos_embed": True}], ids=lambda kind: next(iter(kind)))
def test_published_shapes_train_resume_and_export(kind, tmp_path):
    folder = cached_sana(**kind)
    pictures(tmp_path / "pictures", 3, (96, 64))
    loaded = small_run(tmp_path, pretrained_model_name_or_path=str(folder), resolution=64, checkpoint_step_interval=2)
    run(loaded)
    straight = state_of(tmp_path / "output/checkpoint-4")
    shutil.rmtree(tmp_path / "output/checkpoint-4")
    heard = Heard()
    run(loaded, sinks=[heard])
    assert heard.of(Started)[0].progress.step == 2 and not heard.encoded
    assert differences(straight, state_of(tmp_path / "output/checkpoint-4")) == []

    pipe = SanaPipeline.from_pretrained(tmp_path / "output/pipeline")
    weights = {f"transformer/{name}": weight for name, weight in pipe.transformer.state_dict().items()}
    assert differences(weights, {name: straight[name] for name in weights}) == []
    base = SanaTransformer2DModel.from_pretrained(folder, subfolder="transformer").state_dict()
    assert all(not torch.equal(weights[f"transformer/{name}"], weight) for name, weight in base.items())
    assert (pipe.transformer.config.qk_norm is not None) == ("qk_norm" in kind)
    assert (pipe.transformer.config.interpolation_scale is not None) == ("pos_embed" in kind)
    drawn = pipe("a red star", height=64, width=64, num_inference_steps=2, use_resolution_binning=False).images[0]
    assert drawn.size == (64, 64) and np.asarray(drawn).std() > 1


# ---- bf16 weights ----


@pytest.mark.parametrize("model", [lambda: locate("nano"), cached_sana], ids=["nano", "published_shape"])
def test_bf16_weights_move_at_a_small_rate(model, tmp_path):
    folder = model()
    exact = SanaTransformer2DModel.from_pretrained(folder, subfolder="transformer", torch_dtype=torch.float32)
    # Clipping is off: it scales the smallest gradients down below eps, where no precision moves a weight.
    asked = {"pretrained_model_name_or_path": str(folder), "weights_dtype": "bf16", "learning_rate": 1e-5}
    asked |= {"max_grad_norm": 0, "max_train_steps": 8}
    drawing = {"validation_prompt": "a red star", "validation_num_inference_steps": 2, "disable_benchmark": True}
    drawing["validation_disable_unconditional"] = True
    pictures(tmp_path / "pictures", 4, (64, 64))
    heard = Heard()
    run(small_run(tmp_path, **asked, **drawing, resolution=64, validation_disable=False), sinks=[heard])
    output = tmp_path / "output"

    state = state_of(output / "checkpoint-8")
    moved, total, rounded = 0, 0, 0
    for name, weight in exact.named_parameters():
        now, compensation = state[f"transformer/{name}"], state[f"optimizer/state/{name}/kahan_comp"]
        assert now.dtype == compensation.dtype == torch.bfloat16
        before = weight.detach().bfloat16()
        kept = (weight.detach() - before.float()).bfloat16()  # what a bf16 pair can hold of the fp32 weight
        assert (now.double() + compensation.double() - weight.double()).abs().max() < 2e-4, "not rounded off"
        moved += (now.double() + compensation.double() != before.double() + kept.double()).sum().item()
        rounded += (now != before).sum().item()
        total += now.numel()
    assert moved / total >= 0.99
    assert left_where_they_were(exact, steps=8) > 0.7, "what rounding alone would do"
    assert rounded / total < 0.5, "the movement is in the compensation at first"

    (validated,) = heard.of(Validated)[-1:]
    assert not validated.failed and len(validated.files) == 1
    dtypes = {"transformer": torch.bfloat16, "default": torch.float32}
    pipe = SanaPipeline.from_pretrained(output / "pipeline", torch_dtype=dtypes)
    weights = {f"transformer/{name}": weight for name, weight in pipe.transformer.state_dict().items()}
    assert differences(weights, {name: state[name] for name in weights}) == []
    seed, size = torch.Generator("cpu").manual_seed(11), {"height": 64, "width": 64, "use_resolution_binning": False}
    drawn = pipe("a red star", num_inference_steps=2, generator=seed, **size).images[0]
    assert np.array_equal(np.asarray(drawn), np.asarray(Image.open(validated.files[0])))


def left_where_they_were(exact: SanaTransformer2DModel, steps: int) -> float:
    """The share of bf16 weights that AdamW of the same settings, without compensation, has not moved after `steps`."""
    start = [weight.detach().bfloat16() for weight in exact.parameters()]
    model = exact.bfloat16().train()
    optimizer = optimi.AdamW(model.parameters(), 1e-5, betas=(0.9, 0.99), eps=1e-6, kahan_sum=False)
    for _ in range(steps):
        x = torch.randn(2, model.config["in_channels"], 4, 4).bfloat16()
        text = torch.randn(2, 6, model.config["caption_channels"]).bfloat16()
        predicted = model(x, encoder_hidden_states=text, timestep=torch.tensor([300.0, 700.0])).sample
        (predicted - torch.randn_like(x)).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    pairs = list(zip(start, model.parameters(), strict=True))
    return sum((a == b).sum().item() for a, b in pairs) / sum(a.numel() for a, _ in pairs)


# ---- recomputing, and what is in memory when ----


def living(*kinds: type, but: Sequence[Any] = ()) -> list[Any]:
    """The objects of these classes that exist, but for some; nothing is collected first."""
    known = set(map(id, but))
    return [thing for thing in gc.get_objects() if type(thing) in kinds and id(thing) not in known]


def test_recomputing_blocks_changes_no_weight_and_recomputes_those_blocks(tmp_path):
    pictures(tmp_path / "pictures", 4)
    states, counts = {}, {}
    for interval in (0, 1, 2, 3):
        calls: list[int] = []
        run(
            small_run(
                tmp_path,
                output_dir=str(tmp_path / f"every {interval}"),
                cache_dir=str(tmp_path / "cache"),
                max_train_steps=3,
                gradient_accumulation_steps=2,
                gradient_checkpointing=interval > 0,
                gradient_checkpointing_interval=max(1, interval),
            ),
            sinks=[Heard(counting(calls))],
        )
        states[interval] = state_of(tmp_path / f"every {interval}/checkpoint-3")
        counts[interval] = [calls.count(place) for place in range(6)]
    assert counts == {
        0: [6, 6, 6, 6, 6, 6],
        1: [12, 12, 12, 12, 12, 12],
        2: [12, 6, 12, 6, 12, 6],
        3: [12, 6, 6, 12, 6, 6],
    }, "one forward for each of 3 x 2 micro-batches, and one more where a block is recomputed"
    assert all(differences(states[0], states[interval]) == [] for interval in (1, 2, 3))


def counting(calls: list[int]) -> Callable[[Event], None]:
    """At the start of training, hook the run's own transformer: the number of each block that runs goes to `calls`."""
    older = living(SanaTransformer2DModel)

    def then(event: Event) -> None:
        if isinstance(event, Started):
            (model,) = living(SanaTransformer2DModel, but=older)
            for place, block in enumerate(model.transformer_blocks):
                block.register_forward_pre_hook(lambda *_, place=place: calls.append(place))

    return then


def test_encoder_and_autoencoder_are_gone_when_training_starts(tmp_path):
    older = living(Gemma2Model, AutoencoderDC)
    seen: list[tuple[str, set[str]]] = []

    def then(event: Event) -> None:
        name = event.cache if isinstance(event, CacheProgress) else type(event).__name__
        seen.append((name, {type(thing).__name__ for thing in living(Gemma2Model, AutoencoderDC, but=older)}))

    pictures(tmp_path / "pictures", 2)
    drawing = {"validation_prompt": "a red star", "validation_num_inference_steps": 2, "validation_resolution": 32}
    asked = {"validation_disable": False, "validation_step_interval": 2, "max_train_steps": 3, "use_ema": True}
    asked["validation_disable_unconditional"] = True
    heard = Heard(then)
    run(small_run(tmp_path, **asked, **drawing), sinks=[heard])
    assert [len(event.files) for event in heard.of(Validated)] == [1, 2, 2], "before, midway and at the end"
    assert {name for name, _ in seen} >= {"text", "latents of d0", "Started", "Stepped", "Validated", "Finished"}
    for name, alive in seen:
        assert alive == {"text": {"Gemma2Model"}, "latents of d0": {"AutoencoderDC"}}.get(name, set()), name
