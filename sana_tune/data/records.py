"""One picture before any tensor, and the keys under which what is computed from it is cached. Torch-free."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TypeVar

from sana_tune.data.geometry import CHANCE_BITS, Chance, Placement

# Raised when data.images makes other pixels of the same bytes: the latents of before are not these pictures' then.
# 2: embedded colour profiles are applied. 3: large JPEGs are decoded at half their size or less (images.prepare).
DECODING = 3


Item = TypeVar("Item")


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
    content_hash: hash of the file's bytes (hex); None when only its header was read (survey's headers_only).
    placement:    how it is resized and cropped; its target is its bucket.
    mask_key, mask_hash, mask_kind: path of its mask among the masks, hash of its bytes, "mask" or "segmentation".
    ground:       colour that its transparent parts show ("#rrggbb"); None = white, or there are no such parts.
    """

    dataset: str
    key: str
    width_px: int
    height_px: int
    captions: tuple[str, ...]
    content_hash: str | None
    placement: Placement
    mask_key: str | None = None
    role: Role = Role.TRAIN
    ground: str | None = None
    mask_hash: str | None = None
    mask_kind: str = "mask"

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


def chance_of(seed: int, dataset: str, key: str, epoch: int = 0) -> Chance:
    """What chance decides of a picture's crop: a function of the seed, the dataset and the picture's key alone.

    epoch: counts where crops are drawn anew in each (vae_cache_clear_each_epoch); in the first, 0, nothing differs.
    """
    place = ("crop", seed, dataset, key, epoch) if epoch else ("crop", seed, dataset, key)
    bits = int(digest(*place), 16)
    few = (1 << CHANCE_BITS) - 1
    return Chance(bits & few, bits >> CHANCE_BITS & few, bits >> 2 * CHANCE_BITS & few)


def sampled(items: Sequence[Item], key: Callable[[Item], str], most: int | None, seed: int, dataset: str) -> list[Item]:
    """At most so many of the items, in their order: always the same ones of a dataset by the seed. None, 0 = all.

    Each is kept or not by a hash of its own, so that pictures that are added or taken away change few of the others.
    """
    if not most or len(items) <= most:
        return list(items)
    hashes = [digest("sample", seed, dataset, key(item)) for item in items]
    chosen = set(sorted(range(len(items)), key=lambda place: hashes[place])[:most])
    return [item for place, item in enumerate(items) if place in chosen]


def latent_key(record: Record, encoder_identity: str) -> str:
    """Key of a picture's latent: the picture's bytes, how they are decoded, resize and crop, who encoded it how.

    Raises ValueError for a picture that was never hashed.
    """
    if record.content_hash is None:
        raise ValueError(f"{record.id} was never hashed: only its header was read")
    place = record.placement
    decoding = DECODING if record.ground is None else [DECODING, record.ground]
    return digest("latent", decoding, record.content_hash, [*place.resize], [*place.crop_box], encoder_identity)


def mask_key(record: Record, encoder_identity: str) -> str:
    """Key of a picture's mask on the grid of its latent: the mask's bytes, the picture's placement, how it is read.

    encoder_identity: the VAE's, whose factor makes the grid. Raises ValueError for a mask that was never hashed.
    """
    if record.mask_hash is None:
        raise ValueError(f"the mask of {record.id} was never hashed")
    place = record.placement
    return digest("mask", record.mask_hash, [*place.resize], [*place.crop_box], record.mask_kind, encoder_identity)


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

    def mask(self, record: Record) -> str:
        """The key of a picture's mask, which is kept beside its latent."""
        return mask_key(record, self.latent_identity)

    def text(self, caption: str) -> str:
        """The key of a caption's embedding."""
        return text_key(caption, self.text_identity)
