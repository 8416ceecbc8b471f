from __future__ import annotations

from sana_tune.data.sources import sort_out
from sana_tune.store import Entry


def test_parts_pictures_captions_and_others_in_order():
    names = ["z.JPG", "a.png", "a.txt", "b.webp", "notes.md", "movie.mp4", "noending", "c.heic", "B.TXT"]
    listing = sort_out(Entry(name, 1, 1) for name in names)
    assert [entry.key for entry in listing.pictures] == ["z.JPG", "a.png", "b.webp", "c.heic"]
    assert [entry.key for entry in listing.captions] == ["a.txt", "B.TXT"]
    assert [entry.key for entry in listing.others] == ["notes.md", "movie.mp4", "noending"]
