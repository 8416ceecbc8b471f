"""The rehearsal of a run: the largest batch of the plan, the longest text that is known, and the same run after it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sana_tune.caching import open_caches
from sana_tune.data.records import Role
from sana_tune.memory import Load
from sana_tune.output import Output
from sana_tune.prepare import Prepared, prepare
from sana_tune.rehearsing import largest_loads, longest_text
from sana_tune.run import run
from tests.journeys.kit import differences, metrics_of, one_thread, pictures, pipeline_of, small_run, state_of


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def shown(tmp_path_factory) -> Path:
    """Squares, and three wider pictures to be held against them."""
    folder = tmp_path_factory.mktemp("shown")
    pictures(folder / "squares", 4)
    pictures(folder / "wide", 3, (64, 32), seed=1)
    return folder


def prepared_in(folder: Path, shown: Path, **settings: Any) -> Prepared:
    squares = {"instance_data_dir": str(shown / "squares"), "train_batch_size": 3}
    wide = {"instance_data_dir": str(shown / "wide"), "is_regularisation_data": True}
    return prepare(small_run(folder, squares, wide, **settings), Output.open(folder / "output"))


def test_the_largest_batch_is_that_of_most_positions(tmp_path: Path, shown: Path):
    prepared = prepared_in(tmp_path, shown)
    squares, wide = Load(32, 32, 3), Load(48, 24, 2)
    assert largest_loads(prepared, by_role=False) == {Role.TRAIN: squares}
    assert largest_loads(prepared, by_role=True) == {Role.TRAIN: squares, Role.REGULARISE: wide}


def test_the_longest_text_is_known_once_all_is_encoded(tmp_path: Path, shown: Path):
    before = prepared_in(tmp_path, shown)
    assert longest_text(before, open_caches(before)) == 300
    run(before.loaded)
    after = prepared_in(tmp_path, shown)
    caches = open_caches(after)
    lengths = [len(caches.text.get(key)) for key in after.captions]
    assert longest_text(after, caches) == max(lengths) < 300


def test_a_run_with_a_rehearsal_is_the_run_without(tmp_path: Path, shown: Path):
    """Weights, average, states, numbers and pictures, to the byte; and the same where it goes on."""
    settings = {
        "use_ema": True, "caption_dropout_probability": 0.5, "checkpoint_step_interval": 1,
        "validation_disable": False, "validation_prompt": "a dot", "validation_resolution": "32",
        "validation_num_inference_steps": 1, "validation_noise_scheduler": "unipc",
    }  # fmt: skip
    found = []
    for rehearsal in ("on", "off"):
        output = tmp_path / rehearsal / "output"
        for steps in (1, 2):
            asked = {**settings, "rehearsal": rehearsal, "max_train_steps": steps}
            run(prepared_in(tmp_path / rehearsal, shown, **asked).loaded)
        drawn = {path.name: path.read_bytes() for path in (output / "validation_images").iterdir()}
        lines = {str(number): line for number, line in enumerate(metrics_of(output))}
        found.append({**state_of(output / "checkpoint-2"), **pipeline_of(output), **lines, **drawn})
        said = (output / "log.txt").read_text(encoding="utf-8")
        assert said.count("Rehearsed the largest micro-batch (3 of 32x32 px, ") == (2 if rehearsal == "on" else 0)
    assert differences(*found) == []
