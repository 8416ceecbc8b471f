from __future__ import annotations

from pathlib import Path

from sana_tune.data.memory import FileMemory
from sana_tune.store import Entry

ENTRY = Entry("a", 10, 20)


def test_remembers_until_size_or_time_change():
    memory = FileMemory()
    memory.put("/a", ENTRY, {"hash": "x"})
    assert memory.get("/a", ENTRY) == {"hash": "x"}
    assert memory.get("/a", Entry("a", 11, 20)) is None
    assert memory.get("/a", Entry("a", 10, 21)) is None
    assert memory.get("/b", ENTRY) is None
    memory.put("/a", Entry("a", 11, 20), {"hash": "y"})
    assert memory.get("/a", ENTRY) is None


def test_remembers_over_runs(tmp_path: Path):
    path = tmp_path / "deep" / "files.ndjson"
    memory = FileMemory(path)
    memory.put("/ü \udcff\n", ENTRY, {"text": "line\nline", "width": 3})
    memory.save()
    assert FileMemory(path).get("/ü \udcff\n", ENTRY) == {"text": "line\nline", "width": 3}


def test_nothing_new_is_not_written(tmp_path: Path):
    path = tmp_path / "files.ndjson"
    FileMemory(path).save()
    assert not path.exists()
    memory = FileMemory(path)
    memory.put("/a", ENTRY, {})
    memory.save()
    path.unlink()
    memory.save()
    assert not path.exists()
    FileMemory(None).save()


def test_a_damaged_memory_forgets_only_what_is_damaged(tmp_path: Path):
    path, entry = tmp_path / "files.ndjson", Entry("a", 1, 2)
    memory = FileMemory(path)
    memory.put("/a", entry, {"hash": "x"})
    memory.put("/b", entry, {"hash": "y"})
    memory.save()
    assert FileMemory(path).get("/b", entry) == {"hash": "y"}
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:-5], "[]", "{}", "7", '["/c",1,2,3]', "\0"]))
    again = FileMemory(path)
    assert again.get("/a", entry) == {"hash": "x"}
    assert again.get("/b", entry) is None and again.get("/c", entry) is None
    assert again.get("/a", Entry("a", 1, 3)) is None and again.get("/a", Entry("a", 2, 2)) is None
