"""How long texts are in tokens, counted by the tokenizer's file alone: no torch, no transformers. Torch-free.

`TextEncoder.is_cut` says which texts are cut; this says the same of many texts quickly, and remembers it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sana_tune.model.instruction import MAX_TOKENS
from sana_tune.store import write_atomically

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER = "tokenizer/tokenizer.json"
# Tokens are at least a byte long, and where instruction and text meet a few more or fewer can come of it.
_JOINT = 8


class TokenCounter:
    """Counts the tokens of final texts, as they are when the instruction stands before them.

    file: a tokenizer.json. memory: a JSON file for the counts, which is written by `save`; None = none.
    """

    def __init__(self, file: Path, instruction: str, memory: Path | None = None):
        self.file = file
        self.instruction = instruction
        # Of n + 300 - 2 tokens (with an instruction of n) or of 300, one is the beginning of the text.
        self.most = MAX_TOKENS - 2 if instruction else MAX_TOKENS - 1
        self.memory = memory
        status = file.stat()
        self._who = _digest(f"{file.resolve()} {status.st_size} {status.st_mtime_ns} {instruction}")
        self._counts: dict[str, int] = _recall(memory, self._who)
        self._changed = False

    def too_long(self, texts: Iterable[str]) -> list[str]:
        """Those of the texts whose end is cut off: more than fits into 300 tokens. Each is looked at once."""
        doubtful = [text for text in dict.fromkeys(texts) if len(text.encode("utf-8")) > self.most - _JOINT]
        keys = {text: _digest(text) for text in doubtful}
        new = [text for text in doubtful if keys[text] not in self._counts]
        if new:
            self._counts.update(zip((keys[text] for text in new), self._counted(new), strict=True))
            self._changed = True
        return [text for text in doubtful if self._counts[keys[text]] > self.most]

    def save(self) -> None:
        """Write the counts down, if there are new ones. Raises UserError when that fails."""
        if self.memory is not None and self._changed:
            content = {"who": self._who, "counts": self._counts}
            write_atomically(self.memory, json.dumps(content, separators=(",", ":")).encode("utf-8"))
            self._changed = False

    def _counted(self, texts: list[str]) -> list[int]:
        """Tokens that each text adds to the instruction."""
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(self.file))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        # Words do not grow together over the end of a line: the last line of the instruction stands for all of it,
        # but for texts that are near the limit.
        last_line = self.instruction.rpartition("\n")[2]
        counts = _added(tokenizer, last_line, texts)
        near = [place for place, count in enumerate(counts) if abs(count - self.most) <= _JOINT]
        for place, count in zip(near, _added(tokenizer, self.instruction, [texts[n] for n in near]), strict=True):
            counts[place] = count
        return counts


def _added(tokenizer: Tokenizer, before: str, texts: list[str]) -> list[int]:
    """Tokens of `before` + text, less those of `before`."""
    alone = len(tokenizer.encode(before, add_special_tokens=False).ids)
    encoded = tokenizer.encode_batch_fast([before + text for text in texts], add_special_tokens=False)
    return [len(one.ids) - alone for one in encoded]


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=12).hexdigest()


def _recall(memory: Path | None, who: str) -> dict[str, int]:
    """Counts of the same tokenizer and instruction; none when the file is absent, broken or of another one."""
    if memory is None:
        return {}
    try:
        content: Any = json.loads(memory.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(content, Mapping) or content.get("who") != who or not isinstance(content.get("counts"), dict):
        return {}
    return {key: count for key, count in content["counts"].items() if isinstance(count, int)}
