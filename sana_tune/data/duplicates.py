"""Pictures read whole, for a check: which are torn, which are the same file twice, which only look the same. No torch.

Looks are a perceptual hash of 64 bits: the signs of the low frequencies of a small grey copy (Zauner 2010, pHash).
Copies that were resized, saved again or slightly retouched differ in a few bits; other pictures in about 32.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

from sana_tune.data.memory import FileMemory
from sana_tune.data.records import content_hash
from sana_tune.errors import UserError
from sana_tune.store import Store, StoreLost

if TYPE_CHECKING:
    import numpy as np

Report = Callable[[int, int], None]
Item = TypeVar("Item")

ALIKE_BITS = 6  # of 64: hashes that differ in no more than this many belong to pictures that look the same
_SIDE, _LOW = 32, 8  # px of the grey copy; frequencies of each direction that count
_FAINT = 0.02  # of the strongest frequency
_BANDS = 4  # of 16 bits. Hashes that differ in 7 bits or fewer differ in one bit or none in some band
_BAND_BITS = 64 // _BANDS
_PAIRS_AT_ONCE = 1 << 22
_CHUNK = 64
_WORKERS = min(8, os.cpu_count() or 1)
_WHOLE = frozenset({"hash", "looks"})


@dataclass(frozen=True)
class Picture:
    """One file among the pictures to look at. name: in the user's words (dataset/key)."""

    name: str
    store: Store
    key: str

    @property
    def path(self) -> str:
        return self.store.locate(self.key)


@dataclass(frozen=True)
class Looked:
    """What a look at whole pictures found; pictures by name.

    pictures: how many files. broken: name → why it cannot be decoded. same: groups of files of the same bytes.
    alike: groups of other files that look the same.
    """

    pictures: int = 0
    broken: Mapping[str, str] = field(default_factory=dict)
    same: tuple[tuple[str, ...], ...] = ()
    alike: tuple[tuple[str, ...], ...] = ()


def look_at_all(pictures: Sequence[Picture], memory: FileMemory, report: Report | None = None) -> Looked:
    """Decode every picture that is not remembered, each file once; report(done, total) as it goes.

    What is found is remembered, with the hash that the caches need; the memory is saved, after an interruption too.
    """
    by_path = {picture.path: picture for picture in reversed(pictures)}
    wanted = [picture for picture in pictures if by_path[picture.path] is picture]
    facts: dict[str, Mapping[str, Any]] = {}
    try:
        with ThreadPoolExecutor(_WORKERS, thread_name_prefix="pictures") as workers:
            for chunk in _chunks(wanted, _CHUNK):
                looks = workers.map(lambda picture: _look(picture, memory), chunk)
                facts.update(zip((picture.name for picture in chunk), looks, strict=True))
                if report is not None:
                    report(len(facts), len(wanted))
    finally:
        memory.save()
    of = {picture.name: facts[by_path[picture.path].name] for picture in pictures}
    broken = {name: str(found["broken"]) for name, found in of.items() if "broken" in found}
    return replace(_judged(facts), broken=broken)


def _chunks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    rest = iter(items)
    while chunk := list(islice(rest, size)):
        yield chunk


def _judged(facts: Mapping[str, Mapping[str, Any]]) -> Looked:
    """The groups among the facts of files."""
    by_bytes: dict[str, list[str]] = {}
    for name, found in facts.items():
        if "broken" not in found:
            by_bytes.setdefault(found["hash"], []).append(name)
    firsts = {names[0]: int(facts[names[0]]["looks"], 16) for names in by_bytes.values()}
    same = tuple(tuple(names) for names in by_bytes.values() if len(names) > 1)
    return Looked(len(facts), {}, same, groups_alike(firsts))


def _look(picture: Picture, memory: FileMemory) -> Mapping[str, Any]:
    """hash and looks of a picture (hex), or {"broken": reason}; remembered, whichever it is."""
    from sana_tune.data.images import BrokenImage, decode  # Pillow and numpy: not before they are needed

    try:
        entry = picture.store.entry(picture.key)
    except StoreLost:
        raise
    except UserError as error:
        return {"broken": error.problems[0].what}
    known = memory.get(picture.path, entry) or {}
    if _WHOLE <= known.keys():
        return known
    if "torn" in known:
        return {"broken": known["torn"]}
    try:
        data = picture.store.read(picture.key)
        seen = {"hash": content_hash(data), "looks": f"{looks_of(decode(data)):016x}"}
        if entry.size_bytes < 0:  # it was downloaded just now
            entry = picture.store.entry(picture.key)
    except BrokenImage as error:
        memory.put(picture.path, entry, {**known, "torn": error.reason})
        return {"broken": error.reason}
    except StoreLost:
        raise
    except UserError as error:
        return {"broken": error.problems[0].what}
    memory.put(picture.path, entry, {**known, **seen})
    return seen


# ---- looks ----


def looks_of(image: Any) -> int:
    """64 bits of a Pillow picture: which of its 64 lowest frequencies are above their median."""
    import numpy as np

    grey = np.asarray(image.convert("L").resize((_SIDE, _SIDE), resample=4, reducing_gap=2), np.float64)  # 4: box
    waves = _cosines()
    low = (waves @ grey @ waves.T).ravel()
    low[0] = 0  # the brightness of the whole
    # What is faint against the strongest frequency would turn its sign with the next JPEG: it counts as nothing.
    low = np.round(low / (_FAINT * np.abs(low).max() + 1e-6))
    bits = low > np.median(low[1:])
    bits[0] = False
    return int("".join("1" if bit else "0" for bit in bits), 2)


@cache
def _cosines() -> np.ndarray:
    """The first rows of the discrete cosine transform (II), [8, 32]."""
    import numpy as np

    frequency, place = np.arange(_LOW)[:, None], np.arange(_SIDE)[None]
    return np.cos(np.pi * frequency * (2 * place + 1) / (2 * _SIDE))


def groups_alike(looks: Mapping[str, int], most_bits: int = ALIKE_BITS) -> tuple[tuple[str, ...], ...]:
    """Groups of names whose hashes differ in at most so many bits (7 or fewer), or that others connect.

    Multi-index hashing: only hashes that share a band of 16 bits, but for one bit, are compared.
    """
    if not 0 <= most_bits < 2 * _BANDS:
        raise ValueError(f"most_bits must be 0 to {2 * _BANDS - 1}; found {most_bits}")
    by_looks: dict[int, list[str]] = {}
    for name, value in looks.items():
        by_looks.setdefault(value, []).append(name)
    parents = list(range(len(by_looks)))

    def root(place: int) -> int:
        while parents[place] != place:
            parents[place] = place = parents[parents[place]]
        return place

    for one, other in _near(list(by_looks), most_bits) if len(by_looks) > 1 else ():
        high, low = sorted((root(one), root(other)), reverse=True)
        parents[high] = low
    groups: dict[int, list[str]] = {}
    for place, names in enumerate(by_looks.values()):
        groups.setdefault(root(place), []).extend(names)
    order = {name: place for place, name in enumerate(looks)}
    return tuple(tuple(sorted(names, key=lambda name: order[name])) for names in groups.values() if len(names) > 1)


def _near(hashes: Sequence[int], most_bits: int) -> Iterator[tuple[int, int]]:
    """Pairs of places whose hashes differ in at most so many bits; some of them more than once."""
    import numpy as np

    all_bits = np.array(hashes, np.uint64)
    for band in range(_BANDS):
        keys = (all_bits >> np.uint64(band * _BAND_BITS) & np.uint64((1 << _BAND_BITS) - 1)).astype(np.int64)
        order = np.argsort(keys, kind="stable")
        ordered = keys[order]
        for flip in (0, *(1 << bit for bit in range(_BAND_BITS))):
            begin = np.searchsorted(ordered, keys ^ flip, "left")
            counts = np.searchsorted(ordered, keys ^ flip, "right") - begin
            for ones, others in _pairs(begin, counts, order):
                ahead = ones < others
                ones, others = ones[ahead], others[ahead]
                near = np.bitwise_count(all_bits[ones] ^ all_bits[others]) <= most_bits
                yield from zip(ones[near].tolist(), others[near].tolist(), strict=True)


def _pairs(begin: np.ndarray, counts: np.ndarray, order: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Each place i with the places order[begin[i]] … of its `counts[i]` partners, a few million pairs at a time."""
    import numpy as np

    ends = np.cumsum(counts)
    first = 0
    while first < len(counts):
        done = ends[first - 1] if first else 0
        last = max(first + 1, int(np.searchsorted(ends, done + _PAIRS_AT_ONCE, "right")))
        few = counts[first:last]
        ones = np.repeat(np.arange(first, last), few)
        offsets = np.arange(len(ones)) - np.repeat(np.cumsum(few) - few, few)
        yield ones, order[np.repeat(begin[first:last], few) + offsets]
        first = last
