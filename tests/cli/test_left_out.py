"""`sana_tune check --left-out`: the paths of what is not trained, for other programs; and `strict` in a check."""

from __future__ import annotations

import json
from pathlib import Path

from sana_tune.cli.main import exit_code
from tests.config.helpers import write_files
from tests.data.pictures import encoded, noise, put


def folder(place: Path) -> Path:
    """Two good pictures, an empty file, a torn body that only a whole read shows, and a small one."""
    pictures = place / "pictures"
    put(pictures, "good.png", 64, 64)
    put(pictures, "also good.png", 64, 64, seed=1)
    put(pictures, "sub/small.png", 20, 20, seed=2)
    (pictures / "empty.jpg").touch()
    torn = encoded(noise(200, 200, 3), "JPEG", quality=95)
    (pictures / "torn.jpg").write_bytes(torn[: len(torn) // 2])
    return pictures


def test_the_paths_stand_alone_one_a_line(tmp_path, capsys):
    pictures = folder(tmp_path)
    path = write_files(tmp_path, {"max_train_steps": 4}, {"minimum_image_size": 32})
    assert exit_code(["check", "--config", str(path), "--left-out"]) == 0
    said = capsys.readouterr()
    assert said.out.splitlines() == [f"{pictures}/empty.jpg", f"{pictures}/sub/small.png"] and said.err == ""
    assert exit_code(["check", "--config", str(path), "--left-out", "--images"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{pictures}/empty.jpg", f"{pictures}/sub/small.png", f"{pictures}/torn.jpg",
    ]  # fmt: skip
    assert exit_code(["check", "--config", str(path), "--json", "--images"]) == 0
    assert json.loads(capsys.readouterr().out)["left_out"][-1] == f"{pictures}/torn.jpg"


def test_nothing_left_out_prints_nothing(tmp_path, capsys):
    put(tmp_path / "pictures", "a.png", 64, 64)
    assert exit_code(["check", "--config", str(write_files(tmp_path, {"max_train_steps": 4})), "--left-out"]) == 0
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "")


def test_all_are_listed_and_what_another_dataset_trains_is_not(tmp_path, capsys):
    pictures = tmp_path / "pictures"
    for number in range(60):
        put(pictures, f"{number:02}.png", 40, 40, seed=number)
    for number in range(40):
        (pictures / f"empty_{number:02}.jpg").touch()
    path = write_files(tmp_path, {"max_train_steps": 4}, {"minimum_image_size": 64})
    datasets = tmp_path / "multidatabackend.json"
    entries = json.loads(datasets.read_text())
    entries.append({"id": "second", "instance_data_dir": str(pictures), "resolution": 32})
    datasets.write_text(json.dumps(entries))
    exit_code(["check", "--config", str(path), "--left-out"])
    assert capsys.readouterr().out.splitlines() == [f"{pictures}/empty_{number:02}.jpg" for number in range(40)]


def test_problems_go_to_standard_error(tmp_path, capsys):
    pictures = folder(tmp_path)
    path = write_files(tmp_path, {"max_train_steps": 4, "strict": True})
    assert exit_code(["check", "--config", str(path), "--left-out"]) == 1
    said = capsys.readouterr()
    assert said.out == f"{pictures}/empty.jpg\n"
    assert "error: dataset pictures: " in said.err and "strict is on, and 1 picture would be left out" in said.err
    assert exit_code(["check", "--config", str(tmp_path / "none.json"), "--left-out"]) == 1
    said = capsys.readouterr()
    assert said.out == "" and "the config file must exist" in said.err


def test_a_strict_check_of_whole_pictures_lists_torn_ones(tmp_path, capsys):
    pictures = folder(tmp_path)
    (pictures / "empty.jpg").unlink()
    path = write_files(tmp_path, {"max_train_steps": 4, "strict": True})
    assert exit_code(["check", "--config", str(path)]) == 0, "a header does not show it"
    capsys.readouterr()
    assert exit_code(["check", "--config", str(path), "--images", "--json"]) == 1
    (problem,) = json.loads(capsys.readouterr().out)["problems"]
    assert "strict is on, and 1 picture would be left out: torn.jpg: is damaged" in problem["what"]


def test_asking_for_deletion_names_the_command_that_lists(tmp_path, capsys):
    put(tmp_path / "pictures", "a.png", 64, 64)
    for key in ("delete_problematic_images", "delete_unwanted_images", "delete_nsfw_images"):
        path = write_files(tmp_path, {"max_train_steps": 4, key: True})
        assert exit_code(["train", "--config", str(path)]) == 1
        said = " ".join(capsys.readouterr().err.split())
        assert "nothing is ever deleted from your folders" in said and "sana_tune check --left-out" in said
        path = write_files(tmp_path, {"max_train_steps": 4}, {key: True})
        assert exit_code(["check", "--config", str(path)]) == 1
        assert "sana_tune check --left-out" in " ".join(capsys.readouterr().out.split())
