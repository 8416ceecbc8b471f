"""Shift by picture size."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest

from sana_tune.model.shift import auto_shift, exponential_shift, shift_for

MODULES = ("facts", "fetch", "identity", "instruction", "layout", "levels", "shift")


def test_the_native_size_keeps_the_recipes_shift():
    assert auto_shift(3.0, 1024, 1024) == 3.0
    assert auto_shift(3.0, 4096, 1024) == 6.0, "twice the side, twice the shift: what NVIDIA has at 4K from 2K"
    assert auto_shift(3.0, 256, 1024) == 1.5


def test_the_exponential_form_is_diffusers():
    assert exponential_shift(256, 0.5, 1.15) == pytest.approx(math.exp(0.5))
    assert exponential_shift(4096, 0.5, 1.15) == pytest.approx(math.exp(1.15))
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    assert exponential_shift(1000, 0.5, 1.15) == pytest.approx(math.exp(calculate_shift(1000)))


def test_which_form_is_used():
    assert shift_for(3.0, 4096, 1024, {}, auto=False) == 3.0
    assert shift_for(3.0, 4096, 1024, {}, auto=True) == 6.0
    keys = {"base_shift": 0.5, "max_shift": 1.15}
    assert shift_for(3.0, 4096, 1024, keys, auto=True) == pytest.approx(math.exp(1.15))
    assert shift_for(3.0, 4096, 1024, keys, auto=False) == 3.0
    keys |= {"base_image_seq_len": 64, "max_image_seq_len": 1024}
    assert shift_for(3.0, 1024, 1024, keys, auto=True) == pytest.approx(math.exp(1.15))


def test_the_torch_free_side_of_the_model_stays_so():
    heavy = ("torch", "diffusers", "transformers", "huggingface_hub", "numpy")
    names = ", ".join(f"sana_tune.model.{name}" for name in MODULES)
    code = f"import sys, {names}; print([name for name in {heavy} if name in sys.modules])"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert child.stdout.strip() == "[]", child.stdout + child.stderr
