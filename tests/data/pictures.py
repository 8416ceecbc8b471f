"""Pictures for tests: small, exact, quickly made."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sana_tune.config.datasets import ImageDataset
from sana_tune.data.geometry import Box, Placement, Size
from sana_tune.data.records import Record, Role


def noise(width: int, height: int, seed: int = 0, channels: int = 3) -> np.ndarray:
    """Smooth coloured noise, uint8 [H, W, C]: no two seeds alike, and no symmetry that could hide a flip."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, channels), dtype=np.uint8)
    layers = [Image.fromarray(small[..., c]).resize((width, height), Image.Resampling.BICUBIC) for c in range(channels)]
    return np.stack([np.asarray(layer) for layer in layers], axis=-1)


def encoded(picture: np.ndarray | Image.Image, format: str = "PNG", **options: Any) -> bytes:
    """The bytes of a picture file."""
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def put(folder: Path, key: str, width: int = 40, height: int = 30, seed: int = 0, caption: str | None = None) -> Path:
    """A picture file, with its caption file when there is a caption."""
    path = folder / key
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(noise(width, height, seed)))
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def dataset(folder: Path, id: str = "cats", **settings: Any) -> ImageDataset:
    """A dataset entry as the config hands it over; 64 px by default."""
    return ImageDataset(id=id, instance_data_dir=str(folder), **{"resolution": 64, **settings})


SQUARE = Size(64, 64)


def record(key: str, target: Size = SQUARE, dataset: str = "cats", captions: tuple[str, ...] = ("a cat",)) -> Record:
    """A record without a file."""
    return Record(
        dataset=dataset,
        key=key,
        width_px=target.width,
        height_px=target.height,
        captions=captions,
        content_hash=f"hash of {key}",
        placement=Placement(target, Box(0, 0, *target)),
        role=Role.TRAIN,
    )
