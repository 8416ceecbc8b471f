"""A look at a folder: counts, sizes, captions in files and in names, and what is told of a folder that is none."""

from __future__ import annotations

import pytest

from sana_tune.cli.scan import Scan, find_pictures, names_that_read_like_captions, reads_like_a_caption, scan
from sana_tune.data.geometry import Size
from sana_tune.errors import UserError
from tests.data.pictures import put


def test_a_folder_with_everything(tmp_path):
    put(tmp_path, "a/IMG_1.png", 60, 40, caption="\nA red Ball\nanother line\n")
    put(tmp_path, "a/IMG_2.png", 20, 10, caption="")
    put(tmp_path, "a_blue_ball_in_the_grass.jpg", 40, 40)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    (tmp_path / "alone.txt").write_text("nobody's")
    (tmp_path / "notes.md").write_text("")
    found = scan(str(tmp_path))
    assert (found.pictures, found.with_text, found.with_name) == (4, 2, 1)
    assert found.sizes == (Size(60, 40), Size(20, 10), Size(40, 40)) and found.median == Size(40, 40)
    assert found.texts == ("A red Ball",)  # the first line, as it is written; empty files give none
    assert found.names == ("a blue ball in the grass",)
    assert [key for key, _ in found.broken] == ["broken.png"]
    told = "\n".join(found.lines())
    assert "4 pictures: 20x10 to 60x40 px, most about 40x40" in told
    assert "2 have a .txt file, 1 a file name that reads like one" in told and "broken.png is not a picture" in told


def test_one_picture_and_one_size_are_said_plainly():
    assert Scan("x", 1, (Size(8, 8),)).lines()[0] == "1 picture: all 8x8 px"
    assert "3 pictures, 2 of them measured" in Scan("x", 3, (Size(8, 8),) * 2).lines()[0]


def test_a_large_folder_is_measured_evenly(tmp_path):
    for number in range(10):
        put(tmp_path, f"{number}.png", 10 + number, 10)
    found = scan(str(tmp_path), measured=4)
    assert found.pictures == 10 and [size.width for size in found.sizes] == [10, 12, 15, 17]


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda folder: None, "does not exist"),
        (lambda folder: folder.write_text(""), "is not a folder"),
        (lambda folder: folder.mkdir(), "is empty"),
        (lambda folder: (folder.mkdir(), (folder / "a.txt").write_text("")), r"holds no pictures \(1 other files\)"),
        (lambda folder: (folder.mkdir(), (folder / "a.png").write_text("")), "none of the 1 pictures looked at can be"),
    ],
)
def test_no_folder_of_pictures(make, said, tmp_path):
    make(tmp_path / "folder")
    with pytest.raises(UserError, match=said) as told:
        scan(str(tmp_path / "folder"))
    assert told.value.problems[0].fix


@pytest.mark.parametrize(
    "name, is_caption",
    [
        ("a red ball", True),
        ("赤い帽子をかぶった猫", True),
        ("red ball", False),
        ("IMG 20240102 153012", False),
        ("DSC00012", False),
        ("Screenshot from my old phone", False),
        ("WhatsApp Image 2024-01-02 at 15.30.12", False),
        ("3f2a9c from the web ab12 99 12 77 81 1234567890123", False),
        ("猫 01", False),
    ],
)
def test_names_that_say_something(name, is_caption):
    assert reads_like_a_caption(name) is is_caption


def test_a_numbering_is_no_caption():
    assert names_that_read_like_captions([f"my brown dog ({n}).png" for n in range(9)]) == {}
    assert len(names_that_read_like_captions(["a dog in snow.png", "a dog on_a sofa.png", "b.png"])) == 2


def test_a_likely_folder_is_found(tmp_path):
    assert find_pictures(tmp_path) is None
    (tmp_path / "data").mkdir()
    put(tmp_path / "datasets", "dog/1.png")
    assert find_pictures(tmp_path) == "datasets/dog"
    put(tmp_path, "images/1.png")
    assert find_pictures(tmp_path) == "images"
