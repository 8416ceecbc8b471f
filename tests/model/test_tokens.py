"""Counting tokens without transformers says of every text what the text encoder says."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from sana_tune.model.fetch import locate
from sana_tune.model.instruction import INSTRUCTION
from sana_tune.model.tokens import TOKENIZER, TokenCounter

WORDS = "a red star on blue ground, größe 猫 🙂 supercalifragilistic (x) -- 12 \t\n".split(" ")


def texts(count: int, longest: int) -> list[str]:
    """Texts of words, every length up to a few hundred tokens; no two alike."""
    chosen = random.Random(3)
    return ["", *(f"{n} {' '.join(chosen.choices(WORDS, k=chosen.randrange(longest)))}" for n in range(count))]


@pytest.mark.parametrize("instruction", [INSTRUCTION, "", "Draw this: "])
def test_it_agrees_with_the_text_encoder(instruction):
    transformers = pytest.importorskip("transformers")
    from sana_tune.model.sana import TextEncoder

    folder = locate("nano")
    tokenizer = transformers.GemmaTokenizerFast.from_pretrained(folder / "tokenizer")
    encoder = TextEncoder(tokenizer, None, instruction)
    found = texts(150, 130)
    word = next(w for w in WORDS if len(tokenizer.encode(w)) == 2)  # the text's beginning and one token
    found += [" ".join([word] * n) for n in range(280, 304)]
    cut = [text for text in found if encoder.is_cut(text)]
    counter = TokenCounter(folder / TOKENIZER, instruction)
    assert counter.too_long([*found, *found]) == cut and 20 < len(cut) < len(found) - 20


def test_short_texts_need_no_tokenizer(tmp_path):
    file = tmp_path / "tokenizer.json"
    file.write_text("not one at all")
    assert TokenCounter(file, INSTRUCTION).too_long(["a cat", "x" * 280]) == []


def test_counts_are_remembered_for_the_same_tokenizer_and_instruction(tmp_path):
    file, memory = tmp_path / "tokenizer.json", tmp_path / "cache" / "token_counts.json"
    file.write_bytes((locate("nano") / TOKENIZER).read_bytes())
    status = file.stat()
    long = "word " * 1000
    counter = TokenCounter(file, INSTRUCTION, memory)
    assert counter.too_long([long, "b" * 295]) == [long] and not memory.exists()
    counter.save()
    before = memory.read_bytes()
    counter.save()
    file.write_bytes(b"x" * status.st_size)  # a file that could not be read as a tokenizer
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    again = TokenCounter(file, INSTRUCTION, memory)
    assert again.too_long([long]) == [long]
    again.save()
    assert memory.read_bytes() == before
    assert TokenCounter(file, "another", memory)._counts == {}
    for broken in ("", "[]", '{"who": 1}', json.dumps({**json.loads(before), "counts": []})):
        memory.write_text(broken)
        assert TokenCounter(file, INSTRUCTION, memory)._counts == {}


def test_nothing_heavy_is_loaded(tmp_path):
    script = (
        "import sys; from pathlib import Path; from sana_tune.model.tokens import TokenCounter\n"
        "print(len(TokenCounter(Path(sys.argv[1]), 'x: ').too_long(['word ' * 900])))\n"
        "print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    )
    file = str(locate("nano") / TOKENIZER)
    ran = subprocess.run(
        [sys.executable, "-c", script, file], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert ran.stdout == "1\nset()\n", ran.stderr
