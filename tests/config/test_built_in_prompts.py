"""The built-in library: prompts that say enough, and no two of a name."""

from __future__ import annotations

from sana_tune.config.built_in_prompts import BUILT_IN


def test_each_prompt_describes_a_picture_in_one_caption():
    assert len(BUILT_IN) >= 12
    for name, text in BUILT_IN.items():
        assert name.replace("_", "").isalnum() and name == name.lower()
        assert 12 <= len(text.split()) <= 60 and text == text.strip() and "  " not in text, name
    assert len(set(BUILT_IN.values())) == len(BUILT_IN)
