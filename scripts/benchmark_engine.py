"""What the engine's parts are worth: each rewrite beside diffusers' own code, and a step of 30 million parameters.

python scripts/benchmark_engine.py rewrites           time on the CPU at 40 M parameters, pairwise
python scripts/benchmark_engine.py counts             1.6B: kernels, bytes moved and kept, without computing anything
python scripts/benchmark_engine.py strata             stratified noise levels: how steady a step's loss is, on nano
python scripts/benchmark_engine.py previews           what previews cost beside the sampling, at the default interval
python scripts/benchmark_engine.py checks             what a step pays for knowing that its numbers are finite
python scripts/benchmark_engine.py saving             how long a checkpoint of 30 M parameters holds training up
python scripts/benchmark_engine.py step [ARGUMENTS]   scripts/benchmark.py over a model of 30 M parameters
python scripts/benchmark_engine.py ranks               2 processes on 2 cores beside 1 on 1: pictures a second
sana_tune bench                                       whole steps of any model, on a GPU too
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import MethodType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# About 40 M parameters for the rewrites; 30 M with nano's VAE and text encoder around it for whole steps.
SMALL: dict[str, Any] = {
    "num_attention_heads": 14,
    "num_layers": 12,
    "num_cross_attention_heads": 7,
    "cross_attention_head_dim": 64,
    "cross_attention_dim": 448,
    "caption_channels": 256,
}
MIDDLE: dict[str, Any] = {
    "num_attention_heads": 12,
    "attention_head_dim": 32,
    "num_layers": 12,
    "num_cross_attention_heads": 6,
    "cross_attention_head_dim": 64,
    "cross_attention_dim": 384,
}
SETTLING = 2
RANKS_TURNS = 3  # runs of one process, and of two
BLOCK = 4  # steps that are timed together: on a GPU the host runs ahead of it


def rewrites() -> dict[str, Callable[[Any], None]]:
    """Name → what is done to a block of diffusers' model."""
    from sana_tune.model.attention import CrossAttention, LinearAttention, feed_forward

    def feed(block: Any) -> None:
        block.ff.forward = MethodType(feed_forward, block.ff)

    single: dict[str, Callable[[Any], None]] = {
        "linear attention": lambda block: block.attn1.set_processor(LinearAttention()),
        "cross-attention": lambda block: block.attn2.set_processor(CrossAttention()),
        "feed-forward": feed,
    }

    def all_three(block: Any) -> None:
        for change in single.values():
            change(block)

    return {**single, "all three": all_three}


def models(base: Any) -> dict[str, Any]:
    """Copies of a model: diffusers' own, and each rewrite."""
    found = {"diffusers": base}
    for name, change in rewrites().items():
        found[name] = copy.deepcopy(base)
        for block in found[name].transformer_blocks:
            change(block)
    return found


def inputs(config: Any, side: int, batch: int, tokens: int, dtype: Any) -> dict[str, Any]:
    import torch

    mask = torch.ones(batch, tokens, dtype=torch.int64)
    mask[0, tokens * 3 // 4 :] = 0
    return {
        "hidden_states": torch.randn(batch, config["in_channels"], side, side, dtype=dtype),
        "encoder_hidden_states": torch.randn(batch, tokens, config["caption_channels"], dtype=dtype),
        "encoder_attention_mask": mask if batch > 1 else None,
        "timestep": torch.full((batch,), 500.0),
    }


def time_rewrites(asked: argparse.Namespace) -> None:
    """Forward and backward of each in turn, and the median of the ratios of neighbours."""
    import torch
    from diffusers import SanaTransformer2DModel

    bf16 = asked.precision == "bf16"
    for qk_norm in (None, "rms_norm_across_heads"):
        found = models(SanaTransformer2DModel(**SMALL, qk_norm=qk_norm).train())
        values = inputs(found["diffusers"].config, asked.side, asked.batch, 40, torch.float32)
        times: dict[str, list[float]] = {name: [] for name in found}
        for _ in range(SETTLING + asked.rounds):
            for name, model in found.items():
                started = time.perf_counter()
                with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                    out = model(**values, return_dict=False)[0]
                out.float().square().mean().backward()
                times[name].append(time.perf_counter() - started)
                model.zero_grad()
        print(f"{asked.precision}, batch {asked.batch}, {asked.side}x{asked.side} positions, qk_norm {bool(qk_norm)}")
        for name, taken in times.items():
            pairs = zip(taken[SETTLING:], times["diffusers"][SETTLING:], strict=True)
            ratio = statistics.median(mine / theirs for mine, theirs in pairs)
            print(f"  {name:18} {1000 * statistics.median(taken[SETTLING:]):8.1f} ms  ratio {ratio:.3f}")


def count(batch: int, bf16_weights: bool) -> dict[str, tuple[float, float, float]]:
    """Of a block of the 1.6B model at 1024 px: kernels, and GB moved and kept per picture. Nothing is computed."""
    import torch
    from diffusers import SanaTransformer2DModel
    from torch._subclasses.fake_tensor import FakeTensorMode

    dtype = torch.bfloat16 if bf16_weights else torch.float32

    def seen(layers: int, change: Callable[[Any], None]) -> tuple[int, int, int]:
        torch.set_default_dtype(dtype)
        model = SanaTransformer2DModel(num_layers=layers).train()
        torch.set_default_dtype(torch.float32)
        for block in model.transformer_blocks:
            change(block)
        return counted(model, inputs(model.config, 32, batch, 120, dtype), not bf16_weights)

    found = {}
    with FakeTensorMode():
        for name, change in {"diffusers": lambda block: None, **rewrites()}.items():
            one, two = seen(1, change), seen(2, change)
            launches, moved, kept = (after - before for before, after in zip(one, two, strict=True))
            found[name] = (launches, moved / batch / 1e9, kept / batch / 1e9)
    return found


def counted(model: Any, values: dict[str, Any], autocast: bool) -> tuple[int, int, int]:
    """Operations that read or write memory, the bytes they touch, and the bytes kept for the backward pass."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    total = [0, 0]
    views = {torch.ops.aten.detach.default, torch.ops.aten._unsafe_view.default, torch.ops.aten.empty_like.default}

    def size(tensor: torch.Tensor) -> int:
        places = 1
        for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
            places *= length if stride else 1  # what is only broadcast is read once
        return places * tensor.element_size()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor)]
            if isinstance(out, torch.Tensor | tuple | list) and not function.is_view and function not in views:
                total[0] += 1
                total[1] += sum(map(size, tensors))
            return out

    weights = {weight.untyped_storage()._cdata for weight in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage()._cdata
        if place not in weights:
            kept[place] = tensor
        return tensor

    with Watch():
        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with hooks, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = model(**values, return_dict=False)[0]
        out.float().square().mean().backward()
    model.zero_grad()
    return total[0], total[1], sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def tell_counts() -> None:
    """The counts of all rewrites, at batch 1 and 8."""
    for bf16_weights in (True, False):
        for batch in (1, 8):
            print(
                f"{'bf16 weights' if bf16_weights else 'fp32 weights, bf16 autocast'}, batch {batch}, one block of 20"
            )
            for name, (launches, moved, kept) in count(batch, bf16_weights).items():
                print(f"  {name:18} {launches:4} kernels  {moved:6.3f} GB moved  {kept:6.3f} GB kept a picture")


def steadiness(batch: int, steps: int) -> float:
    """Variance of a step's loss with stratified levels over that with plain ones, nano untrained on new figures.

    Pictures and noise are the same for both: only the levels differ.
    """
    import torch

    from sana_tune.model import flow
    from scripts.nano import score

    pipeline = score.load(ROOT / "sana_tune" / "assets" / "nano" / "model")
    latents, texts, masks = [], [], []
    with torch.no_grad():
        for path in sorted((ROOT / "config" / "examples" / "nano" / "known").glob("*.png")):
            latents.append(score.latent(pipeline, path))
            text, mask = score.caption_embeds(pipeline, path.with_suffix(".txt").read_text(encoding="utf-8"))
            texts.append(text[:, :40])
            masks.append(mask[:, :40])
        x0, text, mask = (torch.cat(each) for each in (latents, texts, masks))
        losses: dict[bool, list[float]] = {False: [], True: []}
        for step in range(steps):
            for stratified, found in losses.items():
                generator = torch.Generator().manual_seed(step)
                chosen = torch.randperm(len(x0), generator=generator)[:batch]
                noise = torch.randn(x0[chosen].shape, generator=generator)
                sigma = flow.draw_sigmas(batch, 1.0, generator, flow.Levels(stratified=stratified))
                velocity = pipeline.transformer(
                    flow.noised(x0[chosen], noise, sigma),
                    encoder_hidden_states=text[chosen],
                    encoder_attention_mask=mask[chosen],
                    timestep=flow.timestep(sigma),
                    return_dict=False,
                )[0]
                found.append(float((velocity - flow.target(x0[chosen], noise)).square().mean()))
    return statistics.variance(losses[True]) / statistics.variance(losses[False])


@dataclass(frozen=True)
class Share:
    """What something costs beside the same work without it: medians of both, s; the share of pairs and its standard
    error; the share of the process's CPU time, all threads together."""

    without_s: float
    with_s: float
    share: float
    error: float
    cpu_share: float = math.nan


def share_of(with_them: Sequence[float], without: Sequence[float]) -> Share:
    """From times that were taken in pairs."""
    shares = [mine / other - 1 for mine, other in zip(with_them, without, strict=True)]
    low, _, high = statistics.quantiles(shares, n=4) if len(shares) > 1 else (math.nan,) * 3
    error = 0.93 * (high - low) / math.sqrt(len(shares))  # of a median, from the quartiles, as of a normal distribution
    return Share(statistics.median(without), statistics.median(with_them), statistics.median(shares), error)


def preview_cost(model: Path, side: int, rounds: int) -> Share:
    """20 sampler steps on the CPU with previews and without, in turns.

    model: with nano's VAE and text encoder. side: of the pictures, px. The map is a random one: that costs the same.
    """
    import torch

    from sana_tune.config.schema import ValidationConfig
    from sana_tune.data.images import encode_png
    from sana_tune.model import generate, preview
    from sana_tune.model.sana import load_transformer
    from sana_tune.progress import Progress
    from sana_tune.train.previews import Previews
    from sana_tune.train.validate import Picture

    transformer = load_transformer(model)
    channels, width = transformer.config["in_channels"], transformer.config["caption_channels"]
    linear = preview.Linear(torch.randn(channels + 1, 8 * 8 * 3) * 0.1)
    every = ValidationConfig().validation_preview_steps
    previews = Previews(
        lambda latents: preview.pixels(linear(latents)), lambda array: encode_png(array, fast=True), lambda event: None,
        every,
    )  # fmt: skip
    picture, text = Picture("a", "a", side, side, 0, 0, slug="a"), torch.randn(20, width)
    times: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    for number in range(rounds + SETTLING):
        for seen in (True, False) if number % 2 else (False, True):
            showing = previews.of(picture, Progress()) if seen else None
            scheduler = generate.load_scheduler(model)
            started, worked = time.perf_counter(), time.process_time()
            grid = (channels, side // 8, side // 8)
            generate.sample(transformer, scheduler, text, text, grid, steps=picture.steps, watch=showing)
            if showing is not None:
                showing.close()
            times[seen].append((time.perf_counter() - started, time.process_time() - worked))
    walls, works = (
        share_of(*([each[part] for each in times[seen][SETTLING:]] for seen in (True, False))) for part in (0, 1)
    )
    return replace(walls, cpu_share=works.share)


def tell_previews(rounds: int) -> None:
    """The cost of previews, of nano at 64 px and of 30 M parameters at 128 px."""
    from sana_tune.model.fetch import locate

    with tempfile.TemporaryDirectory(prefix="sana_tune-benchmark-") as place:
        for name, model, side in (("nano", locate("nano"), 64), ("30 M", middle_model(Path(place)), 128)):
            found = preview_cost(model, side, rounds)
            print(
                f"{name}, {side} px: 20 steps {found.without_s:.3f} s, with previews {found.with_s:.3f} s "
                f"({100 * found.share:+.2f} % ± {100 * found.error:.2f} %; {100 * found.cpu_share:+.2f} % of CPU time)"
            )


def check_cost(
    transformer: dict[str, Any], side: int, batch: int, rounds: int, device: str = "auto"
) -> tuple[Share, float]:
    """The cost of the flag, of its read on the host and of the loss by noise level, of a model with random weights.

    side: latent positions. Each round times both kinds, a few steps at a time, in turns.
    """
    import torch

    from sana_tune.data.batch import Batch
    from sana_tune.data.order import MicroBatch
    from sana_tune.data.records import Role
    from sana_tune.progress import Progress
    from sana_tune.train import step as steps

    parts = _random_parts(transformer, device)
    place, config = parts.accelerator.device, parts.bare.config
    text = torch.randn(batch, 64, config["caption_channels"])
    latents = torch.randn(batch, config["in_channels"], side, side)
    names = tuple(str(number) for number in range(batch))
    one = Batch(latents, text, torch.ones(batch, 64, dtype=torch.int64), None, Role.TRAIN, names)
    sample = (MicroBatch(0, 0, 0, tuple(range(batch))), one)

    def checked() -> None:
        steps.train_step(parts, [sample], Progress(0))

    def unchecked() -> None:
        """The same step, its update whatever the numbers are, and nothing read."""
        steps.set_rate(parts, 0)
        parts.accelerator.backward(steps.micro_loss(parts, one, 0, 0).mean)
        steps.clip(parts.trained, parts.max_grad_norm, parts.clip_method)
        parts.optimizer.step()
        parts.optimizer.zero_grad(set_to_none=True)

    def timed(work: Callable[[], object], times: int) -> float:
        started = time.perf_counter()
        for _ in range(times):
            work()
        if place.type == "cuda":
            torch.cuda.synchronize(place)
        return (time.perf_counter() - started) / times

    found: dict[bool, list[float]] = {True: [], False: []}
    for number in range(SETTLING + rounds):
        for kind in (True, False) if number % 2 else (False, True):
            found[kind].append(timed(checked if kind else unchecked, BLOCK))
    loss = steps.micro_loss(parts, one, 0, 0)
    loss = loss._replace(mean=loss.mean.detach())
    norm = loss.mean.clone()
    read_s = statistics.median(timed(lambda: steps._read(parts, [loss], norm, batch, []), BLOCK) for _ in range(50))
    return share_of(*(found[kind][SETTLING:] for kind in (True, False))), read_s


def _random_parts(transformer: dict[str, Any], device: str) -> Any:
    """A random model with all around it that a step needs, in bf16 on an accelerator."""
    import torch

    from sana_tune.bench import random_model
    from sana_tune.model.attention import install
    from sana_tune.train.device import resolve_device

    torch.manual_seed(0)
    model = random_model(transformer)
    install(model)
    return parts_of(model, device=device, precision="no" if resolve_device(device) == "cpu" else "bf16")


def tell_checks(asked: argparse.Namespace) -> None:
    """The cost of the checks, of 30 M parameters."""
    found, read_s = check_cost({**MIDDLE, "caption_channels": 256}, asked.side, asked.batch, asked.rounds)
    print(
        f"30 M parameters, batch {asked.batch}, {asked.side}x{asked.side} positions: a step {found.with_s:.4f} s, "
        f"without the checks {found.without_s:.4f} s ({100 * found.share:+.2f} % ± {100 * found.error:.2f} %); "
        f"the read alone {1e6 * read_s:.0f} µs ({100 * read_s / found.without_s:.3f} %)"
    )


def middle_model(folder: Path) -> Path:
    """nano with a transformer of 30 M random parameters. Answers the folder."""
    import torch
    from diffusers import SanaTransformer2DModel

    from sana_tune.model.fetch import locate

    shutil.copytree(locate("nano"), folder / "model")
    shutil.rmtree(folder / "model" / "transformer")
    nano = SanaTransformer2DModel.from_pretrained(locate("nano"), subfolder="transformer")
    known = {key: value for key, value in nano.config.items() if not key.startswith("_")}
    torch.manual_seed(0)
    SanaTransformer2DModel(**{**known, **MIDDLE}).save_pretrained(folder / "model" / "transformer")
    return folder / "model"


def in_ranks(folder: Path, processes: int, steps: int, batch: int, side: int) -> float:
    """Pictures a second of a run of the middle model, each process on one core; the median of all but the first steps.

    folder: holds model/ and pictures/, and the runs that were timed before. One process takes as many micro-batches a
    step as two do together.
    """
    import json
    import os
    import subprocess

    from sana_tune.watch.metrics import read

    place = Path(tempfile.mkdtemp(prefix="ranks-", dir=folder))
    datasets = [{"id": "d", "instance_data_dir": str(folder / "pictures"), "caption_strategy": "filename"}]
    (place / "multidatabackend.json").write_text(json.dumps(datasets), encoding="utf-8")
    settings = {
        "pretrained_model_name_or_path": str(folder / "model"), "device": "cpu", "mixed_precision": "no",
        "data_backend_config": str(place / "multidatabackend.json"), "output_dir": str(place / "output"),
        "cache_dir": str(folder / "cache"), "resolution": side, "train_batch_size": batch, "num_processes": processes,
        "gradient_accumulation_steps": 2 // processes, "gradient_checkpointing": False, "max_train_steps": steps,
        "checkpoint_step_interval": 0, "validation_disable": True,
    }  # fmt: skip
    (place / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    command = [sys.executable, "-m", "sana_tune", "train", "--config", str(place / "config.json")]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    cores = sorted(os.sched_getaffinity(0))[:processes] if hasattr(os, "sched_getaffinity") else []

    def pin() -> None:
        if cores:
            os.sched_setaffinity(0, cores)

    subprocess.run(command, env=environ, check=True, stdout=subprocess.DEVNULL, preexec_fn=pin)
    times = [line["step_s"] for line in read(place / "output" / "metrics.jsonl")][SETTLING:]
    return 2 * batch / statistics.median(times)


def time_ranks(steps: int, batch: int, side: int) -> float:
    """What a second process on a second core is worth: the ratio of pictures a second, told with both.

    Runs of one and of two take turns, since a machine is not equally quick for minutes.
    """
    import random

    from PIL import Image

    with tempfile.TemporaryDirectory(prefix="sana_tune-benchmark-") as place:
        folder, luck = Path(place), random.Random(0)
        middle_model(folder)
        (folder / "pictures").mkdir()
        for number in range(8):
            pixels = luck.randbytes(side * side * 3)
            Image.frombytes("RGB", (side, side), pixels).save(folder / "pictures" / f"picture {number}.png")
        found = [[in_ranks(folder, processes, steps, batch, side) for processes in (1, 2)] for _ in range(RANKS_TURNS)]
    one, two = (statistics.median(speeds) for speeds in zip(*found, strict=True))
    ratios = sorted(pair[1] / pair[0] for pair in found)
    print(f"1 process on 1 core {one:.2f} images/s, 2 processes on 2 cores {two:.2f}; ratio of {len(found)} pairs: "
          f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} - {ratios[-1]:.2f})")  # fmt: skip
    return statistics.median(ratios)


@dataclass(frozen=True)
class Delay:
    """One checkpoint in the background, in seconds. step_s: an undisturbed step. copy_s: what `save` itself took.

    next_s: by how much the step after it was later, the copy included; all_s: the same of all steps until it stood.
    write_s: what writing took, with its rests; alone_s: the same of a checkpoint that was waited for.
    """

    step_s: float
    copy_s: float
    next_s: float
    all_s: float
    write_s: float
    alone_s: float


def delays(parts: Any, sample: Any, folder: Path, rounds: int) -> list[Delay]:
    """Steps with a checkpoint now and then. parts: as a run has them. sample: the micro-batch of every step."""
    from sana_tune.progress import Progress
    from sana_tune.saving import Keeping
    from sana_tune.train.checkpoint import Checkpoints
    from sana_tune.train.step import train_step
    from sana_tune.watch.events import Saved

    progress, found = Progress(), list[Delay]()
    told: list[Any] = []
    checkpoints = Checkpoints(folder, Keeping(1), background=True)

    def step() -> float:
        nonlocal progress
        started = time.perf_counter()
        progress = progress.advance(train_step(parts, [sample], progress).images, 0.0)
        checkpoints.poll()
        return time.perf_counter() - started

    with checkpoints.telling(told.append, lambda: False):
        for turn in range(1 + rounds):  # the first takes memory that the others find
            quiet = statistics.median(step() for _ in range(5))
            started = time.perf_counter()
            checkpoints.save(parts, progress)
            copied = time.perf_counter() - started
            later: list[float] = []
            while not told:
                later.append(step() - quiet)
            (saved,) = told
            told.clear()
            assert isinstance(saved, Saved)
            checkpoints.save(parts, progress)
            checkpoints.held()
            alone_s = told.pop().duration_s
            if turn:
                write_s = saved.duration_s - copied
                found.append(Delay(quiet, copied, copied + later[0], copied + sum(later), write_s, alone_s))
    return found


def parts_of(model: Any, adapter: Any = None, device: str = "auto", precision: str = "no") -> Any:
    """All that a step needs around a model, which goes to the device. adapter: it is trained, in place of the model's
    weights."""
    from sana_tune.schedule import Schedule
    from sana_tune.train.device import make_accelerator
    from sana_tune.train.ema import NoEma
    from sana_tune.train.optim import build_optimizer, parameter_groups
    from sana_tune.train.step import Parts

    accelerator = make_accelerator(device, precision)
    return Parts(
        accelerator=accelerator,
        transformer=model.to(accelerator.device),
        optimizer=build_optimizer("optimi-adamw", parameter_groups(model.named_parameters()), 1e-5),
        schedule=Schedule("constant", 1e-5, 10_000),
        ema=NoEma(),
        shift_at=lambda tokens: 3.0,
        seed=0,
        adapter=adapter,
    )


def saving_parts() -> tuple[Any, Any]:
    """A model of 30 M parameters with all around it that a step needs, and a micro-batch of one picture."""
    import torch
    from diffusers import SanaTransformer2DModel

    from sana_tune.data.batch import Batch
    from sana_tune.data.order import MicroBatch
    from sana_tune.data.records import Role

    torch.manual_seed(0)
    model = SanaTransformer2DModel(**MIDDLE, in_channels=32, out_channels=32, caption_channels=256)
    parts = parts_of(model)
    text, mask = torch.randn(1, 40, 256), torch.ones(1, 40, dtype=torch.int64)
    batch = Batch(torch.randn(1, 32, 16, 16), text, mask, None, Role.TRAIN, ("one",))
    return parts, (MicroBatch(0, 0, 0, (0,)), batch)


def tell_saving(rounds: int, threads: int) -> None:
    """By how much checkpoints hold training up, beside the time that they take."""
    import torch

    torch.set_num_threads(threads)
    parts, sample = saving_parts()
    count = sum(parameter.numel() for parameter in parts.trained)
    with tempfile.TemporaryDirectory(prefix="sana_tune-benchmark-", dir=".") as place:
        found = delays(parts, sample, Path(place), rounds)
    median = Delay(*(statistics.median(vars(one)[each.name] for one in found) for each in fields(Delay)))
    print(f"{count / 1e6:.1f} M parameters, {threads} threads, {rounds} checkpoints; medians:")
    print(f"  a step {1000 * median.step_s:.0f} ms; writing beside training {1000 * median.write_s:.0f} ms, alone "
          f"{1000 * median.alone_s:.0f} ms")  # fmt: skip
    late = {"save()": median.copy_s, "the next step": median.next_s, "all steps until it stands": median.all_s}
    for title, late_s in late.items():
        shares = f"{100 * late_s / median.write_s:.1f} %, {100 * late_s / median.alone_s:.1f} % of writing alone"
        print(f"  {title}: later by {1000 * late_s:.0f} ms = {shares}")


def main() -> None:
    parser = argparse.ArgumentParser(description="What the engine's parts are worth.")
    kinds = ("rewrites", "counts", "strata", "previews", "checks", "saving", "step", "ranks")
    parser.add_argument("what", choices=kinds)
    parser.add_argument("--batch", type=int, default=2, help="for rewrites, checks and ranks")
    parser.add_argument("--side", type=int, default=16, help="for rewrites, checks, ranks: latent positions a side")
    parser.add_argument("--precision", default="no", choices=("no", "bf16"), help="for rewrites")
    threads = max(1, (os.cpu_count() or 2) - 1)
    parser.add_argument("--threads", type=int, default=threads, help="for saving: threads of torch")
    parser.add_argument("--rounds", type=int, default=10, help="for rewrites; steps of ranks; for strata 40 steps each")
    if sys.argv[1:2] == ["step"]:
        from scripts import benchmark

        with tempfile.TemporaryDirectory(prefix="sana_tune-benchmark-") as place:
            sys.argv = ["benchmark", "--model", str(middle_model(Path(place))), *sys.argv[2:]]
            return benchmark.main()
    asked = parser.parse_args()
    from sana_tune import log

    log.quiet_libraries()
    if asked.what == "counts":
        return tell_counts()
    if asked.what == "saving":
        return tell_saving(asked.rounds, asked.threads)
    if asked.what == "previews":
        return tell_previews(asked.rounds)
    if asked.what == "ranks":
        time_ranks(SETTLING + asked.rounds, asked.batch, 8 * asked.side)  # nano's autoencoder has 8 px a position
        return None
    if asked.what == "checks":
        return tell_checks(asked)
    if asked.what == "strata":
        for batch in (1, 2, 4, 8):
            print(f"batch {batch}: variance of the loss {steadiness(batch, 40 * asked.rounds):.2f} times the plain one")
        return None
    time_rewrites(asked)


if __name__ == "__main__":
    main()
