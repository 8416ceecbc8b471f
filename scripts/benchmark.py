"""How fast sana_tune is: its steps beside those of a bare loop, its start, its data path, and `sana_tune --help`.

    python scripts/benchmark.py                      nano, batch 8, on the CPU
    python scripts/benchmark.py --batch 32 --threads 2
    python scripts/benchmark.py --model FOLDER --device cuda --precision bf16 --batch 4
    python scripts/benchmark.py --only check         sana_tune check over 10,000 pictures, cold and warm
    python scripts/benchmark.py --only data          scan, preparing, loader, text cache (scripts/benchmark_data.py)
    python scripts/benchmark.py --only report        report.html of 10,000 steps: writing it, its first paint
    python scripts/benchmark.py --only sinks         events, metrics and report beside the time of a step

Two loops are timed in one process in alternating blocks, so that whatever else the machine does slows both alike:
ours is `train.loop.fit` as a run calls it (loader over warm caches, noise from position, clip, check, EMA,
metrics.jsonl, screen); the bare one is the shortest that trains the same: plain diffusers model, optimi AdamW, clip,
EMA, one read of the loss, its batches ready in memory.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

if TYPE_CHECKING:
    import torch

    from sana_tune.caching import Caches
    from sana_tune.config.load import Loaded
    from sana_tune.data.loader import Batches, Step
    from sana_tune.prepare import Prepared

CLIP, DECAY, RATE = 0.1, 0.99, 1e-5
HELP_TIMES = 5
DATA = ("scan", "prepare", "loader", "text-cache")  # scripts/benchmark_data.py
CHECK_SIZES = ((1024, 768), (768, 1024), (1024, 1024), (1280, 720), (900, 1200))


@dataclass
class Alternating:
    """A run's batches that pause after each `block` steps: `between` is called, and both are timed.

    wait: returns when the device has done its work. ours, theirs: seconds per step, block by block.
    waited: the part of ours in which the next batch was not there yet.
    """

    batches: Batches
    block: int
    between: Callable[[int], None]
    wait: Callable[[], None]
    ours: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)
    waited: list[float] = field(default_factory=list)

    def steps(self, first_step: int, total_steps: int) -> Iterator[Step]:
        steps = self.batches.steps(first_step, total_steps)
        for _ in range(first_step, total_steps, self.block):
            started, waited = time.perf_counter(), 0.0
            for _ in range(self.block):
                asked = time.perf_counter()
                step = next(steps)
                waited += time.perf_counter() - asked
                yield step
            self.ours.append(self.since(started))  # the loop asks for the next step: it has done the last one
            self.waited.append(waited / self.block)
            started = time.perf_counter()
            self.between(self.block)
            self.theirs.append(self.since(started))

    def since(self, started: float) -> float:
        self.wait()
        return (time.perf_counter() - started) / self.block


def settings(folder: Path, asked: argparse.Namespace) -> Loaded:
    """Pictures of one size in `folder`, and the settings of a run on them."""
    import numpy as np

    from sana_tune.config.load import load
    from sana_tune.model import fetch
    from sana_tune.model.facts import from_folder
    from scripts.nano import draw

    side = asked.resolution or from_folder(fetch.locate(asked.model)).native_px
    scenes = [draw.random_scene(np.random.default_rng(n), size_px=(side, side)) for n in range(4 * asked.batch)]
    draw.write_pictures(folder / "pictures", scenes)
    datasets = [{"id": "pictures", "instance_data_dir": str(folder / "pictures")}]
    (folder / "multidatabackend.json").write_text(json.dumps(datasets), encoding="utf-8")
    config = {
        "pretrained_model_name_or_path": asked.model,
        "data_backend_config": str(folder / "multidatabackend.json"),
        "output_dir": str(folder / "output"),
        "caption_strategy": "textfile",
        "resolution": side,
        "train_batch_size": asked.batch,
        "max_train_steps": asked.block * (asked.blocks + 1),
        "checkpoint_step_interval": 0,
        "mixed_precision": asked.precision,
        "gradient_checkpointing": asked.recompute,
        "learning_rate": RATE,
        "max_grad_norm": CLIP,
        "use_ema": True,
        "ema_decay": DECAY,
        "validation_disable": True,
        "device": asked.device,
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return load(folder / "config.json", {}, {})


def bare_loop(
    prepared: Prepared, caches: Caches, device: torch.device, asked: argparse.Namespace
) -> Callable[[int], None]:
    """A function that does so many steps of the bare loop."""
    import optimi
    import torch
    import torch.nn.functional as F
    from diffusers import SanaTransformer2DModel

    from sana_tune.run import batches_of

    model: Any = SanaTransformer2DModel.from_pretrained(
        prepared.folder, subfolder="transformer", torch_dtype=torch.float32
    )
    model.to(device).train()
    if asked.recompute:
        model.enable_gradient_checkpointing()
    weights = list(model.parameters())
    average = [weight.detach().clone() for weight in weights]
    optimizer = optimi.AdamW(weights, RATE, betas=(0.9, 0.99), weight_decay=0.0, eps=1e-6)
    batches = batches_of(prepared, caches, caches)
    ready = [batch for number in range(8) for _, batch in batches.load(number)]
    data = [tuple(each.to(device) for each in (batch.latents, batch.text, batch.text_mask)) for batch in ready]
    shift = prepared.plan.flow_shift

    def steps(count: int) -> None:
        for number in range(count):
            x0, text, mask = data[number % len(data)]
            sigma = torch.randn(len(x0), device=device).sigmoid()
            sigma = shift * sigma / (1 + (shift - 1) * sigma)
            noise, level = torch.randn_like(x0), sigma[:, None, None, None]
            with torch.autocast(device.type, torch.bfloat16, enabled=asked.precision == "bf16"):
                noised = (1 - level) * x0 + level * noise
                predicted = model(noised, text, 1000 * sigma, encoder_attention_mask=mask, return_dict=False)[0]
            loss = F.mse_loss(predicted.float(), noise - x0)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, CLIP)
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                torch._foreach_lerp_(average, weights, 1 - DECAY)
            loss.item()

    return steps


def measure_steps(loaded: Loaded, asked: argparse.Namespace) -> Alternating:
    """Both loops, in alternating blocks; the first block of each is for warming up and left out."""
    import torch

    from sana_tune import run
    from sana_tune.log import console
    from sana_tune.output import Output
    from sana_tune.prepare import identity_of, prepare
    from sana_tune.saving import Keeping
    from sana_tune.train.checkpoint import Checkpoints
    from sana_tune.train.device import make_accelerator
    from sana_tune.train.loop import fit
    from sana_tune.train.signals import Stop
    from sana_tune.train.validate import NoValidator
    from sana_tune.watch.sinks import MetricsSink, Watcher, screen

    output = Output.open(Path(loaded.config.train.output_dir))
    prepared = prepare(loaded, output)
    accelerator = make_accelerator(asked.device, asked.precision)
    caches = run.open_caches(prepared)
    with Watcher([screen(console()), MetricsSink(output.metrics_file)]) as watcher:
        prepared = run.filled(prepared, caches, accelerator.device, watcher)
        wait = torch.cuda.synchronize if accelerator.device.type == "cuda" else lambda: None
        bare = bare_loop(prepared, caches, accelerator.device, asked)
        batches = Alternating(run.batches_of(prepared, caches, caches), asked.block, bare, wait)
        parts = run.build_parts(prepared, accelerator)
        checkpoints = Checkpoints(output.root, Keeping(1), identity_of(loaded.config))
        fit(prepared.plan, parts, batches, NoValidator(), checkpoints, watcher, Stop())
    del batches.ours[0], batches.theirs[0], batches.waited[0]
    return batches


def measure_help() -> float:
    """Seconds that `sana_tune --help` takes, the median of a few."""

    def once() -> float:
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "sana_tune", "--help"], check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
        return time.perf_counter() - started

    return statistics.median(once() for _ in range(HELP_TIMES))


# A start whose imports of other people's libraries are done beforehand: what is left is our own share.
PRELOADED = """
import sys, time
import accelerate, optimi, torch, transformers
from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel
from transformers import AutoTokenizer, Gemma2Model
print(time.time(), flush=True)
from sana_tune.cli.main import main
main()
"""


def measure_start(folder: Path, preloaded: bool) -> float:
    """Seconds from the command to the first step, the caches warm. preloaded: without the imports of libraries."""
    output = folder / f"second_{preloaded}"
    metrics = output / "metrics.jsonl"
    cache = ["--cache_dir", str(folder / "output" / "cache")]
    program = ["-c", PRELOADED] if preloaded else ["-m", "sana_tune"]
    command = [sys.executable, *program, "train", "--config", str(folder / "config.json"), *cache]
    started = time.time()
    run = subprocess.Popen(
        [*command, "--max_train_steps", "1", "--output_dir", str(output)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert run.stdout is not None
    if preloaded:
        started = float(run.stdout.readline())
    while not (metrics.exists() and metrics.read_text().endswith("\n")):
        if run.poll() is not None:
            break
        time.sleep(0.005)
    seconds = time.time() - started
    run.communicate()
    if run.returncode != 0:
        raise SystemExit("the run that was to show the start failed")
    return seconds - json.loads(metrics.read_text().splitlines()[0])["step_s"]


def many_pictures(folder: Path, count: int) -> Path:
    """A folder of so many JPEGs of about a megapixel with captions of 70 words, and a config for them."""
    import io
    import random

    import numpy as np
    from PIL import Image

    chosen, words = np.random.default_rng(0), "a red cat sitting on the table beside window light morning".split()
    kinds = []
    for width, height in CHECK_SIZES:
        small = chosen.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(small).resize((width, height)).save(file, "JPEG", quality=85)
        kinds.append(file.getvalue())
    pictures = folder / "pictures"
    pictures.mkdir()
    for number in range(count):  # what follows the end of a JPEG does not matter to it: no two files are the same
        (pictures / f"{number:05}.jpg").write_bytes(kinds[number % len(kinds)] + str(number).encode())
        caption = f"photo {number} " + " ".join(random.Random(number).choices(words, k=70))
        (pictures / f"{number:05}.txt").write_text(caption, encoding="utf-8")
    datasets = [{"id": "many", "instance_data_dir": str(pictures), "resolution": 512, "caption_strategy": "textfile"}]
    (folder / "multidatabackend.json").write_text(json.dumps(datasets), encoding="utf-8")
    places = {"data_backend_config": str(folder / "multidatabackend.json"), "output_dir": str(folder / "output")}
    config = folder / "config.json"
    config.write_text(json.dumps({"pretrained_model_name_or_path": "nano", **places}), encoding="utf-8")
    return config


def measure_check(config: Path) -> tuple[float, float]:
    """Seconds that `sana_tune check` takes when it knows none of the pictures (their bytes may be in the system's
    cache), and the median when it knows them all."""

    def once() -> float:
        started = time.perf_counter()
        command = [sys.executable, "-m", "sana_tune", "check", "--config", str(config)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
        return time.perf_counter() - started

    return once(), statistics.median(once() for _ in range(HELP_TIMES))


def tell_check(count: int) -> None:
    """The times of a check over so many pictures."""
    with tempfile.TemporaryDirectory(prefix="sana_tune-benchmark-") as place:
        cold, warm = measure_check(many_pictures(Path(place), count))
    print(f"sana_tune check, {count:,} pictures: cold {cold:.2f} s, warm {warm:.2f} s (median of {HELP_TIMES})")


def tell_data(parts: Sequence[str], count: int | None, rounds: int) -> None:
    """What the data path takes, part by part. count: of pictures, items or captions, else what the bars are for."""
    from scripts import benchmark_data

    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores")
    for part in parts:
        if part == "scan":
            benchmark_data.tell_scan(count or 10_000, rounds)
        elif part == "prepare":
            benchmark_data.tell_prepare(count or 24, rounds)
        elif part == "loader":
            benchmark_data.tell_loader(count or 100_000, min(count or 1000, 1000))
        else:
            benchmark_data.tell_text_cache(count or 256)


def tell_steps(found: Alternating, asked: argparse.Namespace) -> None:
    """The medians and the ratio of neighbouring blocks, whose quartiles show how quiet the machine was."""
    ratios = [ours / theirs for ours, theirs in zip(found.ours, found.theirs, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    ours, theirs = (1000 * statistics.median(times) for times in (found.ours, found.theirs))
    print(f"step at batch {asked.batch}: sana_tune {ours:.1f} ms, bare loop {theirs:.1f} ms (medians)")
    print(f"  ratio {middle:.3f} (quartiles {low:.3f} to {high:.3f}; {len(ratios)} pairs of {asked.block} steps)")
    print(f"  of ours, waiting for data: {sum(found.waited) / sum(found.ours):.2%}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Time sana_tune beside a bare loop, its start and its help.")
    parser.add_argument("--model", default="nano", help="nano, a folder or a hub id")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--resolution", type=int, help="px; default: the model's own")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--precision", default="no", choices=("no", "bf16"))
    parser.add_argument("--recompute", action="store_true", help="gradient checkpointing of every block, in both loops")
    parser.add_argument("--blocks", type=int, default=20, help="pairs of blocks, at least 2")
    parser.add_argument("--block", type=int, default=10, help="steps in a block")
    parser.add_argument("--threads", type=int, help="of torch; default: its own choice")
    parser.add_argument("--steps-only", action="store_true", help="leave out start and help")
    parser.add_argument("--only", choices=("check", *DATA, "data", "report", "sinks"), help="leave out all but this")
    parser.add_argument(
        "--pictures", type=int, help="for --only: pictures, items, captions or steps; default: the bar's"
    )
    parser.add_argument("--rounds", type=int, default=5, help="for --only scan and prepare")
    asked = parser.parse_args()
    if asked.threads:
        os.environ["OMP_NUM_THREADS"] = str(asked.threads)  # before torch is loaded; the start is measured with it too
    if asked.only == "check":
        return tell_check(asked.pictures or 10_000)
    if asked.only in ("report", "sinks"):
        from scripts import benchmark_report

        tell = benchmark_report.tell_report if asked.only == "report" else benchmark_report.tell_sinks
        return tell(asked.pictures or 10_000, asked.rounds)
    if asked.only:
        return tell_data(DATA if asked.only == "data" else (asked.only,), asked.pictures, asked.rounds)
    from sana_tune import log

    log.quiet_libraries()
    import torch

    device = torch.cuda.get_device_name() if asked.device == "cuda" else platform.processor() or platform.machine()
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads, precision {asked.precision}")
    with tempfile.TemporaryDirectory(prefix="sana_tune-benchmark-") as place:
        loaded = settings(Path(place), asked)
        tell_steps(measure_steps(loaded, asked), asked)
        if not asked.steps_only:
            whole, own = (measure_start(Path(place), preloaded) for preloaded in (False, True))
            print(f"from the command to the first step, warm caches: {whole:.2f} s, {own:.2f} s of it not imports")
            print(f"sana_tune --help: {measure_help():.2f} s (median of {HELP_TIMES})")


if __name__ == "__main__":
    main()
