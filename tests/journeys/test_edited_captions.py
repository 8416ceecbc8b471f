"""Filters and shuffles in whole runs: the cache goes by the final text, so just what changed is encoded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sana_tune.cli.main import exit_code
from sana_tune.run import run
from tests.data.pictures import put
from tests.journeys.kit import Heard, small_run

CAPTIONS = ("a red cat, watermark", "a blue dog, watermark", "a green bird", "nothing to see, a house")


def encoded(folder: Path, edits: dict[str, Any], filters: Any) -> int:
    """How many texts a run of one step encodes that keeps its caches from one to the next."""
    for number, caption in enumerate(CAPTIONS):
        if not (folder / "pictures" / f"{number}.png").exists():
            put(folder / "pictures", f"{number}.png", 32, 32, number, caption)
    entries: list[dict[str, Any]] = [
        {"instance_data_dir": str(folder / "pictures"), **edits},
        {"dataset_type": "text_embeds", "default": True, "caption_filter_list": filters},
    ]
    heard = Heard()
    run(small_run(folder, *entries, max_train_steps=1, resume_from_checkpoint=""), sinks=[heard], restart=True)
    return heard.encoded.get("text", 0)


def test_a_changed_filter_encodes_just_the_captions_it_changes(tmp_path: Path):
    assert encoded(tmp_path, {}, []) == 1 + 4, "the empty caption, and one a picture"
    assert encoded(tmp_path, {}, [r"s/,\s*watermark//"]) == 2
    (tmp_path / "filters.txt").write_text("s/,\\s*watermark//\ns/green/GREY/\n")
    assert encoded(tmp_path, {}, str(tmp_path / "filters.txt")) == 1
    assert encoded(tmp_path, {}, []) == 0, "the old ones are still there"


def test_shuffled_variants_are_made_before_the_first_step_and_kept(tmp_path: Path):
    shuffle = {"caption_shuffle": {"enable": True, "count": 3}}
    assert encoded(tmp_path, shuffle, []) == 1 + 2 + 2 + 1 + 2
    assert encoded(tmp_path, shuffle, []) == 0
    assert encoded(tmp_path, {}, []) == 0, "the captions as they are written were among them"


def test_a_caption_that_is_filtered_away_follows_missing_caption(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    filters = [r"s/^nothing to see.*//"]
    assert encoded(tmp_path, {"missing_caption": "skip"}, filters) == 1 + 3
    assert encoded(tmp_path, {"missing_caption": "empty"}, filters) == 0, "the empty caption is always there"
    entries = [{"instance_data_dir": str(tmp_path / "pictures")},
               {"dataset_type": "text_embeds", "caption_filter_list": filters}]  # fmt: skip
    small_run(tmp_path, *entries)
    assert exit_code(["train", "--config", "config.json"]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "1 picture has none: 3.png: its caption is empty once caption_filter_list is applied" in said
