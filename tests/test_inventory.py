"""What the caches hold: counted, verified, cleared and explained, on a run whose caches were filled once."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from sana_tune.data import shards
from sana_tune.errors import UserError
from sana_tune.inventory import Made, Stock, explain, shelves, stock, surveyed, sweep, verified, wanted
from sana_tune.output import Output
from sana_tune.run import warm
from tests.data.pictures import put
from tests.journeys.kit import cache_of, one_thread, pictures, small_run

WIDE: dict[str, Any] = {"crop": True, "crop_style": "random", "crop_aspect": "square"}


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four pictures in one dataset, two of another size in a second one; all is cached."""
    folder = tmp_path_factory.mktemp("inventory")
    pictures(folder / "a", 4)
    pictures(folder / "b", 2, (64, 32), seed=1)
    (folder / "a" / "torn.png").write_bytes(b"\x89PNG")
    (folder / "a" / "torn.txt").write_text("torn")
    with one_thread():
        warm(run_in(folder))
    return folder


@pytest.fixture
def place(filled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, which is the working directory."""
    shutil.copytree(filled, tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run")
    return tmp_path / "run"


def run_in(folder: Path, **settings: Any):
    datasets = [{"instance_data_dir": str(folder / "a")}, {"instance_data_dir": str(folder / "b"), **WIDE}]
    return small_run(folder, *datasets, **settings)


def stocks(folder: Path, **settings: Any) -> dict[str, Stock]:
    loaded = run_in(folder, **settings)
    needed = wanted(surveyed(loaded))
    found = [stock(shelf, needed[shelf.folder.absolute()]) for shelf in shelves(loaded, Output(folder / "output"))]
    return {one.titles[0]: one for one in found}


def counts(folder: Path, **settings: Any) -> dict[str, tuple[int, int, int]]:
    """Title → items, hits, misses."""
    return {title: (one.items, one.hits, one.misses) for title, one in stocks(folder, **settings).items()}


def explained(folder: Path, name: str, **settings: Any) -> dict[str, Made]:
    (one,) = explain(surveyed(run_in(folder, **settings)), name)
    return {made.what: made for made in one.made}


def spoil(folder: Path) -> str:
    """Turn over one bit of the only shard's last item. Answers the file."""
    (path,) = folder.glob("shard-*.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    return path.name


# ---- stats ----


def test_what_is_there_and_what_is_needed(place: Path):
    assert counts(place) == {"text": (7, 7, 0), "latents of d0": (4, 4, 0), "latents of d1": (2, 2, 0)}
    assert counts(place, seed=99)["latents of d1"] == (2, 0, 2), "other random crops"
    assert counts(place, resolution=40)["latents of d0"] == (4, 0, 4)
    drawn = counts(place, validation_disable=False, validation_prompt="a star", validation_negative_prompt="ugly")
    assert drawn["text"] == (7, 7, 2), "the prompt, and the negative one without the instruction"
    assert counts(place, vae_cache_disable=True) == counts(place), "what would be needed if it were kept"
    one = stocks(place)["latents of d0"]
    assert one.files == 1 and not (one.damaged or one.set_aside or one.foreign or one.busy or one.idle_items)
    assert one.bytes == sum(path.stat().st_size for path in Path(one.folder).glob("*.safetensors"))


def test_damage_and_strangers_are_named(place: Path):
    folder = place / "output/cache/vae/d0"
    (name,) = [path.name for path in folder.glob("*.safetensors")]
    (folder / "mine.safetensors").write_bytes(b"mine")
    os.truncate(folder / name, 60)
    with shards.Writer(folder, torn=()):
        one = stocks(place)["latents of d0"]
    assert list(one.damaged) == [name] and one.foreign == ("mine.safetensors",) and one.busy and one.misses == 4
    with shards.Writer(folder):
        pass
    assert stocks(place)["latents of d0"].set_aside == (f"{name}.bad",)


def test_a_folder_that_several_caches_share_is_one(place: Path):
    loaded = run_in(place, cache_dir_vae=None)
    together = small_run(
        place,
        *[{"instance_data_dir": str(place / name), "cache_dir_vae": str(place / "shared")} for name in "ab"],
    )
    assert [shelf.titles for shelf in shelves(together, Output(place / "output"))] == [
        ("text",), ("latents of d0", "latents of d1"),
    ]  # fmt: skip
    assert len(shelves(loaded, Output(place / "output"))) == 3


def test_a_model_that_is_not_here_is_not_downloaded(place: Path):
    name = "Efficient-Large-Model/Sana_600M_1024px_diffusers"
    with pytest.raises(UserError, match=r"this model is not on this machine.*\n.*cache warm"):
        surveyed(run_in(place, pretrained_model_name_or_path=name))


# ---- verify ----


def test_verifying_names_the_pictures_whose_latents_are_lost(place: Path):
    shelf = shelves(run_in(place), Output(place / "output"))[1]
    assert verified(shelf) == (4, [])
    name = spoil(shelf.folder)
    items, ((damage, pictures_lost),) = verified(shelf)
    assert items == 4 and damage.file == name and len(pictures_lost) == 1 and pictures_lost[0].startswith("p0")


# ---- gc ----


def test_sweeping_removes_what_is_not_needed_and_what_is_damaged(place: Path):
    before = cache_of(place / "output/cache")
    with one_thread():
        warm(run_in(place, resolution=40))
    loaded = run_in(place)
    needed = wanted(surveyed(loaded))
    all_shelves = shelves(loaded, Output(place / "output"))
    swept = {shelf.titles[0]: sweep(shelf, needed[shelf.folder.absolute()]) for shelf in all_shelves}
    assert {title: one.items for title, one in swept.items()} == {"text": 0, "latents of d0": 4, "latents of d1": 2}
    assert cache_of(place / "output/cache") == before
    spoil(place / "output/cache/text")
    with shards.Writer(place / "output/cache/text") as writer:
        writer.mend(next((place / "output/cache/text").glob("shard-*.safetensors")).name)
    again = sweep(all_shelves[0], needed[all_shelves[0].folder.absolute()])
    assert (again.items, again.files) == (0, 1) and again.bytes > 0
    assert len(cache_of(place / "output/cache")) == len(before) - 1
    assert sweep(all_shelves[0], ()).items == 6 and not list((place / "output/cache/text").glob("*.safetensors"))


def test_a_cache_that_is_written_to_is_not_swept(place: Path):
    shelf = shelves(run_in(place), Output(place / "output"))[0]
    with shards.Writer(shelf.folder), pytest.raises(UserError, match="another run is writing into this cache folder"):
        sweep(shelf, ())
    shutil.rmtree(shelf.folder)
    assert sweep(shelf, ()).items == 0


def test_with_new_crops_each_epoch_a_fresh_run_needs_those_of_the_first(place: Path):
    assert counts(place, vae_cache_clear_each_epoch=True)["latents of d1"] == (2, 2, 0)


# ---- explain ----


@pytest.mark.parametrize("name", ["a/p01.png", "p01.png", "d0/p01.png", "a/p01.txt", "p01.txt"])
def test_a_picture_is_found_by_its_names(place: Path, name: str):
    found = explain(surveyed(run_in(place)), name)
    assert {(one.dataset, one.key) for one in found} >= {("d0", "p01.png")}
    assert len(found) == (1 if "/" in name else 2), "both datasets have a p01.png"
    (latent, caption) = found[0].made
    assert (latent.state, caption.state) == ("hit", "hit") and latent.file and "checksum right" in latent.why
    assert dict(latent.parts)["resized to"] == "32x32" and dict(caption.parts)["caption"] == "'p 1 of a, line 0'"
    assert json.loads(json.dumps(asdict(found[0])))["made"][0]["key"] == latent.key


def test_a_picture_that_is_left_out_or_unknown(place: Path):
    (one,) = explain(surveyed(run_in(place)), "torn.png")
    assert one.left_out and not one.made
    with pytest.raises(UserError, match=r"no picture of the datasets is called so .d0: .*; d1: "):
        explain(surveyed(run_in(place)), "nothing.png")


def test_why_it_misses(place: Path):
    def latent(name: str, **settings: Any) -> str:
        made = explained(place, name, **settings)["latent"]
        assert made.state == "miss"
        return made.why

    assert latent("a/p00.png", resolution=40) == "there is one of this picture, but of another size and another crop"
    assert latent("b/p00.png", seed=3) == "there is one of this picture, but of another crop"
    put(place / "a", "p02.png", 32, 32, seed=77)
    assert latent("a/p02.png") == "there is one of this picture, but of other bytes: the file was changed since"
    put(place / "a", "p09.png", 32, 32, seed=78, caption="a new one")
    assert latent("a/p09.png") == "it was never made here"
    assert explained(place, "a/p09.png")["caption 1"].why.startswith("this caption was never encoded here")
    plain = explained(place, "a/p00.png", sana_complex_human_instruction="None")
    assert plain["latent"].state == "hit"
    assert plain["caption 1"].why.endswith("of another encoder, tokenizer or instruction")
    (path,) = (place / "output/cache/vae/d0").glob("shard-*.safetensors")
    os.truncate(path, 60)
    assert latent("a/p00.png") == "nothing is in this cache yet; or it was lost: 1 files here are damaged"
    none = explained(place, "a/p00.png", vae_cache_disable=True)
    assert none["latent"].state == "not kept" and none["caption 1"].state == "hit"


def test_a_damaged_item_is_said_to_be(place: Path):
    spoil(place / "output/cache/vae/d0")
    states = [explained(place, f"a/p0{number}.png")["latent"].state for number in range(4)]
    assert sorted(states) == ["damaged", "hit", "hit", "hit"]
