"""Identities of encoders: they follow what is computed, and files are hashed once."""

from __future__ import annotations

import json
import os
import shutil

import pytest

from sana_tune.model.identity import component_identity, is_remembered, latent_identity, text_identity
from tests.fixtures import cached_sana


@pytest.fixture
def model(tmp_path):
    return shutil.copytree(cached_sana(), tmp_path / "model")


def test_identity_follows_weights_and_config(model):
    before = latent_identity(model)
    assert before == latent_identity(cached_sana()), "a copy is the same"
    path = model / "vae/diffusion_pytorch_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    other = latent_identity(model)
    assert other != before
    config = json.loads((model / "vae/config.json").read_text())
    (model / "vae/config.json").write_text(json.dumps({**config, "scaling_factor": 0.5}))
    assert latent_identity(model) not in (before, other)


def test_identity_follows_how_it_is_encoded(model):
    assert latent_identity(model) != latent_identity(model, dtype="bf16")
    assert latent_identity(model) != latent_identity(model, tiled=True)
    texts = {
        text_identity(model, instruction=instruction, dtype=dtype)
        for instruction in ("", "Draw: ")
        for dtype in ("fp32", "bf16", "stored", "stored, nf4-bnb")
    }
    assert len(texts) == 8
    before = text_identity(model, instruction="", dtype="fp32")
    (model / "tokenizer/special_tokens_map.json").write_text("{}")
    assert text_identity(model, instruction="", dtype="fp32") != before, "the tokenizer counts"


def test_the_name_of_the_variant_does_not_count(model):
    before = component_identity(model, "text_encoder")
    path = model / "text_encoder/model.safetensors"
    path.rename(path.with_name("model.bf16.safetensors"))
    assert component_identity(model, "text_encoder") == before


def test_hashes_are_remembered_until_a_file_changes(model, tmp_path):
    memory = tmp_path / "caches" / "hashes.json"
    before = component_identity(model, "vae", memory)
    text = component_identity(model, "text_encoder", memory)
    remembered = json.loads(memory.read_text())
    assert len(remembered) == 4, "both components' weights and configs"
    path = str((model / "vae/diffusion_pytorch_model.safetensors").resolve())
    memory.write_text(json.dumps({**remembered, path: [*remembered[path][:2], "remembered"]}))
    assert component_identity(model, "vae", memory) != before, "the memory is believed"
    os.utime(path, ns=(1, 1))
    assert component_identity(model, "vae", memory) == before, "until the file's time changes"
    memory.write_text("{torn")
    assert component_identity(model, "text_encoder", memory) == text
    assert component_identity(model, "vae", memory) == component_identity(model, "vae")


def test_what_is_remembered_needs_no_hashing(model, tmp_path):
    memory = tmp_path / "hashes.json"
    assert not is_remembered(model, "vae", memory) and not is_remembered(model, "vae", None)
    component_identity(model, "vae", memory)
    assert is_remembered(model, "vae", memory) and not is_remembered(model, "text_encoder", memory)
    component_identity(model, "tokenizer", memory)
    assert is_remembered(model, "tokenizer", memory)
    os.utime(model / "vae" / "config.json", ns=(1, 1))
    assert not is_remembered(model, "vae", memory)
