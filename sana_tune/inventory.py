"""What the caches of a run hold, and what of it the run needs: for `sana_tune cache stats|verify|gc|explain`. No torch.

Nothing is encoded and nothing downloaded here; only `sweep` changes a cache.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

from sana_tune.caching import redraw_of
from sana_tune.config.datasets import ImageDataset
from sana_tune.config.load import Loaded
from sana_tune.data import shards
from sana_tune.data.notes import in_words, is_of_caption, latent_note, read_latent_note
from sana_tune.data.records import DECODING, Keys, Record
from sana_tune.data.shards import Damage
from sana_tune.data.sources import CAPTION_ENDING
from sana_tune.errors import Problem, UserError
from sana_tune.output import Output
from sana_tune.plan import human_bytes
from sana_tune.prepare import Prepared, on_disk, prepare, text_mode, vae_mode

_DATASETS_SHOWN = 10


@dataclass(frozen=True)
class Shelf:
    """A folder of the run's caches. titles: of the caches in it, as in the plan; entries may share a folder."""

    folder: Path
    titles: tuple[str, ...]


def shelves(loaded: Loaded, output: Output) -> tuple[Shelf, ...]:
    """The cache folders of a run: texts first, then latents in the order of the datasets."""
    config, found = loaded.config, dict[Path, list[str]]()
    for text in {text.id: text for text in (loaded.text_cache, *loaded.text_caches)}.values():
        title = "text" if text.id == loaded.text_cache.id else f"text of {text.id}"
        found.setdefault(output.text_folder(config, text), []).append(title)
    for dataset in loaded.datasets:
        found.setdefault(output.latent_folder(config, dataset), []).append(f"latents of {dataset.id}")
    return tuple(Shelf(folder, tuple(titles)) for folder, titles in found.items())


def surveyed(loaded: Loaded) -> Prepared:
    """The run as `train` would begin it: its pictures hashed, its keys known. UserError where the model is not here."""
    if on_disk(loaded.config) is None:
        name = loaded.config.model.pretrained_model_name_or_path
        what = "this model is not on this machine, and the hashes of its files are part of every key of a cache"
        raise UserError(Problem(name, what, "`sana_tune cache warm` downloads it and fills the caches"))
    return prepare(loaded, Output(Path(loaded.config.train.output_dir)))


def wanted(prepared: Prepared) -> dict[Path, frozenset[str]]:
    """The keys that a run needs of each cache folder (absolute), whether it keeps what it makes there or not."""
    loaded, output, keys = prepared.loaded, prepared.output, prepared.keys
    found: dict[Path, set[str]] = {}
    texts = {text.id: text for text in (loaded.text_cache, *loaded.text_caches)}
    for name, captions in prepared.captions_by_cache.items():
        own = found.setdefault(output.text_folder(loaded.config, texts[name]).absolute(), set())
        own.update(captions)
        own.update(prepared.negatives if name == loaded.text_cache.id else ())
    datasets = {dataset.id: dataset for dataset in loaded.datasets}
    redraw, plan = redraw_of(prepared), prepared.plan
    epochs = {0, *(int(plan.epoch_after(step)) for step in (plan.first_step, plan.first_step + 1))}
    for record in (record for epoch in sorted(epochs) for record in redraw.records(epoch)):
        own = found.setdefault(output.latent_folder(loaded.config, datasets[record.dataset]).absolute(), set())
        own.add(keys.latent(record))
        if record.mask_hash is not None:
            own.add(keys.mask(record))
    return {folder: frozenset(own) for folder, own in found.items()}


# ---- stats, verify, gc ----


@dataclass(frozen=True)
class Stock:
    """What a cache folder holds.

    files, bytes: of its shards on the disk. needed: keys that the run needs; hits: those that are there. idle_items,
    idle_bytes: what this run does not need. damaged: file → why. set_aside: files that were damaged. foreign: other
    safetensors files. busy: another process is writing there now.
    """

    titles: tuple[str, ...]
    folder: str
    items: int
    files: int
    bytes: int
    needed: int
    hits: int
    idle_items: int
    idle_bytes: int
    damaged: Mapping[str, str]
    set_aside: tuple[str, ...]
    foreign: tuple[str, ...]
    busy: bool

    @property
    def misses(self) -> int:
        """Keys that the run needs and that are not there."""
        return self.needed - self.hits


def stock(shelf: Shelf, needed: Collection[str]) -> Stock:
    """Look a cache folder over by its headers. UserError when it cannot be read."""
    index = shards.scan(shelf.folder)
    idle = [place.length for key, place in index.items.items() if key not in needed]
    return Stock(
        titles=shelf.titles,
        folder=str(shelf.folder),
        items=len(index),
        files=len(index.files),
        bytes=sum(_size(shelf.folder / name) for name in index.files),
        needed=len(needed),
        hits=sum(key in index for key in needed),
        idle_items=len(idle),
        idle_bytes=sum(idle),
        damaged=dict(index.torn),
        set_aside=tuple(path.name for path in shards.set_aside(shelf.folder)),
        foreign=index.foreign,
        busy=shards.other_writers(shelf.folder),
    )


def verified(
    shelf: Shelf, report: Callable[[int, int], None] = lambda done, total: None
) -> tuple[int, list[tuple[Damage, tuple[str, ...]]]]:
    """Read a cache folder whole: how many items it has, and its damaged files, each with its lost items in words."""
    found = shards.verify(shelf.folder, report)
    notes = shards.sources(shelf.folder) if any(damage.items for damage in found) else {}
    words = [tuple(in_words(notes.get(key, ""), key) for key in damage.items) for damage in found]
    return len(shards.scan(shelf.folder)), list(zip(found, words, strict=True))


@dataclass(frozen=True)
class Swept:
    """What was removed from a cache folder: items, and damaged files; bytes: by which it is smaller now."""

    items: int
    files: int
    bytes: int


def sweep(shelf: Shelf, keep: Collection[str]) -> Swept:
    """Remove what is not to be kept, second copies, and what was damaged. UserError while another process writes there.

    Sound items of damaged files are kept.
    """
    if not shelf.folder.is_dir():
        return Swept(0, 0, 0)
    if shards.other_writers(shelf.folder):
        what = "another run is writing into this cache folder"
        raise UserError(Problem(str(shelf.folder), what, "wait until it is done, then clear it again"))
    with shards.Writer(shelf.folder) as writer:
        pruned = writer.prune(lambda key: key in keep)
    freed = pruned.bytes
    bad = shards.set_aside(shelf.folder)
    for path in bad:
        freed += _size(path)
        path.unlink(missing_ok=True)
    return Swept(pruned.items, len(bad), freed)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0  # another process removed it since


def mend(shelf: Shelf, damages: Iterable[Damage]) -> None:
    """Set damaged files aside, their sound items kept. UserError when the folder cannot be written."""
    with shards.Writer(shelf.folder) as writer:
        for damage in damages:
            writer.mend(damage.file)


# ---- explain ----


@dataclass(frozen=True)
class Made:
    """One cached thing of a picture: what its key is made of, and whether it is there.

    what: "latent", "mask", "caption 1" … parts: (name, value) of the key. state: hit, miss, damaged, or "not kept".
    file: the shard that holds it. why: the reason of the state, in words.
    """

    what: str
    parts: tuple[tuple[str, str], ...]
    key: str
    folder: str
    state: str
    why: str
    file: str | None = None


@dataclass(frozen=True)
class Explained:
    """A picture of a dataset. left_out: why it is not trained; it has no keys then."""

    dataset: str
    key: str
    path: str
    made: tuple[Made, ...] = ()
    left_out: str | None = None


def explain(prepared: Prepared, name: str) -> tuple[Explained, ...]:
    """Why a picture hits or misses the caches, in each dataset that has it.

    name: its path, its key in a dataset, its id, its file name, or one of these of its caption file. UserError when no
    picture is called so.
    """
    by_rank: dict[int, list[Explained]] = {}
    for dataset in prepared.loaded.datasets:
        store = prepared.stores[dataset.id]
        for record in prepared.survey.records:
            if record.dataset != dataset.id:
                continue
            path = store.locate(record.key)
            if (rank := _rank(name, dataset.id, record.key, path)) is not None:
                told = Explained(dataset.id, record.key, path, _made(prepared, dataset, record))
                by_rank.setdefault(rank, []).append(told)
        left = next((part.left_out for part in prepared.survey.ledger.datasets if part.dataset == dataset.id), ())
        for key, reason in left:
            if (rank := _rank(name, dataset.id, key, store.locate(key))) is not None:
                told = Explained(dataset.id, key, store.locate(key), left_out=reason)
                by_rank.setdefault(rank, []).append(told)
    if not by_rank:
        places = [f"{dataset.id}: {dataset.source}" for dataset in prepared.loaded.datasets]
        more = f"; and {len(places) - _DATASETS_SHOWN} more" if len(places) > _DATASETS_SHOWN else ""
        what = f"no picture of the datasets is called so ({'; '.join(places[:_DATASETS_SHOWN])}{more})"
        raise UserError(Problem(name, what, "name it by its path, or by its path inside the dataset"))
    return tuple(by_rank[min(by_rank)])


def _rank(name: str, dataset: str, key: str, path: str) -> int | None:
    """How well a picture fits a name: 0 = it is meant, 1 = its file is called so somewhere; None = not at all."""
    names = (path, key, f"{dataset}/{key}")
    if name.lower().endswith(CAPTION_ENDING):
        name, names = os.path.splitext(name)[0], tuple(os.path.splitext(each)[0] for each in names)
    if name in names or os.path.abspath(name) == names[0]:
        return 0
    return 1 if PurePosixPath(names[1]).name == name else None


def _made(prepared: Prepared, dataset: ImageDataset, record: Record) -> tuple[Made, ...]:
    """All that is cached of a picture."""
    loaded, output, keys = prepared.loaded, prepared.output, prepared.keys
    folder = output.latent_folder(loaded.config, dataset)
    place, box = record.placement, record.placement.crop_box
    geometry = (
        ("resized to", f"{place.resize}"),
        ("cropped to", f"{place.target} at {box.left},{box.top}"),
    )
    picture = (
        ("bytes", f"{record.content_hash} ({record.width_px}x{record.height_px} px after EXIF orientation)"),
        *geometry,
        ("decoding", f"version {DECODING}{f', transparent parts on {record.ground}' if record.ground else ''}"),
        ("encoder", f"{keys.latent_identity} (weights of the VAE, fp32, scaled, untiled)"),
    )
    kept = vae_mode(dataset) != "none"
    latent = keys.latent(record)
    made = [_looked_up("latent", picture, latent, folder, kept, lambda notes: _why_latent(record, keys, notes))]
    if record.mask_hash is not None:
        mask = (
            ("bytes", f"{record.mask_hash} ({record.mask_key})"),
            *geometry,
            ("kind", record.mask_kind),
            picture[-1],
        )
        made.append(_looked_up("mask", mask, keys.mask(record), folder, True, lambda notes: _NEVER))
    text = loaded.text_cache_of(dataset.id)
    folder, kept = output.text_folder(loaded.config, text), text_mode(loaded, text.id) != "none"
    for number, caption in enumerate(record.captions, start=1):
        parts = (
            ("caption", repr(caption)),
            ("encoder", f"{keys.text_identity} (tokenizer, weights, instruction, 300 tokens at most)"),
        )
        why = partial(_why_text, caption)
        made.append(_looked_up(f"caption {number}", parts, keys.text(caption), folder, kept, why))
    return tuple(made)


def _looked_up(
    what: str,
    parts: tuple[tuple[str, str], ...],
    key: str,
    folder: Path,
    kept: bool,
    why_not: Callable[[Mapping[str, str]], str],
) -> Made:
    """Whether an item is there. why_not: the reason it is missing, from what the others were made of."""
    index = shards.scan(folder)
    location = index.items.get(key)
    if location is None:
        if not kept:
            return Made(what, parts, key, str(folder), "not kept", "the settings keep nothing: made at every visit")
        why = why_not(shards.sources(folder)) if len(index) else "nothing is in this cache yet"
        if bad := len(index.torn) + len(shards.set_aside(folder)):
            why += f"; or it was lost: {bad} files here are damaged"
        return Made(what, parts, key, str(folder), "miss", why)
    try:
        shards.Reader(folder).read(location)
    except shards.Unusable as error:
        why = f"{error.problems[0].what}; the next run makes it again"
        return Made(what, parts, key, str(folder), "damaged", why, location.file)
    why = f"{human_bytes(location.length)} in {location.file}, checksum right"
    return Made(what, parts, key, str(folder), "hit", why, location.file)


_NEVER = "it was never made here"


def _why_latent(record: Record, keys: Keys, notes: Mapping[str, str]) -> str:
    """Why there is no latent of this picture: what is different in the nearest one that is there."""
    now = read_latent_note(latent_note(record, keys))
    nearest: list[str] | None = None
    for note in notes.values():
        other = read_latent_note(note)
        if other is None or now is None or (other.key != record.key and other.content_hash != record.content_hash):
            continue
        differs = [text for field, text in _DIFFERS.items() if getattr(other, field) != getattr(now, field)]
        if nearest is None or len(differs) < len(nearest):
            nearest = differs
    if nearest is None:
        return _NEVER
    reasons = " and ".join(nearest) or "an earlier version that decoded pictures otherwise"
    return f"there is one of this picture, but of {reasons}"


def _why_text(caption: str, notes: Mapping[str, str]) -> str:
    """Why there is no embedding of this caption."""
    if any(is_of_caption(note, caption) for note in notes.values()):
        return "there is one of this caption, but of another encoder, tokenizer or instruction"
    return "this caption was never encoded here; it may be new or edited"


_DIFFERS = {
    "content_hash": "other bytes: the file was changed since",
    "resize": "another size",
    "crop_box": "another crop",
    "encoder": "another VAE",
    "ground": "another ground colour",
}
