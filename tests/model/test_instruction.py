"""The instruction is diffusers' own, to the letter."""

from __future__ import annotations

import inspect

from sana_tune.model.instruction import INSTRUCTION, MAX_TOKENS, resolve_instruction


def test_the_default_is_that_of_the_pipeline():
    from diffusers import SanaPipeline

    defaults = inspect.signature(SanaPipeline.__call__).parameters
    lines = defaults["complex_human_instruction"].default
    assert len(lines) == 8 and "\n".join(lines) == INSTRUCTION and INSTRUCTION.endswith("User Prompt: ")
    assert defaults["max_sequence_length"].default == MAX_TOKENS


def test_what_a_user_can_ask_for():
    assert resolve_instruction(None) == INSTRUCTION
    assert resolve_instruction("None") == "" and resolve_instruction("") == ""
    assert resolve_instruction("Draw: ") == "Draw: "
