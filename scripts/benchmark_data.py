"""How fast pictures and captions become batches: the scan, the preparing, the loader, the size of the text cache.

    python scripts/benchmark.py --only scan          10,000 headers beside a bare loop of Pillow, and known ones
    python scripts/benchmark.py --only prepare       512 px of 12-megapixel JPEGs beside one thread of Pillow
    python scripts/benchmark.py --only loader        an epoch over 100,000 cached items in a process of its own
    python scripts/benchmark.py --only text-cache    embeddings of 40 tokens beside padded ones
    python scripts/benchmark.py --only data          all four

What is compared takes turns, several times, so that whatever else the machine does slows both alike; the best and the
middle of the rounds are told. Files are in the system's cache in all of them, ours or not.
"""

from __future__ import annotations

import io
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

if TYPE_CHECKING:
    import numpy as np

    from sana_tune.data.cache import TensorCache
    from sana_tune.data.records import Record

SCAN_SIZES = ((1024, 768), (768, 1024), (1024, 1024), (1280, 720), (900, 1200))
LARGE = (4000, 3000)  # px; 12 megapixels
PREPARED_PX = 512
LATENT = (32, 16, 16)  # of 512 px
CAPTION = (77, 2304)  # tokens and width of an embedding
CAPTIONS = 1000
SHORT_TOKENS, PADDED_TOKENS = 40, 300
FLOOR = 65  # pictures a second that an H100 trains at 1024 px (full-rank, batch 8)
BATCH = 8


def in_turn(
    rounds: int, *parts: Callable[[], object], clock: Callable[[], float] = time.perf_counter
) -> list[list[float]]:
    """Seconds of each part, round by round; the parts take turns. clock: of the wall, or of this process's work."""
    times: list[list[float]] = [[] for _ in parts]
    for _ in range(rounds):
        for part, found in zip(parts, times, strict=True):
            started = clock()
            part()
            found.append(clock() - started)
    return times


def seconds(times: Sequence[float]) -> str:
    """The best and the middle of some times."""
    return f"min {min(times):.2f} s, median {statistics.median(times):.2f} s"


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """How many times theirs ours takes, from pairs of one round."""
    found = sorted(one / other for one, other in zip(ours, theirs, strict=True))
    return f"{statistics.median(found):.2f} ({found[0]:.2f} to {found[-1]:.2f})"


# ---- scan ----


def tell_scan(count: int, rounds: int) -> None:
    """Looking at so many JPEGs: beside opening each with Pillow, read whole as a run does it, and known already."""
    from sana_tune.config.datasets import ImageDataset
    from sana_tune.data.memory import FileMemory
    from sana_tune.data.survey import survey

    with tempfile.TemporaryDirectory(prefix="sana_tune-benchmark-") as place:
        folder = Path(place, "pictures")
        write_jpegs(folder, count)
        dataset = ImageDataset(id="many", instance_data_dir=str(folder), resolution=512)
        known = Path(place, "files.jsonl")

        def scan(memory: FileMemory, headers_only: bool = True) -> None:
            found = survey([dataset], alignment=32, rounding=2, prompt_case="lower", memory=memory,
                           headers_only=headers_only)  # fmt: skip
            if len(found.records) != count or found.problems:
                raise SystemExit(f"the scan found {len(found.records)} of {count} pictures: {found.problems}")

        scan(FileMemory(known))
        parts = (lambda: open_each(folder), lambda: scan(FileMemory()))
        bare, cold = in_turn(rounds, *parts)
        bare_cpu, cold_cpu = in_turn(rounds, *parts, clock=time.process_time)
        (warm,) = in_turn(rounds, lambda: scan(FileMemory(known)))
        (whole,) = in_turn(rounds, lambda: scan(FileMemory(), headers_only=False))
    print(f"scan of {count:,} JPEGs, {rounds} rounds (bars: 1.5 times Pillow; known ones below 1 s)")
    print(f"  opened by Pillow in a bare loop: {seconds(bare)}")
    print(f"  sana_tune, headers:              {seconds(cold)}; {ratios(cold, bare)} times the bare loop, "
          f"{ratios(cold_cpu, bare_cpu)} times its processor time")  # fmt: skip
    print(f"  sana_tune, read whole and hashed: {seconds(whole)}")
    print(f"  sana_tune, all known:            {seconds(warm)}")


def open_each(folder: Path) -> list[tuple[int, int]]:
    """The bare loop: the size of every picture."""
    from PIL import Image

    sizes = []
    for path in sorted(folder.iterdir()):
        with Image.open(path) as image:
            sizes.append(image.size)
    return sizes


def write_jpegs(folder: Path, count: int) -> None:
    """So many JPEGs of about a megapixel, no two of the same bytes."""
    folder.mkdir()
    kinds = [jpeg(size, seed, quality=85) for seed, size in enumerate(SCAN_SIZES)]
    for number in range(count):  # what follows the end of a JPEG does not matter to it
        (folder / f"{number:06}.jpg").write_bytes(kinds[number % len(kinds)] + str(number).encode())


def jpeg(size: tuple[int, int], seed: int, quality: int) -> bytes:
    """A picture with detail and some noise, as a JPEG."""
    import numpy as np
    from PIL import Image

    chosen, (width, height) = np.random.default_rng(seed), size
    small = chosen.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    picture = np.asarray(Image.fromarray(small).resize(size, Image.Resampling.BICUBIC), np.int16)
    noisy = (picture + chosen.integers(-6, 7, picture.shape, dtype=np.int16)).clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(noisy).save(file, "JPEG", quality=quality)
    return file.getvalue()


# ---- prepare ----


def tell_prepare(count: int, rounds: int, size: tuple[int, int] = LARGE) -> None:
    """Preparing pictures: as a run fills its cache, beside one thread of plain Pillow, and one of the same work."""

    from sana_tune.config.datasets import ImageDataset
    from sana_tune.data.images import prepare
    from sana_tune.data.memory import FileMemory
    from sana_tune.data.survey import survey

    with tempfile.TemporaryDirectory(prefix="sana_tune-benchmark-") as place:
        folder = Path(place, "pictures")
        folder.mkdir()
        kinds = [jpeg(size, seed, quality=90) for seed in range(4)]
        for number in range(count):
            (folder / f"{number:06}.jpg").write_bytes(kinds[number % len(kinds)] + str(number).encode())
        dataset = ImageDataset(id="large", instance_data_dir=str(folder), resolution=PREPARED_PX)
        records = survey([dataset], alignment=32, rounding=2, prompt_case="lower", memory=FileMemory()).records
        filled: list[np.ndarray] = []

        def one_thread() -> None:
            for record in records:
                prepare((folder / record.key).read_bytes(), record.placement)

        def as_a_run() -> None:
            filled[:] = fill(folder, records, Path(place, f"cache-{time.monotonic_ns()}"))

        fill(folder, records[:1], Path(place, "cache"))  # imports are not what is timed
        plain, single, ours = in_turn(
            rounds, lambda: [plainly(folder / each.key, each) for each in records], one_thread, as_a_run
        )
    megapixels = size[0] * size[1] / 1e6
    print(f"preparing {PREPARED_PX} px of {count} JPEGs of {megapixels:.0f} megapixels, {rounds} rounds, "
          f"{os.cpu_count()} cores (bar: 1.7 times one thread of Pillow)")  # fmt: skip
    print(f"  one thread of plain Pillow:      {seconds(plain)}; {count / min(plain):.1f} pictures/s")
    print(f"  one thread of sana_tune:         {seconds(single)}; {ratios(plain, single)} times as fast")
    print(f"  sana_tune as it fills a cache:   {seconds(ours)}; {ratios(plain, ours)} times as fast, "
          f"{ratios(single, ours)} times its one thread; {count / min(ours):.1f} pictures/s")  # fmt: skip


def plainly(path: Path, record: Record) -> np.ndarray:
    """The shortest right way with Pillow: decode, turn upright, resize once, crop."""
    import numpy as np
    from PIL import Image, ImageOps

    with Image.open(path) as image:
        upright = ImageOps.exif_transpose(image).convert("RGB")
    resized = upright.resize(record.placement.resize, Image.Resampling.LANCZOS)
    return np.asarray(resized.crop(record.placement.crop_box))


def fill(folder: Path, records: Sequence[Record], cache: Path) -> list[np.ndarray]:
    """Fill a cache as a run does, with an encoder that costs nothing. The first picture of every batch."""
    import torch

    from sana_tune.data.cache import TensorCache
    from sana_tune.data.filling import fill_latents
    from sana_tune.data.records import Keys

    seen: list[np.ndarray] = []

    def encode(pictures: np.ndarray) -> list[torch.Tensor | None]:
        seen.append(pictures[0])
        return [torch.zeros(1) for _ in pictures]

    read: Callable[[Record], bytes] = lambda record: (folder / record.key).read_bytes()  # noqa: E731
    broken = fill_latents(records, TensorCache(cache), Keys("none", "none"), read, encode, 4, lambda done, total: None)
    if broken:
        raise SystemExit(f"pictures that should be sound are not: {broken}")
    return seen


# ---- loader ----


def tell_loader(items: int, captions: int = CAPTIONS, steps: int | None = None) -> None:
    """An epoch over so many cached items, in a process of its own. steps: fewer than the epoch has."""
    with tempfile.TemporaryDirectory(prefix="sana_tune-benchmark-") as place:
        write_caches(Path(place), items, captions)
        command = [sys.executable, __file__, place, *map(str, (items, captions, steps or -(-items // BATCH)))]
        ran = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    found = Loading(**json.loads(ran.stdout))
    print(f"loader over {items:,} items, latents {'x'.join(map(str, LATENT))}, {captions:,} captions of {CAPTION[0]} "
          f"tokens, batch {BATCH} (bars: 2 s, 600 MB, {5 * FLOOR} pictures/s)")  # fmt: skip
    print(f"  caches opened, all keys looked up: {found.opened_s:.2f} s; first batch after {found.first_s:.2f} s")
    print(f"  {found.pictures:,} pictures in {found.all_s:.1f} s: {found.rate:,.0f} pictures/s, "
          f"{found.rate / FLOOR:.1f} times what an H100 takes at 1024 px")  # fmt: skip
    print(f"  anonymous memory: {found.most_mb:.0f} MB at most, {found.before_mb:.0f} MB of them before (imports)")


@dataclass(frozen=True)
class Loading:
    """opened_s: until both caches are open and known to hold everything. first_s: until the first batch, from the
    beginning. all_s: until the last of `pictures`, from the first batch on. before_mb, most_mb: anonymous memory."""

    opened_s: float
    first_s: float
    all_s: float
    pictures: int
    before_mb: float
    most_mb: float

    @property
    def rate(self) -> float:
        """Pictures a second, once the first batch is there."""
        return self.pictures / self.all_s


def write_caches(folder: Path, items: int, captions: int) -> None:
    """Caches of a run over so many pictures: latents of noise, and captions' embeddings."""
    import torch

    from sana_tune.data.cache import TensorCache

    base = torch.randn(LATENT)
    keys = cache_keys()
    with TensorCache(folder / "latents").writer() as writer:
        for number, record in enumerate(synthetic(items, captions)):
            base[0, 0, 0] = number  # no two of them alike
            writer.add(keys.latent(record), base.clone())
    with TensorCache(folder / "text").writer() as writer:
        for caption in ["", *(f"caption {number}" for number in range(captions))]:
            tokens = CAPTION[0] if caption else 2
            writer.add(keys.text(caption), torch.randn(tokens, CAPTION[1]).to(torch.bfloat16))


def cache_keys():
    """The keys of the synthetic caches."""
    from sana_tune.data.records import Keys

    return Keys("vae", "text")


def synthetic(items: int, captions: int) -> Iterator[Record]:
    """Records without files, as a survey of pictures of one size would give them."""
    from sana_tune.data.geometry import Box, Placement, Size
    from sana_tune.data.records import Record

    side = 32 * LATENT[1]
    placement = Placement(Size(side, side), Box(0, 0, side, side))
    for number in range(items):
        yield Record("many", f"folder/{number:06}.jpg", side, side, (f"caption {number % captions}",),
                     f"{number:032x}", placement)  # fmt: skip


def load_epoch(folder: Path, items: int, captions: int, steps: int) -> Loading:
    """Open the caches, begin an epoch, and take its batches as the loop does; in a process that did nothing else."""
    from sana_tune.config.datasets import ImageDataset
    from sana_tune.data.buckets import make_buckets
    from sana_tune.data.cache import TensorCache
    from sana_tune.data.loader import Batches
    from sana_tune.data.order import Order

    before = anonymous_mb()
    records = list(synthetic(items, captions))
    with watched_memory() as most:
        began = time.perf_counter()
        latents, text = TensorCache(folder / "latents"), TensorCache(folder / "text")
        keys = cache_keys()
        texts = {caption for record in records for caption in record.captions}
        missing = latents.missing(map(keys.latent, records)) + text.missing(map(keys.text, texts))
        if missing:
            raise SystemExit(f"{len(missing)} items are not in the caches")
        opened = time.perf_counter()
        dataset = ImageDataset(id="many", instance_data_dir="folder", resolution=512, train_batch_size=BATCH)
        order = Order(make_buckets(records, [dataset]), {"many": 1.0}, "auto-weighting", seed=1)
        batches = Batches(order, records, latents, text, keys, seed=1, caption_dropout=0.1)
        taken, first = 0, 0.0
        for step in batches.steps(0, steps):
            first = first or time.perf_counter()
            taken += sum(len(batch.ids) for _, batch in step)
        ended = time.perf_counter()
    after_first = max(1, taken - BATCH)
    return Loading(opened - began, first - began, max(ended - first, 1e-9), after_first, before, most[0])


class watched_memory:
    """A context in which the largest anonymous memory of this process is noted, MB, in a list of one."""

    def __enter__(self) -> list[float]:
        self._most = [anonymous_mb()]
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self._most

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self._most[0] = max(self._most[0], anonymous_mb())

    def _watch(self) -> None:
        while not self._ended.wait(0.05):
            self._most[0] = max(self._most[0], anonymous_mb())


def anonymous_mb() -> float:
    """Anonymous memory of this process, MB: what is neither a file's nor shared. Elsewhere than on Linux: all of it."""
    status = Path("/proc/self/status")
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text(encoding="ascii").splitlines())
        return int(lines["RssAnon"].split()[0]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)


# ---- text cache ----


def tell_text_cache(count: int) -> None:
    """Disk of so many embeddings of 40 tokens, of the width of Gemma-2 2B, and of nano's encoder from real captions."""
    import torch

    from sana_tune.data.cache import TensorCache

    with tempfile.TemporaryDirectory(prefix="sana_tune-benchmark-") as place:
        with (gemma := TensorCache(Path(place, "gemma"))).writer() as writer:
            for number in range(count):
                embedding = torch.randn(SHORT_TOKENS, CAPTION[1]).to(torch.bfloat16)
                writer.add(cache_keys().text(f"caption {number}"), embedding)
        nano, real_tokens, width_bytes = encoded_by_nano(Path(place, "nano"), count)
        shares = on_disk(gemma), on_disk(nano)
    padded = count * PADDED_TOKENS * CAPTION[1] * 2
    print(f"text cache of {count:,} captions (bar: 15 % of {PADDED_TOKENS} tokens)")
    print(f"  {SHORT_TOKENS} tokens of {CAPTION[1]} bf16 numbers: {shares[0] / count / 1000:.1f} kB each, "
          f"{100 * shares[0] / padded:.1f} % of the padded size")  # fmt: skip
    print(f"  captions of {real_tokens:.0f} tokens by nano's encoder: {shares[1] / count / 1000:.1f} kB each, "
          f"{100 * shares[1] / (count * PADDED_TOKENS * width_bytes):.1f} %")  # fmt: skip


def on_disk(cache: TensorCache) -> int:
    """Bytes of the files of a cache."""
    return sum(path.stat().st_size for path in cache.folder.iterdir())


def encoded_by_nano(folder: Path, count: int) -> tuple[TensorCache, float, int]:
    """Captions of 40 tokens, encoded and cached as a run does it; tokens that were kept of one, bytes of a token."""
    import torch

    from sana_tune.data.cache import TensorCache
    from sana_tune.data.filling import fill_text
    from sana_tune.model.fetch import locate
    from sana_tune.model.sana import load_text_encoder

    encoder = load_text_encoder(locate("nano"), torch.device("cpu"))
    words = [f"{number} a red cat beside the window on a table" for number in range(count)]
    captions = {f"{number:032x}": of_tokens(encoder.count_tokens, text) for number, text in enumerate(words)}
    cache = TensorCache(folder)
    fill_text(cache, captions, encoder.encode, 32, lambda done, total: None)
    kept = [cache.get(key) for key in captions]
    tokens = sum(len(each) for each in kept) / count
    return cache, tokens, kept[0].shape[1] * kept[0].element_size()


def of_tokens(count: Callable[[str], int], text: str) -> str:
    """The text lengthened to 40 tokens, or a few more where a word has several."""
    while count(text) < SHORT_TOKENS:
        text += " cat"
    return text


if __name__ == "__main__":  # the process that tell_loader starts
    print(json.dumps(vars(load_epoch(Path(sys.argv[1]), *map(int, sys.argv[2:])))))
