"""`sana_tune cache …` from the command line: what is said, as text and as JSON, exit codes, and mistakes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sana_tune.cli.main import exit_code
from tests.data.pictures import put
from tests.journeys.kit import one_thread, pictures, small_run


@pytest.fixture(scope="module")
def warmed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("warmed")
    pictures(folder / "pictures", 3)
    small_run(folder)
    with one_thread():
        assert exit_code(["cache", "warm", "--config", str(folder / "config.json")]) == 0
    return folder


@pytest.fixture
def place(warmed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> Iterator[Path]:
    """A copy of a run whose caches are full; the working directory."""
    shutil.copytree(warmed, tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run")
    small_run(tmp_path / "run")
    capsys.readouterr()
    with one_thread():
        yield tmp_path / "run"


def shard(place: Path, cache: str = "vae/d0") -> Path:
    (path,) = (place / "output/cache" / cache).glob("shard-*.safetensors")
    return path


def spoil(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 4
    path.write_bytes(data)


def said(capsys) -> str:
    return capsys.readouterr().out


def test_warm_makes_all_and_a_second_time_nothing(tmp_path: Path, monkeypatch, capsys):
    pictures(tmp_path / "pictures", 3)
    monkeypatch.chdir(tmp_path)
    small_run(tmp_path, vae_cache_ondemand=True)
    with one_thread():
        assert exit_code(["cache", "warm"]) == 0
        text = said(capsys)
        assert "Caching captions: 4 of 4 (100 %)" in text and "Caching latents of d0: 3 of 3 (100 %)" in text
        assert "images/s" in text and "The caches hold all that can be kept before training" in text
        assert exit_code(["cache", "warm"]) == 0
    assert "Caching" not in said(capsys)
    assert not (tmp_path / "output/plan.json").exists() and not list((tmp_path / "output").glob("checkpoint*"))


def test_warm_names_broken_pictures_and_with_strict_ends(place: Path, capsys):
    path = put(place / "pictures", "torn.png", 64, 64, seed=5, caption="torn")
    path.write_bytes(path.read_bytes()[:-60])
    assert exit_code(["cache", "warm"]) == 0
    text = said(capsys)
    assert "left out: d0/torn.png (is damaged" in text and "1 pictures were left out" in text
    assert exit_code(["cache", "warm", "--strict", "true"]) == 1
    assert "strict is on, and 1 picture would be left out: torn.png" in capsys.readouterr().err


def test_warm_on_a_disk_without_room_begins_nothing(place: Path, monkeypatch, capsys):
    monkeypatch.setattr("sana_tune.prepare.free_bytes", lambda path: 100)
    assert exit_code(["cache", "warm"]) == 0, "there is nothing to make"
    assert exit_code(["cache", "warm", "--resolution", "40"]) == 1
    assert "GB more; 0.0 GB are free" in capsys.readouterr().err


def test_stats(place: Path, capsys):
    assert exit_code(["cache", "stats"]) == 0
    text = said(capsys)
    assert f"text: {place}/output/cache/text\n  4 items in 1 files" in text
    assert "this run needs 3: 3 there, 0 to make" in text and "are of no use" not in text
    assert exit_code(["cache", "stats", "--resolution", "40", "--json"]) == 0
    texts, latents = json.loads(said(capsys))
    assert (texts["hits"], texts["misses"], texts["idle_items"]) == (4, 0, 0)
    assert (latents["titles"], latents["needed"], latents["hits"], latents["idle_items"]) == (
        ["latents of d0"],
        3,
        0,
        3,
    )
    os.truncate(shard(place), 30)
    (place / "output/cache/vae/d0/other.safetensors").touch()
    assert exit_code(["cache", "stats"]) == 0
    text = said(capsys)
    assert f"damaged: {shard(place).name}: it is cut off" in text and "not ours, left alone: other.safetensors" in text


def test_verify_and_set_aside(place: Path, capsys):
    assert exit_code(["cache", "verify"]) == 0
    assert said(capsys) == "ok: 7 items, every one as it was written\n"
    path = shard(place)
    spoil(path)
    assert exit_code(["cache", "verify", "--json"]) == 1
    found = json.loads(said(capsys))
    assert not found["ok"] and found["items"] == 7
    assert found["damaged"] == [
        {"folder": str(path.parent), "file": path.name, "items": ["p02.png"],
         "what": "1 of its 3 items do not match their checksums"},
    ]  # fmt: skip
    assert exit_code(["cache", "verify"]) == 1 and path.exists()
    assert f"damaged: {path}: 1 of its 3 items do not match their checksums (p02.png)" in said(capsys)
    assert exit_code(["cache", "verify", "--set-aside"]) == 1 and not path.exists()
    assert "set aside" in said(capsys)
    assert exit_code(["cache", "verify"]) == 0
    assert exit_code(["cache", "stats"]) == 0
    assert f"this run needs 3: 2 there, 1 to make\n  set aside because damaged: {path.name}.bad" in said(capsys)
    assert exit_code(["cache", "warm"]) == 0
    assert "Caching latents of d0: 1 of 1" in said(capsys)


def test_gc_says_first_and_removes_when_told_to(place: Path, capsys):
    assert exit_code(["cache", "gc"]) == 0
    assert said(capsys).startswith("nothing to remove")
    before = shard(place).read_bytes()
    assert exit_code(["cache", "gc", "--resolution", "40"]) == 0
    text = said(capsys)
    assert "latents of d0" in text and "to be removed: 3 items" in text and "add --yes" in text
    assert shard(place).read_bytes() == before
    (place / "keep.json").write_bytes((place / "config.json").read_bytes())
    assert exit_code(["cache", "gc", "--resolution", "40", "--keep", "keep.json", "--yes"]) == 0
    assert said(capsys).startswith("nothing to remove") and shard(place).read_bytes() == before
    assert exit_code(["cache", "gc", "--resolution", "40", "--yes"]) == 0
    assert "removed: 3 items" in said(capsys) and not list((place / "output/cache/vae/d0").glob("*.safetensors"))


def test_gc_removes_damaged_files(place: Path, capsys):
    os.truncate(shard(place), 30)
    assert exit_code(["cache", "gc"]) == 0
    assert "to be removed: 1 damaged file" in said(capsys)
    assert exit_code(["cache", "gc", "--yes"]) == 0
    assert "removed: 1 damaged file" in said(capsys)
    assert [path.name for path in (place / "output/cache/vae/d0").iterdir() if path.name[0] != "."] == []


def test_explain(place: Path, capsys):
    assert exit_code(["cache", "explain", "pictures/p01.png"]) == 0
    text = said(capsys)
    assert text.startswith(f"d0/p01.png ({place}/pictures/p01.png)\n\n  latent: hit: ")
    assert "caption 1: hit: " in text and "(weights of the VAE, fp32, scaled, untiled)" in text
    assert exit_code(["cache", "explain", "p01.png", "--resolution", "40", "--json"]) == 0
    (one,) = json.loads(said(capsys))
    assert [made["state"] for made in one["made"]] == ["miss", "hit"]
    (place / "pictures/bad.png").write_bytes(b"\x89PNG")
    (place / "pictures/bad.txt").write_text("bad")
    assert exit_code(["cache", "explain", "bad.png"]) == 1
    assert "left out: " in said(capsys)


@pytest.mark.parametrize(
    "words, told",
    [
        (["explain", "p77.png"], "p77.png: no picture of the datasets is called so (d0: "),
        (["explain"], "Missing argument"),
        (["gc", "--keep", "none.json"], "--keep: none.json does not exist"),
        (["stats", "--resolutio", "40"], "did you mean resolution?"),
        (["verify", "--config", "none.json"], "none.json does not (looked in "),
        (["stats", "--pretrained_model_name_or_path", "Efficient-Large-Model/Sana_600M_1024px_diffusers"],
         "this model is not on this machine"),
        (["warm", "--cache_dir", "config.json"], "there is a file in its place"),
        (["clean"], "No such command 'clean'"),
    ],
)  # fmt: skip
def test_mistakes(place: Path, capsys, words: list[str], told: str):
    assert exit_code(["cache", *words]) == 1
    text = capsys.readouterr().err
    assert told in text and "Traceback" not in text


def test_ctrl_c_ends_with_its_code(place: Path, monkeypatch, capsys):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sana_tune.data.shards.scan", interrupted)
    for words in (["verify"], ["stats"], ["gc"], ["explain", "p00.png"]):
        assert exit_code(["cache", *words]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_all_but_warm_do_without_torch(place: Path):
    """So they answer at once."""
    script = (
        "import sys; from sana_tune.cli.main import exit_code\n"
        "for words in (['stats'], ['verify'], ['explain', 'p00.png'], ['gc']):\n"
        "    assert exit_code(['cache', *words]) == 0\n"
        "assert 'torch' not in sys.modules"
    )
    root = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((root, os.environ.get("PYTHONPATH", "")))}
    ran = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
