"""The caching part of a run: what the caches lack is encoded before training, or while it goes on.

Encoders are functions of `model`, caches are folders of `data`; here they meet. Whatever fails its checksum is made
again before training may see it. Of several processes each encodes its share, which is decided by place and not by what
is missing: they need not agree on that.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sana_tune.config.datasets import ImageDataset, TextDataset
from sana_tune.data.notes import latent_note, text_note
from sana_tune.data.records import Record, Role
from sana_tune.data.redraw import Redraw
from sana_tune.data.survey import rules_of
from sana_tune.errors import Problem, UserError
from sana_tune.log import log
from sana_tune.prepare import Prepared, keeps_masks, text_mode, vae_mode
from sana_tune.store import FolderStore, write_atomically
from sana_tune.train.crew import ALONE, Crew
from sana_tune.watch.events import CacheProgress
from sana_tune.watch.sinks import Watcher

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

    from sana_tune.data.cache import LostItem, OnDemand, TensorCache, Tensors
    from sana_tune.data.loader import Batches, Step
    from sana_tune.model.sana import ImageCoder, TextEncoder

Read = Callable[[Record], bytes]


@dataclass(frozen=True)
class Caches:
    """The caches as folders. text: the default one, which the prompts are in. texts: by id. latents: by dataset."""

    text: TensorCache
    texts: Mapping[str, TensorCache]
    latents: Mapping[str, TensorCache]


@dataclass(frozen=True)
class Reading:
    """What training reads, in the same places as in `Caches`."""

    text: Tensors
    texts: Mapping[str, Tensors]
    latents: Mapping[str, Tensors]


def open_caches(prepared: Prepared) -> Caches:
    """The caches of the run, as they stand on the disk. Damaged files are set aside, and named."""
    from sana_tune.data.cache import TensorCache

    config, output, loaded = prepared.config, prepared.output, prepared.loaded
    opened: dict[Path, TensorCache] = {}  # entries may share a folder

    def cache(folder: Path, write_batch_size: int, compress: bool) -> TensorCache:
        place = folder.absolute()
        if place not in opened:
            opened[place] = TensorCache(folder, write_batch_size, compress=compress)
        return opened[place]

    def packs(text: TextDataset) -> bool:
        own = text.compress_disk_cache
        return config.data.compress_disk_cache if own is None else own

    texts = {
        text.id: cache(output.text_folder(config, text), text.write_batch_size, packs(text))
        for text in (loaded.text_cache, *loaded.text_caches)
    }
    latents = {
        dataset.id: cache(output.latent_folder(config, dataset), dataset.write_batch_size, dataset.compress_disk_cache)
        for dataset in loaded.datasets
    }
    for each in opened.values():
        for name, what in each.set_aside_torn().items():
            text = "%s: this cache file is damaged: %s; it is set aside, and what the run needs of it is made anew"
            log.warning(text, each.folder / name, what)
    return Caches(texts[loaded.text_cache.id], texts, latents)


def redraw_of(prepared: Prepared) -> Redraw:
    """The pictures of the run, epoch by epoch: datasets of vae_cache_clear_each_epoch change from one to the next."""
    data = prepared.config.data
    alignment = data.aspect_bucket_alignment or prepared.facts.vae_factor
    rules = {
        dataset.id: rules_of(dataset, alignment, data.aspect_bucket_rounding)
        for dataset in prepared.loaded.datasets
        if dataset.vae_cache_clear_each_epoch
    }
    return Redraw(prepared.survey.records, rules, prepared.config.train.seed)


# ---- before training ----


def together(crew: Crew, what: str, caches: Caches, found: Mapping[str, str]) -> dict[str, str]:
    """What all processes found while they made their shares of the caches, once the last one is through.

    what: that is waited for, in words. Afterwards each sees in the caches what the others made.
    """
    parts: list[Mapping[str, str]] = crew.gather(what, dict(found))
    if crew.ranks > 1:
        for cache in {id(cache): cache for cache in (*caches.texts.values(), *caches.latents.values())}.values():
            cache.refresh()
    return {name: reason for part in parts for name, reason in part.items()}


def encode_texts(
    prepared: Prepared,
    caches: Caches,
    device: torch.device,
    watcher: Watcher,
    *,
    also: Collection[str] = (),
    crew: Crew = ALONE,
) -> None:
    """Fill the text caches; the encoder is loaded only if something is missing, and freed.

    also: caches that are else filled when something is needed (text_cache_ondemand), by id. crew: who shares the work.
    """
    todo: dict[str, dict[str, str]] = {}
    for name, captions in prepared.captions_by_cache.items():
        mode = text_mode(prepared.loaded, name)
        if mode == "full" or (mode == "ondemand" and name in also):
            missing = caches.texts[name].missing(crew.share(captions))
            todo[name] = {key: captions[key] for key in missing}
    default = prepared.loaded.text_cache.id
    wanted = prepared.negatives if default in todo and crew.is_main else {}
    negative = {key: text for key, text in wanted.items() if key not in caches.text}
    if not any(todo.values()) and not negative:
        return
    from sana_tune.data.filling import Halving, fill_text
    from sana_tune.model.sana import empty_device_cache

    encoder = text_encoder_of(prepared, device)
    size, identity = prepared.config.data.text_encoder_batch_size, prepared.keys.text_identity
    try:
        tell_cut(encoder, [text for captions in todo.values() for text in captions.values()])
        encode = Halving(encoder.encode, "captions", empty_device_cache)
        for name, captions in todo.items():
            title = "text" if name == default else f"text of {name}"
            fill_text(caches.texts[name], captions, encode, size, reporter(watcher, title, crew), identity)
        plain = Halving(lambda texts: encoder.encode(texts, with_instruction=False), "captions", empty_device_cache)
        fill_text(caches.text, negative, plain, size, _silent, prepared.plain_keys.text_identity)
    finally:
        encoder.free()


def encode_pictures(
    prepared: Prepared,
    caches: Caches,
    device: torch.device,
    watcher: Watcher,
    *,
    also: Collection[str] = (),
    crew: Crew = ALONE,
) -> dict[str, str]:
    """Fill the latent caches; the VAE is loaded only if something is missing, and freed. Answers broken pictures.

    also: datasets whose latents are else made when they are needed (vae_cache_ondemand). The pictures of others of
    that kind are decoded, so that a broken one is known before training. crew: who shares the work.
    """
    datasets = {dataset.id: dataset for dataset in prepared.loaded.datasets}
    lacking: dict[str, list[Record]] = {}
    unkept: list[Record] = []
    for record in own_records(prepared.survey.records, prepared.keys.latent, crew):
        mode = vae_mode(datasets[record.dataset])
        if mode != "none" and prepared.keys.latent(record) in caches.latents[record.dataset]:
            continue
        if mode == "full" or (mode == "ondemand" and record.dataset in also):
            lacking.setdefault(record.dataset, []).append(record)
        else:
            unkept.append(record)
    broken = broken_among(prepared, unkept, watcher, crew)
    if not lacking:
        return broken
    from sana_tune.data.filling import Halving, fill_latents
    from sana_tune.model.sana import empty_device_cache

    coder = vae_of(prepared, device)
    try:
        encode = Halving(lambda pictures: encode_finite(coder, pictures), "pictures", empty_device_cache)
        for name, records in lacking.items():
            store = prepared.stores[name]
            size, tell = datasets[name].vae_batch_size, reporter(watcher, f"latents of {name}", crew)
            read = lambda record, store=store: store.read(record.key)  # noqa: E731
            found = fill_latents(records, caches.latents[name], prepared.keys, read, encode, size, tell)
            if found:
                store.check()  # where nothing at all can be read, no picture is to blame
            broken |= found
    finally:
        coder.free()
    return broken


def own_records(records: Iterable[Record], key: Callable[[Record], str], crew: Crew) -> list[Record]:
    """The records that this process takes care of, those of one key together."""
    if crew.ranks == 1:
        return list(records)
    keyed = [((record.dataset, key(record)), record) for record in records]
    own = set(crew.share(dict.fromkeys(place for place, _ in keyed)))
    return [record for place, record in keyed if place in own]


def encode_masks(
    prepared: Prepared, caches: Caches, broken: Mapping[str, str], watcher: Watcher, crew: Crew = ALONE
) -> dict[str, str]:
    """Fill the latent caches with the masks of their pictures; those that are not kept are read once, to know that
    they can be. broken: pictures that are left out already. Answers the pictures whose mask cannot be read."""
    masked: dict[str, list[Record]] = {}
    with_masks = [each for each in prepared.survey.records if each.mask_key is not None and each.id not in broken]
    for record in own_records(with_masks, prepared.keys.mask, crew):
        masked.setdefault(record.dataset, []).append(record)
    if not masked:
        return {}
    from sana_tune.data.mask_filling import fill_masks

    reads, found = mask_reads(prepared), {}
    for dataset in prepared.loaded.datasets:
        if own := masked.get(dataset.id):
            cache = caches.latents[dataset.id] if keeps_masks(dataset) else None
            tell = reporter(watcher, f"masks of {dataset.id}", crew)
            found |= fill_masks(own, cache, prepared.keys, reads[dataset.id], prepared.facts.vae_factor, tell)
    return found


def masks_of(prepared: Prepared, caches: Caches) -> Callable[[Record], Tensor]:
    """The mask of a record that has one."""
    from sana_tune.data.mask_filling import Masks

    return Masks(caches.latents, mask_reads(prepared), prepared.keys, prepared.facts.vae_factor).of


def mask_reads(prepared: Prepared) -> dict[str, Read]:
    """How the bytes of a record's mask are read, by dataset."""
    folders = {masks.id: FolderStore(masks.instance_data_dir) for masks in prepared.loaded.masks}
    linked = {dataset.id: dataset.conditioning_data for dataset in prepared.loaded.datasets}
    stores = {name: folders[masks] for name, masks in linked.items() if masks in folders}
    return {name: lambda record, store=store: store.read(str(record.mask_key)) for name, store in stores.items()}


def broken_among(prepared: Prepared, records: Sequence[Record], watcher: Watcher, crew: Crew = ALONE) -> dict[str, str]:
    """The pictures that cannot be decoded; what is sound is remembered by its bytes."""
    if not records:
        return {}
    from sana_tune.data.filling import undecodable
    from sana_tune.data.records import DECODING

    folder = prepared.output.file_memory.parent
    own = "" if crew.is_main else f"-rank{crew.rank.rank}"
    file = folder / f"decoded-{DECODING}{own}.txt"
    files = [folder / f"decoded-{DECODING}.txt", *folder.glob(f"decoded-{DECODING}-rank*.txt")]
    known = {each for path in files if path.exists() for each in path.read_text(encoding="utf-8").split()}
    unknown = [record for record in records if record.content_hash not in known]
    read = reading_of(prepared)
    broken, sound = undecodable(unknown, read, reporter(watcher, "pictures to be encoded on demand", crew))
    if broken:
        for dataset in {record.dataset for record in unknown}:
            prepared.stores[dataset].check()
    if sound:
        known.update(str(record.content_hash) for record in sound)
        write_atomically(file, "\n".join(sorted(known)).encode("utf-8"))
    return broken


def reading_of(prepared: Prepared) -> Read:
    """A function that reads a picture's bytes."""
    return lambda record: prepared.stores[record.dataset].read(record.key)


def text_encoder_of(prepared: Prepared, device: torch.device) -> TextEncoder:
    """The run's text encoder. UserError when there is no room for it."""
    from sana_tune.model.sana import load_text_encoder

    model = prepared.config.model
    return _loaded(
        lambda: load_text_encoder(
            prepared.folder,
            device,
            instruction=model.sana_complex_human_instruction,
            variant=model.variant,
            quantised=model.text_encoder_1_precision,
            via=model.quantize_via,
        ),
        "text encoder",
    )


def vae_of(prepared: Prepared, device: torch.device) -> ImageCoder:
    """The run's VAE. UserError when there is no room for it."""
    from sana_tune.model.sana import load_vae

    variant, tiled = prepared.config.model.variant, prepared.config.data.vae_tiled_encoding
    return _loaded(lambda: load_vae(prepared.folder, device, variant=variant, tiled_encoding=tiled), "VAE")


def _loaded(load: Callable[[], Any], name: str) -> Any:
    import torch

    try:
        return load()
    except torch.OutOfMemoryError as error:
        what = f"there is no room in the device's memory for the {name}"
        raise UserError(
            Problem("caching", what, "close other programs that use the device, then start again")
        ) from error


def tell_cut(encoder: TextEncoder, texts: Sequence[str]) -> None:
    """Say how many texts are too long."""
    if cut := sum(encoder.is_cut(text) for text in texts):
        log.warning("%d captions are longer than 300 tokens with the instruction; their ends are cut", cut)


def encode_finite(coder: ImageCoder, pictures: np.ndarray) -> list[Tensor | None]:
    """Latents of pictures [B, H, W, 3]. One that is not finite is made once more in fp32, where the VAE computes in
    less; None in the place of each that still is not."""
    from sana_tune.model.sana import NotFinite

    try:
        return list(coder.encode(pictures))
    except NotFinite as error:
        bad = error.indices
    good = [index for index in range(len(pictures)) if index not in bad]
    latents = dict(zip(good, coder.encode(pictures[good]) if good else (), strict=True))
    if not coder.in_fp32:
        with coder.exact():
            latents |= {
                index: one for index in bad for one in encode_finite(coder, pictures[[index]]) if one is not None
            }
        if saved := len(latents) - len(good):
            log.warning("%d pictures had latents that were not finite; they were encoded once more in fp32", saved)
    return [latents.get(index) for index in range(len(pictures))]


# ---- while training ----


class Supply:
    """What training reads, kept right while it goes on; `close()` it.

    Caches that are filled on demand hold their encoder here. A damaged item is set aside and made again by the
    thread that trains, with the encoder loaded for it: `steps` does that for the batches, `reading` for the rest.
    crew: shares what an epoch needs anew; a damaged item is made again by each process that meets it.
    """

    def __init__(
        self,
        prepared: Prepared,
        caches: Caches,
        redraw: Redraw,
        device: torch.device,
        watcher: Watcher,
        crew: Crew = ALONE,
    ) -> None:
        self._crew = crew
        self._prepared, self._caches, self._redraw = prepared, caches, redraw
        self._device, self._watcher = device, watcher
        self._home = threading.get_ident()
        self._lock = threading.Lock()  # of the encoders
        self._vae: ImageCoder | None = None
        self._encoder: TextEncoder | None = None
        self._demands: list[OnDemand] = []
        self._whole: set[str] = set()  # ids of caches to be filled on demand in which nothing was missing
        self._epochs: tuple[int, ...] = ()
        self._now: list[Prepared] = [prepared]
        self._records = {prepared.keys.latent(each): each for each in prepared.survey.records if each.role is Role.EVAL}
        self._mended = Counter[str]()
        texts = {name: self._text(name, cache) for name, cache in caches.texts.items()}
        datasets = {dataset.id: dataset for dataset in prepared.loaded.datasets}
        latents = {name: self._latents(datasets[name], cache) for name, cache in caches.latents.items()}
        self.reading = Reading(texts[prepared.loaded.text_cache.id], texts, latents)

    def steps(self, batches: Batches) -> Supplied:
        """The batches, with what each epoch needs made before it, and damaged items made again."""
        return Supplied(batches, self)

    @property
    def changes(self) -> bool:
        """Whether epochs differ in their pictures."""
        return bool(self._redraw.datasets)

    def records(self, epoch: int) -> Sequence[Record]:
        """The pictures that an epoch shows, by the plan's numbers."""
        return self._redraw.records(epoch)

    def enter(self, first: int, last: int) -> None:
        """Have what the epochs `first` to `last` need, and drop what those before needed."""
        epochs = tuple(range(first, last + 1))
        if epochs == self._epochs:
            return
        self._epochs = epochs
        survey = self._prepared.survey
        self._now = [
            replace(self._prepared, survey=replace(survey, records=tuple(self._redraw.records(epoch))))
            for epoch in epochs
        ]
        if self._demands:
            key = self._prepared.keys.latent
            self._records = {key(record): record for now in self._now for record in now.survey.records}
        if self.changes:
            self._fill("some pictures cannot be encoded any more", self._crew)
            self._drop(first)

    def mend(self, lost: LostItem) -> None:
        """Set aside what is damaged and make it again. UserError when that cannot be."""
        place = f"{lost.cache.folder}/{lost.key}"
        self._mended[place] += 1
        if self._mended[place] > 2:
            raise lost
        log.warning("%s", lost.problems[0])
        log.warning("%s is made again now: its encoder is loaded for that", lost.key)
        try:
            lost.cache.mend(lost)
            for now in self._now:
                encode_texts(now, self._caches, self._device, self._watcher, also=self._whole)
            self._fill("what was lost cannot be made again", ALONE, masks=True)
        except UserError as error:
            raise UserError(*lost.problems, *error.problems) from error

    def close(self) -> None:
        """Commit what was made on demand, and free the encoders."""
        try:
            for demand in self._demands:
                demand.close()
        finally:
            for encoder in (self._vae, self._encoder):
                if encoder is not None:
                    encoder.free()
            self._vae = self._encoder = None

    def _fill(self, what: str, crew: Crew, *, masks: bool = False) -> None:
        for now in self._now:
            made = encode_pictures(now, self._caches, self._device, self._watcher, also=self._whole, crew=crew)
            broken = together(crew, "the latents of this epoch", self._caches, made)
            if masks:
                broken |= encode_masks(now, self._caches, broken, self._watcher)
            if broken:
                fix = "start again: they are left out then, and the run goes on from its last checkpoint"
                raise UserError(*(Problem(name, f"{what}: {reason}", fix) for name, reason in broken.items()))

    def _drop(self, first: int) -> None:
        """Drop the latents of the epochs before `first` that nothing needs any more."""
        keys, folders = self._prepared.keys, {name: cache.folder for name, cache in self._caches.latents.items()}
        gone: dict[str, set[str]] = {}
        for epoch in range(max(0, first - 2), first):
            for record in self._redraw.records(epoch):
                if record.dataset in self._redraw.datasets:
                    gone.setdefault(record.dataset, set()).add(keys.latent(record))
        for name, old in gone.items():
            needed = {
                keys.latent(record)
                for now in self._now
                for record in now.survey.records
                if folders[record.dataset] == folders[name]
            }
            cache = self._caches.latents[name]
            dropped = {key for key in old - needed if key in cache}
            if dropped and self._crew.is_main:
                pruned = cache.prune(lambda key, dropped=dropped: key not in dropped)
                log.info("Epoch %d: new crops of %s; %d latents of before dropped", first + 1, name, pruned.items)
        self._crew.gather("the dropping of old latents")
        for name in gone if not self._crew.is_main else ():
            self._caches.latents[name].rescan()

    def _text(self, name: str, cache: TensorCache) -> Tensors:
        from sana_tune.data.cache import InMemory, OnDemand
        from sana_tune.data.filling import Halving

        prepared, mode = self._prepared, text_mode(self._prepared.loaded, name)
        captions = prepared.captions_by_cache.get(name, {})
        plain = prepared.negatives if cache is self._caches.text else {}
        tensors: Tensors = cache
        if mode == "none" or (mode == "ondemand" and cache.missing([*captions, *plain])):
            encoder = self._encoder = self._encoder or text_encoder_of(prepared, self._device)
            tell_cut(encoder, list(captions.values()))

            def make(key: str) -> tuple[Tensor, str] | None:
                text = captions.get(key, plain.get(key))
                if text is None:
                    return None
                keys = prepared.keys if key in captions else prepared.plain_keys
                encode = Halving(lambda texts: encoder.encode(texts, with_instruction=key in captions), "captions")
                with self._lock:
                    (made,) = encode([text])
                return made, text_note(text, keys.text_identity)

            tensors = OnDemand(cache, make, store=mode == "ondemand")
            self._demands.append(tensors)
        else:
            self._whole.add(name)
        tensors = Mended(tensors, self.mend, self._home)
        return InMemory(tensors) if prepared.config.data.text_embed_full_cache else tensors

    def _latents(self, dataset: ImageDataset, cache: TensorCache) -> Tensors:
        from sana_tune.data.cache import OnDemand
        from sana_tune.data.filling import Halving, one_latent

        prepared, mode = self._prepared, vae_mode(dataset)
        tensors: Tensors = cache
        own = [prepared.keys.latent(record) for record in prepared.survey.records if record.dataset == dataset.id]
        lacks = dataset.id in self._redraw.datasets or bool(cache.missing(own))
        if mode == "none" or (mode == "ondemand" and lacks):
            coder = self._vae = self._vae or vae_of(prepared, self._device)
            read = reading_of(prepared)
            encode = Halving(lambda pictures: encode_finite(coder, pictures), "pictures")

            def make(key: str) -> tuple[Tensor, str] | None:
                record = self._records.get(key)
                if record is None:
                    return None
                with self._lock:
                    made = one_latent(record, read, encode)
                return made, latent_note(record, prepared.keys)

            tensors = OnDemand(cache, make, store=mode == "ondemand")
            self._demands.append(tensors)
        else:
            self._whole.add(dataset.id)
        return Mended(tensors, self.mend, self._home)


class Supplied:
    """A run's batches, whose steps never end at a damaged item of a cache."""

    def __init__(self, batches: Batches, supply: Supply):
        self.batches = batches
        self._supply = supply

    def steps(self, first_step: int, total_steps: int) -> Iterator[Step]:
        """The steps first_step … total_steps − 1. A step whose data were damaged is loaded anew once they are whole."""
        from sana_tune.data.cache import LostItem

        step = first_step
        while step < total_steps:
            try:
                for loaded in self._stretch(step, total_steps):
                    yield loaded
                    step += 1
            except LostItem as lost:
                self._supply.mend(lost)

    def _stretch(self, step: int, total_steps: int) -> Iterator[Step]:
        """The steps of the same epochs as `step`."""
        epochs = self.batches.epochs(step)
        self._supply.enter(*epochs)
        end = total_steps
        if self._supply.changes:
            end = step + bisect_right(range(step, total_steps), epochs, key=self.batches.epochs)
        steps = self.batches.steps(step, end)
        try:
            yield from steps
        finally:
            if isinstance(steps, Generator):
                steps.close()


class Mended:
    """Reads; in the thread that trains, a damaged item is made again at once. In others it is told."""

    def __init__(self, tensors: Tensors, mend: Callable[[LostItem], None], home: int):
        self._tensors = tensors
        self._mend = mend
        self._home = home

    def get(self, key: str) -> Tensor:
        """The tensor of a key. LostItem in other threads than `home`."""
        from sana_tune.data.cache import LostItem

        try:
            return self._tensors.get(key)
        except LostItem as lost:
            if threading.get_ident() != self._home:
                raise
            self._mend(lost)
        return self._tensors.get(key)


def reporter(watcher: Watcher, cache: str, crew: Crew = ALONE) -> Callable[[int, int], None]:
    """A function that tells a cache's progress: as events, and to the other processes."""
    title = cache if crew.ranks == 1 else f"{cache}, share {crew.rank.rank + 1} of {crew.ranks}"

    def tell(done: int, total: int) -> None:
        watcher.emit(CacheProgress(title, done, total, finished=done >= total))
        crew.beat(f"{cache}, {done} of {total}")

    return tell


def _silent(done: int, total: int) -> None:
    """For what is too little to tell."""
