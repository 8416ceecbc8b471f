"""What exists in a store: which files are pictures, and which are not. By ending alone; nothing is read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from posixpath import splitext

from sana_tune.store import Entry

# Endings of pictures. One that the installed Pillow cannot open is left out by the survey, with its reason,
# which is better than not being seen at all.
PICTURE_ENDINGS = frozenset(
    {
        *(".apng", ".avif", ".bmp", ".gif", ".heic", ".heif", ".hif", ".j2c", ".j2k", ".jfif", ".jp2", ".jpc"),
        *(".jpe", ".jpeg", ".jpf", ".jpg", ".jpx", ".jxl", ".mpo", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".psd"),
        *(".qoi", ".tga", ".tif", ".tiff", ".webp"),
    }
)
CAPTION_ENDING = ".txt"


@dataclass(frozen=True)
class Listing:
    """The files of one store, sorted by key."""

    pictures: tuple[Entry, ...]
    captions: tuple[Entry, ...]
    others: tuple[Entry, ...]


def sort_out(entries: Iterable[Entry]) -> Listing:
    """Part the files of a store into pictures, caption files and the rest; order is kept."""
    pictures, captions, others = [], [], []
    for entry in entries:
        ending = splitext(entry.key)[1].lower()
        if ending in PICTURE_ENDINGS:
            pictures.append(entry)
        elif ending == CAPTION_ENDING:
            captions.append(entry)
        else:
            others.append(entry)
    return Listing(tuple(pictures), tuple(captions), tuple(others))
