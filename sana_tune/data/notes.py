"""What cached items were made of, in a line that is kept beside each: for people who ask why one is missing. No torch.

Nothing is decided by it: an item is found by its key.
"""

from __future__ import annotations

from dataclasses import dataclass

from sana_tune.data.records import Keys, Record, digest

_SEPARATOR = "\t"
_PARTS = 7
_NONE = "-"


@dataclass(frozen=True)
class LatentNote:
    """What a latent was made of. key: of its picture; resize: "43x32"; crop_box: "0,5,32,37"; ground: "" = none."""

    key: str
    content_hash: str
    resize: str
    crop_box: str
    encoder: str
    ground: str


def latent_note(record: Record, keys: Keys) -> str:
    """The line of a picture's latent."""
    place = record.placement
    box = ",".join(map(str, place.crop_box))
    parts = (record.key, record.content_hash, place.resize, box, keys.latent_identity, record.ground or _NONE)
    return _SEPARATOR.join(("latent", *map(str, parts)))


def mask_note(record: Record, keys: Keys) -> str:
    """The line of a picture's mask: as of its latent, with the mask's own key and bytes."""
    place = record.placement
    box = ",".join(map(str, place.crop_box))
    parts = (record.mask_key, record.mask_hash, place.resize, box, keys.latent_identity, record.mask_kind)
    return _SEPARATOR.join(("mask", *map(str, parts)))


def text_note(caption: str, encoder: str) -> str:
    """The line of an embedding; of the caption its hash alone. encoder: its identity."""
    return _SEPARATOR.join(("text", digest(caption), encoder))


def read_latent_note(note: str) -> LatentNote | None:
    """What the line of a latent says; None for any other line."""
    kind, *parts = note.split(_SEPARATOR)
    if kind != "latent" or len(parts) < _PARTS - 1:
        return None
    *key, content_hash, resize, box, encoder, ground = parts  # a key may hold the separator
    return LatentNote(_SEPARATOR.join(key), content_hash, resize, box, encoder, "" if ground == _NONE else ground)


def is_of_caption(note: str, caption: str) -> bool:
    """Whether a line is that of an embedding of this caption, whoever made it."""
    return note.split(_SEPARATOR)[:2] == ["text", digest(caption)]


def in_words(note: str, key: str) -> str:
    """An item for people: its picture, else its key."""
    kind, *parts = note.split(_SEPARATOR)
    if kind == "mask" and len(parts) >= _PARTS - 1:
        return f"the mask {_SEPARATOR.join(parts[: 2 - _PARTS])}"
    latent = read_latent_note(note)
    return key if latent is None else latent.key
