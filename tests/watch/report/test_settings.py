"""Settings side by side: what differs, where it comes from, and no secrets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sana_tune.watch.report.reading import Reader
from sana_tune.watch.report.settings import as_text, at_home, settings_of, short_origin


def run_with(folder: Path, **settings):
    folder.mkdir()
    origins = {name: f"/home/me/{folder.name}/config.json: {name}" for name in settings} | {"lr_power": "default"}
    (folder / "config.json").write_text(json.dumps({**settings, "lr_power": 0.8, "__origins__": origins}))
    return Reader(folder).read()


def test_what_differs_is_found_with_its_origins(tmp_path):
    one = run_with(tmp_path / "a", learning_rate=1e-5, seed=1, brand_new=True)
    two = run_with(tmp_path / "b", learning_rate=2e-5, seed=1, max_train_steps=9)
    found = {each.name: each for each in settings_of([one, two])}
    assert [name for name, each in found.items() if each.differs] == ["learning_rate", "max_train_steps", "brand_new"]
    assert found["learning_rate"].values == ("1e-05", "2e-05") and found["learning_rate"].origins[0] == "config.json"
    assert found["max_train_steps"].values == ("not set", "9") and found["brand_new"].group == "Other"
    assert not found["lr_power"].given and found["seed"].given
    assert found["learning_rate"].group == "Optimizer and learning rate"
    assert settings_of([Reader(tmp_path / "none").read()]) == []


@pytest.mark.parametrize(
    ("origin", "short"),
    [
        ("default", "default"), ("command line: seed", "command line"), ("/a/b/my.json: seed", "my.json"),
        ("C:\\me\\config.json: seed", "config.json"), ("environment: MIXED_PRECISION", "environment"), ("", ""),
    ],
)  # fmt: skip
def test_an_origin_has_no_folders(origin, short):
    assert short_origin(origin) == short


def test_no_secret_and_no_home_is_shown():
    assert as_text("hub_token", "hf_abcdefghijklmnop1234") == "•••"
    assert "hf_" not in as_text("note", "use hf_abcdefghijklmnop1234")
    assert as_text("output_dir", str(Path.home() / "runs")) == "~/runs" and at_home("/else/where") == "/else/where"
    assert as_text("x", None) == "not set" and as_text("x", "") == '""' and as_text("x", [1, "ä"]) == '[1, "ä"]'
