"""What a run writes down for its report, and who writes it: versions, prompts, the first batches, events.jsonl.

The report itself (watch.report) reads these files, so it can be made again at any time.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sana_tune.caching import Caches, encode_finite, reading_of, vae_of
from sana_tune.data.records import Record
from sana_tune.errors import UserError
from sana_tune.log import log
from sana_tune.prepare import Prepared
from sana_tune.prompts import slugs
from sana_tune.store import write_atomically
from sana_tune.watch import journal
from sana_tune.watch.environment import environment
from sana_tune.watch.report.page import FILE, Reporter
from sana_tune.watch.report.reading import ENVIRONMENT, FIRST_BATCHES, PROMPTS
from sana_tune.watch.report.sink import ReportSink
from sana_tune.watch.sinks import Sink

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

    from sana_tune.data.loader import Batches
    from sana_tune.model.sana import ImageCoder

FIRST_PICTURES = 8
_DIMMED = 0.2  # of its brightness is left of what a mask takes out


def keepers(prepared: Prepared) -> list[Sink]:
    """Who writes events.jsonl and report.html. After metrics.jsonl's sink: the report is made of what they wrote."""
    output = prepared.output
    found: list[Sink] = [journal.EventsSink(output.root)]
    if prepared.config.train.report:
        from sana_tune.data.images import shrunk

        found.append(ReportSink(Reporter([output.root], shrunk), output.root / FILE))
    return found


def write_down_surroundings(prepared: Prepared, precision: str, processes: int = 1) -> None:
    """Write environment.json and prompts.json. precision: that of the computing, by so many processes."""
    output = prepared.output
    output.write_json(ENVIRONMENT, environment(prepared.device, precision, processes))
    names = slugs(list(prepared.prompts))
    told = {names[name]: {"name": name, "prompt": prompt} for name, prompt in prepared.prompts.items()}
    output.write_json(PROMPTS, told)


def show_first_batches(prepared: Prepared, caches: Caches, batches: Batches, device: torch.device) -> None:
    """Write the first pictures that will be trained, decoded from their latents, to first_batches/.

    Of a run that goes on they are there already. They are a help for the eye: where the VAE has no room or fails, that
    is said and the run goes on.
    """
    if not prepared.config.train.report or prepared.plan.first_step or not prepared.plan.steps_left:
        return
    folder = prepared.output.root / FIRST_BATCHES
    shutil.rmtree(folder, ignore_errors=True)
    try:
        coder = vae_of(prepared, device)
        try:
            shown = [
                _shown(folder, number, coder, _latent(prepared, caches, coder, record), (record, caption, mask))
                for number, (record, caption, mask) in enumerate(
                    batches.first(FIRST_PICTURES, prepared.plan.total_steps)
                )
            ]
        finally:
            coder.free()
    except (RuntimeError, UserError) as error:  # out of memory is a RuntimeError
        log.warning("the report will not show the first training pictures: %s", str(error).partition("\n")[0])
        return
    prepared.output.write_json(f"{FIRST_BATCHES}/index.json", {"pictures": shown})


def _latent(prepared: Prepared, caches: Caches, coder: ImageCoder, record: Record) -> Tensor:
    """A picture's latent [C, h, w]: from the cache, or made now where that is filled on demand or not at all."""
    from sana_tune.data.cache import LostItem
    from sana_tune.data.filling import Halving, one_latent

    cache, key = caches.latents[record.dataset], prepared.keys.latent(record)
    if not cache.missing([key]):
        try:
            return cache.get(key)
        except LostItem:  # training finds it damaged, too, and makes it again
            pass
    return one_latent(
        record, reading_of(prepared), Halving(lambda pictures: encode_finite(coder, pictures), "pictures")
    )


def _shown(
    folder: Path, number: int, coder: ImageCoder, latent: Tensor, sample: tuple[Record, str, Tensor | None]
) -> Mapping[str, Any]:
    """Write one picture, with a mask also what it leaves. Answers its entry in index.json."""
    from sana_tune.data.images import encode_png

    record, caption, mask = sample
    pixels = coder.decode(latent[None])[0]
    name = f"{number:02}.png"
    write_atomically(folder / name, encode_png(pixels))
    entry = {"file": name, "id": record.id, "caption": caption, "role": record.role.value,
             "width": pixels.shape[1], "height": pixels.shape[0]}  # fmt: skip
    if mask is None:
        return entry
    masked = f"{number:02}_masked.png"
    write_atomically(folder / masked, encode_png(dimmed(pixels, mask[0].numpy())))
    return {**entry, "masked": masked}


def dimmed(pixels: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """A picture [H, W, 3] with what its mask [h, w] leaves out darkened. H and W are multiples of h and w."""
    import numpy as np

    large = mask.repeat(pixels.shape[0] // mask.shape[0], 0).repeat(pixels.shape[1] // mask.shape[1], 1)
    share = _DIMMED + (1 - _DIMMED) * large[..., None]
    return (pixels * share).round().astype(np.uint8)
