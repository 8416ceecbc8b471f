"""What is encoded before training and while it goes on; whole runs are in journeys/test_caches.py."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from sana_tune.caching import (
    Supply,
    broken_among,
    encode_finite,
    encode_pictures,
    encode_texts,
    open_caches,
    redraw_of,
    tell_cut,
    vae_of,
)
from sana_tune.drawing import painter_of
from sana_tune.errors import UserError
from sana_tune.log import log
from sana_tune.model.sana import load_text_encoder, load_vae
from sana_tune.output import Output
from sana_tune.prepare import Prepared, prepare
from sana_tune.run import warm
from sana_tune.watch.sinks import Watcher
from tests.journeys.kit import Heard, cache_of, one_thread, pictures, small_run

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def prepared_in(folder: Path, *datasets: dict[str, Any], **settings: Any) -> Prepared:
    if not (folder / "pictures").exists():
        pictures(folder / "pictures", 4)
    return prepare(small_run(folder, *datasets, **settings), Output.open(folder / "output"))


def pixels(count: int) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


def test_tiles_are_for_what_asks_for_them_alone(tmp_path: Path):
    """Encoding and drawing each have a key of their own, and neither is on unasked."""
    asked = {"": (False, False), "vae_tiled_encoding": (True, False), "vae_enable_tiling": (False, True)}
    for name, (encodes, draws) in asked.items():
        prepared = prepared_in(tmp_path / (name or "none"), **({name: True} if name else {}))
        coder, painter = vae_of(prepared, CPU), painter_of(prepared, CPU)
        assert (coder.tiled_encoding, coder.tiled_decoding, painter.tiled) == (encodes, False, draws)
        drawer = painter._loaded()
        assert (drawer.tiled_encoding, drawer.tiled_decoding) == (False, draws)


# ---- latents that are not finite ----


@pytest.mark.parametrize("bad", [(1,), (0, 2), (0, 1, 2)])
def test_what_is_not_finite_in_a_small_dtype_is_made_again_in_fp32(tmp_path: Path, caplog, monkeypatch, bad):
    """The VAE's first layer overflows for some pictures, but only in bf16."""
    monkeypatch.setattr(log, "propagate", True)
    coder = load_vae(prepared_in(tmp_path).folder, CPU)
    good = torch.stack(cast(list[torch.Tensor], encode_finite(coder, pixels(3))))
    whole = {name: one.clone() for name, one in coder.vae.state_dict().items()}
    module = cast(torch.nn.Module, coder.vae)
    module.to(torch.bfloat16)
    marked = pixels(3)[list(bad), 0, 0]

    def overflow(layer: Any, inputs: tuple[torch.Tensor, ...], out: torch.Tensor) -> torch.Tensor:
        if out.dtype == torch.bfloat16:
            for place, picture in enumerate(inputs[0]):
                first = ((picture[:, 0, 0].float() + 1) * 127.5).round().byte().numpy()
                if any(np.abs(first.astype(int) - one).max() <= 1 for one in marked.astype(int)):
                    out[place] = torch.inf
        return out

    hook = coder.vae.encoder.conv_in.register_forward_hook(overflow)
    with caplog.at_level("WARNING", "sana_tune"):
        latents = cast(list[torch.Tensor], encode_finite(coder, pixels(3)))
    hook.remove()
    assert all(torch.isfinite(latent).all() for latent in latents)
    assert f"{len(bad)} pictures had latents that were not finite" in caplog.text
    assert coder.vae.dtype == torch.bfloat16, "afterwards it computes as before"
    for place, latent in enumerate(latents):
        assert latent.dtype == torch.float32 and torch.allclose(latent, good[place], rtol=0.1, atol=0.1)
    assert set(whole) == set(coder.vae.state_dict())


def test_what_is_not_finite_in_fp32_either_is_none(tmp_path: Path):
    coder = load_vae(prepared_in(tmp_path).folder, CPU)

    def broken(layer: Any, inputs: tuple[torch.Tensor, ...], out: torch.Tensor) -> torch.Tensor:
        out[-1] = torch.nan  # the last picture of each batch
        return out

    coder.vae.encoder.conv_in.register_forward_hook(broken)
    latents = encode_finite(coder, pixels(1))
    assert latents == [None]


# ---- before training ----


def test_pictures_that_were_decoded_once_are_known_to_be_sound(tmp_path: Path):
    prepared = prepared_in(tmp_path, vae_cache_disable=True)
    heard = Heard()
    records = prepared.survey.records
    assert broken_among(prepared, records, Watcher([heard])) == {} and heard.encoded
    again = Heard()
    (tmp_path / "pictures/p01.png").unlink()
    assert broken_among(prepared, records, Watcher([again])) == {} and not again.encoded, "nothing is read again"


def test_also_fills_what_is_else_filled_on_demand(tmp_path: Path):
    prepared = prepared_in(tmp_path, vae_cache_ondemand=True, text_cache_ondemand=True)
    caches, heard = open_caches(prepared), Heard()
    encode_texts(prepared, caches, CPU, Watcher([heard]))
    assert encode_pictures(prepared, caches, CPU, Watcher([])) == {} and heard.encoded == {} and not len(caches.text)
    names = (*caches.texts, *caches.latents)
    encode_texts(prepared, caches, CPU, Watcher([heard]), also=names)
    encode_pictures(prepared, caches, CPU, Watcher([heard]), also=names)
    assert heard.encoded == {"text": 5, "latents of d0": 4}


def test_entries_that_share_a_folder_share_a_cache_and_torn_files_are_set_aside(tmp_path: Path, caplog, monkeypatch):
    pictures(tmp_path / "pictures", 4)
    entries = [
        {"instance_data_dir": str(tmp_path / "pictures"), "cache_dir_vae": str(tmp_path / "vae"), "resolution": size}
        for size in (32, 40)
    ]
    warm(small_run(tmp_path, *entries))
    prepared = prepared_in(tmp_path, *entries)
    caches = open_caches(prepared)
    assert caches.latents["d0"] is caches.latents["d1"] and len(caches.latents["d0"]) == 8
    path = next((tmp_path / "vae").glob("shard-*.safetensors"))
    os.truncate(path, 40)
    monkeypatch.setattr(log, "propagate", True)
    with caplog.at_level("WARNING", "sana_tune"):
        open_caches(prepared)
    assert f"{path}: this cache file is damaged: it is cut off" in caplog.text and not path.exists()


def test_redraw_is_of_the_datasets_that_ask_for_it(tmp_path: Path):
    crop = {"crop": True, "crop_style": "random", "instance_data_dir": str(tmp_path / "pictures")}
    pictures(tmp_path / "pictures", 4, (40, 32))
    prepared = prepared_in(tmp_path, crop, {**crop, "vae_cache_clear_each_epoch": True})
    assert redraw_of(prepared).datasets == {"d1"}


def test_captions_that_are_cut_are_counted(tmp_path: Path, caplog, monkeypatch):
    monkeypatch.setattr(log, "propagate", True)
    encoder = load_text_encoder(prepared_in(tmp_path).folder, CPU, instruction="")
    with caplog.at_level("WARNING", "sana_tune"):
        tell_cut(encoder, ["short", "long " * 400])
    assert "1 captions are longer than 300 tokens" in caplog.text


# ---- while training ----


def test_no_room_for_an_encoder_is_told(tmp_path: Path, monkeypatch):
    prepared = prepared_in(tmp_path)

    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr("sana_tune.model.sana.load_vae", full)
    with pytest.raises(UserError, match="there is no room in the device's memory for the VAE"):
        encode_pictures(prepared, open_caches(prepared), CPU, Watcher([]))


def test_a_supply_makes_what_is_asked_for_and_frees_its_encoders(tmp_path: Path):
    whole = tmp_path / "whole"
    pictures(tmp_path / "pictures", 4)
    data = {"instance_data_dir": str(tmp_path / "pictures")}
    warm(small_run(whole, data))
    prepared = prepared_in(tmp_path, data, vae_cache_ondemand=True, text_cache_disable=True)
    supply = Supply(prepared, open_caches(prepared), redraw_of(prepared), CPU, Watcher([]))
    supply.enter(0, 0)
    expected = {key.split("/")[-1]: item for key, item in cache_of(whole / "output/cache").items()}
    for record in prepared.survey.records:
        key = prepared.keys.latent(record)
        assert supply.reading.latents["d0"].get(key).numpy().tobytes() == expected[key][2]
        (caption,) = record.captions
        text = supply.reading.text.get(prepared.keys.text(caption))
        assert text.shape == expected[prepared.keys.text(caption)][1]
    supply.close()
    assert len(cache_of(tmp_path / "output/cache")) == 4, "latents are kept, texts are not"
    with pytest.raises(UserError, match="has no item"):
        supply.reading.latents["d0"].get("0" * 32)
