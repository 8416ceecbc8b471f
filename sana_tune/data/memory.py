"""What is known of files, so that an unchanged one is not read again. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sana_tune.store import Entry, write_atomically


class FileMemory:
    """(path, size, modification time) → facts.

    Threads may share it. On disk it is a file of JSON lines, replaced as a whole; a line that cannot be read is
    forgotten, nothing more. With path None it remembers for the life of the process only.
    """

    def __init__(self, path: Path | None = None):
        self.path = path
        self._facts: dict[str, tuple[int, int, dict[str, Any]]] = {}
        self._changed = False
        if path is not None and path.is_file():
            for known in _known(path.read_text(encoding="utf-8", errors="replace")):
                self._remember(known)

    def get(self, path: str, entry: Entry) -> dict[str, Any] | None:
        """The facts of a file, or None when it is new or was changed."""
        known = self._facts.get(path)
        if known is None or known[0] != entry.size_bytes or known[1] != entry.mtime_ns:
            return None
        return known[2]

    def put(self, path: str, entry: Entry, facts: dict[str, Any]) -> None:
        """Remember JSON-able facts of a file as it was when it was listed; nothing of one of unknown size."""
        if entry.size_bytes < 0:
            return
        self._facts[path] = (entry.size_bytes, entry.mtime_ns, facts)
        self._changed = True

    def save(self) -> None:
        """Write what is new, if anything is."""
        if self.path is None or not self._changed:
            return
        lines = (json.dumps([path, *known], separators=(",", ":")) for path, known in list(self._facts.items()))
        write_atomically(self.path, "".join(f"{line}\n" for line in lines).encode("utf-8"))
        self._changed = False

    def _remember(self, known: Any) -> None:
        if isinstance(known, list) and len(known) == 4:
            path, size, mtime, facts = known
            if isinstance(path, str) and isinstance(facts, dict):
                self._facts[path] = (size, mtime, facts)


def _known(text: str) -> Iterator[Any]:
    """What the lines of a memory say, those that can be read."""
    lines = text.splitlines()
    try:  # all at once takes a third of the time; it fails when one of them is damaged
        together = json.loads(f"[{','.join(lines)}]")
        if len(together) == len(lines):
            yield from together
            return
    except ValueError:
        pass
    for line in lines:
        try:
            yield json.loads(line)
        except ValueError:
            continue
