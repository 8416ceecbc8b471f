"""Bytes of quantised weights by their formats, and what stands in the way of quantising."""

from __future__ import annotations

import importlib.util

from sana_tune.model.packing import cannot, encoder_bytes, network_bytes, packed_bytes


def test_a_network_is_its_packed_matrices_and_the_rest():
    assert network_bytes(10_000, 2, [(64, 64)], "no_change", 4) == 40_000
    assert network_bytes(10_000, 2, [(64, 64)], "int8-bnb", 2) == 2 * (64 * 64 + 4 * 64) + 2 * (10_000 - 2 * 64 * 64)


def test_bytes_of_the_published_encoder_and_of_a_matrix():
    assert encoder_bytes(5_230_000_000, "no_change") == 5_230_000_000
    assert 2.1e9 < encoder_bytes(5_230_000_000, "nf4-bnb") < 2.4e9, "the vocabulary stays, 1.2 GB of it"
    assert packed_bytes((64, 64), "nf4-bnb") == 2048 + 64 + 4 + 4
    assert packed_bytes((10, 64), "int8-bnb") == 640 + 40


def test_a_missing_library_is_named_with_what_is_there(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    problem = cannot("base_model_precision", "int8-torchao", "cuda")
    assert problem is not None and "torchao, which is not installed" in problem.what
    assert problem.fix == "pip install torchao, or use int8-bnb or nf4-bnb"
    missing = cannot("text_encoder_1_precision", "nf4-bnb", "cpu")
    assert missing is not None and "bitsandbytes" in missing.what and missing.fix == "pip install bitsandbytes"
    assert cannot("base_model_precision", "no_change", "cpu") is None


def test_apples_gpus_have_no_8_bit_floats(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    problem = cannot("base_model_precision", "fp8-torchao", "mps")
    assert problem is not None and "Apple" in problem.what
    assert cannot("base_model_precision", "fp8-torchao", "cuda") is None
