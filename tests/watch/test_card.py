"""The README of an exported pipeline."""

from __future__ import annotations

import re

from sana_tune.watch.card import model_card

SAMPLE = {
    "prompt": 'a "zib" on {a} hill',
    "width": 64,
    "height": 96,
    "steps": 20,
    "guidance": 4.5,
    "seed": 3,
    "dtype": "float32",
}


def card(*, has_ema: bool = False) -> str:
    training = {"Steps": 200, "Images seen": 1600}
    return model_card(
        model="nano", licence="some terms", folder="out/pipeline", sample=SAMPLE, training=training, has_ema=has_ema
    )


def test_the_snippet_is_python_with_the_runs_values():
    snippet = re.search(r"```python\n(.*?)```", card(), re.DOTALL)
    assert snippet is not None
    compile(snippet[1], "README.md", "exec")
    assert 'SanaPipeline.from_pretrained("out/pipeline", torch_dtype=torch.float32)' in snippet[1]
    assert repr(SAMPLE["prompt"]) in snippet[1] and "height=96, width=64, num_inference_steps=20" in snippet[1]
    assert "manual_seed(3)" in snippet[1]


def test_what_was_trained_and_under_which_terms():
    text = card()
    assert text.startswith("# Fine-tuned from nano\n")
    assert "- Steps: 200\n- Images seen: 1600\n" in text and text.endswith("## Licence\n\nsome terms\n")


def test_the_average_is_told_where_there_is_one():
    assert "transformer_ema/" in card(has_ema=True) and "transformer_ema" not in card()
