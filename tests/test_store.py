from __future__ import annotations

import os
from pathlib import Path

import pytest

from sana_tune.errors import UserError
from sana_tune.store import FolderStore, write_atomically


def fill(root: Path, *keys: str) -> None:
    for key in keys:
        path = root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(key)


def keys(store: FolderStore) -> list[str]:
    return [entry.key for entry in store.list()]


def test_lists_all_files_below_the_folder_sorted_by_key(tmp_path: Path):
    fill(tmp_path, "b.png", "a/z.png", "a.png", "a/b/c.txt")
    assert keys(FolderStore(tmp_path)) == ["a.png", "a/b/c.txt", "a/z.png", "b.png"]


def test_entries_carry_size_and_time(tmp_path: Path):
    fill(tmp_path, "a.png")
    os.utime(tmp_path / "a.png", ns=(5, 1_234_567_891))
    (entry,) = FolderStore(tmp_path).list()
    assert (entry.size_bytes, entry.mtime_ns) == (5, 1_234_567_891)


def test_hidden_files_and_folders_do_not_count(tmp_path: Path):
    fill(tmp_path, "a.png", ".git/b.png", "._a.png", "c/.ipynb_checkpoints/d.png")
    assert keys(FolderStore(tmp_path)) == ["a.png"]


def test_follows_links_but_not_in_circles(tmp_path: Path):
    fill(tmp_path / "elsewhere", "x.png")
    root = tmp_path / "root"
    fill(root, "a.png", "sub/b.png")
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "sub" / "back").symlink_to(root)
    (root / "dangling.png").symlink_to(tmp_path / "nothing")
    assert keys(FolderStore(root)) == ["a.png", "linked/x.png", "sub/b.png"]


def test_a_folder_linked_twice_is_listed_twice(tmp_path: Path):
    fill(tmp_path / "elsewhere", "x.png")
    (tmp_path / "root").mkdir()
    for name in ("one", "two"):
        (tmp_path / "root" / name).symlink_to(tmp_path / "elsewhere")
    assert keys(FolderStore(tmp_path / "root")) == ["one/x.png", "two/x.png"]


def test_reads_and_opens_by_key(tmp_path: Path):
    fill(tmp_path, "a/b.txt")
    store = FolderStore(tmp_path)
    assert store.read("a/b.txt") == b"a/b.txt"
    with store.open("a/b.txt") as file:
        assert file.read(3) == b"a/b"
    assert store.exists("a/b.txt") and not store.exists("a")
    assert store.locate("a/b.txt") == str(tmp_path / "a" / "b.txt")


@pytest.mark.parametrize("make, what", [(lambda path: None, "does not exist"), (Path.touch, "is not a folder")])
def test_a_folder_that_is_none_is_told(tmp_path: Path, make, what: str):
    make(tmp_path / "data")
    with pytest.raises(UserError, match=what):
        FolderStore(tmp_path / "data").list()


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"gone\.png: cannot be read: No such file"):
        FolderStore(tmp_path).read("gone.png")
    with pytest.raises(UserError, match=r"gone\.png: cannot be read"):
        FolderStore(tmp_path).open("gone.png")


def test_write_atomically_replaces_and_leaves_nothing_beside(tmp_path: Path):
    path = tmp_path / "deep" / "file.json"
    write_atomically(path, b"one")
    write_atomically(path, b"two")
    assert path.read_bytes() == b"two"
    assert os.listdir(path.parent) == ["file.json"]


def test_the_file_changes_by_a_rename_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "file.json"
    write_atomically(path, b"old")

    def replace(aside: Path, target: Path) -> None:
        assert aside.read_bytes() == b"new" and target.read_bytes() == b"old"
        raise OSError(5, "pulled the plug")

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(UserError, match="pulled the plug"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file.json"]


def test_a_failed_write_leaves_the_old_file_and_says_where(tmp_path: Path):
    path = tmp_path / "file.json"
    path.mkdir()  # a folder stands where the file is to go: the rename fails
    with pytest.raises(UserError, match=r"file\.json: cannot be written"):
        write_atomically(path, b"new")
    assert os.listdir(tmp_path) == ["file.json"]
