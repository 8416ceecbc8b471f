"""How the parts are put together: precision, pictures that cannot be encoded, what a run tells and gives back."""

from __future__ import annotations

import json
import logging
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from sana_tune.config.load import load
from sana_tune.errors import UserError
from sana_tune.log import log
from sana_tune.output import Output
from sana_tune.prepare import prepare, write_down
from sana_tune.run import autocast_dtype, drawing_seed, precision, run, without
from sana_tune.watch.events import CacheProgress, Finished, Saved, Started, Stepped, Validated
from tests.config.helpers import write_files
from tests.journeys.kit import Heard, metrics_of, one_thread, pictures, small_run


@pytest.mark.parametrize(
    ("asked", "environ", "wanted", "drawn_in"),
    [
        ({}, {}, "no", None),  # a CPU computes in fp32 unless it is asked to do otherwise
        ({"mixed_precision": "bf16"}, {}, "bf16", torch.bfloat16),
        ({"mixed_precision": "bf16", "weights_dtype": "bf16"}, {}, "bf16", None),
        ({"mixed_precision": "no"}, {"MIXED_PRECISION": "bf16"}, "no", None),
        ({}, {"MIXED_PRECISION": "bf16"}, "bf16", torch.bfloat16),
    ],
)
def test_the_precision_is_what_was_asked_or_what_suits_the_device(asked, environ, wanted, drawn_in, tmp_path):
    loaded = load(write_files(tmp_path, {"device": "cpu", **asked}), {}, environ)
    assert (precision(loaded), autocast_dtype(loaded)) == (wanted, drawn_in)


@pytest.mark.parametrize(("asked", "seed"), [({}, 0), ({"seed": 5}, 5), ({"seed": 5, "validation_seed": 0}, 0)])
def test_pictures_are_drawn_with_their_own_seed_or_the_runs(asked, seed, tmp_path):
    assert drawing_seed(load(write_files(tmp_path, asked), {}, {}).config) == seed


def test_what_cannot_be_encoded_is_planned_away_and_written_down(tmp_path):
    pictures(tmp_path / "pictures", 3)
    prepared = prepare(small_run(tmp_path), Output.open(tmp_path / "output"))
    write_down(prepared)
    assert prepared.plan.buckets[0].pictures == 3
    left = without(prepared, {"d0/p01.png": "is damaged"})
    assert left.plan.buckets[0].pictures == 2 and [record.key for record in left.survey.records] == [
        "p00.png",
        "p02.png",
    ]
    (entry,) = json.loads((tmp_path / "output/ledger.json").read_text())["datasets"]
    assert (entry["found"], entry["trained"], entry["left_out"]) == (3, 2, [["p01.png", "is damaged"]])
    assert json.loads((tmp_path / "output/plan.json").read_text())["buckets"][0]["pictures"] == 2
    with pytest.raises(UserError, match="not one of 3 pictures"):
        without(prepared, {record.id: "is damaged" for record in prepared.survey.records})


@pytest.fixture
def small(tmp_path: Path) -> Any:
    pictures(tmp_path / "pictures", 3)
    drawing = {"validation_disable": False, "validation_prompt": "a star", "validation_resolution": 32}
    few = {"validation_num_inference_steps": 1, "validation_step_interval": 1, "checkpoint_step_interval": 2}
    return small_run(tmp_path, max_train_steps=3, **drawing, **few)


def test_a_run_tells_its_course_in_order_and_gives_all_back(small, tmp_path):
    """Pictures before, after a step and at the end; checkpoints when due and last; then the pipeline."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    heard = Heard()
    with one_thread():
        progress = run(small, sinks=[heard], notes=["a note of the command line"])
    assert (progress.step, progress.images) == (3, 6)
    kinds = [type(event) for event in heard.events if not isinstance(event, CacheProgress)]
    middle = [Stepped, Validated, Stepped, Saved, Validated, Stepped]
    assert kinds == [Started, Validated, *middle, Saved, Validated, Finished]
    assert heard.encoded == {"text": 5, "latents of d0": 3}  # "", three captions and the prompt
    assert [len(event.files) for event in heard.of(Validated)] == [1, 1, 1, 1]
    assert heard.of(Finished)[0].pipeline == str(tmp_path / "output/pipeline")
    assert [line["step"] for line in metrics_of(tmp_path / "output")] == [1, 2, 3]

    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert not [handler for handler in log.handlers if isinstance(handler, logging.FileHandler)]
    said = (tmp_path / "output/log.txt").read_text(encoding="utf-8")
    assert "a note of the command line" in said and "Model: nano" in said
