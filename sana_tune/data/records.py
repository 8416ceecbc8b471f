"""One picture before any tensor, and the keys under which what is computed from it is cached. Torch-free."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from enum import Enum

from sana_tune.data.geometry import Placement


class Role(str, Enum):
    """What a picture is for."""

    TRAIN = "train"
    REGULARISE = "regularise"
    EVAL = "eval"


@dataclass(frozen=True)
class Record:
    """One picture of one dataset, listed, measured and captioned.

    key:          its path inside the dataset, with forward slashes ("cats/01.png").
    width_px, height_px: its size after EXIF orientation.
    captions:     its caption variants, at least one; one is drawn per visit.
    content_hash: hash of the file's bytes (hex).
    placement:    how it is resized and cropped; its target is its bucket.
    """

    dataset: str
    key: str
    width_px: int
    height_px: int
    captions: tuple[str, ...]
    content_hash: str
    placement: Placement
    mask_key: str | None = None
    role: Role = Role.TRAIN

    @property
    def id(self) -> str:
        """Unique name within a run: dataset and key."""
        return f"{self.dataset}/{self.key}"


def digest(*parts: object) -> str:
    """A 128-bit hex hash of JSON-able values; the one way keys are made in this package."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.blake2b(text.encode("utf-8"), digest_size=16).hexdigest()


def content_hash(data: bytes) -> str:
    """A 128-bit hex hash of a file's bytes."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def latent_key(record: Record, encoder_identity: str) -> str:
    """Key of a picture's latent: the picture's bytes, resize and crop, and who encoded it how."""
    place = record.placement
    return digest("latent", record.content_hash, [*place.resize], [*place.crop_box], encoder_identity)


def text_key(caption: str, encoder_identity: str) -> str:
    """Key of a caption's embedding: the final text and who encoded it how (instruction, length, weights)."""
    return digest("text", caption, encoder_identity)


@dataclass(frozen=True)
class Keys:
    """The cache keys of a run: fixed once the encoders are known.

    latent_identity: who encodes pictures how (weights, dtype, tiling).
    text_identity:   who encodes captions how (weights, tokenizer, instruction, length). The empty caption
    never
                     has an instruction, so its key is simply that of "".
    """

    latent_identity: str
    text_identity: str

    def latent(self, record: Record) -> str:
        """The key of a picture's latent."""
        return latent_key(record, self.latent_identity)

    def text(self, caption: str) -> str:
        """The key of a caption's embedding."""
        return text_key(caption, self.text_identity)
