"""Snippets of READMEs: Python whatever stands in a name, and each loads what it is for."""

from __future__ import annotations

import ast
from collections.abc import Callable

import pytest

from sana_tune.watch.snippets import Sample

HOSTILE = ['a "quoted" place', "back\\slash", "{braces}", "ünï", "line\nbreak", "```"]
SAMPLE = Sample("a zib", 64, 96, 20, 4.5, 3, "bfloat16")
KINDS: dict[str, Callable[[Sample, str], str]] = {
    "pipeline": lambda sample, name: sample.of_pipeline(name),
    "checkpoint": lambda sample, name: sample.of_checkpoint(name, name, name),
    "adapter": lambda sample, name: sample.of_adapter(name, name, name, 0.5),
}


def code(snippet: str) -> str:
    begin, text, end = snippet.partition("```python\n")[0], snippet[len("```python\n") : -len("```")], snippet[-3:]
    assert begin == "" and end == "```"
    return text


def constants(text: str) -> list[object]:
    return [node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant)]


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("kind", KINDS)
def test_whatever_a_place_or_a_prompt_is_called_it_is_python_with_that_name(kind: str, name: str):
    sample = Sample(name, 64, 96, 20, 4.5, 3)
    found = constants(code(KINDS[kind](sample, name)))
    assert found.count(name) >= 2, "the place and the prompt"


@pytest.mark.parametrize("kind", KINDS)
def test_it_draws_the_sample(kind: str):
    text = code(KINDS[kind](SAMPLE, "out"))
    for part in ("'a zib'", "height=96, width=64, num_inference_steps=20, guidance_scale=4.5", "manual_seed(3)"):
        assert part in text
    assert "torch_dtype=torch.bfloat16" in text and "float32" not in text


def test_an_adapter_is_put_into_its_base_with_its_own_multiplier():
    text = code(SAMPLE.of_adapter("me/rex", "adapter.safetensors", "owner/sana", 0.5))
    assert 'place, file = "me/rex", "adapter.safetensors"' in text
    assert 'SanaPipeline.from_pretrained("owner/sana"' in text
    assert "create_lycoris_from_weights(0.5, path, pipe.transformer)" in text
