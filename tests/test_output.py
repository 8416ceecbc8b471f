"""The folder of a run: where things go, what is written there, and what a restart sets aside."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sana_tune.config.load import load
from sana_tune.errors import UserError
from sana_tune.output import Output, free_bytes
from tests.config.helpers import load_with, write_files


@pytest.fixture
def output(tmp_path: Path) -> Output:
    return Output.open(tmp_path / "runs" / "one")


def test_it_is_made_and_left_empty(output):
    assert output.root.is_dir() and list(output.root.iterdir()) == []
    assert Output.open(output.root) == output


@pytest.mark.parametrize("below", ["file", "file/one", "\0"])
def test_a_folder_that_cannot_be_is_told(below, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="must be a folder that can be written") as caught:
        Output.open(tmp_path / below)
    assert "--output_dir" in caught.value.problems[0].fix


def test_each_cache_is_where_the_nearest_setting_puts_it(tmp_path):
    output = Output(Path("out"))

    def places(config: dict, dataset: dict | None = None) -> tuple[str, str]:
        loaded = load_with(tmp_path, config, dataset)
        latents = output.latent_folder(loaded.config, loaded.datasets[0])
        return str(latents), str(output.text_folder(loaded.config, loaded.text_cache))

    assert places({}) == ("out/cache/vae/pictures", "out/cache/text")
    assert places({"cache_dir": "c"}) == ("c/vae/pictures", "c/text")
    assert places({"cache_dir": "c", "cache_dir_vae": "v", "cache_dir_text": "t"}) == ("v/pictures", "t")
    assert places({"cache_dir_vae": "v"}, {"cache_dir_vae": "own"})[0] == "own"


def test_json_is_written_whole_and_read_back(output):
    output.write_json("plan.json", {"path": Path("x"), "text": "ä"})
    assert output.read_json("plan.json") == {"path": "x", "text": "ä"}
    for broken in ("{", "[]", ""):
        (output.root / "plan.json").write_text(broken, encoding="utf-8")
        assert output.read_json("plan.json") == {}
    assert output.read_json("none.json") == {}
    assert [path.name for path in output.root.iterdir()] == ["plan.json"]


def test_the_resolved_config_loads_to_the_same_with_the_same_origins(output, tmp_path):
    """A default that stands in the file stays a default, so that what depends on the machine still may."""
    path = write_files(tmp_path, {"validation_resolution": "64x32,96", "seed": "3", "use_ema": "false"})
    asked = load(path, {"learning_rate": "1e-4"}, {"MIXED_PRECISION": "no"})
    output.write_config(asked)
    again = load(output.root / "config.json", {}, {})
    assert (again.config, again.datasets) == (asked.config, asked.datasets)
    defaults = [key for key, origin in asked.origins.items() if origin == "default"]
    assert len(defaults) > 40 and [key for key, origin in again.origins.items() if origin == "default"] == defaults
    held = json.loads((output.root / "config.json").read_text(encoding="utf-8"))
    assert held["__origins__"]["learning_rate"] == "command line: learning_rate" and held["seed"] == 3
    held["train_batch_size"] = 2
    (output.root / "config.json").write_text(json.dumps(held), encoding="utf-8")
    edited = load(output.root / "config.json", {}, {})
    assert edited.config.data.train_batch_size == 2 and edited.origins["train_batch_size"] != "default"


def test_a_restart_sets_the_run_aside_and_keeps_the_caches(output):
    told = ("events.jsonl", "report.html", "previews/a.png", "first_batches/00.png", "environment.json", "prompts.json")
    for name in ("metrics.jsonl", "log.txt", "config.json", "checkpoint-3/progress.json", "pipeline/x", "cache/text/y",
                 *told):  # fmt: skip
        (output.root / name).parent.mkdir(parents=True, exist_ok=True)
        (output.root / name).write_text(name, encoding="utf-8")
    output.set_aside()
    assert {path.name for path in output.root.iterdir()} == {"log.txt", "cache", "before_restart_1"}
    assert (output.root / "before_restart_1/checkpoint-3/progress.json").read_text() == "checkpoint-3/progress.json"
    output.set_aside()
    assert not (output.root / "before_restart_2").exists(), "there was nothing to set aside"
    (output.root / "metrics.jsonl").touch()
    output.set_aside()
    assert (output.root / "before_restart_2/metrics.jsonl").exists()


def test_free_bytes_are_the_disks(tmp_path):
    assert 0 < free_bytes(tmp_path) < 2**60
