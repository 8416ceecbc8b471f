"""The report's pictures: made small once, in order, not too many, and none that cannot be read."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from sana_tune.data.images import encode_png, shrunk
from sana_tune.watch.report import images
from sana_tune.watch.report.images import Thumbs, first_batches, link, previews, timeline
from sana_tune.watch.report.reading import Reader
from scripts.benchmark_report import run_folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return Reader(run_folder(tmp_path_factory.mktemp("run"), 40, validations=4, side_px=16)).read()


def test_a_picture_is_made_small_once_and_again_when_it_changed(tmp_path):
    made: list[int] = []

    def counted(data: bytes, side_px: int):
        made.append(side_px)
        return shrunk(data, side_px)

    path, thumbs = tmp_path / "a.png", Thumbs(counted, 32)
    path.write_bytes(encode_png(np.zeros((64, 128, 3), np.uint8)))
    first = thumbs.of(path)
    assert first is not None and (first.width, first.height) == (32, 16) and thumbs.of(path) is first
    assert first.url.startswith("data:image/webp;base64,") and made == [32]
    path.write_bytes(encode_png(np.zeros((64, 64, 3), np.uint8)))
    os.utime(path, ns=(1, 1))
    again = thumbs.of(path)
    assert again is not None and (again.width, again.height) == (32, 32) and len(made) == 2


def test_what_cannot_be_read_is_left_out(tmp_path):
    (tmp_path / "torn.png").write_bytes(encode_png(np.zeros((64, 64, 3), np.uint8))[:60])
    thumbs = Thumbs(shrunk)
    assert thumbs.of(tmp_path / "torn.png") is None and thumbs.of(tmp_path / "none.png") is None


def test_the_timeline_is_prompt_by_step_and_view(run):
    found = timeline([run], Thumbs(shrunk), run.root)
    assert found["steps"] == [0, 10, 20, 30, 40] and found["left_out"] == 0
    assert [row["name"] for row in found["rows"]] == ["fox", "harbour", "tea"]
    (pictures,) = found["rows"][0]["pictures"]
    assert set(pictures["0"]) == {"raw"} and set(pictures["40"]) == {"raw", "ema"}
    assert pictures["40"]["ema"]["href"] == "validation_images/step_40_fox_0_16x16_ema.png"
    assert found["rows"][0]["prompt"] == "a red fox in the snow" and found["rows"][0]["size"] == "16×16"


def test_too_many_steps_are_shown_in_part_with_the_first_and_the_last(run, monkeypatch):
    monkeypatch.setattr(images, "MOST", 18)
    found = timeline([run], Thumbs(shrunk), run.root)
    assert found["steps"] == [0, 20, 40] and found["left_out"] == 2 * 2 * 3
    monkeypatch.setattr(images, "MOST_ROWS", 1)
    assert [row["name"] for row in timeline([run], Thumbs(shrunk), run.root)["rows"]] == ["fox"]


def test_runs_share_the_rows_of_the_same_prompt(run):
    found = timeline([run, run], Thumbs(shrunk), run.root)
    assert len(found["rows"]) == 3 and all(len(row["pictures"]) == 2 and all(row["pictures"]) for row in found["rows"])


def test_previews_are_those_of_the_newest_step_in_order(run):
    (row,) = previews(run, Thumbs(shrunk))
    assert (row["name"], row["step"]) == ("fox", 40) and [each["at"] for each in row["pictures"]] == [5, 10, 15, 20]
    for file in (run.root / "previews").iterdir():
        file.unlink()
    assert previews(run, Thumbs(shrunk)) == []


def test_first_batches_have_their_captions_and_lose_what_is_gone(run):
    found = first_batches(run, Thumbs(shrunk))
    assert [each["caption"] for each in found][:1] == ["a red fox in the snow"] and len(found) == 5
    (run.root / "first_batches" / "00.png").unlink()
    assert len(first_batches(run, Thumbs(shrunk))) == 4


def test_links_lead_from_the_page_to_the_file(tmp_path):
    path = tmp_path / "my run" / "a #1.png"
    assert link(path, tmp_path / "my run") == "a%20%231.png"
    assert link(path, tmp_path / "elsewhere") == "../my%20run/a%20%231.png"
    assert Path(tmp_path / "elsewhere" / "../my run").resolve() == path.parent
