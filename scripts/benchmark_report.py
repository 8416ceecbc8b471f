"""What watching costs: the report of a long run, and the share of the step time that events, metrics and report take.

run_folder() makes up the folder of a run of any length; the tests and the picture in docs/report.md use it too.
"""

from __future__ import annotations

import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sana_tune.data.images import shrunk
from sana_tune.progress import Progress
from sana_tune.watch.environment import environment
from sana_tune.watch.events import Event, Finished, Measured, Noticed, Previewed, Saved, Started, Stepped, Validated
from sana_tune.watch.journal import EventsSink
from sana_tune.watch.metrics import Metrics
from sana_tune.watch.report.page import Reporter
from sana_tune.watch.report.sink import EVERY_S, SHARE, ReportSink
from sana_tune.watch.sinks import MetricsSink, Watcher

PROMPTS = {"fox": "a red fox in the snow", "harbour": "a harbour at night, oil painting", "tea": "two cups of tea"}
LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)
ROUNDS = 5


def steps_of(count: int, seed: int = 0, rate: float = 1e-5, batch: int = 4) -> list[Stepped]:
    """Steps such as a run tells: a loss that falls, spread by its noise levels."""
    random = np.random.default_rng(seed)
    found = []
    for step in range(1, count + 1):
        sigmas = 1 / (1 + np.exp(-random.normal(size=batch)))
        far = math.exp(-3 * step / count)
        losses = (0.35 + 0.9 * (sigmas - 0.55) ** 2) * (0.75 + 0.35 * far) * random.lognormal(0, 0.18, batch)
        pairs = tuple((float(sigma), float(loss)) for sigma, loss in zip(sigmas, losses, strict=True))
        took = 0.42 * float(random.lognormal(0, 0.05)) + (0.6 if step % 997 == 0 else 0)
        warm = min(1.0, step / (0.05 * count))
        found.append(
            Stepped(
                Progress(step, step / 500, batch * step),
                float(losses.mean()),
                rate * warm * 0.5 * (1 + math.cos(math.pi * step / count)),
                float((0.12 + 0.3 * far) * random.lognormal(0, 0.4)),
                took,
                0.01 * float(random.lognormal(0, 1)) * took,
                batch,
                memory_bytes=int(31.4e9 + 2.1e9 * min(1, step / 40)),
                by_sigma=pairs,
            )
        )
    return found


def drawing(slug: str, amount: float, side_px: int, seed: int) -> np.ndarray:
    """A picture that grows out of noise as `amount` goes from 0 to 1."""
    y, x = np.mgrid[0:side_px, 0:side_px] / side_px
    phase = sum(map(ord, slug)) % 7
    hills = np.stack([np.sin(5 * x + phase + c) * np.cos(4 * y + c * phase) for c in range(3)], -1) / 2 + 0.5
    disc = ((x - 0.5) ** 2 + (y - 0.45) ** 2 < 0.05 * (1 + amount))[..., None]
    shown = np.where(disc, np.array([0.9, 0.45, 0.2]) * (0.6 + 0.4 * y[..., None]), hills)
    noise = np.random.default_rng(seed).random((side_px, side_px, 3))
    mixed = amount * shown + (1 - amount) * noise
    return (255 * mixed).astype(np.uint8)


def run_folder(
    folder: Path, steps: int = 10_000, *, seed: int = 0, validations: int = 20, side_px: int = 512, ends: bool = True,
    changes: dict[str, Any] | None = None,
) -> Path:  # fmt: skip
    """The folder of a made-up run with everything that a report shows. changes: of its settings."""
    rate = float((changes or {}).get("learning_rate", 1e-5))
    told = steps_of(steps, seed, rate)
    metrics = Metrics(folder / "metrics.jsonl")
    for event in told:
        metrics.append(event)
    metrics.close()
    every = max(1, steps // validations)
    at = [0, *range(every, steps + 1, every)]
    clock = iter(range(10**9))
    sink = EventsSink(folder, lambda: time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(1.8e9 + 600 * next(clock))))
    for event in events_of(folder, steps, at, side_px, seed, ends=ends):
        sink.emit(event)
    sink.close()
    write_files(folder, steps, side_px, changes or {})
    return folder


def events_of(folder: Path, steps: int, at: Sequence[int], side_px: int, seed: int, *, ends: bool) -> Sequence[Event]:
    """What happened, with the pictures drawn."""
    from sana_tune.data.images import encode_png

    where = {step: Progress(step, step / 500, 4 * step) for step in (*at, steps)}
    found: list[Event] = [Started(where[0], steps, 500.0)]
    pictures = folder / "validation_images"
    pictures.mkdir(parents=True, exist_ok=True)
    for step in at:
        files, far = [], step / steps
        for slug in PROMPTS:
            for suffix, shift in (("", 0.0), ("_ema", 0.08)) if step else (("", 0.0),):
                path = pictures / f"step_{step}_{slug}_0_{side_px}x{side_px}{suffix}.png"
                path.write_bytes(encode_png(drawing(slug, min(1.0, 0.35 + 0.6 * far + shift), side_px, seed)))
                files.append(str(path))
        found.append(Validated(where[step], tuple(files), (), 41.5))
        fall = 1 - 0.22 * (1 - math.exp(-3 * far)) + 0.06 * far**3
        values = {"held_out/raw": fall, "held_out/raw/se": 0.012, "held_out/raw/loss": 0.44 * fall}
        values |= {f"held_out/raw/sigma_{level:g}": fall + 0.05 * (level - 0.5) for level in LEVELS}
        if step:
            values |= {"held_out/ema": fall - 0.02, "held_out/ema/se": 0.011, "gap/raw": 0.08 * far**2}
            values |= {f"held_out/ema/sigma_{level:g}": fall - 0.03 + 0.05 * (level - 0.5) for level in LEVELS}
            found.append(Measured(where[step], {"clip/raw": 27 + 4 * far, "clip/ema": 27.4 + 4.1 * far}))
            found.append(Saved(where[step], str(folder / f"checkpoint-{step}"), 8.2))
        advice = ("overfitting: trained pictures gained more than held-out ones: stop earlier",) if far > 0.9 else ()
        found.append(Measured(where[step], values | {"drift": 0.15 * far}, advice))
    for sampled in (5, 10, 15, 20):
        picture = encode_png(drawing("fox", sampled / 20, min(side_px, 256), seed))
        found.append(Previewed(where[at[-1]], "fox", sampled, 20, picture))
    found.append(Noticed(where[at[-1]], "1 validation picture could not be drawn: tea (out of memory)"))
    return [*found, Finished(where[steps], str(folder / "pipeline"))] if ends else found


def write_files(folder: Path, steps: int, side_px: int, changes: dict[str, Any]) -> None:
    """The JSON files of the folder, and the pictures of its first batches."""
    from sana_tune.data.images import encode_png

    settings = {
        "pretrained_model_name_or_path": "Efficient-Large-Model/Sana_1600M_1024px_diffusers", "model_type": "full",
        "learning_rate": 1e-5, "train_batch_size": 4, "max_train_steps": steps, "optimizer": "optimi-adamw",
        "lr_scheduler": "cosine", "lr_warmup_steps": steps // 20, "use_ema": True, "ema_decay": 0.995, "seed": 42,
        **changes,
    }  # fmt: skip
    origins = {name: f"/home/someone/config.json: {name}" for name in settings} | {"ema_decay": "default"}
    sizes = ((1024, 1024, 212), (832, 1216, 96), (1216, 832, 81), (768, 1344, 11))
    buckets = [
        {"dataset": "photos", "width_px": w, "height_px": h, "pictures": n, "repeats": 0, "batch_size": 4,
         "micro_batches": -(-n // 4), "filled": -n % 4, "flow_shift": 3.0, "role": "train"} for w, h, n in sizes
    ]  # fmt: skip
    left_out = [[f"photos/{n:04}.jpg", "is smaller than minimum_image_size" if n % 3 else "is damaged"]
                for n in range(23)]  # fmt: skip
    ledger = {"dataset": "photos", "found": 423, "trained": 400, "left_out": left_out, "role": "train", "not_drawn": 0}
    files: dict[str, Any] = {
        "config.json": {**settings, "__origins__": origins},
        "plan.json": {"model": "sana-1.6b-1024", "total_steps": steps, "buckets": buckets},
        "ledger.json": {"datasets": [ledger]},
        "environment.json": environment(None, "bf16"),
        "prompts.json": {slug: {"name": slug, "prompt": text} for slug, text in PROMPTS.items()},
    }
    first = folder / "first_batches"
    first.mkdir(exist_ok=True)
    shown = []
    for number, text in enumerate((*PROMPTS.values(), "", "a lighthouse")):
        (first / f"{number:02}.png").write_bytes(encode_png(drawing(text or "x", 0.97, side_px, number)))
        shown.append({"file": f"{number:02}.png", "id": f"photos/{number:04}.jpg", "caption": text,
                      "width": side_px, "height": side_px})  # fmt: skip
    files["first_batches/index.json"] = {"pictures": shown}
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


# ---- what is told ----


def tell_report(steps: int, rounds: int = ROUNDS) -> None:
    """How long the report of a run of so many steps takes to write and to show first, and how large it is."""
    from scripts import browser

    with tempfile.TemporaryDirectory(prefix="sana_tune-benchmark-") as place:
        folder = run_folder(Path(place), steps)
        reporter, path = Reporter([folder], shrunk), folder / "report.html"
        first_s = timed(lambda: reporter.write(path))
        again_s = statistics.median(timed(lambda: reporter.write(path)) for _ in range(rounds))
        size = path.stat().st_size / 1e6
        print(f"report of {steps:,} steps: {size:.1f} MB; written in {first_s:.2f} s, then in {again_s:.2f} s")
        program = browser.find()
        if program is None:
            print("first paint: not measured, there is no Chromium here (CHROMIUM names one)")
            return
        with browser.Browser(program) as page:
            page.open(path)  # the first one pays for the browser's own start
            times = []
            for _ in range(rounds):
                page.open(path)
                times.append(page.first_paint_ms())
            found = page.evaluate("document.querySelectorAll('.plot .curve').length")
    print(f"first paint: {statistics.median(times):.0f} ms (fastest {min(times):.0f} ms of {rounds}), {found} curves")


def tell_sinks(steps: int, rounds: int = ROUNDS) -> None:
    """The share of the step time that events, metrics and report take, beside steps of nano on this machine."""
    step_s = nano_step_s(steps=6 * rounds)
    with tempfile.TemporaryDirectory(prefix="sana_tune-benchmark-") as place:
        own_s = min(emitted_s(Path(place) / str(number), steps) for number in range(rounds)) / steps
        folder = run_folder(Path(place) / "run", steps)
        reporter = Reporter([folder], shrunk)
        reporter.write(folder / "report.html", live=True)
        write_s = statistics.median(timed(lambda: reporter.write(folder / "report.html", live=True)) for _ in range(3))
    thread = write_s / max(EVERY_S, write_s / SHARE)
    print(f"each step: {1e6 * own_s:.0f} us for memory, metrics.jsonl, events.jsonl and report (steps {steps:,})")
    print(f"report.html: {write_s:.2f} s on its own thread at {steps:,} steps, {thread:.2%} of the time at most")
    print(f"of a nano step of {1000 * step_s:.1f} ms: {own_s / step_s + thread:.2%} in all")
    print(f"of a step of 400 ms: {own_s / 0.4 + thread:.2%} in all")


def timed(work: Callable[[], object]) -> float:
    """Seconds that it takes."""
    begun_s = time.perf_counter()
    work()
    return time.perf_counter() - begun_s


def emitted_s(folder: Path, count: int) -> float:
    """Seconds that the sinks take for so many steps, the report's own thread not counted."""
    import torch

    from sana_tune.train.device import MemoryMeter

    class Nobody:
        def write(self, path: Path, *, live: bool = False) -> None:
            pass

    told, meter = steps_of(count), MemoryMeter(torch.device("cpu"))
    sinks = [MetricsSink(folder / "metrics.jsonl"), EventsSink(folder), ReportSink(Nobody(), folder / "report.html")]
    with Watcher(sinks) as watcher:
        watcher.emit(Started(Progress(), count, 500.0))
        begun_s = time.perf_counter()
        for event in told:
            meter.most_bytes()
            watcher.emit(event)
        return time.perf_counter() - begun_s


def nano_step_s(batch: int = 8, steps: int = 30) -> float:
    """The fastest of some steps of nano, as it is trained."""
    import torch
    from diffusers import SanaTransformer2DModel

    from sana_tune.model import fetch

    model: Any = SanaTransformer2DModel.from_pretrained(fetch.locate("nano"), subfolder="transformer")
    weights = list(model.parameters())
    optimizer = torch.optim.AdamW(weights, 1e-5)
    channels, width = model.config.in_channels, model.config.caption_channels
    x, text = torch.randn(batch, channels, 8, 8), torch.randn(batch, 16, width)

    def step() -> None:
        out = model(x, text, torch.full((batch,), 500.0), return_dict=False)[0]
        out.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return min(timed(step) for _ in range(steps))
