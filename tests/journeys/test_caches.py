"""Caches in whole runs: however they are kept the same is trained; damaged, shared, full or shut they are never wrong.

What a run trains on is compared by its metrics and its last checkpoint, byte for byte.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from sana_tune.cli.main import exit_code
from sana_tune.config.load import Loaded
from sana_tune.data import shards
from sana_tune.data.cache import TensorCache
from sana_tune.data.filling import fill_text
from sana_tune.errors import UserError
from sana_tune.run import run, warm
from sana_tune.watch.events import CacheProgress, Event, Finished, Stepped
from tests.journeys.kit import (
    Child,
    Heard,
    cache_of,
    differences,
    metrics_of,
    output_of,
    pictures,
    small_run,
    state_of,
)
from tests.journeys.mounts import read_only, small_disk, with_own_mounts

KILLS, KILLS_IN_FULL = 30, 200
STEPS = 9
RANDOM: Mapping[str, Any] = {"crop": True, "crop_style": "random", "crop_aspect": "square"}
TEXT = {"id": "text", "dataset_type": "text_embeds", "default": True, "write_batch_size": 2}
SIZES = {"max_train_steps": STEPS, "write_batch_size": 2, "vae_batch_size": 2, "text_encoder_batch_size": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six squares with two captions each, and three wide pictures that are cropped at random; 5 steps an epoch."""
    folder = tmp_path_factory.mktemp("cached")
    pictures(folder / "squares", 6, variants=2)
    pictures(folder / "wide", 3, (72, 40), seed=1)
    return folder


def run_of(data: Path, folder: Path, **settings: Any) -> Loaded:
    squares, wide = {"instance_data_dir": str(data / "squares")}, {"instance_data_dir": str(data / "wide"), **RANDOM}
    return small_run(folder, squares, wide, TEXT, **{**SIZES, **settings})


def outcome(loaded: Loaded) -> dict[str, Any]:
    """All that a run learned: metrics and its last checkpoint."""
    output = output_of(loaded)
    lines = {f"line {number}": line for number, line in enumerate(metrics_of(output), start=1)}
    last = max(output.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
    return {**lines, **state_of(last)}


@pytest.fixture(scope="module")
def plain(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a run that nothing happens to learns; and beside it "cache", its caches."""
    folder = tmp_path_factory.mktemp("plain")
    loaded = run_of(data, folder)
    run(loaded)
    return {"cache": folder / "output/cache", "outcome": outcome(loaded), "items": cache_of(folder / "output/cache")}


def command(*words: str) -> Callable[[Path], int]:
    return lambda folder: exit_code([*words, "--config", str(folder / "config.json")])


def said(loaded: Loaded) -> str:
    return (output_of(loaded) / "log.txt").read_text(encoding="utf-8")


# ---- kept in every way ----


@pytest.mark.parametrize(
    "settings",
    [
        {"vae_cache_disable": True, "text_cache_disable": True},
        {"vae_cache_ondemand": True, "text_cache_ondemand": True},
        {"text_embed_full_cache": True, "compress_disk_cache": True},
    ],
    ids=lambda settings: "+".join(settings),
)
def test_however_it_is_kept_the_same_is_trained(data: Path, plain, tmp_path: Path, settings):
    loaded, heard = run_of(data, tmp_path, **settings), Heard()
    run(loaded, sinks=[heard])
    assert differences(plain["outcome"], outcome(loaded)) == []
    kept = cache_of(tmp_path / "output/cache")
    text = {key: item for key, item in plain["items"].items() if key.startswith("text/")}
    latents = {key: item for key, item in plain["items"].items() if not key.startswith("text/")}
    expected: dict[str, Any] = {}
    if "vae_cache_disable" not in settings:
        expected |= latents
    if not settings.keys() & {"text_cache_disable", "text_cache_ondemand"}:
        expected |= text
    if "text_cache_ondemand" in settings:
        assert set(kept) - set(latents) < set(text), "what no step asked for was never made"
        kept = {key: item for key, item in kept.items() if key in latents}
    assert kept == expected
    plan = json.loads((tmp_path / "output/plan.json").read_bytes())
    stays = bool(settings.keys() & {"vae_cache_disable", "vae_cache_ondemand", "text_cache_disable",
                                    "text_cache_ondemand"})  # fmt: skip
    assert (plan["memory"]["need"]["resident_bytes"] > 0) == stays, "encoders that stay are priced"


def test_on_demand_a_second_run_makes_nothing_and_loads_no_encoder(data: Path, plain, tmp_path: Path):
    shutil.copytree(plain["cache"], tmp_path / "cache")
    modes = {"vae_cache_ondemand": True, "text_cache_ondemand": True, "cache_dir": str(tmp_path / "cache")}
    loaded, heard = run_of(data, tmp_path, **modes), Heard()
    run(loaded, sinks=[heard])
    assert heard.encoded == {} and differences(plain["outcome"], outcome(loaded)) == []


def test_a_broken_picture_is_known_before_training_where_nothing_is_kept(data: Path, tmp_path: Path):
    shutil.copytree(data, tmp_path / "data")
    path = tmp_path / "data/squares/p03.png"
    path.write_bytes(path.read_bytes()[:-60])
    loaded, heard = run_of(tmp_path / "data", tmp_path, vae_cache_disable=True), Heard()
    run(loaded, sinks=[heard])
    assert "left out: d0/p03.png (is damaged" in said(loaded) and len(heard.of(Finished)) == 1
    ledger = json.loads((tmp_path / "output/ledger.json").read_bytes())["datasets"][0]
    assert (ledger["found"], ledger["trained"]) == (6, 5)


def test_per_dataset(data: Path, plain, tmp_path: Path):
    squares = {"instance_data_dir": str(data / "squares"), "vae_cache_disable": True}
    wide = {"instance_data_dir": str(data / "wide"), **RANDOM, "compress_disk_cache": True}
    loaded = small_run(tmp_path, squares, wide, {**TEXT, "text_cache_ondemand": True}, **SIZES)
    run(loaded)
    assert differences(plain["outcome"], outcome(loaded)) == []
    assert not (tmp_path / "output/cache/vae/d0").exists()


# ---- crops drawn anew ----


def test_with_new_crops_each_epoch_a_stopped_run_goes_on_as_if_undisturbed(data: Path, plain, tmp_path: Path):
    def clear(name: str, steps: int = 11) -> Loaded:
        settings = {"max_train_steps": steps, "checkpoint_step_interval": 7, "vae_cache_clear_each_epoch": True}
        return run_of(data, tmp_path / name, **settings)

    whole = clear("whole")
    run(whole)
    run(clear("parts", 7))
    parts, heard = clear("parts"), Heard()
    assert command("cache", "gc", "--yes")(tmp_path / "parts") == 0
    warm(parts, sinks=[heard])
    assert heard.encoded == {}, "gc kept what the epoch in which the run stands needs"
    run(parts)
    assert differences(outcome(whole), outcome(parts)) == []
    changed = set(differences(plain["outcome"], outcome(whole)))
    assert not {f"line {step}" for step in range(1, 6)} & changed, "the first epoch is as without new crops"
    assert "line 8" in changed, "the second is not"
    assert "Epoch 2: new crops of d1; 3 latents of before dropped" in said(whole)
    assert len(TensorCache(tmp_path / "whole/output/cache/vae/d1")) == 3, "those of the last epoch"


# ---- damaged ----


def flip(path: Path, bit: int) -> None:
    """Turn one bit of a file over."""
    with open(path, "r+b") as file:
        file.seek(bit // 8)
        (byte,) = file.read(1)
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def test_bit_flips_at_100_places_are_all_found_and_none_reaches_training(data: Path, plain, tmp_path, full, capsys):
    luck, groups = random.Random(8), 10 if full else 2
    for group in range(groups):
        folder = tmp_path / str(group)
        loaded, cache = run_of(data, folder), folder / "output/cache"
        shutil.copytree(plain["cache"], cache)
        found = sorted(cache.rglob("shard-*.safetensors"))
        for _ in range(100 // groups):
            path = luck.choice(found)
            before = path.read_bytes()
            flip(path, luck.randrange(8 * len(before)))
            assert [damage.file for damage in shards.verify(path.parent)] == [path.name]
            path.write_bytes(before)
        damaged = luck.sample(found, 4)
        for path in damaged:
            flip(path, luck.randrange(8 * path.stat().st_size))
        assert exit_code(["cache", "verify", "--config", str(folder / "config.json"), "--json"]) == 1
        told = json.loads(capsys.readouterr().out)["damaged"]
        assert {one["file"] for one in told} == {path.name for path in damaged}
        run(loaded)
        assert differences(plain["outcome"], outcome(loaded)) == []
        command("cache", "verify", "--set-aside")(folder)  # what no step asked for is damaged yet
        assert command("cache", "warm")(folder) == 0 and command("cache", "verify")(folder) == 0
        assert cache_of(cache) == plain["items"], "what was lost is there again"
        capsys.readouterr()


def gone(path: Path) -> None:
    path.unlink()


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 40)


def flipped(path: Path) -> None:
    flip(path, 8 * path.stat().st_size - 3)


LATER = {"vae_cache_ondemand": True, "text_cache_ondemand": True}


@pytest.mark.parametrize("harm, settings", [(gone, {}), (cut, {}), (flipped, {}), (flipped, LATER)])
def test_what_is_damaged_while_it_trains_is_made_again(data: Path, plain, tmp_path, monkeypatch, harm, settings):
    """Every shard of the caches, after the second step; steps that were loaded ahead by then are the same anyway."""
    monkeypatch.setattr(shards, "_OPEN_FILES", 0)  # one that is open can be read after it was removed
    shutil.copytree(plain["cache"], tmp_path / "output/cache")
    harmed: list[Path] = []

    def then(event: Event) -> None:
        if isinstance(event, Stepped) and event.progress.step == 2:
            harmed.extend(sorted((tmp_path / "output/cache").rglob("shard-*.safetensors")))
            for path in harmed:
                harm(path)

    loaded = run_of(data, tmp_path, **settings)
    run(loaded, sinks=[Heard(then)])
    assert differences(plain["outcome"], outcome(loaded)) == []
    assert len(harmed) > 8 and "is made again now" in said(loaded)
    if harm is flipped:
        assert len(list((tmp_path / "output/cache").rglob("*.bad"))) >= 3


def test_what_cannot_be_made_again_ends_the_run_and_says_both(data: Path, plain, tmp_path: Path, capsys):
    shutil.copytree(data, tmp_path / "data")
    shutil.copytree(plain["cache"], tmp_path / "output/cache")

    def then(event: Event) -> None:
        if isinstance(event, Stepped) and event.progress.step == 2:
            shutil.rmtree(tmp_path / "data/squares")
            for path in (tmp_path / "output/cache/vae/d0").glob("shard-*.safetensors"):
                flipped(path)

    with pytest.raises(UserError) as told:
        run(run_of(tmp_path / "data", tmp_path), sinks=[Heard(then)])
    text = str(told.value)
    assert "is damaged: an item does not match its checksum" in text and "was there and is gone now" in text


# ---- gone, shut, full ----


def test_a_cache_folder_that_vanishes_ends_the_run_with_its_name(data: Path, plain, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(shards, "_OPEN_FILES", 0)
    shutil.copytree(plain["cache"], tmp_path / "cache")

    def then(event: Event) -> None:
        if isinstance(event, Stepped) and event.progress.step == 2:
            (tmp_path / "cache").rename(tmp_path / "unplugged")

    settings = {"cache_dir": str(tmp_path / "cache"), "max_train_steps": 30, "checkpoint_step_interval": 1}
    loaded = run_of(data, tmp_path, **settings)
    with pytest.raises(UserError, match=r"this cache folder is gone\n.*start again"):
        run(loaded, sinks=[Heard(then)])
    assert not (tmp_path / "cache").exists(), "nothing was made in its place"
    (tmp_path / "unplugged").rename(tmp_path / "cache")
    heard = Heard()
    run(loaded, sinks=[heard])
    assert heard.encoded == {} and heard.of(Stepped)[0].progress.step > 2


def test_pictures_that_vanish_end_it_and_are_not_left_out(data: Path, tmp_path: Path):
    shutil.copytree(data, tmp_path / "data")
    done: list[int] = []

    def then(event: Event) -> None:
        if isinstance(event, Stepped) and event.progress.step == 2:
            shutil.rmtree(tmp_path / "data")
        done.append(1)

    loaded = run_of(tmp_path / "data", tmp_path, vae_cache_disable=True, max_train_steps=40)
    with pytest.raises(UserError, match="the folder of the pictures was there and is gone now"):
        run(loaded, sinks=[Heard(then)])
    assert done


def test_a_full_disk_is_told_and_leaves_whole_caches(data: Path, plain, tmp_path: Path):
    run_of(data, tmp_path, cache_dir=str(tmp_path / "disk"))
    verify, train = command("cache", "verify"), command("train")

    def life() -> int:
        small_disk(tmp_path / "disk", 40_960)
        assert train(tmp_path) == 1
        assert verify(tmp_path) == 0, "what is there is whole"
        assert shards.scan(tmp_path / "disk/text").items, "and what fitted is there"
        assert not list((tmp_path / "disk").rglob(".writing-*"))
        small_disk(tmp_path / "disk", 4_000_000)
        assert train(tmp_path) == 0
        assert verify(tmp_path) == 0 and cache_of(tmp_path / "disk") == plain["items"]
        return 0

    child = with_own_mounts(life, tmp_path / "console.txt")
    assert child.wait() == 0, child
    told = str(child)
    assert "cannot be written: No space left on device" in told and "make room on the disk" in told
    assert "Traceback" not in told


def test_a_read_only_cache_is_enough_when_all_is_there(data: Path, plain, tmp_path: Path):
    shutil.copytree(plain["cache"], tmp_path / "shut")
    run_of(data, tmp_path, cache_dir=str(tmp_path / "shut"))

    def life() -> int:
        read_only(tmp_path / "shut")
        for words in (["cache", "verify"], ["cache", "stats"], ["cache", "warm"], ["train"]):
            assert command(*words)(tmp_path) == 0, words
        assert command("train", "--resolution", "40", "--restart")(tmp_path) == 1
        assert command("cache", "gc", "--resolution", "40", "--yes")(tmp_path) == 1
        return 0

    child = with_own_mounts(life, tmp_path / "console.txt")
    assert child.wait() == 0, child
    assert str(child).count("cannot be written: Read-only file system") == 2 and "make it writable" in str(child)
    assert cache_of(tmp_path / "shut") == plain["items"]


def test_a_read_only_cache_that_is_damaged_is_never_trained_on(data: Path, plain, tmp_path: Path):
    shutil.copytree(plain["cache"], tmp_path / "shut")
    for path in (tmp_path / "shut/vae/d0").glob("shard-*.safetensors"):
        flipped(path)
    run_of(data, tmp_path, cache_dir=str(tmp_path / "shut"))

    def life() -> int:
        read_only(tmp_path / "shut")
        assert command("cache", "verify")(tmp_path) == 1
        return command("train")(tmp_path)

    child = with_own_mounts(life, tmp_path / "console.txt")
    assert child.wait() == 1, child
    assert "an item does not match its checksum" in str(child) and "Read-only file system" in str(child)


# ---- shared ----


def test_two_runs_on_one_cache(data: Path, plain, tmp_path: Path):
    """Both at once from nothing, one on top of the other: the same as alone, and between them little is made twice."""

    def life(name: str) -> Callable[[], None]:
        def live() -> None:
            heard = Heard()
            settings = {"cache_dir": str(tmp_path / "cache"), "vae_batch_size": 1, "write_batch_size": 1}
            run(run_of(data, tmp_path / name, **settings), sinks=[heard])

        return live

    children = [Child(life(name), tmp_path / f"{name}.txt") for name in ("one", "two")]
    assert [child.wait() for child in children] == [0, 0], children
    for name in ("one", "two"):
        alone = {key: value for key, value in plain["outcome"].items() if key.startswith("line")}
        lines = metrics_of(tmp_path / name / "output")
        assert differences(alone, {f"line {number}": line for number, line in enumerate(lines, start=1)}) == []
    assert cache_of(tmp_path / "cache") == plain["items"]


def test_a_run_beside_gc_goes_on(data: Path, plain, tmp_path: Path, capsys):
    """Somebody clears the cache of a run that trains: whatever it still needs it makes again."""
    shutil.copytree(plain["cache"], tmp_path / "cache")
    loaded = run_of(data, tmp_path, cache_dir=str(tmp_path / "cache"))
    other = small_run(tmp_path / "other", {"instance_data_dir": str(data / "wide")}, cache_dir=str(tmp_path / "cache"))

    def then(event: Event) -> None:
        if isinstance(event, Stepped) and event.progress.step == 2:
            assert exit_code(["cache", "gc", "--config", str(other.path), "--yes"]) == 0

    run(loaded, sinks=[Heard(then)])
    assert differences(plain["outcome"], outcome(loaded)) == []


# ---- stopped and killed ----


def test_asked_to_stop_warming_leaves_what_was_made(data: Path, plain, tmp_path: Path):
    def life() -> int:
        def then(event: Event) -> None:
            if isinstance(event, CacheProgress) and event.cache == "latents of d0" and event.done >= 2:
                os.kill(os.getpid(), signal.SIGTERM)

        loaded = run_of(data, tmp_path)
        try:
            warm(loaded, sinks=[Heard(then)])
        except BaseException as error:  # noqa: BLE001  whatever it is, its code is what counts
            return vars(type(error)).get("exit_code", None).fget(error)
        return 0

    child = Child(life, tmp_path / "console.txt")
    assert child.wait() == 143, child
    kept = cache_of(tmp_path / "output/cache")
    assert 0 < len(kept) < len(plain["items"]) and all(plain["items"][key] == item for key, item in kept.items())
    heard = Heard()
    warm(run_of(data, tmp_path), sinks=[heard])
    assert cache_of(tmp_path / "output/cache") == plain["items"]
    assert sum(heard.encoded.values()) == len(plain["items"]) - len(kept)


ITEMS = 60


def embedding(text: str) -> torch.Tensor:
    """What an encoder makes of a caption: always the same."""
    return torch.randn(5, 64, generator=torch.Generator().manual_seed(int(text)))


class Author:
    """A process that fills a cache slowly and writes down what it encodes."""

    def __init__(self, cache: Path, log: Path, number: int):
        self.log = log.with_name(f"{log.name}-{number}")

        def life() -> None:
            def encode(texts: list[str]) -> list[torch.Tensor]:
                with open(self.log, "a", encoding="utf-8") as file:
                    file.write("".join(f"{text}\n" for text in texts))
                time.sleep(0.0004)
                return [embedding(text) for text in texts]

            captions = {f"{number:032x}": str(number) for number in range(ITEMS)}
            fill_text(TensorCache(cache, write_batch_size=3), captions, encode, 2, lambda *_: None)

        self.child = Child(life, log.with_name("console.txt"))

    def encoded(self) -> list[str]:
        return self.log.read_text(encoding="utf-8").split() if self.log.exists() else []


@pytest.mark.parametrize("writers", [1, 2])
def test_killed_at_any_moment_while_caching_nothing_is_lost_or_made_twice(tmp_path: Path, full: bool, writers: int):
    luck, kills, starts = random.Random(writers), 0, 0
    wanted = (KILLS_IN_FULL if full else KILLS) // 2
    while kills < wanted:
        folder, committed = tmp_path / f"cache {starts}", set[str]()
        for _ in range(8):
            starts += 1
            before = set(shards.scan(folder).items) if folder.exists() else set()
            assert committed <= before, "what was committed stays"
            committed = before
            authors = [Author(folder, tmp_path / f"{starts}", number) for number in range(writers)]
            time.sleep(luck.uniform(0.002, 0.06))
            for author in authors:
                kills += author.child.running
                author.child.send(signal.SIGKILL)
            ended = {author.child.wait() for author in authors}
            assert ended <= {0, -signal.SIGKILL}, authors[0].child
            again = {f"{int(text):032x}" for author in authors for text in author.encoded()}
            assert not again & committed, "nothing that was committed is encoded again"
            assert not shards.scan(folder).torn
        last = Author(folder, tmp_path / f"last {starts}", 0)
        assert last.child.wait() == 0, last.child
        cache = TensorCache(folder)
        assert len(cache) == ITEMS and shards.verify(folder) == []
        assert all(torch.equal(cache.get(f"{number:032x}"), embedding(str(number))) for number in range(ITEMS))
        with shards.Writer(folder):
            assert not list(folder.glob(".writing-*")), "leftovers go with the next writer"
    print(f"{kills} kills of {writers} writers in {starts} starts")
